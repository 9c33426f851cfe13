//! One task per container, the actor. The actor owns the init and the execs, and nobody else changes a process.
//!
//! ```text
//!             ┌─────────────────────────── Actor ────────────────────────────┐
//!  requests ─▶│ init: Process    execs: Process, Process, …                  ├─▶ events, in order
//!             │   ▲                ▲                                         ├─▶ views (for State and Wait)
//!             │   └────────────────┴── jobs: a start, an exit to come, … ◀───┼── runc, the reaper, the kernel
//!             └──────────────────────────────────────────────────────────────┘
//! ```
//!
//! Whatever takes time is a job, so a hanging `runc exec` keeps no kill from the container. Only calls for a process
//! that is being started may wait for the end of the start.
//!
//! The actor alone keeps the order of events, without locks:
//!
//! - An exit that comes while the start is under way waits for the start.
//! - The init's exit waits for the exits of the execs, for a checkpoint under way, and up to two seconds for the reader
//!   of the output.

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

use log::{debug, warn};
use rustix::process::Pid;
use tokio::task::JoinSet;

use self::actor::Actor;
use self::event::{Created, Event, Events};
use self::mailbox::{Handle, ProcessId, View};
use self::process::Process;
use self::state::{Checkpointing, Status};
use crate::error::{Error, IoError, Result};
use crate::io::{self, Io, Recipient, StreamOwner};
use crate::kernel::blocking;
use crate::kernel::cgroup::{Cgroup, Driver, OomKills};
use crate::kernel::exits::{Claim, Exits};
use crate::kernel::mounts::{self, Mount};
use crate::runtime::bundle::Record;
use crate::runtime::leftovers::Leftovers;
use crate::runtime::options::Options;
use crate::runtime::runc::Runc;
use crate::runtime::spec::Spec;
use crate::runtime::teardown::{Remains, Why, take_down};

/// What all members of a pod have in common.
#[derive(Debug, Clone)]
pub struct Shared {
    /// containerd's namespace.
    pub namespace: Arc<str>,
    /// The bundle that the shim was started for.
    pub first_bundle: Arc<Path>,
    /// The reaper.
    pub exits: Arc<Exits>,
    /// The queue of events.
    pub events: Events,
    /// What failed creates have left.
    pub leftovers: Leftovers,
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
    /// The checkpoint to restore the container from when the container is started.
    pub checkpoint: Option<PathBuf>,
    /// The streams.
    pub io: io::Request,
    /// The spec.
    pub spec: Spec,
    /// The operator's settings.
    pub options: Options,
}

impl Create {
    /// Chooses the cgroup driver: systemd makes the cgroup where the path has systemd's form.
    pub fn choose_driver(&mut self) {
        let driver = Driver::choose(self.options.systemd_cgroup, self.spec.cgroups_path());
        self.options.systemd_cgroup = driver == Driver::Systemd;
    }

    /// The owner that the options name. Without one, in a user namespace, the owner is the root there: Docker names the
    /// owner to the stock shim only.
    fn stream_owner(&self) -> StreamOwner {
        let named = (self.options.io_uid, self.options.io_gid);
        let (uid, gid) = match named {
            (0, 0) => self.spec.mapped_root().unwrap_or(named),
            named => named,
        };
        StreamOwner { uid, gid }
    }

    /// The cgroup, where the spec has the path. None where only runc or systemd knows the path: the kernel then knows
    /// the cgroup of the init (`known_cgroup`).
    fn cgroup(&self) -> Option<Cgroup> {
        let path = self.spec.cgroups_path()?;
        if !path.starts_with('/') || self.options.systemd_cgroup {
            return None;
        }
        Cgroup::at(path, Driver::Cgroupfs)
            .inspect_err(|e| warn!(container = self.id, error:% = e; "cgroup unknown"))
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

    /// The event of the creation.
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

/// Makes a container and starts the actor that owns the container. Returns the pid of the init; a container that is to
/// be restored has no process before the start. A failure leaves nothing behind.
///
/// When `given_up` resolves before runc is done, runc is killed: containerd must be able to delete a container whose
/// create hangs in a hook.
///
/// # Errors
/// The errors of the mounts, the streams and runc; `FailedPrecondition` when the making is given up, and when the
/// checkpoint does not exist.
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
    // The record is written before anything is made, so that `delete` finds what a killed shim has left.
    let made = match remains.record.save(&shared.first_bundle, &create.id) {
        Ok(()) => make(shared, &create, &runc, given_up).await,
        Err(error) => Err(error),
    };
    match made {
        Ok(made) => Ok(hand_over(shared, create, remains, runc, made)),
        Err(error) => {
            if let Err(e) = take_down(remains.clone(), Why::NotMade).await {
                warn!(container = create.id, error:% = e; "not taken down after a failed create");
                shared.leftovers.keep(remains);
            }
            Err(error)
        }
    }
}

/// Publishes the creation, and starts the actor of a container that has been made.
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
    // No OOM kill can precede the watch: the init is in the cgroup, and has not executed the user's program.
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
        name: create.spec.container_name().into(),
        remains,
        stream_owner,
        writer: create.spec.output_writer(),
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
        debug!(container = actor.id, pid:% = claim.child.pid(); "container created");
        actor.began(&ProcessId::Init, claim, io);
    } else {
        debug!(container = actor.id; "container created, to be restored");
    }
    tokio::spawn(actor.run());
    (handle, pid)
}

/// Mounts the root filesystem and runs `runc create`. Returns the init and the streams; none for a container that is to
/// be restored.
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
        writer: create.spec.output_writer(),
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

/// The cgroup of a process that lives, as the kernel knows the cgroup.
fn known_cgroup(id: &str, pid: Pid) -> Option<Cgroup> {
    Cgroup::of_pid(pid)
        .inspect_err(|e| warn!(container = id, error:% = e; "cgroup unknown"))
        .ok()
}

/// A watch over the OOM kills in a cgroup that exists, from now on.
fn watched(id: &str, cgroup: Option<&Cgroup>) -> Option<OomKills> {
    cgroup?
        .watch_oom_kills()
        .inspect_err(|e| warn!(container = id, error:% = e; "OOM kills not watched"))
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
        // The teardown of the container unmounts.
        let _ = mounts::mount_all(&mounts, &rootfs)?;
        Ok(())
    })
    .await
}
