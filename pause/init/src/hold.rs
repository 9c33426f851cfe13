//! The program as the holder of a sandbox, started by the crate `pause` (its half: `pause/src/holder/process.rs`).
//!
//! ```text
//!   fd 0: a stream to the thread that started us             fd 1: the user namespace to enter ("j" only)
//!
//!      <- 'm'          a user namespace is made, write its maps    ("U" only; one byte back goes on)
//!      <- 'p' pid      the holder is that process, a child of the shim's too; one byte back ends this one    ("p" only)
//!      <- 'e' step errno   it failed, nothing of it stays
//!      <- 'r'          locked in but for the last steps; after that the end of the stream says "in the loop"
//! ```
//! A message is 8 bytes: letter, step, 0, 0, and the number in the machine's byte order.
//!
//! `how` is a row of letters: `j` enter the user namespace of fd 1, `U` make one, then `n` `i` `u` `p` make network,
//! IPC, UTS, process namespace (owned by that user namespace, which is why the starting thread cannot make them).
//!
//! What is left in the end is a process without capabilities, files, root directory, arguments, environment and stack:
//! one read-only mapping of this published program, a page with its name, five system calls, a loop. A container may be given CAP_SYS_PTRACE
//! and with it the right to look into PID 1: there is nothing to be found.

use crate::sealed::{self, LARGEST_PAGE};
use crate::sys::{self, call, nr, prctl, Errno};

/// Names of the steps, for the crate's error text: keep in the order of `STEPS` in `pause/src/holder/process.rs`.
#[repr(u8)]
#[derive(Clone, Copy)]
enum Step {
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

const LIFELINE: usize = 0;

struct Failed(Step, Errno);

fn message(letter: u8, step: u8, number: i32) {
    let n = number.to_ne_bytes();
    sys::write(LIFELINE, &[letter, step, 0, 0, n[0], n[1], n[2], n[3]]);
}

pub fn run(how: &'static [u8], stack: usize) -> ! {
    sys::block_signals();
    let done = enter(how).and_then(|()| lock_in());
    if let Err(Failed(step, errno)) = done {
        message(b'e', step as u8, errno);
        sys::exit(1)
    }
    // From here on nothing can fail that would matter, and the stream's end tells the other side.
    sealed::run(stack, name_page() + LARGEST_PAGE)
}

/// A system call as a step of the protocol.
fn step(step: Step, n: usize, a: [usize; 5]) -> Result<usize, Failed> {
    // SAFETY: all callers in this file pass numbers, or addresses of values that live during the call.
    unsafe { call(n, a) }.map_err(|errno| Failed(step, errno))
}

/// A user namespace, and namespaces that belong to it: only a process with a single thread can enter one.
fn enter(how: &[u8]) -> Result<(), Failed> {
    let has = |letter: u8| how.contains(&letter);
    if has(b'j') {
        step(Step::JoinUser, nr::SETNS, [1, sys::CLONE_NEWUSER, 0, 0, 0])?;
    } else if has(b'U') {
        step(
            Step::MakeUser,
            nr::UNSHARE,
            [sys::CLONE_NEWUSER, 0, 0, 0, 0],
        )?;
        message(b'm', 0, 0);
        let mut answer = [0_u8; 1];
        let buffer = answer.as_mut_ptr() as usize;
        if step(Step::Maps, nr::READ, [LIFELINE, buffer, 1, 0, 0])? != 1 {
            sys::exit(1)
        }
    } else {
        return Ok(());
    }
    step(Step::BecomeRoot, nr::SETRESGID, [0; 5])?;
    step(Step::BecomeRoot, nr::SETRESUID, [0; 5])?;
    let mut flags = 0;
    for (letter, flag) in [
        (b'n', sys::CLONE_NEWNET),
        (b'i', sys::CLONE_NEWIPC),
        (b'u', sys::CLONE_NEWUTS),
        (b'p', sys::CLONE_NEWPID),
    ] {
        if has(letter) {
            flags |= flag;
        }
    }
    step(Step::MakeNamespaces, nr::UNSHARE, [flags, 0, 0, 0, 0])?;
    if has(b'p') {
        // PID 1 is the first child. With CLONE_PARENT it is the shim's child, as this process is: the same thread gets
        // its exit and its PDEATHSIG comes from the same thread.
        let flags = sys::CLONE_PARENT | sys::SIGCHLD as usize;
        let child = step(Step::Fork, nr::CLONE, [flags, 0, 0, 0, 0])?;
        if child != 0 {
            message(b'p', 0, child as i32);
            // Not to end before the starting side knows it by a pidfd: whoever waits for children there may be faster.
            let mut answer = [0_u8; 1];
            let buffer = answer.as_mut_ptr() as usize;
            let _ = step(Step::Fork, nr::READ, [LIFELINE, buffer, 1, 0, 0]);
            sys::exit(0)
        }
    }
    Ok(())
}

fn lock_in() -> Result<(), Failed> {
    empty_root()?;
    no_capabilities()?;
    // Changing credentials makes the process dumpable again and clears PDEATHSIG, so these come after it.
    prctl(sys::PR_SET_NO_NEW_PRIVS, 1, 0).map_err(|e| Failed(Step::NoNewPrivileges, e))?;
    prctl(sys::PR_SET_DUMPABLE, 0, 0).map_err(|e| Failed(Step::NotDumpable, e))?;
    prctl(sys::PR_SET_PDEATHSIG, sys::SIGKILL, 0).map_err(|e| Failed(Step::DieWithParent, e))?;
    end_if_orphan();
    let _ = prctl(sys::PR_SET_NAME, c"pause".as_ptr() as usize, 0);
    forget_start()?;
    // Every file but the lifeline; closing that one is the last act.
    if step(
        Step::Seccomp,
        nr::CLOSE_RANGE,
        [1, u32::MAX as usize, 0, 0, 0],
    )
    .is_err()
    {
        // Before Linux 5.9. The starting side passes three files and marks its others close-on-exec.
        for fd in 1..1024 {
            let _ = step(Step::Seccomp, nr::CLOSE, [fd, 0, 0, 0, 0]);
        }
    }
    message(b'r', 0, 0);
    only_these_calls()
}

/// An own mount namespace whose root is an empty, read-only file system, so that /proc/1/root leads nowhere, and an own
/// cgroup namespace, so that /proc/1/ns/cgroup does not lead to the root of the node's cgroups.
fn empty_root() -> Result<(), Failed> {
    const PRIVATE: usize = 1 << 18 | 1 << 14;
    const READ_ONLY_NOSUID_NODEV_NOEXEC: usize = 1 | 2 | 4 | 8;
    const DETACH: usize = 2;
    let at = Step::EmptyRoot;
    let path = |text: &'static [u8]| text.as_ptr() as usize;
    step(
        Step::MountNamespace,
        nr::UNSHARE,
        [sys::CLONE_NEWNS | sys::CLONE_NEWCGROUP, 0, 0, 0, 0],
    )?;
    // Else what follows would be seen on the node.
    step(at, nr::MOUNT, [0, path(b"/\0"), 0, PRIVATE, 0])?;
    let (tmpfs, place) = (path(b"tmpfs\0"), path(b"/proc\0"));
    let options = path(b"size=4k,nr_inodes=2,mode=555\0");
    step(
        at,
        nr::MOUNT,
        [tmpfs, place, tmpfs, READ_ONLY_NOSUID_NODEV_NOEXEC, options],
    )?;
    step(at, nr::CHDIR, [place, 0, 0, 0, 0])?;
    let here = path(b".\0");
    match step(at, nr::PIVOT_ROOT, [here, here, 0, 0, 0]) {
        // The old root now lies on top of the new one.
        Ok(_) => step(at, nr::UMOUNT2, [here, DETACH, 0, 0, 0])?,
        // The node runs from its initramfs, which cannot be pivoted away.
        Err(_) => step(at, nr::CHROOT, [here, 0, 0, 0, 0])?,
    };
    step(at, nr::CHDIR, [path(b"/\0"), 0, 0, 0, 0])?;
    Ok(())
}

fn no_capabilities() -> Result<(), Failed> {
    const INVALID: Errno = 22;
    // While CAP_SETPCAP is still there: nothing may ever come back. The first unknown number ends the row.
    for capability in 0..64 {
        match prctl(sys::PR_CAPBSET_DROP, capability, 0) {
            Ok(_) => {}
            Err(INVALID) => break,
            Err(errno) => return Err(Failed(Step::Capabilities, errno)),
        }
    }
    let _ = prctl(sys::PR_CAP_AMBIENT, sys::PR_CAP_AMBIENT_CLEAR_ALL, 0);

    step(Step::Identity, nr::SETGROUPS, [0; 5])?;
    // 65535 as the pause images have it. In a user namespace it may be unmapped; whoever is root there is nobody on
    // the node, and without capabilities nobody there either.
    for id in [65535, 65534, 0] {
        let group = step(Step::Identity, nr::SETRESGID, [id, id, id, 0, 0]);
        let user = group.and_then(|_| step(Step::Identity, nr::SETRESUID, [id, id, id, 0, 0]));
        match user {
            Ok(_) => break,
            Err(Failed(_, INVALID)) if id != 0 => {}
            Err(failed) => return Err(failed),
        }
    }

    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let none = [0_u32; 6];
    step(
        Step::Capabilities,
        nr::CAPSET,
        [header.as_ptr() as usize, none.as_ptr() as usize, 0, 0, 0],
    )?;
    Ok(())
}

/// The shim may have died before PR_SET_PDEATHSIG: its end of the lifeline is closed then.
fn end_if_orphan() {
    const POLLHUP: u16 = 0x10;
    #[repr(C)]
    struct PollFd(u32, u16, u16);
    let mut lifeline = PollFd(LIFELINE as u32, 0, 0);
    let no_time = [0_usize; 2];
    let fds = &mut lifeline as *mut PollFd as usize;
    let polled = step(
        Step::DieWithParent,
        nr::PPOLL,
        [fds, 1, no_time.as_ptr() as usize, 0, 8],
    );
    // SAFETY: a plain read of a local that the kernel may have written.
    let events = unsafe { core::ptr::addr_of!(lifeline.2).read_volatile() };
    if polled.is_err() || events & POLLHUP != 0 {
        sys::exit(1)
    }
}

extern "C" {
    static program_start: u8;
    static program_end: u8;
}

/// What `ps` and `/proc/1/cmdline` show. The kernel reads it from anonymous memory only, so it gets a page of its own,
/// behind the program.
const NAME: [u8; 7] = *b"/pause\0";

fn name_page() -> usize {
    core::ptr::addr_of!(program_end) as usize
}

/// Gives the name its page, and tells the kernel that environment and auxiliary vector are gone (environ then has no
/// bytes). A kernel without CONFIG_CHECKPOINT_RESTORE refuses the latter; cmdline and environ then lead to the unmapped
/// stack, which is as empty.
fn forget_start() -> Result<(), Failed> {
    const READ: usize = 1;
    const WRITE: usize = 2;
    const PRIVATE_FIXED_ANONYMOUS: usize = 0x02 | 0x10 | 0x20;
    let at = Step::Name;
    let page = name_page();
    let flags = PRIVATE_FIXED_ANONYMOUS;
    step(
        at,
        nr::MMAP,
        [page, NAME.len(), READ | WRITE, flags, usize::MAX],
    )?;
    // SAFETY: the page has just been mapped there, writable, and is nobody else's.
    unsafe { (page as *mut [u8; NAME.len()]).write(NAME) };
    step(at, nr::MPROTECT, [page, NAME.len(), READ, 0, 0])?;
    #[repr(C)]
    struct Map {
        code: [usize; 2],
        data: [usize; 2],
        brk: [usize; 2],
        stack: usize,
        arguments: [usize; 2],
        environment: [usize; 2],
        auxv: usize,
        auxv_size: u32,
        exe_fd: u32,
    }
    let start = core::ptr::addr_of!(program_start) as usize;
    let end = core::ptr::addr_of!(program_end) as usize;
    let nothing = [0_usize; 2];
    let map = Map {
        code: [start, end],
        data: [start, start],
        brk: [end, end],
        stack: start,
        arguments: [page, page + NAME.len()],
        environment: [start, start],
        auxv: nothing.as_ptr() as usize,
        auxv_size: 16,
        exe_fd: u32::MAX,
    };
    let address = &map as *const Map as usize;
    let size = core::mem::size_of::<Map>();
    let _ = step(
        at,
        nr::PRCTL,
        [sys::PR_SET_MM, sys::PR_SET_MM_MAP, address, size, 0],
    );
    Ok(())
}

fn only_these_calls() -> Result<(), Failed> {
    #[repr(C)]
    #[derive(Clone, Copy)]
    struct Instruction {
        code: u16,
        yes: u8,
        no: u8,
        k: u32,
    }
    #[repr(C)]
    struct Program {
        length: u16,
        filter: *const Instruction,
    }
    const LOAD: u16 = 0x20;
    const EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    const ALLOW: u32 = 0x7fff_0000;
    const KILL_PROCESS: u32 = 0x8000_0000;
    const SECCOMP_SET_MODE_FILTER: usize = 1;
    // `munmap` and `close` are for the last steps. With no file and no memory left they are of no use to anybody.
    let calls = [
        nr::RT_SIGTIMEDWAIT,
        nr::WAIT4,
        nr::EXIT_GROUP,
        nr::MUNMAP,
        nr::CLOSE,
    ];
    let ret = |k| Instruction {
        code: RETURN,
        yes: 0,
        no: 0,
        k,
    };
    let load = |k| Instruction {
        code: LOAD,
        yes: 0,
        no: 0,
        k,
    };
    let equal = |k, yes, no| Instruction {
        code: EQUAL,
        yes,
        no,
        k,
    };
    // struct seccomp_data: the number at 0, the machine at 4.
    let filter = [
        load(4),
        equal(nr::AUDIT_ARCH, 0, 6),
        load(0),
        equal(calls[0] as u32, 5, 0),
        equal(calls[1] as u32, 4, 0),
        equal(calls[2] as u32, 3, 0),
        equal(calls[3] as u32, 2, 0),
        equal(calls[4] as u32, 1, 0),
        ret(KILL_PROCESS),
        ret(ALLOW),
    ];
    let program = Program {
        length: 10,
        filter: filter.as_ptr(),
    };
    let address = &program as *const Program as usize;
    step(
        Step::Seccomp,
        nr::SECCOMP,
        [SECCOMP_SET_MODE_FILTER, 0, address, 0, 0],
    )?;
    Ok(())
}
