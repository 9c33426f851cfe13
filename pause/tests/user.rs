//! S6: pods with a user namespace.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::fs;

use common::{config, end, inode, run_inside, wait};
use pause::{
    Class, Error, HolderKind, IdMap, Namespace, NamespaceKind, Sandbox, SandboxConfig,
    UserNamespace,
};
use rustix::process::Signal;

const HOST: u32 = 300_000;

fn with_user() -> SandboxConfig {
    let map = vec![IdMap {
        container: 0,
        host: HOST,
        size: 65536,
    }];
    let mut config = config();
    config.namespaces.user = UserNamespace::New {
        uid_map: map.clone(),
        gid_map: map,
    };
    config.hostname = Some("pod-u".to_owned());
    // Keys that a kernel shows to a user namespace: net.core.somaxconn is not there on Linux 6.1.
    for (key, value) in [
        ("kernel.shmmni", "1111"),
        ("net.ipv4.ip_unprivileged_port_start", "222"),
        ("fs.mqueue.queues_max", "33"),
    ] {
        config.sysctls.insert(key.to_owned(), value.to_owned());
    }
    config
}

fn check(sandbox: &Sandbox) {
    assert_eq!(sandbox.holder_kind(), HolderKind::Process);
    assert_eq!(
        run_inside(sandbox, "uname -n; id -u")
            .split_whitespace()
            .collect::<Vec<_>>(),
        ["pod-u", "0"]
    );
    let values = run_inside(
        sandbox,
        "cat /proc/sys/kernel/shmmni /proc/sys/net/ipv4/ip_unprivileged_port_start /proc/sys/fs/mqueue/queues_max",
    );
    assert_eq!(values, "1111\n222\n33\n");
    // The pod's root is root in every namespace of the pod, because these belong to the pod's user namespace.
    run_inside(
        sandbox,
        "ip link add dummy0 type veth peer name dummy1 && hostname pod-v && hostname pod-u",
    );
    assert!(run_inside(sandbox, "ip -o link show lo").contains("LOOPBACK,UP"));
    let status = fs::read_to_string(format!("/proc/{}/status", sandbox.pid())).unwrap();
    let id = HOST + 65535;
    assert!(
        status.contains(&format!("Uid:\t{id}\t{id}\t{id}\t{id}\n")),
        "{status}"
    );
    assert!(
        status.contains("CapEff:\t0000000000000000") && status.contains("Seccomp:\t2"),
        "{status}"
    );
    let ppid = format!("PPid:\t{}\n", std::process::id());
    assert!(status.contains(&ppid), "{status}");
}

#[test]
fn s6_a_pod_with_a_new_user_namespace_owns_its_other_namespaces() {
    let before = common::traces();
    let sandbox = Sandbox::create(&with_user()).unwrap();
    check(&sandbox);
    assert_eq!(sandbox.paths().len(), 4);
    end(sandbox);
    common::assert_no_new_traces(&before);
}

#[test]
fn s6_with_a_process_namespace_too_pause_is_pid_1_and_a_direct_child() {
    let before = common::traces();
    let mut config = with_user();
    config.namespaces.pid = Namespace::New;
    let sandbox = Sandbox::create(&config).unwrap();
    check(&sandbox);
    assert_eq!(sandbox.paths().len(), 5);
    assert_eq!(run_inside(&sandbox, "cat /proc/1/comm"), "pause\n");
    sandbox.signal(Signal::TERM).unwrap();
    assert_eq!(wait(sandbox.pid()).exit_status(), Some(0));
    sandbox.end();
    common::assert_no_new_traces(&before);
}

#[test]
fn s6_a_second_pod_joins_a_user_namespace_and_makes_its_own_others_in_it() {
    let first = Sandbox::create(&with_user()).unwrap();
    let mut config = with_user();
    config.namespaces.user = UserNamespace::Join(first.paths()[&NamespaceKind::User].clone());
    config.namespaces.pid = Namespace::New;
    let second = Sandbox::create(&config).unwrap();
    check(&second);
    assert_eq!(
        inode(&second.paths()[&NamespaceKind::User]),
        inode(&first.paths()[&NamespaceKind::User])
    );
    assert_ne!(
        inode(&second.paths()[&NamespaceKind::Net]),
        inode(&first.paths()[&NamespaceKind::Net])
    );
    end(second);

    // As containerd does: the network namespace is there already, and belongs to that user namespace.
    config.namespaces.net = Namespace::Join(first.paths()[&NamespaceKind::Net].clone());
    config.sysctls.remove("net.ipv4.ip_unprivileged_port_start");
    let third = Sandbox::create(&config).unwrap();
    check(&third);
    assert_eq!(
        inode(&third.paths()[&NamespaceKind::Net]),
        inode(&first.paths()[&NamespaceKind::Net])
    );
    end(third);
    end(first);
}

#[test]
fn s6_joining_the_nodes_user_namespace_is_no_user_namespace() {
    let mut config = config();
    config.namespaces.user = UserNamespace::Join("/proc/self/ns/user".into());
    let sandbox = Sandbox::create(&config).unwrap();
    assert_eq!(sandbox.holder_kind(), HolderKind::Thread);
    assert!(!sandbox.paths().contains_key(&NamespaceKind::User));
}

#[test]
fn a_small_or_refused_id_map() {
    // Without a mapping of 65535 pause keeps the mapped id, and has no capability either.
    let mut config = with_user();
    let small = vec![IdMap {
        container: 0,
        host: HOST,
        size: 1,
    }];
    config.namespaces.user = UserNamespace::New {
        uid_map: small.clone(),
        gid_map: small,
    };
    let sandbox = Sandbox::create(&config).unwrap();
    let status = fs::read_to_string(format!("/proc/{}/status", sandbox.pid())).unwrap();
    assert!(
        status.contains(&format!("Uid:\t{HOST}\t")) && status.contains("CapEff:\t0000000000000000")
    );
    end(sandbox);

    let before = common::traces();
    let overlapping = [
        IdMap {
            container: 0,
            host: HOST,
            size: 10,
        },
        IdMap {
            container: 5,
            host: HOST,
            size: 10,
        },
    ];
    for map in [vec![], overlapping.to_vec()] {
        let uid_map = vec![IdMap {
            container: 0,
            host: HOST,
            size: 10,
        }];
        config.namespaces.user = UserNamespace::New {
            uid_map,
            gid_map: map,
        };
        let error = Sandbox::create(&config).unwrap_err();
        assert!(
            matches!(
                error,
                Error::IdMap {
                    file: "gid_map",
                    ..
                }
            ),
            "{error}"
        );
        assert_eq!(error.class(), Class::InvalidInput);
    }
    common::assert_no_new_traces(&before);
}
