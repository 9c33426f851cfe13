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

use shim_tests::daemon::Options;
use shim_tests::until::ok_if;
use shim_tests::{
    Daemon, PodSpec, cgroups, eventually, leaks, on_every_containerd, ours_only, proc,
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
}
