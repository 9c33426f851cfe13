//! The pod: what one shim serves. Which id belongs to whom, and whether anything is left.
//!
//! ```text
//!  Task.Create(container-type: sandbox) ──┐
//!                                         ├──▶ sandbox::create ──▶ the sandbox, one for each pod
//!  Sandbox.CreateSandbox ─────────────────┘
//!  Task.Create ──[add the pod's files, join its process namespace]──▶ container::create
//! ```

pub mod config;
pub mod files;
pub mod sandbox;

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use rustix::process::Pid;
use serde_json::Value;
use tokio::sync::watch;

use self::sandbox::{Origin, Plan};
use crate::container::mailbox::{Command, Deleted, Handle, ProcessId, Target};
use crate::container::{self, Create, Shared};
use crate::error::{Error, Result};
use crate::kernel::cgroup::Driver;
use crate::pod::config::PodConfig;
use crate::pod::files::PodFiles;
use crate::runtime::bundle;
use crate::runtime::options::{Holder, Options};
use crate::runtime::spec::{self, Role};

/// SIGKILL, as it stands on the wire.
const KILL: u32 = 9;

/// All containers of a shim, and the sandbox that they join.
#[derive(Debug)]
pub struct Pod {
    shared: Shared,
    members: Mutex<HashMap<String, Member>>,
    /// A Shutdown was refused after the sandbox had been deleted: there will be no other one.
    orphaned: AtomicBool,
    /// How many members have been begun.
    made: watch::Sender<u64>,
}

#[derive(Debug, Clone)]
enum Member {
    /// Being made: the id is taken.
    Coming(Coming),
    /// A container, also a sandbox that runc runs.
    Container(Handle),
    /// The sandbox, and what the Sandbox API tells of it if it was made through that.
    Sandbox(Handle, Option<Arc<Described>>),
}

/// A sandbox that was made through the Sandbox API: what does not change until it is gone.
#[derive(Debug)]
pub struct Described {
    /// What it was made from.
    pub config: PodConfig,
    /// The operator's settings.
    pub options: Options,
    /// Its OCI spec.
    pub spec: Value,
    /// What holds it.
    pub holder: pause::HolderKind,
    /// Where its namespaces are.
    pub paths: BTreeMap<pause::Kind, PathBuf>,
    /// The network namespace that containerd made for it.
    pub network: PathBuf,
    /// When it was made.
    pub created_at: SystemTime,
    files: PodFiles,
}

/// What `CreateSandbox` asks for.
#[derive(Debug)]
pub struct CreateSandbox {
    /// The pod's id.
    pub id: String,
    /// The sandbox's bundle.
    pub bundle: PathBuf,
    /// CRI's description.
    pub config: PodConfig,
    /// The pod's network namespace; empty for the node's.
    pub network: PathBuf,
    /// Annotations besides CRI's own.
    pub annotations: BTreeMap<String, String>,
}

/// What is to be made, and by which of the two services.
#[derive(Debug)]
enum Wanted {
    /// A container, or the sandbox in podsandbox mode.
    Task(Create),
    /// The sandbox, through the Sandbox API.
    Sandbox(CreateSandbox),
}

/// What can be known and done of a container while it is being made.
#[derive(Debug, Clone)]
struct Coming {
    /// Resolves, with an error, when it is made or has failed.
    come: watch::Receiver<()>,
    /// True when nobody wants it any more.
    given_up: watch::Sender<bool>,
}

/// The maker's end of a [`Coming`].
struct Making {
    _coming: watch::Sender<()>,
    given_up: watch::Receiver<bool>,
}

impl Making {
    /// Resolves when nobody wants it any more.
    async fn given_up(&self) {
        let mut given_up = self.given_up.clone();
        if given_up.wait_for(|given_up| *given_up).await.is_err() {
            // The other end goes only with the member, which the maker replaces.
            std::future::pending::<()>().await;
        }
    }
}

impl Member {
    fn handle(&self) -> Option<&Handle> {
        match self {
            Self::Coming(_) => None,
            Self::Container(handle) | Self::Sandbox(handle, _) => Some(handle),
        }
    }
}

impl Pod {
    /// A pod without containers.
    pub fn new(shared: Shared) -> Self {
        Self {
            shared,
            members: Mutex::default(),
            orphaned: AtomicBool::new(false),
            made: watch::Sender::new(0),
        }
    }

    /// Makes a container or the sandbox, as its spec says; its pid, if it has one yet. To be run [`to_the_end`].
    ///
    /// # Errors
    /// `AlreadyExists` when the id is taken, and what the making says.
    pub async fn create(&self, create: Create) -> Result<Option<Pid>> {
        let id = create.id.clone();
        self.make(&id, Wanted::Task(create)).await
    }

    /// Makes the sandbox through the Sandbox API. To be run [`to_the_end`].
    ///
    /// # Errors
    /// As [`Pod::create`].
    pub async fn create_sandbox(&self, create: CreateSandbox) -> Result<()> {
        let id = create.id.clone();
        self.make(&id, Wanted::Sandbox(create)).await.map(drop)
    }

    async fn make(&self, id: &str, wanted: Wanted) -> Result<Option<Pid>> {
        if id.is_empty() || id.starts_with('.') || id.contains(['/', '\0']) {
            return Err(Error::InvalidArgument(format!("{id:?} is no container id")));
        }
        let making = self.reserve(id)?;
        let made = match wanted {
            Wanted::Task(create) => self.make_member(create, &making).await,
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
                drop(members);
                if let Err(left) = bundle::forget(&self.shared.first_bundle, id) {
                    log::warn!("after a failed create: {left}");
                }
                log::warn!("create {id}: {error}");
                Err(error)
            }
        }
    }

    async fn make_member(
        &self,
        mut create: Create,
        making: &Making,
    ) -> Result<(Member, Option<Pid>)> {
        create.choose_driver();
        if create.spec.role() == Role::Sandbox && create.options.holder != Holder::Image {
            let made = sandbox::create(&self.shared, Plan::of_task(create)).await?;
            return Ok((Member::Sandbox(made.handle, None), Some(made.pid)));
        }
        if let Some(files) = self.files() {
            if let Some(label) = create.spec.mount_label() {
                files.label(label)?;
            }
            spec::add_binds(&create.bundle, &files.binds())?;
        }
        self.join_shared_processes(&create).await?;
        let (handle, pid) = container::create(&self.shared, create, making.given_up()).await?;
        Ok((Member::Container(handle), pid))
    }

    async fn make_sandbox(&self, create: CreateSandbox) -> Result<(Member, Option<Pid>)> {
        let CreateSandbox {
            id,
            bundle,
            config,
            network,
            annotations,
        } = create;
        let options = Options::kept(&bundle)?;
        if options.holder == Holder::Image {
            return Err(Error::InvalidArgument(
                "holder = \"image\" needs a pause image: use it with sandboxer = \"podsandbox\""
                    .into(),
            ));
        }
        let files = PodFiles::plan(&bundle, &config);
        let cgroups_path = config.cgroups_path(&id);
        let plan = Plan {
            config: config.sandbox(&network, options.pause_holder())?,
            driver: Driver::of(config.has_slice()),
            cgroups_path,
            node_processes: config.node_processes(),
            options: options.clone(),
            origin: Origin::Sandbox(files.clone()),
            id: id.clone(),
            bundle,
        };
        let made = sandbox::create(&self.shared, plan).await?;
        let described = Described {
            spec: config.spec(&id, &annotations, &made.paths, &files.binds()),
            config,
            options,
            holder: made.kind,
            paths: made.paths,
            network,
            created_at: SystemTime::now(),
            files,
        };
        let member = Member::Sandbox(made.handle, Some(Arc::new(described)));
        Ok((member, Some(made.pid)))
    }

    /// What the Sandbox API tells of a sandbox.
    ///
    /// # Errors
    /// `NotFound` when there is none with this id, or one that is a task.
    pub fn sandbox(&self, id: &str) -> Result<(Handle, Arc<Described>)> {
        match self.members().get(id) {
            Some(Member::Sandbox(handle, Some(described))) if !handle.is_gone() => {
                Ok((handle.clone(), described.clone()))
            }
            _ => Err(Error::NotFound(format!("sandbox {id} does not exist"))),
        }
    }

    /// The files that the pod's containers share, if they are ours.
    fn files(&self) -> Option<PodFiles> {
        self.members().values().find_map(|member| match member {
            Member::Sandbox(_, described) => described.as_ref().map(|pod| pod.files.clone()),
            Member::Coming(_) | Member::Container(_) => None,
        })
    }

    /// Ends the sandbox, unless it has ended; returns when it has.
    ///
    /// # Errors
    /// `NotFound` when there is none, and what the kernel says.
    pub async fn stop_sandbox(&self, id: &str) -> Result<()> {
        let (handle, _) = self.sandbox(id)?;
        let kill = |reply| Command::Kill(ProcessId::Init, KILL, Target::Process, reply);
        match handle.ask(kill).await {
            // It has ended already.
            Ok(()) | Err(Error::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
        handle.wait(&ProcessId::Init).await?;
        Ok(())
    }

    /// Ends and deletes the sandbox. That there is none is no error: its making may have failed. The shim is to end if
    /// nothing else is left; otherwise with the last container ([`Pod::is_over`]). To be run [`to_the_end`].
    ///
    /// # Errors
    /// What the deletion says.
    pub async fn shut_down_sandbox(&self, id: &str) -> Result<()> {
        match self.stop_sandbox(id).await {
            Ok(()) => {
                self.delete(id, ProcessId::Init).await?;
            }
            Err(Error::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// A container that is to join the process namespace of a sandbox which a thread holds would land in the node's: a
    /// thread's `/proc/TID/ns/pid` is its process's. Its spec is pointed to the pod's.
    async fn join_shared_processes(&self, create: &Create) -> Result<()> {
        let Some(path) = create.spec.pid_namespace_path() else {
            return Ok(());
        };
        let sandbox = self.members().values().find_map(|member| match member {
            Member::Sandbox(handle, _) => Some(handle.clone()),
            Member::Coming(_) | Member::Container(_) => None,
        });
        let Some(sandbox) = sandbox else {
            return Ok(());
        };
        if sandbox
            .view(&ProcessId::Init)?
            .pid
            .map(sandbox::pid_namespace)
            .as_deref()
            != Some(path)
        {
            return Ok(());
        }
        let shared = sandbox.ask(Command::SharedProcesses).await?;
        if shared != path {
            spec::set_pid_namespace_path(&create.bundle, &shared)?;
        }
        Ok(())
    }

    /// Takes an id, until the sender is dropped. The one of a deleted container is free.
    fn reserve(&self, id: &str) -> Result<Making> {
        let mut members = self.members();
        members.retain(|_, member| member.handle().is_none_or(|handle| !handle.is_gone()));
        if members.contains_key(id) {
            return Err(Error::AlreadyExists(format!("{id} already exists")));
        }
        self.made.send_modify(|made| *made += 1);
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

    /// Deletes a container, the sandbox or an exec; to be run [`to_the_end`]. Of one that is being made the making
    /// is ended, and that is waited for: containerd deletes what it has given up on, and must not leave behind what comes
    /// later.
    ///
    /// # Errors
    /// As [`Pod::get`], and what the deletion says.
    pub async fn delete(&self, id: &str, process: ProcessId) -> Result<Deleted> {
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
        let handle = self.get(id)?;
        handle.ask(|reply| Command::Delete(process, reply)).await
    }

    /// The container or sandbox with this id.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub fn get(&self, id: &str) -> Result<Handle> {
        let members = self.members();
        let handle = members.get(id).and_then(Member::handle);
        handle
            .filter(|handle| !handle.is_gone())
            .cloned()
            .ok_or_else(|| Error::NotFound(format!("{id} does not exist")))
    }

    /// Whether the shim is to end, now that containerd has called Shutdown.
    pub fn shut_down(&self) -> bool {
        let empty = self.is_empty();
        let sandbox_is_gone = self
            .members()
            .values()
            .any(|member| matches!(member, Member::Sandbox(handle, _) if handle.is_gone()));
        // Containers that joined the sandbox's shim (version 3) get no Shutdown of their own.
        if !empty && sandbox_is_gone {
            self.orphaned.store(true, Ordering::Relaxed);
        }
        empty
    }

    /// Whether the pod has come to its end without another Shutdown.
    pub fn is_over(&self) -> bool {
        self.orphaned.load(Ordering::Relaxed) && self.is_empty()
    }

    /// Of an empty pod: changes when it is given a member. None of one that has any.
    pub fn unused(&self) -> Option<watch::Receiver<u64>> {
        let made = self.made.subscribe();
        self.is_empty().then_some(made)
    }

    /// Whether nothing is left that a shim is needed for.
    fn is_empty(&self) -> bool {
        self.members()
            .values()
            .all(|member| member.handle().is_some_and(Handle::is_gone))
    }

    fn members(&self) -> MutexGuard<'_, HashMap<String, Member>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How the server is told to end.
#[derive(Debug)]
pub struct Stop {
    /// The server's socket.
    pub socket: PathBuf,
    /// True when it is to end.
    pub ending: watch::Sender<bool>,
}

impl Stop {
    /// From now on a `start` makes a new server: the socket is gone before containerd can hear of the end.
    pub fn stop(&self) {
        if *self.ending.borrow() {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.socket) {
            log::warn!("remove {}: {error}", self.socket.display());
        }
        self.ending.send_replace(true);
    }
}

/// Does `work` to its end, also when the connection that it was asked over is closed, which drops the call.
///
/// # Errors
/// What the work says.
pub async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    tokio::spawn(work)
        .await
        .map_err(|_| Error::Internal("a call was cancelled"))?
}
