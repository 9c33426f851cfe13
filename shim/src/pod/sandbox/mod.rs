//! The sandbox. One task, the owner, has the [`pause::Sandbox`] and answers all calls for the sandbox.
//!
//! ```text
//!  Create ──▶ Created (the namespaces stand) ──Start──▶ Running
//!              │   │                                     │
//!              │   └─────────────────────────────────────┴── Kill, Stop, or the process ends ──▶ Stopped
//!              │                                                                                  │
//!              └──────────────────────────────────────────────────────────────────────────────────┴── Delete ──▶ gone
//! ```
//!
//! "The process" is the pause program, if the pod has one: the holder of the namespaces, or PID 1 of a process
//! namespace that the pod shares. Only a signal that ends a pause program ends the sandbox.
//!
//! In podsandbox mode containerd takes the sandbox for a container like any other, with a pid whose `/proc/PID/ns` the
//! pod's containers join. No program of the user runs in the sandbox. So containerd cannot exec into, freeze or limit
//! the sandbox.

mod owner;
mod plan;

use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::process::{Pid, getpid};
use tokio::sync::watch;

pub use self::plan::{Made, Origin, Plan, create};
use crate::container::mailbox::{Deleted, Mailbox, ProcessId, Reply, View, no_process};
use crate::error::{Error, Result};
use crate::kernel::cgroup::Metrics;
use crate::kernel::exits::Exit;

/// A call to the owner of a sandbox.
#[derive(Debug)]
pub enum Request {
    /// Start the sandbox: only the state changes. The answer is the pid.
    Start(Reply<Pid>),
    /// Send a signal. The effect is that on a pause container.
    Kill(u32, Reply<()>),
    /// End the sandbox, unless the sandbox has ended.
    Stop(Reply<()>),
    /// Take everything down. A sandbox that was never started is ended first. An error while the sandbox runs.
    Delete(Reply<Deleted>),
    /// Read the cgroup's counters.
    Stats(Reply<Metrics>),
    /// Give the process namespace that the pod shares. The first such call makes the namespace.
    SharedProcesses(Reply<ProcessNamespace>),
}

/// The sandbox, seen from the rest of the shim.
#[derive(Debug, Clone)]
pub struct Handle {
    bundle: Arc<Path>,
    requests: Mailbox<Request>,
    view: watch::Receiver<View>,
    started: watch::Receiver<bool>,
}

impl Handle {
    /// The sandbox's bundle.
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// Whether the sandbox is deleted.
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

    /// The latest view.
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// Whether the sandbox has been started. The sender is gone when the sandbox is deleted.
    pub fn started(&self) -> watch::Receiver<bool> {
        self.started.clone()
    }

    /// Waits until the exit of the sandbox is published.
    ///
    /// # Errors
    /// `NotFound` when the owner is gone without an exit.
    pub async fn wait(&self) -> Result<Exit> {
        let exit = View::published_exit(self.view.clone()).await;
        exit.ok_or_else(|| no_process(&ProcessId::Init))
    }

    /// Ends the sandbox, unless the sandbox has ended, and waits for the end.
    ///
    /// # Errors
    /// The kernel's errors, and `NotFound` when the sandbox is deleted.
    pub async fn stop(&self) -> Result<()> {
        match self.ask(Request::Stop).await {
            // Deleted meanwhile, and so ended.
            Ok(()) | Err(Error::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
        self.wait().await?;
        Ok(())
    }
}

/// The process namespace that a pod shares.
///
/// The path leads through the shim, never through the process whose namespace it is: that process may end before runc
/// opens the path, and its pid may then be a stranger's. runc does not outlive the shim.
#[derive(Debug)]
pub struct ProcessNamespace {
    /// The path for runc.
    pub path: PathBuf,
    /// Keeps the descriptor in the path. None for the node's namespace, which needs no descriptor.
    _open: Option<Arc<OwnedFd>>,
}

impl ProcessNamespace {
    fn of_node() -> Self {
        Self {
            path: pid_namespace(getpid()),
            _open: None,
        }
    }

    fn of_pod(open: Arc<OwnedFd>) -> Self {
        Self {
            path: format!("/proc/{}/fd/{}", getpid(), open.as_raw_fd()).into(),
            _open: Some(open),
        }
    }
}

/// The path at which containerd looks for the process namespace of a sandbox with this pid.
pub fn pid_namespace(pid: Pid) -> PathBuf {
    format!("/proc/{pid}/ns/pid").into()
}
