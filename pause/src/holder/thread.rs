//! The sandbox's thread. It makes or enters the namespaces (they are per thread), sets what is to be set in them, starts
//! the pause program if the pod needs a process, then parks until the sandbox ends.
//!
//! ```text
//!   create ── Plan ──> thread: enter, make, set, [start the program] ── Held or Error ──> create
//!                        │ parked
//!                        │ <── share_processes: make a process namespace, start the program as its PID 1
//!   Sandbox dropped ─────┴──> ends
//! ```
//! It parks also when a process holds the namespaces: the kernel ties that process to the thread that started it
//! (PDEATHSIG), so it may not end before.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc;
use std::thread::JoinHandle;

use rustix::process::Pid;
use rustix::thread::gettid;

use super::process::Process;
use crate::namespaces::{Fds, enter, keep, make};
use crate::setup::{self, Settings};
use crate::{Error, Kind, Namespace, Namespaces, UserNamespace};

/// What the thread is to do; all of it checked as far as that is possible without doing it.
pub(crate) struct Plan {
    pub(crate) namespaces: Namespaces,
    pub(crate) joins: Fds,
    pub(crate) settings: Settings,
    /// The pause program, where a process shall hold.
    pub(crate) program: Option<OwnedFd>,
}

/// What holds the namespaces now.
pub(crate) struct Held {
    /// Of the process, or of the thread.
    pub(crate) pid: Pid,
    pub(crate) process: Option<Process>,
    /// Every namespace that is the pod's own, open.
    pub(crate) fds: Fds,
}

/// The parked thread; ends with this value.
#[derive(Debug)]
pub(crate) struct Parked {
    asks: Option<mpsc::Sender<Ask>>,
    thread: Option<JoinHandle<()>>,
}

/// A request for a process namespace: where the answer goes.
type Ask = mpsc::SyncSender<Result<Process, Error>>;

impl Parked {
    /// Starts the pause program as PID 1 of a new process namespace, from the thread. Works once.
    pub(crate) fn start_pid_1(&self) -> Result<Process, Error> {
        let gone = || Error::Thread(io::Error::other("it is gone"));
        let (reply, answer) = mpsc::sync_channel(1);
        let asks = self.asks.as_ref().ok_or_else(gone)?;
        asks.send(reply).map_err(|_| gone())?;
        answer.recv().map_err(|_| gone())?
    }
}

impl Drop for Parked {
    fn drop(&mut self) {
        self.asks.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Address space only: a page counts when it is used, and two are (measured, in a release build).
const STACK: usize = 128 * 1024;

pub(crate) fn start(plan: Plan) -> Result<(Parked, Held), Error> {
    let (asks, parked) = mpsc::channel::<Ask>();
    let (report, result) = mpsc::sync_channel(1);
    let work = move || {
        let held = hold(plan);
        let park = held.is_ok();
        if report.send(held).is_ok() && park {
            // Ends when the other end is dropped.
            for reply in parked {
                let _ = reply.send(start_pid_1());
            }
        }
    };
    let thread = std::thread::Builder::new()
        .name("pause".to_owned())
        .stack_size(STACK)
        .spawn(work)
        .map_err(Error::Thread)?;
    let parked = Parked {
        asks: Some(asks),
        thread: Some(thread),
    };
    match result.recv() {
        Ok(held) => Ok((parked, held?)),
        Err(_) => Err(Error::Thread(io::Error::other("it is gone"))),
    }
}

fn hold(plan: Plan) -> Result<Held, Error> {
    let Plan {
        namespaces,
        mut joins,
        settings,
        program,
    } = plan;
    // What belongs to a user namespace is made, and the user namespace entered, by the program: the kernel lets no
    // thread of a threaded process in.
    let user = namespaces.wanted(Kind::User);
    for kind in [Kind::Net, Kind::Ipc, Kind::Uts, Kind::Pid] {
        if let Some(fd) = joins.get(&kind) {
            enter(kind, fd)?;
        } else if namespaces.is_new(kind) && !user {
            make(kind)?;
        }
    }
    if !user {
        setup::apply(&settings)?;
    }
    let Some(program) = program else {
        let fds = keep_all(&namespaces, "thread-self", "pid_for_children")?;
        return Ok(Held {
            pid: gettid(),
            process: None,
            fds,
        });
    };

    let process = Process::start(&program, &namespaces, joins.remove(&Kind::User))?;
    match finish(&namespaces, &settings, process.pid()) {
        Ok(fds) => Ok(Held {
            pid: process.pid(),
            process: Some(process),
            fds,
        }),
        Err(error) => {
            process.kill_and_reap();
            Err(error)
        }
    }
}

/// The thread stands in the pod's other namespaces already.
fn start_pid_1() -> Result<Process, Error> {
    let program = crate::program().map_err(Error::program("copy it into memory"))?;
    // An earlier attempt may have made one and failed after that; the kernel makes a new one only from one's own.
    enter(Kind::Pid, keep(Kind::Pid, "self", "pid")?)?;
    make(Kind::Pid)?;
    let namespaces = Namespaces {
        net: Namespace::Node,
        ipc: Namespace::Node,
        uts: Namespace::Node,
        pid: Namespace::New,
        user: UserNamespace::Node,
    };
    Process::start(&program, &namespaces, None)
}

/// Keeps the process's namespaces; follows it into those that it made itself, and sets there what is to be set.
fn finish(namespaces: &Namespaces, settings: &Settings, pid: Pid) -> Result<Fds, Error> {
    let fds = keep_all(namespaces, &pid.to_string(), "pid")?;
    if namespaces.user != UserNamespace::Node {
        for kind in [Kind::Net, Kind::Ipc, Kind::Uts] {
            if let (true, Some(fd)) = (namespaces.is_new(kind), fds.get(&kind)) {
                enter(kind, fd)?;
            }
        }
        setup::apply(settings)?;
    }
    Ok(fds)
}

fn keep_all(namespaces: &Namespaces, of: &str, pid_file: &str) -> Result<Fds, Error> {
    let mut fds = Fds::new();
    for kind in Kind::ALL
        .into_iter()
        .filter(|kind| namespaces.wanted(*kind))
    {
        let file = if kind == Kind::Pid {
            pid_file
        } else {
            kind.file()
        };
        fds.insert(kind, keep(kind, of, file)?);
    }
    Ok(fds)
}
