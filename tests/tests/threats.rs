//! Attacks on a pod of our own, from each of the places that SECURITY.md names: a container, a local user, an image, a
//! client of containerd. SECURITY.md names the tests.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_shim_protos::ttrpc::Code;
use rustix::process::{Pid, Signal, test_kill_process};
use rustix::thread::{Gid, Uid, set_thread_groups, set_thread_res_gid, set_thread_res_uid};
use serde_json::json;
use shim_tests::calls::{Shim, Streams, refusal};
use shim_tests::proc::{Process, anonymous_kb, children, kill};
use shim_tests::raw::Bundle;
use shim_tests::slot::text;
use shim_tests::{
    Container, Daemon, Pod, PodSpec, eventually, image, leaks, on_every_containerd,
    on_the_newest_containerd, on_the_newest_in_every_mode, ours_only,
};

/// `nobody`: a user of the node without privileges.
const NOBODY: u32 = 65534;

/// Runs `attempt` as a local user without privileges, on a thread of its own: ids and capabilities are a thread's.
fn as_local_user<T: Send>(attempt: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
            set_thread_groups(&[]).unwrap();
            set_thread_res_gid(gid, gid, gid).unwrap();
            set_thread_res_uid(uid, uid, uid).unwrap();
            attempt()
        });
        thread.join().unwrap()
    })
}

/// The socket of the pod's shim.
fn socket_of(daemon: &Daemon, pod: &Pod<'_>) -> PathBuf {
    let group = leaks::TaskId {
        namespace: "k8s.io".to_owned(),
        id: pod.id.clone(),
    };
    leaks::shim_socket(&leaks::grpc_address(&daemon.names), &group)
}

/// All files and folders below `folder`, links not followed. What goes away meanwhile is left out.
fn all_below(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut pending = vec![folder.to_owned()];
    while let Some(folder) = pending.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) && entry.file_name() != "rootfs" {
                pending.push(entry.path());
            }
            found.push(entry.path());
        }
    }
    found
}

/// The open files of a process, by descriptor.
fn open_files(pid: i32) -> BTreeMap<i32, String> {
    let entries = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    entries
        .filter_map(|entry| {
            let number = entry.file_name().to_str()?.parse().ok()?;
            let link = fs::read_link(entry.path()).ok()?;
            Some((number, link.to_string_lossy().into_owned()))
        })
        .collect()
}

/// A process has three streams and no other descriptor, and its working directory is the root of the container.
#[track_caller]
fn assert_only_streams(what: &str, pid: i32) {
    let files = open_files(pid);
    let numbers: Vec<i32> = files.keys().copied().collect();
    assert_eq!(numbers, [0, 1, 2], "{what}: {files:?}");
    for (number, link) in &files {
        let stream =
            link.starts_with("pipe:[") || link == "/dev/null" || link.starts_with("/dev/pts/");
        let fifo = fs::metadata(format!("/proc/{pid}/fd/{number}"))
            .unwrap()
            .file_type()
            .is_fifo();
        assert!(stream || fifo, "{what}: {number} is {link}");
    }
    assert_eq!(
        fs::read_link(format!("/proc/{pid}/cwd")).unwrap(),
        Path::new("/"),
        "{what}"
    );
}

/// The pid that a process has in its own process namespace.
fn inner_pid(pid: i32) -> String {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("NSpid:"))
        .unwrap();
    line.split_whitespace().last().unwrap().to_owned()
}

fn start_prober<'a>(pod: &Pod<'a>, name: &str, capabilities: &[&str]) -> Container<'a> {
    let spec = pod.container(name).probe().capabilities(capabilities);
    spec.command(&["sleep", "3600"]).start()
}

on_the_newest_in_every_mode! {
    fn a_process_has_its_streams_and_no_other_file_of_the_node(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("streams").run(&daemon);
        assert_only_streams("an init", pod.sleeper("plain").pid());
        assert_only_streams("an init with a terminal", pod.container("tty").tty().command(&["sleep", "3600"]).start().pid());
        let one = pod.sleeper("one");
        // An exec looks at itself: its shell has no other descriptor when the loop begins.
        let seen = one.shell("for f in 0 1 2 3 4 5 6 7 8 9 10 11 12; do [ -e /proc/$$/fd/$f ] && echo $f; done; readlink /proc/$$/cwd");
        assert_eq!(seen, "0\n1\n2\n/", "an exec");
        // Upwards from the working directory there is nothing but the container's own root (CVE-2024-21626).
        let climbed = one.shell("cd /proc/self/cwd/../../../../..; [ $(stat -c %d:%i .) = $(stat -c %d:%i /) ] && echo root");
        assert_eq!(climbed, "root");
        daemon.end();
    }

    /// CVE-2024-21626: the working directory of an image or a manifest leads through an open directory of the runtime.
    fn a_working_directory_is_no_folder_of_the_node(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("folders").run(&daemon);
        for descriptor in [6, 7, 8] {
            let mut spec = pod.container(&format!("fd{descriptor}")).command(&["sleep", "3600"]);
            spec.config.working_dir = format!("/proc/self/fd/{descriptor}");
            let Ok(container) = spec.try_start() else { continue };
            let here = fs::metadata(format!("/proc/{}/cwd", container.pid())).unwrap();
            let root = fs::metadata(format!("/proc/{}/root/.", container.pid())).unwrap();
            assert_eq!(here.dev(), root.dev(), "{descriptor}: {:?}", fs::read_link(format!("/proc/{}/cwd", container.pid())));
        }
        daemon.end();
    }

    fn what_a_container_does_to_its_output_is_its_own_loss(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("output").shared_processes().run(&daemon);
        let beside = pod.container("beside").shell("while :; do echo here; sleep 1; done").start();
        // Takes all rights from its FIFO, gives the FIFO away, and reads its own output.
        let abuser = pod
            .container("abuser")
            .shell("chmod 0 /proc/self/fd/1; chown 12345:12345 /proc/self/fd/1; echo one; \
                    exec 3<>/proc/self/fd/1; echo two; head -c 4 <&3 >/dev/null & exec sleep 3600")
            .start();
        // containerd opens the FIFO again.
        daemon.kill();
        daemon.start_again();
        assert!(abuser.running());
        abuser.stop(0);
        assert_eq!(abuser.wait(), 137);
        abuser.remove();
        let lines = beside.log_lines("stdout").len();
        eventually(Duration::from_secs(5), || {
            let now = beside.log_lines("stdout").len();
            if now > lines { Ok(()) } else { Err(format!("{now} lines of the neighbour")) }
        });
        assert_eq!(beside.output(&["echo", "still here"]), "still here");
        daemon.end();
    }

    /// Not the end of the pod. containerd waits for the end of the output before it takes a container for ended, under any shim.
    fn an_output_that_another_container_keeps_open_delays_one_end(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("held").shared_processes().run(&daemon);
        let one = pod.sleeper("one");
        let output = format!("/proc/{}/fd/1", inner_pid(one.pid()));
        let holder = pod.container("holder").shell(&format!("exec 3<>{output}; exec sleep 3600")).start();
        eventually(Duration::from_secs(5), || {
            let files = open_files(holder.pid());
            if files.contains_key(&3) { Ok(()) } else { Err(format!("{files:?}")) }
        });
        let init = Process::of(one.pid()).unwrap();
        kill(one.pid(), Signal::KILL);
        eventually(Duration::from_secs(5), || if init.alive() { Err("the init lives".to_owned()) } else { Ok(()) });
        assert!(pod.ready() && holder.running());
        // The end of whoever holds the output is the end of the wait; the kubelet ends all containers of a pod at once.
        holder.stop(0);
        assert_eq!(one.wait(), 137);
        daemon.end();
    }

    /// runc is in the process namespace while runc makes a container there, and has the node's root for some time.
    fn sys_ptrace_in_a_shared_process_namespace_reaches_runc(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("traced").shared_processes().run(&daemon);
        let node = text(&daemon.directory());
        let script = format!("while :; do for p in /proc/[0-9]*; do [ -e $p/root/{node} ] && echo reached; done; done");
        let attack = |name: &str, capabilities: &[&str]| {
            let spec = pod.container(name).capabilities(capabilities).shell(&script);
            spec.start()
        };
        let (with, without) = (attack("with", &["SYS_PTRACE"]), attack("without", &[]));
        for number in 0..20 {
            let one = pod.sleeper(&format!("one{number}"));
            one.output(&["true"]);
            if !with.log_lines("stdout").is_empty() {
                break;
            }
        }
        assert!(!with.log_lines("stdout").is_empty(), "say in SECURITY.md that it cannot");
        assert_eq!(without.log_lines("stdout"), [""; 0]);
        daemon.end();
    }

    fn a_name_of_a_container_forges_no_line_of_the_nodes_log(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("forger").run(&daemon);
        let forged = "time=\"2026-01-01T00:00:00Z\" level=fatal msg=forged";
        let program = format!("/x\n{forged}\n\u{1b}[2J\u{202e}\r{forged}");
        pod.container("one").command(&[&program]).try_start().err().expect("there is no such program");
        let exec = pod.sleeper("two").try_exec(&[&program]);
        assert_ne!(exec.map_or(1, |done| done.code), 0);
        let log = fs::read_to_string(daemon.directory().join("containerd.log")).unwrap();
        assert!(log.contains("forged"), "nobody has logged the failure: this test shows nothing");
        let begun: Vec<_> = log.split(['\n', '\r']).filter(|line| line.starts_with(forged)).collect();
        assert!(begun.is_empty(), "{begun:?}");
        assert!(!log.contains(['\u{1b}', '\u{202e}']), "raw control characters");
        daemon.end();
    }

    fn a_container_among_the_nodes_processes_cannot_look_into_the_shim(version) {
        ours_only!("of the stock shim's holder there is more to see");
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("hostpid").host_pid().run(&daemon);
        let container = start_prober(&pod, "one", &[]);
        let shim = daemon.shim();
        for pid in [shim.pid, pod.pid()] {
            assert_eq!(container.output(&["/probe", "attack", &pid.to_string()]), "nothing");
            let links = format!("for f in root cwd exe fd/0 ns/net ns/mnt; do readlink /proc/{pid}/$f && echo $f; done; \
                                 ls /proc/{pid}/root/ 2>/dev/null; true");
            assert_eq!(container.shell(&links), "", "links of {pid}");
        }
        // What such a pod can: with SYS_PTRACE it is the node's root, and root of the node may end any process.
        let root = start_prober(&pod, "root", &["SYS_PTRACE"]);
        assert!(root.output(&["/probe", "attack", &shim.pid.to_string()]).contains("environ"));
        daemon.look();
        let _ = container.try_exec(&["kill", "-9", &shim.pid.to_string()]);
        pod.wait_until_not_ready();
        daemon.end();
    }

    fn orphans_of_a_container_among_the_nodes_processes_are_reaped(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("orphans").host_pid().run(&daemon);
        let (maker, beside) = (start_prober(&pod, "maker", &[]), pod.sleeper("beside"));
        let shim = daemon.shim();
        let made = maker.try_exec_for(&["/probe", "orphans", "5000"], 60).unwrap();
        assert_eq!(made.code, 0, "{made:?}");
        assert_eq!(beside.output(&["echo", "still here"]), "still here");
        eventually(Duration::from_secs(5), || {
            let dead: Vec<Process> = children(shim.pid).into_iter().filter(|child| child.state == 'Z').collect();
            if dead.is_empty() { Ok(()) } else { Err(format!("{} zombies", dead.len())) }
        });
        assert!(shim.alive());
        daemon.end();
    }

    fn a_local_user_reaches_nothing_of_a_pod(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("guarded").shared_processes().run(&daemon);
        let container = pod.sleeper("one");
        let shim = daemon.shim();
        let socket = socket_of(&daemon, &pod);
        drop(UnixStream::connect(&socket).expect("root connects"));
        let mut processes: Vec<i32> = children(shim.pid).iter().map(|child| child.pid).collect();
        processes.extend([shim.pid, pod.pid(), container.pid()]);
        let files = all_below(&daemon.directory().join("state"));
        assert!(files.iter().any(|file| file.ends_with("config.json")), "{files:?}");
        let reached: Vec<String> = as_local_user(|| {
            let mut reached = Vec::new();
            match UnixStream::connect(&socket) {
                Err(error) if error.kind() == ErrorKind::PermissionDenied => {}
                other => reached.push(format!("{}: {other:?}", socket.display())),
            }
            reached.extend(fs::read_dir(socket.parent().unwrap()).map(|_| "the folder of the sockets".to_owned()));
            for pid in processes {
                let of = |name: &str| format!("/proc/{pid}/{name}");
                let read = |name: &str| File::open(of(name)).and_then(|mut file| file.read(&mut [0; 64])).is_ok_and(|read| read > 0);
                reached.extend(["environ", "maps", "syscall", "auxv"].into_iter().filter(|name| read(name)).map(of));
                let mem = File::options().read(true).write(true).open(of("mem"));
                reached.extend(mem.map(|_| of("mem")));
                let links = ["root", "cwd", "exe", "fd/0", "ns/net", "ns/mnt", "ns/pid"];
                reached.extend(links.into_iter().filter(|name| fs::read_link(of(name)).is_ok() || File::open(of(name)).is_ok()).map(of));
                reached.extend(fs::read_dir(of("fd")).map(|_| of("fd")));
                let signal = test_kill_process(Pid::from_raw(pid).unwrap());
                reached.extend(signal.map(|()| format!("a signal to {pid}")));
            }
            for file in files {
                let open = [File::open(&file), File::options().append(true).open(&file)];
                reached.extend(open.into_iter().flatten().map(|_| file.display().to_string()));
            }
            reached
        });
        assert!(reached.is_empty(), "a local user reaches {reached:#?}");
        assert!(shim.alive() && container.running());
        daemon.end();
    }

    fn links_in_an_image_lead_to_no_file_of_the_node(version) {
        let daemon = Daemon::start(version);
        let victim = daemon.directory().join("victim");
        fs::create_dir(&victim).unwrap();
        let pod = PodSpec::new("trapped").run(&daemon);
        let mut run = Vec::new();
        for trap in image::Trap::ALL {
            let name = daemon.import_trap(trap, &victim);
            let container = pod.container(&format!("{trap:?}").to_lowercase()).image(&name).command(&["/bin/sleep", "3600"]);
            // runc may refuse such an image. Where the container runs, the links have been followed inside.
            if let Ok(container) = container.try_start() {
                let seen = container.output(&["/bin/busybox", "cat", "/etc/hostname"]);
                assert_eq!(seen, "trapped", "{trap:?}");
                container.stop(0);
                container.remove();
                run.push(trap);
            }
            let made: Vec<_> = fs::read_dir(&victim).unwrap().flatten().map(|entry| entry.path()).collect();
            assert!(made.is_empty(), "{trap:?} has made {made:?} on the node");
        }
        assert!(run.contains(&image::Trap::Files), "of the images, only {run:?} run");
        daemon.end();
    }

    fn shared_memory_has_a_bound(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("memory").run(&daemon);
        let container = pod.sleeper("one");
        let filled = container.exec(&["sh", "-c", "cat /dev/zero | head -c 100000000 > /dev/shm/much"]);
        assert_ne!(filled.code, 0, "{filled:?}");
        assert_eq!(container.shell("stat -c %s /dev/shm/much"), (64 << 20).to_string());
        daemon.end();
    }
}

on_the_newest_containerd! {
    fn a_container_in_the_nodes_network_finds_no_socket_of_the_shim(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("hostnet").host_network().run(&daemon);
        let container = pod.sleeper("one");
        let files = open_files(daemon.shim().pid);
        let inodes: Vec<&str> = files.values().filter_map(|link| link.strip_prefix("socket:[")?.strip_suffix(']')).collect();
        assert!(!inodes.is_empty(), "{files:?}");
        // An abstract socket has no file and no mode: who shares the network namespace may connect (CVE-2020-15257).
        let listed = container.output(&["cat", "/proc/net/unix"]);
        let names: Vec<&str> = listed
            .lines()
            .filter(|line| inodes.iter().any(|inode| line.split_whitespace().nth(6) == Some(inode)))
            .filter_map(|line| line.split_whitespace().nth(7))
            .collect();
        let socket = text(&socket_of(&daemon, &pod));
        assert!(names.contains(&socket.as_str()), "{names:?}");
        assert!(names.iter().all(|name| name.starts_with('/')), "{names:?}");
        assert_ne!(container.exec(&["ls", &socket]).code, 0, "the file is not in the container");
        daemon.end();
    }

    fn an_id_leads_to_no_other_folder(version) {
        ours_only!("the stock shim leaves ids to containerd and to runc");
        let daemon = Daemon::start(version);
        let bundle = Bundle::new(&daemon, "ids");
        let spec = bundle.plain_spec(&["sleep", "3600"]);
        let bundle = bundle.write_spec(&spec);
        let started = bundle.start(b"");
        let shim = Shim::connect(&started);
        for id in ["", ".", "..", "../escaped", "a/../../escaped", "/escaped", "a/b", "a\0b"] {
            let (code, said) = refusal(shim.create(id, &bundle.path, &Streams::default(), Vec::new()));
            assert_eq!(code, Code::INVALID_ARGUMENT, "{id:?}: {said}");
        }
        bundle.create(&shim).unwrap();
        shim.start(&bundle.id, "").unwrap();
        // An exec's id is no file name.
        let before = all_below(&daemon.directory().join("raw"));
        for exec in ["../../escaped", "/escaped", "..", "a/b"] {
            shim.exec(&bundle.id, exec, &["true"], &Streams::default()).unwrap();
            shim.start(&bundle.id, exec).unwrap();
            assert_eq!(shim.wait(&bundle.id, exec).unwrap(), 0);
            shim.delete(&bundle.id, exec).unwrap();
        }
        let escaped = |path: &&PathBuf| path.to_string_lossy().contains("escaped");
        let after = all_below(&daemon.directory().join("raw"));
        assert_eq!(after.iter().find(escaped), None, "before: {before:?}");
        shim.kill(&bundle.id, "", 9).unwrap();
        shim.wait(&bundle.id, "").unwrap();
        shim.delete(&bundle.id, "").unwrap();
        bundle.shut_down(&shim);
        drop(bundle);
        daemon.end();
    }

    fn what_the_shim_makes_is_writable_by_root_alone_whatever_the_umask(version) {
        ours_only!("the stock shim takes containerd's umask");
        let daemon = Daemon::start(version);
        let mut bundle = Bundle::new(&daemon, "umask");
        let real = bundle.command("start").get_program().to_owned();
        let program = daemon.directory().join("bin/without-umask");
        fs::write(&program, format!("#!/bin/sh\numask 0\nexec {} \"$@\"\n", Path::new(&real).display())).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        bundle.program = Some(program);
        let spec = bundle.plain_spec(&["sleep", "3600"]);
        let bundle = bundle.write_spec(&spec);
        let there: Vec<PathBuf> = all_below(&bundle.path);
        let started = bundle.start(b"");
        assert!(started.status.success(), "{}", started.text());
        let shim = Shim::connect(&started);
        bundle.create(&shim).unwrap();
        shim.start(&bundle.id, "").unwrap();
        let output = daemon.directory().join("logs-of-umask/output");
        shim.exec(&bundle.id, "e", &["sleep", "3600"], &Streams { stdout: format!("file://{}", text(&output)), ..Streams::default() }).unwrap();
        shim.start(&bundle.id, "e").unwrap();
        let made = all_below(&bundle.path).into_iter().filter(|path| !there.contains(path));
        let made: Vec<PathBuf> = made.chain([output.clone(), output.parent().unwrap().to_owned()]).collect();
        let open: Vec<_> = made.iter().filter(|path| {
            let data = fs::symlink_metadata(path).unwrap();
            !data.is_symlink() && data.permissions().mode() & 0o022 != 0
        }).collect();
        assert!(made.len() > 5 && open.is_empty(), "others may write {open:?}, of {made:?}");
        shim.kill(&bundle.id, "", 9).unwrap();
        shim.wait(&bundle.id, "").unwrap();
        shim.delete(&bundle.id, "").unwrap();
        bundle.shut_down(&shim);
        drop(bundle);
        daemon.end();
    }

    fn messages_and_connections_without_an_end_cost_the_shim_little(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("flooded").run(&daemon);
        let container = pod.sleeper("one");
        let shim = daemon.shim();
        let (before, files) = (anonymous_kb(shim.pid), open_files(shim.pid).len());
        let socket = socket_of(&daemon, &pod);
        // A ttrpc header (length, stream, type, flags) that announces 2 GiB, and as much data as the shim takes.
        let mut stream = UnixStream::connect(&socket).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
        let _ = stream.write_all(&[0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 1, 1, 0]);
        for _ in 0..64 {
            if stream.write_all(&[b'x'; 1 << 20]).is_err() {
                break;
            }
        }
        let idle: Vec<UnixStream> = (0..200).filter_map(|_| UnixStream::connect(&socket).ok()).collect();
        assert_eq!(container.output(&["echo", "still here"]), "still here");
        let grown = anonymous_kb(shim.pid).saturating_sub(before);
        assert!(grown < 16 * 1024, "{grown} kB more");
        drop((stream, idle));
        eventually(Duration::from_secs(5), || {
            let now = open_files(shim.pid).len();
            if now <= files + 2 { Ok(()) } else { Err(format!("{now} open files, {files} before")) }
        });
        daemon.end();
    }
}

on_every_containerd! {
    fn a_container_joins_no_stranger_in_the_place_of_its_sandbox(version) {
        ours_only!("the stock shim leaves the paths to runc, which opens what has the pid by then");
        let daemon = Daemon::start(version);
        let bundle = Bundle::new(&daemon, "late");
        let mut spec = bundle.plain_spec(&["sleep", "3600"]);
        spec["annotations"] = json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-id": "gone",
        });
        // The shim of the pod has been killed, and the pid of its sandbox is that of this process now.
        spec["linux"]["namespaces"][4]["path"] = json!(format!("/proc/{}/ns/net", std::process::id()));
        let bundle = bundle.write_spec(&spec);
        let message = bundle.start_or_create_must_fail(b"");
        assert!(message.contains("sandbox gone has ended"), "{message}");
        drop(bundle);
        daemon.end();
    }
}
