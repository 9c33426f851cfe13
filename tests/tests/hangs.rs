//! What hangs — a start, a checkpoint — holds the end of a container back for a bounded time only.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test reports by failing"
)]

use std::time::Duration;

use containerd_shim_protos::api::{CheckpointTaskRequest, Empty, Status};
use containerd_shim_protos::ttrpc::Code;
use rustix::process::Signal;
use shim_tests::calls::{Shim, Streams, code};
use shim_tests::cri_calls::Calls;
use shim_tests::direct::{Group, Tasks};
use shim_tests::hold::Hold;
use shim_tests::until::ok_if;
use shim_tests::{Daemon, PodSpec, eventually, on_every_containerd, ours_only, proc};

const SLEEP: &[&str] = &["sleep", "3600"];
/// Longer than a runc that hangs may hold anything back.
const BOUND: Duration = Duration::from_secs(25);

#[track_caller]
fn status(shim: &Shim, id: &str, exec: &str) -> Status {
    shim.state(id, exec).unwrap().status.unwrap()
}

/// The init has ended, as far as the shim knows: a Kill says so.
#[track_caller]
fn wait_until_known_dead(shim: &Shim, id: &str) {
    eventually(Duration::from_secs(10), || {
        let answer = shim.kill(id, "", 9);
        ok_if(code(&answer) == Code::NOT_FOUND, || format!("{answer:?}"))
    });
}

on_every_containerd! {
    fn an_exec_that_hangs_does_not_hold_back_the_end_of_its_container(version) {
        ours_only!("the stock shim waits for runc exec without an end");
        let daemon = Daemon::start(version);
        let hold = Hold::install(&daemon);
        let group = Group::start(&daemon, "hung");
        let tasks: &Tasks = &group;
        let shim = &tasks.shim;
        // Before the work of runc, and when the process runs already.
        for point in ["exec", "exec-done"] {
            group.run("c", "exec sleep 3600");
            shim.exec("c", "hung", SLEEP, &Streams::default()).unwrap();
            hold.hold(point);
            std::thread::scope(|scope| {
                let start = scope.spawn(|| tasks.shim.start("c", "hung"));
                hold.wait_until_held(point);
                let wait = scope.spawn(|| tasks.shim.wait_for("c", "", BOUND));
                let wait_for_exec = scope.spawn(|| tasks.shim.wait_for("c", "hung", BOUND));
                shim.kill("c", "", 9).unwrap();
                wait_until_known_dead(shim, "c");
                // State and Wait agree. An exec may be added, as with the stock shim, and does not start.
                let (seen, waits) = (status(shim, "c", ""), !wait.is_finished());
                let added = shim.exec("c", "late", SLEEP, &Streams::default());
                let late = shim.start("c", "late");
                assert_eq!(wait.join().unwrap().expect(point), 137);
                assert_eq!((seen, waits), (Status::RUNNING, true), "{point}");
                assert_eq!((code(&added), code(&late)), (Code::OK, Code::FAILED_PRECONDITION), "{point}");
                assert_eq!(code(&start.join().unwrap()), Code::FAILED_PRECONDITION, "{point}");
                assert_eq!(wait_for_exec.join().unwrap().unwrap(), 255);
            });
            assert_eq!(status(shim, "c", ""), Status::STOPPED);
            for exec in ["hung", "late"] {
                assert_eq!(status(shim, "c", exec), Status::CREATED);
                shim.delete("c", exec).unwrap();
            }
            hold.release(point);
            group.remove("c");
        }
        group.end();
        daemon.end();
    }

    fn a_start_that_hangs_does_not_hold_back_the_end_of_its_container(version) {
        ours_only!("the stock shim waits for runc start without an end");
        let daemon = Daemon::start(version);
        let hold = Hold::install(&daemon);
        let group = Group::start(&daemon, "hung");
        let tasks: &Tasks = &group;
        group.create("c", "exec sleep 3600").unwrap();
        hold.hold("start");
        std::thread::scope(|scope| {
            let start = scope.spawn(|| tasks.shim.start("c", ""));
            hold.wait_until_held("start");
            let wait = scope.spawn(|| tasks.shim.wait_for("c", "", BOUND));
            tasks.shim.kill("c", "", 9).unwrap();
            assert_eq!(wait.join().unwrap().unwrap(), 137);
            assert_eq!(code(&start.join().unwrap()), Code::FAILED_PRECONDITION);
        });
        assert_eq!(status(&group.shim, "c", ""), Status::STOPPED);
        hold.release("start");
        group.remove("c");
        group.end();
        daemon.end();
    }

    fn a_checkpoint_that_hangs_does_not_hold_back_the_end_of_its_container(version) {
        ours_only!("the stock shim tells of the end without waiting for criu");
        let daemon = Daemon::start(version);
        let hold = Hold::install(&daemon);
        let group = Group::start(&daemon, "hung");
        let tasks: &Tasks = &group;
        group.run("c", "exec sleep 3600");
        let request = CheckpointTaskRequest {
            id: "c".to_owned(),
            path: daemon.directory().join("image").display().to_string(),
            ..CheckpointTaskRequest::default()
        };
        hold.hold("checkpoint");
        std::thread::scope(|scope| {
            let save = scope.spawn(|| tasks.shim.call::<Empty>("Checkpoint", &request));
            hold.wait_until_held("checkpoint");
            let wait = scope.spawn(|| tasks.shim.wait_for("c", "", BOUND));
            tasks.shim.kill("c", "", 9).unwrap();
            wait_until_known_dead(&tasks.shim, "c");
            let seen = status(&tasks.shim, "c", "");
            assert_eq!(wait.join().unwrap().unwrap(), 137);
            assert_eq!(seen, Status::RUNNING);
            assert_eq!(code(&save.join().unwrap()), Code::FAILED_PRECONDITION);
        });
        hold.release("checkpoint");
        group.remove("c");
        group.end();
        daemon.end();
    }

    fn sigkill_and_delete_end_an_exec_whose_start_hangs(version) {
        ours_only!("a Kill waits for the stock shim's runc exec without an end");
        let daemon = Daemon::start(version);
        let hold = Hold::install(&daemon);
        let group = Group::start(&daemon, "hung");
        let tasks: &Tasks = &group;
        let shim = &tasks.shim;
        group.run("c", "exec sleep 3600");
        for point in ["exec", "exec-done"] {
            shim.exec("c", "hung", SLEEP, &Streams::default()).unwrap();
            hold.hold(point);
            std::thread::scope(|scope| {
                let start = scope.spawn(|| tasks.shim.start("c", "hung"));
                hold.wait_until_held(point);
                if point == "exec" {
                    shim.delete("c", "hung").unwrap();
                } else {
                    // The process is killed by the end of its start. The Kill finds none, as before a Start.
                    assert_eq!(code(&shim.kill("c", "hung", 9)), Code::FAILED_PRECONDITION);
                    shim.delete("c", "hung").unwrap();
                }
                assert_eq!(code(&start.join().unwrap()), Code::FAILED_PRECONDITION, "{point}");
            });
            hold.release(point);
            eventually(Duration::from_secs(5), || {
                let pids = shim.pids("c").unwrap();
                ok_if(pids.len() == 1, || format!("{point}: {pids:?}"))
            });
        }
        shim.exec("c", "works", &["true"], &Streams::default()).unwrap();
        shim.start("c", "works").unwrap();
        assert_eq!(shim.wait("c", "works").unwrap(), 0);
        group.remove("c");
        group.end();
        daemon.end();
    }

    fn a_container_of_cri_ends_whose_exec_hangs(version) {
        ours_only!("the stock shim waits for runc exec without an end");
        let daemon = Daemon::start(version);
        let hold = Hold::install(&daemon);
        let pod = PodSpec::new("hung").run(&daemon);
        let container = pod.sleeper("one");
        hold.hold("exec");
        let (calls, id) = (Calls::new(&daemon.names), container.id.clone());
        let exec = std::thread::spawn(move || calls.exec(&id, &["true"]).is_err());
        hold.wait_until_held("exec");
        proc::kill(container.pid(), Signal::KILL);
        eventually(BOUND, || ok_if(!container.running(), || "runs for CRI".to_owned()));
        assert_eq!(container.wait(), 137);
        assert!(exec.join().unwrap());
        hold.release("exec");
        pod.stop();
        pod.remove();
        daemon.end();
    }
}
