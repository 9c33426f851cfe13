//! How the rest of the shim talks to the task that owns a container or a sandbox.
//!
//! ```text
//!  RPC ──Command──▶ mailbox ──▶ the owner (container.rs, holder.rs) ──▶ reply
//!  RPC ◀───────────────── View (watch) ◀──────┘
//! ```
//!
//! Calls that change something go through the mailbox, one after the other. State and Wait only look at the latest
//! [`View`] and never queue behind a running runc.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use rustix::process::Pid;
use tokio::sync::{mpsc, oneshot, watch};

use crate::container::state::State;
use crate::error::{Error, Result};
use crate::io;
use crate::kernel::exits::Exit;
use crate::runtime::criu::Checkpoint;

/// A process of a container.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum ProcessId {
    /// The one that the container lives and dies with.
    Init,
    /// One that was added.
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

/// What can be seen of a process from outside.
#[derive(Debug, Clone)]
pub struct View {
    /// None for an exec that has not started.
    pub pid: Option<Pid>,
    /// Where it is in its life.
    pub state: State,
    /// Its streams as containerd named them.
    pub io: io::Request,
}

/// A process that has been deleted.
#[derive(Debug, Clone, Copy)]
pub struct Deleted {
    /// Its pid, if it had one.
    pub pid: Option<Pid>,
    /// How it ended.
    pub exit: Exit,
}

/// A process in a container's cgroup.
#[derive(Debug, Clone)]
pub struct Listed {
    /// Its pid.
    pub pid: Pid,
    /// The exec that it is the first process of.
    pub exec_id: Option<String>,
}

/// Whom a signal is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The process itself.
    Process,
    /// Every process of the container.
    All,
}

/// Where an answer goes.
pub type Reply<T> = oneshot::Sender<Result<T>>;

/// A call to the owner of a container.
#[derive(Debug)]
pub enum Command {
    /// Start the init or an exec.
    Start(ProcessId, Reply<Pid>),
    /// Add an exec: its id, the OCI process as JSON, its streams.
    Exec(String, Vec<u8>, io::Request, Reply<()>),
    /// Send a signal.
    Kill(ProcessId, u32, Target, Reply<()>),
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
    Stats(Reply<Any>),
    /// Path of the process namespace that the pod shares; made if there is none yet. For sandboxes.
    SharedProcesses(Reply<PathBuf>),
}

/// A container or a sandbox, seen from the rest of the shim.
#[derive(Debug, Clone)]
pub struct Handle {
    bundle: Arc<Path>,
    mailbox: mpsc::UnboundedSender<Command>,
    views: Views,
}

/// The owner's end.
#[derive(Debug)]
pub struct Owner {
    /// The calls.
    pub calls: mpsc::UnboundedReceiver<Command>,
    /// What can be seen.
    pub views: Views,
}

/// The latest view of each process. The lock is held for look-ups only.
#[derive(Debug, Clone, Default)]
pub struct Views(Arc<Mutex<HashMap<ProcessId, watch::Receiver<View>>>>);

impl Views {
    /// Shows a process; the sender changes what is seen.
    pub fn add(&self, id: ProcessId, view: View) -> watch::Sender<View> {
        let (sender, receiver) = watch::channel(view);
        self.lock().insert(id, receiver);
        sender
    }

    /// Shows it no more. Who already waits for its exit still gets it.
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
    /// A handle and the end for its owner.
    pub fn new(bundle: &Path) -> (Self, Owner) {
        let (mailbox, calls) = mpsc::unbounded_channel();
        let views = Views::default();
        let owner = Owner {
            calls,
            views: views.clone(),
        };
        let handle = Self {
            bundle: bundle.into(),
            mailbox,
            views,
        };
        (handle, owner)
    }

    /// The container's bundle.
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// Whether the owner has ended: the container was deleted.
    pub fn is_gone(&self) -> bool {
        self.mailbox.is_closed()
    }

    /// Sends the command that `make` builds, and waits for the answer.
    ///
    /// # Errors
    /// The owner's, and `NotFound` when it has ended.
    pub async fn ask<T>(&self, make: impl FnOnce(Reply<T>) -> Command) -> Result<T> {
        let gone = || Error::NotFound("the container has been deleted".into());
        let (reply, answer) = oneshot::channel();
        self.mailbox.send(make(reply)).map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// The latest view of a process.
    ///
    /// # Errors
    /// `NotFound` when there is no such process.
    pub fn view(&self, id: &ProcessId) -> Result<View> {
        Ok(self.watch(id)?.borrow().clone())
    }

    /// Waits for the end of a process.
    ///
    /// # Errors
    /// `NotFound` when there is no such process, or it is deleted before it ran.
    pub async fn wait(&self, id: &ProcessId) -> Result<Exit> {
        let mut view = self.watch(id)?;
        let ended = view
            .wait_for(|view| view.state.told().is_some())
            .await
            .map_err(|_| no_process(id))?;
        ended.state.told().ok_or_else(|| no_process(id))
    }

    fn watch(&self, id: &ProcessId) -> Result<watch::Receiver<View>> {
        self.views.get(id).ok_or_else(|| no_process(id))
    }
}

/// The error for a process that is not there.
pub fn no_process(id: &ProcessId) -> Error {
    Error::NotFound(match id {
        ProcessId::Init => "the container has been deleted".into(),
        ProcessId::Exec(id) => format!("exec {id:?} does not exist"),
    })
}
