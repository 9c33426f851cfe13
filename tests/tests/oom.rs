//! Kills for lack of memory. An OOM event comes before the exit that the kill causes, and never for a container whose
//! processes live.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::fs;
use std::path::Path;
use std::time::Duration;

use shim_tests::cgroups::{Hierarchy, directory, hierarchy};
use shim_tests::daemon::Events;
use shim_tests::until::{ok_if, within};
use shim_tests::{
    Container, Daemon, Options, PodSpec, Version, eventually, on_every_containerd, ours_only,
};

const MIB: i64 = 1024 * 1024;
/// One buffer of 256 MiB, filled at once.
const TOO_MUCH: &str = "dd if=/dev/zero of=/dev/null bs=256M count=1";

#[track_caller]
fn assert_events(events: &Events, container: &str, expected: &[&str]) {
    eventually(Duration::from_secs(15), || {
        let seen = events.of(container);
        ok_if(seen == expected, || {
            format!("events {seen:?}, expected {expected:?}")
        })
    });
}

/// The reason that CRI gives for the container's end.
fn reason_in_cri(container: &Container<'_>) -> String {
    container.status().0.reason
}

/// Waits until CRI's reason is `OOMKilled`. CRI hears of the exit and of the cause on two ways, and may know the exit
/// first.
#[track_caller]
fn assert_oom_killed(container: &Container<'_>) {
    eventually(Duration::from_secs(10), || {
        let reason = reason_in_cri(container);
        ok_if(reason == "OOMKilled", || reason)
    });
}

/// The number of voluntary context switches of the shim's threads. A shim that does nothing adds none.
fn voluntary_switches(shim: i32) -> u64 {
    let of = |thread: &Path| {
        let status = fs::read_to_string(thread.join("status")).unwrap_or_default();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("voluntary_ctxt_switches:"));
        line.and_then(|number| number.trim().parse::<u64>().ok())
            .unwrap_or(0)
    };
    let threads = fs::read_dir(format!("/proc/{shim}/task")).unwrap();
    threads
        .filter_map(Result::ok)
        .map(|thread| of(&thread.path()))
        .sum()
}

on_every_containerd! {
    fn oom_is_told_before_the_exit_and_is_cris_reason(version) {
        let daemon = Daemon::start(version);
        let events = daemon.events();
        let pod = PodSpec::new("oom").run(&daemon);
        let container = pod.container("one").memory_limit(32 * MIB).shell(&format!("sleep 0.3; exec {TOO_MUCH}")).start();
        assert_eq!(container.wait(), 137);
        assert_events(&events, &container.id, &["create", "start", "oom", "exit", "delete"]);
        assert_oom_killed(&container);
        let other = pod.container("other").memory_limit(32 * MIB).shell("exit 3").start();
        assert_eq!(other.wait(), 3);
        assert_events(&events, &other.id, &["create", "start", "exit", "delete"]);
        assert_eq!(reason_in_cri(&other), "Error");
        daemon.end();
    }

    fn oom_of_containers_that_die_at_once(version) {
        let daemon = Daemon::start(version);
        let events = daemon.events();
        let pod = PodSpec::new("oom").run(&daemon);
        for number in 0..12 {
            let container = pod
                .container(&format!("c{number}"))
                .memory_limit(16 * MIB)
                .command(&TOO_MUCH.split(' ').collect::<Vec<_>>())
                .start();
            assert_eq!(container.wait(), 137, "{number}");
            assert_events(&events, &container.id, &["create", "start", "oom", "exit", "delete"]);
            assert_oom_killed(&container);
            container.remove();
        }
        daemon.end();
    }

    fn oom_of_a_child_whose_parent_lives_on(version) {
        let daemon = Daemon::start(version);
        let events = daemon.events();
        let pod = PodSpec::new("oom").run(&daemon);
        let container = pod
            .container("one")
            .memory_limit(32 * MIB)
            .shell(&format!("{TOO_MUCH}; echo $?; sleep 3600"))
            .start();
        // Told now, not when the container ends.
        assert_events(&events, &container.id, &["create", "start", "oom"]);
        eventually(Duration::from_secs(5), || {
            let lines = container.log_lines("stdout");
            ok_if(lines == ["137"], || format!("{lines:?}"))
        });
        assert!(container.running());
        container.stop(0);
        container.wait();
        let seen = events.of(&container.id);
        assert_eq!(seen.iter().filter(|topic| *topic == "oom").count(), 1, "{seen:?}");
        daemon.end();
    }

    fn oom_of_an_exec_is_told_before_its_exit(version) {
        let daemon = Daemon::start(version);
        let events = daemon.events();
        let pod = PodSpec::new("oom").run(&daemon);
        let container = pod.container("one").memory_limit(32 * MIB).command(&["sleep", "3600"]).start();
        assert_eq!(container.exec(&TOO_MUCH.split(' ').collect::<Vec<_>>()).code, 137);
        let (oom, exit) = eventually(Duration::from_secs(10), || {
            let seen = events.of(&container.id);
            let place = |topic: &str| seen.iter().position(|event| event.starts_with(topic));
            place("oom").zip(place("exit")).ok_or_else(|| format!("{seen:?}"))
        });
        assert!(oom < exit, "{:?}", events.of(&container.id));
        daemon.end();
    }

    fn oom_of_a_pod_is_not_told_of_the_neighbours_that_live(version) {
        let daemon = Daemon::start(version);
        let events = daemon.events();
        let pod = PodSpec::new("oom").run(&daemon);
        let victim = pod.container("victim").shell(&format!("sleep 1; exec {TOO_MUCH}")).create();
        let neighbour = pod.container("neighbour").shell("trap 'exit 0' TERM; sleep 3600 & wait").start();
        // The limit of the whole pod, as kubelet sets it: only that is reached.
        let of_pod = directory(neighbour.pid(), "memory").unwrap().parent().unwrap().to_owned();
        let limit = match hierarchy() {
            Hierarchy::V1 => "memory.limit_in_bytes",
            Hierarchy::V2 => "memory.max",
        };
        fs::write(of_pod.join(limit), (64 * MIB).to_string()).unwrap();
        victim.try_start().unwrap();
        assert_eq!(victim.wait(), 137);
        assert_events(&events, &victim.id, &["create", "start", "oom", "exit", "delete"]);
        assert_oom_killed(&victim);
        neighbour.stop(10);
        assert_eq!(neighbour.wait(), 0);
        assert_events(&events, &neighbour.id, &["create", "start", "exit", "delete"]);
        assert_eq!(reason_in_cri(&neighbour), "Completed");
        daemon.end();
    }

    fn oom_is_waited_for_without_waking_up(version) {
        ours_only!("the Go runtime wakes up by itself");
        // containerd 2.3 asks for the figures of each container every second.
        let seldom = if version >= Version::V2_3 { "stats_collect_period = '1h'" } else { "" };
        let daemon = Daemon::with(version, &Options { cri: seldom.to_owned(), ..Options::default() });
        let pod = PodSpec::new("idle").run(&daemon);
        let _container = pod.container("one").memory_limit(32 * MIB).command(&["sleep", "3600"]).start();
        let shim = daemon.shim().pid;
        // Whatever the start has left to do ends by itself.
        within(Duration::from_secs(30), || {
            let before = voluntary_switches(shim);
            std::thread::sleep(Duration::from_secs(3));
            let after = voluntary_switches(shim);
            ok_if(before == after, || format!("woken up {} times in 3 s", after.abs_diff(before)))
        })
        .unwrap_or_else(|why| panic!("{why}"));
        daemon.end();
    }
}
