//! The part of an OCI bundle's `config.json` that the shim itself looks at. Everything else is runc's business, and
//! stays as containerd wrote it.

mod names;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use rustix::process::Pid;
use serde::Deserialize;
use serde_json::Value;

use super::bundle::replace_file;
use super::confinement::Confinement;
use crate::error::{Error, IoError, Result};
use crate::io::Writer;

/// Annotation: `sandbox` or `container`.
pub const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
/// Annotation: the pod.
pub const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
const GROUP: &str = "io.containerd.runc.v2.group";
/// Annotation: containerd 2.0 and later writes the pause image's name into a sandbox's spec, and no earlier version
/// does.
const SANDBOX_IMAGE: &str = "io.kubernetes.cri.podsandbox.image-name";

/// `config.json`, as far as the shim reads it.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub struct Spec {
    annotations: HashMap<String, String>,
    hostname: Option<String>,
    domainname: Option<String>,
    process: Confinement,
    linux: Linux,
    /// The file as containerd wrote it.
    #[serde(skip)]
    text: Vec<u8>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Linux {
    namespaces: Vec<Namespace>,
    sysctl: BTreeMap<String, String>,
    cgroups_path: Option<String>,
    uid_mappings: Vec<IdMapping>,
    gid_mappings: Vec<IdMapping>,
    mount_label: String,
    resources: Resources,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Resources {
    cpu: Cpu,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Cpu {
    shares: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct Namespace {
    #[serde(rename = "type")]
    kind: String,
    #[serde(default)]
    path: Option<PathBuf>,
}

impl Namespace {
    /// The namespace to join. An empty path means none, as for runc.
    fn path(&self) -> Option<&Path> {
        self.path
            .as_deref()
            .filter(|path| !path.as_os_str().is_empty())
    }
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "camelCase")]
struct IdMapping {
    #[serde(rename = "containerID")]
    container: u32,
    #[serde(rename = "hostID")]
    host: u32,
    size: u32,
}

/// What a container is in its pod.
#[derive(Debug, PartialEq, Eq)]
pub enum Role {
    /// The pod's sandbox (podsandbox mode).
    Sandbox,
    /// An application's container, in a pod or alone.
    Container,
}

impl Spec {
    /// Reads `config.json` of `bundle`.
    ///
    /// # Errors
    /// `Io` when the file cannot be read; `InvalidArgument`, with line and column, when the text does not follow the
    /// OCI spec.
    pub fn load(bundle: &Path) -> Result<Self> {
        let path = config_file(bundle);
        let text = std::fs::read(&path).map_err(IoError::at("read the bundle's spec", &path))?;
        Self::parse(text, &path)
    }

    pub(crate) fn parse(text: Vec<u8>, path: &Path) -> Result<Self> {
        let mut spec: Self = serde_json::from_slice(&text).map_err(|e| unreadable(path, &e))?;
        spec.text = text;
        Ok(spec)
    }

    /// Whether container `id` is a pod's sandbox or an application's container. A sandbox of CRI names itself as its
    /// sandbox. The type alone, which `docker run --annotation` can set, makes none: the container would run nothing.
    pub fn role(&self, id: &str) -> Role {
        let is = |key, value| self.annotation(key) == Some(value);
        if is(CONTAINER_TYPE, "sandbox") && is(SANDBOX_ID, id) {
            Role::Sandbox
        } else {
            Role::Container
        }
    }

    /// The id that all containers of one shim share: an explicit group, else the pod's sandbox, else nothing.
    pub fn group(&self) -> Option<&str> {
        self.annotation(GROUP)
            .or_else(|| self.annotation(SANDBOX_ID))
            .filter(|id| !id.is_empty())
    }

    /// The value of an annotation.
    pub fn annotation(&self, key: &str) -> Option<&str> {
        self.annotations.get(key).map(String::as_str)
    }

    /// The sandbox of the container's pod, where the container joins namespaces by the pid of their holder.
    pub fn sandbox_to_join(&self) -> Option<&str> {
        let mut paths = self.linux.namespaces.iter().filter_map(Namespace::path);
        self.annotation(SANDBOX_ID)
            .filter(|_| paths.any(|path| path.starts_with("/proc")))
            .filter(|id| self.group() == Some(id))
    }

    /// Whether the spec can only have been written by containerd 2.0 or later.
    pub fn is_from_containerd_2(&self) -> bool {
        self.annotations.contains_key(SANDBOX_IMAGE)
    }

    /// `linux.cgroupsPath`.
    pub fn cgroups_path(&self) -> Option<&str> {
        self.linux
            .cgroups_path
            .as_deref()
            .filter(|path| !path.is_empty())
    }

    /// The user and the group on the node that root of the container is; none where root is the node's.
    pub fn mapped_root(&self) -> Option<(u32, u32)> {
        let root = |mappings: &[IdMapping]| {
            let root = mappings.iter().find(|m| m.container == 0 && m.size > 0);
            root.map(|mapping| mapping.host)
        };
        let (uid, gid) = (
            root(&self.linux.uid_mappings)?,
            root(&self.linux.gid_mappings)?,
        );
        Some((uid, gid))
    }

    /// `linux.resources.cpu.shares`: the weight among the cgroups of the pod, as cgroup v1 counts.
    pub fn cpu_shares(&self) -> Option<u64> {
        self.linux.resources.cpu.shares
    }

    /// `linux.mountLabel`: the SELinux label of what is mounted for the container.
    pub fn mount_label(&self) -> Option<&str> {
        Some(self.linux.mount_label.as_str()).filter(|label| !label.is_empty())
    }

    /// Who writes the output FIFOs of the container's init.
    pub fn output_writer(&self) -> Writer {
        self.process.writer()
    }

    /// The path of the process namespace that the container is to join.
    pub fn pid_namespace_path(&self) -> Option<&Path> {
        self.namespace("pid").and_then(Namespace::path)
    }

    /// Whether the container joins a namespace of process or thread `pid`.
    pub fn joins(&self, pid: Pid) -> bool {
        let of_pid = format!("/proc/{pid}/ns");
        let mut paths = self.linux.namespaces.iter().filter_map(Namespace::path);
        paths.any(|path| path.starts_with(&of_pid))
    }

    /// Whether the container has another process namespace than the node's.
    pub fn has_pid_namespace(&self) -> bool {
        self.namespace("pid").is_some()
    }

    /// Whether the container has another user namespace than the node's.
    pub fn has_user_namespace(&self) -> bool {
        self.namespace("user").is_some()
    }

    /// Whether processes of the container live on when its init ends, because the container shares a process namespace
    /// with others.
    pub fn shares_process_namespace(&self) -> bool {
        self.namespace("pid")
            .is_none_or(|namespace| namespace.path().is_some())
    }

    fn namespace(&self, kind: &str) -> Option<&Namespace> {
        self.linux.namespaces.iter().find(|n| n.kind == kind)
    }

    /// The sandbox that this spec describes.
    ///
    /// The spec's process namespace is the one of a pause container. The spec does not say whether the pod's containers
    /// will share a process namespace. A sandbox that a thread holds therefore starts without one, and
    /// [`pause::Sandbox::share_processes`] makes one for the first container that joins. A sandbox that a process holds
    /// has its own process namespace, as a pause container has.
    pub fn sandbox(&self, holder: pause::HolderChoice) -> pause::SandboxConfig {
        let namespace = |kind| match self.namespace(kind) {
            None => pause::Namespace::Node,
            Some(namespace) => namespace.path().map_or(pause::Namespace::New, |path| {
                pause::Namespace::Join(path.to_owned())
            }),
        };
        let maps = |mappings: &[IdMapping]| {
            mappings
                .iter()
                .map(|m| pause::IdMap {
                    container: m.container,
                    host: m.host,
                    size: m.size,
                })
                .collect()
        };
        let user = match namespace("user") {
            pause::Namespace::Node => pause::UserNamespace::Node,
            pause::Namespace::Join(path) => pause::UserNamespace::Join(path),
            pause::Namespace::New => pause::UserNamespace::New {
                uid_map: maps(&self.linux.uid_mappings),
                gid_map: maps(&self.linux.gid_mappings),
            },
        };
        let process = holder == pause::HolderChoice::Process || user != pause::UserNamespace::Node;
        pause::SandboxConfig {
            namespaces: pause::Namespaces {
                net: namespace("network"),
                ipc: namespace("ipc"),
                uts: namespace("uts"),
                pid: if process {
                    namespace("pid")
                } else {
                    pause::Namespace::Node
                },
                user,
            },
            hostname: self.hostname.clone().filter(|name| !name.is_empty()),
            domainname: self.domainname.clone().filter(|name| !name.is_empty()),
            sysctls: self.linux.sysctl.clone(),
            holder,
        }
    }
}

/// A file or directory of the pod that the containers see.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// Where containers see the file.
    pub destination: &'static str,
    /// Where the file is on the node.
    pub source: PathBuf,
}

/// What the shim changes in a container's spec before runc reads the spec.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// The path of the process namespace to join.
    pub pid_namespace: Option<PathBuf>,
    /// The pod's files.
    pub binds: Vec<Bind>,
}

impl Spec {
    /// Writes `config.json` of `bundle` anew, with `changes`. Everything else stays as containerd wrote it. Without
    /// changes, the file stays untouched.
    ///
    /// # Errors
    /// `InvalidArgument` when the spec is no object, and `Io` when the file cannot be written.
    pub fn write(&self, bundle: &Path, changes: &Changes) -> Result<()> {
        if *changes == Changes::default() {
            return Ok(());
        }
        let file = config_file(bundle);
        let spec = self.changed(&file, changes)?;
        replace_file(&file, spec.to_string().as_bytes())
    }

    pub(crate) fn changed(&self, file: &Path, changes: &Changes) -> Result<Value> {
        let mut spec: Value =
            serde_json::from_slice(&self.text).map_err(|e| unreadable(file, &e))?;
        if !spec.is_object() {
            return Err(Error::InvalidArgument(format!(
                "parse {}: it is not an object",
                file.display()
            )));
        }
        if let Some(path) = &changes.pid_namespace {
            set_pid_namespace(&mut spec, path);
        }
        if !changes.binds.is_empty() {
            add_binds(&mut spec, &changes.binds);
        }
        Ok(spec)
    }
}

fn set_pid_namespace(spec: &mut Value, path: &Path) {
    let namespaces = spec
        .pointer_mut("/linux/namespaces")
        .and_then(Value::as_array_mut);
    for namespace in namespaces.into_iter().flatten() {
        if namespace.get("type").and_then(Value::as_str) == Some("pid") {
            namespace["path"] = Value::from(path.to_string_lossy());
        }
    }
}

/// Binds the pod's files into a container, as containerd's CRI does in podsandbox mode. A mount of the container's own
/// at the same path stays. With a read-only root filesystem the files are read-only, too. In a user namespace the
/// mounts map the files' owners. `/dev/shm` is always writable and never mapped.
fn add_binds(spec: &mut Value, binds: &[Bind]) {
    let readonly = spec.pointer("/root/readonly") == Some(&Value::Bool(true));
    let mappings =
        ["uidMappings", "gidMappings"].map(|name| (name, spec["linux"].get(name).cloned()));
    if !spec["mounts"].is_array() {
        spec["mounts"] = Value::Array(Vec::new());
    }
    let Some(mounts) = spec["mounts"].as_array_mut() else {
        return;
    };
    for bind in binds {
        let shm = bind.destination == "/dev/shm";
        let destination = Path::new(bind.destination);
        // Removes the container's own shared memory, which every container has by default.
        mounts.retain(|mount| {
            !(shm && is_at(mount, destination) && mount.get("type") == Some(&"tmpfs".into()))
        });
        if mounts.iter().any(|mount| is_at(mount, destination)) {
            continue;
        }
        let access = if readonly && !shm { "ro" } else { "rw" };
        let mut mount = serde_json::json!({
            "destination": bind.destination,
            "type": "bind",
            "source": bind.source,
            "options": ["rbind", "rprivate", access],
        });
        for (name, mapping) in &mappings {
            if let (Some(mapping), false) = (mapping, shm) {
                mount[*name] = mapping.clone();
            }
        }
        // A mount comes before the mounts below its destination.
        let below = |mount: &Value| mount_point(mount).starts_with(destination);
        let at = mounts.iter().position(below).unwrap_or(mounts.len());
        mounts.insert(at, mount);
    }
}

fn mount_point(mount: &Value) -> &Path {
    let destination = mount.get("destination").and_then(Value::as_str);
    Path::new(destination.unwrap_or_default())
}

fn is_at(mount: &Value, destination: &Path) -> bool {
    // Paths compare by components: a slash at the end makes no difference.
    mount_point(mount) == destination
}

fn config_file(bundle: &Path) -> PathBuf {
    bundle.join("config.json")
}

fn unreadable(path: &Path, error: &serde_json::Error) -> Error {
    Error::InvalidArgument(format!("parse {}: {error}", path.display()))
}

#[cfg(test)]
mod tests;
