//! Output that does not go to containerd: `binary://`, `binary-v2://`, `file://`, with and without a terminal.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Output;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use shim_tests::calls::{Shim, Streams};
use shim_tests::proc::{Process, kill};
use shim_tests::raw::Bundle;
use shim_tests::until::{ok_if, timed};
use shim_tests::{Daemon, eventually, lab, on_every_containerd, ours_only};

/// The folder of a logger: its mode and its output.
struct Logger {
    folder: PathBuf,
}

impl Logger {
    fn new(daemon: &Daemon, name: &str, mode: &str) -> Self {
        let folder = daemon.directory().join("loggers").join(name);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("mode"), mode).unwrap();
        Self { folder }
    }

    /// Key and value of the query become two arguments: `probe logger FOLDER`.
    fn uri(&self, scheme: &str) -> String {
        format!(
            "{scheme}://{}?logger={}",
            lab::probe().display(),
            self.folder.display()
        )
    }

    fn read(&self, file: &str) -> String {
        fs::read_to_string(self.folder.join(file)).unwrap_or_default()
    }

    /// Waits until the logger has exactly these outputs.
    #[track_caller]
    fn wait_for_output(&self, stdout: &str, stderr: &str) {
        eventually(Duration::from_secs(10), || {
            let found = (self.read("stdout"), self.read("stderr"));
            ok_if(found == (stdout.to_owned(), stderr.to_owned()), || {
                format!("{found:?}")
            })
        });
    }

    /// The logger's process, while it lives.
    fn process(&self) -> Option<Process> {
        let pid = self.read("pid").parse().ok()?;
        Process::of(pid)
            .filter(|process| process.state != 'Z' && process.command_line().contains("logger"))
    }

    #[track_caller]
    fn wait_until_gone(&self, deadline: Duration) {
        eventually(deadline, || {
            let process = self.process();
            ok_if(process.is_none(), || {
                format!("the logger is still there: {}", process.unwrap().describe())
            })
        });
    }
}

/// `ctr run --log-uri`; `--fifo-dir` has no effect then.
fn run_with_log_uri(daemon: &Daemon, flags: &[&str], uri: &str, id: &str, script: &str) -> Output {
    let flags = [flags, &["--log-uri", uri]].concat();
    daemon
        .ctr_run(&flags, id, &["sh", "-c", script])
        .output()
        .unwrap()
}

#[track_caller]
fn assert_succeeded(output: &Output) {
    assert!(output.status.success(), "{output:?}");
}

/// The message of a `ctr run` that must fail.
#[track_caller]
fn run_that_must_fail(daemon: &Daemon, uri: &str, id: &str) -> String {
    let output = run_with_log_uri(daemon, &["--rm"], uri, id, "echo never");
    assert!(!output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// `ctr tasks exec --log-uri` to its end.
fn exec_with_log_uri(daemon: &Daemon, uri: &str, exec_id: &str, id: &str, script: &str) -> Output {
    daemon.try_ctr(&[
        "tasks",
        "exec",
        "--exec-id",
        exec_id,
        "--log-uri",
        uri,
        id,
        "sh",
        "-c",
        script,
    ])
}

/// A shim of its own with a container that sleeps.
fn start_sleeper<'a>(daemon: &'a Daemon, id: &str) -> (Bundle<'a>, Shim) {
    let bundle = Bundle::new(daemon, id);
    let spec = bundle.plain_spec(&["sleep", "3600"]);
    let bundle = bundle.write_spec(&spec);
    let shim = Shim::connect(&bundle.start(b""));
    bundle.create(&shim).unwrap();
    shim.start(id, "").unwrap();
    (bundle, shim)
}

#[track_caller]
fn kill_and_delete(bundle: Bundle<'_>, shim: &Shim) {
    shim.kill(&bundle.id, "", 9).unwrap();
    shim.wait(&bundle.id, "").unwrap();
    shim.delete(&bundle.id, "").unwrap();
    bundle.shut_down(shim);
    drop(bundle);
}

on_every_containerd! {
    fn a_logger_gets_both_outputs_and_an_environment_of_two(version) {
        let daemon = Daemon::start(version);
        let logger = Logger::new(&daemon, "one", "");
        assert_succeeded(&run_with_log_uri(&daemon, &["--rm"], &logger.uri("binary"), "c", "echo out; echo err >&2"));
        // Nothing is lost, and the logger had the time to end by itself.
        logger.wait_for_output("out\n", "err\n");
        eventually(Duration::from_secs(10), || ok_if(logger.folder.join("end").exists(), || "cut off".to_owned()));
        let namespace = daemon.names.name();
        assert_eq!(logger.read("environment"), format!("CONTAINER_ID=c CONTAINER_NAMESPACE={namespace}"));
        let fds = logger.read("fds");
        // Descriptors that this test inherited go down through containerd, and are not the shim's.
        let ours: Vec<_> = fs::read_dir("/proc/self/fd").unwrap().flatten().filter_map(|fd| fs::read_link(fd.path()).ok()).collect();
        let given = |(number, target): &(&str, &str)| number.len() == 1 || !ours.contains(&PathBuf::from(target));
        let numbers: Vec<&str> = fds.lines().filter_map(|fd| fd.split_once(' ')).filter(given).map(|(number, _)| number).collect();
        assert_eq!(numbers, ["0", "1", "2", "3", "4", "5"], "{fds}");
        logger.wait_until_gone(Duration::from_secs(5));
        daemon.end();
    }

    fn a_logger_that_only_closes_its_descriptor_is_ready_too(version) {
        let daemon = Daemon::start(version);
        let logger = Logger::new(&daemon, "closes", "closes");
        assert_succeeded(&run_with_log_uri(&daemon, &["--rm"], &logger.uri("binary"), "c", "echo out"));
        logger.wait_for_output("out\n", "");
        daemon.end();
    }

    fn a_logger_gets_a_megabyte_of_each(version) {
        let daemon = Daemon::start(version);
        let logger = Logger::new(&daemon, "much", "");
        let script = "seq 1 150000 & seq 1 150000 >&2; wait";
        assert_succeeded(&run_with_log_uri(&daemon, &["--rm"], &logger.uri("binary"), "c", script));
        let all: String = (1..=150_000).map(|number| format!("{number}\n")).collect();
        logger.wait_for_output(&all, &all);
        daemon.end();
    }

    fn an_exec_has_a_logger_of_its_own(version) {
        let daemon = Daemon::start(version);
        let (of_init, of_exec) = (Logger::new(&daemon, "init", ""), Logger::new(&daemon, "exec", ""));
        assert_succeeded(&run_with_log_uri(&daemon, &["--detach"], &of_init.uri("binary"), "c", "echo init; exec sleep 3600"));
        assert_succeeded(&exec_with_log_uri(&daemon, &of_exec.uri("binary"), "e1", "c", "echo exec; echo err >&2"));
        of_exec.wait_for_output("exec\n", "err\n");
        of_exec.wait_until_gone(Duration::from_secs(10));
        assert!(of_exec.read("environment").contains("CONTAINER_ID=e1 "), "{}", of_exec.read("environment"));
        of_init.wait_for_output("init\n", "");
        assert!(of_init.process().is_some(), "the container's logger ended with the exec's");
        daemon.end();
        assert!(of_init.process().is_none());
    }

    fn a_logger_lives_on_while_containerd_is_away(version) {
        let daemon = Daemon::start(version);
        let logger = Logger::new(&daemon, "stays", "");
        let gate = daemon.directory().join("gate");
        fs::create_dir(&gate).unwrap();
        let mount = format!("type=bind,src={},dst=/gate,options=rbind:ro", gate.display());
        let script = "echo before; until [ -e /gate/go ]; do sleep 0.05; done; seq 1 50000; exec sleep 3600";
        assert_succeeded(&run_with_log_uri(&daemon, &["--detach", "--mount", &mount], &logger.uri("binary"), "c", script));
        logger.wait_for_output("before\n", "");
        daemon.kill();
        fs::write(gate.join("go"), "").unwrap();
        let all: String = (1..=50_000).map(|number| format!("{number}\n")).collect();
        logger.wait_for_output(&format!("before\n{all}"), "");
        daemon.start_again();
        daemon.end();
    }

    fn binary_v2_wants_a_byte(version) {
        ours_only!("binary-v2 came with containerd 2.3");
        let daemon = Daemon::start(version);
        let logger = Logger::new(&daemon, "byte", "");
        assert_succeeded(&run_with_log_uri(&daemon, &["--rm"], &logger.uri("binary-v2"), "c", "echo out"));
        logger.wait_for_output("out\n", "");
        let silent = Logger::new(&daemon, "silent", "closes");
        let said = run_that_must_fail(&daemon, &silent.uri("binary-v2"), "d");
        assert!(said.contains("file descriptor 5"), "{said}");
        silent.wait_until_gone(Duration::from_secs(5));
        daemon.end();
    }

    fn a_logger_that_is_not_there_is_named(version) {
        let daemon = Daemon::start(version);
        let said = run_that_must_fail(&daemon, "binary:///nowhere/logger", "c");
        assert!(said.contains("/nowhere/logger"), "{said}");
        daemon.assert_nothing_left();
        daemon.end();
    }

    fn a_logger_that_dies_before_the_container_starts_is_an_error(version) {
        ours_only!("the stock shim takes the end of descriptor 5 for readiness, and looks no further");
        let daemon = Daemon::start(version);
        let logger = Logger::new(&daemon, "dies", "dies");
        let said = run_that_must_fail(&daemon, &logger.uri("binary"), "c");
        assert!(said.contains("has ended") && said.contains("probe"), "{said}");
        daemon.assert_nothing_left();
        daemon.end();
    }

    fn a_logger_that_never_gets_ready_is_ended(version) {
        ours_only!("the stock shim waits for ever");
        let daemon = Daemon::start(version);
        let logger = Logger::new(&daemon, "never", "never-ready");
        let begin = Instant::now();
        let said = run_that_must_fail(&daemon, &logger.uri("binary"), "c");
        assert!(said.contains("not ready within"), "{said}");
        assert!(begin.elapsed() < Duration::from_secs(25), "{:?}", begin.elapsed());
        logger.wait_until_gone(Duration::from_secs(5));
        daemon.end();
    }

    fn output_after_the_loggers_end_is_a_broken_pipe(version) {
        let daemon = Daemon::start(version);
        let logger = Logger::new(&daemon, "one-read", "one-read");
        let script = "while echo line 2> /dev/null; do usleep 10000; done; exit 7";
        let output = run_with_log_uri(&daemon, &["--rm"], &logger.uri("binary"), "c", script);
        assert_eq!(output.status.code(), Some(7), "{output:?}");
        assert!(logger.read("stdout").starts_with("line\n"));
        daemon.end();
    }

    fn a_logger_that_waits_for_sigterm_gets_it(version) {
        let daemon = Daemon::start(version);
        let logger = Logger::new(&daemon, "waits", "waits-for-sigterm");
        let begin = Instant::now();
        assert_succeeded(&run_with_log_uri(&daemon, &["--rm"], &logger.uri("binary"), "c", "echo out"));
        assert!(begin.elapsed() < Duration::from_secs(12), "{:?}", begin.elapsed());
        logger.wait_for_output("out\n", "");
        logger.wait_until_gone(Duration::from_secs(5));
        daemon.end();
    }

    fn a_logger_that_never_ends_is_killed(version) {
        let daemon = Daemon::start(version);
        let logger = Logger::new(&daemon, "stubborn", "stubborn");
        let begin = Instant::now();
        assert_succeeded(&run_with_log_uri(&daemon, &["--rm"], &logger.uri("binary"), "c", "echo out"));
        assert!(begin.elapsed() < Duration::from_secs(25), "{:?}", begin.elapsed());
        logger.wait_until_gone(Duration::from_secs(5));
        daemon.end();
    }

    fn a_killed_shim_takes_its_logger_along(version) {
        let daemon = Daemon::start(version);
        let logger = Logger::new(&daemon, "stubborn", "stubborn");
        assert_succeeded(&run_with_log_uri(&daemon, &["--detach"], &logger.uri("binary"), "c", "echo out; exec sleep 3600"));
        logger.wait_for_output("out\n", "");
        daemon.look();
        kill(daemon.shim().pid, Signal::KILL);
        daemon.assert_nothing_left();
        daemon.end();
    }

    fn a_terminal_has_a_logger(version) {
        let daemon = Daemon::start(version);
        let logger = Logger::new(&daemon, "tty", "");
        let bundle = Bundle::new(&daemon, "t");
        let spec = bundle.spec_with_dev(&["sh", "-c", "tty; echo error >&2"], true);
        let bundle = bundle.write_spec(&spec);
        let shim = Shim::connect(&bundle.start(b""));
        bundle.create_with(&shim, &Streams::terminal(&logger.uri("binary"))).unwrap();
        shim.start("t", "").unwrap();
        assert_eq!(shim.wait("t", ""), Ok(0));
        logger.wait_for_output("/dev/pts/0\r\nerror\r\n", "");
        shim.delete("t", "").unwrap();
        bundle.shut_down(&shim);
        drop(bundle);
        daemon.end();
    }

    fn a_terminal_cannot_go_into_a_file(version) {
        let daemon = Daemon::start(version);
        let file = daemon.directory().join("tty.log");
        let bundle = Bundle::new(&daemon, "t");
        let spec = bundle.spec_with_dev(&["true"], true);
        let bundle = bundle.write_spec(&spec);
        let shim = Shim::connect(&bundle.start(b""));
        let said = bundle.create_with(&shim, &Streams::terminal(&format!("file://{}", file.display()))).unwrap_err();
        assert!(said.message.contains("tty.log"), "{said}");
        bundle.shut_down(&shim);
        drop(bundle);
        daemon.end();
    }

    fn a_file_takes_both_outputs_and_keeps_what_was_there(version) {
        let daemon = Daemon::start(version);
        let file = daemon.directory().join("made/on the way/c.log");
        // ctr parses the URI and writes it anew.
        let uri = format!("file://{}", file.display()).replace(' ', "%20");
        // One container writes both outputs. The second line waits for the first: two pipes have no order.
        let go = daemon.directory().join("go");
        fs::create_dir(&go).unwrap();
        let mount = format!("type=bind,src={},dst=/go,options=rbind:rw", go.display());
        let script = "echo one; while [ ! -e /go/now ]; do sleep 0.05; done; echo two >&2";
        assert_succeeded(&run_with_log_uri(&daemon, &["--detach", "--mount", &mount], &uri, "c", script));
        eventually(Duration::from_secs(5), || {
            let text = fs::read_to_string(&file).unwrap();
            ok_if(text == "one\n", || text)
        });
        fs::write(go.join("now"), "").unwrap();
        daemon.wait_for_task("c", "STOPPED");
        assert_eq!(daemon.delete_task("c"), 0);
        assert_succeeded(&run_with_log_uri(&daemon, &["--detach"], &uri, "d", "echo three; exec sleep 3600"));
        eventually(Duration::from_secs(5), || {
            let text = fs::read_to_string(&file).unwrap();
            ok_if(text == "one\ntwo\nthree\n", || text)
        });
        assert_succeeded(&exec_with_log_uri(&daemon, &uri, "e", "d", "echo four >&2"));
        eventually(Duration::from_secs(5), || {
            let text = fs::read_to_string(&file).unwrap();
            ok_if(text == "one\ntwo\nthree\nfour\n", || text)
        });
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o7777, 0o644);
        daemon.end();
    }

    fn all_that_was_written_is_in_the_file_when_the_container_is_gone(version) {
        let daemon = Daemon::start(version);
        let file = daemon.directory().join("much.log");
        for _ in 0..3 {
            fs::write(&file, "").unwrap();
            assert_succeeded(&run_with_log_uri(&daemon, &["--rm"], &format!("file://{}", file.display()), "c", "seq 1 100000"));
            let text = fs::read_to_string(&file).unwrap();
            assert!(text.lines().count() == 100_000 && text.ends_with("\n100000\n"), "{} lines", text.lines().count());
        }
        daemon.end();
    }

    fn a_container_cannot_touch_the_file_that_its_output_goes_to(version) {
        let daemon = Daemon::start(version);
        let file = daemon.directory().join("kept.log");
        fs::write(&file, "before\n").unwrap();
        let script = "(: > /proc/self/fd/1) 2> /dev/null; stat -L -c %F /proc/self/fd/1";
        assert_succeeded(&run_with_log_uri(&daemon, &["--rm"], &format!("file://{}", file.display()), "c", script));
        assert_eq!(fs::read_to_string(&file).unwrap(), "before\nfifo\n");
        daemon.end();
    }

    fn a_stream_of_an_unknown_kind_is_refused(version) {
        let daemon = Daemon::start(version);
        let said = run_that_must_fail(&daemon, "gopher:///x", "c");
        assert!(said.contains("gopher"), "{said}");
        daemon.assert_nothing_left();
        daemon.end();
    }

    fn a_background_child_delays_the_deletion_of_an_exec_with_a_logger_or_a_file_by_nothing(version) {
        let daemon = Daemon::start(version);
        let (bundle, shim) = start_sleeper(&daemon, "s");
        let logger = Logger::new(&daemon, "bg", "waits-for-sigterm");
        let file = daemon.directory().join("bg.log");
        for (kind, uri) in [("l", logger.uri("binary")), ("f", format!("file://{}", file.display()))] {
            for round in 1..=3 {
                let exec = format!("{kind}-{round}");
                shim.exec("s", &exec, &["sh", "-c", "sleep 3600 & echo done"], &Streams::both(&uri)).unwrap();
                shim.start("s", &exec).unwrap();
                assert_eq!(shim.wait("s", &exec), Ok(0));
                let (deleted, time) = timed(|| shim.delete("s", &exec));
                deleted.unwrap();
                assert!(time < Duration::from_secs(2), "{kind}: {time:?}");
            }
        }
        logger.wait_until_gone(Duration::from_secs(15));
        logger.wait_for_output("done\ndone\ndone\n", "");
        assert_eq!(fs::read_to_string(&file).unwrap(), "done\ndone\ndone\n");
        kill_and_delete(bundle, &shim);
        daemon.end();
    }
}
