//! Which sysctls a pod may set: exactly those that the kernel keeps per namespace, and only in a namespace that is the
//! pod's own. Everything else would change the node.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::Uid;
use rustix::thread::set_thread_res_uid;

use crate::{Error, Kind, Namespaces};

/// Of `kernel.*`, what belongs to an IPC namespace.
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

/// Refuses, by its name, a sysctl that is malformed, not kept per namespace, or whose namespace is the node's.
///
/// Touches nothing. A joined namespace counts as the pod's own here; [`Sandbox::create`](crate::Sandbox::create) also
/// notices one that turns out to be the node's.
pub fn check_sysctls(
    sysctls: &BTreeMap<String, String>,
    namespaces: &Namespaces,
) -> Result<(), Error> {
    check(sysctls, &|kind| namespaces.wanted(kind))
}

/// `own` says whether the pod has a namespace of that kind for itself.
pub(crate) fn check(
    sysctls: &BTreeMap<String, String>,
    own: &dyn Fn(Kind) -> bool,
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
            ["kernel", "domainname"] => Kind::Uts,
            ["kernel", name] if IPC.contains(name) => Kind::Ipc,
            ["fs", "mqueue", _, ..] => Kind::Ipc,
            ["net", _, ..] => Kind::Net,
            _ => return refuse("not kept per namespace, it would change the node"),
        };
        if !own(kind) {
            return refuse(match kind {
                Kind::Net => "the network namespace is the node's",
                Kind::Ipc => "the IPC namespace is the node's",
                Kind::Uts | Kind::Pid | Kind::User => "the UTS namespace is the node's",
            });
        }
    }
    Ok(())
}

/// The parts of a key. The first separator decides, as sysctl(8) has it: after a slash first, dots are part of a name
/// (`net/ipv4/conf/eth0.100/forwarding`); after a dot first, a slash stands for a dot
/// (`net.ipv4.conf.eth0/100.forwarding`).
fn components(key: &str) -> Result<Vec<String>, &'static str> {
    // An allow-list: a '+', a space or a newline has been a way to smuggle in a second sysctl elsewhere.
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

/// Writes one checked sysctl, on the thread that stands in the pod's namespaces: the kernel looks a namespaced sysctl
/// up by the namespaces of the thread that opens it.
pub(crate) fn write(key: &str, value: &str) -> Result<(), Error> {
    let mut path = PathBuf::from("/proc/sys");
    path.extend(components(key).map_err(|reason| Error::BadSysctl {
        key: key.to_owned(),
        reason,
    })?);
    let written = match put(&path, value) {
        // An IPC namespace that belongs to a user namespace gives its sysctls to that namespace's root, and the node's
        // root is not in the group of those who may write.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            as_owner(&path, value).unwrap_or(Err(error))
        }
        other => other,
    };
    written.map_err(|source| Error::WriteSysctl {
        key: key.to_owned(),
        value: value.to_owned(),
        source,
    })
}

fn put(path: &Path, value: &str) -> io::Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)?
        .write_all(value.as_bytes())
}

/// Only this thread's effective user changes, and changes back.
fn as_owner(path: &Path, value: &str) -> Option<io::Result<()>> {
    let owner = fs::metadata(path).ok()?.uid();
    let effective = |uid| set_thread_res_uid(None, Uid::from_raw(uid), None);
    effective(owner).ok()?;
    let written = put(path, value);
    match effective(0) {
        Ok(()) => Some(written),
        Err(error) => Some(Err(error.into())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Namespace, UserNamespace};

    fn try_key(key: &str, value: &str, own: &[Kind]) -> Result<(), Error> {
        let sysctls = BTreeMap::from([(key.to_owned(), value.to_owned())]);
        check(&sysctls, &|kind| own.contains(&kind))
    }

    const ALL: [Kind; 3] = [Kind::Net, Kind::Ipc, Kind::Uts];

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
            ("net.core.somaxconn", Kind::Net),
            ("kernel.shmmax", Kind::Ipc),
            ("fs.mqueue.msg_max", Kind::Ipc),
            ("kernel.domainname", Kind::Uts),
        ] {
            let others: Vec<Kind> = ALL.into_iter().filter(|k| *k != kind).collect();
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
