//! S5: a shared process namespace (`shareProcessNamespace: true`).
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::time::Duration;

use shim_tests::proc::namespace;
use shim_tests::{Container, Daemon, Pod, PodSpec, ShimUnderTest, eventually, in_every_mode};

fn start_prober<'a>(pod: &Pod<'a>, name: &str) -> Container<'a> {
    pod.container(name)
        .probe()
        .command(&["sleep", "3600"])
        .start()
}

/// PID 1 of the process namespace of `member`. Both pids are the node's numbers.
fn pid_1_of(member: i32) -> i32 {
    let of = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let is_pid_1 = |pid: i32| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let inside = status.lines().find(|line| line.starts_with("NSpid:"));
        inside.is_some_and(|line| line.split_whitespace().last() == Some("1"))
    };
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .find(|&pid| is_pid_1(pid) && of(pid).is_some() && of(pid) == of(member))
        .expect("a PID 1")
}

in_every_mode! {
    fn s5_every_container_sees_the_others_processes(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("shared").shared_processes().run(&daemon);
        let one = pod.container("one").command(&["sleep", "3601"]).start();
        let two = pod.container("two").command(&["sleep", "3602"]).start();
        for container in [&one, &two] {
            let seen = container.shell("cat /proc/[0-9]*/cmdline | tr '\\0' ' '");
            assert!(seen.contains("sleep 3601") && seen.contains("sleep 3602"), "{seen}");
        }
        // A sandbox without a PID 1 of its own would silently put the containers into the node's namespace.
        let node = namespace(std::process::id().cast_signed(), "pid");
        assert_ne!(namespace(one.pid(), "pid"), node, "the containers are in the node's pid namespace");
        assert_eq!(namespace(one.pid(), "pid"), namespace(two.pid(), "pid"));
        daemon.end();
    }

    fn s5_pid_1_is_the_pause_program(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("shared").shared_processes().run(&daemon);
        let one = pod.sleeper("one");
        assert_eq!(one.shell("cat /proc/1/comm"), "pause");
        // On the node, PID 1 is a child of the pod's shim. With our shim PID 1 is not the sandbox's pid: the sandbox's
        // spec does not tell of a shared process namespace, so PID 1 comes with the first container that joins one.
        let pid_1 = pid_1_of(one.pid());
        if ShimUnderTest::get() == ShimUnderTest::Pause {
            let status = std::fs::read_to_string(format!("/proc/{pid_1}/status")).unwrap();
            let field = |name| status.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim().to_owned();
            assert_eq!(field("PPid:"), daemon.shim().pid.to_string());
            assert_eq!(field("Uid:"), "65535\t65535\t65535\t65535");
            for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
                assert_eq!(field(set), "0000000000000000", "{set}");
            }
            assert_eq!((field("NoNewPrivs:"), field("Seccomp:")), ("1".into(), "2".into()));
        } else {
            assert_eq!(pid_1, pod.pid());
        }
        daemon.end();
    }

    fn s5_ten_thousand_orphans_leave_no_zombie(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("shared").shared_processes().run(&daemon);
        let container = start_prober(&pod, "one");
        let made = container.try_exec_for(&["/probe", "orphans", "10000"], 60).unwrap();
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
            if version.sandboxes_are_tasks() {
                eventually(Duration::from_secs(5), || {
                    let exit = events.bodies(&pod.id).into_iter().find(|event| event.topic == "/tasks/exit");
                    let exit = exit.ok_or_else(|| format!("no exit event: {:?}", events.of(&pod.id)))?;
                    // A zero is left out of the JSON.
                    assert_eq!(exit.body["exit_status"].as_u64().unwrap_or(0), 0, "SIG{signal}: {}", exit.body);
                    Ok(())
                });
            }
            pod.wait_until_not_ready();
        }
        daemon.end();
    }

    fn s5_an_attacker_cannot_reach_the_shim_through_pid_1(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("attacked").shared_processes().run(&daemon);
        let attacker =
            pod.container("attacker").probe().capabilities(&["SYS_PTRACE"]).command(&["sleep", "3600"]).start();
        let got = attacker.output(&["/probe", "attack", "1"]);
        // PID 1's own few kilobytes are the subject of the next test. Here nothing may lead beyond PID 1.
        let further: Vec<&str> = got
            .lines()
            .filter(|line| !["nothing", "maps", "ptrace"].contains(line))
            .filter(|line| !line.starts_with("mem: read") && !line.starts_with("mem: bytes"))
            .collect();
        assert!(further.is_empty(), "{got}");

        let seen = attacker.shell("for p in /proc/[0-9]*; do echo $p $(cat $p/comm) $(readlink $p/exe); done");
        assert!(!seen.contains("shim") && !seen.contains("containerd"), "{seen}");
        daemon.end();
    }

    /// The kernel lets CAP_SYS_PTRACE (of the first user namespace) look into any process of the namespace. PID 1 is
    /// safe because PID 1 holds nothing: no environment, and two pages, the published program and its name.
    fn s5_an_attacker_finds_nothing_in_the_memory_of_pid_1(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("attacked").shared_processes().run(&daemon);
        let attacker =
            pod.container("attacker").probe().capabilities(&["SYS_PTRACE"]).command(&["sleep", "3600"]).start();
        let got = attacker.output(&["/probe", "attack", "1"]);
        let readable: usize = got
            .lines()
            .filter_map(|line| line.strip_prefix("mem: bytes "))
            .map(|bytes| bytes.parse::<usize>().unwrap())
            .sum();
        assert!((1..=2 * 4096).contains(&readable), "{got}");
        assert!(!got.contains("environ") && !got.contains("words of the shim"), "{got}");
        daemon.end();
    }
}
