//! S7: one shim per pod, the containers are the shim's children, and there is no pause process.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test reports by failing"
)]

use std::time::{Duration, Instant};

use shim_tests::proc::{self, Process};
use shim_tests::until::ok_if;
use shim_tests::{Daemon, PodSpec, eventually, in_every_mode};

fn describe(processes: &[Process]) -> String {
    processes
        .iter()
        .map(Process::describe)
        .collect::<Vec<_>>()
        .join("\n  ")
}

in_every_mode! {
    fn s7_a_pod_of_two_containers_is_three_processes(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("three").run(&daemon);
        let (one, two) = (pod.sleeper("one"), pod.sleeper("two"));
        // A runc that has just ended may still be seen for a moment.
        eventually(Duration::from_secs(2), || {
            let now = daemon.processes();
            ok_if(now.len() == 3, || format!("{} processes:\n  {}", now.len(), describe(&now)))
        });
        let shim = daemon.shim();
        let children: Vec<i32> = proc::children(shim.pid).iter().map(|child| child.pid).collect();
        assert_eq!(children.len(), 2, "{}", describe(&proc::children(shim.pid)));
        assert!(children.contains(&one.pid()) && children.contains(&two.pid()));
        daemon.end();
    }

    fn s7_every_container_is_a_child_of_the_pods_shim(version) {
        let daemon = Daemon::start(version);
        let pods = ["a", "b"].map(|name| PodSpec::new(name).run(&daemon));
        let containers: Vec<_> = pods.iter().flat_map(|pod| ["one", "two", "three"].map(|name| pod.sleeper(name))).collect();
        assert_eq!(daemon.shims().len(), 2, "one shim per pod");
        for of_pod in containers.chunks(3) {
            let parents: Vec<i32> =
                of_pod.iter().map(|container| Process::of(container.pid()).unwrap().parent).collect();
            assert!(parents.iter().all(|parent| *parent == parents[0]), "{parents:?}");
            assert!(daemon.shims().iter().any(|shim| shim.pid == parents[0]));
        }
        daemon.end();
    }

    fn s7_the_shim_is_small(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("small").run(&daemon);
        let (one, _two) = (pod.sleeper("one"), pod.sleeper("two"));
        for _ in 0..5 {
            one.output(&["true"]);
        }
        let shim = daemon.shim();
        // Threads for blocking work end after some idle seconds.
        let threads = eventually(Duration::from_secs(12), || {
            let threads = proc::threads(shim.pid);
            ok_if(threads <= 4, || format!("{threads} threads: {:?}", proc::thread_names(shim.pid))).map(|()| threads)
        });
        eprintln!("shim: {threads} threads, {} kB private", proc::private_kb(shim.pid));
        daemon.end();
    }

    fn s7_the_shim_ends_at_once_with_its_pod(version) {
        let daemon = Daemon::start(version);
        // A shim waits up to five seconds for the delivery of its last events. A listening containerd takes events at
        // once, unless a busy machine delays containerd.
        let at_once = |name: &str| {
            let pod = PodSpec::new(name).run(&daemon);
            pod.sleeper("one");
            let shim = daemon.shim();
            pod.remove();
            let begin = Instant::now();
            eventually(Duration::from_secs(20), || ok_if(!shim.alive(), || shim.describe()));
            begin.elapsed() < Duration::from_secs(2)
        };
        assert!(["first", "second", "third"].into_iter().any(at_once), "it takes its time");
        daemon.end();
    }
}
