//! S11: `ctr run` of a plain container.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::fs;
use std::io::{Read, Write};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use shim_tests::proc::{Process, namespace};
use shim_tests::until::ok_if;
use shim_tests::{Daemon, Terminal, eventually, image, on_every_containerd};

fn stdout_text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// What the container has written. From 2.2 on, ctr warns of cgroup v1 in a line before.
fn stderr_text(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let lines = text.split_inclusive('\n');
    lines.filter(|line| !line.starts_with("time=")).collect()
}

/// Resizes the terminal until `probe winsize` inside has printed the new size. ctr passes on the first size, and begins
/// to listen for changes some time later.
fn resize_until_seen(terminal: &mut Terminal, rows: u16, columns: u16) {
    eventually(Duration::from_secs(30), || {
        terminal.resize(rows, columns);
        let printed = terminal.printed();
        ok_if(printed.contains(&format!("size {rows} {columns}")), || {
            printed
        })
    });
}

/// Runs the command, waits for the line `ready`, and then writes `input` to stdin. (`ctr` does not tell the shim of an
/// end of input that comes before the task is made.)
fn run_with_input(mut command: Command, input: &[u8]) -> Output {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut ready = [0; 6];
    let answer = child.stdout.as_mut().unwrap().read_exact(&mut ready);
    if answer.is_ok() {
        child.stdin.take().unwrap().write_all(input).unwrap();
    }
    let output = child.wait_with_output().unwrap();
    assert_eq!(&ready, b"ready\n", "{output:?}");
    output
}

on_every_containerd! {
    fn s11_run_and_remove(version) {
        let daemon = Daemon::start(version);
        for (script, code) in [("echo out; echo err >&2", 0), ("exit 42", 42), ("sh -c 'kill -9 $$'; exit $?", 137)] {
            let output = daemon.ctr_run(&["--rm"], "one", &["sh", "-c", script]).output().unwrap();
            assert_eq!(output.status.code(), Some(code), "{script}: {output:?}");
            if code == 0 {
                assert_eq!(stdout_text(&output), "out\n");
                assert_eq!(stderr_text(&output), "err\n");
            }
            daemon.assert_nothing_left();
        }
        daemon.end();
    }

    fn s11_stdin_reaches_the_container_and_ends(version) {
        let daemon = Daemon::start(version);
        let output = run_with_input(daemon.ctr_run(&["--rm"], "cat", &["sh", "-c", "echo ready; cat"]), b"hi\n");
        assert!(output.status.success(), "{output:?}");
        assert_eq!(stdout_text(&output), "hi\n");
        // More than a pipe holds.
        let much: Vec<u8> = (0..300_000_u32).map(|number| b'a' + (number % 26) as u8).collect();
        let output = run_with_input(daemon.ctr_run(&["--rm"], "wc", &["sh", "-c", "echo ready; wc -c"]), &much);
        assert_eq!(stdout_text(&output).trim(), "300000");
        daemon.end();
    }

    fn s11_a_terminal(version) {
        let daemon = Daemon::start(version);
        let script = "tty; read line; echo got $line; exit 9";
        let mut terminal = Terminal::start(daemon.ctr_run(&["--rm", "--tty"], "tty", &["sh", "-c", script]));
        terminal.expect("/dev/pts/0");
        terminal.enter("hello\n");
        terminal.expect("got hello");
        assert_eq!(terminal.wait().code(), Some(9), "{}", terminal.printed());
        daemon.end();
    }

    fn s11_a_terminal_is_resized(version) {
        let daemon = Daemon::start(version);
        let probe = format!("type=bind,src={},dst=/probe,options=rbind:ro", shim_tests::lab::probe().display());
        let run = daemon.ctr_run(&["--rm", "--tty", "--mount", &probe], "tty", &["/probe", "winsize"]);
        let mut terminal = Terminal::start(run);
        terminal.expect("size 24 80");
        resize_until_seen(&mut terminal, 31, 97);
        terminal.enter("\x04");
        assert!(terminal.wait().success(), "{}", terminal.printed());
        daemon.end();
    }

    fn s11_detached_then_killed_and_deleted(version) {
        let daemon = Daemon::start(version);
        daemon.run_detached(&[], "d", &["sleep", "3600"]);
        let (pid, state) = daemon.task("d").unwrap();
        assert_eq!(state, "RUNNING");
        assert_eq!(Process::of(pid).unwrap().name, "sleep");
        assert_eq!(Process::of(pid).unwrap().parent, daemon.shim().pid);
        // PID 1 of a namespace does not get signals without a handler: hence SIGKILL.
        daemon.ctr(&["tasks", "kill", "--signal", "SIGKILL", "d"]);
        daemon.wait_for_task("d", "STOPPED");
        assert_eq!(daemon.delete_task("d"), 137);
        // A second kill and a second delete fail: there is no task.
        assert!(!daemon.try_ctr(&["tasks", "kill", "d"]).status.success());
        assert!(!daemon.try_ctr(&["tasks", "delete", "d"]).status.success());
        daemon.ctr(&["containers", "delete", "d"]);
        daemon.end();
    }

    fn s11_signals_reach_the_process(version) {
        let daemon = Daemon::start(version);
        let script = "trap 'exit 11' USR1; trap 'exit 12' TERM; touch /tmp/ready; while true; do sleep 0.1; done";
        for (signal, code) in [("SIGUSR1", 11), ("SIGTERM", 12)] {
            daemon.run_detached(&[], "s", &["sh", "-c", script]);
            eventually(Duration::from_secs(5), || {
                let ready = daemon.ctr_exec(&[], "look", "s", &["test", "-e", "/tmp/ready"]).output().unwrap();
                ok_if(ready.status.success(), || format!("{ready:?}"))
            });
            daemon.ctr(&["tasks", "kill", "--signal", signal, "s"]);
            daemon.wait_for_task("s", "STOPPED");
            assert_eq!(daemon.delete_task("s"), code, "{signal}");
            daemon.ctr(&["containers", "delete", "s"]);
        }
        daemon.end();
    }

    fn s11_exec(version) {
        let daemon = Daemon::start(version);
        daemon.run_detached(&[], "d", &["sleep", "3600"]);
        let output = daemon.ctr_exec(&[], "a", "d", &["sh", "-c", "echo out; echo err >&2; exit 3"]).output().unwrap();
        assert_eq!(output.status.code(), Some(3), "{output:?}");
        assert_eq!((stdout_text(&output), stderr_text(&output)), ("out\n".to_owned(), "err\n".to_owned()));
        let output = run_with_input(daemon.ctr_exec(&[], "b", "d", &["sh", "-c", "echo ready; cat"]), b"through stdin\n");
        assert_eq!(stdout_text(&output), "through stdin\n", "{output:?}");
        daemon.end();
    }

    fn s11_exec_on_a_terminal_with_resize(version) {
        let daemon = Daemon::start(version);
        let probe = format!("type=bind,src={},dst=/probe,options=rbind:ro", shim_tests::lab::probe().display());
        daemon.run_detached(&["--mount", &probe], "d", &["sleep", "3600"]);
        let mut terminal = Terminal::start(daemon.ctr_exec(&["--tty"], "t", "d", &["/probe", "winsize"]));
        terminal.expect("size 24 80");
        resize_until_seen(&mut terminal, 50, 132);
        terminal.enter("\x04");
        assert!(terminal.wait().success(), "{}", terminal.printed());
        let mut shell = Terminal::start(daemon.ctr_exec(&["--tty"], "u", "d", &["sh"]));
        shell.enter("echo $((6 * 7)); exit 4\n");
        shell.expect("42");
        assert_eq!(shell.wait().code(), Some(4));
        daemon.end();
    }

    fn s11_an_exec_id_is_used_once(version) {
        let daemon = Daemon::start(version);
        daemon.run_detached(&[], "d", &["sleep", "3600"]);
        let mut first = daemon.ctr_exec(&[], "same", "d", &["sh", "-c", "echo ready; exec sleep 3600"]);
        let mut first = first.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        first.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
        let second = daemon.ctr_exec(&[], "same", "d", &["true"]).output().unwrap();
        assert!(!second.status.success());
        assert!(String::from_utf8_lossy(&second.stderr).contains("already exists"), "{second:?}");
        daemon.ctr(&["tasks", "kill", "--signal", "SIGKILL", "--exec-id", "same", "d"]);
        assert_eq!(first.wait().unwrap().code(), Some(137));
        daemon.end();
    }

    fn s11_execs_side_by_side(version) {
        let daemon = Daemon::start(version);
        daemon.run_detached(&[], "d", &["sleep", "3600"]);
        let running: Vec<_> = (0..8)
            .map(|number| {
                let script = format!("echo number {number}; exit {number}");
                let mut command = daemon.ctr_exec(&[], &format!("e{number}"), "d", &["sh", "-c", &script]);
                command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
            })
            .collect();
        for (number, child) in running.into_iter().enumerate() {
            let output = child.wait_with_output().unwrap();
            assert_eq!(output.status.code(), Some(i32::try_from(number).unwrap()), "{output:?}");
            assert_eq!(stdout_text(&output), format!("number {number}\n"));
        }
        daemon.end();
    }

    fn s11_attach(version) {
        let daemon = Daemon::start(version);
        daemon.run_detached(&[], "a", &["sh", "-c", "read line; echo got $line; exit 6"]);
        let mut attach = daemon.ctr_command();
        attach.args(["tasks", "attach", "a"]);
        // Nothing is printed before: the detached `ctr run` may have read it.
        let mut attach = attach.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        attach.stdin.as_mut().unwrap().write_all(b"attached\n").unwrap();
        let output = attach.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(6), "{output:?}");
        assert_eq!(stdout_text(&output), "got attached\n");
        daemon.end();
    }

    fn s11_attach_to_a_terminal(version) {
        let daemon = Daemon::start(version);
        let script = "read line; echo got $line; exit 6";
        let mut run = Terminal::start(daemon.ctr_run(&["--detach", "--tty"], "t", &["sh", "-c", script]));
        assert!(run.wait().success(), "{}", run.printed());
        daemon.look();
        let mut attach = daemon.ctr_command();
        attach.args(["tasks", "attach", "t"]);
        let mut attach = Terminal::start(attach);
        attach.enter("hello\n");
        attach.expect("got hello");
        assert_eq!(attach.wait().code(), Some(6), "{}", attach.printed());
        daemon.end();
    }

    fn s11_ps(version) {
        let daemon = Daemon::start(version);
        daemon.run_detached(&[], "p", &["sleep", "3600"]);
        let pid = daemon.task("p").unwrap().0.to_string();
        let mut exec = daemon.ctr_exec(&[], "named", "p", &["sh", "-c", "echo ready; exec sleep 3600"]);
        let mut exec = exec.stdout(Stdio::piped()).spawn().unwrap();
        exec.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
        let list = daemon.ctr(&["tasks", "ps", "p"]);
        let rows: Vec<&str> = list.lines().skip(1).collect();
        assert_eq!(rows.len(), 2, "{list}");
        let has = |word: &str| rows.iter().any(|row| row.contains(word));
        assert!(has(&pid) && has("named"), "{list}");
        daemon.ctr(&["tasks", "kill", "--signal", "SIGKILL", "p"]);
        exec.wait().unwrap();
        daemon.end();
    }

    fn s11_a_pid_file_and_no_streams(version) {
        let daemon = Daemon::start(version);
        let file = daemon.directory().join("pid");
        let flags = ["--null-io", "--pid-file", file.to_str().unwrap()];
        daemon.run_detached(&flags, "n", &["sh", "-c", "read line; yes | head -n 100000; exit 8"]);
        let (pid, _) = daemon.task("n").unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap().trim(), pid.to_string());
        daemon.wait_for_task("n", "STOPPED");
        assert_eq!(daemon.delete_task("n"), 8);
        daemon.end();
    }

    /// containerd runs the shim's `delete` for the first container; the second container must go on.
    fn s11_containers_of_a_group_outlive_the_first(version) {
        let daemon = Daemon::start(version);
        let group = ["--annotation", "io.containerd.runc.v2.group=together"];
        daemon.run_detached(&group, "first", &["sleep", "3600"]);
        daemon.run_detached(&group, "second", &["sleep", "3601"]);
        daemon.expect_task("together");
        assert_eq!(daemon.shims().len(), 1, "one shim for both");
        daemon.ctr(&["tasks", "kill", "--signal", "SIGKILL", "first"]);
        daemon.wait_for_task("first", "STOPPED");
        daemon.ctr(&["tasks", "delete", "first"]);
        let output = daemon.ctr_exec(&[], "e", "second", &["echo", "still here"]).output().unwrap();
        assert_eq!(stdout_text(&output), "still here\n", "{output:?}");
        daemon.ctr(&["tasks", "kill", "--signal", "SIGKILL", "second"]);
        daemon.wait_for_task("second", "STOPPED");
        daemon.ctr(&["tasks", "delete", "second"]);
        eventually(Duration::from_secs(5), || {
            ok_if(daemon.shims().is_empty(), || "the shim is still there".to_owned())
        });
        daemon.end();
    }

    fn s11_pause_and_resume(version) {
        let daemon = Daemon::start(version);
        let events = daemon.events();
        daemon.run_detached(&[], "p", &["sh", "-c", "while true; do :; done"]);
        let (pid, _) = daemon.task("p").unwrap();
        let ticks = || {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            stat.split_whitespace().nth(13).unwrap().parse::<u64>().unwrap()
        };
        daemon.ctr(&["tasks", "pause", "p"]);
        daemon.wait_for_task("p", "PAUSED");
        let before = ticks();
        // An exec in a paused container would wait for ever, and is refused.
        let refused = daemon.ctr_exec(&[], "e", "p", &["true"]).output().unwrap();
        assert!(!refused.status.success(), "{refused:?}");
        assert_eq!(ticks(), before);
        daemon.ctr(&["tasks", "resume", "p"]);
        daemon.wait_for_task("p", "RUNNING");
        eventually(Duration::from_secs(3), || ok_if(ticks() > before, || "it stands still".to_owned()));
        eventually(Duration::from_secs(3), || {
            let seen: Vec<String> = events.of("p").into_iter().filter(|topic| !topic.starts_with("exec")).collect();
            ok_if(seen == ["create", "start", "paused", "resumed"], || format!("{seen:?}"))
        });
        daemon.end();
    }

    fn s11_a_paused_container_can_be_killed(version) {
        let daemon = Daemon::start(version);
        daemon.run_detached(&[], "p", &["sleep", "3600"]);
        daemon.ctr(&["tasks", "pause", "p"]);
        daemon.wait_for_task("p", "PAUSED");
        daemon.ctr(&["tasks", "kill", "--signal", "SIGKILL", "p"]);
        daemon.try_ctr(&["tasks", "resume", "p"]);
        daemon.wait_for_task("p", "STOPPED");
        daemon.end();
    }

    fn s11_metrics(version) {
        let daemon = Daemon::start(version);
        daemon.run_detached(&[], "m", &["sh", "-c", "while true; do :; done"]);
        let metrics = daemon.ctr(&["tasks", "metrics", "--format", "json", "m"]);
        let metrics: serde_json::Value = serde_json::from_str(&metrics).unwrap_or_else(|error| panic!("{error}: {metrics}"));
        let v1 = metrics["memory"]["usage"]["usage"].as_u64();
        let v2 = metrics["memory"]["usage"].as_u64();
        let usage = v1.or(v2).unwrap_or_else(|| panic!("no memory in {metrics}"));
        assert!((4096..1 << 30).contains(&usage), "{usage}");
        daemon.end();
    }

    fn s11_environment_and_working_directory(version) {
        let daemon = Daemon::start(version);
        let flags = ["--rm", "--env", "ANSWER=42", "--env", "EMPTY=", "--cwd", "/tmp"];
        let output = daemon.ctr_run(&flags, "env", &["sh", "-c", "echo $ANSWER; echo ${EMPTY-unset}; pwd"]).output().unwrap();
        assert_eq!(stdout_text(&output), "42\n\n/tmp\n", "{output:?}");
        daemon.end();
    }

    fn s11_mounts(version) {
        let daemon = Daemon::start(version);
        let folder = daemon.directory().join("given");
        fs::create_dir(&folder).unwrap();
        fs::write(folder.join("file"), "from the node\n").unwrap();
        let given = folder.display();
        for (options, script, expected) in [
            ("rbind:rw", "cat /given/file; echo back > /given/answer", "from the node\n"),
            ("rbind:ro", "cat /given/file; touch /given/no 2>/dev/null || echo read-only", "from the node\nread-only\n"),
        ] {
            let mount = format!("type=bind,src={given},dst=/given,options={options}");
            let output = daemon.ctr_run(&["--rm", "--mount", &mount], "m", &["sh", "-c", script]).output().unwrap();
            assert_eq!(stdout_text(&output), expected, "{output:?}");
        }
        assert_eq!(fs::read_to_string(folder.join("answer")).unwrap(), "back\n");
        daemon.end();
    }

    fn s11_rootfs(version) {
        let daemon = Daemon::start(version);
        let root = daemon.directory().join("rootfs");
        image::unpack_busybox(&root);
        let root = root.to_str().unwrap();
        let mut run = daemon.ctr_run(&["--rm", "--env", "PATH=/bin", "--rootfs"], root, &["r", "sh", "-c", "echo from $(cat /etc/mark)"]);
        daemon.expect_task("r");
        fs::write(format!("{root}/etc/mark"), "a folder\n").unwrap();
        let output = run.output().unwrap();
        assert_eq!(stdout_text(&output), "from a folder\n", "{output:?}");
        daemon.end();
    }

    fn s11_the_nodes_network(version) {
        let daemon = Daemon::start(version);
        daemon.run_detached(&["--net-host"], "n", &["sleep", "3600"]);
        daemon.run_detached(&[], "own", &["sleep", "3600"]);
        let node = namespace(std::process::id().cast_signed(), "net");
        assert_eq!(namespace(daemon.task("n").unwrap().0, "net"), node);
        assert_ne!(namespace(daemon.task("own").unwrap().0, "net"), node);
        daemon.end();
    }

    fn s11_a_memory_limit(version) {
        let daemon = Daemon::start(version);
        daemon.run_detached(&["--memory-limit", "33554432"], "l", &["sleep", "3600"]);
        let (pid, _) = daemon.task("l").unwrap();
        let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        let of = |prefix: &str| groups.lines().find_map(|line| line.split_once(prefix).map(|(_, path)| path.to_owned()));
        let limit = [
            of(":memory:").map(|path| format!("/sys/fs/cgroup/memory{path}/memory.limit_in_bytes")),
            of("0::").map(|path| format!("/sys/fs/cgroup{path}/memory.max")),
        ]
        .into_iter()
        .flatten()
        .find_map(|file| fs::read_to_string(file).ok());
        assert_eq!(limit.as_deref().map(str::trim), Some("33554432"));
        daemon.end();
    }

    fn s11_many_short_containers(version) {
        let daemon = Daemon::start(version);
        for number in 0..10 {
            let id = format!("c{number}");
            let output = daemon.ctr_run(&["--rm"], &id, &["echo", &id]).output().unwrap();
            assert_eq!(stdout_text(&output), format!("{id}\n"), "{output:?}");
        }
        daemon.assert_nothing_left();
        daemon.end();
    }

    fn s11_a_background_child_does_not_hold_the_container(version) {
        let daemon = Daemon::start(version);
        let mut run = daemon.ctr_run(&["--rm"], "bg", &["sh", "-c", "sleep 300 & echo done"]);
        let begin = std::time::Instant::now();
        let output = run.output().unwrap();
        assert_eq!(stdout_text(&output), "done\n", "{output:?}");
        assert!(begin.elapsed() < Duration::from_secs(5), "{:?}", begin.elapsed());
        daemon.end();
    }
}
