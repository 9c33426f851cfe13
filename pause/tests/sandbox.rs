//! Sandboxes that a thread holds.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::time::Instant;

use common::{config, inode, nodes_inode, read_inside, run_inside};
use pause::{Error, HolderChoice, HolderKind, Namespace, NamespaceKind, Sandbox, Signalled};
use rustix::process::Signal;

#[test]
fn an_ordinary_pod_has_net_ipc_and_uts_of_its_own_and_is_held_by_a_thread() {
    let sandbox = Sandbox::create(&config()).unwrap();
    assert_eq!(sandbox.holder_kind(), HolderKind::Thread);
    let kinds: Vec<NamespaceKind> = sandbox.paths().into_keys().collect();
    assert_eq!(
        kinds,
        [NamespaceKind::Net, NamespaceKind::Ipc, NamespaceKind::Uts]
    );
    for (kind, path) in sandbox.paths() {
        assert!(path.starts_with(format!("/proc/{}/ns", sandbox.pid())));
        assert_ne!(inode(&path), nodes_inode(kind), "{kind}");
        let kept = rustix::fs::fstat(sandbox.namespace(kind).unwrap()).unwrap();
        assert_eq!(kept.st_ino, inode(&path));
    }
    let comm = fs::read_to_string(format!("/proc/{}/comm", sandbox.pid())).unwrap();
    assert_eq!(comm, "pause\n");
}

#[test]
fn loopback_is_up_in_a_new_network_namespace() {
    let sandbox = Sandbox::create(&config()).unwrap();
    let flags = read_inside(
        &sandbox,
        "ip -o link show lo || cat /sys/class/net/lo/flags",
    );
    assert!(flags.contains("LOOPBACK,UP"), "{flags}");
}

#[test]
fn the_hostname_is_the_pods_and_the_nodes_stays() {
    let node = rustix::system::uname().nodename().to_owned();
    let mut wanted = config();
    wanted.hostname = Some("pod-a".to_owned());
    wanted.domainname = Some("example".to_owned());
    let sandbox = Sandbox::create(&wanted).unwrap();
    assert_eq!(read_inside(&sandbox, "uname -n").trim(), "pod-a");
    let domain = read_inside(&sandbox, "cat /proc/sys/kernel/domainname");
    assert_eq!(domain.trim(), "example");
    assert_eq!(rustix::system::uname().nodename(), node.as_c_str());
}

#[test]
fn sysctls_are_set_in_the_pod_and_the_nodes_values_stay() {
    let keys = [
        ("net.core.somaxconn", "1234"),
        ("net/ipv4/ip_local_port_range", "20000\t30000"),
        ("net/ipv4/conf/lo/forwarding", "1"),
        ("kernel.shm_rmid_forced", "1"),
        ("kernel.sem", "251\t32001\t501\t129"),
        ("kernel.msgmax", "9000"),
        ("fs.mqueue.msg_max", "11"),
        ("kernel.domainname", "of.the.pod"),
    ];
    let node = || keys.map(|(key, _)| fs::read_to_string(file(key)).unwrap());
    let before = node();
    let mut wanted = config();
    for (key, value) in keys {
        wanted.sysctls.insert(key.to_owned(), value.to_owned());
    }
    let sandbox = Sandbox::create(&wanted).unwrap();
    for (key, value) in keys {
        let read = read_inside(&sandbox, &format!("cat {}", file(key)));
        assert_eq!(read.trim_end(), value, "{key}");
    }
    assert_eq!(before, node());
}

fn file(key: &str) -> String {
    format!("/proc/sys/{}", key.replace('.', "/"))
}

#[test]
fn a_pod_in_the_nodes_namespaces_still_has_a_thread() {
    let mut wanted = config();
    wanted.namespaces.net = Namespace::Node;
    wanted.namespaces.ipc = Namespace::Node;
    wanted.namespaces.uts = Namespace::Node;
    // The node's own name may be asked for: nothing is written.
    let name = rustix::system::uname()
        .nodename()
        .to_str()
        .unwrap()
        .to_owned();
    wanted.hostname = Some(name);
    let sandbox = Sandbox::create(&wanted).unwrap();
    assert!(sandbox.paths().is_empty());
    assert_ne!(sandbox.pid(), rustix::process::getpid());

    wanted.hostname = Some("other".to_owned());
    let error = Sandbox::create(&wanted).unwrap_err();
    assert!(
        matches!(
            error,
            Error::BadName {
                field: "hostname",
                ..
            }
        ),
        "{error}"
    );
}

#[test]
fn a_second_pod_joins_the_namespaces_of_the_first() {
    let mut wanted = config();
    wanted.namespaces.pid = Namespace::New;
    let first = Sandbox::create(&wanted).unwrap();
    let path = |kind| Namespace::Join(first.paths()[&kind].clone());
    wanted.namespaces.net = path(NamespaceKind::Net);
    wanted.namespaces.ipc = path(NamespaceKind::Ipc);
    wanted.namespaces.uts = path(NamespaceKind::Uts);
    wanted.namespaces.pid = path(NamespaceKind::Pid);
    for holder in [HolderChoice::Auto, HolderChoice::Process] {
        wanted.holder = holder;
        let second = Sandbox::create(&wanted).unwrap();
        assert_eq!(second.paths().len(), 4);
        for (kind, path) in second.paths() {
            assert_eq!(inode(&path), inode(&first.paths()[&kind]), "{kind}");
        }
        let expected = if holder == HolderChoice::Auto {
            HolderKind::Thread
        } else {
            HolderKind::Process
        };
        assert_eq!(second.holder_kind(), expected);
        common::end(second);
    }
    common::end(first);
}

#[test]
fn a_joined_namespace_that_is_the_nodes_is_never_written_to() {
    for (kind, field) in [
        (NamespaceKind::Uts, "hostname"),
        (NamespaceKind::Net, "net.core.somaxconn"),
    ] {
        let mut wanted = config();
        let own = Namespace::Join(format!("/proc/self/ns/{}", kind.file()).into());
        if kind == NamespaceKind::Uts {
            wanted.namespaces.uts = own;
            wanted.hostname = Some("other".to_owned());
        } else {
            wanted.namespaces.net = own;
            wanted.sysctls = BTreeMap::from([(field.to_owned(), "1".to_owned())]);
        }
        let error = Sandbox::create(&wanted).unwrap_err().to_string();
        assert!(
            error.contains(field) && error.contains("the node's"),
            "{error}"
        );
    }
}

#[test]
fn signals_to_a_thread_say_what_pause_would_have_done() {
    let sandbox = Sandbox::create(&config()).unwrap();
    assert_eq!(sandbox.signal(Signal::TERM).unwrap(), Signalled::Ends(0));
    assert_eq!(sandbox.signal(Signal::INT).unwrap(), Signalled::Ends(0));
    assert_eq!(sandbox.signal(Signal::KILL).unwrap(), Signalled::Ends(137));
    assert_eq!(sandbox.signal(Signal::HUP).unwrap(), Signalled::Nothing);
}

#[test]
fn ending_a_sandbox_leaves_no_thread_and_no_file() {
    let before = common::traces();
    let sandbox = Sandbox::create(&config()).unwrap();
    let tid = sandbox.pid();
    sandbox.end();
    // The kernel may still list a joined thread for a moment.
    common::soon(|| (!fs::exists(format!("/proc/self/task/{tid}")).unwrap()).then_some(()));
    common::assert_no_new_traces(&before);
}

#[test]
fn a_pod_is_usable_by_a_command_that_joins_it_by_path() {
    let sandbox = Sandbox::create(&config()).unwrap();
    let names = run_inside(&sandbox, "ls -L -i /proc/self/ns/net");
    let inode = inode(&sandbox.paths()[&NamespaceKind::Net]).to_string();
    assert!(names.contains(&inode), "{names}");
}

#[test]
fn creating_a_sandbox_takes_a_few_milliseconds() {
    for (name, holder) in [
        ("thread", HolderChoice::Thread),
        ("process", HolderChoice::Process),
    ] {
        let mut wanted = config();
        wanted.holder = holder;
        let mut times: Vec<_> = (0..20)
            .map(|_| {
                let start = Instant::now();
                let sandbox = Sandbox::create(&wanted).unwrap();
                let time = start.elapsed();
                common::end(sandbox);
                time
            })
            .collect();
        times.sort();
        let median = times[times.len() / 2];
        println!(
            "{name}: median {median:?}, slowest {:?}",
            times[times.len() - 1]
        );
        // Generous, for a busy machine: the point is that no step waits for a timer.
        assert!(median.as_millis() < 100, "{name}: {median:?}");
    }
}
