//! Makes the members of a pod: a task from the spec in the bundle, the sandbox of the Sandbox API from CRI's
//! description.

use std::collections::BTreeMap;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use rustix::process::Pid;
use serde_json::Value;

use super::config::{Metadata, PodConfig};
use super::files::PodFiles;
use super::sandbox::{self, Origin, Plan, ProcessNamespace, Request, pid_namespace};
use super::task::Task;
use super::{Making, Member, Pod};
use crate::container::mailbox::ProcessId;
use crate::container::{self, Create};
use crate::error::{Error, Result};
use crate::kernel::cgroup::Driver;
use crate::runtime::bundle::save_address;
use crate::runtime::options::{Holder, Options};
use crate::runtime::spec::{Changes, Role, Spec};

/// The CPU weight that containerd's CRI gives to the cgroup of a sandbox: the least.
const SANDBOX_CPU_SHARES: u64 = 2;

/// What is known of a sandbox that the Sandbox API has made. Nothing of this changes until the sandbox is gone.
#[derive(Debug)]
pub struct Described {
    /// CRI's description, which the sandbox was made from.
    pub config: PodConfig,
    /// The operator's settings.
    pub options: Options,
    /// The OCI spec.
    pub spec: Value,
    /// What holds the namespaces.
    pub holder: pause::HolderKind,
    /// The paths of the pod's own namespaces.
    pub paths: BTreeMap<pause::NamespaceKind, PathBuf>,
    /// The network namespace that containerd made for the pod; empty for the node's.
    pub network: PathBuf,
    /// When the sandbox was made.
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
    /// The network namespace that containerd made for the pod; empty for the node's.
    pub network: PathBuf,
    /// Annotations besides CRI's own.
    pub annotations: BTreeMap<String, String>,
}

/// The member to be made, and the service that asks for the member.
#[derive(Debug)]
pub(super) enum Wanted {
    /// A container, or the sandbox in podsandbox mode.
    Task(Create),
    /// The sandbox, through the Sandbox API.
    Sandbox(CreateSandbox),
}

/// The pod's name in Kubernetes, as `NAMESPACE/NAME`; empty without Kubernetes.
fn pod_name(config: &PodConfig) -> String {
    let name = |pod: &Metadata| format!("{}/{}", pod.namespace, pod.name);
    config.metadata.as_ref().map(name).unwrap_or_default()
}

impl Pod {
    pub(super) async fn make_task(
        &self,
        mut create: Create,
        making: &Making,
    ) -> Result<(Member, Option<Pid>)> {
        create.choose_driver();
        if create.spec.role(&create.id) == Role::Sandbox && create.options.holder != Holder::Image {
            let made = sandbox::create(&self.shared, Plan::of_task(create)).await?;
            return Ok((Member::Task(Task::Sandbox(made.handle)), Some(made.pid)));
        }
        self.refuse_strangers(&create)?;
        let mut changes = Changes::default();
        if let Some(files) = self.files() {
            if let Some(label) = create.spec.mount_label() {
                files.label(label)?;
            }
            changes.binds = files.binds();
        }
        // Held until runc has opened the path.
        let shared = self.shared_processes(&create).await?;
        changes.pid_namespace = shared.as_ref().map(|shared| shared.path.clone());
        create.spec.write(&create.bundle, &changes)?;
        // For a container that joins the pod, containerd 2.x runs no `start`.
        save_address(&create.bundle, self.lifecycle.socket())?;
        let made = container::create(&self.shared, create, making.given_up()).await;
        drop(shared);
        let (handle, pid) = made?;
        Ok((Member::Task(Task::Container(handle)), pid))
    }

    pub(super) async fn make_sandbox(
        &self,
        create: CreateSandbox,
    ) -> Result<(Member, Option<Pid>)> {
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
        let plan = Plan {
            config: config.sandbox(&network, options.holder_choice())?,
            driver: Driver::of(config.has_slice()),
            cpu_shares: Some(SANDBOX_CPU_SHARES),
            cgroups_path: config.cgroups_path(&id),
            node_processes: config.node_processes(),
            options: options.clone(),
            origin: Origin::Sandbox(files.clone()),
            id: id.clone(),
            name: pod_name(&config),
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
        let member = Member::Sandbox(made.handle, Arc::new(described));
        Ok((member, Some(made.pid)))
    }

    /// The files that the pod's containers share; none where containerd makes the files.
    fn files(&self) -> Option<PodFiles> {
        self.members().values().find_map(|member| match member {
            Member::Sandbox(_, described) => Some(described.files.clone()),
            Member::Coming(_) | Member::Task(_) => None,
        })
    }

    /// Refuses a container that would join namespaces by the pid of a sandbox that this shim does not have. After the
    /// death of a pod's shim, `start` makes another shim, and the pid may be a stranger's by then: the container would
    /// run in namespaces of the stranger, or of the node.
    ///
    /// # Errors
    /// `FailedPrecondition` when the sandbox is not here, or has ended.
    fn refuse_strangers(&self, create: &Create) -> Result<()> {
        let sandbox = create.spec.sandbox_to_join();
        let Some(id) = sandbox.filter(|id| *id != create.id) else {
            return Ok(());
        };
        let view = self.task(id).and_then(|task| task.view(&ProcessId::Init));
        match view {
            Ok(view) if view.status.exit().is_none() => Ok(()),
            Ok(_) | Err(_) => Err(Error::FailedPrecondition(format!(
                "sandbox {id} has ended, and no container can join"
            ))),
        }
    }

    /// The sandbox whose namespaces a container joins; none where a spec joins no sandbox that was made here.
    ///
    /// # Errors
    /// `FailedPrecondition` when the sandbox has ended: the pid in the spec's paths may be a stranger's by now. Also when
    /// the sandbox has a user namespace and the container would have none: containerd 1.6, after a downgrade, knows
    /// nothing of the pod's, and root of the container would be the node's.
    fn joined_sandbox(&self, spec: &Spec) -> Result<Option<sandbox::Handle>> {
        let members = self.members();
        let mut sandboxes = members
            .iter()
            .filter_map(|(id, member)| match member.task() {
                Some(Task::Sandbox(sandbox)) => Some((id, sandbox)),
                Some(Task::Container(_)) | None => None,
            });
        let joined = sandboxes.find(|(_, sandbox)| {
            let pid = sandbox.view().pid;
            pid.is_some_and(|pid| spec.joins(pid))
        });
        let Some((id, sandbox)) = joined else {
            return Ok(None);
        };
        let view = sandbox.view();
        let refused = |why: &str| Err(Error::FailedPrecondition(format!("sandbox {id} {why}")));
        if view.status.exit().is_some() {
            return refused("has ended, and no container can join");
        }
        if !spec.has_user_namespace() && view.pid.is_some_and(has_user_namespace) {
            return refused(
                "has a user namespace, and the container would be the node's root: this containerd does not know \
                 user namespaces, or was not told of this one",
            );
        }
        Ok(Some(sandbox))
    }

    /// The process namespace for a container whose spec joins the sandbox's; none where the spec's path stays. The
    /// path in the spec is wrong where a thread holds the sandbox: `/proc/TID/ns/pid` is the namespace of the thread's
    /// process, the shim, and the container would run in the node's process namespace.
    async fn shared_processes(&self, create: &Create) -> Result<Option<ProcessNamespace>> {
        let Some(sandbox) = self.joined_sandbox(&create.spec)? else {
            return Ok(None);
        };
        let of_sandbox = sandbox.view().pid.map(pid_namespace);
        if create.spec.pid_namespace_path() != of_sandbox.as_deref() {
            return Ok(None);
        }
        sandbox.ask(Request::SharedProcesses).await.map(Some)
    }
}

/// Whether a process has another user namespace than the shim. One that cannot be asked has not.
fn has_user_namespace(pid: Pid) -> bool {
    let of = |process: &str| std::fs::metadata(format!("/proc/{process}/ns/user")).ok();
    match (of(&pid.to_string()), of("self")) {
        (Some(theirs), Some(ours)) => theirs.ino() != ours.ino(),
        (None, _) | (_, None) => false,
    }
}
