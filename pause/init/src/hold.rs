//! The program as the holder of a sandbox, started by the crate `pause` (its half: `pause/src/holder/process.rs`).
//!
//! ```text
//!   descriptor 0: the lifeline, a stream to the thread that started the program
//!   descriptor 1: the user namespace to enter (order `j`)
//!
//!   program ──> thread
//!      'm'             the user namespace is made (order `U`): the thread writes the maps and answers with one byte
//!      'p' pid         the holder is that process, a child of the shim too (order `p`): the thread answers with one
//!                      byte, and the process in between ends
//!      'e' step errno  that step failed, and nothing of the holder stays
//!      'r'             ready: the holder is locked in but for the last steps, and the end of the stream will say that
//!                      the holder is in its loop
//! ```
//! A message is 8 bytes: letter, step, 0, 0, and the number in the machine's byte order.
//!
//! The orders are a row of letters. `j` enters the user namespace of descriptor 1, `U` makes one. Then `n`, `i`, `u`
//! and `p` make a network, IPC, UTS and process namespace. These belong to that user namespace, which is why the
//! starting thread cannot make them. Any other row gives no order.
//!
//! In the end the holder is a process without capabilities, files, root directory, arguments, environment and stack:
//! one read-only mapping of this published program, a page with its name, five system calls, and a loop. A container
//! may be given CAP_SYS_PTRACE and with it the right to look into PID 1; there is nothing to find.

use crate::final_loop;
use crate::lock_in::lock_in;
use crate::start_stack::StartStack;
use crate::sys::{self, Errno};

/// What can fail. `STEPS` in `pause/src/holder/process.rs` has the texts, in this order.
#[repr(u8)]
#[derive(Clone, Copy)]
pub enum Step {
    JoinUser,
    MakeUser,
    Maps,
    BecomeRoot,
    MakeNamespaces,
    Fork,
    MountNamespace,
    EmptyRoot,
    Capabilities,
    Identity,
    NoNewPrivileges,
    NotDumpable,
    DieWithParent,
    Name,
    Seccomp,
}

/// The step that failed, and why.
pub struct Failed(pub Step, pub Errno);

impl Step {
    /// For `map_err`.
    pub fn failed(self) -> impl FnOnce(Errno) -> Failed {
        move |errno| Failed(self, errno)
    }
}

/// The descriptor of the stream to the thread that started the program.
pub const LIFELINE: usize = 0;

/// Sends a message without a step.
pub fn send(letter: u8, number: i32) {
    send_with_step(letter, 0, number);
}

fn send_with_step(letter: u8, step: u8, number: i32) {
    let n = number.to_ne_bytes();
    sys::write(LIFELINE, &[letter, step, 0, 0, n[0], n[1], n[2], n[3]]);
}

pub fn run(orders: &[u8], stack: StartStack) -> ! {
    sys::block_signals();
    let done = enter_namespaces(orders).and_then(|()| lock_in());
    if let Err(Failed(step, errno)) = done {
        send_with_step(b'e', step as u8, errno);
        sys::exit(1)
    }
    // From here on no failure matters, and the end of the stream tells the other side.
    final_loop::run(stack)
}

/// Enters the user namespace and makes the namespaces that belong to it: only a process with one thread can.
fn enter_namespaces(orders: &[u8]) -> Result<(), Failed> {
    let ordered = |letter: u8| orders.contains(&letter);
    if ordered(b'j') {
        sys::setns(1, sys::CLONE_NEWUSER).map_err(Step::JoinUser.failed())?;
    } else if ordered(b'U') {
        make_user_namespace()?;
    } else {
        return Ok(());
    }
    sys::set_group(0).map_err(Step::BecomeRoot.failed())?;
    sys::set_user(0).map_err(Step::BecomeRoot.failed())?;

    let mut kinds = 0;
    for (letter, kind) in [
        (b'n', sys::CLONE_NEWNET),
        (b'i', sys::CLONE_NEWIPC),
        (b'u', sys::CLONE_NEWUTS),
        (b'p', sys::CLONE_NEWPID),
    ] {
        if ordered(letter) {
            kinds |= kind;
        }
    }
    sys::unshare(kinds).map_err(Step::MakeNamespaces.failed())?;
    if ordered(b'p') {
        go_on_as_pid_1()?;
    }
    Ok(())
}

/// Makes the user namespace, and waits until the thread has written its maps.
fn make_user_namespace() -> Result<(), Failed> {
    sys::unshare(sys::CLONE_NEWUSER).map_err(Step::MakeUser.failed())?;
    send(b'm', 0);
    match sys::read_byte(LIFELINE).map_err(Step::Maps.failed())? {
        1 => Ok(()),
        _ => sys::exit(1),
    }
}

/// Forks, because this process stays outside of the namespace that it made: the first process that it forks is PID 1.
/// Returns in PID 1 only.
fn go_on_as_pid_1() -> Result<(), Failed> {
    // PID 1 is the shim's child, as this process is: the thread that started this process gets the exit of PID 1, and
    // the PDEATHSIG of PID 1 comes from the end of that thread.
    let child = sys::fork_sibling().map_err(Step::Fork.failed())?;
    if child == 0 {
        return Ok(());
    }
    send(b'p', child as i32);
    // The answer says that the thread has a pidfd of this process. Ending earlier would let the shim's waiter for all
    // children reap this process before the thread can open the pidfd.
    let _ = sys::read_byte(LIFELINE);
    sys::exit(0)
}
