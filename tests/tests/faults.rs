//! What happens to a node, and must not take a pod down.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test reports by failing"
)]

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use containerd_shim_protos::ttrpc::Code;
use rustix::net::{self, AddressFamily, SocketAddrUnix, SocketType};
use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use shim_tests::calls::{Shim, code};
use shim_tests::daemon::Options;
use shim_tests::direct::Group;
use shim_tests::lab::{self, ShimUnderTest};
use shim_tests::proc::{Process, namespace};
use shim_tests::raw::Bundle;
use shim_tests::until::ok_if;
use shim_tests::{
    Daemon, PodSpec, cgroups, eventually, in_every_mode, leaks, on_every_containerd, ours_only,
    proc,
};

/// The cgroup of a shim, which can make no thread and no process until this is dropped.
struct Full(PathBuf);

impl Full {
    /// Takes every thread of the shim's cgroup but those that the shim has. A shim at rest has two.
    fn of(shim: i32) -> Self {
        eventually(Duration::from_secs(20), || {
            let threads = proc::threads(shim);
            ok_if(threads <= 2, || format!("the shim has {threads} threads"))
        });
        let cgroup = cgroups::directory(shim, "pids").expect("a cgroup with the pids controller");
        let limit = cgroup.join("pids.max");
        fs::write(&limit, proc::threads(shim).to_string()).unwrap();
        Self(limit)
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        // A cgroup that has gone has no limit.
        let _ = fs::write(&self.0, "max");
    }
}

/// The hard limit of open files.
fn hard_limit(pid: Pid) -> Option<u64> {
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let files = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    files
        .unwrap()
        .split_whitespace()
        .nth(4)
        .unwrap()
        .parse()
        .ok()
}

/// A server at the socket of a pod that does not exist. The server accepts nobody, and its queue of callers is full.
struct Hung {
    socket: PathBuf,
    _server: OwnedFd,
    _caller: UnixStream,
}

impl Hung {
    fn listen(daemon: &Daemon, id: &str) -> Self {
        let task = leaks::TaskId {
            namespace: daemon.names.name(),
            id: id.to_owned(),
        };
        let socket = leaks::shim_socket(&leaks::grpc_address(&daemon.names), &task);
        fs::create_dir_all(socket.parent().unwrap()).unwrap();
        let server = net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        net::bind(&server, &SocketAddrUnix::new(&socket).unwrap()).unwrap();
        net::listen(&server, 0).unwrap();
        let _caller = UnixStream::connect(&socket).unwrap();
        Self {
            socket,
            _server: server,
            _caller,
        }
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.socket);
    }
}

/// A file system for the bundle of one container, in which soon nothing more can be made.
struct FewInodes(PathBuf);

impl FewInodes {
    fn mount(daemon: &Daemon, id: &str) -> Self {
        let path = daemon
            .directory()
            .join("raw")
            .join(daemon.names.name())
            .join(id);
        fs::create_dir_all(&path).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("few", &path, "tmpfs", flags, Some(c"nr_inodes=2000")).unwrap();
        Self(path)
    }

    fn fill(&self) {
        let full = (0..3000)
            .map(|n| fs::write(self.0.join(format!("fill-{n}")), ""))
            .find_map(Result::err);
        assert_eq!(full.unwrap().kind(), std::io::ErrorKind::StorageFull);
    }
}

impl Drop for FewInodes {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.0);
    }
}

/// A runc of the test's own. Once armed with a pid, the next `create` first ends that process, and gives the pid to
/// another one.
struct Replaced(PathBuf);

impl Replaced {
    fn install(daemon: &Daemon) -> Self {
        let victim = daemon.directory().join("victim");
        let script = format!(
            "#!/bin/sh\n\
             case \" $* \" in *' create '*) ;; *) exec {runc} \"$@\";; esac\n\
             [ -e {victim} ] || exec {runc} \"$@\"\n\
             pid=$(cat {victim}); rm {victim}\n\
             kill -9 $pid; while [ -e /proc/$pid ]; do sleep 0.01; done\n\
             while :; do\n\
             echo $((pid - 1)) >/proc/sys/kernel/ns_last_pid\n\
             sleep 3600 </dev/null >/dev/null 2>&1 &\n\
             [ $! = $pid ] && exec {runc} \"$@\"\n\
             kill -9 $!\n\
             done\n",
            runc = lab::runc().display(),
            victim = victim.display(),
        );
        let program = daemon.directory().join("bin/runc");
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Self(victim)
    }

    fn arm(&self, pid: i32) {
        fs::write(&self.0, pid.to_string()).unwrap();
    }
}

/// A runc whose create and delete fail as on a node without memory: the create when the work is done, the delete before.
struct Exhausted(PathBuf);

impl Exhausted {
    fn install(daemon: &Daemon) -> Self {
        let exhausted = daemon.directory().join("exhausted");
        let script = format!(
            "#!/bin/sh\n\
             for word; do case $word in create|delete) call=$word; break;; esac; done\n\
             [ -e {exhausted} ] || exec {runc} \"$@\"\n\
             [ \"$call\" != delete ] || exit 1\n\
             {runc} \"$@\"\n\
             code=$?\n\
             [ \"$call\" != create ] || exit 1\n\
             exit $code\n",
            runc = lab::lab().join("host/runc").display(),
            exhausted = exhausted.display(),
        );
        let program = daemon.directory().join("bin/runc");
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Self(exhausted)
    }

    fn begin(&self) {
        fs::write(&self.0, "").unwrap();
    }

    fn end(&self) {
        fs::remove_file(&self.0).unwrap();
    }
}

/// A process of the node with a pid of the test's choice.
struct Stranger(Child);

impl Stranger {
    fn with_pid(pid: u32) -> Self {
        eventually(Duration::from_secs(20), || {
            let before = (pid - 1).to_string();
            fs::write("/proc/sys/kernel/ns_last_pid", before).map_err(|error| error.to_string())?;
            let child = Command::new("sleep")
                .arg("3600")
                .stdin(Stdio::null())
                .spawn()
                .unwrap();
            let stranger = Self(child);
            match stranger.0.id() {
                id if id == pid => Ok(stranger),
                id => Err(format!("the pid is {id}")),
            }
        })
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

on_every_containerd! {
    fn a_shim_that_gets_no_thread_serves_its_pod(version) {
        ours_only!("it makes the cgroup of ShimCgroup itself; the stock shim wants that cgroup to be there");
        let daemon = Daemon::with(version, &Options::runtime("ShimCgroup = '$CGROUP_PARENT/of-shims'"));
        let pod = PodSpec::new("threads").run(&daemon);
        let (one, two) = (pod.sleeper("one"), pod.sleeper("two"));
        let shim = daemon.shim().pid;
        let full = Full::of(shim);
        // What is read of the kernel is read in place.
        assert!(one.running());
        let stats = one.stats();
        assert!(stats.memory.is_some(), "{stats:?}");
        // What needs a process is refused, and leaves the container as it was.
        let refused = one.try_exec(&["true"]).unwrap_err();
        assert!(refused.0.contains("Resource temporarily unavailable"), "{}", refused.0);
        let refused = pod.container("three").command(&["sleep", "3600"]).try_start();
        assert!(refused.is_err());
        // A kill, the exit and the deletion work.
        two.stop(0);
        assert_eq!(two.wait(), 137);
        two.remove();
        assert_eq!(daemon.shim().pid, shim);
        assert!(one.running() && pod.ready());
        drop(full);
        assert_eq!(one.output(&["echo", "works"]), "works");
        let four = pod.sleeper("four");
        assert!(four.running());
        pod.stop();
        pod.remove();
        eventually(Duration::from_secs(10), || {
            ok_if(daemon.shims().is_empty(), || "the shim is there".to_owned())
        });
        leaks::remove_cgroups_of_shims(&daemon.names);
        daemon.end();
    }

    fn a_server_that_accepts_nobody_holds_no_start_back(version) {
        ours_only!("the stock shim replaces a server that does not answer within 100 ms");
        let daemon = Daemon::start(version);
        let [hung, other] = ["hung", "other"].map(|id| {
            let bundle = Bundle::new(&daemon, id);
            let spec = bundle.plain_spec(&["sleep", "3600"]);
            bundle.write_spec(&spec)
        });
        let server = Hung::listen(&daemon, "hung");
        // One lock keeps the starts of all pods apart.
        let started = hung.start(b"");
        assert!(started.status.success(), "{}", started.text());
        let started = other.start(b"");
        assert!(started.status.success(), "{}", started.text());
        other.shut_down(&Shim::connect(&started));
        drop((hung, other, server));
        daemon.end();
    }

    fn a_shim_without_a_descriptor_rests_and_serves_again(version) {
        let daemon = Daemon::start(version);
        let bundle = Bundle::new(&daemon, "descriptors");
        let spec = bundle.plain_spec(&["sleep", "3600"]);
        let bundle = bundle.write_spec(&spec);
        let started = bundle.start(b"");
        let shim = Shim::connect(&started);
        bundle.create(&shim).unwrap();
        let server = Pid::from_raw(daemon.shim().pid).unwrap();
        // The limit is on the number of a descriptor.
        let free = (0..).find(|fd| !Path::new(&format!("/proc/{server}/fd/{fd}")).is_symlink());
        let full = Rlimit { current: free, maximum: hard_limit(server) };
        let usual = prlimit(Some(server), Resource::Nofile, full).unwrap();
        let address = started.address();
        let _caller = UnixStream::connect(address.trim_start_matches("unix://")).unwrap();
        let pid = daemon.shim().pid;
        let (before, began) = (proc::cpu_time(pid), Instant::now());
        eventually(Duration::from_secs(10), || {
            ok_if(began.elapsed() > Duration::from_secs(3), || "too early".to_owned())
        });
        let used = proc::cpu_time(pid).saturating_sub(before);
        // Who is connected is served.
        assert_eq!(shim.pids_of("descriptors").unwrap().shim_pid, u32::try_from(pid).unwrap());
        prlimit(Some(server), Resource::Nofile, usual).unwrap();
        assert!(used < Duration::from_millis(60), "{used:?} of CPU time in {:?}", began.elapsed());
        let another = Shim::connect(&started);
        another.kill("descriptors", "", 9).unwrap();
        assert_eq!(another.wait("descriptors", "").unwrap(), 137);
        another.delete("descriptors", "").unwrap();
        bundle.shut_down(&another);
        drop(bundle);
        daemon.end();
    }

    fn a_delete_leaves_the_containers_of_a_deleted_sandbox(version) {
        ours_only!("the stock shim runs a pause image");
        let daemon = Daemon::start(version);
        let memory = FewInodes::mount(&daemon, "pod");
        let pod = Bundle::new(&daemon, "pod");
        let mut spec = pod.sandbox_spec("");
        spec["linux"]["namespaces"][4] = serde_json::json!({"type": "network"});
        let pod = pod.write_spec(&spec);
        let shim = Shim::connect(&pod.start(b""));
        pod.create(&shim).unwrap();
        shim.start("pod", "").unwrap();
        let member = Bundle::new(&daemon, "member");
        let spec = member.plain_spec(&["sleep", "3600"]);
        let member = member.write_spec(&spec);
        let container = member.create(&shim).unwrap();
        shim.start("member", "").unwrap();
        let server = shim.pids_of("member").unwrap().shim_pid;
        let [container, server] = [container, server].map(|pid| {
            Process::of(pid.try_into().unwrap()).expect("a process")
        });
        // Nothing can be made in the pod's bundle any more.
        memory.fill();
        shim.kill("pod", "", 9).unwrap();
        assert_eq!(shim.wait("pod", "").unwrap(), 137);
        shim.delete("pod", "").unwrap();
        // As containerd does, which closes the connection after a deletion.
        let deleted = pod.delete();
        assert!(deleted.status.success(), "{}", deleted.text());
        assert!(server.alive() && container.alive(), "the pod's container is gone with the shim");
        shim.kill("member", "", 9).unwrap();
        assert_eq!(shim.wait("member", "").unwrap(), 137);
        shim.delete("member", "").unwrap();
        shim.shutdown("member");
        eventually(Duration::from_secs(10), || ok_if(!server.alive(), || server.describe()));
        drop((member, pod, memory));
        daemon.end();
    }

    fn no_container_joins_a_stranger_that_has_the_pid_of_an_ended_sandbox(version) {
        ours_only!("the stock shim runs a pause image");
        let daemon = Daemon::start(version);
        let pod = Bundle::new(&daemon, "pod");
        let mut spec = pod.sandbox_spec("");
        spec["linux"]["namespaces"][4] = serde_json::json!({"type": "network"});
        let pod = pod.write_spec(&spec);
        let shim = Shim::connect(&pod.start(b""));
        let pid = pod.create(&shim).unwrap();
        shim.start("pod", "").unwrap();
        shim.kill("pod", "", 9).unwrap();
        assert_eq!(shim.wait("pod", "").unwrap(), 137);
        let stranger = Stranger::with_pid(pid);
        let member = Bundle::new(&daemon, "member");
        let mut spec = member.plain_spec(&["sleep", "3600"]);
        for (index, kind) in [(1, "ipc"), (2, "uts"), (4, "net")] {
            spec["linux"]["namespaces"][index]["path"] = format!("/proc/{pid}/ns/{kind}").into();
        }
        spec["hostname"] = serde_json::Value::Null;
        let member = member.write_spec(&spec);
        let refused = member.create(&shim);
        assert_eq!(code(&refused), Code::FAILED_PRECONDITION, "joins the node's namespaces");
        drop(stranger);
        shim.delete("pod", "").unwrap();
        pod.shut_down(&shim);
        drop((member, pod));
        daemon.end();
    }

    fn what_a_failed_create_leaves_is_taken_down_while_the_pod_lives(version) {
        ours_only!("the stock shim leaves the container in runc's state for ever");
        let daemon = Daemon::start(version);
        let node = Exhausted::install(&daemon);
        let group = Group::start(&daemon, "one");
        group.run("one", "exec sleep 3600");
        node.begin();
        assert_eq!(code(&group.create("two", "exec sleep 3600")), Code::UNKNOWN);
        let state = group.runc_states().join("two");
        assert!(state.exists());
        // containerd removes the bundle.
        group.remove_bundle("two");
        let again = group.create("two", "exec sleep 3600");
        assert_eq!(code(&again), Code::FAILED_PRECONDITION, "{again:?}");
        group.remove_bundle("two");
        node.end();
        eventually(Duration::from_secs(10), || {
            ok_if(!state.exists(), || "runc's state is still there".to_owned())
        });
        eventually(Duration::from_secs(5), || {
            group.create("two", "exec sleep 3600").map_err(|refusal| format!("{refusal:?}"))
        });
        group.shim.start("two", "").unwrap();
        group.remove("two");
        group.remove("one");
        group.end();
        daemon.end();
    }

    fn a_shim_of_any_name_that_hangs_is_ended(version) {
        let daemon = Daemon::start(version);
        let mut bundle = Bundle::new(&daemon, "named");
        let program = daemon.directory().join("my-shim");
        fs::copy(ShimUnderTest::get().binary(version), &program).unwrap();
        bundle.program = Some(program);
        let spec = bundle.plain_spec(&["sleep", "3600"]);
        let bundle = bundle.write_spec(&spec);
        let shim = Shim::connect(&bundle.start(b""));
        let container = bundle.create(&shim).unwrap();
        shim.start("named", "").unwrap();
        let server = shim.pids_of("named").unwrap().shim_pid;
        let [container, server] = [container, server].map(|pid| {
            Process::of(pid.try_into().unwrap()).expect("a process")
        });
        proc::kill(server.pid, Signal::STOP);
        let deleted = bundle.delete();
        assert!(deleted.status.success(), "{}", deleted.text());
        // A zombie is there until the node's init reaps the process.
        eventually(Duration::from_secs(5), || {
            ok_if(!server.alive() && !container.alive(), || format!("{} {}", server.describe(), container.describe()))
        });
        drop(bundle);
        daemon.end();
    }
}

in_every_mode! {
    fn no_container_joins_a_stranger_that_has_the_pid_of_pid_1(version) {
        ours_only!("under the stock shim the path leads through the pid");
        let daemon = Daemon::start(version);
        let replaced = Replaced::install(&daemon);
        let pod = PodSpec::new("shared").shared_processes().run(&daemon);
        let one = pod.sleeper("one");
        let node = namespace(std::process::id().cast_signed(), "pid");
        assert_ne!(namespace(one.pid(), "pid"), node);
        let pid_1 = proc::children(daemon.shim().pid)
            .into_iter()
            .find(|child| {
                let comm = fs::read_to_string(format!("/proc/{}/comm", child.pid));
                comm.is_ok_and(|comm| comm.trim() == "pause")
            })
            .expect("PID 1");
        // runc finds another process at PID 1's pid, in the node's namespace.
        replaced.arm(pid_1.pid);
        let two = pod.container("two").command(&["sleep", "3600"]).try_start();
        let stranger = Process::of(pid_1.pid).expect("a stranger");
        assert_eq!(namespace(stranger.pid, "pid"), node);
        if let Ok(two) = &two {
            assert_ne!(namespace(two.pid(), "pid"), node, "in the node's process namespace");
        }
        assert!(two.is_err(), "the pod's process namespace has ended");
        proc::kill(stranger.pid, Signal::KILL);
        pod.wait_until_not_ready();
        pod.stop();
        pod.remove();
        daemon.end();
    }

    fn sigterm_to_the_shim_of_a_living_pod_costs_nothing(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("stray").run(&daemon);
        let one = pod.sleeper("one");
        let shim = daemon.shim().pid;
        let alive = |what: &str| {
            assert_eq!(daemon.shim().pid, shim, "{what}");
            assert!(pod.ready(), "{what}");
        };
        for signal in [Signal::TERM, Signal::INT] {
            proc::kill(shim, signal);
        }
        // No process of a container is left for a while: containerd is connected, so the pod lives on.
        one.stop(0);
        alive("after a signal, and the end of the only container");
        let two = pod.sleeper("two");
        assert_eq!(two.output(&["echo", "works"]), "works");
        // The signal comes while containerd is away, and is forgotten when containerd is back.
        daemon.kill();
        proc::kill(shim, Signal::TERM);
        daemon.start_again();
        two.stop(0);
        alive("after a signal while containerd was away");
        assert_eq!(pod.sleeper("three").output(&["echo", "works"]), "works");
        pod.stop();
        pod.remove();
        daemon.end();
    }

    fn a_shim_ends_with_its_containers_when_the_node_goes_down(version) {
        ours_only!("the stock shim ends at SIGTERM, whatever runs");
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("down").run(&daemon);
        let containers = [pod.sleeper("one"), pod.sleeper("two")];
        let empty = PodSpec::new("empty").run(&daemon);
        let of_containers: Vec<i32> = containers.iter().map(|container| container.pid()).collect();
        let shims: Vec<_> = daemon.shims();
        assert_eq!(shims.len(), 2);
        // As systemd does: containerd is stopped first, then every process gets SIGTERM.
        daemon.kill();
        for shim in &shims {
            proc::kill(shim.pid, Signal::TERM);
        }
        // A shim without a container has nothing to wait for.
        eventually(Duration::from_secs(5), || {
            ok_if(daemon.shims().len() == 1, || format!("{:?}", daemon.shims()))
        });
        for pid in of_containers {
            assert_eq!(daemon.shims().len(), 1, "a container runs");
            proc::kill(pid, Signal::KILL);
        }
        eventually(Duration::from_secs(5), || {
            ok_if(daemon.shims().is_empty(), || format!("{:?}", daemon.shims()))
        });
        daemon.start_again();
        assert!(!pod.ready() && !empty.ready());
        for pod in [pod, empty] {
            pod.stop();
            pod.remove();
        }
        daemon.end();
    }
}
