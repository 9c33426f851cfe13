//! S8, call by call: containerd dies in the middle of a Task call, and is started again.
//!
//! A `runc` of the test's own, first in containerd's PATH, waits as long as a file is there. So the call is under way in
//! the shim when containerd dies, and ends before containerd is back, or after.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test reports by failing"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use shim_tests::cri::Cri;
use shim_tests::leaks::grpc_address;
use shim_tests::proc::children;
use shim_tests::until::so;
use shim_tests::{Daemon, PodSpec, eventually, lab, on_every_containerd};

/// A runc that can be held up.
struct Hold {
    folder: PathBuf,
}

impl Hold {
    fn install(daemon: &Daemon) -> Self {
        let folder = daemon.directory().join("hold");
        fs::create_dir(&folder).unwrap();
        let script = format!(
            "#!/bin/sh\n\
             for word; do case $word in create|start|exec|delete|update|pause|resume|kill) call=$word; break;; esac; done\n\
             if [ -e {folder}/$call ]; then\n\
             echo > {folder}/$call-held\n\
             while [ -e {folder}/$call ]; do sleep 0.05; done\n\
             fi\n\
             exec {runc} \"$@\"\n",
            folder = folder.display(),
            runc = lab::lab().join("host/runc").display(),
        );
        let program = daemon.directory().join("bin/runc");
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Self { folder }
    }

    /// From now on runc waits in this command.
    fn hold(&self, call: &str) {
        fs::write(self.folder.join(call), "").unwrap();
    }

    /// Waits until a runc waits.
    #[track_caller]
    fn held(&self, call: &str) {
        let sign = self.folder.join(format!("{call}-held"));
        eventually(Duration::from_secs(20), || {
            so(sign.exists(), || format!("no runc {call} has come"))
        });
        fs::remove_file(sign).unwrap();
    }

    fn release(&self, call: &str) {
        fs::remove_file(self.folder.join(call)).unwrap();
    }
}

/// The state of a task, if there is one.
fn state(daemon: &Daemon, id: &str) -> Option<String> {
    daemon.task(id).map(|(_, state)| state)
}

fn quiet(mut command: Command) -> Child {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn ctr(daemon: &Daemon, arguments: &[&str]) -> Command {
    let mut command = daemon.ctr_command();
    command.args(arguments);
    command
}

/// An exec that must work.
#[track_caller]
fn works(daemon: &Daemon, id: &str, exec: &str) {
    let output = daemon
        .ctr_exec(&[], exec, id, &["echo", "works"])
        .output()
        .unwrap();
    assert_eq!(output.stdout, b"works\n", "{output:?}");
}

/// The container's task is made anew, runs, and ends as it should.
#[track_caller]
fn runs_again(daemon: &Daemon, id: &str) {
    let fifos = daemon.directory().join("fifo");
    // What the killed client's containerd knows of the old one goes first, if it knows anything. 1.6 knows nothing of a
    // task before its Create has ended, and then has it.
    eventually(Duration::from_secs(20), || {
        daemon.try_ctr(&["tasks", "delete", "--force", id]);
        let again = daemon.try_ctr(&[
            "tasks",
            "start",
            "--detach",
            "--fifo-dir",
            fifos.to_str().unwrap(),
            id,
        ]);
        so(again.status.success(), || format!("{again:?}"))
    });
    daemon.wait_for_task(id, "RUNNING");
    ends(daemon, id);
}

/// Kills the task, and removes everything.
#[track_caller]
fn ends(daemon: &Daemon, id: &str) {
    daemon.ctr(&["tasks", "kill", "--signal", "SIGKILL", id]);
    daemon.wait_for_task(id, "STOPPED");
    assert_eq!(daemon.delete_task(id), 137);
    assert!(!daemon.try_ctr(&["tasks", "delete", id]).status.success());
    daemon.ctr(&["containers", "delete", id]);
    clear(daemon);
}

/// The FIFOs of a client that died are nobody's.
fn clear(daemon: &Daemon) {
    let fifos = daemon.directory().join("fifo");
    fs::remove_dir_all(&fifos).unwrap();
    fs::create_dir(&fifos).unwrap();
}

const SLEEPS: &[&str] = &["sleep", "3600"];

/// containerd dies in the Create of `c`, which hangs.
#[track_caller]
fn dies_in_a_create(daemon: &Daemon) -> Hold {
    let hold = Hold::install(daemon);
    hold.hold("create");
    let mut client = quiet(daemon.ctr_run(&["--detach"], "c", SLEEPS));
    hold.held("create");
    daemon.kill();
    client.wait().unwrap();
    hold
}

on_every_containerd! {
    fn s8_containerd_dies_in_a_create_that_ends_meanwhile(version) {
        let daemon = Daemon::start(version);
        let hold = dies_in_a_create(&daemon);
        hold.release("create");
        let made = daemon.directory().join("state/io.containerd.runtime.v2.task").join(daemon.names.name()).join("c/init.pid");
        // The wrapper and runc have the same name, and the container's init another one.
        let shim = daemon.shim().pid;
        eventually(Duration::from_secs(20), || {
            let runs = children(shim).iter().any(|child| child.name == "runc");
            so(made.exists() && !runs, || "runc has not made the container".to_owned())
        });
        daemon.start_again();
        daemon.wait_for_task("c", "CREATED");
        // Create again: there is one.
        assert!(!daemon.try_ctr(&["tasks", "start", "--detach", "c"]).status.success());
        runs_again(&daemon, "c");
        daemon.end();
    }

    fn s8_containerd_dies_in_a_create_that_hangs(version) {
        let daemon = Daemon::start(version);
        let hold = dies_in_a_create(&daemon);
        // It must come up all the same.
        daemon.start_again();
        daemon.try_ctr(&["tasks", "delete", "--force", "c"]);
        hold.release("create");
        runs_again(&daemon, "c");
        daemon.end();
    }

    fn s8_containerd_dies_in_a_start(version) {
        let daemon = Daemon::start(version);
        let hold = Hold::install(&daemon);
        for (id, meanwhile) in [("a", true), ("b", false)] {
            hold.hold("start");
            let mut client = quiet(daemon.ctr_run(&["--detach"], id, SLEEPS));
            hold.held("start");
            daemon.kill();
            client.wait().unwrap();
            if meanwhile {
                hold.release("start");
            }
            daemon.start_again();
            if !meanwhile {
                assert_eq!(state(&daemon, id).as_deref(), Some("CREATED"));
                hold.release("start");
            }
            daemon.wait_for_task(id, "RUNNING");
            works(&daemon, id, "after");
            ends(&daemon, id);
        }
        daemon.end();
    }

    fn s8_containerd_dies_in_the_start_of_an_exec(version) {
        let daemon = Daemon::start(version);
        let hold = Hold::install(&daemon);
        daemon.detached(&[], "c", SLEEPS);
        for (exec, meanwhile) in [("a", true), ("b", false)] {
            hold.hold("exec");
            let mark = format!("echo ran > /tmp/{exec}; exec sleep 3600");
            let mut client = quiet(daemon.ctr_exec(&[], exec, "c", &["sh", "-c", &mark]));
            hold.held("exec");
            // First its client, which would remove the FIFOs when it hears of the other's death.
            client.kill().unwrap();
            client.wait().unwrap();
            daemon.kill();
            if meanwhile {
                hold.release("exec");
            }
            daemon.start_again();
            if !meanwhile {
                hold.release("exec");
            }
            // It has run, and runs.
            let look = format!("look-{exec}");
            let ran = format!("while [ ! -e /tmp/{exec} ]; do sleep 0.05; done");
            let found = daemon.ctr_exec(&[], &look, "c", &["sh", "-c", &ran]).output().unwrap();
            assert!(found.status.success(), "{found:?}");
            // The same call again: the id is taken.
            let again = daemon.ctr_exec(&[], exec, "c", &["true"]).output().unwrap();
            assert!(String::from_utf8_lossy(&again.stderr).contains("already exists"), "{again:?}");
            daemon.ctr(&["tasks", "kill", "--signal", "SIGKILL", "--exec-id", exec, "c"]);
        }
        works(&daemon, "c", "after");
        ends(&daemon, "c");
        daemon.end();
    }

    fn s8_containerd_dies_in_a_delete(version) {
        let daemon = Daemon::start(version);
        let hold = Hold::install(&daemon);
        for (id, meanwhile) in [("a", true), ("b", false)] {
            daemon.detached(&[], id, &["sh", "-c", "exit 7"]);
            daemon.wait_for_task(id, "STOPPED");
            hold.hold("delete");
            let mut client = quiet(ctr(&daemon, &["tasks", "delete", id]));
            hold.held("delete");
            daemon.kill();
            client.wait().unwrap();
            if meanwhile {
                hold.release("delete");
                let record = std::path::Path::new("/run/containerd/runc").join(daemon.names.name()).join(id);
                eventually(Duration::from_secs(20), || so(!record.exists(), || "runc does not delete".to_owned()));
                daemon.start_again();
            } else {
                let bundle = daemon.directory();
                let restart = std::thread::spawn(move || {
                    // With a shim that keeps containerd from starting while it deletes, it would hang here.
                    std::thread::sleep(Duration::from_secs(2));
                    fs::remove_file(bundle.join("hold/delete")).unwrap();
                });
                daemon.start_again();
                restart.join().unwrap();
            }
            // Deleted or still to be deleted: both are right, and nothing stays in either case.
            eventually(Duration::from_secs(20), || {
                daemon.try_ctr(&["tasks", "delete", id]);
                let now = state(&daemon, id);
                so(now.is_none(), || format!("{id} is still there: {now:?}"))
            });
            daemon.ctr(&["containers", "delete", id]);
            clear(&daemon);
            // A shim that has deleted its last container and hears nothing more ends by itself, some time later.
            eventually(Duration::from_secs(50), || so(daemon.shims().is_empty(), || "the shim stays".to_owned()));
            daemon.nothing_left(Duration::from_secs(10));
        }
        daemon.end();
    }

    fn s8_containerd_dies_right_after_a_call(version) {
        let daemon = Daemon::start(version);
        daemon.detached(&[], "c", SLEEPS);
        let calls: [&[&str]; 6] = [
            &["tasks", "pause", "c"],
            &["tasks", "ps", "c"],
            &["tasks", "list"],
            &["tasks", "metrics", "c"],
            &["tasks", "resume", "c"],
            // Its Wait is under way when containerd dies.
            &["tasks", "attach", "c"],
        ];
        for call in calls {
            let mut client = quiet(ctr(&daemon, call));
            // It may be before, in or after the call: each must be survived.
            std::thread::sleep(Duration::from_millis(30));
            daemon.kill();
            let _ = client.kill();
            client.wait().unwrap();
            daemon.start_again();
            // Repeated, it works; or what it asks for is so already.
            let again = match call[1] {
                "attach" => None,
                _ => Some(daemon.try_ctr(call)),
            };
            let now = state(&daemon, "c");
            let expected = if ["resume", "attach"].contains(&call[1]) { "RUNNING" } else { "PAUSED" };
            assert_eq!(now.as_deref(), Some(expected), "after {call:?}: {again:?}");
            if let Some(again) = again.filter(|_| !["pause", "resume"].contains(&call[1])) {
                assert!(again.status.success(), "{call:?}: {again:?}");
            }
        }
        works(&daemon, "c", "after");
        let mut client = quiet(ctr(&daemon, &["tasks", "kill", "--signal", "SIGKILL", "c"]));
        daemon.kill();
        let _ = client.kill();
        client.wait().unwrap();
        daemon.start_again();
        daemon.try_ctr(&["tasks", "kill", "--signal", "SIGKILL", "c"]);
        daemon.wait_for_task("c", "STOPPED");
        assert_eq!(daemon.delete_task("c"), 137);
        daemon.ctr(&["containers", "delete", "c"]);
        clear(&daemon);
        daemon.end();
    }

    fn s8_containerd_dies_in_an_update(version) {
        let daemon = Daemon::start(version);
        let hold = Hold::install(&daemon);
        let pod = PodSpec::new("update").run(&daemon);
        let one = pod.container("one").memory_limit(64 << 20).command(&["sleep", "3600"]).start();
        for (bytes, meanwhile) in [(128, true), (256, false)] {
            hold.hold("update");
            let resources = k8s_cri::v1::LinuxContainerResources { memory_limit_in_bytes: bytes << 20, ..Default::default() };
            let (address, id, sent) = (grpc_address(&daemon.names), one.id.clone(), resources.clone());
            let client = std::thread::spawn(move || Cri::new(&address).try_update(&id, sent).is_err());
            hold.held("update");
            daemon.kill();
            assert!(client.join().unwrap(), "the call is lost with its containerd");
            if meanwhile {
                hold.release("update");
            }
            daemon.start_again();
            if !meanwhile {
                hold.release("update");
            }
            one.update(resources);
            assert!(one.running());
            assert_eq!(one.output(&["echo", "works"]), "works");
        }
        daemon.end();
    }

    fn s8_exits_while_containerd_is_away_keep_their_codes(version) {
        let daemon = Daemon::start(version);
        let go = daemon.directory().join("go");
        fs::create_dir(&go).unwrap();
        let wait = "while [ ! -e /go/now ]; do sleep 0.05; done";
        let pod = PodSpec::new("stays").run(&daemon);
        let codes = [("zero", "exit 0", 0), ("plain", "exit 42", 42), ("signal", "sh -c 'kill -TERM $$'; exit $?", 143)];
        let inside: Vec<_> = codes
            .iter()
            .map(|(name, end, code)| {
                let script = format!("{wait}; {end}");
                let container = pod.container(name).mount(go.to_str().unwrap(), "/go").shell(&script).start();
                (container, *code)
            })
            .collect();
        let tty = pod.container("tty").tty().mount(go.to_str().unwrap(), "/go").shell(&format!("{wait}; exit 5")).start();
        // More than it may have: the kernel ends it.
        let script = format!("{wait}; exec tail /dev/zero");
        let oom = pod.container("oom").mount(go.to_str().unwrap(), "/go").memory_limit(16 << 20).shell(&script).start();
        // An exec that is there when containerd goes.
        assert_eq!(inside[0].0.output(&["echo", "exec"]), "exec");
        let mount = format!("type=bind,src={},dst=/go,options=rbind:rw", go.display());
        let plain: Vec<_> = [("d0", 0), ("d9", 9)]
            .into_iter()
            .inspect(|(id, code)| daemon.detached(&["--mount", &mount], id, &["sh", "-c", &format!("{wait}; exit {code}")]))
            .collect();
        let pids: Vec<i32> = inside.iter().map(|(container, _)| container.pid()).chain([tty.pid(), oom.pid()]).collect();

        daemon.kill();
        fs::write(go.join("now"), "").unwrap();
        eventually(Duration::from_secs(20), || {
            let alive: Vec<_> = pids
                .iter()
                .filter_map(|pid| shim_tests::proc::Process::of(*pid))
                .filter(|process| process.state != 'Z')
                .map(|process| process.describe())
                .collect();
            so(alive.is_empty(), || format!("they still run: {alive:?}"))
        });
        daemon.start_again();

        let mut seen: Vec<(String, i64, i64)> = Vec::new();
        for ((container, code), (name, _, _)) in inside.iter().zip(codes) {
            seen.push((name.to_owned(), i64::from(container.wait()), i64::from(*code)));
        }
        seen.push(("tty".to_owned(), i64::from(tty.wait()), 5));
        seen.push(("oom".to_owned(), i64::from(oom.wait()), 137));
        for (id, code) in plain {
            let now = state(&daemon, id);
            let code_seen = if now.as_deref() == Some("STOPPED") { i64::from(daemon.delete_task(id)) } else { -1 };
            seen.push((format!("ctr {id}"), code_seen, code));
        }
        let table: Vec<String> = seen.iter().map(|(name, seen, code)| format!("{name}: {seen} (is {code})")).collect();
        eprintln!("{}", table.join(", "));
        assert!(seen.iter().all(|(_, seen, code)| seen == code), "{}", table.join(", "));
        for id in ["d0", "d9"] {
            daemon.try_ctr(&["containers", "delete", id]);
        }
        clear(&daemon);
        daemon.end();
    }
}
