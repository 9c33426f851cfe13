//! The pod: what one shim serves, and which id is which member. A member is a container or the sandbox.
//!
//! ```text
//!  Sandbox.CreateSandbox ─────┐
//!  Task.Create: of a sandbox ─┴──▶ sandbox::create ──▶ namespaces, and no program
//!
//!  Task.Create: of a container ─┐
//!               of a sandbox,   ├──▶ add the pod's files, join the pod's process namespace ──▶ container::create
//!               holder = image ─┘
//! ```
//!
//! `making` decides what a member is made from, `lifecycle` when the shim ends, `unstarted` what becomes of a sandbox
//! that nobody starts.

pub mod config;
pub mod files;
pub mod lifecycle;
mod making;
pub mod sandbox;
pub mod task;
mod unstarted;

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

/// All members of a shim: the containers, and the sandbox that the containers join.
#[derive(Debug)]
pub struct Pod {
    shared: Shared,
    members: Mutex<HashMap<String, Member>>,
    /// Decides when the shim ends.
    pub lifecycle: Lifecycle,
}

#[derive(Debug, Clone)]
enum Member {
    /// A member that is being made. The id is taken.
    Coming(Coming),
    /// A member made through the Task API.
    Task(Task),
    /// The sandbox, made through the Sandbox API. Calls of the Task API find this sandbox, too.
    Sandbox(sandbox::Handle, Arc<Described>),
}

/// A member that is being made, for whoever deletes the member.
#[derive(Debug, Clone)]
struct Coming {
    /// Resolves, with an error, when the making is over and the maker has dropped the sender.
    come: watch::Receiver<()>,
    /// True when containerd has given up the member.
    given_up: watch::Sender<bool>,
}

/// A member that has a process, or may get one.
enum Busy {
    /// The end of the making is waited for.
    Coming(watch::Receiver<()>),
    /// The end of the init is waited for.
    Container(mailbox::Handle),
}

/// The maker's end of a [`Coming`].
struct Making {
    _coming: watch::Sender<()>,
    given_up: watch::Receiver<bool>,
}

impl Making {
    /// Resolves when containerd has given up the member.
    async fn given_up(&self) {
        let mut given_up = self.given_up.clone();
        if given_up.wait_for(|given_up| *given_up).await.is_err() {
            // The sender is gone, and so is the member's entry. Only the maker replaces the entry, so the making is
            // over and nobody has given up the member.
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

    /// What keeps a shim that is to end from the end.
    fn busy(&self) -> Option<Busy> {
        match self {
            Self::Coming(coming) => Some(Busy::Coming(coming.come.clone())),
            Self::Task(Task::Container(container)) if container.has_process() => {
                Some(Busy::Container(container.clone()))
            }
            Self::Task(_) | Self::Sandbox(..) => None,
        }
    }

    /// Whether the member is deleted.
    fn is_gone(&self) -> bool {
        self.task().is_some_and(|task| task.is_gone())
    }
}

impl Pod {
    /// A pod without members, of a shim with this lifecycle.
    pub fn new(shared: Shared, lifecycle: Lifecycle) -> Self {
        Self {
            shared,
            members: Mutex::default(),
            lifecycle,
        }
    }

    /// Makes a container or the sandbox, as the spec says. Returns the pid; none for a container that is to be
    /// restored.
    ///
    /// # Errors
    /// `InvalidArgument` for an id that is no file name, `AlreadyExists` when the id is taken, and the errors of the
    /// making.
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
            match &made {
                Ok(_) => pod.expect_start(&id),
                Err(error) => {
                    log::warn!(container = id, error:%; "create failed");
                    pod.settle(Occasion::CreateFailed);
                }
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

    /// Takes an id for a member, until `make` replaces or removes the entry. The id of a deleted member is free.
    fn reserve(&self, id: &str) -> Result<Making> {
        let mut members = self.members();
        members.retain(|_, member| !member.is_gone());
        if members.contains_key(id) {
            return Err(Error::AlreadyExists(format!("{id} already exists")));
        }
        if self.shared.leftovers.has(id) {
            return Err(Error::FailedPrecondition(format!(
                "create {id}: what a failed create of the same id has left is still being taken down, try again"
            )));
        }
        if self.lifecycle.is_leaving() {
            return Err(Error::FailedPrecondition(format!(
                "create {id}: the shim is ending, a new start makes another one"
            )));
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

    /// Deletes a container, the sandbox or an exec. If the member is being made, gives up the making, and first waits
    /// for the end of the making: a member that comes after containerd's Delete would stay for ever.
    ///
    /// # Errors
    /// As [`Pod::task`], and the errors of the deletion.
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
            // Nothing is ever sent. The error says that the maker has dropped the sender.
            let _ = come.changed().await;
        }
        self.task(id)?.delete(process).await
    }

    /// The task with this id.
    ///
    /// # Errors
    /// `NotFound` when there is no such task, also while the task is being made.
    pub fn task(&self, id: &str) -> Result<Task> {
        let task = self.members().get(id).and_then(Member::task);
        task.filter(|task| !task.is_gone())
            .ok_or_else(|| Error::NotFound(format!("{id} does not exist")))
    }

    /// The container with this id, for a call that has no meaning for a sandbox.
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

    /// The sandbox that the Sandbox API has made with this id, and what is known of the sandbox.
    ///
    /// # Errors
    /// `NotFound` when there is no such sandbox. A sandbox of the Task API is not found.
    pub fn sandbox(&self, id: &str) -> Result<(sandbox::Handle, Arc<Described>)> {
        match self.members().get(id) {
            Some(Member::Sandbox(handle, described)) if !handle.is_gone() => {
                Ok((handle.clone(), described.clone()))
            }
            _ => Err(Error::NotFound(format!("sandbox {id} does not exist"))),
        }
    }

    /// Ends the sandbox of the Sandbox API, unless the sandbox has ended. Returns when the sandbox has ended.
    ///
    /// # Errors
    /// `NotFound` when there is no such sandbox, and the kernel's errors.
    pub async fn stop_sandbox(&self, id: &str) -> Result<()> {
        let (handle, _) = self.sandbox(id)?;
        handle.stop().await
    }

    /// Ends and deletes the sandbox of the Sandbox API. A missing sandbox is no error: the making may have failed, or
    /// another Delete was faster. The shim then ends, at once if the pod has no containers, otherwise with the last container.
    ///
    /// # Errors
    /// The errors of the deletion.
    pub async fn shut_down_sandbox(self: &Arc<Self>, id: String) -> Result<()> {
        let pod = self.clone();
        to_the_end(async move {
            let ended = async {
                pod.stop_sandbox(&id).await?;
                pod.delete_now(&id, ProcessId::Init).await
            };
            match ended.await {
                // Not there also when a Delete of the Task API was faster.
                Ok(_) | Err(Error::NotFound(_)) => {
                    pod.settle(Occasion::Shutdown);
                    Ok(())
                }
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// Resolves when no member is being made, and no container has a process.
    async fn without_processes(&self) {
        loop {
            let busy = self.members().values().find_map(Member::busy);
            match busy {
                None => return,
                Some(Busy::Coming(mut come)) => {
                    // Nothing is ever sent; the end of the sender is what counts.
                    let _ = come.changed().await;
                }
                Some(Busy::Container(container)) => container.ended().await,
            }
        }
    }

    /// Ends and deletes every member, the containers first. A failure is logged, and the others are deleted all the same.
    async fn take_down_all(self: &Arc<Self>) {
        let mut tasks: Vec<(String, Task)> = self
            .members()
            .iter()
            .filter_map(|(id, member)| Some((id.clone(), member.task()?)))
            .collect();
        tasks.sort_by_key(|(_, task)| matches!(task, Task::Sandbox(_)));
        for (id, task) in tasks {
            let stopped = match &task {
                Task::Sandbox(sandbox) => sandbox.stop().await,
                Task::Container(_) => Ok(()),
            };
            let deleted = match stopped {
                Ok(()) => self.delete(id.clone(), ProcessId::Init).await.map(drop),
                Err(error) => Err(error),
            };
            deleted.unwrap_or_else(|error| log::warn!(container = id, error:%; "not taken down"));
        }
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
            // For a container that joined the shim of its sandbox (version 3), containerd sends no Shutdown.
            (false, true) => Left::Orphans,
            (false, false) => Left::Members,
        }
    }

    fn members(&self) -> MutexGuard<'_, HashMap<String, Member>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Does `work` to the end in a task of its own. A closed connection of the caller drops the call, but not the work.
///
/// # Errors
/// The errors of the work.
async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    tokio::spawn(work)
        .await
        .map_err(|_| Error::Internal("a call was cancelled"))?
}
