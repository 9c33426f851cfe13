//! The sandbox: one task, the owner, has the [`pause::Sandbox`] and answers what containerd asks of a pod's sandbox.
//!
//! ```text
//!  Create ──▶ namespaces stand (Created) ──Start──▶ Running ──Kill, Stop, or PID 1 ends──▶ Stopped ──Delete──▶ gone
//! ```
//!
//! In podsandbox mode containerd takes the sandbox for a container like any other, with a pid whose `/proc/PID/ns` the pod's
//! containers join. No program runs in the sandbox, so there is nothing to execute into, to freeze or to limit.

mod owner;
mod plan;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::process::Pid;
use tokio::sync::watch;

pub use self::plan::{Made, Origin, Plan, create};
use crate::container::mailbox::{Deleted, Mailbox, ProcessId, Reply, View, no_process};
use crate::error::Result;
use crate::kernel::cgroup::Metrics;
use crate::kernel::exits::Exit;

/// A call to the owner of a sandbox.
#[derive(Debug)]
pub enum Request {
    /// Start: nothing changes but the state. The answer is the pid.
    Start(Reply<Pid>),
    /// Send a signal, as to a pause container.
    Kill(u32, Reply<()>),
    /// End the sandbox, unless the sandbox has ended.
    Stop(Reply<()>),
    /// End the sandbox, and take everything down.
    Delete(Reply<Deleted>),
    /// Read the cgroup's counters.
    Stats(Reply<Metrics>),
    /// Path of the process namespace that the pod shares; made with the first such call.
    SharedProcesses(Reply<PathBuf>),
}

/// The sandbox, seen from the rest of the shim.
#[derive(Debug, Clone)]
pub struct Handle {
    bundle: Arc<Path>,
    requests: Mailbox<Request>,
    view: watch::Receiver<View>,
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

    /// Waits for the end of the sandbox.
    ///
    /// # Errors
    /// `NotFound` when the sandbox is deleted before it ended.
    pub async fn wait(&self) -> Result<Exit> {
        let exit = View::published_exit(self.view.clone()).await;
        exit.ok_or_else(|| no_process(&ProcessId::Init))
    }

    /// Ends the sandbox, and waits for the end.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn stop(&self) -> Result<()> {
        self.ask(Request::Stop).await?;
        self.wait().await?;
        Ok(())
    }
}

/// Where containerd finds the process namespace of a sandbox with this pid.
pub fn pid_namespace(pid: Pid) -> PathBuf {
    format!("/proc/{pid}/ns/pid").into()
}
