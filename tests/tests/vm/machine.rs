//! The machine has cgroup v2 and systemd, and what only such a machine can show.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use shim_tests::proc::{self, Process};
use shim_tests::until::ok_if;
use shim_tests::{Container, Daemon, PodSpec, eventually, on_every_containerd, vm};

/// The cgroup of a process, in the one hierarchy.
pub(super) fn cgroup_of(pid: i32) -> PathBuf {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let path = text
        .strip_prefix("0::/")
        .unwrap_or_else(|| panic!("not cgroup v2: {text}"));
    Path::new("/sys/fs/cgroup").join(path.trim())
}

/// A file of a cgroup.
pub(super) fn read_file(cgroup: &Path, file: &str) -> String {
    let file = cgroup.join(file);
    let text = fs::read_to_string(&file);
    text.unwrap_or_else(|error| panic!("{}: {error}", file.display()))
}

/// One number of a table such as `memory.events`.
pub(super) fn number_in_file(cgroup: &Path, file: &str, key: &str) -> u64 {
    let text = read_file(cgroup, file);
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
    line.and_then(|number| number.parse().ok())
        .unwrap_or_else(|| panic!("no {key} in {file}: {text}"))
}

fn oom_score_adj(pid: i32) -> i32 {
    let text = fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
    text.trim().parse().unwrap()
}

/// Pauses, looks at the kernel's own word, and resumes.
#[track_caller]
pub(super) fn assert_pause_and_resume(daemon: &Daemon, container: &Container<'_>) {
    let group = cgroup_of(container.pid());
    daemon.ctr_in("k8s.io", &["tasks", "pause", &container.id]);
    assert_eq!(number_in_file(&group, "cgroup.events", "frozen"), 1);
    let list = daemon.ctr_in("k8s.io", &["tasks", "list"]);
    let line = list
        .lines()
        .find(|line| line.starts_with(&container.id))
        .unwrap_or_default();
    assert!(line.ends_with("PAUSED"), "{list}");
    daemon.ctr_in("k8s.io", &["tasks", "resume", &container.id]);
    assert_eq!(number_in_file(&group, "cgroup.events", "frozen"), 0);
    assert_eq!(container.output(&["echo", "awake"]), "awake");
}

/// The statistics that containerd shows of a container are the kernel's.
#[track_caller]
pub(super) fn assert_metrics_are_the_kernels(daemon: &Daemon, container: &Container<'_>) {
    let group = cgroup_of(container.pid());
    // The kernel counts on during the test: the values before and after are the bounds.
    let before = (
        number_in_file(&group, "cpu.stat", "usage_usec"),
        number_in_file(&group, "memory.stat", "pgfault"),
    );
    let text = daemon.ctr_in(
        "k8s.io",
        &["tasks", "metrics", "--format", "json", &container.id],
    );
    let after = (
        number_in_file(&group, "cpu.stat", "usage_usec"),
        number_in_file(&group, "memory.stat", "pgfault"),
    );
    let metrics: serde_json::Value =
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    let get = |path: &str| {
        metrics
            .pointer(path)
            .and_then(serde_json::Value::as_u64)
            .unwrap_or_else(|| panic!("{path}: {text}"))
    };
    let cpu = get("/cpu/usage_usec");
    assert!(
        (before.0..=after.0).contains(&cpu),
        "{cpu} is not in {before:?}..={after:?}"
    );
    let faults = get("/memory/pgfault");
    assert!(
        (before.1..=after.1).contains(&faults),
        "{faults} is not in {before:?}..={after:?}"
    );
    assert_eq!(
        get("/memory/usage_limit").to_string(),
        read_file(&group, "memory.max").trim()
    );
    assert_eq!(get("/pids/current"), 1);
    assert!(get("/memory/usage") > 0);
    assert!(metrics.pointer("/memory_events").is_some(), "{text}");
}

/// Stops and removes a container with children, in a pod with a shared process namespace. Gives the removed container
/// and its cgroup.
#[track_caller]
pub(super) fn end_a_shared_process_namespace(daemon: &Daemon) -> (Container<'_>, PathBuf) {
    let pod = PodSpec::new("shared").shared_processes().run(daemon);
    let script = "for i in 1 2 3 4 5; do setsid sleep 3600 & done; wait";
    let container = pod.container("one").shell(script).start();
    let group = cgroup_of(container.pid());
    eventually(Duration::from_secs(5), || {
        let count = read_file(&group, "cgroup.procs").lines().count();
        ok_if(count == 6, || format!("{count} processes"))
    });
    container.stop(0);
    assert_eq!(container.wait(), 137);
    container.remove();
    (container, group)
}

on_every_containerd! {
    fn machine_has_cgroup_v2_and_systemd(version) {
        assert!(vm::inside());
        assert!(Path::new("/sys/fs/cgroup/cgroup.controllers").exists());
        assert_eq!(Process::of(1).unwrap().name, "systemd");
        assert!(proc::may_lower_oom_scores());
        let daemon = Daemon::start(version);
        daemon.end();
    }

    fn machine_a_container_gets_a_lower_oom_score_and_the_shim_one_more_than_containerd(version) {
        let daemon = Daemon::start(version);
        let containerds = oom_score_adj(daemon.pid());
        let pod = PodSpec::new("oom-scores").run(&daemon);
        assert_eq!(oom_score_adj(daemon.shim().pid), containerds + 1);
        // kubelet's value for a guaranteed pod.
        let container = pod.container("one").oom_score_adj(-997).command(&["sleep", "3600"]).start();
        assert_eq!(oom_score_adj(container.pid()), -997);
        daemon.end();
    }

    fn machine_plain_cgroups_freeze_and_count(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("v2").run(&daemon);
        let container = pod.container("one").memory_limit(64 << 20).command(&["sleep", "3600"]).start();
        let parent = format!("/sys/fs/cgroup{}", daemon.names.cgroup_parent());
        assert_eq!(cgroup_of(container.pid()), Path::new(&parent).join(&container.id));
        assert_pause_and_resume(&daemon, &container);
        assert_metrics_are_the_kernels(&daemon, &container);
        daemon.end();
    }

    fn machine_a_frozen_container_can_be_stopped(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("frozen").run(&daemon);
        let container = pod.sleeper("one");
        daemon.ctr_in("k8s.io", &["tasks", "pause", &container.id]);
        container.stop(0);
        assert_eq!(container.wait(), 137);
        daemon.end();
    }

    fn machine_an_end_takes_every_process_of_a_shared_process_namespace(version) {
        let daemon = Daemon::start(version);
        let (_, group) = end_a_shared_process_namespace(&daemon);
        eventually(Duration::from_secs(5), || ok_if(!group.exists(), || format!("{} is still there", group.display())));
        daemon.end();
    }
}
