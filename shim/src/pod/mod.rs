//! The pod: what one shim serves. Which id belongs to whom.
//!
//! ```text
//!  Task.Create(container-type: sandbox) ──┐
//!                                         ├──▶ sandbox::create ──▶ the sandbox, one for each pod
//!  Sandbox.CreateSandbox ─────────────────┘
//!  Task.Create ──[add the pod's files, join the pod's process namespace]──▶ container::create
//! ```
//!
//! What is made, and from what, is in `making`; when the shim ends, in `lifecycle`.

pub mod config;
pub mod files;
pub mod lifecycle;
mod making;
pub mod sandbox;
pub mod task;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::Pid;
use tokio::sync::watch;

use self::lifecycle::{Left, Lifecycle, Occasion};
use self::making::Wanted;
pub use self::making::{CreateSandbox, Described};
use self::task::Task;
use crate::container::mailbox::{self, Deleted, ProcessId};
use crate::container::{Create, Shared};
use crate::error::{Error, Result};

/// All containers of a shim, and the sandbox that they join.
#[derive(Debug)]
pub struct Pod {
    shared: Shared,
    members: Mutex<HashMap<String, Member>>,
    /// When the shim ends.
    pub lifecycle: Lifecycle,
}

#[derive(Debug, Clone)]
enum Member {
    /// Being made: the id is taken.
    Coming(Coming),
    /// A task of containerd's.
    Task(Task),
    /// The sandbox, made through the Sandbox API. For the Task API a sandbox, too.
    Sandbox(sandbox::Handle, Arc<Described>),
}

/// What can be known and done of a member that is being made.
#[derive(Debug, Clone)]
struct Coming {
    /// Resolves, with an error, when the making is over.
    come: watch::Receiver<()>,
    /// True when nobody wants the member any more.
    given_up: watch::Sender<bool>,
}

/// The maker's end of a [`Coming`].
struct Making {
    _coming: watch::Sender<()>,
    given_up: watch::Receiver<bool>,
}

impl Making {
    /// Resolves when nobody wants the member any more.
    async fn given_up(&self) {
        let mut given_up = self.given_up.clone();
        if given_up.wait_for(|given_up| *given_up).await.is_err() {
            // The other end goes with the member alone, which the maker replaces.
            std::future::pending::<()>().await;
        }
    }
}

impl Member {
    fn task(&self) -> Option<Task> {
        match self {
            Self::Coming(_) => None,
            Self::Task(task) => Some(task.clone()),
            Self::Sandbox(sandbox, _) => Some(Task::Sandbox(sandbox.clone())),
        }
    }

    /// Whether the member is deleted.
    fn is_gone(&self) -> bool {
        self.task().is_some_and(|task| task.is_gone())
    }
}

impl Pod {
    /// A pod without containers, of a shim with this lifecycle.
    pub fn new(shared: Shared, lifecycle: Lifecycle) -> Self {
        Self {
            shared,
            members: Mutex::default(),
            lifecycle,
        }
    }

    /// Makes a container or the sandbox, as the spec says. Returns the pid, if there is one yet.
    ///
    /// # Errors
    /// `AlreadyExists` when the id is taken, and what the making says.
    pub async fn create(self: &Arc<Self>, create: Create) -> Result<Option<Pid>> {
        self.make_to_the_end(create.id.clone(), Wanted::Task(create))
            .await
    }

    /// Makes the sandbox through the Sandbox API.
    ///
    /// # Errors
    /// As [`Pod::create`].
    pub async fn create_sandbox(self: &Arc<Self>, create: CreateSandbox) -> Result<()> {
        self.make_to_the_end(create.id.clone(), Wanted::Sandbox(create))
            .await
            .map(drop)
    }

    async fn make_to_the_end(self: &Arc<Self>, id: String, wanted: Wanted) -> Result<Option<Pid>> {
        let pod = self.clone();
        to_the_end(async move {
            let made = pod.make(&id, wanted).await;
            if let Err(error) = &made {
                log::warn!("create {id}: {error}");
                pod.settle(Occasion::CreateFailed);
            }
            made
        })
        .await
    }

    async fn make(&self, id: &str, wanted: Wanted) -> Result<Option<Pid>> {
        if id.is_empty() || id.starts_with('.') || id.contains(['/', '\0']) {
            return Err(Error::InvalidArgument(format!("{id:?} is no container id")));
        }
        let making = self.reserve(id)?;
        let made = match wanted {
            Wanted::Task(create) => self.make_task(create, &making).await,
            Wanted::Sandbox(create) => self.make_sandbox(create).await,
        };
        let mut members = self.members();
        match made {
            Ok((member, pid)) => {
                members.insert(id.to_owned(), member);
                Ok(pid)
            }
            Err(error) => {
                members.remove(id);
                Err(error)
            }
        }
    }

    /// Takes an id, until the sender is dropped. The id of a deleted container is free.
    fn reserve(&self, id: &str) -> Result<Making> {
        let mut members = self.members();
        members.retain(|_, member| !member.is_gone());
        if members.contains_key(id) {
            return Err(Error::AlreadyExists(format!("{id} already exists")));
        }
        self.lifecycle.member_begins();
        let (coming, come) = watch::channel(());
        let (give_up, given_up) = watch::channel(false);
        let member = Coming {
            come,
            given_up: give_up,
        };
        members.insert(id.to_owned(), Member::Coming(member));
        Ok(Making {
            _coming: coming,
            given_up,
        })
    }

    /// Deletes a container, the sandbox or an exec. A member that is being made is given up, and the end of the making is
    /// waited for: containerd deletes what containerd has given up on, and must not leave behind what comes later.
    ///
    /// # Errors
    /// As [`Pod::task`], and what the deletion says.
    pub async fn delete(self: &Arc<Self>, id: String, process: ProcessId) -> Result<Deleted> {
        let pod = self.clone();
        to_the_end(async move {
            let deleted = pod.delete_now(&id, process).await;
            pod.settle(Occasion::Deleted);
            deleted
        })
        .await
    }

    async fn delete_now(&self, id: &str, process: ProcessId) -> Result<Deleted> {
        let coming = match self.members().get(id) {
            Some(Member::Coming(coming)) => Some(coming.clone()),
            _ => None,
        };
        if let Some(Coming { mut come, given_up }) = coming {
            if process == ProcessId::Init {
                given_up.send_replace(true);
            }
            // Nothing is ever sent; the end of the sender is what counts.
            let _ = come.changed().await;
        }
        self.task(id)?.delete(process).await
    }

    /// The task with this id.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub fn task(&self, id: &str) -> Result<Task> {
        let task = self.members().get(id).and_then(Member::task);
        task.filter(|task| !task.is_gone())
            .ok_or_else(|| Error::NotFound(format!("{id} does not exist")))
    }

    /// The container with this id, for a call that a sandbox has no answer to.
    ///
    /// # Errors
    /// `NotFound` when there is no such task, `FailedPrecondition` for the sandbox.
    pub fn container(&self, id: &str) -> Result<mailbox::Handle> {
        match self.task(id)? {
            Task::Container(container) => Ok(container),
            Task::Sandbox(_) => Err(Error::FailedPrecondition(format!(
                "{id}: a sandbox has no root filesystem and runs no program"
            ))),
        }
    }

    /// The sandbox of the Sandbox API.
    ///
    /// # Errors
    /// `NotFound` when there is none with this id, or one that is a task.
    pub fn sandbox(&self, id: &str) -> Result<(sandbox::Handle, Arc<Described>)> {
        match self.members().get(id) {
            Some(Member::Sandbox(handle, described)) if !handle.is_gone() => {
                Ok((handle.clone(), described.clone()))
            }
            _ => Err(Error::NotFound(format!("sandbox {id} does not exist"))),
        }
    }

    /// Ends the sandbox of the Sandbox API, unless the sandbox has ended; returns when it has.
    ///
    /// # Errors
    /// `NotFound` when there is none, and what the kernel says.
    pub async fn stop_sandbox(&self, id: &str) -> Result<()> {
        let (handle, _) = self.sandbox(id)?;
        handle.stop().await
    }

    /// Ends and deletes the sandbox of the Sandbox API. No sandbox is no error: the making may have failed. The shim ends if
    /// nothing else is left, otherwise with the last container.
    ///
    /// # Errors
    /// What the deletion says.
    pub async fn shut_down_sandbox(self: &Arc<Self>, id: String) -> Result<()> {
        let pod = self.clone();
        to_the_end(async move {
            match pod.stop_sandbox(&id).await {
                Ok(()) => {
                    pod.delete_now(&id, ProcessId::Init).await?;
                }
                Err(Error::NotFound(_)) => {}
                Err(error) => return Err(error),
            }
            pod.settle(Occasion::Shutdown);
            Ok(())
        })
        .await
    }

    /// What the pod still has.
    fn left(&self) -> Left {
        let members = self.members();
        let sandbox_is_gone = members.values().any(|member| match member.task() {
            Some(Task::Sandbox(sandbox)) => sandbox.is_gone(),
            Some(Task::Container(_)) | None => false,
        });
        match (members.values().all(Member::is_gone), sandbox_is_gone) {
            (true, _) => Left::Nothing,
            // Containers that joined the sandbox's shim (version 3) get no Shutdown of their own.
            (false, true) => Left::Orphans,
            (false, false) => Left::Members,
        }
    }

    fn members(&self) -> MutexGuard<'_, HashMap<String, Member>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does `work` to the end, also when the caller's connection is closed, which drops the call.
///
/// # Errors
/// What the work says.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    tokio::spawn(work)
        .await
        .map_err(|_| Error::Internal("a call was cancelled"))?
}
