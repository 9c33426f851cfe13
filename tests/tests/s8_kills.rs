//! S8: containerd or the shim is killed.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::thread::JoinHandle;
use std::time::Duration;

use rustix::process::Signal;
use shim_tests::cri::Cri;
use shim_tests::hold::Hold;
use shim_tests::leaks::grpc_address;
use shim_tests::proc::{Process, kill};
use shim_tests::until::ok_if;
use shim_tests::{Daemon, Pod, PodSpec, eventually, in_every_mode};

/// What is left of the pod, without things that CRI keeps until StopPodSandbox (the mounts of netns and /dev/shm, the
/// link).
fn left_of_the_pod(daemon: &Daemon) -> Vec<String> {
    daemon
        .left()
        .into_iter()
        .filter(|line| !line.contains("/io.containerd.grpc.v1.cri/") && !line.starts_with("link "))
        .collect()
}

/// A bundle, or the bundle's FIFO that containerd makes and reads.
fn is_of_a_bundle(line: &str) -> bool {
    line.starts_with("bundle ") || (line.starts_with("socket or FIFO ") && line.ends_with("/log"))
}

/// Kills the daemon's only shim, and waits until nothing is left of the shim's pod.
#[track_caller]
fn kill_the_shim(daemon: &Daemon) {
    daemon.look();
    kill(daemon.shim().pid, Signal::KILL);
    wait_until_nothing_is_left(daemon);
}

#[track_caller]
fn wait_until_nothing_is_left(daemon: &Daemon) {
    eventually(Duration::from_secs(5), || {
        let left = left_of_the_pod(daemon);
        ok_if(left.is_empty(), || {
            format!("left behind:\n  {}", left.join("\n  "))
        })
    });
}

/// As [`kill_the_shim`], while a runc of the shim is held. The runc is released only after the kill, and must not go on
/// without the shim.
#[track_caller]
fn kill_the_shim_in_a_call(daemon: &Daemon, hold: &Hold, point: &str) {
    daemon.look();
    let shim = daemon.shim();
    kill(shim.pid, Signal::KILL);
    // The shim may be a zombie as long as the held runc delays containerd's `delete`.
    eventually(Duration::from_secs(5), || {
        let lives = Process::of(shim.pid).filter(|now| now.start == shim.start && now.state != 'Z');
        ok_if(lives.is_none(), || "the shim lives on".to_owned())
    });
    hold.release(point);
    wait_until_nothing_is_left(daemon);
}

/// `StartContainer` of a container that sleeps, in a thread. The thread tells whether the call failed.
#[track_caller]
fn start_in_thread(daemon: &Daemon, pod: &Pod<'_>) -> JoinHandle<bool> {
    let id = pod.container("two").command(&["sleep", "3600"]).create().id;
    let address = grpc_address(&daemon.names);
    std::thread::spawn(move || Cri::new(&address).try_start(&id).is_err())
}

/// CRI notices the pod's end, and can remove the pod.
#[track_caller]
fn remove_pod_that_has_ended(daemon: &Daemon, pod: &Pod<'_>) {
    pod.wait_until_not_ready();
    daemon.cri().remove_all_pods();
}

in_every_mode! {
    fn s8_a_killed_shim_leaves_nothing(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("killed").run(&daemon);
        let (_one, _two) = (pod.sleeper("one"), pod.container("two").shell("sleep 3600 & sleep 3600").start());
        kill_the_shim(&daemon);
        pod.wait_until_not_ready();
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
        pod.wait_until_not_ready();
        daemon.end();
    }

    fn s8_a_killed_shim_in_a_create_leaves_nothing(version) {
        let daemon = Daemon::start(version);
        let hold = Hold::install(&daemon);
        for (number, point) in ["create", "create-done"].into_iter().enumerate() {
            let pod = PodSpec::new(&format!("killed{number}")).run(&daemon);
            let _one = pod.sleeper("one");
            hold.hold(point);
            let client = start_in_thread(&daemon, &pod);
            hold.wait_until_held(point);
            kill_the_shim_in_a_call(&daemon, &hold, point);
            assert!(client.join().unwrap(), "a container of a killed shim was started");
            remove_pod_that_has_ended(&daemon, &pod);
        }
        daemon.end();
    }

    fn s8_a_killed_shim_anywhere_in_a_create_leaves_nothing(version) {
        let daemon = Daemon::start(version);
        let hold = Hold::install(&daemon);
        // As long as runc needs for a create, and a bit longer: into the start.
        for milliseconds in [0, 15, 30, 45, 60, 90] {
            let pod = PodSpec::new(&format!("killed{milliseconds}")).run(&daemon);
            hold.hold("create");
            let client = start_in_thread(&daemon, &pod);
            hold.wait_until_held("create");
            hold.release("create");
            // The kill may hit any step: nothing may be left in any case.
            std::thread::sleep(Duration::from_millis(milliseconds));
            daemon.look();
            kill(daemon.shim().pid, Signal::KILL);
            // Of a task that was created and could be neither started nor deleted, containerd keeps the bundle.
            eventually(Duration::from_secs(5), || {
                let left: Vec<_> = left_of_the_pod(&daemon).into_iter().filter(|line| !is_of_a_bundle(line)).collect();
                ok_if(left.is_empty(), || left.join("\n  "))
            });
            let _ = client.join().unwrap();
            remove_pod_that_has_ended(&daemon, &pod);
        }
        // containerd looks for such bundles at its start.
        daemon.kill();
        daemon.start_again();
        daemon.assert_nothing_left();
        daemon.end();
    }

    fn s8_a_killed_shim_in_a_delete_leaves_nothing(version) {
        let daemon = Daemon::start(version);
        let hold = Hold::install(&daemon);
        for (number, point) in ["delete", "delete-done"].into_iter().enumerate() {
            let pod = PodSpec::new(&format!("killed{number}")).run(&daemon);
            let _one = pod.sleeper("one");
            hold.hold(point);
            // containerd deletes the task when it hears of the exit.
            let _two = pod.container("two").shell("exit 3").start();
            hold.wait_until_held(point);
            kill_the_shim_in_a_call(&daemon, &hold, point);
            remove_pod_that_has_ended(&daemon, &pod);
        }
        daemon.end();
    }

    fn s8_the_pod_is_usable_after_a_restart_of_containerd(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("stays").run(&daemon);
        let one = pod.container("one").shell("i=0; while true; do i=$((i+1)); echo line $i; sleep 0.1; done").start();
        let (pid, sandbox, ip) = (one.pid(), pod.pid(), pod.ip());
        eventually(Duration::from_secs(5), || ok_if(!one.log_lines("stdout").is_empty(), || "no log".to_owned()));
        let shim = daemon.shim();

        daemon.kill();
        assert!(shim.alive());
        daemon.start_again();

        assert!(pod.ready() && one.running());
        assert_eq!((one.pid(), pod.pid(), pod.ip()), (pid, sandbox, ip));
        assert_eq!(one.output(&["echo", "exec works"]), "exec works");
        let two = pod.sleeper("two");
        // The same process. The number of threads may differ.
        let now = daemon.shim();
        assert_eq!((now.pid, now.start), (shim.pid, shim.start));
        assert_eq!(two.shell("hostname"), "stays");
        // Nothing that was printed meanwhile is lost, but for a line that containerd had read and not written yet.
        let seen = one.log_lines("stdout").len();
        eventually(Duration::from_secs(5), || {
            let lines = one.log_lines("stdout");
            ok_if(lines.len() > seen + 3, || format!("{} lines, then {}", seen, lines.len()))
        });
        let lines = one.log_lines("stdout");
        let numbers: Vec<usize> = lines.iter().map(|line| line.strip_prefix("line ").unwrap().parse().unwrap()).collect();
        assert!(numbers.is_sorted_by(|one, next| one < next), "{numbers:?}");
        assert!(numbers.last().unwrap() - numbers.len() <= 1, "{numbers:?}");
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
        let init = Process::of(one.pid()).unwrap();
        daemon.kill();
        std::fs::write(marker.join("now"), "").unwrap();
        // Gone, and not only dead: the shim knows.
        eventually(Duration::from_secs(5), || ok_if(!init.alive(), || format!("the container still runs: {}", init.describe())));
        daemon.start_again();
        assert_eq!(one.wait(), 42);
        daemon.end();
    }
}
