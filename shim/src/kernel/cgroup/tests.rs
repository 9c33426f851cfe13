//! Some of these tests make real cgroups, under names of their own, and need root.
#![allow(clippy::unwrap_used)]

use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use containerd_shim_protos::{cgroups, cgroups_v2};
use rustix::io::Errno;
use rustix::process::{Signal, getpid};

use super::*;
use crate::kernel::mounts::mounts_that;

/// A real cgroup. Its drop kills its processes and removes the cgroup, also after a failed test.
struct TestCgroup(Cgroup);

impl TestCgroup {
    fn new() -> Self {
        let cgroup = Self(Cgroup::at(&unused_path(), Driver::Cgroupfs).unwrap());
        cgroup.0.create().unwrap();
        cgroup
    }

    /// One cgroup of each version that this machine has. A hybrid machine has a v2 hierarchy without controllers.
    fn of_each_version() -> Vec<Self> {
        let mut all = vec![Self::new()];
        let mounts = mounts_that(|mount| mount.kind == "cgroup2").unwrap();
        if all[0].0.hierarchy() == Hierarchy::V1
            && let Some(unified) = mounts.first()
        {
            let cgroup = Self(Cgroup::v2_at(&unified.target, &unused_path()));
            cgroup.0.create().unwrap();
            all.push(cgroup);
        }
        all
    }

    /// Starts a process in the cgroup.
    fn run(&self, script: &str) -> TestProcess {
        let mut command = Command::new("sh");
        let child = command
            .args(["-c", &format!("read line; {script}")])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let mut running = TestProcess(child);
        self.0.add(running.pid()).unwrap();
        // The script starts only here, when the process is in the cgroup.
        drop(running.0.stdin.take());
        running
    }
}

/// A new path for a cgroup, with a parent of its own.
fn unused_path() -> String {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    format!("/shim-test-{}-{number}/leaf", std::process::id())
}

impl Drop for TestCgroup {
    fn drop(&mut self) {
        let _ = self.0.kill_all();
        let _ = self.0.thaw();
        let _ = self.0.remove();
        for directory in self.0.directories.iter().chain(&self.0.beside) {
            let _ = fs::remove_dir(directory.path.parent().unwrap());
        }
    }
}

struct TestProcess(Child);

impl TestProcess {
    fn pid(&self) -> Pid {
        Pid::from_child(&self.0)
    }

    /// Waits until the process has ended, by a signal.
    fn was_killed(&mut self) {
        eventually("it ends", || self.0.try_wait().unwrap().is_some());
        assert!(!self.0.wait().unwrap().success());
    }
}

impl Drop for TestProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        // No blocking wait: a frozen process would never end.
        let _ = self.0.try_wait();
    }
}

/// Waits up to ten seconds for a condition.
fn eventually(what: &str, mut happened: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !happened() {
        assert!(before(deadline), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The user and system time of a process, in ticks.
fn ticks(pid: Pid) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap();
    let fields: Vec<_> = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_ascii_whitespace()
        .collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

fn kind(result: Result<(), IoError>) -> io::ErrorKind {
    result.unwrap_err().source.kind()
}

fn v1_message(metrics: Metrics) -> cgroups::metrics::Metrics {
    let message = match metrics {
        Metrics::V1(message) => Ok(*message),
        Metrics::V2(message) => Err(message),
    };
    message.unwrap()
}

fn v2_message(metrics: Metrics) -> cgroups_v2::metrics::Metrics {
    let message = match metrics {
        Metrics::V1(message) => Err(message),
        Metrics::V2(message) => Ok(*message),
    };
    message.unwrap()
}

/// runc also makes a v2 cgroup beside those of v1. A killed runc leaves this cgroup behind.
#[test]
fn remove_takes_what_is_beside() {
    let cgroup = TestCgroup::new();
    let Some(beside) = &cgroup.0.beside else {
        // Not a hybrid machine.
        return;
    };
    fs::create_dir_all(&beside.path).unwrap();
    assert!(cgroup.0.remove().is_empty());
    assert!(!beside.path.exists());
}

#[test]
fn a_cgroup_is_made_with_its_parents_and_removed() {
    for private in TestCgroup::of_each_version() {
        for directory in &private.0.directories {
            assert!(directory.path.is_dir(), "{directory:?}");
        }
        private.0.create().unwrap();
        assert_eq!(private.0.pids().unwrap(), []);
        assert!(private.0.remove().is_empty());
        assert!(private.0.remove().is_empty());
        assert_eq!(
            private.0.pids().unwrap_err().source.kind(),
            io::ErrorKind::NotFound
        );
        assert_eq!(
            private.0.stats().unwrap_err().source.kind(),
            io::ErrorKind::NotFound
        );
        assert_eq!(kind(private.0.freeze()), io::ErrorKind::NotFound);
        assert_eq!(kind(private.0.kill_all()), io::ErrorKind::NotFound);
        assert_eq!(kind(private.0.add(getpid())), io::ErrorKind::NotFound);
    }
}

#[test]
fn a_cgroup_that_cannot_be_made_leaves_nothing() {
    let private = TestCgroup::new();
    // The kernel refuses a name with a line break. The parent is made before the refusal.
    let mut impossible = private.0.clone();
    let last = impossible.directories.last_mut().unwrap();
    let parent = last.path.join("parent");
    last.path = parent.join("line\nbreak");
    impossible.create().unwrap_err();
    assert!(!parent.exists());
}

#[test]
fn processes_are_found_frozen_thawed_and_killed() {
    for private in TestCgroup::of_each_version() {
        let cgroup = &private.0;
        let mut child = private.run("while :; do :; done");
        assert_eq!(cgroup.pids().unwrap(), [child.pid()]);
        if cgroup.hierarchy() == Hierarchy::detect().unwrap() {
            assert_eq!(
                Cgroup::of_pid(child.pid()).unwrap().directories,
                cgroup.directories
            );
        }
        eventually("it runs", || ticks(child.pid()) > 0);

        cgroup.freeze().unwrap();
        let stopped_at = ticks(child.pid());
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(ticks(child.pid()), stopped_at);
        cgroup.freeze().unwrap();
        cgroup.thaw().unwrap();
        cgroup.thaw().unwrap();
        eventually("it goes on", || ticks(child.pid()) > stopped_at);

        let failures = cgroup.remove();
        assert!(!failures.is_empty());
        assert!(
            failures
                .iter()
                .all(|failure| failure.source.raw_os_error() == Some(Errno::BUSY.raw_os_error()))
        );

        // The killed child is a zombie until the test waits for it. A zombie does not count as a process.
        cgroup.kill_all().unwrap();
        assert_eq!(cgroup.pids().unwrap(), []);
        assert!(cgroup.remove().is_empty());
        child.was_killed();
    }
}

#[test]
fn a_move_in_place_changes_nothing() {
    let before = Cgroup::of_pid(getpid()).unwrap();
    MoveInPlace::of_the_shim().unwrap().make().unwrap();
    assert_eq!(Cgroup::of_pid(getpid()).unwrap(), before);
}

#[test]
fn frozen_processes_are_killed() {
    for private in TestCgroup::of_each_version() {
        let mut child = private.run("sleep 1000");
        private.0.freeze().unwrap();
        private.0.kill_all().unwrap();
        child.was_killed();
    }
}

#[test]
fn each_process_is_killed_where_the_kernel_does_not_kill_all_at_once() {
    for private in TestCgroup::of_each_version() {
        let mut child = private.run("sleep 1000 & sleep 1000; wait");
        eventually("it forks", || private.0.pids().unwrap().len() == 3);
        private.0.kill_each().unwrap();
        eventually("they die", || private.0.pids().unwrap().is_empty());
        child.was_killed();
    }
}

#[test]
fn a_signal_reaches_each_process() {
    for private in TestCgroup::of_each_version() {
        let mut child = private.run("sleep 1000 & sleep 1000; wait");
        eventually("it forks", || private.0.pids().unwrap().len() == 3);
        private.0.signal_each(Signal::TERM).unwrap();
        eventually("they die", || private.0.pids().unwrap().is_empty());
        child.was_killed();
    }
}

#[test]
fn what_is_frozen_is_thawed_to_die() {
    for private in TestCgroup::of_each_version() {
        let mut child = private.run("sleep 1000");
        private.0.thaw_if_frozen().unwrap();
        private.0.freeze().unwrap();
        private.0.signal_each(Signal::KILL).unwrap();
        private.0.thaw_if_frozen().unwrap();
        child.was_killed();
    }
    let gone = Cgroup::at(&unused_path(), Driver::Cgroupfs).unwrap();
    gone.thaw_if_frozen().unwrap();
}

#[test]
fn processes_that_keep_forking_are_killed_also_below() {
    for private in TestCgroup::of_each_version() {
        let mut below = TestCgroup(private.0.clone());
        for directory in &mut below.0.directories {
            directory.path.push("below");
        }
        below.0.create().unwrap();
        let script =
            "i=0; while [ $i -lt 400 ]; do sleep 1000 & sleep 0.01; i=$((i + 1)); done; wait";
        let (mut one, mut other) = (private.run(script), below.run(script));
        eventually("they fork", || private.0.pids().unwrap().len() > 10);
        let pids = private.0.pids().unwrap();
        assert!(pids.contains(&one.pid()) && pids.contains(&other.pid()));

        private.0.kill_all().unwrap();
        assert_eq!(private.0.pids().unwrap(), []);
        one.was_killed();
        other.was_killed();
        assert!(below.0.remove().is_empty());
    }
}

#[test]
fn the_statistics_of_a_busy_process_are_not_zero() {
    for private in TestCgroup::of_each_version() {
        let child = private.run("exec sh -c 'while :; do :; done'");
        eventually("it runs", || ticks(child.pid()) > 3);
        let stats = private.0.stats().unwrap();
        let has = |controller: &str| private.0.directory(controller).is_some_and(Path::is_dir);
        match private.0.hierarchy() {
            Hierarchy::V1 => {
                let metrics = v1_message(stats);
                if has("cpuacct") {
                    let usage = &metrics.cpu.usage;
                    assert!(
                        usage.total > 10_000_000 && usage.total < 60_000_000_000,
                        "{usage:?}"
                    );
                    assert!(usage.user + usage.kernel >= 10_000_000, "{usage:?}");
                    // The shim reads the file per cpu after the total.
                    assert!(
                        usage.per_cpu.iter().sum::<u64>() >= usage.total,
                        "{usage:?}"
                    );
                }
                if has("memory") {
                    // The kernel adds up memory counters only every two seconds.
                    eventually("its memory counts", || {
                        let memory = v1_message(private.0.stats().unwrap()).memory;
                        memory.usage.usage > 0 && memory.usage.max > 0 && memory.total_rss > 0
                    });
                    assert!(
                        metrics.memory.usage.limit > u64::MAX / 4
                            && metrics.memory.hierarchical_memory_limit > 0
                    );
                    assert!(metrics.memory_oom_control.is_some());
                }
                if has("pids") {
                    assert_eq!((metrics.pids.current, metrics.pids.limit), (1, 0));
                }
            }
            Hierarchy::V2 => {
                let metrics = v2_message(stats);
                assert!(
                    metrics.cpu.usage_usec > 10_000 && metrics.cpu.usage_usec < 60_000_000,
                    "{:?}",
                    metrics.cpu
                );
            }
        }
    }
}

#[test]
fn the_driver_is_chosen_by_the_path_and_systemd_only_where_it_runs() {
    let systemds = Some("system.slice:docker:a");
    let expected = Driver::of(Path::new(SYSTEMD_RUNS).is_dir());
    assert_eq!(Driver::choose(false, systemds), expected);
    assert_eq!(Driver::choose(true, systemds), Driver::Systemd);
    for option in [false, true] {
        assert_eq!(Driver::choose(option, Some("/docker/a")), Driver::Cgroupfs);
        assert_eq!(Driver::choose(option, Some("docker/a")), Driver::of(option));
    }
    assert_eq!(Driver::choose(false, None), Driver::Cgroupfs);
    assert_eq!(Driver::choose(true, None), Driver::Systemd);
}

#[test]
fn what_would_hit_the_node_or_the_shim_is_refused() {
    // The test's own cgroup is the root, or a cgroup that the test is in. Both are refused.
    let own = Cgroup::of_pid(getpid()).unwrap();
    assert_eq!(kind(own.refuse_own("test")), io::ErrorKind::InvalidInput);
    assert_eq!(kind(own.freeze()), io::ErrorKind::InvalidInput);
    let directory = Directory::new(Path::new("/root"), Path::new("/"));
    assert_eq!(
        kind(directory.refuse_root("test")),
        io::ErrorKind::InvalidInput
    );
    let root = Cgroup {
        beside: None,
        hierarchy: Hierarchy::V2,
        directories: vec![directory],
    };
    assert_eq!(kind(root.create()), io::ErrorKind::InvalidInput);
    assert_eq!(root.remove().len(), 1);
}

#[test]
fn a_v1_membership_is_found_among_the_mounts() {
    let mount = |root: &str, target: &str, options: &str| crate::kernel::mounts::MountedAt {
        root: root.into(),
        target: target.into(),
        kind: "cgroup".to_owned(),
        super_options: options.to_owned(),
    };
    let mounts = [
        mount("/", "/sys/fs/cgroup/cpu,cpuacct", "rw,cpu,cpuacct"),
        mount("/docker/1", "/sys/fs/cgroup/memory", "rw,memory"),
        mount("/", "/sys/fs/cgroup/systemd", "rw,xattr,name=systemd"),
    ];
    let find = |controllers: &[&str], path| {
        let controllers: Vec<_> = controllers.iter().map(|name| (*name).to_owned()).collect();
        v1::directory(&mounts, &controllers, Path::new(path)).map(|directory| directory.path)
    };
    assert_eq!(
        find(&["cpu", "cpuacct"], "a/b"),
        Some("/sys/fs/cgroup/cpu,cpuacct/a/b".into())
    );
    assert_eq!(
        find(&["memory"], "docker/1/a"),
        Some("/sys/fs/cgroup/memory/a".into())
    );
    assert_eq!(
        find(&["name=systemd"], ""),
        Some("/sys/fs/cgroup/systemd".into())
    );
    assert_eq!(find(&["pids"], "a"), None);
    assert_eq!(find(&[], "a"), None);
}

/// A v2 cgroup of plain files.
fn v2_tree(files: &[(&str, &str)]) -> (tempfile::TempDir, Cgroup) {
    let root = tempfile::tempdir().unwrap();
    let cgroup = Cgroup::v2_at(root.path(), "/pod/container");
    fs::create_dir_all(cgroup.any_path()).unwrap();
    for (name, text) in files {
        fs::write(cgroup.any_path().join(name), text).unwrap();
    }
    (root, cgroup)
}

#[test]
fn v2_statistics_are_those_of_the_files() {
    let (_root, cgroup) = v2_tree(&[
        (
            "cpu.stat",
            "usage_usec 1500\nuser_usec 1000\nsystem_usec 500\nnr_periods 7\nnr_throttled 2\nthrottled_usec 9\nnr_bursts 1\nburst_usec 3\n",
        ),
        (
            "cpu.pressure",
            "some avg10=1.50 avg60=0.25 avg300=0.00 total=12345\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
        ),
        (
            "memory.stat",
            "anon 4096\nfile 8192\nkernel 1\npgfault 33\nworkingset_refault_file 11\n",
        ),
        ("memory.current", "12288\n"),
        ("memory.max", "max\n"),
        ("memory.peak", "16384\n"),
        ("memory.swap.current", "5\n"),
        ("memory.swap.max", "0\n"),
        (
            "memory.events",
            "low 1\nhigh 2\nmax 3\noom 4\noom_kill 5\noom_group_kill 6\n",
        ),
        ("pids.current", "3\n"),
        ("pids.max", "100\n"),
        (
            "io.stat",
            "254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n254:16 \n7:0\n",
        ),
        ("hugetlb.2MB.current", "2097152\n"),
        ("hugetlb.2MB.max", "max\n"),
        ("hugetlb.2MB.events", "max 4\n"),
        ("hugetlb.2MB.rsvd.current", "1\n"),
        ("hugetlb.1GB.current", "0\n"),
        ("rdma.current", "mlx4_0 hca_handle=2 hca_object=20\n"),
        ("rdma.max", "mlx4_0 hca_handle=2 hca_object=max\n"),
    ]);
    let metrics = v2_message(cgroup.stats().unwrap());

    let cpu = &metrics.cpu;
    assert_eq!(
        (cpu.usage_usec, cpu.user_usec, cpu.system_usec),
        (1500, 1000, 500)
    );
    assert_eq!(
        (cpu.nr_periods, cpu.nr_throttled, cpu.throttled_usec),
        (7, 2, 9)
    );
    assert_eq!((cpu.nr_bursts, cpu.burst_usec), (1, 3));
    assert_eq!(
        (cpu.psi.some.avg10, cpu.psi.some.avg60, cpu.psi.some.total),
        (1.5, 0.25, 12345)
    );
    assert!(cpu.psi.full.is_some());

    let memory = &metrics.memory;
    assert_eq!(
        (memory.anon, memory.file, memory.pgfault, memory.slab),
        (4096, 8192, 33, 0)
    );
    assert_eq!(
        (memory.usage, memory.usage_limit, memory.max_usage),
        (12288, u64::MAX, 16384)
    );
    assert_eq!((memory.swap_usage, memory.swap_limit), (5, 0));
    assert!(memory.psi.is_none());
    // Field 40 belongs to the newer message. Fields unknown to the older message are kept, not lost.
    let newer: Vec<_> = memory
        .special_fields
        .unknown_fields()
        .iter()
        .map(|(number, _)| number)
        .collect();
    assert_eq!(newer, [40]);
    let events = &metrics.memory_events;
    assert_eq!(
        (
            events.low,
            events.high,
            events.max,
            events.oom,
            events.oom_kill
        ),
        (1, 2, 3, 4, 5)
    );
    assert_eq!(events.oom_group_kill, 6);

    assert_eq!((metrics.pids.current, metrics.pids.limit), (3, 100));
    let io: Vec<_> = metrics
        .io
        .usage
        .iter()
        .map(|e| (e.major, e.minor, e.rbytes, e.wbytes, e.rios, e.wios))
        .collect();
    assert_eq!(io, [(254, 0, 4096, 8192, 1, 2), (254, 16, 0, 0, 0, 0)]);
    let huge: Vec<_> = metrics
        .hugetlb
        .iter()
        .map(|h| (&*h.pagesize, h.current, h.max, h.failcnt))
        .collect();
    assert_eq!(huge, [("1GB", 0, 0, 0), ("2MB", 2_097_152, u64::MAX, 4)]);
    assert_eq!(metrics.rdma.current[0].hca_objects, 20);
    assert_eq!(metrics.rdma.limit[0].hca_objects, u32::MAX);
}

#[test]
fn v2_statistics_without_controllers_are_empty_and_no_error() {
    let (_root, cgroup) = v2_tree(&[]);
    let metrics = v2_message(cgroup.stats().unwrap());
    assert!(
        metrics.cpu.is_some()
            && metrics.memory.is_some()
            && metrics.pids.is_some()
            && metrics.io.is_some()
    );
    assert!(metrics.memory_events.is_none());
}

#[test]
fn v2_freezing_waits_for_the_kernel_and_not_for_ever() {
    let (_root, cgroup) = v2_tree(&[
        ("cgroup.events", "populated 1\nfrozen 1\n"),
        ("cgroup.freeze", "0"),
    ]);
    let path = cgroup.any_path();
    v2::freeze(path, Duration::from_millis(10)).unwrap();
    assert_eq!(fs::read_to_string(path.join("cgroup.freeze")).unwrap(), "1");
    let error = v2::thaw(path, Duration::from_millis(10)).unwrap_err();
    assert_eq!(error.source.kind(), io::ErrorKind::TimedOut);
    assert_eq!(fs::read_to_string(path.join("cgroup.freeze")).unwrap(), "0");
}

#[test]
fn v2_processes_are_those_of_the_whole_tree() {
    let (_root, cgroup) = v2_tree(&[("cgroup.procs", "12\n0\n7\n")]);
    let below = cgroup.any_path().join("a/b");
    fs::create_dir_all(&below).unwrap();
    fs::write(cgroup.any_path().join("a/cgroup.procs"), "7\n").unwrap();
    fs::write(below.join("cgroup.procs"), "9\n").unwrap();
    let pids: Vec<_> = cgroup
        .pids()
        .unwrap()
        .into_iter()
        .map(|pid| pid.as_raw_nonzero().get())
        .collect();
    assert_eq!(pids, [7, 9, 12]);
}

#[test]
fn v2_controllers_are_enabled_one_by_one() {
    let (root, _) = v2_tree(&[
        ("cgroup.controllers", "cpu memory\n"),
        ("cgroup.subtree_control", ""),
    ]);
    let path = root.path().join("pod/container");
    v2::enable_controllers(&path);
    // A plain file keeps the last write; the kernel would add up the writes.
    assert_eq!(
        fs::read_to_string(path.join("cgroup.subtree_control")).unwrap(),
        "+memory"
    );
}
