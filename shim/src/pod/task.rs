//! What a call of the Task API is about: a container, or the sandbox.
//!
//! Start, Kill, Delete, State, Wait, Pids and Stats work on both. All other calls are for containers alone
//! ([`super::Pod::container`]).

use std::path::Path;

use rustix::process::Pid;

use super::sandbox;
use crate::container::mailbox::{
    self, Deleted, KillScope, Listed, ProcessId, Request, View, no_process,
};
use crate::error::Result;
use crate::kernel::cgroup::Metrics;
use crate::kernel::exits::Exit;

/// A container or the sandbox, for the calls that work on both.
#[derive(Debug, Clone)]
pub enum Task {
    /// A container. A sandbox of a pause image, which runc runs, is a container, too.
    Container(mailbox::Handle),
    /// The sandbox. Its only process is the init.
    Sandbox(sandbox::Handle),
}

impl Task {
    /// Whether the task is deleted.
    pub(super) fn is_gone(&self) -> bool {
        match self {
            Self::Container(container) => container.is_gone(),
            Self::Sandbox(sandbox) => sandbox.is_gone(),
        }
    }

    /// The task's bundle.
    pub fn bundle(&self) -> &Path {
        match self {
            Self::Container(container) => container.bundle(),
            Self::Sandbox(sandbox) => sandbox.bundle(),
        }
    }

    /// The latest view of a process.
    ///
    /// # Errors
    /// `NotFound` when there is no such process.
    pub fn view(&self, process: &ProcessId) -> Result<View> {
        match self {
            Self::Container(container) => container.view(process),
            Self::Sandbox(sandbox) => only_init(process).map(|()| sandbox.view()),
        }
    }

    /// Waits until the exit of a process is published.
    ///
    /// # Errors
    /// `NotFound` when there is no such process, or a process is deleted that never ran.
    pub async fn wait(&self, process: &ProcessId) -> Result<Exit> {
        match self {
            Self::Container(container) => container.wait(process).await,
            Self::Sandbox(sandbox) => {
                only_init(process)?;
                sandbox.wait().await
            }
        }
    }

    /// Starts a process. Returns the pid.
    ///
    /// # Errors
    /// `NotFound` when there is no such process, `FailedPrecondition` when the start does not fit the state, and runc's
    /// errors.
    pub async fn start(&self, process: ProcessId) -> Result<Pid> {
        match self {
            Self::Container(container) => {
                container.ask(|reply| Request::Start(process, reply)).await
            }
            Self::Sandbox(sandbox) => {
                only_init(&process)?;
                sandbox.ask(sandbox::Request::Start).await
            }
        }
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// `NotFound` when the process has ended, `FailedPrecondition` for an exec that has not been started, and, for a
    /// container, `InvalidArgument` for a number that is no signal.
    pub async fn kill(&self, process: ProcessId, signal: u32, scope: KillScope) -> Result<()> {
        match self {
            Self::Container(container) => {
                container
                    .ask(|reply| Request::Kill(process, signal, scope, reply))
                    .await
            }
            Self::Sandbox(sandbox) => {
                only_init(&process)?;
                sandbox
                    .ask(|reply| sandbox::Request::Kill(signal, reply))
                    .await
            }
        }
    }

    /// Deletes the task, or an exec of the task.
    ///
    /// # Errors
    /// `FailedPrecondition` for a process that runs, and the first failure of the teardown.
    pub(super) async fn delete(&self, process: ProcessId) -> Result<Deleted> {
        match self {
            Self::Container(container) => {
                container.ask(|reply| Request::Delete(process, reply)).await
            }
            Self::Sandbox(sandbox) => {
                only_init(&process)?;
                sandbox.ask(sandbox::Request::Delete).await
            }
        }
    }

    /// The processes of the task. The sandbox has one: the holder of the namespaces.
    ///
    /// # Errors
    /// `Io` when the cgroup cannot be read.
    pub async fn pids(&self) -> Result<Vec<Listed>> {
        match self {
            Self::Container(container) => container.ask(Request::Pids).await,
            Self::Sandbox(sandbox) => {
                let listed = |pid| Listed { pid, exec_id: None };
                Ok(sandbox.view().pid.map(listed).into_iter().collect())
            }
        }
    }

    /// The counters of the cgroup.
    ///
    /// # Errors
    /// `NotFound` when the cgroup is gone, `Io` when the cgroup cannot be read.
    pub async fn stats(&self) -> Result<Metrics> {
        match self {
            Self::Container(container) => container.ask(Request::Stats).await,
            Self::Sandbox(sandbox) => sandbox.ask(sandbox::Request::Stats).await,
        }
    }
}

fn only_init(process: &ProcessId) -> Result<()> {
    match process {
        ProcessId::Init => Ok(()),
        ProcessId::Exec(_) => Err(no_process(process)),
    }
}
