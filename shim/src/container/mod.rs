//! One task per container: it owns the init and the execs, and nobody else changes them.
//!
//! ```text
//!            ┌──────────────────────────── Actor ────────────────────────────┐
//!  commands ─▶ init: Process    execs: Process, Process, …                   ├─▶ events, in order
//!            │   ▲                ▲                                          ├─▶ views (State, Wait)
//!            │   └── jobs: a start that runs, an exit that is awaited ◀──────┼── runc, the waiter
//!            └───────────────────────────────────────────────────────────────┘
//! ```
//!
//! What takes time is a job, so a hanging `runc exec` does not keep a kill from the container. Only what is for a process
//! that is being started waits for that. The order of events is kept here and needs no locks: an exit that comes while a
//! start is under way waits for it; the init's exit waits for its execs' exits, and for who reads its output, for a while.

mod actor;
mod control;
mod end;
pub mod mailbox;
mod process;
pub mod state;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_shim_protos::events::task;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::types::mount::Mount as WireMount;
use log::{info, warn};
use rustix::process::Pid;
use tokio::task::JoinSet;

use self::actor::Actor;
use self::process::Process;
use crate::container::mailbox::{Handle, ProcessId, View};
use crate::container::state::State;
use crate::containerd::convert::wire_pid;
use crate::containerd::events::{Event, Events};
use crate::error::{Error, IoError, Result, first_of};
use crate::io::{self, Io, Owner, Writer};
use crate::kernel::cgroup::{Cgroup, Driver, OomKills};
use crate::kernel::exits::Exits;
use crate::kernel::mounts::{self, Mount};
use crate::runtime::bundle::Record;
use crate::runtime::options::Options;
use crate::runtime::runc::{Runc, Started};
use crate::runtime::spec::Spec;

/// What all containers of a shim have in common.
#[derive(Debug, Clone)]
pub struct Shared {
    /// containerd's namespace.
    pub namespace: Arc<str>,
    /// The bundle that the shim was started for.
    pub first_bundle: Arc<Path>,
    /// The waiter.
    pub exits: Arc<Exits>,
    /// The publisher.
    pub events: Events,
}

/// A container to be made.
#[derive(Debug)]
pub struct Create {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// What its root filesystem is mounted from.
    pub rootfs: Vec<WireMount>,
    /// What it is to be restored from, when it starts.
    pub checkpoint: Option<PathBuf>,
    /// Its streams.
    pub io: io::Request,
    /// Its spec.
    pub spec: Spec,
    /// The operator's settings.
    pub options: Options,
}

impl Create {
    /// Leaves the cgroups to systemd where that is who their path is written for.
    pub fn choose_driver(&mut self) {
        let driver = Driver::choose(self.options.systemd_cgroup, self.spec.cgroups_path());
        self.options.systemd_cgroup = driver == Driver::Systemd;
    }

    fn streams_owner(&self) -> Owner {
        Owner {
            uid: self.options.io_uid,
            gid: self.options.io_gid,
        }
    }

    /// Its cgroup, where the spec names it. Elsewhere only runc or systemd knows the path, and it is asked of the process.
    fn cgroup(&self) -> Option<Cgroup> {
        let path = self.spec.cgroups_path()?;
        if !path.starts_with('/') || self.options.systemd_cgroup {
            return None;
        }
        Cgroup::at(path, Driver::Cgroupfs)
            .inspect_err(|e| warn!("container {}: {e}", self.id))
            .ok()
    }

    /// The event that says that it is made.
    pub fn event(&self, pid: Option<Pid>) -> Event {
        Event::Create(task::TaskCreate {
            container_id: self.id.clone(),
            bundle: self.bundle.display().to_string(),
            rootfs: self.rootfs.clone(),
            io: MessageField::some(task::TaskIO {
                stdin: self.io.stdin.clone(),
                stdout: self.io.stdout.clone(),
                stderr: self.io.stderr.clone(),
                terminal: self.io.terminal,
                ..task::TaskIO::default()
            }),
            checkpoint: self
                .checkpoint
                .as_ref()
                .map(|image| image.display().to_string())
                .unwrap_or_default(),
            pid: wire_pid(pid),
            ..task::TaskCreate::default()
        })
    }
}

/// Makes a container and gives it to a task of its own. A failure leaves nothing behind. When `given_up` resolves before
/// runc has made it, runc is ended: a hook that hangs must not keep containerd from deleting what it has given up. One
/// that is to be restored has no process before it is started.
///
/// # Errors
/// What mounting, the streams or runc say; `FailedPrecondition` when it was given up, and when there is no checkpoint
/// where it should be.
pub async fn create(
    shared: &Shared,
    create: Create,
    given_up: impl Future<Output = ()>,
) -> Result<(Handle, Option<Pid>)> {
    let runc = Runc::new(
        &create.id,
        &create.bundle,
        &shared.namespace,
        &create.options,
        &shared.exits,
    );
    let made = make(shared, &create, &runc, given_up).await;
    let made = match made {
        Ok(made) => made,
        Err(error) => {
            let deleted = runc.delete_by_force().await;
            take_down(&create.bundle, deleted)
                .await
                .unwrap_or_else(|e| {
                    warn!("take down {} after a failed create: {e}", create.id);
                });
            remove_cgroup(&create).await;
            return Err(error);
        }
    };
    let pid = made.as_ref().map(|(started, _)| started.pid);
    let cgroup = create
        .cgroup()
        .or_else(|| pid.and_then(|pid| known_cgroup(&create.id, pid)));
    // Its init stands in its cgroup and runs nothing of the user's yet: no kill can be missed.
    let oom_kills = watched(&create.id, cgroup.as_ref().filter(|_| pid.is_some()));
    let (handle, owner) = Handle::new(&create.bundle);
    let streams_owner = create.streams_owner();
    let event = create.event(pid);
    let view = owner.views.add(
        ProcessId::Init,
        View {
            pid,
            state: State::Created,
            io: create.io,
        },
    );
    let mut actor = Actor {
        id: create.id,
        bundle: create.bundle,
        streams_owner,
        shares_processes: create.spec.shares_process_namespace(),
        shared: shared.clone(),
        runc,
        cgroup,
        oom_kills,
        image: create.checkpoint,
        saving: false,
        init: Process::new(view),
        init_ending: None,
        dying: false,
        reading: None,
        execs: HashMap::new(),
        exec_count: 0,
        update_count: 0,
        owner,
        jobs: JoinSet::new(),
        ending: Vec::new(),
        deleted: Vec::new(),
    };
    shared.events.send(&event);
    if let Some((started, io)) = made {
        info!("container {}: created, pid {}", actor.id, started.pid);
        actor.began(&ProcessId::Init, started, io);
    } else {
        info!("container {}: created, to be restored", actor.id);
    }
    tokio::spawn(actor.run());
    Ok((handle, pid))
}

async fn make(
    shared: &Shared,
    create: &Create,
    runc: &Runc,
    given_up: impl Future<Output = ()>,
) -> Result<Option<(Started, Io)>> {
    if let Some(image) = &create.checkpoint
        && !image.is_dir()
    {
        return Err(Error::FailedPrecondition(format!(
            "create {} from checkpoint {}: there is no such folder",
            create.id,
            image.display()
        )));
    }
    Record {
        bundle: create.bundle.clone(),
        mounts_rootfs: !create.rootfs.is_empty(),
        runc: Some(runc.record().clone()),
        systemd_cgroup: create.options.systemd_cgroup,
        cgroups_path: create.spec.cgroups_path().map(str::to_owned),
    }
    .save(&shared.first_bundle, &create.id)?;
    mount_rootfs(create).await?;
    if create.checkpoint.is_some() {
        return Ok(None);
    }
    let streams_for = io::For {
        id: &create.id,
        namespace: &shared.namespace,
        console: (&create.bundle, "console"),
        writer: Writer::Process,
        owner: create.streams_owner(),
        exits: &shared.exits,
    };
    let (prepared, streams) = create.io.prepare(streams_for).await?;
    tokio::select! {
        made = async {
            let started = runc.create(streams).await?;
            let io = prepared.attach().await?;
            io.check()?;
            Ok(Some((started, io)))
        } => made,
        () = given_up => Err(Error::FailedPrecondition(format!(
            "container {} was deleted while it was being made",
            create.id
        ))),
    }
}

/// A runc that was ended before it had noted what it made does not remove its cgroup.
async fn remove_cgroup(create: &Create) {
    let driver = Driver::of(create.options.systemd_cgroup);
    let Some(path) = create.spec.cgroups_path().map(str::to_owned) else {
        return;
    };
    let removed = blocking(move || {
        let cgroup = Cgroup::at(&path, driver)?;
        match cgroup.kill_all() {
            Err(error) if error.source.kind() != std::io::ErrorKind::NotFound => {
                return Err(error.into());
            }
            _ => {}
        }
        first_of(cgroup.remove())
    });
    removed
        .await
        .unwrap_or_else(|error| warn!("after a failed create: {error}"));
}

/// The cgroup that a process is in, while it lives.
fn known_cgroup(id: &str, pid: Pid) -> Option<Cgroup> {
    Cgroup::of_pid(pid)
        .inspect_err(|e| warn!("container {id}: {e}"))
        .ok()
}

/// Its kills for lack of memory from now on. It must exist.
fn watched(id: &str, cgroup: Option<&Cgroup>) -> Option<OomKills> {
    cgroup?
        .watch_oom_kills()
        .inspect_err(|e| warn!("container {id}: {e}"))
        .ok()
}

async fn mount_rootfs(create: &Create) -> Result<()> {
    if create.rootfs.is_empty() {
        return Ok(());
    }
    let rootfs = create.bundle.join("rootfs");
    let mounts: Vec<Mount> = create.rootfs.iter().map(mount).collect();
    blocking(move || {
        std::fs::create_dir_all(&rootfs).map_err(IoError::at("create", &rootfs))?;
        // Whatever is mounted there goes when the container is taken down.
        let _ = mounts::mount_all(&mounts, &rootfs)?;
        Ok(())
    })
    .await
}

fn mount(wire: &WireMount) -> Mount {
    Mount {
        kind: wire.type_.clone(),
        source: wire.source.clone(),
        target: wire.target.clone(),
        options: wire.options.clone(),
    }
}

/// Unmounts what a container had, after runc has `deleted` it or has failed to. The first failure.
async fn take_down(bundle: &Path, deleted: Result<()>) -> Result<()> {
    let rootfs = bundle.join("rootfs");
    let unmounted = blocking(move || Ok(mounts::unmount(&rootfs)?)).await;
    deleted.and(unmounted)
}

/// Runs what may block away from the reactor.
///
/// # Errors
/// What the work says.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Error::Internal("a blocking task was cancelled"))?
}
