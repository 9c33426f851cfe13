//! S6: pods in the node's namespaces, and a debug container that joins another container's process namespace.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use shim_tests::proc::namespaces;
use shim_tests::{Daemon, PodSpec, Version, in_every_mode, left_out};

/// Asserts that `pid` shares exactly these kinds of namespaces with the node.
fn assert_shared_with_the_node(pid: i32, expected: &[&str]) {
    let (inside, node) = (
        namespaces(pid),
        namespaces(std::process::id().cast_signed()),
    );
    for kind in ["net", "ipc", "uts", "pid"] {
        let shared = inside[kind] == node[kind];
        assert_eq!(
            shared,
            expected.contains(&kind),
            "{kind}: shared with the node: {shared}; expected: {expected:?}"
        );
    }
    assert_ne!(inside["mnt"], node["mnt"]);
}

in_every_mode! {
    fn s6_host_pid(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("hostpid").host_pid().run(&daemon);
        let container = pod.sleeper("one");
        assert_shared_with_the_node(container.pid(), &["pid"]);
        assert_eq!(container.shell("hostname"), "hostpid");
        assert!(container.shell(&format!("cat /proc/{}/comm", daemon.pid())).contains("containerd"));
        daemon.end();
    }

    fn s6_host_ipc(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("hostipc").host_ipc().run(&daemon);
        let container = pod.sleeper("one");
        assert_shared_with_the_node(container.pid(), &["ipc"]);
        daemon.end();
    }

    fn s6_a_debug_container_joins_its_target(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("debugged").run(&daemon);
        let target = pod.container("target").command(&["sleep", "4711"]).start();
        let beside = pod.sleeper("beside");
        let debug = pod.container("debug").target(&target).command(&["sleep", "3600"]).start();
        let (a, b) = (namespaces(target.pid()), namespaces(debug.pid()));
        for kind in ["pid", "net", "ipc", "uts"] {
            assert_eq!(a[kind], b[kind], "{kind}");
        }
        assert_ne!(a["pid"], namespaces(beside.pid())["pid"]);
        assert_ne!(a["mnt"], b["mnt"]);
        assert!(debug.shell("cat /proc/1/cmdline | tr '\\0' ' '").starts_with("sleep 4711"));
        // The end of the debug container does not end the target. (The end of the target ends the debug container.)
        debug.stop(0);
        debug.wait();
        assert!(target.running());
        daemon.end();
    }
}

/// Leaves a test of a pod with the node's network out where containerd crashes on such a pod.
macro_rules! unless_containerd_crashes {
    ($version:ident) => {
        if $version.sandbox_api() && $version < Version::V2_3 {
            left_out!("through the Sandbox API, containerd 2.0 to 2.2 crash on a pod with the node's network");
        }
    };
}

in_every_mode! {
    fn s6_host_network(version) {
        unless_containerd_crashes!(version);
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("hostnet").host_network().run(&daemon);
        let container = pod.sleeper("one");
        // CRI gives such a pod the node's uts namespace, too.
        assert_shared_with_the_node(container.pid(), &["net", "uts"]);
        let node = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        assert_eq!(container.output(&["hostname"]), node.trim());
        assert!(container.shell("ip -o link").contains(&format!(" {}", first_link())));
        daemon.end();
    }

    fn s6_all_of_the_nodes_namespaces_together(version) {
        unless_containerd_crashes!(version);
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("hostall").host_network().host_pid().host_ipc().run(&daemon);
        let (one, two) = (pod.sleeper("one"), pod.sleeper("two"));
        assert_shared_with_the_node(one.pid(), &["net", "uts", "pid", "ipc"]);
        assert_shared_with_the_node(two.pid(), &["net", "uts", "pid", "ipc"]);
        assert!(pod.ready());
        daemon.end();
    }

    fn s6_pairs_of_the_nodes_namespaces(version) {
        unless_containerd_crashes!(version);
        let daemon = Daemon::start(version);
        for (name, spec, expected) in [
            ("np", PodSpec::new("np").host_network().host_pid(), vec!["net", "uts", "pid"]),
            ("ni", PodSpec::new("ni").host_network().host_ipc(), vec!["net", "uts", "ipc"]),
            ("pi", PodSpec::new("pi").host_pid().host_ipc(), vec!["pid", "ipc"]),
        ] {
            let pod = spec.run(&daemon);
            let container = pod.sleeper(name);
            assert_shared_with_the_node(container.pid(), &expected);
            pod.stop();
            pod.remove();
        }
        daemon.end();
    }

    fn s6_host_network_with_shared_processes(version) {
        unless_containerd_crashes!(version);
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("mixed").host_network().shared_processes().run(&daemon);
        let (one, two) = (pod.sleeper("one"), pod.sleeper("two"));
        assert_shared_with_the_node(one.pid(), &["net", "uts"]);
        assert_eq!(namespaces(one.pid())["pid"], namespaces(two.pid())["pid"]);
        daemon.end();
    }
}

/// A network link of the node that no test has made.
fn first_link() -> String {
    let mut links: Vec<String> = std::fs::read_dir("/sys/class/net")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|link| link != "lo" && !link.starts_with("st") && !link.starts_with("veth"))
        .collect();
    links.sort();
    links.into_iter().next().unwrap_or_else(|| "lo".to_owned())
}
