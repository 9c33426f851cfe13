//! S8: containerd or the shim is killed.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::time::Duration;

use rustix::process::Signal;
use shim_tests::proc::kill;
use shim_tests::until::so;
use shim_tests::{Daemon, PodSpec, eventually, in_every_mode};

/// What is left of the pod; what CRI itself keeps until StopPodSandbox (its netns mount, /dev/shm, the link) left out.
fn left_of_the_pod(daemon: &Daemon) -> Vec<String> {
    daemon
        .left()
        .into_iter()
        .filter(|line| !line.contains("/io.containerd.grpc.v1.cri/") && !line.starts_with("link "))
        .collect()
}

/// Kills the daemon's only shim, and waits until nothing is left of its pod: five seconds at the most.
#[track_caller]
fn kill_the_shim(daemon: &Daemon) {
    daemon.look();
    kill(daemon.shim().pid, Signal::KILL);
    eventually(Duration::from_secs(5), || {
        let left = left_of_the_pod(daemon);
        so(left.is_empty(), || {
            format!("left behind:\n  {}", left.join("\n  "))
        })
    });
}

in_every_mode! {
    fn s8_a_killed_shim_leaves_nothing(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("killed").run(&daemon);
        let (_one, _two) = (pod.sleeper("one"), pod.container("two").shell("sleep 3600 & sleep 3600").start());
        kill_the_shim(&daemon);
        eventually(Duration::from_secs(5), || so(!pod.ready(), || "CRI still calls the pod ready".to_owned()));
        daemon.end();
    }

    fn s8_a_killed_shim_of_a_shared_process_namespace_leaves_nothing(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("killed").shared_processes().run(&daemon);
        let (_one, _two) = (pod.sleeper("one"), pod.container("two").shell("sleep 3600 & sleep 3600").start());
        kill_the_shim(&daemon);
        daemon.end();
    }

    fn s8_a_killed_shim_without_containers_leaves_nothing(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("killed").run(&daemon);
        kill_the_shim(&daemon);
        eventually(Duration::from_secs(5), || so(!pod.ready(), || "CRI still calls the pod ready".to_owned()));
        daemon.end();
    }

    fn s8_the_pod_is_usable_after_a_restart_of_containerd(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("stays").run(&daemon);
        let one = pod.container("one").shell("i=0; while true; do i=$((i+1)); echo line $i; sleep 0.1; done").start();
        let (pid, sandbox, ip) = (one.pid(), pod.pid(), pod.ip());
        eventually(Duration::from_secs(5), || so(!one.log_lines("stdout").is_empty(), || "no log".to_owned()));
        let shim = daemon.shim();

        daemon.kill();
        assert!(shim.alive());
        daemon.start_again();

        assert!(pod.ready() && one.running());
        assert_eq!((one.pid(), pod.pid(), pod.ip()), (pid, sandbox, ip));
        assert_eq!(one.output(&["echo", "exec works"]), "exec works");
        let two = pod.sleeper("two");
        // The same process; how many threads it has just now is its own business.
        let now = daemon.shim();
        assert_eq!((now.pid, now.start), (shim.pid, shim.start));
        assert_eq!(two.shell("hostname"), "stays");
        // Nothing that was printed meanwhile is lost.
        let seen = one.log_lines("stdout").len();
        eventually(Duration::from_secs(5), || {
            let lines = one.log_lines("stdout");
            so(lines.len() > seen + 3, || format!("{} lines, then {}", seen, lines.len()))
        });
        for (number, line) in one.log_lines("stdout").iter().enumerate() {
            assert_eq!(*line, format!("line {}", number + 1));
        }
        one.stop(0);
        assert_eq!(one.wait(), 137);
        daemon.end();
    }

    fn s8_an_exit_while_containerd_is_away_is_known_afterwards(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("stays").run(&daemon);
        let marker = daemon.directory().join("go");
        std::fs::create_dir(&marker).unwrap();
        let script = "while [ ! -e /go/now ]; do sleep 0.05; done; exit 42";
        let one = pod.container("one").mount(marker.to_str().unwrap(), "/go").shell(script).start();
        let pid = one.pid();
        daemon.kill();
        std::fs::write(marker.join("now"), "").unwrap();
        eventually(Duration::from_secs(5), || {
            let state = shim_tests::proc::Process::of(pid).map(|process| process.state);
            so(matches!(state, None | Some('Z')), || format!("the container still runs: {state:?}"))
        });
        daemon.start_again();
        assert_eq!(one.wait(), 42);
        daemon.end();
    }
}
