//! The ttrpc code of each call in each state and race, asked of the shim directly. containerd branches on these codes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use containerd_shim_protos::api::{Empty, ResizePtyRequest};
use containerd_shim_protos::ttrpc::Code;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use shim_tests::calls::{Answer, Streams, code};
use shim_tests::daemon::Events;
use shim_tests::direct::{Group, Tasks};
use shim_tests::hold::Hold;
use shim_tests::lab::ShimUnderTest;
use shim_tests::slot::text;
use shim_tests::until::ok_if;
use shim_tests::{Daemon, eventually, on_every_containerd, ours_only};

/// The code of the shim under test: `ours` or `stock`.
fn ours_or_stock(ours: Code, stock: Code) -> Code {
    match ShimUnderTest::get() {
        ShimUnderTest::Pause => ours,
        ShimUnderTest::Runc => stock,
    }
}

/// The code of a call that does not fit the state. The stock shim has no code for such calls.
fn misfit_code() -> Code {
    ours_or_stock(Code::FAILED_PRECONDITION, Code::UNKNOWN)
}

#[track_caller]
fn assert_code<T: std::fmt::Debug>(answer: &Answer<T>, expected: Code) {
    assert_eq!(code(answer), expected, "{answer:?}");
}

#[track_caller]
fn assert_events(events: &Events, container: &str, expected: &[&str]) {
    eventually(Duration::from_secs(20), || {
        let seen = events.of(container);
        ok_if(seen == expected, || {
            format!("events {seen:?}, expected {expected:?}")
        })
    });
}

fn resize(group: &Group<'_>, id: &str, exec: &str) -> Answer<Empty> {
    let request = ResizePtyRequest {
        id: id.to_owned(),
        exec_id: exec.to_owned(),
        width: 80,
        height: 24,
        ..ResizePtyRequest::default()
    };
    group.shim.call("ResizePty", &request)
}

on_every_containerd! {
    fn unknown_ids_are_not_found(version) {
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "unknown");
        let shim = &group.shim;
        group.run("there", "sleep 3600");
        // An unknown task, and an unknown exec of a known task.
        for (id, exec) in [("nobody", ""), ("there", "nobody")] {
            assert_code(&shim.state(id, exec), Code::NOT_FOUND);
            assert_code(&shim.start(id, exec), Code::NOT_FOUND);
            assert_code(&shim.wait(id, exec), Code::NOT_FOUND);
            assert_code(&shim.kill(id, exec, 9), Code::NOT_FOUND);
            assert_code(&shim.delete(id, exec), Code::NOT_FOUND);
            assert_code(&resize(&group, id, exec), Code::NOT_FOUND);
            assert!(group.shim.close_stdin(id, exec).is_err());
        }
        assert_code(&shim.exec("nobody", "e", &["sh", "-c", "true"], &Streams::default()), Code::NOT_FOUND);
        assert_code(&shim.pids("nobody"), Code::NOT_FOUND);
        assert_code(&group.shim.stats("nobody"), Code::NOT_FOUND);
        assert_code(&group.shim.pause("nobody"), Code::NOT_FOUND);
        assert_code(&group.shim.resume("nobody"), Code::NOT_FOUND);
        // Not an error: a restarted containerd makes this call before any other.
        assert_eq!(shim.pids_of("nobody").unwrap().task_pid, 0);
        group.remove("there");
        group.end();
        daemon.end();
    }

    fn a_call_that_does_not_fit_the_state(version) {
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "states");
        let shim = &group.shim;
        let none = Streams::default();
        let pid = group.create("c", "sleep 3600").unwrap();
        assert_eq!(shim.pids_of("c").unwrap().task_pid, pid);
        // The stock shim leaves this one to runc.
        assert_code(&group.create("c", "true"), ours_or_stock(Code::ALREADY_EXISTS, Code::UNKNOWN));
        assert_code(&group.shim.pause("c"), misfit_code());
        assert_code(&group.shim.resume("c"), misfit_code());
        shim.start("c", "").unwrap();
        assert_code(&shim.start("c", ""), misfit_code());
        assert_code(&shim.delete("c", ""), misfit_code());
        assert_code(&group.shim.resume("c"), misfit_code());
        group.shim.pause("c").unwrap();
        assert_code(&group.shim.pause("c"), misfit_code());
        assert_code(&shim.delete("c", ""), misfit_code());
        assert_code(&shim.exec("c", "e", &["sh", "-c", "true"], &none), misfit_code());
        group.shim.resume("c").unwrap();
        // An exec: known, running, ended.
        shim.exec("c", "e", &["sh", "-c", "sleep 3600"], &none).unwrap();
        assert_code(&shim.exec("c", "e", &["sh", "-c", "true"], &none), Code::ALREADY_EXISTS);
        assert_code(&shim.kill("c", "e", 9), Code::FAILED_PRECONDITION);
        shim.start("c", "e").unwrap();
        assert_code(&shim.start("c", "e"), misfit_code());
        assert_code(&shim.delete("c", "e"), misfit_code());
        assert_code(&shim.exec("c", "e", &["sh", "-c", "true"], &none), Code::ALREADY_EXISTS);
        shim.kill("c", "e", 9).unwrap();
        assert_eq!(shim.wait("c", "e").unwrap(), 137);
        assert_code(&shim.kill("c", "e", 9), Code::NOT_FOUND);
        assert_code(&shim.start("c", "e"), misfit_code());
        assert_eq!(shim.delete("c", "e").unwrap(), 137);
        assert_code(&shim.delete("c", "e"), Code::NOT_FOUND);
        // The same for the init.
        shim.exec("c", "late", &["sh", "-c", "true"], &none).unwrap();
        shim.kill("c", "", 9).unwrap();
        assert_eq!(shim.wait("c", "").unwrap(), 137);
        assert_code(&shim.kill("c", "", 9), Code::NOT_FOUND);
        assert_code(&shim.start("c", ""), misfit_code());
        assert_code(&group.shim.pause("c"), misfit_code());
        assert_code(&shim.exec("c", "f", &["sh", "-c", "true"], &none), misfit_code());
        assert_code(&shim.start("c", "late"), Code::FAILED_PRECONDITION);
        assert_eq!(shim.delete("c", "").unwrap(), 137);
        assert_code(&shim.delete("c", ""), Code::NOT_FOUND);
        assert_code(&shim.wait("c", ""), Code::NOT_FOUND);
        group.remove_bundle("c");
        group.end();
        daemon.end();
    }

    fn a_container_that_ends_before_it_is_started(version) {
        let daemon = Daemon::start(version);
        let events = daemon.events();
        let group = Group::start(&daemon, "early");
        let shim = &group.shim;
        group.create("c", "true").unwrap();
        shim.kill("c", "", 9).unwrap();
        assert_eq!(shim.wait("c", "").unwrap(), 137);
        assert_code(&shim.start("c", ""), misfit_code());
        assert_eq!(shim.delete("c", "").unwrap(), 137);
        assert_events(&events, "c", &["create", "exit", "delete"]);
        group.remove_bundle("c");
        // A Delete of a created container also ends the container.
        group.create("d", "true").unwrap();
        shim.delete("d", "").unwrap();
        assert_code(&shim.state("d", ""), Code::NOT_FOUND);
        group.remove_bundle("d");
        group.end();
        daemon.end();
    }

    fn an_exec_before_the_start_of_its_container(version) {
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "before");
        let shim = &group.shim;
        group.create("c", "sleep 3600").unwrap();
        shim.exec("c", "e", &["sh", "-c", "exit 5"], &Streams::default()).unwrap();
        shim.start("c", "e").unwrap();
        assert_eq!(shim.wait("c", "e").unwrap(), 5);
        assert_eq!(shim.delete("c", "e").unwrap(), 5);
        shim.start("c", "").unwrap();
        group.remove("c");
        group.end();
        daemon.end();
    }

    fn execs_that_fail_and_execs_with_an_old_id(version) {
        let daemon = Daemon::start(version);
        let events = daemon.events();
        let group = Group::start(&daemon, "ids");
        let shim = &group.shim;
        let none = Streams::default();
        group.run("c", "sleep 3600");
        let mut expected = vec!["create".to_owned(), "start".to_owned()];
        for round in 0..3_u32 {
            shim.exec("c", "e", &["/no/such/program"], &none).unwrap();
            let refusal = shim.start("c", "e").unwrap_err();
            assert!(refusal.message.contains("/no/such/program"), "{refusal:?}");
            shim.delete("c", "e").unwrap();
            expected.push("exec-added:e".to_owned());

            shim.exec("c", "e", &["sh", "-c", &format!("exit {round}")], &none).unwrap();
            shim.start("c", "e").unwrap();
            assert_eq!(shim.wait("c", "e").unwrap(), round);
            assert_eq!(shim.delete("c", "e").unwrap(), round);
            expected.extend(["exec-added:e", "exec-started:e", "exit:e"].map(str::to_owned));
        }
        group.remove("c");
        expected.extend(["exit", "delete"].map(str::to_owned));
        let expected: Vec<&str> = expected.iter().map(String::as_str).collect();
        assert_events(&events, "c", &expected);
        group.end();
        daemon.end();
    }

    fn deletes_kills_and_waits_at_once(version) {
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "atonce");
        for round in 0..5 {
            let id = format!("c{round}");
            group.run(&id, "exec sleep 3600");
            let shim = &group.shim;
            std::thread::scope(|scope| {
                let waits: Vec<_> = (0..16).map(|_| scope.spawn(|| shim.wait(&id, ""))).collect();
                let kills: Vec<_> = (0..16).map(|_| scope.spawn(|| shim.kill(&id, "", 9))).collect();
                for kill in kills {
                    let answer = kill.join().unwrap();
                    assert!(matches!(code(&answer), Code::OK | Code::NOT_FOUND), "{answer:?}");
                }
                for wait in waits {
                    assert_eq!(wait.join().unwrap().unwrap(), 137);
                }
                let deletes: Vec<_> = (0..4).map(|_| scope.spawn(|| shim.delete(&id, ""))).collect();
                let answers: Vec<_> = deletes.into_iter().map(|delete| delete.join().unwrap()).collect();
                let (done, others): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
                assert_eq!(done.len(), 1, "{done:?} {others:?}");
                assert_eq!(*done[0].as_ref().unwrap(), 137);
                for other in others {
                    assert_code(&other, Code::NOT_FOUND);
                }
            });
            group.remove_bundle(&id);
        }
        group.end();
        daemon.end();
    }

    fn a_wait_whose_client_is_gone(version) {
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "waits");
        group.run("c", "exec sleep 3600");
        let shim = daemon.shim().pid;
        let fds = || std::fs::read_dir(format!("/proc/{shim}/fd")).unwrap().count();
        // A first client comes and goes: the shim opens some descriptors at the first connection.
        drop(group.connect());
        let before = eventually(Duration::from_secs(5), || Ok(fds()));
        for _ in 0..20 {
            let other = group.connect();
            let answer = other.wait_for("c", "", Duration::from_millis(20));
            assert!(answer.is_err(), "{answer:?}");
        }
        eventually(Duration::from_secs(20), || {
            let now = fds();
            ok_if(now <= before, || format!("{now} fds, {before} before"))
        });
        group.shim.kill("c", "", 9).unwrap();
        assert_eq!(group.shim.wait("c", "").unwrap(), 137);
        group.remove("c");
        group.end();
        daemon.end();
    }

    fn a_shim_without_a_task_ends_when_told(version) {
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "empty");
        let answer = group.create_with("empty", "true", |spec| spec["process"]["cwd"] = json!("no/absolute/path"));
        assert!(answer.is_err(), "{answer:?}");
        assert_code(&group.shim.state("empty", ""), Code::NOT_FOUND);
        // The id is free.
        group.run("empty", "exit 3");
        assert_eq!(group.shim.wait("empty", "").unwrap(), 3);
        // Not while there is something.
        group.shim.shutdown("empty");
        assert_eq!(group.shim.delete("empty", "").unwrap(), 3);
        group.end();
        daemon.end();
    }

    fn the_shims_own_limit_of_open_files_is_not_runcs(version) {
        let highest = getrlimit(Resource::Nofile).maximum;
        setrlimit(Resource::Nofile, Rlimit { current: Some(1000), maximum: highest }).unwrap();
        let daemon = Daemon::start(version);
        // Measured at runc, not in the container: the runc of some distributions raises its own limit, and hands it on.
        let said = daemon.directory().join("limits");
        let runc = daemon.directory().join("bin/runc");
        let script = format!(
            "#!/bin/sh\nulimit -Sn >> {}\nexec {} \"$@\"\n",
            said.display(),
            shim_tests::lab::runc().display(),
        );
        fs::write(&runc, script).unwrap();
        fs::set_permissions(&runc, fs::Permissions::from_mode(0o755)).unwrap();
        let group = Group::start(&daemon, "limits");
        group.run("c", "exec sleep 3600");
        let limits = fs::read_to_string(format!("/proc/{}/limits", daemon.shim().pid)).unwrap();
        let line = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
        assert_ne!(line.split_whitespace().nth(3), Some("1000"), "{line}");
        group.remove("c");
        group.end();
        let said = fs::read_to_string(said).unwrap();
        assert!(said.lines().count() >= 3 && said.lines().all(|limit| limit == "1000"), "{said}");
        daemon.end();
    }

    fn calls_to_an_exec_that_is_being_started_wait_for_it(version) {
        let daemon = Daemon::start(version);
        let hold = Hold::install(&daemon);
        let group = Group::start(&daemon, "early");
        let shim = &group.shim;
        group.run("c", "exec sleep 3600");
        let stdin = daemon.directory().join("in");
        rustix::fs::mkfifoat(rustix::fs::CWD, &stdin, rustix::fs::Mode::RWXU).unwrap();
        let input = Streams { stdin: text(&stdin), ..Streams::default() };
        shim.exec("c", "killed", &["sleep", "3600"], &Streams::default()).unwrap();
        shim.exec("c", "deleted", &["sleep", "3600"], &Streams::default()).unwrap();
        shim.exec("c", "fed", &["cat"], &input).unwrap();
        let tasks: &Tasks = &group;
        // The process runs already; only runc has not ended.
        let early = |exec: &'static str, call: &(dyn Fn() -> Answer<()> + Sync)| -> Answer<()> {
            hold.hold("exec-done");
            std::thread::scope(|scope| {
                let start = scope.spawn(|| tasks.shim.start("c", exec));
                hold.wait_until_held("exec-done");
                let called = scope.spawn(call);
                // Long enough for an answer that does not wait for the start.
                std::thread::sleep(Duration::from_millis(200));
                let waited = !called.is_finished();
                hold.release("exec-done");
                start.join().unwrap().unwrap();
                let answer = called.join().unwrap();
                assert!(waited, "{exec}: {answer:?}");
                answer
            })
        };
        early("killed", &|| tasks.shim.kill("c", "killed", 9)).unwrap();
        assert_eq!(shim.wait("c", "killed").unwrap(), 137);
        assert_code(&early("deleted", &|| tasks.shim.delete("c", "deleted").map(drop)), misfit_code());
        shim.kill("c", "deleted", 9).unwrap();
        assert_eq!(shim.wait("c", "deleted").unwrap(), 137);
        if ShimUnderTest::get() == ShimUnderTest::Pause {
            // The stock shim does not wait here, and the input stays open.
            let mut writer = fs::File::options().read(true).write(true).open(&stdin).unwrap();
            writer.write_all(b"eaten").unwrap();
            early("fed", &|| tasks.shim.close_stdin("c", "fed")).unwrap();
            drop(writer);
            assert_eq!(shim.wait("c", "fed").unwrap(), 0);
        }
        fs::remove_file(&stdin).unwrap();
        for exec in ["killed", "deleted", "fed"] {
            shim.delete("c", exec).unwrap();
        }
        group.remove("c");
        group.end();
        daemon.end();
    }

    fn state_answers_while_runc_hangs(version) {
        let daemon = Daemon::start(version);
        let gate = daemon.directory().join("gate");
        let runc = daemon.directory().join("bin/runc");
        let script = format!(
            "#!/bin/sh\nwhile [ -e {} ]; do sleep 0.05; done\nexec {} \"$@\"\n",
            gate.display(),
            shim_tests::lab::runc().display(),
        );
        fs::write(&runc, script).unwrap();
        fs::set_permissions(&runc, fs::Permissions::from_mode(0o755)).unwrap();
        let group = Group::start(&daemon, "hangs");
        let shim = &group.shim;
        group.run("steady", "exec sleep 3600");
        group.create("c", "exec sleep 3600").unwrap();
        shim.exec("steady", "e", &["sh", "-c", "exit 4"], &Streams::default()).unwrap();
        fs::write(&gate, "").unwrap();
        let tasks: &Tasks = &group;
        std::thread::scope(|scope| {
            // A start, an exec's start and a create, all with a runc that hangs.
            let start = scope.spawn(|| tasks.shim.start("c", ""));
            let exec = scope.spawn(|| tasks.shim.start("steady", "e"));
            let create = scope.spawn(|| tasks.create("d", "true"));
            let mut took = Vec::new();
            for turn in 0..100 {
                let (id, exec) = [("c", ""), ("steady", ""), ("steady", "e")][turn % 3];
                let begin = std::time::Instant::now();
                let answer = tasks.shim.state(id, exec);
                took.push(begin.elapsed());
                assert!(answer.is_ok(), "{answer:?}");
                std::thread::sleep(Duration::from_millis(5));
            }
            // Pids answers, too, while runc hangs.
            tasks.shim.pids("steady").unwrap();
            assert!(!start.is_finished() && !exec.is_finished() && !create.is_finished(), "nothing was held up");
            took.sort_unstable();
            // The median: a busy machine may be slow now and then, but not always.
            assert!(took[50] < Duration::from_millis(100), "{took:?}");
            fs::remove_file(&gate).unwrap();
            start.join().unwrap().unwrap();
            exec.join().unwrap().unwrap();
            create.join().unwrap().unwrap();
        });
        assert_eq!(shim.wait("steady", "e").unwrap(), 4);
        shim.delete("d", "").unwrap();
        group.remove_bundle("d");
        group.remove("c");
        group.remove("steady");
        group.end();
        daemon.end();
    }

    fn callers_hang_up_first(version) {
        ours_only!("the stock shim closes, and containerd has to put up with it");
        let daemon = Daemon::start(version);
        let answers = |name: &str| {
            let group = Group::start(&daemon, name);
            group.run("c", "exit 0");
            group.remove("c");
            let other = group.connect();
            assert_code(&other.state("c", ""), Code::NOT_FOUND);
            // The answer to the last call does not arrive together with the end of the connection, whoever has one.
            group.shim.shutdown(name);
            let answer = other.state("c", "");
            drop(other);
            group.end();
            answer.is_err_and(|refusal| refusal.code == Some(Code::NOT_FOUND))
        };
        // The shim waits for half a second, and a busy machine may hold this test up for as long.
        assert!(["polite", "kind", "patient"].into_iter().any(answers), "the connection ends with the answer");
        daemon.end();
    }

    fn a_delete_ends_a_create_that_hangs(version) {
        ours_only!("the stock shim knows nothing of a container before runc has made it");
        let daemon = Daemon::start(version);
        let gate = daemon.directory().join("gate");
        fs::write(&gate, "").unwrap();
        let group = Group::start(&daemon, "hook");
        // A hook hangs: runc has made the container, its cgroup and its process.
        let hook = format!("touch {0}.seen; while [ -e {0} ]; do sleep 0.05; done", gate.display());
        let bundle = group.bundle("c", "true", |spec| {
            spec["hooks"] = json!({"createRuntime": [{"path": "/bin/sh", "args": ["sh", "-c", hook]}]});
        });
        let tasks: &Tasks = &group;
        let seen = daemon.directory().join("gate.seen");
        std::thread::scope(|scope| {
            let create = scope.spawn(|| tasks.create_from("c", &bundle));
            eventually(Duration::from_secs(20), || ok_if(seen.exists(), || "no hook".to_owned()));
            assert_code(&tasks.shim.delete("c", ""), Code::NOT_FOUND);
            assert_code(&create.join().unwrap(), Code::FAILED_PRECONDITION);
        });
        fs::remove_file(&gate).unwrap();
        // The id is free, and nothing of the first is in the way.
        group.run("c", "exit 6");
        assert_eq!(group.shim.wait("c", "").unwrap(), 6);
        group.remove("c");
        group.end();
        daemon.end();
    }
}
