//! The pause program as holder, seen from the thread that starts it. The other half, with the protocol's picture, is
//! `pause/init/src/hold.rs`.
//!
//! In a user namespace with a process namespace the program forks, for PID 1 must be a child: PID 1 is the thread's
//! child too (CLONE_PARENT), and the process between them ends at once.

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

use crate::{Error, IdMap, Kind, Namespaces, UserNamespace, namespaces};

/// In the order of `Step` in `init/src/hold.rs`.
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

/// Enough for a node that swaps; it takes a millisecond.
const PATIENCE: Duration = Duration::from_secs(10);

/// A running, locked-in pause program. Whoever waits for the children of this (operating system) process gets its exit.
#[derive(Debug)]
pub(crate) struct Process {
    pid: Pid,
    pidfd: OwnedFd,
}

impl Process {
    /// Starts it and waits until it is in its loop. `user` is the user namespace to join.
    pub(crate) fn start(
        program: &OwnedFd,
        namespaces: &Namespaces,
        user: Option<OwnedFd>,
    ) -> Result<Self, Error> {
        let (child, ours) = spawn(program, &how(namespaces), user)?;
        let mut forked = None;
        match converse(ours, &child, namespaces, &mut forked) {
            Ok(()) => match forked {
                None => Ok(child),
                Some(holder) => {
                    // It has closed its end, as its last act.
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
            Err(error) => {
                // It ends by itself when the lifeline closes.
                Err(Error::program("open a pidfd")(error.into()))
            }
        }
    }

    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    pub(crate) fn signal(&self, signal: Signal) -> io::Result<()> {
        pidfd_send_signal(&self.pidfd, signal).map_err(io::Error::from)
    }

    /// For a sandbox that comes to nothing: its caller never hears of the process.
    pub(crate) fn kill_and_reap(self) {
        let _ = self.signal(Signal::KILL);
        self.reap();
    }

    /// The caller's own waiter may have been first: then there is nothing to wait for. By pidfd, as the pid may by then
    /// be another child's.
    fn reap(&self) {
        let child = || WaitId::PidFd(self.pidfd.as_fd());
        while let Err(Errno::INTR) = waitid(child(), WaitIdOptions::EXITED) {}
    }
}

/// Starts the program with `how` as its orders. Returns it, and this side's end of the lifeline.
fn spawn(
    program: &OwnedFd,
    how: &str,
    user: Option<OwnedFd>,
) -> Result<(Process, UnixStream), Error> {
    let (ours, theirs) = UnixStream::pair().map_err(Error::program("open the lifeline"))?;
    ours.set_read_timeout(Some(PATIENCE))
        .map_err(Error::program("open the lifeline"))?;

    let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    command
        .arg0("pause")
        .args(["hold", how])
        .env_clear()
        .stdin(OwnedFd::from(theirs))
        .stdout(user.map_or_else(Stdio::null, Stdio::from))
        .stderr(Stdio::null());
    let child = command.spawn().map_err(Error::program("start"))?;
    // Else the program's end of the lifeline would stay open here, and its end never be seen.
    drop(command);
    let child = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or(Error::ProgramEnded)?;

    Ok((Process::open(child)?, ours))
}

/// Makes a user namespace and takes it from the process that made it, which is killed before it does anything else.
pub(crate) fn user_namespace(program: &OwnedFd, user: &UserNamespace) -> Result<OwnedFd, Error> {
    let (child, mut lifeline) = spawn(program, "U", None)?;
    let made = match receive(&mut lifeline) {
        Ok(Some(Message { letter: b'm', .. })) => write_maps(child.pid(), user)
            .and_then(|()| namespaces::keep(Kind::User, &child.pid().to_string(), "user")),
        Ok(Some(message)) => Err(message.failure()),
        Ok(None) => Err(Error::ProgramEnded),
        Err(error) => Err(error),
    };
    child.kill_and_reap();
    made
}

/// What the program says.
struct Message {
    letter: u8,
    step: u8,
    number: i32,
}

impl Message {
    /// What it means where a failure is expected.
    fn failure(&self) -> Error {
        if self.letter != b'e' {
            return Error::ProgramEnded;
        }
        let operation = STEPS
            .get(usize::from(self.step))
            .copied()
            .unwrap_or("unknown step");
        Error::program(operation)(io::Error::from_raw_os_error(self.number))
    }
}

/// The next message; `None` when the program has closed its end.
fn receive(lifeline: &mut UnixStream) -> Result<Option<Message>, Error> {
    let mut message = [0_u8; 8];
    match lifeline.read_exact(&mut message) {
        Ok(()) => {
            let [letter, step, _, _, n @ ..] = message;
            let number = i32::from_ne_bytes(n);
            Ok(Some(Message {
                letter,
                step,
                number,
            }))
        }
        Err(error)
            if matches!(
                error.kind(),
                ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset
            ) =>
        {
            Ok(None)
        }
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => Err(
            Error::program("wait until it is ready")(ErrorKind::TimedOut.into()),
        ),
        Err(error) => Err(Error::program("read from the lifeline")(error)),
    }
}

/// The letters of the protocol.
fn how(namespaces: &Namespaces) -> String {
    let mut how = match namespaces.user {
        UserNamespace::Node => return "-".to_owned(),
        UserNamespace::Join(_) | UserNamespace::OwnerOf(_) => "j".to_owned(),
        UserNamespace::New { .. } => "U".to_owned(),
    };
    for (kind, letter) in [
        (Kind::Net, 'n'),
        (Kind::Ipc, 'i'),
        (Kind::Uts, 'u'),
        (Kind::Pid, 'p'),
    ] {
        if namespaces.is_new(kind) {
            how.push(letter);
        }
    }
    how
}

/// The conversation up to its end, which the program brings about when it is in its loop, or by dying.
fn converse(
    mut lifeline: UnixStream,
    child: &Process,
    namespaces: &Namespaces,
    forked: &mut Option<Process>,
) -> Result<(), Error> {
    let mut ready = false;
    loop {
        let Some(message) = receive(&mut lifeline)? else {
            return if ready {
                Ok(())
            } else {
                Err(Error::ProgramEnded)
            };
        };
        match message.letter {
            b'm' => {
                write_maps(child.pid(), &namespaces.user)?;
                lifeline
                    .write_all(b"+")
                    .map_err(Error::program("write to the lifeline"))?;
            }
            b'p' => {
                let pid = Pid::from_raw(message.number).ok_or(Error::ProgramEnded)?;
                *forked = Some(Process::open(pid)?);
                // Now the process between may end.
                lifeline
                    .write_all(b"+")
                    .map_err(Error::program("write to the lifeline"))?;
            }
            b'r' => ready = true,
            _ => return Err(message.failure()),
        }
    }
}

fn write_maps(pid: Pid, user: &UserNamespace) -> Result<(), Error> {
    let UserNamespace::New { uid_map, gid_map } = user else {
        return Ok(());
    };
    for (file, map) in [("uid_map", uid_map), ("gid_map", gid_map)] {
        let lines: String = map.iter().map(line).collect();
        fs::write(format!("/proc/{pid}/{file}"), lines)
            .map_err(|source| Error::IdMap { file, source })?;
    }
    Ok(())
}

fn line(map: &IdMap) -> String {
    format!("{} {} {}\n", map.container, map.host, map.size)
}
