//! The sandbox's thread. Namespaces are per thread: the thread makes or enters them, sets what is to be set in them,
//! starts the pause program if the pod needs a process, then parks until the sandbox ends.
//!
//! ```text
//!   create ── Plan ──> thread: enter, make, set, [start the program] ── HeldNamespaces or Error ──> create
//!                        │ parked
//!                        │ <── share_processes: make a process namespace, start the program as its PID 1
//!   Sandbox dropped ─────┴──> ends
//! ```
//! The thread also parks when a process holds the namespaces: the kernel kills that process when the thread that
//! started it ends (`PR_SET_PDEATHSIG`), so the thread must not end earlier.

use std::io;
use std::sync::mpsc;
use std::thread::JoinHandle;

use rustix::process::Pid;
use rustix::thread::gettid;

use super::process::PauseProcess;
use crate::namespaces::{OpenNamespaces, enter, keep, make};
use crate::plan::Plan;
use crate::setup::{self, Settings};
use crate::{Error, Namespace, NamespaceKind, Namespaces, UserNamespace};

/// What the thread reports once the namespaces are held.
pub(crate) struct HeldNamespaces {
    /// The id of the holder: of the process, or of the thread.
    pub(crate) pid: Pid,
    pub(crate) process: Option<PauseProcess>,
    /// Every namespace that is the pod's own.
    pub(crate) open: OpenNamespaces,
}

/// The parked thread. Dropping this value ends and joins the thread.
#[derive(Debug)]
pub(crate) struct ParkedThread {
    requests: Option<mpsc::Sender<Pid1Request>>,
    thread: Option<JoinHandle<()>>,
}

/// A request for a process namespace with a PID 1: where the answer goes.
type Pid1Request = mpsc::SyncSender<Result<PauseProcess, Error>>;

impl ParkedThread {
    /// Has the thread start the pause program as PID 1 of a new process namespace. Succeeds once.
    pub(crate) fn start_pid_1(&self) -> Result<PauseProcess, Error> {
        let gone = || Error::Thread(io::Error::other("it is gone"));
        let (reply, answer) = mpsc::sync_channel(1);
        let requests = self.requests.as_ref().ok_or_else(gone)?;
        requests.send(reply).map_err(|_| gone())?;
        answer.recv().map_err(|_| gone())?
    }
}

impl Drop for ParkedThread {
    fn drop(&mut self) {
        self.requests.take();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Bytes of address space, not of memory: the thread uses two pages of its stack (measured, in a release build).
const STACK: usize = 128 * 1024;

/// Starts the thread and waits until it has carried out the plan.
pub(crate) fn start(plan: Plan) -> Result<(ParkedThread, HeldNamespaces), Error> {
    let (requests, received) = mpsc::channel::<Pid1Request>();
    let (report, result) = mpsc::sync_channel(1);
    let work = move || {
        let held = carry_out(plan);
        let park = held.is_ok();
        if report.send(held).is_ok() && park {
            // Ends when `ParkedThread` drops the other end.
            for reply in received {
                let _ = reply.send(start_pid_1());
            }
        }
    };
    let thread = std::thread::Builder::new()
        .name("pause".to_owned())
        .stack_size(STACK)
        .spawn(work)
        .map_err(Error::Thread)?;
    let parked = ParkedThread {
        requests: Some(requests),
        thread: Some(thread),
    };
    match result.recv() {
        Ok(held) => Ok((parked, held?)),
        Err(_) => Err(Error::Thread(io::Error::other("it is gone"))),
    }
}

fn carry_out(plan: Plan) -> Result<HeldNamespaces, Error> {
    let Plan {
        namespaces,
        mut joins,
        settings,
        program,
    } = plan;
    // The kernel lets no thread of a threaded process into a user namespace. So the program enters the user namespace,
    // and makes the namespaces that belong to it.
    let user = namespaces.is_new_or_joined(NamespaceKind::User);
    for kind in [
        NamespaceKind::Net,
        NamespaceKind::Ipc,
        NamespaceKind::Uts,
        NamespaceKind::Pid,
    ] {
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
        let open = keep_all(&namespaces, "thread-self", "pid_for_children")?;
        return Ok(HeldNamespaces {
            pid: gettid(),
            process: None,
            open,
        });
    };

    let process = PauseProcess::start(&program, &namespaces, joins.remove(&NamespaceKind::User))?;
    match keep_and_set_up(&namespaces, &settings, process.pid()) {
        Ok(open) => Ok(HeldNamespaces {
            pid: process.pid(),
            process: Some(process),
            open,
        }),
        Err(error) => {
            process.kill_and_reap();
            Err(error)
        }
    }
}

/// The thread stands in the pod's other namespaces already.
fn start_pid_1() -> Result<PauseProcess, Error> {
    let program = crate::program_memfd().map_err(Error::program("copy it into memory"))?;
    // Undoes an earlier attempt that failed after its `make`. The kernel makes a new process namespace only while the
    // thread's children would be in the thread's own (EINVAL of unshare(2)).
    enter(NamespaceKind::Pid, keep(NamespaceKind::Pid, "self", "pid")?)?;
    make(NamespaceKind::Pid)?;
    let namespaces = Namespaces {
        net: Namespace::Node,
        ipc: Namespace::Node,
        uts: Namespace::Node,
        pid: Namespace::New,
        user: UserNamespace::Node,
    };
    PauseProcess::start(&program, &namespaces, None)
}

/// Keeps the namespaces of the process. Enters those that the process made itself, and sets there what is to be set.
fn keep_and_set_up(
    namespaces: &Namespaces,
    settings: &Settings,
    pid: Pid,
) -> Result<OpenNamespaces, Error> {
    let open = keep_all(namespaces, &pid.to_string(), "pid")?;
    if namespaces.user != UserNamespace::Node {
        for kind in [NamespaceKind::Net, NamespaceKind::Ipc, NamespaceKind::Uts] {
            if let (true, Some(fd)) = (namespaces.is_new(kind), open.get(&kind)) {
                enter(kind, fd)?;
            }
        }
        setup::apply(settings)?;
    }
    Ok(open)
}

/// Opens every namespace that is the pod's own, by the files in `/proc/<task>/ns`.
fn keep_all(namespaces: &Namespaces, task: &str, pid_file: &str) -> Result<OpenNamespaces, Error> {
    namespaces
        .new_or_joined_kinds()
        .map(|kind| {
            let file = if kind == NamespaceKind::Pid {
                pid_file
            } else {
                kind.file()
            };
            Ok((kind, keep(kind, task, file)?))
        })
        .collect()
}
