//! What happens to a node, and must not take a pod down.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test reports by failing"
)]

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;
use shim_tests::calls::Shim;
use shim_tests::daemon::Options;
use shim_tests::lab::ShimUnderTest;
use shim_tests::proc::Process;
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

/// Removes the shim's own cgroup, which is the operator's and stays.
fn remove_shim_cgroups(daemon: &Daemon) {
    for path in leaks::cgroups(&daemon.names) {
        if path.ends_with("of-shims") {
            eventually(Duration::from_secs(10), || {
                fs::remove_dir(&path).map_err(|error| error.to_string())
            });
        }
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
        remove_shim_cgroups(&daemon);
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
