//! `runtime.v1.PodSandboxConfig` of the Kubernetes CRI, as far as a sandbox needs it, and what follows from it.
//!
//! ```text
//!  CreateSandbox ──Any──▶ PodConfig ──┬▶ sandbox   what the crate `pause` makes
//!                                     ├▶ spec      the OCI spec that containerd keeps, NRI reads and `inspectp` shows
//!                                     └▶ JSON      the config in a verbose status
//! ```
//!
//! The field numbers are those of cri-api's `api.proto`; fields that are not here are ignored. The JSON has the names
//! that kubelet's and crictl's JSON has.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use prost::Message as _;
use serde::Serialize;
use serde_json::{Value, json};

use crate::error::{Error, Result};
use crate::runtime::spec::{Bind, CONTAINER_TYPE, SANDBOX_ID};

/// The full name of the message, which is its type URL.
const TYPE: &str = "runtime.v1.PodSandboxConfig";

/// `PodSandboxConfig`
#[derive(Clone, PartialEq, prost::Message, Serialize)]
pub struct PodConfig {
    #[prost(message, optional, tag = "1")]
    #[serde(skip_serializing_if = "Option::is_none")]
    metadata: Option<Metadata>,
    #[prost(string, tag = "2")]
    #[serde(skip_serializing_if = "is_default")]
    hostname: String,
    #[prost(string, tag = "3")]
    #[serde(skip_serializing_if = "is_default")]
    log_directory: String,
    #[prost(message, optional, tag = "4")]
    #[serde(skip_serializing_if = "Option::is_none")]
    dns_config: Option<Dns>,
    #[prost(message, repeated, tag = "5")]
    #[serde(skip_serializing_if = "is_default")]
    port_mappings: Vec<PortMapping>,
    #[prost(btree_map = "string, string", tag = "6")]
    #[serde(skip_serializing_if = "is_default")]
    labels: BTreeMap<String, String>,
    #[prost(btree_map = "string, string", tag = "7")]
    #[serde(skip_serializing_if = "is_default")]
    annotations: BTreeMap<String, String>,
    #[prost(message, optional, tag = "8")]
    #[serde(skip_serializing_if = "Option::is_none")]
    linux: Option<Linux>,
}

/// `PodSandboxMetadata`
#[derive(Clone, PartialEq, prost::Message, Serialize)]
struct Metadata {
    #[prost(string, tag = "1")]
    #[serde(skip_serializing_if = "is_default")]
    name: String,
    #[prost(string, tag = "2")]
    #[serde(skip_serializing_if = "is_default")]
    uid: String,
    #[prost(string, tag = "3")]
    #[serde(skip_serializing_if = "is_default")]
    namespace: String,
    #[prost(uint32, tag = "4")]
    #[serde(skip_serializing_if = "is_default")]
    attempt: u32,
}

/// `DNSConfig`
#[derive(Clone, PartialEq, prost::Message, Serialize)]
struct Dns {
    #[prost(string, repeated, tag = "1")]
    #[serde(skip_serializing_if = "is_default")]
    servers: Vec<String>,
    #[prost(string, repeated, tag = "2")]
    #[serde(skip_serializing_if = "is_default")]
    searches: Vec<String>,
    #[prost(string, repeated, tag = "3")]
    #[serde(skip_serializing_if = "is_default")]
    options: Vec<String>,
}

/// `PortMapping`
#[derive(Clone, PartialEq, prost::Message, Serialize)]
struct PortMapping {
    #[prost(int32, tag = "1")]
    #[serde(skip_serializing_if = "is_default")]
    protocol: i32,
    #[prost(int32, tag = "2")]
    #[serde(skip_serializing_if = "is_default")]
    container_port: i32,
    #[prost(int32, tag = "3")]
    #[serde(skip_serializing_if = "is_default")]
    host_port: i32,
    #[prost(string, tag = "4")]
    #[serde(skip_serializing_if = "is_default")]
    host_ip: String,
}

/// `LinuxPodSandboxConfig`
#[derive(Clone, PartialEq, prost::Message, Serialize)]
struct Linux {
    #[prost(string, tag = "1")]
    #[serde(skip_serializing_if = "is_default")]
    cgroup_parent: String,
    #[prost(message, optional, tag = "2")]
    #[serde(skip_serializing_if = "Option::is_none")]
    security_context: Option<Security>,
    #[prost(btree_map = "string, string", tag = "3")]
    #[serde(skip_serializing_if = "is_default")]
    sysctls: BTreeMap<String, String>,
    #[prost(message, optional, tag = "4")]
    #[serde(skip_serializing_if = "Option::is_none")]
    overhead: Option<Resources>,
    #[prost(message, optional, tag = "5")]
    #[serde(skip_serializing_if = "Option::is_none")]
    resources: Option<Resources>,
}

/// `LinuxSandboxSecurityContext`
#[derive(Clone, PartialEq, prost::Message, Serialize)]
struct Security {
    #[prost(message, optional, tag = "1")]
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace_options: Option<NamespaceOptions>,
    #[prost(bool, tag = "6")]
    #[serde(skip_serializing_if = "is_default")]
    privileged: bool,
}

/// `NamespaceOption`
#[derive(Clone, PartialEq, prost::Message, Serialize)]
struct NamespaceOptions {
    #[prost(enumeration = "Mode", tag = "1")]
    #[serde(skip_serializing_if = "is_default")]
    network: i32,
    #[prost(enumeration = "Mode", tag = "2")]
    #[serde(skip_serializing_if = "is_default")]
    pid: i32,
    #[prost(enumeration = "Mode", tag = "3")]
    #[serde(skip_serializing_if = "is_default")]
    ipc: i32,
    #[prost(message, optional, tag = "5")]
    #[serde(skip_serializing_if = "Option::is_none")]
    userns_options: Option<UserNamespace>,
}

/// `NamespaceMode`
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
enum Mode {
    Pod = 0,
    Container = 1,
    Node = 2,
    Target = 3,
}

/// `UserNamespace`
#[derive(Clone, PartialEq, prost::Message, Serialize)]
struct UserNamespace {
    #[prost(enumeration = "Mode", tag = "1")]
    #[serde(skip_serializing_if = "is_default")]
    mode: i32,
    #[prost(message, repeated, tag = "2")]
    #[serde(skip_serializing_if = "is_default")]
    uids: Vec<IdMapping>,
    #[prost(message, repeated, tag = "3")]
    #[serde(skip_serializing_if = "is_default")]
    gids: Vec<IdMapping>,
}

/// `IDMapping`
#[derive(Clone, PartialEq, prost::Message, Serialize)]
struct IdMapping {
    #[prost(uint32, tag = "1")]
    #[serde(skip_serializing_if = "is_default")]
    host_id: u32,
    #[prost(uint32, tag = "2")]
    #[serde(skip_serializing_if = "is_default")]
    container_id: u32,
    #[prost(uint32, tag = "3")]
    #[serde(skip_serializing_if = "is_default")]
    length: u32,
}

/// `LinuxContainerResources`, as far as annotations tell of it.
#[derive(Clone, PartialEq, prost::Message, Serialize)]
struct Resources {
    #[prost(int64, tag = "1")]
    #[serde(skip_serializing_if = "is_default")]
    cpu_period: i64,
    #[prost(int64, tag = "2")]
    #[serde(skip_serializing_if = "is_default")]
    cpu_quota: i64,
    #[prost(int64, tag = "3")]
    #[serde(skip_serializing_if = "is_default")]
    cpu_shares: i64,
    #[prost(int64, tag = "4")]
    #[serde(skip_serializing_if = "is_default")]
    memory_limit_in_bytes: i64,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl PodConfig {
    /// Reads the options of `CreateSandbox`.
    ///
    /// # Errors
    /// `InvalidArgument` when they are not there, of another type, or do not decode.
    pub fn from_any(any: Option<&Any>) -> Result<Self> {
        let any = any.ok_or_else(|| {
            Error::InvalidArgument(format!(
                "create a sandbox: without options, expected {TYPE}"
            ))
        })?;
        // A type URL may have a prefix up to its last slash.
        if any.type_url.rsplit('/').next() != Some(TYPE) {
            return Err(Error::InvalidArgument(format!(
                "create a sandbox: options of type {:?}, expected {TYPE}",
                any.type_url
            )));
        }
        Self::decode(any.value.as_slice())
            .map_err(|e| Error::InvalidArgument(format!("create a sandbox: decode {TYPE}: {e}")))
    }

    fn linux(&self) -> Linux {
        self.linux.clone().unwrap_or_default()
    }

    fn namespaces(&self) -> NamespaceOptions {
        let security = self.linux().security_context.unwrap_or_default();
        security.namespace_options.unwrap_or_default()
    }

    /// Whether the pod uses the node's /dev/shm, with its IPC namespace.
    pub fn node_ipc(&self) -> bool {
        self.namespaces().ipc() == Mode::Node
    }

    /// Whether the pod's containers see the node's processes.
    pub fn node_processes(&self) -> bool {
        self.namespaces().pid() == Mode::Node
    }

    /// The line of `/etc/hostname`; none where the pod has the node's name.
    pub fn hostname(&self) -> Option<&str> {
        Some(self.hostname.as_str()).filter(|name| !name.is_empty())
    }

    /// The text of `/etc/resolv.conf`; none where the pod has the node's.
    pub fn resolv_conf(&self) -> Option<String> {
        let dns = self.dns_config.as_ref()?;
        let mut text = String::new();
        let mut line = |keyword: &str, words: &[String]| {
            if !words.is_empty() {
                text.push_str(&format!("{keyword} {}\n", words.join(" ")));
            }
        };
        line("search", &dns.searches);
        for server in &dns.servers {
            line("nameserver", std::slice::from_ref(server));
        }
        line("options", &dns.options);
        Some(text)
    }

    /// `linux.cgroupsPath` of the sandbox: in the pod's cgroup, in the form that the cgroup driver of the pod has.
    pub fn cgroups_path(&self, id: &str) -> Option<String> {
        let parent = self.linux().cgroup_parent;
        let last = Path::new(&parent).file_name()?.to_str()?;
        Some(if self.has_slice() {
            format!("{last}:cri-containerd:{id}")
        } else {
            format!("{}/{id}", parent.trim_end_matches('/'))
        })
    }

    /// Whether systemd makes the pod's cgroups.
    pub fn has_slice(&self) -> bool {
        self.linux().cgroup_parent.ends_with(".slice")
    }

    /// The sandbox to make. The pod's network is in `network`, or the node's if that is empty.
    ///
    /// # Errors
    /// `InvalidArgument` for a user namespace of a mode that there is not.
    pub fn sandbox(
        &self,
        network: &Path,
        holder: pause::HolderChoice,
    ) -> Result<pause::SandboxConfig> {
        let options = self.namespaces();
        let new_unless_nodes = |mode| match mode {
            Mode::Node => pause::Namespace::Node,
            Mode::Pod | Mode::Container | Mode::Target => pause::Namespace::New,
        };
        let own_network = options.network() != Mode::Node;
        let net = match (own_network, network.as_os_str().is_empty()) {
            (false, _) => pause::Namespace::Node,
            (true, true) => pause::Namespace::New,
            (true, false) => pause::Namespace::Join(network.to_owned()),
        };
        let user = self.user(&options, &net)?;
        // Only what the pod shares: a container's own is runc's. A process holder has one, as a pause container has.
        let shared = options.pid() == Mode::Pod || user != pause::UserNamespace::Node;
        let process = holder == pause::HolderChoice::Process;
        Ok(pause::SandboxConfig {
            namespaces: pause::Namespaces {
                net,
                ipc: new_unless_nodes(options.ipc()),
                uts: if own_network {
                    pause::Namespace::New
                } else {
                    pause::Namespace::Node
                },
                pid: if shared || process {
                    new_unless_nodes(options.pid())
                } else {
                    pause::Namespace::Node
                },
                user,
            },
            hostname: self.hostname().filter(|_| own_network).map(str::to_owned),
            domainname: None,
            sysctls: self.sysctls(&options),
            holder,
        })
    }

    fn user(
        &self,
        options: &NamespaceOptions,
        net: &pause::Namespace,
    ) -> Result<pause::UserNamespace> {
        let Some(user) = &options.userns_options else {
            return Ok(pause::UserNamespace::Node);
        };
        let map = |mappings: &[IdMapping]| {
            let map = mappings.iter().map(|mapping| pause::IdMap {
                container: mapping.container_id,
                host: mapping.host_id,
                size: mapping.length,
            });
            map.collect()
        };
        match (user.mode(), net) {
            (Mode::Node, _) => Ok(pause::UserNamespace::Node),
            // containerd has made both, and the network belongs to the pod's user namespace.
            (Mode::Pod, pause::Namespace::Join(network)) => {
                Ok(pause::UserNamespace::OwnerOf(network.clone()))
            }
            (Mode::Pod, pause::Namespace::New | pause::Namespace::Node) => {
                Ok(pause::UserNamespace::New {
                    uid_map: map(&user.uids),
                    gid_map: map(&user.gids),
                })
            }
            (mode @ (Mode::Container | Mode::Target), _) => Err(Error::InvalidArgument(format!(
                "create a sandbox: user namespace of mode {mode:?}"
            ))),
        }
    }

    /// The pod's, and those that containerd's own settings add in podsandbox mode by default (`enable_unprivileged_ports`,
    /// `enable_unprivileged_icmp`). Who does not want them says so in the pod.
    fn sysctls(&self, options: &NamespaceOptions) -> BTreeMap<String, String> {
        let mut sysctls = self.linux().sysctls;
        if options.network() != Mode::Node {
            let mut add = |key: &str, value: &str| {
                sysctls
                    .entry(key.to_owned())
                    .or_insert_with(|| value.to_owned());
            };
            add("net.ipv4.ip_unprivileged_port_start", "0");
            // Group ids of the node would be out of a user namespace's range.
            if options.userns_options.is_none() {
                add("net.ipv4.ping_group_range", "0 2147483647");
            }
        }
        sysctls
    }

    /// The OCI spec of the sandbox: what containerd's CRI would have written for a pause container, with the paths that
    /// lead to the namespaces, and the pod's files as mounts. A namespace that is not in it is the node's.
    pub fn spec(
        &self,
        id: &str,
        more_annotations: &BTreeMap<String, String>,
        paths: &BTreeMap<pause::NamespaceKind, PathBuf>,
        files: &[Bind],
    ) -> Value {
        let options = self.namespaces();
        let mut namespaces = vec![json!({ "type": "mount" })];
        for kind in pause::NamespaceKind::ALL {
            let name = match kind {
                pause::NamespaceKind::Net => "network",
                pause::NamespaceKind::Ipc
                | pause::NamespaceKind::Uts
                | pause::NamespaceKind::Pid
                | pause::NamespaceKind::User => kind.file(),
            };
            match paths.get(&kind) {
                Some(path) => namespaces.push(json!({ "type": name, "path": path })),
                None if kind == pause::NamespaceKind::Pid && !self.node_processes() => {
                    namespaces.push(json!({ "type": name }));
                }
                None => {}
            }
        }
        let mounts = files.iter().map(|file| {
            json!({
                "destination": file.destination,
                "type": "bind",
                "source": file.source,
                "options": ["rbind", "ro", "nosuid", "nodev", "noexec"],
            })
        });
        let mut linux = json!({ "namespaces": namespaces, "sysctl": self.sysctls(&options) });
        if let Some(path) = self.cgroups_path(id) {
            linux["cgroupsPath"] = path.into();
        }
        if let Some(user) = &options.userns_options
            && paths.contains_key(&pause::NamespaceKind::User)
        {
            for (name, mappings) in [("uidMappings", &user.uids), ("gidMappings", &user.gids)] {
                let mappings = mappings.iter().map(|mapping| {
                    json!({
                        "containerID": mapping.container_id,
                        "hostID": mapping.host_id,
                        "size": mapping.length,
                    })
                });
                linux[name] = mappings.collect();
            }
        }
        json!({
            "ociVersion": "1.1.0",
            "process": {
                "user": { "uid": 65535, "gid": 65535 },
                "args": ["/pause"],
                "cwd": "/",
                "noNewPrivileges": true,
            },
            "root": { "path": "rootfs", "readonly": true },
            "hostname": self.hostname,
            "mounts": mounts.collect::<Vec<_>>(),
            "annotations": self.all_annotations(id, more_annotations),
            "linux": linux,
        })
    }

    fn all_annotations(
        &self,
        id: &str,
        more: &BTreeMap<String, String>,
    ) -> BTreeMap<String, String> {
        let mut all = more.clone();
        let mut add = |key: &str, value: String| all.insert(key.to_owned(), value);
        let metadata = self.metadata.clone().unwrap_or_default();
        add(CONTAINER_TYPE, "sandbox".to_owned());
        add(SANDBOX_ID, id.to_owned());
        add("io.kubernetes.cri.sandbox-name", metadata.name);
        add("io.kubernetes.cri.sandbox-namespace", metadata.namespace);
        add("io.kubernetes.cri.sandbox-uid", metadata.uid);
        add(
            "io.kubernetes.cri.sandbox-log-directory",
            self.log_directory.clone(),
        );
        if let Some(resources) = self.linux().resources {
            for (key, value) in [
                ("io.kubernetes.cri.sandbox-cpu-period", resources.cpu_period),
                ("io.kubernetes.cri.sandbox-cpu-quota", resources.cpu_quota),
                ("io.kubernetes.cri.sandbox-cpu-shares", resources.cpu_shares),
                (
                    "io.kubernetes.cri.sandbox-memory",
                    resources.memory_limit_in_bytes,
                ),
            ] {
                add(key, value.to_string());
            }
        }
        all
    }
}
