//! S5: a shared process namespace (`shareProcessNamespace: true`).
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::time::Duration;

use shim_tests::proc::namespace;
use shim_tests::{Container, Daemon, Pod, PodSpec, eventually, on_every_containerd};

fn prober<'a>(pod: &Pod<'a>, name: &str) -> Container<'a> {
    pod.container(name)
        .probe()
        .command(&["sleep", "3600"])
        .start()
}

on_every_containerd! {
    fn s5_every_container_sees_the_others_processes(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("shared").shared_processes().run(&daemon);
        let one = pod.container("one").command(&["sleep", "3601"]).start();
        let two = pod.container("two").command(&["sleep", "3602"]).start();
        for container in [&one, &two] {
            let seen = container.shell("cat /proc/[0-9]*/cmdline | tr '\\0' ' '");
            assert!(seen.contains("sleep 3601") && seen.contains("sleep 3602"), "{seen}");
        }
        // Never the node's: a sandbox without a PID 1 of its own would put them there without a word.
        let node = namespace(std::process::id().cast_signed(), "pid");
        assert_ne!(namespace(one.pid(), "pid"), node, "the containers are in the node's pid namespace");
        assert_eq!(namespace(one.pid(), "pid"), namespace(two.pid(), "pid"));
        assert_eq!(namespace(one.pid(), "pid"), namespace(pod.pid(), "pid"));
        daemon.end();
    }

    fn s5_pid_1_is_the_pause_program(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("shared").shared_processes().run(&daemon);
        let one = pod.sleeper("one");
        assert_eq!(one.shell("cat /proc/1/comm"), "pause");
        let status = std::fs::read_to_string(format!("/proc/{}/status", pod.pid())).unwrap();
        let inside = status.lines().find(|line| line.starts_with("NSpid:")).unwrap();
        assert_eq!(inside.split_whitespace().last(), Some("1"), "the sandbox's pid is not PID 1 of the pod: {inside}");
        daemon.end();
    }

    fn s5_ten_thousand_orphans_leave_no_zombie(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("shared").shared_processes().run(&daemon);
        let container = prober(&pod, "one");
        let made = container.try_exec_for(&["/probe", "orphans", "10000"], 20).unwrap();
        assert_eq!(made.code, 0, "{made:?}");
        eventually(Duration::from_secs(5), || {
            let seen = container.output(&["/probe", "zombies"]);
            if seen.starts_with("0 ") { Ok(()) } else { Err(format!("zombies and processes: {seen}")) }
        });
        daemon.end();
    }

    fn s5_sigterm_to_pid_1_ends_the_pod_with_exit_0(version) {
        let daemon = Daemon::start(version);
        for signal in ["TERM", "INT"] {
            let events = daemon.events();
            let pod = PodSpec::new(&format!("shared-{}", signal.to_lowercase())).shared_processes().run(&daemon);
            let container = pod.sleeper("one");
            container.try_exec(&["kill", &format!("-{signal}"), "1"]).ok();
            assert_eq!(container.wait(), 137, "PID 1 takes its namespace along");
            eventually(Duration::from_secs(5), || {
                let exit = events.bodies(&pod.id).into_iter().find(|event| event.topic == "/tasks/exit");
                let exit = exit.ok_or_else(|| format!("no exit event: {:?}", events.of(&pod.id)))?;
                // A zero is left out of the JSON.
                assert_eq!(exit.body["exit_status"].as_u64().unwrap_or(0), 0, "SIG{signal}: {}", exit.body);
                if pod.ready() { Err("CRI still calls it ready".to_owned()) } else { Ok(()) }
            });
        }
        daemon.end();
    }

    fn s5_an_attacker_cannot_reach_the_shim_through_pid_1(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("attacked").shared_processes().run(&daemon);
        let attacker =
            pod.container("attacker").probe().capabilities(&["SYS_PTRACE"]).command(&["sleep", "3600"]).start();
        let got = attacker.output(&["/probe", "attack", "1"]);
        // That PID 1's own few kilobytes can be looked at is another test: here nothing may lead further.
        let further: Vec<&str> = got
            .lines()
            .filter(|line| !["nothing", "maps", "ptrace"].contains(line) && !line.starts_with("mem: read"))
            .collect();
        assert!(further.is_empty(), "{got}");

        let seen = attacker.shell("for p in /proc/[0-9]*; do echo $p $(cat $p/comm) $(readlink $p/exe); done");
        assert!(!seen.contains("shim") && !seen.contains("containerd"), "{seen}");
        daemon.end();
    }

    fn s5_an_attacker_cannot_read_the_memory_of_pid_1(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("attacked").shared_processes().run(&daemon);
        let attacker =
            pod.container("attacker").probe().capabilities(&["SYS_PTRACE"]).command(&["sleep", "3600"]).start();
        let got = attacker.output(&["/probe", "attack", "1"]);
        assert_eq!(got, "nothing");
        daemon.end();
    }
}
