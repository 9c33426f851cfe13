//! S8, call by call: containerd dies in the middle of a Task call, and is started again.
//!
//! A `runc` of the test's own waits ([`Hold`]). So the call is under way in the shim when containerd dies, and ends
//! before containerd is back, or after. What the shim does without runc waits in the socket of a shim that is stopped.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test reports by failing"
)]

use std::fs;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::fs::{FileType, fstat};
use rustix::io::ioctl_fionread;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, Signal, pidfd_getfd, pidfd_open};
use shim_tests::cri::Cri;
use shim_tests::hold::Hold;
use shim_tests::leaks::grpc_address;
use shim_tests::proc::{Process, children, kill};
use shim_tests::until::ok_if;
use shim_tests::{Daemon, PodSpec, ShimUnderTest, Terminal, eventually, on_every_containerd};

/// The state of a task, if there is one.
fn task_state(daemon: &Daemon, id: &str) -> Option<String> {
    daemon.task(id).map(|(_, state)| state)
}

fn spawn_without_streams(mut command: Command) -> Child {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap()
}

fn ctr_command(daemon: &Daemon, arguments: &[&str]) -> Command {
    let mut command = daemon.ctr_command();
    command.args(arguments);
    command
}

/// Asserts that an exec in the container works.
#[track_caller]
fn assert_exec_works(daemon: &Daemon, id: &str, exec: &str) {
    let output = daemon
        .ctr_exec(&[], exec, id, &["echo", "works"])
        .output()
        .unwrap();
    assert_eq!(output.stdout, b"works\n", "{output:?}");
}

/// Waits until the shell condition holds in the container `c`.
#[track_caller]
fn wait_until_true_inside(daemon: &Daemon, exec: &str, condition: &str) {
    let script = format!("while ! {condition}; do sleep 0.05; done");
    let looked = daemon
        .ctr_exec(&[], exec, "c", &["sh", "-c", &script])
        .output()
        .unwrap();
    assert!(looked.status.success(), "{looked:?}");
}

/// Whether unread bytes wait in a socket of the shim.
fn has_unread_call(shim: i32) -> bool {
    let pidfd = pidfd_open(Pid::from_raw(shim).unwrap(), PidfdFlags::empty()).unwrap();
    fs::read_dir(format!("/proc/{shim}/fd"))
        .unwrap()
        .flatten()
        .filter_map(|fd| fd.file_name().to_str()?.parse().ok())
        .filter_map(|fd| pidfd_getfd(&pidfd, fd, PidfdGetfdFlags::empty()).ok())
        .filter(|fd| FileType::from_raw_mode(fstat(fd).unwrap().st_mode) == FileType::Socket)
        .any(|socket| ioctl_fionread(&socket).is_ok_and(|bytes| bytes > 0))
}

/// Kills containerd while the stopped shim has an unread call in its socket, and starts containerd again. `ask` makes a
/// client send the call, and is called again until the call has come.
#[track_caller]
fn kill_containerd_with_a_call_in_the_socket(daemon: &Daemon, mut ask: impl FnMut()) {
    let shim = daemon.shim().pid;
    eventually(Duration::from_secs(5), || {
        ok_if(!has_unread_call(shim), || {
            "the shim does not read".to_owned()
        })
    });
    kill(shim, Signal::STOP);
    eventually(Duration::from_secs(20), || {
        ask();
        ok_if(has_unread_call(shim), || "no call has come".to_owned())
    });
    daemon.kill();
    kill(shim, Signal::CONT);
    daemon.start_again();
}

/// The container's task is made anew, runs, and ends.
#[track_caller]
fn assert_task_runs_again(daemon: &Daemon, id: &str) {
    let fifos = daemon.directory().join("fifo");
    // containerd may still know the task of the killed client: that task goes first. containerd 1.6 knows nothing of a
    // task before the end of its Create.
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
        ok_if(again.status.success(), || format!("{again:?}"))
    });
    daemon.wait_for_task(id, "RUNNING");
    kill_and_delete(daemon, id);
}

/// Kills the task, and removes everything.
#[track_caller]
fn kill_and_delete(daemon: &Daemon, id: &str) {
    daemon.ctr(&["tasks", "kill", "--signal", "SIGKILL", id]);
    daemon.wait_for_task(id, "STOPPED");
    assert_eq!(daemon.delete_task(id), 137);
    assert!(!daemon.try_ctr(&["tasks", "delete", id]).status.success());
    daemon.ctr(&["containers", "delete", id]);
    remove_fifos(daemon);
}

/// Removes the FIFOs of killed clients: nobody else does.
fn remove_fifos(daemon: &Daemon) {
    let fifos = daemon.directory().join("fifo");
    fs::remove_dir_all(&fifos).unwrap();
    fs::create_dir(&fifos).unwrap();
}

const SLEEPS: &[&str] = &["sleep", "3600"];

/// Kills containerd in the Create of `c`, which hangs.
#[track_caller]
fn kill_containerd_in_a_create(daemon: &Daemon) -> Hold {
    let hold = Hold::install(daemon);
    hold.hold("create");
    let mut client = spawn_without_streams(daemon.ctr_run(&["--detach"], "c", SLEEPS));
    hold.wait_until_held("create");
    daemon.kill();
    client.wait().unwrap();
    hold
}

on_every_containerd! {
    fn s8_containerd_dies_in_a_create_that_ends_meanwhile(version) {
        let daemon = Daemon::start(version);
        let hold = kill_containerd_in_a_create(&daemon);
        hold.release("create");
        let made = daemon.directory().join("state/io.containerd.runtime.v2.task").join(daemon.names.name()).join("c/init.pid");
        // The wrapper and runc have the same name, and the container's init another one.
        let shim = daemon.shim().pid;
        eventually(Duration::from_secs(20), || {
            let runs = children(shim).iter().any(|child| child.name == "runc");
            ok_if(made.exists() && !runs, || "runc has not made the container".to_owned())
        });
        daemon.start_again();
        daemon.wait_for_task("c", "CREATED");
        // Create again: there is one.
        assert!(!daemon.try_ctr(&["tasks", "start", "--detach", "c"]).status.success());
        assert_task_runs_again(&daemon, "c");
        daemon.end();
    }

    fn s8_containerd_dies_in_a_create_that_hangs(version) {
        let daemon = Daemon::start(version);
        let hold = kill_containerd_in_a_create(&daemon);
        // containerd must start although the Create hangs.
        daemon.start_again();
        daemon.try_ctr(&["tasks", "delete", "--force", "c"]);
        hold.release("create");
        assert_task_runs_again(&daemon, "c");
        daemon.end();
    }

    fn s8_containerd_dies_in_a_start(version) {
        let daemon = Daemon::start(version);
        let hold = Hold::install(&daemon);
        for (id, meanwhile) in [("a", true), ("b", false)] {
            hold.hold("start");
            let mut client = spawn_without_streams(daemon.ctr_run(&["--detach"], id, SLEEPS));
            hold.wait_until_held("start");
            daemon.kill();
            client.wait().unwrap();
            if meanwhile {
                hold.release("start");
            }
            daemon.start_again();
            if !meanwhile {
                assert_eq!(task_state(&daemon, id).as_deref(), Some("CREATED"));
                hold.release("start");
            }
            daemon.wait_for_task(id, "RUNNING");
            assert_exec_works(&daemon, id, "after");
            kill_and_delete(&daemon, id);
        }
        daemon.end();
    }

    fn s8_containerd_dies_in_the_start_of_an_exec(version) {
        let daemon = Daemon::start(version);
        let hold = Hold::install(&daemon);
        daemon.run_detached(&[], "c", SLEEPS);
        for (exec, meanwhile) in [("a", true), ("b", false)] {
            hold.hold("exec");
            let mark = format!("echo ran > /tmp/{exec}; exec sleep 3600");
            let mut client = spawn_without_streams(daemon.ctr_exec(&[], exec, "c", &["sh", "-c", &mark]));
            hold.wait_until_held("exec");
            // The client dies first: on containerd's death the client would remove the FIFOs.
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
            // The exec has run, and still runs.
            let look = format!("look-{exec}");
            let ran = format!("while [ ! -e /tmp/{exec} ]; do sleep 0.05; done");
            let found = daemon.ctr_exec(&[], &look, "c", &["sh", "-c", &ran]).output().unwrap();
            assert!(found.status.success(), "{found:?}");
            // The same call again: the id is taken.
            let again = daemon.ctr_exec(&[], exec, "c", &["true"]).output().unwrap();
            assert!(String::from_utf8_lossy(&again.stderr).contains("already exists"), "{again:?}");
            daemon.ctr(&["tasks", "kill", "--signal", "SIGKILL", "--exec-id", exec, "c"]);
        }
        assert_exec_works(&daemon, "c", "after");
        kill_and_delete(&daemon, "c");
        daemon.end();
    }

    fn s8_the_init_dies_in_the_start_of_an_exec(version) {
        let daemon = Daemon::start(version);
        let hold = Hold::install(&daemon);
        for (id, hangs) in [("a", false), ("b", true)] {
            if hangs && ShimUnderTest::get() == ShimUnderTest::Runc {
                // The stock shim waits for runc exec without an end.
                continue;
            }
            daemon.run_detached(&[], id, SLEEPS);
            hold.hold("exec");
            let mut client = spawn_without_streams(daemon.ctr_exec(&[], "e", id, SLEEPS));
            hold.wait_until_held("exec");
            kill(daemon.task(id).unwrap().0, Signal::KILL);
            // Long enough for a state that runs ahead of the Wait.
            std::thread::sleep(Duration::from_millis(300));
            assert_eq!(task_state(&daemon, id).as_deref(), Some("RUNNING"));
            if !hangs {
                hold.release("exec");
            }
            eventually(Duration::from_secs(20), || {
                let state = task_state(&daemon, id);
                ok_if(state.as_deref() == Some("STOPPED"), || format!("{id} is {state:?}"))
            });
            assert!(!client.wait().unwrap().success());
            if hangs {
                hold.release("exec");
            }
            assert_eq!(daemon.delete_task(id), 137);
            daemon.ctr(&["containers", "delete", id]);
            remove_fifos(&daemon);
        }
        daemon.end();
    }

    fn s8_containerd_dies_in_a_delete(version) {
        let daemon = Daemon::start(version);
        let hold = Hold::install(&daemon);
        for (id, meanwhile) in [("a", true), ("b", false)] {
            daemon.run_detached(&[], id, &["sh", "-c", "exit 7"]);
            daemon.wait_for_task(id, "STOPPED");
            hold.hold("delete");
            let mut client = spawn_without_streams(ctr_command(&daemon, &["tasks", "delete", id]));
            hold.wait_until_held("delete");
            daemon.kill();
            client.wait().unwrap();
            if meanwhile {
                hold.release("delete");
                let record = std::path::Path::new("/run/containerd/runc").join(daemon.names.name()).join(id);
                eventually(Duration::from_secs(20), || ok_if(!record.exists(), || "runc does not delete".to_owned()));
                daemon.start_again();
            } else {
                let bundle = daemon.directory();
                let restart = std::thread::spawn(move || {
                    // In a thread: a shim may keep containerd from starting during a Delete, and then the test would
                    // hang.
                    std::thread::sleep(Duration::from_secs(2));
                    fs::remove_file(bundle.join("hold/delete")).unwrap();
                });
                daemon.start_again();
                restart.join().unwrap();
            }
            // Deleted or still to be deleted: both are right, and nothing stays in either case.
            eventually(Duration::from_secs(20), || {
                daemon.try_ctr(&["tasks", "delete", id]);
                let now = task_state(&daemon, id);
                ok_if(now.is_none(), || format!("{id} is still there: {now:?}"))
            });
            daemon.ctr(&["containers", "delete", id]);
            remove_fifos(&daemon);
            // A shim without containers that gets no call ends by itself, some time later.
            eventually(Duration::from_secs(50), || ok_if(daemon.shims().is_empty(), || "the shim stays".to_owned()));
            daemon.assert_nothing_left();
        }
        daemon.end();
    }

    fn s8_containerd_dies_right_after_a_call(version) {
        let daemon = Daemon::start(version);
        daemon.run_detached(&[], "c", SLEEPS);
        let calls: [&[&str]; 6] = [
            &["tasks", "pause", "c"],
            &["tasks", "ps", "c"],
            &["tasks", "list"],
            &["tasks", "metrics", "c"],
            &["tasks", "resume", "c"],
            // A Wait is under way when containerd dies.
            &["tasks", "attach", "c"],
        ];
        for call in calls {
            let mut client = spawn_without_streams(ctr_command(&daemon, call));
            // The kill may hit before, in or after the call: the task must survive each.
            std::thread::sleep(Duration::from_millis(30));
            daemon.kill();
            let _ = client.kill();
            client.wait().unwrap();
            daemon.start_again();
            // The repeated call works, or its effect is there already.
            let again = match call[1] {
                "attach" => None,
                _ => Some(daemon.try_ctr(call)),
            };
            let now = task_state(&daemon, "c");
            let expected = if ["resume", "attach"].contains(&call[1]) { "RUNNING" } else { "PAUSED" };
            assert_eq!(now.as_deref(), Some(expected), "after {call:?}: {again:?}");
            if let Some(again) = again.filter(|_| !["pause", "resume"].contains(&call[1])) {
                assert!(again.status.success(), "{call:?}: {again:?}");
            }
        }
        assert_exec_works(&daemon, "c", "after");
        let mut client = spawn_without_streams(ctr_command(&daemon, &["tasks", "kill", "--signal", "SIGKILL", "c"]));
        daemon.kill();
        let _ = client.kill();
        client.wait().unwrap();
        daemon.start_again();
        daemon.try_ctr(&["tasks", "kill", "--signal", "SIGKILL", "c"]);
        daemon.wait_for_task("c", "STOPPED");
        assert_eq!(daemon.delete_task("c"), 137);
        daemon.ctr(&["containers", "delete", "c"]);
        remove_fifos(&daemon);
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
            hold.wait_until_held("update");
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

    fn s8_containerd_dies_in_a_close_of_the_input(version) {
        let daemon = Daemon::start(version);
        daemon.run_detached(&[], "c", SLEEPS);
        let start_reader = |exec: &str| {
            let script = format!("cat; echo > /tmp/{exec}; exec sleep 3600");
            let mut run = daemon.ctr_exec(&[], exec, "c", &["sh", "-c", &script]);
            let mut client = run.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            let mut input = client.stdin.take().unwrap();
            input.write_all(b"line\n").unwrap();
            let mut line = [0; 5];
            client.stdout.as_mut().unwrap().read_exact(&mut line).unwrap();
            assert_eq!(&line, b"line\n");
            (client, input)
        };
        let (mut client, input) = start_reader("first");
        // The client sees the end of its input and sends CloseIO.
        let mut input = Some(input);
        kill_containerd_with_a_call_in_the_socket(&daemon, || drop(input.take()));
        client.kill().unwrap();
        client.wait().unwrap();
        // The first call may be lost with its containerd; a later call must not be.
        let (mut client, input) = start_reader("second");
        drop(input);
        wait_until_true_inside(&daemon, "look", "[ -e /tmp/second ]");
        client.kill().unwrap();
        client.wait().unwrap();
        assert_exec_works(&daemon, "c", "after");
        kill_and_delete(&daemon, "c");
        daemon.end();
    }

    fn s8_containerd_dies_in_a_resize(version) {
        let daemon = Daemon::start(version);
        daemon.run_detached(&[], "c", SLEEPS);
        let start_size_writer = |exec: &str| {
            let script = format!("while stty size > /tmp/new; do mv /tmp/new /tmp/{exec}; sleep 0.05; done");
            let terminal = Terminal::start(daemon.ctr_exec(&["--tty"], exec, "c", &["sh", "-c", &script]));
            wait_until_true_inside(&daemon, &format!("before-{exec}"), &format!("grep -q '24 80' /tmp/{exec}"));
            terminal
        };
        let terminal = start_size_writer("first");
        kill_containerd_with_a_call_in_the_socket(&daemon, || terminal.resize(31, 97));
        drop(terminal);
        // The first call may be lost with its containerd; a later call must not be.
        let terminal = start_size_writer("second");
        let mut looks = 0;
        eventually(Duration::from_secs(30), || {
            // ctr listens for changes only some time after it has passed on the first size.
            terminal.resize(33, 99);
            looks += 1;
            let mut look = daemon.ctr_exec(&[], &format!("look-{looks}"), "c", &["grep", "33 99", "/tmp/second"]);
            let look = look.output().unwrap();
            ok_if(look.status.success(), || format!("{look:?}"))
        });
        drop(terminal);
        assert_exec_works(&daemon, "c", "after");
        kill_and_delete(&daemon, "c");
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
        // More memory than the limit: the kernel kills the container.
        let script = format!("{wait}; exec tail /dev/zero");
        let oom = pod.container("oom").mount(go.to_str().unwrap(), "/go").memory_limit(16 << 20).shell(&script).start();
        // An exec that has come and gone before containerd dies.
        assert_eq!(inside[0].0.output(&["echo", "exec"]), "exec");
        let mount = format!("type=bind,src={},dst=/go,options=rbind:rw", go.display());
        let plain: Vec<_> = [("d0", 0), ("d9", 9)]
            .into_iter()
            .inspect(|(id, code)| daemon.run_detached(&["--mount", &mount], id, &["sh", "-c", &format!("{wait}; exit {code}")]))
            .collect();
        let mut pids: Vec<i32> = inside.iter().map(|(container, _)| container.pid()).chain([tty.pid(), oom.pid()]).collect();
        pids.extend(plain.iter().map(|(id, _)| daemon.task(id).unwrap().0));
        let inits: Vec<Process> = pids.into_iter().map(|pid| Process::of(pid).unwrap()).collect();

        daemon.kill();
        fs::write(go.join("now"), "").unwrap();
        eventually(Duration::from_secs(20), || {
            // Gone, and not only dead: the shim knows.
            let alive: Vec<_> = inits.iter().filter(|init| init.alive()).map(Process::describe).collect();
            ok_if(alive.is_empty(), || format!("they still run: {alive:?}"))
        });
        daemon.start_again();

        let mut seen: Vec<(String, i64, i64)> = Vec::new();
        for ((container, code), (name, _, _)) in inside.iter().zip(codes) {
            seen.push((name.to_owned(), i64::from(container.wait()), i64::from(*code)));
        }
        seen.push(("tty".to_owned(), i64::from(tty.wait()), 5));
        seen.push(("oom".to_owned(), i64::from(oom.wait()), 137));
        for (id, code) in plain {
            let now = task_state(&daemon, id);
            let code_seen = if now.as_deref() == Some("STOPPED") { i64::from(daemon.delete_task(id)) } else { -1 };
            seen.push((format!("ctr {id}"), code_seen, code));
        }
        let table: Vec<String> = seen.iter().map(|(name, seen, code)| format!("{name}: {seen} (is {code})")).collect();
        eprintln!("{}", table.join(", "));
        assert!(seen.iter().all(|(_, seen, code)| seen == code), "{}", table.join(", "));
        for id in ["d0", "d9"] {
            daemon.try_ctr(&["containers", "delete", id]);
        }
        remove_fifos(&daemon);
        daemon.end();
    }
}
