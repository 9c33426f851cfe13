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
pub mod event;
pub mod mailbox;
mod process;
mod start;
pub mod state;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use log::{info, warn};
use rustix::process::Pid;
use tokio::task::JoinSet;

use self::actor::Actor;
use self::event::{Created, Event, Events};
use self::mailbox::{Handle, ProcessId, View};
use self::process::Process;
use self::state::{Checkpointing, Status};
use crate::error::{Error, IoError, Result};
use crate::io::{self, Io, Recipient, StreamOwner, Writer};
use crate::kernel::blocking;
use crate::kernel::cgroup::{Cgroup, Driver, OomKills};
use crate::kernel::exits::{Claim, Exits};
use crate::kernel::mounts::{self, Mount};
use crate::runtime::bundle::Record;
use crate::runtime::options::Options;
use crate::runtime::runc::Runc;
use crate::runtime::spec::Spec;
use crate::runtime::teardown::{Remains, Why, take_down};

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
    /// The id.
    pub id: String,
    /// The bundle.
    pub bundle: PathBuf,
    /// What the root filesystem is mounted from.
    pub rootfs: Vec<Mount>,
    /// The checkpoint to restore the container from at the start.
    pub checkpoint: Option<PathBuf>,
    /// The streams.
    pub io: io::Request,
    /// The spec.
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

    fn stream_owner(&self) -> StreamOwner {
        StreamOwner {
            uid: self.options.io_uid,
            gid: self.options.io_gid,
        }
    }

    /// The cgroup, where the spec names the path. Elsewhere only runc or systemd knows the path, and the kernel is asked where
    /// the process is.
    fn cgroup(&self) -> Option<Cgroup> {
        let path = self.spec.cgroups_path()?;
        if !path.starts_with('/') || self.options.systemd_cgroup {
            return None;
        }
        Cgroup::at(path, Driver::Cgroupfs)
            .inspect_err(|e| warn!("container {}: {e}", self.id))
            .ok()
    }

    fn record(&self, runc: &Runc) -> Record {
        Record {
            bundle: self.bundle.clone(),
            mounts_rootfs: !self.rootfs.is_empty(),
            runc: Some(runc.record().clone()),
            systemd_cgroup: self.options.systemd_cgroup,
            cgroups_path: self.spec.cgroups_path().map(str::to_owned),
        }
    }

    /// The event that tells of the creation.
    pub fn event(&self, pid: Option<Pid>) -> Event {
        Event::Create(Box::new(Created {
            container: self.id.clone(),
            bundle: self.bundle.clone(),
            rootfs: self.rootfs.clone(),
            io: self.io.clone(),
            checkpoint: self.checkpoint.clone(),
            pid,
        }))
    }
}

/// Makes a container and gives the container to a task of its own. A failure leaves nothing behind. When `given_up` resolves
/// before runc is done, runc is killed: a hook that hangs must not keep containerd from deleting what containerd has given
/// up. A container that is to be restored has no process before the start.
///
/// # Errors
/// What mounting, the streams or runc say; `FailedPrecondition` when the making was given up, and when there is no
/// checkpoint where it should be.
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
    let remains = Remains {
        id: create.id.clone(),
        record: create.record(&runc),
        runc: Some(runc.clone()),
        first_bundle: shared.first_bundle.to_path_buf(),
        mount_points: vec![create.bundle.join("rootfs")],
        directories: Vec::new(),
    };
    // The record is written before anything is made.
    let made = match remains.record.save(&shared.first_bundle, &create.id) {
        Ok(()) => make(shared, &create, &runc, given_up).await,
        Err(error) => Err(error),
    };
    match made {
        Ok(made) => Ok(hand_over(shared, create, remains, runc, made)),
        Err(error) => {
            let taken_down = take_down(remains, Why::NotMade).await;
            taken_down.unwrap_or_else(|e| {
                warn!("take down {} after a failed create: {e}", create.id);
            });
            Err(error)
        }
    }
}

/// Gives a container that has been made to a task of its own.
fn hand_over(
    shared: &Shared,
    create: Create,
    remains: Remains,
    runc: Runc,
    made: Option<(Claim, Io)>,
) -> (Handle, Option<Pid>) {
    let pid = made.as_ref().map(|(claim, _)| claim.child.pid());
    let cgroup = create
        .cgroup()
        .or_else(|| pid.and_then(|pid| known_cgroup(&create.id, pid)));
    // runc's init is in the cgroup and has not executed the user's program: no OOM kill can precede the watch.
    let oom_kills = watched(&create.id, cgroup.as_ref().filter(|_| pid.is_some()));
    shared.events.send(create.event(pid));
    let (handle, inbox) = Handle::new(&create.bundle);
    let stream_owner = create.stream_owner();
    let view = View {
        pid,
        status: Status::Created,
        io: create.io,
    };
    let mut actor = Actor {
        init: Process::new(inbox.views.add(ProcessId::Init, view)),
        id: create.id,
        remains,
        stream_owner,
        shares_processes: create.spec.shares_process_namespace(),
        shared: shared.clone(),
        runc,
        cgroup,
        oom_kills,
        image: create.checkpoint,
        checkpointing: Checkpointing::No,
        execs: HashMap::new(),
        exec_count: 0,
        update_count: 0,
        inbox,
        jobs: JoinSet::new(),
        ending: Vec::new(),
        deleted: Vec::new(),
    };
    if let Some((claim, io)) = made {
        info!("container {}: created, pid {}", actor.id, claim.child.pid());
        actor.began(&ProcessId::Init, claim, io);
    } else {
        info!("container {}: created, to be restored", actor.id);
    }
    tokio::spawn(actor.run());
    (handle, pid)
}

/// What runc makes: the init and the streams; none for a container that is to be restored.
async fn make(
    shared: &Shared,
    create: &Create,
    runc: &Runc,
    given_up: impl Future<Output = ()>,
) -> Result<Option<(Claim, Io)>> {
    if let Some(image) = &create.checkpoint
        && !image.is_dir()
    {
        return Err(Error::FailedPrecondition(format!(
            "create {} from checkpoint {}: there is no such folder",
            create.id,
            image.display()
        )));
    }
    mount_rootfs(create).await?;
    if create.checkpoint.is_some() {
        return Ok(None);
    }
    let recipient = Recipient {
        id: &create.id,
        namespace: &shared.namespace,
        console: (&create.bundle, "console"),
        writer: Writer::Process,
        owner: create.stream_owner(),
        exits: &shared.exits,
    };
    let (prepared, streams) = create.io.prepare(recipient).await?;
    tokio::select! {
        made = async {
            let claim = runc.create(streams).await?;
            let io = prepared.attach().await?;
            io.check()?;
            Ok(Some((claim, io)))
        } => made,
        () = given_up => Err(Error::FailedPrecondition(format!(
            "container {} was deleted while it was being made",
            create.id
        ))),
    }
}

/// The cgroup that a process is in, while the process lives.
fn known_cgroup(id: &str, pid: Pid) -> Option<Cgroup> {
    Cgroup::of_pid(pid)
        .inspect_err(|e| warn!("container {id}: {e}"))
        .ok()
}

/// The kills for lack of memory in a cgroup that exists, from now on.
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
    let mounts = create.rootfs.clone();
    blocking::run(move || {
        std::fs::create_dir_all(&rootfs).map_err(IoError::at("create", &rootfs))?;
        // The mounts go when the container is taken down.
        let _ = mounts::mount_all(&mounts, &rootfs)?;
        Ok(())
    })
    .await
}
