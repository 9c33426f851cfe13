//! S9 as far as CRI's calls go: exec, exit codes, logs, stop, restarts, resources, stats, and the order of events.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::fs;
use std::time::{Duration, Instant};

use k8s_cri::v1::LinuxContainerResources;
use rustix::process::Signal;
use shim_tests::cri::Executed;
use shim_tests::daemon::Events;
use shim_tests::proc::kill;
use shim_tests::until::ok_if;
use shim_tests::{Daemon, Options, PodSpec, Version, eventually, in_every_mode, left_out};

/// Waits for the events of a container and compares all of them.
#[track_caller]
fn assert_events(events: &Events, container: &str, expected: &[&str]) {
    eventually(Duration::from_secs(5), || {
        let seen = events.of(container);
        ok_if(seen == expected, || {
            format!("events {seen:?}, expected {expected:?}")
        })
    });
}

in_every_mode! {
    fn s9_exec_gives_code_and_both_outputs(version) {
        let daemon = Daemon::start(version);
        let container = PodSpec::new("exec").run(&daemon).sleeper("one");
        for code in [0, 1, 42, 255] {
            let script = format!("echo out; echo err >&2; exit {code}");
            let expected = Executed { code, stdout: "out\n".to_owned(), stderr: "err\n".to_owned() };
            assert_eq!(container.exec(&["sh", "-c", &script]), expected);
        }
        assert_eq!(container.exec(&["sh", "-c", "kill -9 $$"]).code, 137);
        assert_eq!(container.exec(&["sh", "-c", "kill -TERM $$"]).code, 143);
        let long = container.exec(&["seq", "1", "20000"]);
        assert_eq!(long.stdout.lines().count(), 20_000);
        assert!(long.stdout.ends_with("20000\n"));
        daemon.end();
    }

    fn s9_exec_of_nothing_is_an_error_and_changes_nothing(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("exec").run(&daemon);
        let container = pod.sleeper("one");
        let failure = container.try_exec(&["/no/such/program"]).unwrap_err();
        assert!(failure.0.contains("/no/such/program"), "{failure}");
        assert_eq!(container.output(&["echo", "fine"]), "fine");
        container.stop(0);
        container.wait();
        container.try_exec(&["true"]).unwrap_err();
        daemon.end();
    }

    fn s9_an_exec_that_takes_too_long_is_killed(version) {
        let daemon = Daemon::start(version);
        let container = PodSpec::new("exec").run(&daemon).sleeper("one");
        let begin = Instant::now();
        let failure = container.try_exec_for(&["sleep", "1234"], 1).unwrap_err();
        assert!(failure.0.contains("DeadlineExceeded"), "{failure}");
        assert!(begin.elapsed() < Duration::from_secs(8));
        eventually(Duration::from_secs(3), || {
            let seen = container.shell("cat /proc/[0-9]*/cmdline | tr '\\0' ' '");
            ok_if(!seen.contains("sleep 1234"), || seen)
        });
        daemon.end();
    }

    fn s9_a_background_child_of_an_exec_does_not_hold_it_for_ever(version) {
        if version == Version::V1_6 {
            left_out!("1.6 has no drain_exec_sync_io_timeout: it waits as long as the output is open");
        }
        let options = Options { cri: "drain_exec_sync_io_timeout = '2s'".to_owned(), ..Options::default() };
        let daemon = Daemon::with(version, &options);
        let container = PodSpec::new("exec").run(&daemon).sleeper("one");
        // The child keeps the output open: CRI waits for the configured time, and then fails the call.
        let begin = Instant::now();
        let failure = container.try_exec_for(&["sh", "-c", "sleep 300 & echo done"], 20).unwrap_err();
        assert!(failure.0.contains("io"), "{failure}");
        assert!(begin.elapsed() < Duration::from_secs(18), "{:?}", begin.elapsed());
        assert_eq!(container.output(&["echo", "next"]), "next");
        daemon.end();
    }

    fn s9_many_execs(version) {
        let daemon = Daemon::start(version);
        let container = PodSpec::new("exec").run(&daemon).sleeper("one");
        for number in 0..20 {
            assert_eq!(container.output(&["echo", &number.to_string()]), number.to_string());
        }
        let left = container.shell("cat /proc/[0-9]*/stat | cut -d ' ' -f 3 | sort | tr -d '\\n'");
        assert!(!left.contains('Z'), "{left}");
        daemon.end();
    }

    fn s9_exit_codes(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("codes").run(&daemon);
        for (number, (script, code)) in [
            ("exit 0", 0),
            ("exit 42", 42),
            ("exit 255", 255),
            // A signal of its own does not end PID 1 of a namespace, but ends a child.
            ("sh -c 'kill -TERM $$'; exit $?", 143),
        ]
        .into_iter()
        .enumerate()
        {
            let container = pod.container(&format!("c{number}")).shell(script).start();
            assert_eq!(container.wait(), code, "{script}");
        }
        let container = pod.sleeper("killed");
        kill(container.pid(), Signal::KILL);
        assert_eq!(container.wait(), 137);
        daemon.end();
    }

    fn s9_containers_that_end_at_once(version) {
        let daemon = Daemon::start(version);
        let events = daemon.events();
        let pod = PodSpec::new("quick").run(&daemon);
        for number in 0..8 {
            let container = pod.container(&format!("c{number}")).shell(&format!("echo number {number}; exit 3")).start();
            assert_eq!(container.wait(), 3);
            eventually(Duration::from_secs(3), || {
                let lines = container.log_lines("stdout");
                ok_if(lines == [format!("number {number}")], || format!("{lines:?}"))
            });
            assert_events(&events, &container.id, &["create", "start", "exit", "delete"]);
        }
        daemon.end();
    }

    fn s9_events_in_order(version) {
        let daemon = Daemon::start(version);
        let events = daemon.events();
        let pod = PodSpec::new("events").run(&daemon);
        let of_the_sandbox = |topics: &[&str]| {
            if version.sandboxes_are_tasks() {
                assert_events(&events, &pod.id, topics);
            }
        };
        of_the_sandbox(&["create", "start"]);
        let container = pod.sleeper("one");
        assert_events(&events, &container.id, &["create", "start"]);
        container.output(&["true"]);
        eventually(Duration::from_secs(5), || {
            let seen = events.of(&container.id);
            let topics: Vec<&str> = seen.iter().map(|topic| topic.split(':').next().unwrap()).collect();
            ok_if(topics == ["create", "start", "exec-added", "exec-started", "exit"], || format!("{seen:?}"))
        });
        container.stop(0);
        container.wait();
        eventually(Duration::from_secs(5), || {
            let seen = events.of(&container.id);
            ok_if(seen.ends_with(&["exit".to_owned(), "delete".to_owned()]), || format!("{seen:?}"))
        });
        let exit = events.bodies(&container.id).into_iter().rfind(|event| event.topic == "/tasks/exit").unwrap();
        assert_eq!(exit.body["exit_status"], 137);
        pod.stop();
        // 2.1 deletes the sandbox's task now and then only here.
        pod.remove();
        of_the_sandbox(&["create", "start", "exit", "delete"]);
        if version.sandboxes_are_tasks() {
            let exit = events.bodies(&pod.id).into_iter().find(|event| event.topic == "/tasks/exit").unwrap();
            assert_eq!(exit.body["exit_status"], 137, "StopPodSandbox kills the sandbox");
        } else {
            // containerd's own events (/sandbox/…) tell of the sandbox. There are no task events, but for the two that
            // containerd itself publishes for every shim that has gone.
            let seen = events.of(&pod.id);
            assert!(seen.iter().all(|topic| ["exit", "delete"].contains(&topic.as_str())), "{seen:?}");
        }
        daemon.end();
    }

    fn s9_an_execs_exit_comes_before_its_containers(version) {
        let daemon = Daemon::start(version);
        let events = daemon.events();
        let pod = PodSpec::new("events").run(&daemon);
        let container = pod.sleeper("one");
        let fifos = daemon.directory().join("fifo");
        let exec = ["tasks", "exec", "--detach", "--exec-id", "long", "--fifo-dir", fifos.to_str().unwrap()];
        daemon.ctr_in("k8s.io", &[&exec[..], &[&container.id, "sleep", "3600"]].concat());
        container.stop(0);
        assert_eq!(container.wait(), 137);
        eventually(Duration::from_secs(5), || {
            let seen = events.of(&container.id);
            let place = |topic: &str| seen.iter().position(|seen| seen == topic);
            match (place("exit:long"), place("exit")) {
                (Some(of_exec), Some(of_init)) if of_exec < of_init => Ok(()),
                _ => Err(format!("{seen:?}")),
            }
        });
        // The client of a detached exec must remove the FIFOs.
        std::fs::remove_dir_all(&fifos).unwrap();
        daemon.end();
    }

    fn s9_logs_are_complete(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("logs").run(&daemon);
        let container = pod.container("one").probe().command(&["/probe", "spray", "5000"]).start();
        assert_eq!(container.wait(), 0);
        for (stream, word) in [("stdout", "out"), ("stderr", "err")] {
            eventually(Duration::from_secs(5), || {
                let lines = container.log_lines(stream);
                ok_if(lines.len() == 5000, || format!("{stream}: {} lines", lines.len()))
            });
            for (number, line) in container.log_lines(stream).iter().enumerate() {
                assert_eq!(*line, format!("{word} {number}"));
            }
        }
        daemon.end();
    }

    fn s9_stop_asks_first(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("stop").run(&daemon);
        let script = "trap 'echo ending; exit 7' TERM; echo ready; while true; do sleep 0.1; done";
        let polite = pod.container("polite").shell(script).start();
        let stubborn = pod.container("stubborn").shell("trap '' TERM; echo ready; while true; do sleep 0.1; done").start();
        for container in [&polite, &stubborn] {
            eventually(Duration::from_secs(5), || ok_if(!container.log_lines("stdout").is_empty(), || "not up".to_owned()));
        }
        polite.stop(10);
        assert_eq!(polite.wait(), 7);
        stubborn.stop(1);
        assert_eq!(stubborn.wait(), 137);
        daemon.end();
    }

    fn s9_a_container_is_restarted_many_times(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("crashing").run(&daemon);
        let steady = pod.sleeper("steady");
        for attempt in 0..8 {
            let container = pod.container("crash").attempt(attempt).shell("hostname; exit 1").start();
            assert_eq!(container.wait(), 1);
            container.remove();
        }
        assert!(steady.running());
        assert_eq!(daemon.shims().len(), 1);
        daemon.end();
    }

    fn s9_many_containers_in_a_pod(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("many").run(&daemon);
        let containers: Vec<_> = (0..12).map(|number| pod.sleeper(&format!("c{number}"))).collect();
        assert_eq!(daemon.shims().len(), 1);
        for container in &containers {
            assert_eq!(container.output(&["hostname"]), "many");
        }
        // All at once: the pod's end, not each container's.
        pod.stop();
        for container in &containers {
            assert_eq!(container.wait(), 137);
        }
        daemon.end();
    }

    fn s9_resources_are_updated_in_place(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("update").run(&daemon);
        let container = pod.container("one").memory_limit(64 << 20).command(&["sleep", "3600"]).start();
        let limit = || {
            // The file of cgroup v1, else that of v2.
            let path = fs::read_to_string(format!("/proc/{}/cgroup", container.pid())).unwrap();
            let of = |prefix: &str| path.lines().find_map(|line| line.split_once(prefix).map(|(_, path)| path.to_owned()));
            let v1 = of(":memory:").map(|path| format!("/sys/fs/cgroup/memory{path}/memory.limit_in_bytes"));
            let v2 = of("0::").map(|path| format!("/sys/fs/cgroup{path}/memory.max"));
            let text = [v1, v2].into_iter().flatten().find_map(|file| fs::read_to_string(file).ok());
            text.unwrap_or_else(|| panic!("no memory limit for {path}")).trim().to_owned()
        };
        assert_eq!(limit(), (64 << 20).to_string());
        container.update(LinuxContainerResources { memory_limit_in_bytes: 128 << 20, ..Default::default() });
        assert_eq!(limit(), (128 << 20).to_string());
        assert!(container.running());
        daemon.end();
    }

    fn s9_stats(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("stats").run(&daemon);
        let container = pod.container("one").shell("while true; do :; done").start();
        let cpu = || container.stats().cpu.unwrap_or_default().usage_core_nano_seconds.unwrap_or_default().value;
        let first = eventually(Duration::from_secs(5), || {
            let now = cpu();
            ok_if(now > 0, || "no cpu time".to_owned()).map(|()| now)
        });
        eventually(Duration::from_secs(5), || ok_if(cpu() > first, || "cpu time stands still".to_owned()));
        let memory = container.stats().memory.unwrap_or_default().working_set_bytes.unwrap_or_default().value;
        assert!((4096..1 << 30).contains(&memory), "{memory}");
        daemon.end();
    }

    fn s9_a_terminal(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("tty").run(&daemon);
        let container = pod.container("one").tty().shell("tty; stty -a | head -n 1; exec sleep 3600").start();
        eventually(Duration::from_secs(5), || {
            let lines = container.log_lines("stdout");
            ok_if(lines.iter().any(|line| line.starts_with("/dev/pts/")), || format!("{lines:?}"))
        });
        assert_eq!(container.exec(&["sh", "-c", "exit 5"]).code, 5);
        daemon.end();
    }

    fn s9_created_and_never_started(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("created").run(&daemon);
        let created = pod.container("one").command(&["sleep", "3600"]).create();
        let _also = pod.container("two").command(&["sleep", "3600"]).create();
        created.remove();
        daemon.end();
    }

    fn s9_an_empty_pod_comes_and_goes(version) {
        let daemon = Daemon::start(version);
        for _ in 0..5 {
            let pod = PodSpec::new("empty").run(&daemon);
            assert!(pod.ready());
            pod.stop();
            assert!(!pod.ready());
            // Stopping twice is nothing special.
            pod.stop();
            pod.remove();
            daemon.assert_nothing_left();
        }
        daemon.end();
    }

    fn s9_sysctls_are_the_pods(version) {
        let daemon = Daemon::start(version);
        let keys = ["net.ipv4.ip_unprivileged_port_start", "kernel.shm_rmid_forced", "fs.mqueue.msg_max"];
        let path = |key: &str| format!("/proc/sys/{}", key.replace('.', "/"));
        let before = keys.map(|key| fs::read_to_string(path(key)).unwrap());
        let pod = PodSpec::new("sysctls").sysctl(keys[0], "77").sysctl(keys[1], "1").sysctl(keys[2], "33").run(&daemon);
        let container = pod.sleeper("one");
        for (key, value) in keys.iter().zip(["77", "1", "33"]) {
            assert_eq!(container.output(&["cat", &path(key)]), value, "{key}");
        }
        assert_eq!(keys.map(|key| fs::read_to_string(path(key)).unwrap()), before, "the node's changed");
        daemon.end();
    }

    fn s9_the_pods_files(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("files").dns("192.0.2.53", "example.test").run(&daemon);
        let container = pod.sleeper("one");
        let resolv = container.output(&["cat", "/etc/resolv.conf"]);
        assert!(resolv.contains("nameserver 192.0.2.53") && resolv.contains("example.test"), "{resolv}");
        assert!(container.output(&["cat", "/etc/hosts"]).contains("127.0.0.1"));
        daemon.end();
    }
}
