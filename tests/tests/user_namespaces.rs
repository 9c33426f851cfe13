//! S6: pods with a user namespace (`hostUsers: false`), as kubelet asks CRI for them. Not on containerd 1.6, which does
//! not know the request, and would run such a pod as the node's root.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use shim_tests::daemon::Handler;
use shim_tests::proc::namespace;
use shim_tests::slot::text;
use shim_tests::{
    Container, Daemon, Options, Pod, PodSpec, ShimUnderTest, Version, eventually, in_every_mode,
    lab, left_out, on_every_containerd,
};

/// The node's user id of the pods' root.
const ROOT: u32 = 300_000;

/// The handler of the pods where [`daemon`] makes one.
const HANDLER: &str = "userns";

/// A containerd with this runc. containerd 2.0 to 2.2 offer user namespaces only to handlers of the stock shim's type;
/// the shim under test comes in by its path. Elsewhere the runc comes first in PATH: a handler of another type may have no
/// options table, with which containerd 2.x starts no container of a pod with a user namespace.
fn daemon(version: Version, runc: &Path) -> Daemon {
    if has_handler(version) {
        let runtime = format!("BinaryName = '{}'", text(runc));
        let options = Options {
            handlers: vec![Handler::of_the_stock_type(HANDLER, version, &runtime)],
            ..Options::default()
        };
        return Daemon::with(version, &options);
    }
    let daemon = Daemon::start(version);
    // containerd asks for the features of runc when it starts.
    daemon.kill();
    std::os::unix::fs::symlink(runc, daemon.directory().join("bin/runc")).unwrap();
    daemon.start_again();
    daemon
}

/// Whether [`daemon`] makes a handler for the pods.
fn has_handler(version: Version) -> bool {
    version < Version::V2_3 && !version.sandbox_api()
}

fn mapped_pod(version: Version) -> PodSpec {
    let spec = PodSpec::new("mapped").user_namespace(ROOT);
    if has_handler(version) {
        spec.handler(HANDLER)
    } else {
        spec
    }
}

fn owner_of_file(path: String) -> u32 {
    std::fs::metadata(path).unwrap().uid()
}

/// The user id of a process, as the node counts.
fn user_of(pid: i32) -> u32 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find(|line| line.starts_with("Uid:"))
        .unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Two containers of the pod are in its user namespace, in all that a user of the pod can see.
#[track_caller]
fn assert_mapped_pod(pod: &Pod<'_>) {
    let (one, two) = (pod.sleeper("one"), pod.sleeper("two"));
    assert_ids_are_mapped(&one);
    assert_namespaces_are_the_pods(pod, [&one, &two]);
    assert_files_belong_to_root_of_the_pod(&one);
    assert_network_and_hostname_are_the_pods(&one);
    assert_eq!(one.exec(&["sh", "-c", "exit 7"]).code, 7);
    assert_pods_files_are_usable(&one, &two);
    assert_log_is_written(pod);
    two.stop(0);
    assert_eq!(two.wait(), 137);
    assert!(one.running());
}

#[track_caller]
fn assert_ids_are_mapped(container: &Container<'_>) {
    let map = container.shell("cat /proc/self/uid_map /proc/self/gid_map");
    let line = ["0", &ROOT.to_string(), "65536"].map(str::to_owned);
    let expected = [line.clone(), line].concat();
    assert_eq!(map.split_whitespace().collect::<Vec<_>>(), expected);
}

#[track_caller]
fn assert_namespaces_are_the_pods(pod: &Pod<'_>, containers: [&Container<'_>; 2]) {
    let node = namespace(std::process::id().cast_signed(), "user");
    let of_pod = namespace(pod.pid(), "user");
    assert_ne!(of_pod, node);
    for container in containers {
        assert_eq!(namespace(container.pid(), "user"), of_pod);
        assert_eq!(owner_of_file(format!("/proc/{}", container.pid())), ROOT);
        for kind in ["net", "ipc", "uts"] {
            assert_eq!(
                namespace(container.pid(), kind),
                namespace(pod.pid(), kind),
                "{kind}"
            );
        }
    }
    // The holder of the sandbox is one of the pod's users, too.
    assert!((ROOT..ROOT + 65536).contains(&user_of(pod.pid())));
}

/// Files of the image, and new ones.
#[track_caller]
fn assert_files_belong_to_root_of_the_pod(container: &Container<'_>) {
    assert_eq!(
        container.shell("touch /new && stat -c %u:%g /bin/busybox /new / | xargs"),
        "0:0 0:0 0:0"
    );
    let new = format!("/proc/{}/root/new", container.pid());
    assert_eq!(owner_of_file(new), ROOT);
}

#[track_caller]
fn assert_network_and_hostname_are_the_pods(container: &Container<'_>) {
    // Only root of the user namespace that owns the network namespace may do this.
    let pid = container.pid().to_string();
    let set = Command::new("nsenter")
        .args([
            "-t", &pid, "-U", "-n", "ip", "link", "set", "lo", "mtu", "1400",
        ])
        .output()
        .unwrap();
    assert!(set.status.success(), "{set:?}");
    assert_eq!(container.output(&["hostname"]), "mapped");
    assert_eq!(
        container.shell("cat /proc/sys/net/ipv4/ip_unprivileged_port_start"),
        "0"
    );
}

/// Users of the pod can read the pod's files, and write to its shared memory.
#[track_caller]
fn assert_pods_files_are_usable(one: &Container<'_>, two: &Container<'_>) {
    assert_eq!(one.output(&["cat", "/etc/hostname"]), "mapped");
    one.shell("cat /etc/hosts /etc/resolv.conf && echo seen >/dev/shm/file");
    assert_eq!(two.output(&["cat", "/dev/shm/file"]), "seen");
}

#[track_caller]
fn assert_log_is_written(pod: &Pod<'_>) {
    let said = pod
        .container("said")
        .shell("id -u; echo to the log")
        .start();
    assert_eq!(said.wait(), 0);
    eventually(Duration::from_secs(10), || {
        let lines = said.log_lines("stdout");
        if lines == ["0", "to the log"] {
            Ok(())
        } else {
            Err(format!("{lines:?}"))
        }
    });
}

macro_rules! unknown_to_1_6 {
    ($version:ident) => {
        if $version == Version::V1_6 {
            left_out!("1.6 does not know the request, and would run such a pod as the node's root");
        }
    };
}

in_every_mode! {
    fn a_pod_with_a_user_namespace(version) {
        unknown_to_1_6!(version);
        let daemon = daemon(version, &lab::runc_for_user_namespaces());
        // 1.7 tells of no handler, and 2.0 to 2.2 only of those of the stock shim's type.
        if version >= Version::V2_3 {
            assert!(daemon.cri().offers_user_namespaces(shim_tests::daemon::HANDLER));
        } else if version == Version::V2_1 {
            assert!(daemon.cri().offers_user_namespaces(HANDLER));
        }
        let pod = mapped_pod(version).sysctl("net.ipv4.ip_unprivileged_port_start", "0").run(&daemon);
        assert_mapped_pod(&pod);
        if ShimUnderTest::get() == ShimUnderTest::Pause {
            let name = std::fs::read_to_string(format!("/proc/{}/comm", pod.pid())).unwrap();
            assert_eq!(name.trim(), "pause");
        }
        daemon.end();
    }

    fn a_pod_with_a_user_and_a_shared_process_namespace(version) {
        unknown_to_1_6!(version);
        let daemon = daemon(version, &lab::runc_for_user_namespaces());
        let pod = mapped_pod(version)
            .shared_processes()
            .sysctl("net.ipv4.ip_unprivileged_port_start", "0")
            .run(&daemon);
        assert_mapped_pod(&pod);
        let one = pod.sleeper("three");
        assert_eq!(one.shell("cat /proc/1/comm"), "pause");
        assert_eq!(namespace(one.pid(), "pid"), namespace(pod.pid(), "pid"));
        daemon.end();
    }
}

on_every_containerd! {
    /// runc 1.1 cannot map the owners of mounts. containerd 1.7 does without (it copies the layers); 2.x asks what runc
    /// can, does not offer user namespaces to kubelet, and refuses the container of one who asks all the same.
    fn a_runc_that_is_too_old(version) {
        unknown_to_1_6!(version);
        let runc = lab::runc();
        if lab::runc_line(&runc) >= (1, 2) {
            left_out!("RUNC is new enough");
        }
        let daemon = daemon(version, &runc);
        assert!(!daemon.cri().offers_user_namespaces(HANDLER));
        assert!(!daemon.cri().offers_user_namespaces(shim_tests::daemon::HANDLER));
        let pod = mapped_pod(version).run(&daemon);
        let started = pod.container("one").command(&["sleep", "3600"]).try_start();
        if version < Version::V2_0 {
            let map = started.unwrap().shell("cat /proc/self/uid_map");
            assert!(map.contains(&ROOT.to_string()), "{map}");
        } else {
            let refused = started.err().expect("it cannot start").0;
            assert!(refused.contains("idmap mounts not supported"), "{refused}");
        }
        daemon.end();
    }
}
