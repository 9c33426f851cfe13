//! The sandbox that the crate `pause` makes for a pod's config.

use std::collections::BTreeMap;
use std::path::Path;

use super::{IdMapping, Mode, NamespaceOptions, PodConfig};
use crate::error::{Error, Result};

impl PodConfig {
    /// The sandbox to make. `network` is the path of the pod's network namespace; where the path is empty, the sandbox
    /// gets a new one. A pod in the node's network ignores the path.
    ///
    /// # Errors
    /// `InvalidArgument` for a user namespace of a mode that CRI does not define there.
    pub fn sandbox(
        &self,
        network: &Path,
        holder: pause::HolderChoice,
    ) -> Result<pause::SandboxConfig> {
        let options = self.namespaces();
        let own_network = options.network != Mode::Node;
        let net = match (own_network, network.as_os_str().is_empty()) {
            (false, _) => pause::Namespace::Node,
            (true, true) => pause::Namespace::New,
            (true, false) => pause::Namespace::Join(network.to_owned()),
        };
        let user = user(&options, &net)?;
        // The sandbox makes a process namespace only for containers to share: runc makes a container's own. A holder
        // process has a process namespace anyway, as a pause container has.
        let shared =
            matches!(options.pid, Mode::Pod | Mode::Other(_)) || user != pause::UserNamespace::Node;
        let process = holder == pause::HolderChoice::Process;
        Ok(pause::SandboxConfig {
            namespaces: pause::Namespaces {
                net,
                ipc: new_unless_nodes(options.ipc),
                uts: if own_network {
                    pause::Namespace::New
                } else {
                    pause::Namespace::Node
                },
                pid: if shared || process {
                    new_unless_nodes(options.pid)
                } else {
                    pause::Namespace::Node
                },
                user,
            },
            hostname: self.hostname().map(str::to_owned),
            domainname: None,
            sysctls: self.sysctls(&options),
            holder,
        })
    }

    /// The pod's sysctls, and those that containerd adds in podsandbox mode by its defaults (`enable_unprivileged_ports`,
    /// `enable_unprivileged_icmp`). A pod that sets one of these itself keeps its own value.
    pub(super) fn sysctls(&self, options: &NamespaceOptions) -> BTreeMap<String, String> {
        let linux = self.linux.as_ref();
        let mut sysctls = linux.map_or_else(BTreeMap::new, |linux| linux.sysctls.clone());
        if options.network != Mode::Node {
            let mut add = |key: &str, value: &str| {
                sysctls
                    .entry(key.to_owned())
                    .or_insert_with(|| value.to_owned());
            };
            add("net.ipv4.ip_unprivileged_port_start", "0");
            // The range counts the node's group ids, which are out of a user namespace's range. The kubelet always sends
            // options, for a pod in the node's user namespace with the mode Node.
            let user = options.userns_options.as_ref();
            if user.is_none_or(|user| user.mode == Mode::Node) {
                add("net.ipv4.ping_group_range", "0 2147483647");
            }
        }
        sysctls
    }
}

fn new_unless_nodes(mode: Mode) -> pause::Namespace {
    match mode {
        Mode::Node => pause::Namespace::Node,
        Mode::Pod | Mode::Container | Mode::Target | Mode::Other(_) => pause::Namespace::New,
    }
}

fn user(options: &NamespaceOptions, net: &pause::Namespace) -> Result<pause::UserNamespace> {
    let Some(user) = &options.userns_options else {
        return Ok(pause::UserNamespace::Node);
    };
    match (user.mode, net) {
        (Mode::Node, _) => Ok(pause::UserNamespace::Node),
        // containerd has made both: the pod's user namespace owns the network namespace.
        (Mode::Pod | Mode::Other(_), pause::Namespace::Join(network)) => {
            Ok(pause::UserNamespace::OwnerOf(network.clone()))
        }
        (Mode::Pod | Mode::Other(_), pause::Namespace::New | pause::Namespace::Node) => {
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

fn map(mappings: &[IdMapping]) -> Vec<pause::IdMap> {
    let map = mappings.iter().map(|mapping| pause::IdMap {
        container: mapping.container_id,
        host: mapping.host_id,
        size: mapping.length,
    });
    map.collect()
}
