//! Makes a sandbox from a plan.
//!
//! ```text
//!  Plan ──▶ record ──▶ pod's files ──▶ namespaces ──▶ cgroup ──▶ create event ──▶ the owner runs
//!             │     (Sandbox API)         │             │       (Task API)
//!             └─────────────┴─────────────┴─────────────┴── a failure: take down
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use log::{debug, info, warn};
use rustix::process::Pid;
use tokio::sync::watch;

use super::Handle;
use super::owner::Owner;
use crate::container::mailbox::{Mailbox, View};
use crate::container::state::Status;
use crate::container::{Create, Shared};
use crate::error::{Error, Result};
use crate::io;
use crate::kernel::blocking;
use crate::kernel::cgroup::{Cgroup, Driver};
use crate::kernel::exits::Exited;
use crate::pod::files::PodFiles;
use crate::runtime::bundle::Record;
use crate::runtime::options::{Holder, Options};
use crate::runtime::teardown::{Remains, Why, take_down};

/// A sandbox to be made.
#[derive(Debug)]
pub struct Plan {
    /// The id.
    pub id: String,
    /// The pod's name in Kubernetes, for the log; empty elsewhere.
    pub name: String,
    /// The bundle.
    pub bundle: PathBuf,
    /// The namespaces, the settings in the namespaces, and the holder.
    pub config: pause::SandboxConfig,
    /// The path of the cgroup; none for a sandbox without a cgroup.
    pub cgroups_path: Option<String>,
    /// The form of the cgroup's path.
    pub driver: Driver,
    /// The CPU weight of the cgroup, as cgroup v1 counts; none for the kernel's default.
    pub cpu_shares: Option<u64>,
    /// The pod's containers see the node's processes.
    pub node_processes: bool,
    /// The operator's settings.
    pub options: Options,
    /// Who asked for the sandbox.
    pub origin: Origin,
}

/// Who asked for a sandbox, and what follows from that.
#[derive(Debug)]
pub enum Origin {
    /// The Task API, in podsandbox mode: containerd expects the events of a task, and State shows the streams.
    Task(Box<Create>),
    /// The Sandbox API: the sandbox has no events and no streams, and the shim makes the pod's files.
    Sandbox(PodFiles),
}

/// A sandbox that stands.
#[derive(Debug)]
pub struct Made {
    /// The handle for calls to the owner.
    pub handle: Handle,
    /// The pid whose `/proc/PID/ns` has the pod's namespaces.
    pub pid: Pid,
    /// What holds the namespaces.
    pub kind: pause::HolderKind,
    /// The paths of the pod's own namespaces. A namespace of the node has no path here.
    pub paths: BTreeMap<pause::NamespaceKind, PathBuf>,
}

impl Plan {
    /// The sandbox that an OCI spec describes.
    pub fn of_task(create: Create) -> Self {
        Self {
            id: create.id.clone(),
            name: create.spec.pod_name(),
            bundle: create.bundle.clone(),
            config: create.spec.sandbox(create.options.holder_choice()),
            cgroups_path: create.spec.cgroups_path().map(str::to_owned),
            driver: Driver::of(create.options.systemd_cgroup),
            cpu_shares: create.spec.cpu_shares(),
            node_processes: !create.spec.has_pid_namespace(),
            options: create.options.clone(),
            origin: Origin::Task(Box::new(create)),
        }
    }

    fn files(&self) -> Option<&PodFiles> {
        match &self.origin {
            Origin::Task(_) => None,
            Origin::Sandbox(files) => Some(files),
        }
    }

    fn remains(&self, first_bundle: &Path) -> Remains {
        let files = self.files();
        Remains {
            id: self.id.clone(),
            record: Record {
                bundle: self.bundle.clone(),
                mounts_rootfs: false,
                runc: None,
                systemd_cgroup: self.driver == Driver::Systemd,
                cgroups_path: self.cgroups_path.clone(),
            },
            runc: None,
            first_bundle: first_bundle.to_owned(),
            mount_points: files.and_then(PodFiles::mount_point).into_iter().collect(),
            directories: files.map(PodFiles::directories).unwrap_or_default(),
        }
    }

    /// The streams that State shows.
    fn streams(&self) -> io::Request {
        match &self.origin {
            Origin::Task(create) => create.io.clone(),
            Origin::Sandbox(_) => io::Request::default(),
        }
    }
}

/// Makes a sandbox and starts the owner, the task that owns the sandbox. A failure leaves nothing behind.
///
/// # Errors
/// `Sandbox` with the operation that failed, `Io` for the cgroup and the files, `FailedPrecondition` for a sandbox from
/// a checkpoint.
pub async fn create(shared: &Shared, plan: Plan) -> Result<Made> {
    if let Origin::Task(create) = &plan.origin
        && let Some(image) = &create.checkpoint
    {
        return Err(Error::FailedPrecondition(format!(
            "create {} from checkpoint {}: a sandbox runs no program",
            create.id,
            image.display()
        )));
    }
    let remains = plan.remains(&shared.first_bundle);
    // The record is written before anything is made, so that `delete` finds what a killed shim has left.
    let made = match remains.record.save(&shared.first_bundle, &plan.id) {
        Ok(()) => make(shared, &plan).await,
        Err(error) => Err(error),
    };
    match made {
        Ok((sandbox, cgroup, process)) => {
            Ok(hand_over(shared, plan, remains, sandbox, cgroup, process))
        }
        Err(error) => {
            let taken_down = take_down(remains, Why::NotMade).await;
            taken_down.unwrap_or_else(
                |left| warn!(error:% = left; "not taken down after a failed create"),
            );
            Err(error)
        }
    }
}

/// Starts the owner of a sandbox that stands, and publishes the creation of a task.
fn hand_over(
    shared: &Shared,
    plan: Plan,
    remains: Remains,
    sandbox: pause::Sandbox,
    cgroup: Option<Cgroup>,
    process: Option<Exited>,
) -> Made {
    let (pid, kind, paths) = (sandbox.pid(), sandbox.holder_kind(), sandbox.paths());
    let (mailbox, requests) = Mailbox::new();
    let (view, seen) = watch::channel(View {
        pid: Some(pid),
        status: Status::Created,
        io: plan.streams(),
    });
    let (started, has_started) = watch::channel(false);
    debug!(pid:%; "sandbox created");
    let handle = Handle {
        bundle: plan.bundle.into(),
        requests: mailbox,
        view: seen,
        started: has_started,
    };
    let owner = Owner {
        id: plan.id,
        name: plan.name,
        remains,
        shared: shared.clone(),
        held: Some(sandbox),
        thread_only: plan.options.holder == Holder::Thread,
        node_processes: plan.node_processes,
        process,
        cgroup,
        origin: plan.origin,
        view,
        started,
        requests,
    };
    if let Origin::Task(create) = &owner.origin {
        owner.shared.events.send(create.event(Some(pid)));
    }
    tokio::spawn(owner.run());
    Made {
        handle,
        pid,
        kind,
        paths,
    }
}

/// Makes the files, the namespaces and the cgroup. Returns also the exit to come of a process that holds the
/// namespaces: the sandbox lives and dies with this process.
async fn make(
    shared: &Shared,
    plan: &Plan,
) -> Result<(pause::Sandbox, Option<Cgroup>, Option<Exited>)> {
    let cgroup = plan
        .cgroups_path
        .as_deref()
        .map(|path| Cgroup::at(path, plan.driver))
        .transpose()?;
    let (config, files, cpu_shares) = (plan.config.clone(), plan.files().cloned(), plan.cpu_shares);
    // Keeps the exit of a holder that ends before its pid is known here.
    let _expected = shared.exits.expect();
    let made = blocking::run(move || {
        if let Some(files) = &files {
            files.make()?;
        }
        let sandbox = pause::Sandbox::create(&config)?;
        match place(&sandbox, cgroup.as_ref(), cpu_shares) {
            Ok(()) => Ok((sandbox, cgroup)),
            Err(error) => {
                sandbox.end();
                Err(error)
            }
        }
    });
    let (sandbox, cgroup) = made.await?;
    let process = match sandbox.holder_kind() {
        pause::HolderKind::Thread => None,
        pause::HolderKind::Process => Some(shared.exits.claim(sandbox.pid()).exit),
    };
    Ok((sandbox, cgroup, process))
}

/// Makes the cgroup, and moves a process that holds the namespaces into the cgroup. A thread stays outside, and the
/// cgroup stays empty: cAdvisor finds a pod's network counters by the name of the cgroup.
fn place(sandbox: &pause::Sandbox, cgroup: Option<&Cgroup>, cpu_shares: Option<u64>) -> Result<()> {
    let Some(cgroup) = cgroup else {
        return Ok(());
    };
    cgroup.create()?;
    if let Some(Err(error)) = cpu_shares.map(|shares| cgroup.set_cpu_shares(shares)) {
        // No error: a sandbox takes no processor, and the controller may not be there.
        info!(error:%; "CPU shares not set");
    }
    match sandbox.holder_kind() {
        pause::HolderKind::Thread => Ok(()),
        pause::HolderKind::Process => Ok(cgroup.add(sandbox.pid())?),
    }
}
