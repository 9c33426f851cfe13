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
//! What takes time is a job, so a hanging `runc exec` does not keep a kill from its process. The order of events is kept
//! here and needs no locks: an exit that comes while a start is under way waits for it; the init's exit waits for its
//! execs' exits.

mod actor;
mod control;
mod process;

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
use crate::bundle::Record;
use crate::cgroup::{Cgroup, Driver};
use crate::convert::wire_pid;
use crate::error::{Error, IoError, Result};
use crate::events::{Event, Events};
use crate::exits::Exits;
use crate::io::{self, Io, Owner, Writer};
use crate::mailbox::{Handle, ProcessId, View};
use crate::mounts::{self, Mount};
use crate::options::Options;
use crate::runc::{Runc, Started};
use crate::spec::Spec;
use crate::state::State;

/// What all containers of a shim have in common.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    /// containerd's namespace.
    pub(crate) namespace: Arc<str>,
    /// The bundle that the shim was started for.
    pub(crate) first_bundle: Arc<Path>,
    /// The waiter.
    pub(crate) exits: Arc<Exits>,
    /// The publisher.
    pub(crate) events: Events,
}

/// A container to be made.
#[derive(Debug)]
pub(crate) struct Create {
    /// Its id.
    pub(crate) id: String,
    /// Its bundle.
    pub(crate) bundle: PathBuf,
    /// What its root filesystem is mounted from.
    pub(crate) rootfs: Vec<WireMount>,
    /// Its streams.
    pub(crate) io: io::Request,
    /// Its spec.
    pub(crate) spec: Spec,
    /// The operator's settings.
    pub(crate) options: Options,
}

impl Create {
    /// Leaves the cgroups to systemd where that is who their path is written for.
    pub(crate) fn choose_driver(&mut self) {
        let driver = Driver::choose(self.options.systemd_cgroup, self.spec.cgroups_path());
        self.options.systemd_cgroup = driver == Driver::Systemd;
    }

    fn streams_owner(&self) -> Owner {
        Owner {
            uid: self.options.io_uid,
            gid: self.options.io_gid,
        }
    }

    /// Its cgroup. Where only runc or systemd knows the path, it is asked of the process, which must still be there.
    fn cgroup(&self, init: Pid) -> Result<Cgroup, IoError> {
        match self.spec.cgroups_path() {
            Some(path) if path.starts_with('/') && !self.options.systemd_cgroup => {
                Cgroup::at(path, Driver::Cgroupfs)
            }
            _ => Cgroup::of_pid(init),
        }
    }

    /// The event that says that it is made.
    pub(crate) fn event(&self, pid: Pid) -> Event {
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
            pid: wire_pid(Some(pid)),
            ..task::TaskCreate::default()
        })
    }
}

/// Makes a container and gives it to a task of its own. A failure leaves nothing behind.
///
/// # Errors
/// What mounting, the streams or runc say.
pub(crate) async fn create(shared: &Shared, create: Create) -> Result<(Handle, Pid)> {
    let runc = Runc::new(
        &create.id,
        &create.bundle,
        &shared.namespace,
        &create.options,
        &shared.exits,
    );
    let made = make(shared, &create, &runc).await;
    let (started, io) = match made {
        Ok(made) => made,
        Err(error) => {
            take_down(&create.bundle, &runc).await.unwrap_or_else(|e| {
                warn!("take down {} after a failed create: {e}", create.id);
            });
            return Err(error);
        }
    };
    let cgroup = create
        .cgroup(started.pid)
        .inspect_err(|e| warn!("container {}: {e}", create.id))
        .ok();
    // Its init stands in its cgroup and runs nothing of the user's yet: no kill can be missed.
    let oom_kills = cgroup.as_ref().and_then(|cgroup| {
        cgroup
            .watch_oom_kills()
            .inspect_err(|e| warn!("container {}: {e}", create.id))
            .ok()
    });
    let (handle, owner) = Handle::new(&create.bundle);
    let streams_owner = create.streams_owner();
    let pid = started.pid;
    let event = create.event(pid);
    let view = owner.views.add(
        ProcessId::Init,
        View {
            pid: Some(pid),
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
        init: Process::new(view),
        execs: HashMap::new(),
        exec_count: 0,
        update_count: 0,
        owner,
        jobs: JoinSet::new(),
        deleted: None,
    };
    info!("container {}: created, pid {pid}", actor.id);
    shared.events.send(&event);
    actor.began(&ProcessId::Init, started, io);
    tokio::spawn(actor.run());
    Ok((handle, pid))
}

async fn make(shared: &Shared, create: &Create, runc: &Runc) -> Result<(Started, Io)> {
    Record {
        bundle: create.bundle.clone(),
        runc: Some(runc.record().clone()),
        systemd_cgroup: create.options.systemd_cgroup,
        cgroups_path: create.spec.cgroups_path().map(str::to_owned),
    }
    .save(&shared.first_bundle, &create.id)?;
    mount_rootfs(create).await?;
    let (prepared, streams) = create.io.prepare(
        &create.bundle,
        "console",
        Writer::Process,
        create.streams_owner(),
    )?;
    let started = runc.create(streams).await?;
    let io = prepared.attach().await?;
    Ok((started, io))
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

/// Removes what runc and the kernel know of a container. Goes on after a failure, and returns the first.
async fn take_down(bundle: &Path, runc: &Runc) -> Result<()> {
    let deleted = runc.delete().await;
    let rootfs = bundle.join("rootfs");
    let unmounted = blocking(move || Ok(mounts::unmount(&rootfs)?)).await;
    deleted.and(unmounted)
}

/// Runs what may block away from the reactor.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Error::Internal("a blocking task was cancelled"))?
}
