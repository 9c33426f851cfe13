//! How the rest of the shim talks to the owner of a container or a sandbox: the task that owns the state.
//!
//! ```text
//!  a call ──request──▶ mailbox ──▶ the owner (container/actor.rs, pod/sandbox/owner.rs) ──▶ reply
//!  State, Wait ◀──────────────── View (watch) ◀──────┘
//! ```
//!
//! State and Wait look at the latest [`View`] and never queue behind a running runc. All other calls go through the
//! mailbox, one after the other.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::Pid;
use tokio::sync::{mpsc, oneshot, watch};

use super::state::Status;
use crate::error::{Error, Result};
use crate::io;
use crate::kernel::cgroup::Metrics;
use crate::kernel::exits::Exit;
use crate::runtime::criu::Checkpoint;

/// A process of a container.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ProcessId {
    /// The process that the container lives and dies with.
    Init,
    /// A process that was added, with its id.
    Exec(String),
}

impl ProcessId {
    /// From the wire, where the empty id is the init.
    pub fn from_wire(exec_id: &str) -> Self {
        if exec_id.is_empty() {
            Self::Init
        } else {
            Self::Exec(exec_id.to_owned())
        }
    }
}

/// What the rest of the shim sees of a process.
#[derive(Debug, Clone)]
pub struct View {
    /// None for an exec that has not started, and for an init that has not been restored.
    pub pid: Option<Pid>,
    /// Where the process is in its life.
    pub status: Status,
    /// The streams as containerd named them.
    pub io: io::Request,
}

impl View {
    /// Waits until the exit of a process is published, or the start of an exec has failed. None when a process is
    /// deleted that was never started.
    pub async fn published_exit(mut view: watch::Receiver<Self>) -> Option<Exit> {
        let ended = view
            .wait_for(|view| view.status.published_exit().is_some())
            .await;
        ended.ok()?.status.published_exit()
    }
}

/// A process that has been deleted.
#[derive(Debug, Clone, Copy)]
pub struct Deleted {
    /// The pid, if the process had one.
    pub pid: Option<Pid>,
    /// How the process ended; status 0 for a process without an exit.
    pub exit: Exit,
}

/// A process in a container's cgroup.
#[derive(Debug, Clone)]
pub struct Listed {
    /// The pid.
    pub pid: Pid,
    /// The exec, if the process is the first of an exec.
    pub exec_id: Option<String>,
}

/// The processes that a signal is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KillScope {
    /// The process itself.
    Process,
    /// Every process of the container.
    All,
}

/// The way of an answer back to the caller.
pub type Reply<T> = oneshot::Sender<Result<T>>;

/// Answers a call. A caller that is gone is no error: the work is done all the same.
pub fn answer<T>(reply: Reply<T>, result: Result<T>) {
    let _ = reply.send(result);
}

/// A call to the owner of a container.
#[derive(Debug)]
pub enum Request {
    /// Start the init or an exec.
    Start(ProcessId, Reply<Pid>),
    /// Add an exec: the id, the OCI process as JSON, the streams.
    Exec(String, Vec<u8>, io::Request, Reply<()>),
    /// Send a signal.
    Kill(ProcessId, u32, KillScope, Reply<()>),
    /// Remove an exec, or the container.
    Delete(ProcessId, Reply<Deleted>),
    /// Freeze.
    Pause(Reply<()>),
    /// Thaw.
    Resume(Reply<()>),
    /// Change limits: OCI resources as JSON.
    Update(Vec<u8>, Reply<()>),
    /// Save the container.
    Checkpoint(Checkpoint, Reply<()>),
    /// Set the size of a terminal.
    Resize(ProcessId, io::Size, Reply<()>),
    /// Close the input.
    CloseIo(ProcessId, Reply<()>),
    /// List the processes.
    Pids(Reply<Vec<Listed>>),
    /// Read the cgroup's counters.
    Stats(Reply<Metrics>),
}

/// The way of requests to an owner: of a container (with [`Request`]), or of a sandbox (with `pod::sandbox::Request`).
#[derive(Debug)]
pub struct Mailbox<R>(mpsc::UnboundedSender<R>);

impl<R> Clone for Mailbox<R> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<R> Mailbox<R> {
    /// A mailbox, and the owner's end of the mailbox.
    pub fn new() -> (Self, mpsc::UnboundedReceiver<R>) {
        let (sender, requests) = mpsc::unbounded_channel();
        (Self(sender), requests)
    }

    /// Whether the owner has ended: the container or sandbox is deleted.
    pub fn is_closed(&self) -> bool {
        self.0.is_closed()
    }

    /// Sends the request that `make` builds, and waits for the answer.
    ///
    /// # Errors
    /// The owner's errors, and `NotFound` when the owner has ended.
    pub async fn ask<T>(&self, make: impl FnOnce(Reply<T>) -> R) -> Result<T> {
        let gone = || no_process(&ProcessId::Init);
        let (reply, answer) = oneshot::channel();
        self.0.send(make(reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }
}

/// A container, seen from the rest of the shim.
#[derive(Debug, Clone)]
pub struct Handle {
    bundle: Arc<Path>,
    requests: Mailbox<Request>,
    views: Views,
}

/// The owner's end of a [`Handle`].
#[derive(Debug)]
pub struct Inbox {
    /// The calls.
    pub requests: mpsc::UnboundedReceiver<Request>,
    /// What the rest of the shim sees.
    pub views: Views,
}

/// The latest view of each process. The lock is held only to look up, add or remove a view.
#[derive(Debug, Clone, Default)]
pub struct Views(Arc<Mutex<HashMap<ProcessId, watch::Receiver<View>>>>);

impl Views {
    /// Shows a process. The owner changes the view through the sender.
    pub fn add(&self, id: ProcessId, view: View) -> watch::Sender<View> {
        let (sender, receiver) = watch::channel(view);
        self.lock().insert(id, receiver);
        sender
    }

    /// Hides the process. Pending waits still resolve.
    pub fn remove(&self, id: &ProcessId) {
        self.lock().remove(id);
    }

    fn get(&self, id: &ProcessId) -> Option<watch::Receiver<View>> {
        self.lock().get(id).cloned()
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ProcessId, watch::Receiver<View>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Handle {
    /// A handle, and the owner's end of the handle.
    pub fn new(bundle: &Path) -> (Self, Inbox) {
        let (mailbox, requests) = Mailbox::new();
        let views = Views::default();
        let inbox = Inbox {
            requests,
            views: views.clone(),
        };
        let handle = Self {
            bundle: bundle.into(),
            requests: mailbox,
            views,
        };
        (handle, inbox)
    }

    /// The container's bundle.
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// Whether the container is deleted.
    pub fn is_gone(&self) -> bool {
        self.requests.is_closed()
    }

    /// As [`Mailbox::ask`].
    ///
    /// # Errors
    /// As [`Mailbox::ask`].
    pub async fn ask<T>(&self, make: impl FnOnce(Reply<T>) -> Request) -> Result<T> {
        self.requests.ask(make).await
    }

    /// The latest view of a process. A running exec of a frozen container is shown as frozen.
    ///
    /// # Errors
    /// `NotFound` when there is no such process.
    pub fn view(&self, id: &ProcessId) -> Result<View> {
        let mut view = self.watch(id)?.borrow().clone();
        if view.status == Status::Running {
            view.status = match self.watch(&ProcessId::Init)?.borrow().status {
                Status::Paused => Status::Paused,
                Status::Created
                | Status::Running
                | Status::Ending(_)
                | Status::Ended(_)
                | Status::Failed(_)
                | Status::Stopped(_) => Status::Running,
            };
        }
        Ok(view)
    }

    /// Waits until the exit of a process is published.
    ///
    /// # Errors
    /// `NotFound` when there is no such process, or a process is deleted that never ran.
    pub async fn wait(&self, id: &ProcessId) -> Result<Exit> {
        let exit = View::published_exit(self.watch(id)?).await;
        exit.ok_or_else(|| no_process(id))
    }

    /// Whether the init is there and has not ended.
    pub fn has_process(&self) -> bool {
        self.view(&ProcessId::Init)
            .is_ok_and(|view| view.pid.is_some() && view.status.exit().is_none())
    }

    /// Resolves when the init has ended, published or not.
    pub async fn ended(&self) {
        if let Ok(mut view) = self.watch(&ProcessId::Init) {
            // An error means that the container is deleted.
            let _ = view.wait_for(|view| view.status.exit().is_some()).await;
        }
    }

    fn watch(&self, id: &ProcessId) -> Result<watch::Receiver<View>> {
        self.views.get(id).ok_or_else(|| no_process(id))
    }
}

/// The error for a process that does not exist, or no longer.
pub fn no_process(id: &ProcessId) -> Error {
    Error::NotFound(match id {
        ProcessId::Init => "the container has been deleted".into(),
        ProcessId::Exec(id) => format!("exec {id:?} does not exist"),
    })
}
