//! The OCI spec of a sandbox that no OCI runtime runs: containerd keeps the spec, NRI reads it, `inspectp` shows it.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::{Value, json};

use super::{IdMapping, PodConfig};
use crate::runtime::spec::{Bind, CONTAINER_TYPE, SANDBOX_ID};

impl PodConfig {
    /// The spec that containerd's CRI would write for a pause container. `paths` lead to the sandbox's namespaces, `files`
    /// are the pod's files. A namespace that is not in the spec is the node's.
    pub fn spec(
        &self,
        id: &str,
        more_annotations: &BTreeMap<String, String>,
        paths: &BTreeMap<pause::NamespaceKind, PathBuf>,
        files: &[Bind],
    ) -> Value {
        let mounts = files.iter().map(|file| {
            json!({
                "destination": file.destination,
                "type": "bind",
                "source": file.source,
                "options": ["rbind", "ro", "nosuid", "nodev", "noexec"],
            })
        });
        let mut spec = json!({
            "ociVersion": "1.1.0",
            "process": {
                "user": { "uid": 65535, "gid": 65535 },
                "args": ["/pause"],
                "cwd": "/",
                "noNewPrivileges": true,
            },
            "root": { "path": "rootfs", "readonly": true },
            "mounts": mounts.collect::<Vec<_>>(),
            "annotations": self.all_annotations(id, more_annotations),
            "linux": self.spec_linux(id, paths),
        });
        if let Some(hostname) = self.hostname() {
            spec["hostname"] = hostname.into();
        }
        spec
    }

    fn spec_linux(&self, id: &str, paths: &BTreeMap<pause::NamespaceKind, PathBuf>) -> Value {
        let options = self.namespaces();
        let mut linux = json!({
            "namespaces": self.spec_namespaces(paths),
            "sysctl": self.sysctls(&options),
        });
        if let Some(path) = self.cgroups_path(id) {
            linux["cgroupsPath"] = path.into();
        }
        if let Some(user) = &options.userns_options
            && paths.contains_key(&pause::NamespaceKind::User)
        {
            linux["uidMappings"] = mappings(&user.uids);
            linux["gidMappings"] = mappings(&user.gids);
        }
        linux
    }

    fn spec_namespaces(&self, paths: &BTreeMap<pause::NamespaceKind, PathBuf>) -> Vec<Value> {
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
        namespaces
    }

    /// `more`, and the annotations that containerd's CRI sets on a sandbox.
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
        let linux = self.linux.as_ref();
        if let Some(resources) = linux.and_then(|linux| linux.resources.as_ref()) {
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

fn mappings(mappings: &[IdMapping]) -> Value {
    let mappings = mappings.iter().map(|mapping| {
        json!({
            "containerID": mapping.container_id,
            "hostID": mapping.host_id,
            "size": mapping.length,
        })
    });
    mappings.collect()
}
