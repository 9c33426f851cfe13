//! Which sysctls a pod may set: exactly those that the kernel keeps per namespace, and only in a namespace that is the
//! pod's own. Any other sysctl would change the node.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::Uid;
use rustix::thread::set_thread_res_uid;

use crate::{Error, NamespaceKind, Namespaces};

/// The sysctls of `kernel.*` that belong to an IPC namespace.
const IPC: [&str; 8] = [
    "msgmax",
    "msgmnb",
    "msgmni",
    "sem",
    "shmall",
    "shmmax",
    "shmmni",
    "shm_rmid_forced",
];

/// Refuses a sysctl that is malformed, that is not kept per namespace, or whose namespace is the node's.
///
/// Only looks at the arguments. A joined namespace counts as the pod's own here;
/// [`Sandbox::create`](crate::Sandbox::create) also notices that a joined namespace is the node's.
///
/// # Errors
/// `BadSysctl`, which names the sysctl.
pub fn check_sysctls(
    sysctls: &BTreeMap<String, String>,
    namespaces: &Namespaces,
) -> Result<(), Error> {
    check(sysctls, &namespaces.new_or_joined_kinds().collect())
}

/// `own` are the kinds of which the pod has a namespace for itself.
pub(crate) fn check(
    sysctls: &BTreeMap<String, String>,
    own: &BTreeSet<NamespaceKind>,
) -> Result<(), Error> {
    for (key, value) in sysctls {
        let refuse = |reason| {
            Err(Error::BadSysctl {
                key: key.clone(),
                reason,
            })
        };
        let parts = match components(key) {
            Ok(parts) => parts,
            Err(reason) => return refuse(reason),
        };
        if value.contains(['\n', '\r', '\0']) {
            return refuse("its value must be one line");
        }
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let kind = match parts.as_slice() {
            ["kernel", "hostname"] => return refuse("the hostname has its own field"),
            ["kernel", "domainname"] => NamespaceKind::Uts,
            ["kernel", name] if IPC.contains(name) => NamespaceKind::Ipc,
            ["fs", "mqueue", _, ..] => NamespaceKind::Ipc,
            ["net", _, ..] => NamespaceKind::Net,
            _ => return refuse("not kept per namespace, it would change the node"),
        };
        if !own.contains(&kind) {
            return refuse(match kind {
                NamespaceKind::Net => "the network namespace is the node's",
                NamespaceKind::Ipc => "the IPC namespace is the node's",
                NamespaceKind::Uts | NamespaceKind::Pid | NamespaceKind::User => {
                    "the UTS namespace is the node's"
                }
            });
        }
    }
    Ok(())
}

/// The parts of a key. The first separator decides, as in sysctl(8). If it is a slash, dots are part of a name
/// (`net/ipv4/conf/eth0.100/forwarding`). If it is a dot, a slash stands for a dot
/// (`net.ipv4.conf.eth0/100.forwarding`).
fn components(key: &str) -> Result<Vec<String>, &'static str> {
    // An allow-list, because other runtimes had a second sysctl smuggled in by a '+', a space or a newline.
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '/' | '_' | '-');
    if !key.chars().all(known) {
        return Err("a character that no sysctl has");
    }
    let parts: Vec<String> = match key.find(['.', '/']) {
        Some(at) if key[at..].starts_with('/') => key.split('/').map(str::to_owned).collect(),
        _ => key.split('.').map(|part| part.replace('/', ".")).collect(),
    };
    if parts
        .iter()
        .any(|part| part.is_empty() || part.starts_with('.'))
    {
        return Err("a part that is empty or begins with a dot");
    }
    Ok(parts)
}

/// Writes one checked sysctl. The calling thread must stand in the pod's namespaces, because the kernel looks up a
/// namespaced sysctl by the namespaces of the thread that opens its file.
pub(crate) fn write(key: &str, value: &str) -> Result<(), Error> {
    let mut path = PathBuf::from("/proc/sys");
    path.extend(components(key).map_err(|reason| Error::BadSysctl {
        key: key.to_owned(),
        reason,
    })?);
    let written = match write_file(&path, value) {
        // The sysctls of an IPC namespace belong to the root of its user namespace. Nobody else may write them, not
        // even the node's root.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            write_file_as_owner(&path, value).unwrap_or(Err(error))
        }
        other => other,
    };
    written.map_err(|source| Error::WriteSysctl {
        key: key.to_owned(),
        value: value.to_owned(),
        source,
    })
}

fn write_file(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(value.as_bytes())
}

/// Changes the effective user of this thread, and changes it back. `None` if the owner's user cannot be taken.
fn write_file_as_owner(path: &Path, value: &str) -> Option<io::Result<()>> {
    let owner = fs::metadata(path).ok()?.uid();
    let effective = |uid| set_thread_res_uid(None, Uid::from_raw(uid), None);
    effective(owner).ok()?;
    let written = write_file(path, value);
    match effective(0) {
        Ok(()) => Some(written),
        Err(error) => Some(Err(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Namespace, UserNamespace};

    fn try_key(key: &str, value: &str, own: &[NamespaceKind]) -> Result<(), Error> {
        let sysctls = BTreeMap::from([(key.to_owned(), value.to_owned())]);
        check(&sysctls, &own.iter().copied().collect())
    }

    const ALL: [NamespaceKind; 3] = [NamespaceKind::Net, NamespaceKind::Ipc, NamespaceKind::Uts];

    #[test]
    fn what_the_kernel_keeps_per_namespace_is_allowed() {
        for key in [
            "net.core.somaxconn",
            "net/core/somaxconn",
            "net.ipv4.ip_local_port_range",
            "net/ipv4/conf/eth0.100/forwarding",
            "net.ipv4.conf.eth0/100.forwarding",
            "kernel.shm_rmid_forced",
            "kernel.sem",
            "kernel/msgmax",
            "fs.mqueue.msg_max",
            "kernel.domainname",
        ] {
            assert!(try_key(key, "1", &ALL).is_ok(), "{key}");
        }
    }

    #[test]
    fn a_key_outside_the_namespaced_trees_is_refused_by_name() {
        for key in [
            "kernel.core_pattern",
            "kernel.sem_next_id",
            "kernel.sem.x",
            "kernel",
            "kernel.hostname",
            "vm.swappiness",
            "fs.mqueue",
            "fs.file-max",
            "net",
            "netx.core",
            "Net.core.somaxconn",
            "user.max_user_namespaces",
        ] {
            let error = try_key(key, "1", &ALL).map_err(|e| e.to_string());
            assert!(
                matches!(&error, Err(text) if text.contains(&format!("{key:?}"))),
                "{error:?}"
            );
        }
    }

    #[test]
    fn a_key_that_climbs_or_smuggles_is_refused() {
        for key in [
            "",
            ".",
            "/",
            "net.",
            ".net.core",
            "net..core",
            "net/../kernel/core_pattern",
            "net/./x",
            "net//x",
            "net./x",
            "net.//.kernel.core_pattern",
            "/net/core/somaxconn",
            "net.core.somaxconn=1+kernel.core_pattern",
            "net.core.somaxconn+x",
            "net.core.somaxconn\nkernel.core_pattern",
            "net.core.somaxconn\0",
            "net.core somaxconn",
            "net.core.söm",
            "net.core.*",
        ] {
            assert!(
                matches!(try_key(key, "1", &ALL), Err(Error::BadSysctl { .. })),
                "{key:?}"
            );
        }
    }

    #[test]
    fn a_value_of_more_than_one_line_is_refused() {
        for value in ["1\n2", "1\0", "1\r\n"] {
            assert!(
                try_key("net.core.somaxconn", value, &ALL).is_err(),
                "{value:?}"
            );
        }
        assert!(try_key("net.ipv4.ip_local_port_range", "1024 65000", &ALL).is_ok());
        assert!(try_key("net.ipv4.ip_local_port_range", "1024\t65000", &ALL).is_ok());
    }

    #[test]
    fn a_key_whose_namespace_is_the_nodes_is_refused() {
        for (key, kind) in [
            ("net.core.somaxconn", NamespaceKind::Net),
            ("kernel.shmmax", NamespaceKind::Ipc),
            ("fs.mqueue.msg_max", NamespaceKind::Ipc),
            ("kernel.domainname", NamespaceKind::Uts),
        ] {
            let others: Vec<NamespaceKind> = ALL.into_iter().filter(|k| *k != kind).collect();
            assert!(try_key(key, "1", &others).is_err(), "{key}");
            assert!(try_key(key, "1", &[kind]).is_ok(), "{key}");
        }
    }

    #[test]
    fn a_joined_namespace_counts_as_the_pods_own() {
        let sysctls = BTreeMap::from([("net.core.somaxconn".to_owned(), "1".to_owned())]);
        let mut namespaces = Namespaces {
            net: Namespace::Join("/run/netns/x".into()),
            ipc: Namespace::Node,
            uts: Namespace::Node,
            pid: Namespace::Node,
            user: UserNamespace::Node,
        };
        assert!(check_sysctls(&sysctls, &namespaces).is_ok());
        namespaces.net = Namespace::Node;
        assert!(check_sysctls(&sysctls, &namespaces).is_err());
    }
}
