//! Output through FIFOs: every byte arrives, the shim reads no faster than the reader on the other side, and nothing
//! stays open.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test reports by failing"
)]

use std::fs::{self, File};
use std::io::{BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::Status;
use k8s_cri::v1::Int64Value;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use rustix::process::Signal;
use serde_json::json;
use shim_tests::calls::{Shim, Streams};
use shim_tests::daemon::Handler;
use shim_tests::flood::{self, Checked};
use shim_tests::image::PauseImage;
use shim_tests::proc::{Process, anonymous_kb, cpu_time, kill};
use shim_tests::raw::Bundle;
use shim_tests::until::{ok_if, timed};
use shim_tests::{
    Container, Daemon, Options, PodSpec, ShimUnderTest, Version, eventually, lab, leaks,
    on_every_containerd, ours_only,
};

/// A FIFO that [`remove_fifos_and_end`] removes.
fn make_fifo(daemon: &Daemon, name: &str) -> PathBuf {
    let folder = daemon.directory().join("streams");
    fs::create_dir_all(&folder).unwrap();
    let path = folder.join(name);
    mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
    path
}

/// Opens a FIFO for reading, as containerd does before it makes a process.
fn open_reader(path: &Path) -> File {
    // Non-blocking: the open does not wait for a writer. The end of file still comes with the last writer's end.
    let nonblock = OFlags::NONBLOCK.bits().cast_signed();
    File::options()
        .read(true)
        .custom_flags(nonblock)
        .open(path)
        .unwrap()
}

/// Reads a FIFO to its end, from the first write on.
fn read_to_end_in_thread(mut file: File) -> JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut all = Vec::new();
        let mut buffer = vec![0; 1 << 16];
        loop {
            let mut fds = [PollFd::new(&file, PollFlags::IN)];
            poll(&mut fds, None).unwrap();
            match file.read(&mut buffer) {
                Ok(0) => return all,
                Ok(read) => all.extend_from_slice(&buffer[..read]),
                Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
            }
        }
    })
}

/// Waits for the end of file. Gives all bytes.
#[track_caller]
fn bytes_at_end(reader: JoinHandle<Vec<u8>>, deadline: Duration) -> Vec<u8> {
    eventually(deadline, || {
        ok_if(reader.is_finished(), || "the reader sees no end".to_owned())
    });
    reader.join().unwrap()
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

fn lines_of_numbers(to: u32) -> Vec<u8> {
    (1..=to)
        .flat_map(|number| format!("{number}\n").into_bytes())
        .collect()
}

/// A shim of its own with a container that runs `command` on these streams, started.
fn start_container<'a>(
    daemon: &'a Daemon,
    id: &str,
    command: &[&str],
    streams: &Streams,
) -> (Bundle<'a>, Shim) {
    let bundle = Bundle::new(daemon, id);
    let spec = bundle.spec_with_dev(command, streams.terminal);
    let bundle = bundle.write_spec(&spec);
    let shim = Shim::connect(&bundle.start(b""));
    bundle.create_with(&shim, streams).unwrap();
    shim.start(id, "").unwrap();
    (bundle, shim)
}

#[track_caller]
fn kill_and_delete(bundle: Bundle<'_>, shim: &Shim) {
    // The container may have ended by itself.
    let _ = shim.kill(&bundle.id, "", 9);
    shim.wait(&bundle.id, "").unwrap();
    shim.delete(&bundle.id, "").unwrap();
    bundle.shut_down(shim);
    drop(bundle);
}

/// The end of a test with FIFOs. The client must remove its FIFOs, and the client is the test.
#[track_caller]
fn remove_fifos_and_end(daemon: Daemon) {
    fs::remove_dir_all(daemon.directory().join("streams")).unwrap();
    daemon.end();
}

fn shim_pid(shim: &Shim, id: &str) -> i32 {
    shim.pids_of(id).unwrap().shim_pid.cast_signed()
}

/// The open files of a process, for a failure text. Sockets are left out: our shim's connections come and go.
fn descriptors(pid: i32) -> Vec<String> {
    let mut found: Vec<String> = fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .flatten()
        .filter_map(|fd| Some(fs::read_link(fd.path()).ok()?.display().to_string()))
        .filter(|target| !target.starts_with("socket:"))
        .collect();
    found.sort();
    found
}

/// A `runc` in containerd's PATH for a machine without SELinux, where runc refuses a label: notes what a created init gets
/// as stdout, takes the label away, and runs the real runc. Returns the file with the note.
fn runc_that_ignores_labels(daemon: &Daemon, bundle: &Bundle<'_>) -> PathBuf {
    let note = daemon.directory().join(format!("stdout-of-{}", bundle.id));
    let script = format!(
        "#!/bin/sh\ncase \"$*\" in *' create '*)\n  stdout=$(readlink /proc/$$/fd/1)\n  echo \"$stdout\" >{}\n  \
         sed -i 's/\"selinuxLabel\":\"[^\"]*\"/\"selinuxLabel\":\"\"/' {}\nesac\nexec {} \"$@\"\n",
        text(&note),
        text(&bundle.path.join("config.json")),
        text(&lab::runc()),
    );
    let runc = daemon.directory().join("bin/runc");
    fs::write(&runc, script).unwrap();
    fs::set_permissions(&runc, fs::Permissions::from_mode(0o755)).unwrap();
    note
}

on_every_containerd! {
    fn a_slow_reader_slows_the_container_and_costs_the_shim_nothing(version) {
        let daemon = Daemon::start(version);
        let out = make_fifo(&daemon, "out");
        let reader = open_reader(&out);
        let streams = Streams { stdout: text(&out), stderr: text(&out), ..Streams::default() };
        let (bundle, shim) = start_container(&daemon, "slow", &["seq", "1", "1000000"], &streams);
        let pid = shim_pid(&shim, "slow");
        // Nobody reads: the container stands still, with a full pipe.
        let seq = || shim_tests::proc::children(pid).into_iter().find(|child| child.name == "seq");
        let (before, child) = eventually(Duration::from_secs(10), || match seq() {
            Some(child) if child.state == 'S' => Ok((anonymous_kb(pid), child)),
            other => Err(format!("{other:?}")),
        });
        let found = bytes_at_end(read_to_end_in_thread(reader), Duration::from_secs(40));
        assert!(found == lines_of_numbers(1_000_000), "{} bytes", found.len());
        let after = anonymous_kb(pid);
        assert!(after < before + 2048, "the shim grew from {before} to {after} kB");
        eventually(Duration::from_secs(10), || {
            let now = Process::of(child.pid).filter(|process| process.start == child.start && process.state != 'Z');
            ok_if(now.is_none(), || format!("{now:?}"))
        });
        kill_and_delete(bundle, &shim);
        remove_fifos_and_end(daemon);
    }

    fn a_slow_reader_slows_an_exec_and_costs_the_shim_nothing(version) {
        let daemon = Daemon::start(version);
        let (bundle, shim) = start_container(&daemon, "slow", &["sleep", "3600"], &Streams::default());
        let pid = shim_pid(&shim, "slow");
        let before = anonymous_kb(pid);
        let (out, err) = (make_fifo(&daemon, "out"), make_fifo(&daemon, "err"));
        let readers = [open_reader(&out), open_reader(&err)];
        let streams = Streams { stdout: text(&out), stderr: text(&err), ..Streams::default() };
        shim.exec("slow", "e", &["sh", "-c", "seq 1 300000 & seq 1 300000 >&2; wait"], &streams).unwrap();
        shim.start("slow", "e").unwrap();
        let writers = || {
            let named = |process: &&Process| process.name == "seq" && process.state == 'S';
            daemon.processes().iter().filter(named).count()
        };
        eventually(Duration::from_secs(10), || ok_if(writers() == 2, || format!("{} wait", writers())));
        for reader in readers.map(read_to_end_in_thread) {
            let found = bytes_at_end(reader, Duration::from_secs(40));
            assert!(found == lines_of_numbers(300_000), "{} bytes", found.len());
        }
        let after = anonymous_kb(pid);
        assert!(after < before + 2048, "the shim grew from {before} to {after} kB");
        assert_eq!(shim.wait("slow", "e"), Ok(0));
        shim.delete("slow", "e").unwrap();
        kill_and_delete(bundle, &shim);
        remove_fifos_and_end(daemon);
    }

    fn an_exit_waits_for_who_reads_the_output_and_not_for_ever(version) {
        ours_only!("the exit is told at once, and containerd before 1.6.22 then loses what it has not read");
        let daemon = Daemon::start(version);
        for terminal in [false, true] {
            let id = format!("c-{terminal}");
            let out = make_fifo(&daemon, &id);
            // A reader that has the FIFO open and does not read.
            let _reader = File::options().read(true).write(true).open(&out).unwrap();
            let streams = Streams { stdout: text(&out), stderr: text(&out), stdin: String::new(), terminal };
            let begin = Instant::now();
            let (bundle, shim) = start_container(&daemon, &id, &["echo", "unread"], &streams);
            assert_eq!(shim.wait(&id, ""), Ok(0));
            let took = begin.elapsed();
            assert!(took >= Duration::from_secs(2), "terminal: {terminal}: told after {took:?}");
            kill_and_delete(bundle, &shim);
        }
        remove_fifos_and_end(daemon);
    }

    fn the_state_does_not_wait_for_who_reads_the_output(version) {
        ours_only!("the exit is told at once");
        let daemon = Daemon::start(version);
        let out = make_fifo(&daemon, "out");
        let _reader = File::options().read(true).write(true).open(&out).unwrap();
        let streams = Streams { stdout: text(&out), stderr: text(&out), stdin: String::new(), terminal: false };
        // containerd that comes back asks for the state, and loses an exit that comes just after that.
        let known_before_told = |id: &str| {
            let (bundle, shim) = start_container(&daemon, id, &["sh", "-c", "echo unread; exit 3"], &streams);
            let (known, exit, told) = std::thread::scope(|scope| {
                let waiter = scope.spawn(|| (shim.wait(id, ""), Instant::now()));
                eventually(Duration::from_secs(10), || {
                    let state = shim.state(id, "").unwrap();
                    let stopped = state.status.enum_value() == Ok(Status::STOPPED) && state.exit_status == 3;
                    ok_if(stopped, || format!("{state:?}"))
                });
                let known = Instant::now();
                let (exit, told) = waiter.join().unwrap();
                (known, exit, told)
            });
            assert_eq!(exit, Ok(3));
            kill_and_delete(bundle, &shim);
            told.saturating_duration_since(known) > Duration::from_millis(500)
        };
        // On a busy machine whoever asks may be late.
        assert!(["a", "b", "c"].into_iter().any(known_before_told), "the state waits, too");

        // systemd removes a scope at once. containerd that comes back takes a task without processes for a leak.
        let (bundle, shim) = start_container(&daemon, "p", &["echo", "unread"], &streams);
        let pid = shim.state("p", "").unwrap().pid;
        eventually(Duration::from_secs(10), || {
            let state = shim.state("p", "").unwrap();
            ok_if(state.status.enum_value() == Ok(Status::STOPPED), || format!("{state:?}"))
        });
        for cgroup in leaks::cgroups(&daemon.names).iter().filter(|path| path.ends_with("p")) {
            fs::remove_dir(cgroup).unwrap();
        }
        let pids: Vec<u32> = shim.pids("p").unwrap().iter().map(|process| process.pid).collect();
        assert_eq!(pids, [pid]);
        kill_and_delete(bundle, &shim);

        // Who deletes it reads no more.
        let (bundle, shim) = start_container(&daemon, "d", &["sh", "-c", "echo unread; exit 4"], &streams);
        eventually(Duration::from_secs(10), || match shim.delete("d", "") {
            Ok(status) => ok_if(status == 4, || format!("exited with {status}")),
            Err(error) => Err(error.to_string()),
        });
        bundle.shut_down(&shim);
        drop(bundle);
        remove_fifos_and_end(daemon);
    }

    fn what_a_terminal_wrote_waits_for_its_reader(version) {
        ours_only!("it is lost");
        let daemon = Daemon::start(version);
        let (bundle, shim) = start_container(&daemon, "c", &["sleep", "3600"], &Streams::default());
        let (pid, out) = (shim_pid(&shim, "c"), make_fifo(&daemon, "out"));
        let streams = Streams { stdout: text(&out), terminal: true, ..Streams::default() };
        // The child keeps the terminal: it does not come to its end by itself.
        shim.exec("c", "e", &["sh", "-c", "trap '' HUP; sleep 3600 & echo kept"], &streams).unwrap();
        shim.start("c", "e").unwrap();
        assert_eq!(shim.wait("c", "e"), Ok(0));
        eventually(Duration::from_secs(20), || {
            let open = descriptors(pid).into_iter().filter(|target| *target == text(&out)).count();
            ok_if(open <= 1, || format!("it is open {open} times"))
        });
        let found = bytes_at_end(read_to_end_in_thread(open_reader(&out)), Duration::from_secs(10));
        assert_eq!(String::from_utf8(found).unwrap().trim(), "kept");
        shim.delete("c", "e").unwrap();
        kill_and_delete(bundle, &shim);
        remove_fifos_and_end(daemon);
    }

    fn an_exec_whose_reader_has_gone_leaves_nothing_open(version) {
        let daemon = Daemon::start(version);
        let (bundle, shim) = start_container(&daemon, "c", &["sleep", "3600"], &Streams::default());
        let (pid, out) = (shim_pid(&shim, "c"), make_fifo(&daemon, "out"));
        let before = descriptors(pid);
        let gone = open_reader(&out);
        let streams = Streams { stdout: text(&out), stderr: text(&out), ..Streams::default() };
        shim.exec("c", "e", &["seq", "1", "1000000"], &streams).unwrap();
        shim.start("c", "e").unwrap();
        let waits = |process: &Process| process.name == "seq" && process.state == 'S';
        eventually(Duration::from_secs(20), || {
            ok_if(daemon.processes().iter().any(waits), || "it does not wait".to_owned())
        });
        drop(gone);
        shim.kill("c", "e", 9).unwrap();
        assert_eq!(shim.wait("c", "e"), Ok(137));
        shim.delete("c", "e").unwrap();
        eventually(Duration::from_secs(20), || {
            let now = descriptors(pid);
            ok_if(now.len() <= before.len(), || format!("from {before:?} to {now:?}"))
        });
        kill_and_delete(bundle, &shim);
        remove_fifos_and_end(daemon);
    }

    fn input_arrives_whole_also_when_it_is_closed_before_it_is_read(version) {
        let daemon = Daemon::start(version);
        let (stdin, out) = (make_fifo(&daemon, "in"), make_fifo(&daemon, "out"));
        let (bundle, shim) = start_container(&daemon, "c", &["sleep", "3600"], &Streams::default());
        let streams = Streams { stdin: text(&stdin), stdout: text(&out), stderr: text(&out), terminal: false };
        let reader = read_to_end_in_thread(open_reader(&out));
        shim.exec("c", "e", &["sh", "-c", "sleep 1; wc -c"], &streams).unwrap();
        shim.start("c", "e").unwrap();
        let mut writer = File::options().write(true).open(&stdin).unwrap();
        let writing = std::thread::spawn(move || writer.write_all(&vec![b'x'; 1_000_000]));
        // The pipes are full by now, and most is still to come.
        shim.close_stdin("c", "e").unwrap();
        writing.join().unwrap().unwrap();
        assert_eq!(String::from_utf8(bytes_at_end(reader, Duration::from_secs(10))).unwrap().trim(), "1000000");
        assert_eq!(shim.wait("c", "e"), Ok(0));
        shim.delete("c", "e").unwrap();
        kill_and_delete(bundle, &shim);
        remove_fifos_and_end(daemon);
    }

    fn a_background_child_delays_the_deletion_of_an_exec_by_nothing(version) {
        let daemon = Daemon::start(version);
        let (bundle, shim) = start_container(&daemon, "s", &["sleep", "3600"], &Streams::default());
        for terminal in [false, true] {
            for round in 1..=3 {
                let id = format!("e-{terminal}-{round}");
                let out = make_fifo(&daemon, &id);
                let streams = Streams { stdout: text(&out), stderr: text(&out), stdin: String::new(), terminal };
                let reader = read_to_end_in_thread(open_reader(&out));
                shim.exec("s", &id, &["sh", "-c", "trap '' HUP; sleep 3600 & echo done"], &streams).unwrap();
                shim.start("s", &id).unwrap();
                assert_eq!(shim.wait("s", &id), Ok(0));
                let (deleted, time) = timed(|| shim.delete("s", &id));
                deleted.unwrap();
                let found = bytes_at_end(reader, Duration::from_secs(5));
                assert_eq!(String::from_utf8(found).unwrap().trim(), "done");
                assert!(time < Duration::from_secs(2), "terminal: {terminal}: {time:?}");
            }
        }
        kill_and_delete(bundle, &shim);
        remove_fifos_and_end(daemon);
    }

    fn an_init_with_a_label_writes_a_pipe_and_loses_no_output(version) {
        let daemon = Daemon::start(version);
        let label = json!("system_u:system_r:container_t:s0:c1,c2");
        for (id, label) in [("labelled", label), ("plain", json!(""))] {
            let labelled = id == "labelled";
            let out = make_fifo(&daemon, id);
            let bundle = Bundle::new(&daemon, id);
            let note = runc_that_ignores_labels(&daemon, &bundle);
            // The child stays in the node's process namespace, and keeps the stream: nothing waits for the child.
            for round in 1..=3 {
                let script = "seq 1 20000; sleep 3600 & echo end; exit 3";
                let mut spec = bundle.spec_with_dev(&["sh", "-c", script], false);
                spec["process"]["selinuxLabel"] = label.clone();
                spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != "pid");
                fs::write(bundle.path.join("config.json"), spec.to_string()).unwrap();
                let shim = Shim::connect(&bundle.start(b""));
                let reader = read_to_end_in_thread(open_reader(&out));
                let streams = Streams { stdout: text(&out), stderr: text(&out), ..Streams::default() };
                bundle.create_with(&shim, &streams).unwrap();
                let stream = fs::read_to_string(&note).unwrap();
                if ShimUnderTest::get() == ShimUnderTest::Pause && !labelled {
                    assert_eq!(stream.trim(), text(&out));
                } else {
                    assert!(stream.starts_with("pipe:"), "{id}, round {round}: {stream}");
                }
                shim.start(id, "").unwrap();
                daemon.look();
                let (exit, time) = timed(|| shim.wait(id, ""));
                assert_eq!(exit, Ok(3));
                shim.delete(id, "").unwrap();
                let found = bytes_at_end(reader, Duration::from_secs(5));
                assert!(found == [lines_of_numbers(20_000), b"end\n".to_vec()].concat(), "{} bytes", found.len());
                bundle.shut_down(&shim);
                assert!(time < Duration::from_millis(1500), "{id}, round {round}: {time:?}");
            }
        }
        remove_fifos_and_end(daemon);
    }

    fn a_background_child_delays_the_end_of_a_container_and_its_pod_by_nothing(version) {
        let daemon = Daemon::start(version);
        for terminal in [false, true] {
            for round in 1..=3 {
                let id = format!("c-{terminal}-{round}");
                let out = make_fifo(&daemon, &id);
                let bundle = Bundle::new(&daemon, &id);
                let mut spec = bundle.spec_with_dev(&["sh", "-c", "trap '' HUP; sleep 3600 & echo done"], terminal);
                // In the node's process namespace, the end of the init does not end the child.
                spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != "pid");
                let bundle = bundle.write_spec(&spec);
                let shim = Shim::connect(&bundle.start(b""));
                let reader = read_to_end_in_thread(open_reader(&out));
                let streams = Streams { stdout: text(&out), stderr: text(&out), stdin: String::new(), terminal };
                bundle.create_with(&shim, &streams).unwrap();
                shim.start(&id, "").unwrap();
                daemon.look();
                assert_eq!(shim.wait(&id, ""), Ok(0));
                let (deleted, time) = timed(|| shim.delete(&id, ""));
                deleted.unwrap();
                assert_eq!(String::from_utf8(bytes_at_end(reader, Duration::from_secs(5))).unwrap().trim(), "done");
                bundle.shut_down(&shim);
                drop(bundle);
                fs::remove_file(&out).unwrap();
                daemon.assert_nothing_left();
                assert!(time < Duration::from_secs(3), "terminal: {terminal}: {time:?}");
            }
        }
        remove_fifos_and_end(daemon);
    }

    fn nothing_stays_open_after_failed_creates_and_starts(version) {
        let daemon = Daemon::start(version);
        let (bundle, shim) = start_container(&daemon, "steady", &["sleep", "3600"], &Streams::default());
        let pid = shim_pid(&shim, "steady");
        let (stdin, out, err) = (make_fifo(&daemon, "in"), make_fifo(&daemon, "out"), make_fifo(&daemon, "err"));
        let _client = [&stdin, &out, &err].map(|path| File::options().read(true).write(true).open(path).unwrap());
        let absent = text(&daemon.directory().join("no-such-fifo"));
        let folder = daemon.directory().join("logger");
        fs::create_dir(&folder).unwrap();
        let logger = format!("binary://{}?logger={}", lab::probe().display(), folder.display());
        let fifos = Streams { stdin: text(&stdin), stdout: text(&out), stderr: text(&err), terminal: false };
        let streams = [
            ("null", Streams::default()),
            ("FIFOs", fifos.clone()),
            ("a terminal", Streams { stderr: String::new(), terminal: true, ..fifos.clone() }),
            ("a logger", Streams::both(&logger)),
            ("a terminal with a logger", Streams::terminal(&logger)),
            ("a file", Streams::both(&format!("file://{}", text(&daemon.directory().join("file.log"))))),
            ("a FIFO for stderr that is not there", Streams { stderr: absent.clone(), ..fifos.clone() }),
            ("a FIFO for stdin that is not there", Streams { stdin: absent.clone(), ..fifos }),
            ("a terminal without its FIFO", Streams::terminal(&absent)),
            ("a logger that is not there", Streams::both("binary:///nowhere/logger")),
        ];
        let mut leaks = Vec::new();
        for (kind, streams) in &streams {
            // Once before counting: whatever is opened for good is opened then.
            let mut before = Vec::new();
            for round in 0..3 {
                shim.exec("steady", "e", &["/no/such/program"], streams).unwrap();
                shim.start("steady", "e").expect_err(kind);
                shim.delete("steady", "e").unwrap();

                let failing = Bundle::new(&daemon, "failing");
                let spec = failing.spec_with_dev(&["/no/such/program"], streams.terminal);
                let failing = failing.write_spec(&spec);
                failing.create_with(&shim, streams).expect_err(kind);
                drop(failing);
                if round == 0 {
                    before = descriptors(pid);
                }
            }
            let same = shim_tests::until::within(Duration::from_secs(6), || {
                let now = descriptors(pid);
                ok_if(now.len() <= before.len(), || format!("{kind}: from {before:?} to {now:?}"))
            });
            leaks.extend(same.err());
        }
        assert!(leaks.is_empty(), "{}", leaks.join("\n"));
        kill_and_delete(bundle, &shim);
        remove_fifos_and_end(daemon);
    }

    fn io_uid_and_io_gid_own_the_streams(version) {
        let daemon = Daemon::with(version, &Options::runtime("IoUid = 1234\nIoGid = 2345"));
        let pod = PodSpec::new("owner").run(&daemon);
        let script = "stat -L -c %u:%g /proc/self/fd/1 /proc/self/fd/2 && echo again > /dev/stdout && echo oops > /dev/stderr && exec sleep 3600";
        let mut spec = pod.container("one").shell(script);
        spec.security().run_as_user = Some(Int64Value { value: 1234 });
        let container = spec.start();
        eventually(Duration::from_secs(5), || {
            let found = (container.log_lines("stdout"), container.log_lines("stderr"));
            ok_if(found.0 == ["1234:2345", "1234:2345", "again"] && found.1 == ["oops"], || format!("{found:?}"))
        });
        let executed = container.exec(&["sh", "-c", "stat -L -c %u:%g /proc/self/fd/1; echo more > /dev/stdout"]);
        assert_eq!(executed.stdout, "1234:2345\nmore\n", "{executed:?}");
        daemon.end();
    }

    fn a_containerd_killed_in_full_flow_loses_what_it_had_read_and_nothing_else(version) {
        let daemon = Daemon::start(version);
        let mut flood = Flood::start(&daemon, "", 64);
        flood.wait_for_log(4 << 20);
        daemon.kill();
        // It rests in the middle until it is told to go on, so it has not ended by now.
        fs::write(flood.folder.join("go"), "").unwrap();
        flood.wait_until_it_stands_still();
        daemon.start_again();
        flood.wait_and_check_log(64);
        let log = BufReader::new(File::open(&flood.container.log).unwrap());
        let (missing, broken) = flood::missing(log, flood::lines(64)).unwrap();
        let bytes: usize = missing.iter().map(|number| flood::line(*number).len() + 1).sum();
        eprintln!("containerd {}: {} lines of {bytes} bytes missing, {broken} records broken", version.line(), missing.len());
        // One gap, as long as containerd's buffers: 32 KiB, what its logger has of a line, and the line that was cut.
        assert!(missing.is_sorted() && missing.last().zip(missing.first()).is_none_or(|(last, first)| last - first < missing.len() as u64), "{missing:?}");
        assert!(bytes < 128 << 10 && broken <= 2, "{bytes} bytes, {broken} broken");
        drop(flood);
        daemon.end();
    }

    fn a_flood_of_output_is_byte_exact_over_a_stopped_and_a_killed_containerd(version) {
        ours_only!("it runs both shims side by side, and compares them");
        let mib = std::env::var("FLOOD_MIB").map_or(64, |mib| mib.parse().expect("FLOOD_MIB: a number of MiB"));
        let daemon = daemon_with_both_shims(version);
        let mut floods: Vec<Flood<'_>> = ["", "runc"].iter().map(|handler| Flood::start(&daemon, handler, mib)).collect();

        // In the middle of it containerd stands still: so do the containers, and nobody gathers what they write.
        for flood in &floods {
            flood.wait_for_log(mib << 17);
        }
        let containerd = daemon.pid();
        kill(containerd, Signal::STOP);
        for flood in &floods {
            flood.wait_until_it_stands_still();
        }
        kill(containerd, Signal::CONT);

        // All that has been written has arrived (what containerd has read and not yet written dies with it, under any
        // shim); then it is killed, and the containers go on until their pipes are full.
        for flood in &floods {
            flood.wait_for_half(mib);
        }
        daemon.kill();
        for flood in &floods {
            fs::write(flood.folder.join("go"), "").unwrap();
        }
        for flood in &floods {
            flood.wait_until_it_stands_still();
        }
        daemon.start_again();
        for flood in &mut floods {
            flood.wait_and_check_log(mib);
        }
        eprintln!("containerd {}, {mib} MiB through a FIFO each, side by side:", version.line());
        for flood in &floods {
            flood.report();
        }
        let ours = &floods[0];
        ours.verdict.as_ref().unwrap();
        assert!(ours.memory_most.get() < ours.memory_before + 2048, "the shim grew");
        assert!(ours.cpu <= floods[1].cpu, "more CPU time than the stock shim");
        drop(floods);
        daemon.end();
    }
}

/// A containerd with the stock shim beside the shim under test, without debug output.
fn daemon_with_both_shims(version: Version) -> Daemon {
    let daemon = Daemon::with(
        version,
        &Options {
            pause_image: PauseImage::Works,
            handlers: vec![Handler {
                name: "runc".to_owned(),
                runtime_type: ShimUnderTest::Runc.runtime_type().to_owned(),
                runtime_path: None,
                options: String::new(),
                sandbox_api: false,
            }],
            debug: false,
            ..Options::default()
        },
    );
    let stock = ShimUnderTest::Runc.binary_name();
    std::os::unix::fs::symlink(
        ShimUnderTest::Runc.binary(version),
        daemon.directory().join("bin").join(stock),
    )
    .unwrap();
    daemon
}

/// A container that writes a flood, under one of the two shims.
struct Flood<'a> {
    folder: PathBuf,
    container: Container<'a>,
    shim: ShimProcess,
    cpu: Duration,
    memory_before: u64,
    memory_most: std::cell::Cell<u64>,
    verdict: Result<(), String>,
}

struct ShimProcess(Process, &'static str);

impl ShimProcess {
    fn name(&self) -> &'static str {
        self.1
    }
}

impl<'a> Flood<'a> {
    /// Prints what was measured.
    fn report(&self) {
        eprintln!(
            "  {:26} {:6.2} s of CPU time, own memory {} kB before, {} kB at most, log {}",
            self.shim.name(),
            self.cpu.as_secs_f64(),
            self.memory_before,
            self.memory_most.get(),
            self.verdict
                .as_ref()
                .map_or_else(Clone::clone, |()| "byte-exact".to_owned()),
        );
    }

    fn start(daemon: &'a Daemon, handler: &str, mib: u64) -> Self {
        let which = if handler.is_empty() {
            ShimUnderTest::get()
        } else {
            ShimUnderTest::Runc
        };
        let folder = daemon.directory().join(format!("flood-{handler}"));
        fs::create_dir(&folder).unwrap();
        let pod = PodSpec::new(&format!("flood{handler}"))
            .handler(handler)
            .run(daemon);
        let container = pod
            .container("writer")
            .probe()
            .mount(&text(&folder), "/flood");
        let container = container
            .command(&["/probe", "flood", &mib.to_string(), "/flood"])
            .create();
        let named = |process: &Process| {
            process
                .command_line()
                .split(' ')
                .next()
                .is_some_and(|it| it.ends_with(which.binary_name()))
        };
        let shim = daemon.processes().into_iter().find(named).unwrap();
        let memory_before = anonymous_kb(shim.pid);
        container.try_start().unwrap();
        Self {
            folder,
            container,
            shim: ShimProcess(shim, which.binary_name()),
            cpu: Duration::ZERO,
            memory_before,
            memory_most: std::cell::Cell::new(memory_before),
            verdict: Ok(()),
        }
    }

    fn note_memory(&self) {
        let now = anonymous_kb(self.shim.0.pid);
        self.memory_most.set(self.memory_most.get().max(now));
    }

    fn log_bytes(&self) -> u64 {
        fs::metadata(&self.container.log).map_or(0, |log| log.len())
    }

    fn wait_for_log(&self, bytes: u64) {
        eventually(Duration::from_secs(120), || {
            self.note_memory();
            ok_if(self.log_bytes() >= bytes, || {
                format!("{} bytes", self.log_bytes())
            })
        });
    }

    /// Waits until the writer waits in a write: its FIFO, and the shim's buffers, are full.
    fn wait_until_it_stands_still(&self) {
        let mut steady = 0;
        let mut last = None;
        eventually(Duration::from_secs(60), || {
            self.note_memory();
            let writer = shim_tests::proc::children(self.shim.0.pid)
                .into_iter()
                .find(|child| child.name == "probe");
            let writer = writer.ok_or("no writer")?;
            let now = fs::read_to_string(format!("/proc/{}/io", writer.pid))
                .map_err(|error| error.to_string())?;
            let same = writer.state == 'S' && last.as_ref() == Some(&now);
            steady = if same { steady + 1 } else { 0 };
            last = Some(now);
            ok_if(steady >= 20, || format!("it still writes: {last:?}"))
        });
    }

    /// Waits until the first half is in the log, with its last line.
    fn wait_for_half(&self, mib: u64) {
        let mut last = flood::line(flood::half(mib) - 1);
        last.push(b'\n');
        eventually(Duration::from_secs(240), || {
            self.note_memory();
            let tail = end_of_file(&self.container.log, last.len());
            ok_if(tail == last, || {
                format!("{} bytes in the log", self.log_bytes())
            })
        });
    }

    fn wait_and_check_log(&mut self, mib: u64) {
        let code = eventually(Duration::from_secs(600), || {
            self.note_memory();
            let (status, _) = self.container.status();
            ok_if(
                status.state() == k8s_cri::v1::ContainerState::ContainerExited,
                || format!("{:?}", status.state()),
            )
            .map(|()| status.exit_code)
        });
        self.cpu = cpu_time(self.shim.0.pid);
        let mut checked = Checked::default();
        let log = BufReader::with_capacity(1 << 20, File::open(&self.container.log).unwrap());
        self.verdict = checked.take_cri_log(log).and_then(|()| {
            ok_if(checked.lines == flood::lines(mib) && code == 0, || {
                format!(
                    "{} of {} lines, exit code {code}",
                    checked.lines,
                    flood::lines(mib)
                )
            })
        });
    }
}

/// The end of a file.
fn end_of_file(path: &Path, bytes: usize) -> Vec<u8> {
    let mut buffer = vec![0; bytes];
    let file = File::open(path).unwrap();
    let from = file.metadata().unwrap().len().saturating_sub(bytes as u64);
    let read = file.read_at(&mut buffer, from).unwrap();
    buffer.truncate(read);
    buffer
}
