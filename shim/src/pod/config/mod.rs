//! The config of a pod, as the kubelet describes the pod to the CRI, and what follows from the config.
//!
//! ```text
//!  CreateSandbox ──▶ PodConfig ──┬▶ sandbox   what the crate `pause` makes
//!                                ├▶ spec      the OCI spec that containerd keeps, NRI reads and `inspectp` shows
//!                                ├▶ JSON      the config in a verbose status
//!                                └▶ the pod's files and cgroup
//! ```
//!
//! The types are the messages of cri-api's `api.proto`, with the fields that the shim reads. The JSON has the names of
//! kubelet's and crictl's JSON; default values are left out, enums are numbers.

mod sandbox;
mod spec;

use std::collections::BTreeMap;
use std::path::Path;

use serde::Serialize;

/// `PodSandboxConfig`: what the kubelet asks for.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PodConfig {
    /// The pod's names.
    #[serde(skip_serializing_if = "is_default")]
    pub metadata: Option<Metadata>,
    /// The pod's hostname; empty for the node's.
    #[serde(skip_serializing_if = "is_default")]
    pub hostname: String,
    /// The folder of the containers' logs on the node.
    #[serde(skip_serializing_if = "is_default")]
    pub log_directory: String,
    /// The content of `/etc/resolv.conf`; none for the node's.
    #[serde(skip_serializing_if = "is_default")]
    pub dns_config: Option<Dns>,
    /// The ports of the node that lead to the pod. CNI's matter, not the shim's.
    #[serde(skip_serializing_if = "is_default")]
    pub port_mappings: Vec<PortMapping>,
    /// The pod's labels.
    #[serde(skip_serializing_if = "is_default")]
    pub labels: BTreeMap<String, String>,
    /// The pod's annotations.
    #[serde(skip_serializing_if = "is_default")]
    pub annotations: BTreeMap<String, String>,
    /// What only Linux has.
    #[serde(skip_serializing_if = "is_default")]
    pub linux: Option<Linux>,
}

/// `PodSandboxMetadata`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Metadata {
    /// The pod's name.
    #[serde(skip_serializing_if = "is_default")]
    pub name: String,
    /// The pod's uid in Kubernetes.
    #[serde(skip_serializing_if = "is_default")]
    pub uid: String,
    /// The pod's namespace in Kubernetes.
    #[serde(skip_serializing_if = "is_default")]
    pub namespace: String,
    /// How often the kubelet has made this pod anew.
    #[serde(skip_serializing_if = "is_default")]
    pub attempt: u32,
}

/// `DNSConfig`, the lines of `/etc/resolv.conf` (resolv.conf(5)).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Dns {
    /// `nameserver`
    #[serde(skip_serializing_if = "is_default")]
    pub servers: Vec<String>,
    /// `search`
    #[serde(skip_serializing_if = "is_default")]
    pub searches: Vec<String>,
    /// `options`
    #[serde(skip_serializing_if = "is_default")]
    pub options: Vec<String>,
}

/// `PortMapping`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct PortMapping {
    /// `Protocol`: 0 is TCP, 1 UDP, 2 SCTP.
    #[serde(skip_serializing_if = "is_default")]
    pub protocol: i32,
    /// The port in the pod.
    #[serde(skip_serializing_if = "is_default")]
    pub container_port: i32,
    /// The port on the node.
    #[serde(skip_serializing_if = "is_default")]
    pub host_port: i32,
    /// The node's address.
    #[serde(skip_serializing_if = "is_default")]
    pub host_ip: String,
}

/// `LinuxPodSandboxConfig`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Linux {
    /// The pod's cgroup: a path, or the name of a systemd slice.
    #[serde(skip_serializing_if = "is_default")]
    pub cgroup_parent: String,
    /// Namespaces and privileges.
    #[serde(skip_serializing_if = "is_default")]
    pub security_context: Option<Security>,
    /// The sysctls of the pod's namespaces.
    #[serde(skip_serializing_if = "is_default")]
    pub sysctls: BTreeMap<String, String>,
    /// What the pod costs besides its containers.
    #[serde(skip_serializing_if = "is_default")]
    pub overhead: Option<Resources>,
    /// The sum of the containers' resources.
    #[serde(skip_serializing_if = "is_default")]
    pub resources: Option<Resources>,
}

/// `LinuxSandboxSecurityContext`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Security {
    /// The namespaces to make or to share.
    #[serde(skip_serializing_if = "is_default")]
    pub namespace_options: Option<NamespaceOptions>,
    /// The pod may have privileged containers.
    #[serde(skip_serializing_if = "is_default")]
    pub privileged: bool,
}

/// `NamespaceOption`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct NamespaceOptions {
    /// The network namespace, and with it the UTS namespace.
    #[serde(skip_serializing_if = "is_default")]
    pub network: Mode,
    /// The process namespace.
    #[serde(skip_serializing_if = "is_default")]
    pub pid: Mode,
    /// The IPC namespace.
    #[serde(skip_serializing_if = "is_default")]
    pub ipc: Mode,
    /// The user namespace; none for the node's.
    #[serde(skip_serializing_if = "is_default")]
    pub userns_options: Option<UserNamespace>,
}

/// `UserNamespace`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct UserNamespace {
    /// `Pod` or `Node`.
    #[serde(skip_serializing_if = "is_default")]
    pub mode: Mode,
    /// The user ids.
    #[serde(skip_serializing_if = "is_default")]
    pub uids: Vec<IdMapping>,
    /// The group ids.
    #[serde(skip_serializing_if = "is_default")]
    pub gids: Vec<IdMapping>,
}

/// `IDMapping`: a range of ids.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct IdMapping {
    /// The first id on the node.
    #[serde(skip_serializing_if = "is_default")]
    pub host_id: u32,
    /// The first id in the user namespace.
    #[serde(skip_serializing_if = "is_default")]
    pub container_id: u32,
    /// The number of ids.
    #[serde(skip_serializing_if = "is_default")]
    pub length: u32,
}

/// `LinuxContainerResources`, as far as the annotations of a sandbox show them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Resources {
    /// The CFS period in microseconds.
    #[serde(skip_serializing_if = "is_default")]
    pub cpu_period: i64,
    /// The CFS quota in microseconds.
    #[serde(skip_serializing_if = "is_default")]
    pub cpu_quota: i64,
    /// The CPU weight, as cgroup v1 counts.
    #[serde(skip_serializing_if = "is_default")]
    pub cpu_shares: i64,
    /// The limit of memory in bytes.
    #[serde(skip_serializing_if = "is_default")]
    pub memory_limit_in_bytes: i64,
}
/// `NamespaceMode`: whose namespace the pod uses. On the wire and in JSON a number.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(into = "i32")]
pub enum Mode {
    /// The pod's.
    #[default]
    Pod,
    /// A container's own.
    Container,
    /// The node's.
    Node,
    /// Another container's.
    Target,
    /// A number without a name, for which the default applies: the pod's.
    Other(i32),
}

impl From<i32> for Mode {
    fn from(number: i32) -> Self {
        match number {
            0 => Self::Pod,
            1 => Self::Container,
            2 => Self::Node,
            3 => Self::Target,
            other => Self::Other(other),
        }
    }
}

impl From<Mode> for i32 {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Pod => 0,
            Mode::Container => 1,
            Mode::Node => 2,
            Mode::Target => 3,
            Mode::Other(other) => other,
        }
    }
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

impl PodConfig {
    /// Whether the pod uses the node's IPC namespace, and with the namespace the node's `/dev/shm`.
    pub fn node_ipc(&self) -> bool {
        self.namespaces().ipc == Mode::Node
    }

    /// Whether the pod's containers see the node's processes.
    pub fn node_processes(&self) -> bool {
        self.namespaces().pid == Mode::Node
    }

    /// The line of `/etc/hostname`; none for the node's name.
    pub fn hostname(&self) -> Option<&str> {
        Some(self.hostname.as_str()).filter(|name| !name.is_empty())
    }

    /// The text of `/etc/resolv.conf`; none for the node's.
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

    /// `linux.cgroupsPath` of the sandbox in an OCI spec: a cgroup in the pod's cgroup, in the form of the pod's cgroup
    /// driver.
    pub fn cgroups_path(&self, id: &str) -> Option<String> {
        let parent = self.cgroup_parent();
        let last = Path::new(parent).file_name()?.to_str()?;
        Some(if self.has_slice() {
            format!("{last}:cri-containerd:{id}")
        } else {
            format!("{}/{id}", parent.trim_end_matches('/'))
        })
    }

    /// Whether systemd makes the pod's cgroups.
    pub fn has_slice(&self) -> bool {
        self.cgroup_parent().ends_with(".slice")
    }

    fn cgroup_parent(&self) -> &str {
        let linux = self.linux.as_ref();
        linux.map_or("", |linux| &linux.cgroup_parent)
    }

    fn namespaces(&self) -> NamespaceOptions {
        let security = self
            .linux
            .as_ref()
            .and_then(|linux| linux.security_context.as_ref());
        security
            .and_then(|security| security.namespace_options.clone())
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests;
