//! The pause program as the holder, seen from the thread that starts the program. The other half, with a picture of the
//! protocol, is `pause/init/src/hold.rs`.
//!
//! In a user namespace with a process namespace the program forks: the process that makes a process namespace stays
//! outside, and the first process that it forks is PID 1. The fork is a child of the thread too (`CLONE_PARENT`), and
//! the process in between ends at once.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};

use crate::{Error, IdMap, NamespaceKind, Namespaces, UserNamespace, namespaces};

/// What the program did when it failed, in the order of `Step` in `init/src/hold.rs`.
const STEPS: [&str; 15] = [
    "enter user namespace",
    "make user namespace",
    "wait for the user namespace's maps",
    "become root of the user namespace",
    "make namespaces in the user namespace",
    "fork PID 1",
    "make mount and cgroup namespace",
    "change to an empty root",
    "drop capabilities",
    "change user and group",
    "set no_new_privs",
    "set not dumpable",
    "die with the shim",
    "publish its name",
    "close files and install the seccomp filter",
];

/// How long the program may take until its next message: a millisecond as a rule, longer on a node that swaps.
const PATIENCE: Duration = Duration::from_secs(10);

/// A running pause program that has locked itself in. The program's exit goes to whoever waits for the children of this
/// process.
#[derive(Debug)]
pub(crate) struct PauseProcess {
    pid: Pid,
    pidfd: OwnedFd,
}

impl PauseProcess {
    /// Starts the program and waits until it is in its loop. `user` is the user namespace to join.
    pub(crate) fn start(
        program: &OwnedFd,
        namespaces: &Namespaces,
        user: Option<OwnedFd>,
    ) -> Result<Self, Error> {
        let (child, lifeline) = spawn(program, &orders(namespaces), user)?;
        let mut forked = None;
        match converse(lifeline, &child, namespaces, &mut forked) {
            Ok(()) => match forked {
                None => Ok(child),
                Some(holder) => {
                    // A short wait: the stream has ended, so the process in between is exiting.
                    child.reap();
                    Ok(holder)
                }
            },
            Err(error) => {
                child.kill_and_reap();
                if let Some(holder) = forked {
                    holder.kill_and_reap();
                }
                Err(error)
            }
        }
    }

    fn open(pid: Pid) -> Result<Self, Error> {
        match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Self { pid, pidfd }),
            Err(Errno::SRCH) => Err(Error::ProgramEnded),
            // The program ends by itself when the lifeline closes.
            Err(error) => Err(Error::program("open a pidfd")(error.into())),
        }
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        pidfd_send_signal(&self.pidfd, signal).map_err(io::Error::from)
    }

    /// For a process that the caller of this crate never hears of.
    pub(crate) fn kill_and_reap(self) {
        let _ = self.signal(Signal::KILL);
        self.reap();
    }

    /// Returns at once if the caller's own waiter has reaped the process. Waits by pidfd, because the pid may by then
    /// belong to another child.
    fn reap(&self) {
        let child = || WaitId::PidFd(self.pidfd.as_fd());
        while let Err(Errno::INTR) = waitid(child(), WaitIdOptions::EXITED) {}
    }
}

/// Starts the program with these orders. Returns the process, and this side's end of the lifeline.
fn spawn(
    program: &OwnedFd,
    orders: &str,
    user: Option<OwnedFd>,
) -> Result<(PauseProcess, UnixStream), Error> {
    let (ours, theirs) = UnixStream::pair().map_err(Error::program("open the lifeline"))?;
    ours.set_read_timeout(Some(PATIENCE))
        .map_err(Error::program("open the lifeline"))?;

    let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    command
        .arg0("pause")
        .args(["hold", orders])
        .env_clear()
        .stdin(OwnedFd::from(theirs))
        .stdout(user.map_or_else(Stdio::null, Stdio::from))
        .stderr(Stdio::null());
    let child = command.spawn().map_err(Error::program("start"))?;
    // Closes this process's copy of the program's end. While a copy is open, the stream has no end.
    drop(command);
    let child = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or(Error::ProgramEnded)?;

    Ok((PauseProcess::open(child)?, ours))
}

/// Makes a user namespace by a process that is killed before it does anything else.
pub(crate) fn user_namespace(program: &OwnedFd, user: &UserNamespace) -> Result<OwnedFd, Error> {
    let (child, mut lifeline) = spawn(program, "U", None)?;
    let made = match receive(&mut lifeline) {
        Ok(Some(Message::MapsWanted)) => write_maps(child.pid(), user)
            .and_then(|()| namespaces::keep(NamespaceKind::User, &child.pid().to_string(), "user")),
        Ok(Some(message)) => Err(message.failure()),
        Ok(None) => Err(Error::ProgramEnded),
        Err(error) => Err(error),
    };
    child.kill_and_reap();
    made
}

/// What the program says.
enum Message {
    /// The user namespace is made, and waits for its maps and an answer.
    MapsWanted,
    /// The holder has this process id. The process in between waits for an answer.
    Forked(i32),
    /// The holder is ready but for its last steps.
    Ready,
    Failed {
        step: u8,
        errno: i32,
    },
    Unknown,
}

impl Message {
    fn parse(bytes: [u8; 8]) -> Self {
        let [letter, step, _, _, number @ ..] = bytes;
        let number = i32::from_ne_bytes(number);
        match letter {
            b'm' => Self::MapsWanted,
            b'p' => Self::Forked(number),
            b'r' => Self::Ready,
            b'e' => Self::Failed {
                step,
                errno: number,
            },
            _ => Self::Unknown,
        }
    }

    /// The error for a message that ends the conversation: a failed step, or a breach of the protocol.
    fn failure(&self) -> Error {
        let Self::Failed { step, errno } = self else {
            return Error::ProgramEnded;
        };
        let operation = STEPS
            .get(usize::from(*step))
            .copied()
            .unwrap_or("unknown step");
        Error::program(operation)(io::Error::from_raw_os_error(*errno))
    }
}

/// The next message; `None` when the program has closed its end.
fn receive(lifeline: &mut UnixStream) -> Result<Option<Message>, Error> {
    let mut message = [0_u8; 8];
    let Err(error) = lifeline.read_exact(&mut message) else {
        return Ok(Some(Message::parse(message)));
    };
    let kind = error.kind();
    if matches!(kind, ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) {
        return Ok(None);
    }
    if matches!(kind, ErrorKind::WouldBlock | ErrorKind::TimedOut) {
        let timed_out = ErrorKind::TimedOut.into();
        return Err(Error::program("wait until it is ready")(timed_out));
    }
    Err(Error::program("read from the lifeline")(error))
}

/// Lets the program go on.
fn answer(lifeline: &mut UnixStream) -> Result<(), Error> {
    lifeline
        .write_all(b"+")
        .map_err(Error::program("write to the lifeline"))
}

/// The orders, as `init/src/hold.rs` describes them.
fn orders(namespaces: &Namespaces) -> String {
    let mut orders = match namespaces.user {
        UserNamespace::Node => return "-".to_owned(),
        UserNamespace::Join(_) | UserNamespace::OwnerOf(_) => "j".to_owned(),
        UserNamespace::New { .. } => "U".to_owned(),
    };
    for (kind, letter) in [
        (NamespaceKind::Net, 'n'),
        (NamespaceKind::Ipc, 'i'),
        (NamespaceKind::Uts, 'u'),
        (NamespaceKind::Pid, 'p'),
    ] {
        if namespaces.is_new(kind) {
            orders.push(letter);
        }
    }
    orders
}

/// Talks to the program until the stream ends, which happens when the program is in its loop or has died.
fn converse(
    mut lifeline: UnixStream,
    child: &PauseProcess,
    namespaces: &Namespaces,
    forked: &mut Option<PauseProcess>,
) -> Result<(), Error> {
    let mut ready = false;
    while let Some(message) = receive(&mut lifeline)? {
        match message {
            Message::MapsWanted => {
                write_maps(child.pid(), &namespaces.user)?;
                answer(&mut lifeline)?;
            }
            Message::Forked(pid) => {
                let pid = Pid::from_raw(pid).ok_or(Error::ProgramEnded)?;
                *forked = Some(PauseProcess::open(pid)?);
                answer(&mut lifeline)?;
            }
            Message::Ready => ready = true,
            Message::Failed { .. } | Message::Unknown => return Err(message.failure()),
        }
    }
    if ready {
        Ok(())
    } else {
        Err(Error::ProgramEnded)
    }
}

fn write_maps(pid: Pid, user: &UserNamespace) -> Result<(), Error> {
    let UserNamespace::New { uid_map, gid_map } = user else {
        return Ok(());
    };
    for (file, map) in [("uid_map", uid_map), ("gid_map", gid_map)] {
        let lines: String = map.iter().map(map_line).collect();
        fs::write(format!("/proc/{pid}/{file}"), lines)
            .map_err(|source| Error::IdMap { file, source })?;
    }
    Ok(())
}

fn map_line(map: &IdMap) -> String {
    format!("{} {} {}\n", map.container, map.host, map.size)
}
