//! What containerd, kubelet and other programs on the node find of a pod: its cgroups, its bundles, its annotations.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test reports by failing"
)]

use std::fs;
use std::os::unix::net::UnixStream;

use serde_json::json;
use shim_tests::cgroups::{self, Hierarchy, hierarchy};
use shim_tests::direct::Group;
use shim_tests::lab::ShimUnderTest;
use shim_tests::{Daemon, PodSpec, in_every_mode, on_every_containerd, ours_only};

in_every_mode! {
    fn the_cgroup_of_a_sandbox_has_the_least_cpu_weight(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("light").run(&daemon);
        let (_, info) = pod.status();
        let path = info["runtimeSpec"]["linux"]["cgroupsPath"].as_str().unwrap();
        let cgroup = cgroups::root("cpu").join(path.trim_start_matches('/'));
        let (file, least) = match hierarchy() {
            Hierarchy::V1 => ("cpu.shares", "2"),
            Hierarchy::V2 => ("cpu.weight", "1"),
        };
        assert_eq!(fs::read_to_string(cgroup.join(file)).unwrap().trim(), least);
        daemon.end();
    }

    fn the_bundle_of_each_container_has_the_shims_address(version) {
        // containerd 1.6 and 1.7 dial the address after a restart, also after a downgrade from 2.x.
        ours_only!("containerd 2.x writes the file for no container that joins a pod, and the stock shim does not either");
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("addressed").run(&daemon);
        for container in [pod.sleeper("one"), pod.sleeper("two")] {
            let bundles = daemon.directory().join("state/io.containerd.runtime.v2.task/k8s.io");
            let address = fs::read_to_string(bundles.join(&container.id).join("address")).unwrap();
            let socket = address.strip_prefix("unix://").unwrap();
            UnixStream::connect(socket).unwrap_or_else(|error| panic!("{socket}: {error}"));
        }
        daemon.end();
    }
}

on_every_containerd! {
    fn a_container_that_calls_itself_a_sandbox_runs_its_program(version) {
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "named");
        // As with `docker run --annotation`: only CRI knows the id of the sandbox.
        let bundle = group.bundle("c", "exit 7", |spec| {
            spec["annotations"]["io.kubernetes.cri.container-type"] = json!("sandbox");
        });
        group.create_from("c", &bundle).unwrap();
        group.shim.start("c", "").unwrap();
        assert_eq!(group.shim.wait("c", "").unwrap(), 7, "{:?}", ShimUnderTest::get());
        group.remove("c");
        group.end();
        daemon.end();
    }
}
