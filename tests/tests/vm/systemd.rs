//! systemd's cgroup driver: a pod is a slice, a container a scope in the slice, and neither outlives pod or container.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use k8s_cri::v1::LinuxContainerResources;
use rustix::process::Signal;
use shim_tests::until::ok_if;
use shim_tests::{Container, Daemon, Options, PodSpec, eventually, on_every_containerd, proc};

use super::machine::{
    assert_metrics_are_the_kernels, assert_pause_and_resume, cgroup_of,
    end_a_shared_process_namespace, number_in_file, read_file,
};

fn scope_name(container: &Container<'_>) -> String {
    format!("cri-containerd-{}.scope", container.id)
}

fn scope_cgroup(daemon: &Daemon, container: &Container<'_>) -> PathBuf {
    Path::new("/sys/fs/cgroup")
        .join(daemon.names.slice())
        .join(scope_name(container))
}

/// A property of a systemd unit. LoadState of an unknown unit is `not-found`.
fn unit_property(unit: &str, name: &str) -> String {
    let output = Command::new("systemctl")
        .args(["show", "--value", "--property", name, unit])
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).trim().to_owned()
}

#[track_caller]
fn wait_until_no_scope(daemon: &Daemon, container: &Container<'_>) {
    eventually(Duration::from_secs(5), || {
        let (state, group) = (
            unit_property(&scope_name(container), "LoadState"),
            scope_cgroup(daemon, container),
        );
        ok_if(state == "not-found" && !group.exists(), || {
            format!(
                "{} is {state}, its cgroup exists: {}",
                scope_name(container),
                group.exists()
            )
        })
    });
}

on_every_containerd! {
    fn systemd_a_container_is_a_scope_and_its_end_leaves_none(version) {
        let daemon = Daemon::with(version, &Options::systemd());
        let pod = PodSpec::new("scope").run(&daemon);
        let container = pod.container("one").memory_limit(64 << 20).command(&["sleep", "3600"]).start();
        assert_eq!(cgroup_of(container.pid()), scope_cgroup(&daemon, &container));
        assert_eq!(unit_property(&scope_name(&container), "ActiveState"), "active");
        assert_eq!(unit_property(&scope_name(&container), "MemoryMax"), (64 << 20).to_string());
        assert_metrics_are_the_kernels(&daemon, &container);
        assert_pause_and_resume(&daemon, &container);
        // A container that ends by itself, one that is stopped, and one that never starts.
        let short = pod.container("two").shell("exit 3").start();
        assert_eq!(short.wait(), 3);
        wait_until_no_scope(&daemon, &short);
        container.stop(0);
        container.remove();
        wait_until_no_scope(&daemon, &container);
        let created = pod.container("three").command(&["sleep", "3600"]).create();
        created.remove();
        wait_until_no_scope(&daemon, &created);
        daemon.end();
    }

    fn systemd_an_update_reaches_the_unit_and_the_kernel(version) {
        let daemon = Daemon::with(version, &Options::systemd());
        let pod = PodSpec::new("update").run(&daemon);
        let container = pod.container("one").memory_limit(64 << 20).command(&["sleep", "3600"]).start();
        let group = cgroup_of(container.pid());
        assert_eq!(read_file(&group, "memory.max").trim(), (64 << 20).to_string());
        container.update(LinuxContainerResources {
            memory_limit_in_bytes: 96 << 20, cpu_quota: 50_000, cpu_period: 100_000, cpu_shares: 512,
            ..Default::default()
        });
        assert_eq!(read_file(&group, "memory.max").trim(), (96 << 20).to_string());
        assert_eq!(read_file(&group, "cpu.max").trim(), "50000 100000");
        // systemd would undo an unknown limit at its next reload.
        assert_eq!(unit_property(&scope_name(&container), "MemoryMax"), (96 << 20).to_string());
        assert_eq!(unit_property(&scope_name(&container), "CPUQuotaPerSecUSec"), "500ms");
        assert!(Command::new("systemctl").arg("daemon-reload").status().unwrap().success());
        assert_eq!(read_file(&group, "memory.max").trim(), (96 << 20).to_string());
        assert_eq!(read_file(&group, "cpu.max").trim(), "50000 100000");
        assert!(container.running());
        daemon.end();
    }

    fn systemd_a_kill_for_lack_of_memory_is_told(version) {
        let daemon = Daemon::with(version, &Options::systemd());
        let events = daemon.events();
        let pod = PodSpec::new("oom").run(&daemon);
        let sign = daemon.directory().join("sign");
        std::fs::create_dir(&sign).unwrap();
        let script = "while [ ! -e /sign/go ]; do sleep 0.1; done; exec dd if=/dev/zero of=/dev/null bs=128M count=1";
        let spec = pod.container("one").memory_limit(32 << 20).mount(sign.to_str().unwrap(), "/sign");
        let container = spec.shell(script).start();
        let group = cgroup_of(container.pid());
        assert_eq!(number_in_file(&group, "memory.events", "oom_kill"), 0);
        std::fs::write(sign.join("go"), "").unwrap();
        assert_eq!(container.wait(), 137);
        eventually(Duration::from_secs(5), || {
            let seen = events.of(&container.id);
            ok_if(seen == ["create", "start", "oom", "exit", "delete"], || format!("{seen:?}"))
        });
        // CRI hears of the exit and of the cause on two ways, and may know the exit first.
        eventually(Duration::from_secs(10), || {
            let reason = container.status().0.reason;
            ok_if(reason == "OOMKilled", || reason)
        });
        wait_until_no_scope(&daemon, &container);
        daemon.end();
    }

    fn systemd_an_end_takes_every_process_of_a_shared_process_namespace(version) {
        let daemon = Daemon::with(version, &Options::systemd());
        let (container, _) = end_a_shared_process_namespace(&daemon);
        wait_until_no_scope(&daemon, &container);
        daemon.end();
    }

    fn systemd_a_killed_shim_leaves_no_scope(version) {
        let daemon = Daemon::with(version, &Options::systemd());
        let pod = PodSpec::new("killed").run(&daemon);
        let container = pod.sleeper("one");
        daemon.look();
        proc::kill(daemon.shim().pid, Signal::KILL);
        // The socket is the subject of another test: the stock shim leaves the socket.
        wait_until_no_scope(&daemon, &container);
        eventually(Duration::from_secs(10), || {
            let alive: Vec<_> = daemon.processes().iter().map(proc::Process::describe).collect();
            ok_if(alive.is_empty(), || format!("{alive:?}"))
        });
        daemon.end();
    }
}
