//! The Sandbox API beyond the scenarios: on a containerd, and call by call as containerd 2.3 makes the calls
//! ([`shim_tests::driver`]).
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use containerd_shim_protos::api::{CreateTaskRequest, CreateTaskResponse, Empty, ShutdownRequest};
use containerd_shim_protos::sandbox_api::{
    PingRequest, PingResponse, PlatformRequest, PlatformResponse, SandboxMetricsRequest,
    SandboxMetricsResponse,
};
use containerd_shim_protos::ttrpc::Code;
use k8s_cri::v1 as api;
use rustix::process::Signal;
use serde_json::Value;
use shim_tests::calls::{code, refusal};
use shim_tests::cri_calls::{Calls, pod_config};
use shim_tests::driver::{CONFIG, Driver, wait_until_gone};
use shim_tests::proc::namespace;
use shim_tests::raw::Bundle;
use shim_tests::until::ok_if;
use shim_tests::{
    Daemon, Options, PodSpec, ShimUnderTest, Version, eventually, left_out, ours_only,
    through_the_sandbox_api,
};

/// A containerd beside the shims that the tests drive by themselves.
fn daemon() -> Daemon {
    Daemon::start(Version::newest())
}

fn this_process() -> i32 {
    std::process::id().cast_signed()
}

// --- on a containerd -------------------------------------------------------------------------------------------------

/// A small file system in memory at containerd's state directory, as `/run` is.
struct SmallState(PathBuf);

impl SmallState {
    /// containerd must be down.
    fn mount(daemon: &Daemon) -> Self {
        let path = daemon.directory().join("state");
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("state", &path, "tmpfs", flags, Some(c"size=32m")).unwrap();
        Self(path)
    }

    fn used(&self) -> u64 {
        let found = rustix::fs::statvfs(&self.0).unwrap();
        (found.f_blocks - found.f_bfree) * found.f_frsize
    }
}

impl Drop for SmallState {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}

/// Counts the opens of a file. An execution opens the file once.
struct Opened(std::os::fd::OwnedFd);

impl Opened {
    fn watch(path: &Path) -> Self {
        use rustix::fs::inotify;
        let fd =
            inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC).unwrap();
        inotify::add_watch(
            &fd,
            path,
            inotify::WatchFlags::OPEN | inotify::WatchFlags::ACCESS,
        )
        .unwrap();
        Self(fd)
    }

    /// The number of opens since the last call.
    fn count(&self) -> usize {
        let mut buffer = [std::mem::MaybeUninit::uninit(); 4096];
        let mut events = rustix::fs::inotify::Reader::new(&self.0, &mut buffer);
        // inotify merges equal events in a row. The reads at the start of each execution keep the opens apart.
        let mut count = 0;
        while let Ok(event) = events.next() {
            count += usize::from(
                event
                    .events()
                    .contains(rustix::fs::inotify::ReadFlags::OPEN),
            );
        }
        count
    }
}

through_the_sandbox_api! {
    fn pods_need_no_pause_image(version) {
        ours_only!("the stock shim has no Sandbox API");
        if version.pause_image().is_some() {
            left_out!("containerd 2.3 pulls a pause image, which nobody uses");
        }
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("pauseless").run(&daemon);
        let container = pod.sleeper("one");
        assert!(container.running());
        let images = daemon.ctr_in("k8s.io", &["images", "list", "--quiet"]);
        assert!(!images.contains("pause"), "{images}");
        let containers = daemon.ctr_in("k8s.io", &["containers", "list", "--quiet"]);
        assert_eq!(
            containers.trim(),
            container.id,
            "the sandbox is no container"
        );
        daemon.end();
    }

    fn a_pod_whose_pause_image_cannot_be_pulled_leaves_no_shim(version) {
        ours_only!("the stock shim has no Sandbox API");
        let Some(image) = version.pause_image() else {
            left_out!("no pause image is pulled");
        };
        let daemon = Daemon::with(version, &Options::runtime("sandbox_start_timeout = 3"));
        daemon.kill();
        // Nobody listens there.
        let absent = "127.0.0.1:1/pause:0";
        let file = daemon.directory().join("config.toml");
        let config = fs::read_to_string(&file).unwrap();
        assert!(config.contains(image), "{config}");
        fs::write(file, config.replace(image, absent)).unwrap();
        daemon.start_again();
        let config = pod_config(&daemon.names, PodSpec::new("pulls"));
        let calls = Calls::new(&daemon.names);
        // As the kubelet does: again and again, each time as another attempt.
        for _ in 0..2 {
            assert!(calls.run_pod(&config, "").is_err(), "there is no image");
        }
        assert!(!daemon.shims().is_empty(), "containerd 2.3 ends them now");
        eventually(Duration::from_secs(10), || {
            ok_if(daemon.shims().is_empty(), || format!("{:?}", daemon.shims()))
        });
        daemon.ctr_in("k8s.io", &["images", "tag", image, absent]);
        let pod = PodSpec::new("pulls").run(&daemon);
        assert!(pod.sleeper("one").running());
        assert_eq!(daemon.shims().len(), 1);
        daemon.end();
    }

    fn inspect_shows_what_it_shows_of_any_pod_and_the_holder(version) {
        ours_only!("the stock shim has no Sandbox API");
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("inspected")
            .sysctl("net.core.somaxconn", "99")
            .run(&daemon);
        let (_, info) = pod.status();
        assert_eq!(info["processStatus"], "running");
        assert_eq!(info["netNamespaceClosed"], false);
        assert_eq!(info["runtimeType"], ShimUnderTest::Pause.runtime_type());
        assert_eq!(info["config"]["metadata"]["name"], "inspected");
        assert_eq!(info["config"]["hostname"], "inspected");
        let metadata = &info["sandboxMetadata"];
        // containerd from 2.3 on decodes the metadata, and refuses another version.
        assert_eq!(metadata["Version"], "v1");
        assert_eq!(metadata["Metadata"]["ID"], pod.id);
        assert_eq!(info["pause"]["holder"], "thread");
        let pid = pod.pid();
        for kind in ["net", "ipc", "uts"] {
            let shown = &info["pause"]["namespaces"][kind];
            assert_eq!(shown["inode"], namespace(pid, kind), "{kind}: {shown}");
            let path = shown["path"].as_str().unwrap();
            assert_eq!(fs::metadata(path).unwrap().ino(), namespace(pid, kind));
        }
        let spec = &info["runtimeSpec"];
        assert_eq!(
            spec["annotations"]["io.kubernetes.cri.container-type"],
            "sandbox"
        );
        assert_eq!(
            spec["annotations"]["io.kubernetes.cri.sandbox-name"],
            "inspected"
        );
        assert_eq!(spec["linux"]["sysctl"]["net.core.somaxconn"], "99");
        assert!(
            spec["linux"]["cgroupsPath"]
                .as_str()
                .unwrap()
                .ends_with(&pod.id),
            "{spec}"
        );
        pod.stop();
        let (status, info) = pod.status();
        assert_eq!(status.state(), api::PodSandboxState::SandboxNotready);
        assert_eq!(info["processStatus"], "stopped");
        assert_eq!(info["netNamespaceClosed"], true);
        daemon.end();
    }

    fn the_pods_files_are_there_unless_the_container_brings_its_own(version) {
        ours_only!("the stock shim has no Sandbox API");
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("filed")
            .dns("192.0.2.53", "filed.test")
            .run(&daemon);
        let plain = pod.sleeper("plain");
        assert_eq!(plain.output(&["cat", "/etc/hostname"]), "filed");
        assert_eq!(
            plain.output(&["cat", "/etc/hosts"]),
            fs::read_to_string("/etc/hosts").unwrap().trim_end()
        );
        assert_eq!(
            plain.output(&["cat", "/etc/resolv.conf"]),
            "search filed.test\nnameserver 192.0.2.53"
        );
        let mounts = plain.output(&["cat", "/proc/mounts"]);
        let shm = mounts
            .lines()
            .find(|line| line.split(' ').nth(1) == Some("/dev/shm"))
            .unwrap();
        for option in ["nosuid", "nodev", "noexec", "size=65536k"] {
            assert!(shm.contains(option), "{shm}");
        }
        assert_eq!(plain.shell("stat -c %a /dev/shm"), "1777");
        plain.shell("echo writable >> /etc/hosts");
        // kubelet brings /etc/hosts.
        let own = daemon.directory().join("own-hosts");
        fs::write(&own, "192.0.2.1 own\n").unwrap();
        let mut own_hosts = pod
            .container("own")
            .mount(&own.display().to_string(), "/etc/hosts");
        own_hosts.security().readonly_rootfs = true;
        let own_hosts = own_hosts.command(&["sleep", "3600"]).start();
        assert_eq!(own_hosts.output(&["cat", "/etc/hosts"]), "192.0.2.1 own");
        // A read-only root filesystem makes the pod's files read-only, and leaves the shared memory writable.
        assert_ne!(
            own_hosts.exec(&["sh", "-c", "echo x > /etc/hostname"]).code,
            0
        );
        own_hosts.shell("echo seen > /dev/shm/file");
        assert_eq!(plain.output(&["cat", "/dev/shm/file"]), "seen");
        daemon.end();
    }

    fn what_a_container_writes_into_the_pods_files_is_not_in_the_nodes_memory(version) {
        ours_only!("the stock shim has no Sandbox API");
        let daemon = Daemon::start(version);
        daemon.kill();
        let state = SmallState::mount(&daemon);
        daemon.start_again();
        let pods = [PodSpec::new("writes"), PodSpec::new("killed")].map(|pod| pod.run(&daemon));
        let before = state.used();
        let [removed, killed] = pods;
        let container = removed.sleeper("one");
        for file in ["hostname", "hosts", "resolv.conf"] {
            let size = container.shell(&format!(
                "dd if=/dev/zero of=/etc/{file} bs=1M count=40 2>/dev/null; stat -c %s /etc/{file}"
            ));
            assert_eq!(size, (40 << 20).to_string(), "{file}");
        }
        let grown = state.used().saturating_sub(before);
        assert!(grown < 4 << 20, "{grown} bytes of memory");
        // The files go with the pod, also when the shim was killed.
        let controller = "root/io.containerd.sandbox.controller.v1.shim/k8s.io";
        let files = |pod: &shim_tests::Pod<'_>| {
            let work = daemon.directory().join(controller).join(&pod.id);
            work.join("files/hostname")
        };
        let [of_removed, of_killed] = [&removed, &killed].map(&files);
        assert!(of_removed.exists() && of_killed.exists());
        removed.stop();
        removed.remove();
        assert!(!of_removed.exists());
        shim_tests::proc::kill(daemon.shim().pid, Signal::KILL);
        eventually(Duration::from_secs(10), || {
            ok_if(!of_killed.exists(), || "the files stay".to_owned())
        });
        killed.stop();
        killed.remove();
        daemon.kill();
        drop(state);
        daemon.start_again();
        daemon.end();
    }

    fn a_sandbox_that_containerd_has_left_between_its_two_calls_ends_by_itself(version) {
        ours_only!("the stock shim has no Sandbox API");
        let options = Options::runtime("sandbox_start_timeout = 3");
        let daemon = Daemon::with(version, &options);
        // A shim that stands still from the answer of `start` on: containerd waits for CreateSandbox.
        let link = daemon
            .directory()
            .join("bin")
            .join(ShimUnderTest::Pause.binary_name());
        let shim = fs::canonicalize(&link).unwrap();
        let still = daemon.directory().join("still");
        let script = format!(
            "#!/bin/sh\nfor word; do action=$word; done\nanswer=$({shim} \"$@\") || exit\n\
             [ $action = start ] && [ -e {still} ] && kill -STOP $(cat shim.pid) && mv {still} {still}-done\n\
             printf %s \"$answer\"\n",
            shim = shim.display(),
            still = still.display(),
        );
        fs::remove_file(&link).unwrap();
        fs::write(&link, script).unwrap();
        fs::set_permissions(&link, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        fs::write(&still, "").unwrap();
        let names = daemon.names.clone();
        let client = std::thread::spawn(move || {
            let config = pod_config(&names, PodSpec::new("left"));
            Calls::new(&names).run_pod(&config, "").is_err()
        });
        eventually(Duration::from_secs(20), || {
            let done = still.with_file_name("still-done");
            ok_if(done.exists(), || "no shim stands still".to_owned())
        });
        daemon.kill();
        assert!(client.join().unwrap(), "the call is lost");
        let left = daemon.shim();
        shim_tests::proc::kill(left.pid, Signal::CONT);
        daemon.start_again();
        eventually(Duration::from_secs(20), || {
            ok_if(!left.alive(), || left.describe())
        });
        // What containerd does next works: the kubelet removes what it finds, and makes the pod again.
        daemon.cri().remove_all_pods();
        daemon.assert_nothing_left();
        let pod = PodSpec::new("left").run(&daemon);
        assert!(pod.ready());
        let found = daemon.shim();
        std::thread::sleep(Duration::from_secs(4));
        assert!(
            found.alive() && pod.ready(),
            "a pod that was started lives on"
        );
        pod.stop();
        pod.remove();
        daemon.end();
    }

    fn the_shim_is_executed_twice_and_runc_only_for_the_containers(version) {
        ours_only!("the stock shim has no Sandbox API");
        let daemon = Daemon::start(version);
        // containerd 2.3 executes a shim for its features, once, before the first container.
        let before = PodSpec::new("before").run(&daemon);
        before.sleeper("one");
        before.stop();
        before.remove();
        let log = daemon.directory().join("runc.log");
        let runc = daemon.directory().join("bin/runc");
        let real = shim_tests::lab::runc();
        let script = format!(
            "#!/bin/sh\necho \"$@\" >>{}\nexec {} \"$@\"\n",
            log.display(),
            real.display()
        );
        fs::write(&runc, script).unwrap();
        fs::set_permissions(&runc, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        // A copy for this test alone: executions by other tests must not count.
        let link = daemon
            .directory()
            .join("bin")
            .join(ShimUnderTest::Pause.binary_name());
        let shim = fs::canonicalize(&link).unwrap();
        fs::remove_file(&link).unwrap();
        fs::copy(&shim, &link).unwrap();
        let opened = Opened::watch(&link);

        let pod = PodSpec::new("counted").run(&daemon);
        assert_eq!(opened.count(), 2, "start, and the server");
        assert!(
            !log.exists(),
            "runc ran for the sandbox: {}",
            fs::read_to_string(&log).unwrap()
        );
        let containers = ["one", "two", "three"].map(|name| pod.sleeper(name));
        for container in &containers {
            container.stop(0);
            container.wait();
            container.remove();
        }
        pod.stop();
        assert_eq!(
            opened.count(),
            0,
            "none for a container, or for the sandbox's end"
        );
        pod.remove();
        let calls = fs::read_to_string(&log).unwrap();
        assert!(
            !calls.contains(&pod.id[..16]) || calls.lines().all(|call| !call.ends_with(&pod.id)),
            "{calls}"
        );
        let of = |command: &str| calls.lines().filter(|call| call.contains(command)).count();
        assert_eq!((of(" create "), of(" start ")), (3, 3), "{calls}");
        daemon.end();
    }
}

// --- as containerd 2.3 does ------------------------------------------------------------------------------------------

fn config(name: &str, daemon: &Daemon) -> api::PodSandboxConfig {
    let mut config = PodSpec::new(name).config;
    config.linux.as_mut().unwrap().cgroup_parent = daemon.names.cgroup_parent();
    config
}

/// A network namespace at a path; with `--user`, also a user namespace that owns the network namespace.
struct Network {
    path: PathBuf,
    holder: Child,
}

impl Network {
    fn make(daemon: &Daemon, flags: &[&str]) -> Self {
        let path = daemon.directory().join("netns");
        fs::write(&path, "").unwrap();
        let holder = Command::new("unshare")
            .args(flags)
            .args(["sleep", "600"])
            .env(shim_tests::leaks::MARK, daemon.directory())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let pid = holder.id();
        let node = namespace(this_process(), "net");
        eventually(Duration::from_secs(5), || {
            let link = fs::read_link(format!("/proc/{pid}/ns/net")).map_err(|e| e.to_string())?;
            match link.to_string_lossy().contains(&node.to_string()) {
                true => Err("not yet".to_owned()),
                false => Ok(()),
            }
        });
        if flags.contains(&"--user") {
            for map in ["uid_map", "gid_map"] {
                fs::write(format!("/proc/{pid}/{map}"), "0 300000 65536\n").unwrap();
            }
        }
        rustix::mount::mount_bind(format!("/proc/{pid}/ns/net"), &path).unwrap();
        Self { path, holder }
    }

    fn path(&self) -> String {
        self.path.display().to_string()
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.path, rustix::mount::UnmountFlags::DETACH);
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

#[test]
fn a_pod_of_containerd_2_3_from_its_first_call_to_its_last() {
    ours_only!("the stock shim has no Sandbox API");
    let daemon = daemon();
    let network = Network::make(&daemon, &["--net"]);
    let driver = Driver::start(&daemon, "pod23");
    assert_eq!(
        driver.answer, driver.expected,
        "start's answer, byte by byte"
    );
    let (pid, spec) = create_and_start_sandbox(&driver, &config("pod23", &daemon), &network);
    assert_spec_has_the_pods_namespaces(&spec, pid);
    assert_spec_mounts_the_pods_files(&spec);
    assert_platform_and_ping_answer(&driver);
    let bundle = start_container_of_pod(&driver, &daemon, pid);
    assert_metrics_of_the_pod(&driver);
    delete_container_of_pod(&driver, &bundle.id);
    stop_sandbox(&driver);
    driver.shut_down();
    drop(bundle);
    drop(network);
    daemon.end();
}

/// `CreateSandbox` and `StartSandbox`, with `SandboxStatus` after each: the sandbox's pid, and its OCI spec.
#[track_caller]
fn create_and_start_sandbox(
    driver: &Driver<'_>,
    config: &api::PodSandboxConfig,
    network: &Network,
) -> (i32, Value) {
    driver.create(config, &network.path()).unwrap();
    assert_eq!(
        driver.status().unwrap().0.state,
        "SANDBOX_NOTREADY",
        "not started"
    );
    let (started, spec) = driver.start_sandbox();
    assert_eq!(
        started.spec.type_url,
        "types.containerd.io/opencontainers/runtime-spec/1/Spec"
    );
    let pid = i32::try_from(started.pid).unwrap();
    let (status, info) = driver.status().unwrap();
    assert_eq!(
        (status.state.as_str(), status.pid),
        ("SANDBOX_READY", started.pid)
    );
    assert_eq!(info["runtimeSpec"], spec);
    assert_eq!(
        namespace(pid, "net"),
        fs::metadata(&network.path).unwrap().ino()
    );
    (pid, spec)
}

/// Every namespace of the spec leads to the pod's; a missing one would be the node's.
#[track_caller]
fn assert_spec_has_the_pods_namespaces(spec: &Value, pid: i32) {
    for (kind, file) in [("network", "net"), ("ipc", "ipc"), ("uts", "uts")] {
        let listed = spec["linux"]["namespaces"].as_array().unwrap();
        let path = listed
            .iter()
            .find(|namespace| namespace["type"] == kind)
            .unwrap()["path"]
            .as_str()
            .unwrap();
        assert_eq!(
            fs::metadata(path).unwrap().ino(),
            namespace(pid, file),
            "{kind}"
        );
        assert_ne!(
            namespace(pid, file),
            namespace(this_process(), file),
            "{kind}"
        );
    }
}

#[track_caller]
fn assert_spec_mounts_the_pods_files(spec: &Value) {
    for file in [
        "/etc/hostname",
        "/etc/hosts",
        "/etc/resolv.conf",
        "/dev/shm",
    ] {
        let mounts = spec["mounts"].as_array().unwrap();
        let mount = mounts
            .iter()
            .find(|mount| mount["destination"] == file)
            .unwrap();
        assert!(
            Path::new(mount["source"].as_str().unwrap()).exists(),
            "{mount}"
        );
    }
}

#[track_caller]
fn assert_platform_and_ping_answer(driver: &Driver<'_>) {
    let request = PlatformRequest {
        sandbox_id: driver.bundle.id.clone(),
        ..Default::default()
    };
    let platform: PlatformResponse = driver.sandbox.call("Platform", &request).unwrap();
    assert_eq!(platform.platform.os, "linux");
    let architecture = Command::new("dpkg")
        .arg("--print-architecture")
        .output()
        .unwrap()
        .stdout;
    assert_eq!(
        platform.platform.architecture,
        String::from_utf8_lossy(&architecture).trim()
    );
    let request = PingRequest {
        sandbox_id: driver.bundle.id.clone(),
        ..Default::default()
    };
    driver
        .sandbox
        .call::<PingResponse>("PingSandbox", &request)
        .unwrap();
}

/// A container joins the shim: no `start`, a Create on the same connection. Gives the container's bundle.
#[track_caller]
fn start_container_of_pod<'a>(driver: &Driver<'_>, daemon: &'a Daemon, pid: i32) -> Bundle<'a> {
    let bundle = Bundle::new(daemon, "joined");
    let mut joined = bundle.plain_spec(&["sh", "-c", "cat /etc/hostname; sleep 3600"]);
    joined["mounts"]
        .as_array_mut()
        .unwrap()
        .push(serde_json::json!(
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]}
        ));
    for (index, kind) in [(1, "ipc"), (2, "uts"), (4, "net")] {
        joined["linux"]["namespaces"][index]["path"] = format!("/proc/{pid}/ns/{kind}").into();
    }
    joined["hostname"] = Value::Null;
    let bundle = bundle.write_spec(&joined);
    let create = CreateTaskRequest {
        id: bundle.id.clone(),
        bundle: bundle.path.display().to_string(),
        ..Default::default()
    };
    let created: CreateTaskResponse = driver.task.call("Create", &create).unwrap();
    driver.task.start(&bundle.id, "").unwrap();
    let inside = i32::try_from(created.pid).unwrap();
    for kind in ["net", "ipc", "uts"] {
        assert_eq!(namespace(inside, kind), namespace(pid, kind), "{kind}");
    }
    assert_eq!(
        fs::read_to_string(format!("/proc/{inside}/root/etc/hostname")).unwrap(),
        "pod23\n",
        "the pod's files"
    );
    bundle
}

#[track_caller]
fn assert_metrics_of_the_pod(driver: &Driver<'_>) {
    let request = SandboxMetricsRequest {
        sandbox_id: driver.bundle.id.clone(),
        ..Default::default()
    };
    let metrics: SandboxMetricsResponse = driver.sandbox.call("SandboxMetrics", &request).unwrap();
    assert!(
        metrics
            .metrics
            .data
            .type_url
            .starts_with("io.containerd.cgroups."),
        "{metrics}"
    );
    assert!(
        metrics.metrics.data.value.len() > 20,
        "the pod's numbers: {metrics}"
    );
}

/// Kills and deletes a container. containerd 2.3 calls Shutdown after each deletion; a shim with a sandbox goes on.
#[track_caller]
fn delete_container_of_pod(driver: &Driver<'_>, id: &str) {
    driver.task.kill(id, "", 9).unwrap();
    assert_eq!(driver.task.wait(id, "").unwrap(), 137);
    driver.task.delete(id, "").unwrap();
    let shutdown = ShutdownRequest {
        id: id.to_owned(),
        ..Default::default()
    };
    driver.task.call::<Empty>("Shutdown", &shutdown).unwrap();
    assert_eq!(
        driver.status().unwrap().0.state,
        "SANDBOX_READY",
        "Shutdown is ignored while the sandbox lives"
    );
}

/// `StopSandbox`, twice, with `WaitSandbox` and `SandboxStatus` afterwards.
#[track_caller]
fn stop_sandbox(driver: &Driver<'_>) {
    driver.stop().unwrap();
    driver.stop().unwrap();
    assert_eq!(driver.wait().unwrap().exit_status, 137);
    let (status, _) = driver.status().unwrap();
    assert_eq!(status.state, "SANDBOX_NOTREADY");
    assert!(status.exited_at.is_some());
}

/// A Delete that is faster than the deletion of the shutdown leaves nothing to delete, which is no failure: the shim would
/// stay.
#[test]
fn a_shutdown_and_a_delete_at_once() {
    ours_only!("the stock shim has no Sandbox API");
    let daemon = daemon();
    let network = Network::make(&daemon, &["--net"]);
    for round in 0..3 {
        let name = format!("both{round}");
        let driver = Driver::start(&daemon, &name);
        driver
            .create(&config(&name, &daemon), &network.path())
            .unwrap();
        driver.start_sandbox();
        driver.shut_down_with_a_delete();
    }
    drop(network);
    daemon.end();
}

#[test]
fn a_pod_in_the_nodes_network() {
    ours_only!("the stock shim has no Sandbox API");
    let daemon = daemon();
    let driver = Driver::start(&daemon, "hostnet23");
    let mut host = PodSpec::new("hostnet23").host_network().config;
    host.linux.as_mut().unwrap().cgroup_parent = daemon.names.cgroup_parent();
    driver.create(&host, "").unwrap();
    let (started, spec) = driver.start_sandbox();
    let pid = i32::try_from(started.pid).unwrap();
    for kind in ["net", "uts"] {
        assert_eq!(
            namespace(pid, kind),
            namespace(this_process(), kind),
            "{kind}"
        );
    }
    assert_ne!(namespace(pid, "ipc"), namespace(this_process(), "ipc"));
    let kinds: Vec<&str> = spec["linux"]["namespaces"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|namespace| namespace["type"].as_str())
        .collect();
    assert_eq!(
        kinds,
        ["mount", "ipc", "pid"],
        "the missing ones are the node's"
    );
    driver.stop().unwrap();
    driver.shut_down();
    daemon.end();
}

#[test]
fn a_pod_in_a_user_namespace_that_owns_its_network() {
    ours_only!("the stock shim has no Sandbox API");
    let daemon = daemon();
    let network = Network::make(&daemon, &["--user", "--net"]);
    let owner = namespace(network.holder.id().cast_signed(), "user");
    let driver = Driver::start(&daemon, "user23");
    let mut user = config("user23", &daemon);
    let mapping = api::IdMapping {
        host_id: 300_000,
        container_id: 0,
        length: 65536,
    };
    let options = user
        .linux
        .as_mut()
        .unwrap()
        .security_context
        .as_mut()
        .unwrap();
    options.namespace_options.as_mut().unwrap().userns_options = Some(api::UserNamespace {
        mode: api::NamespaceMode::Pod.into(),
        uids: vec![mapping],
        gids: vec![mapping],
    });
    driver.create(&user, &network.path()).unwrap();
    let (started, spec) = driver.start_sandbox();
    let pid = i32::try_from(started.pid).unwrap();
    assert_eq!(
        namespace(pid, "user"),
        owner,
        "the owner of the network namespace"
    );
    assert_eq!(
        namespace(pid, "net"),
        fs::metadata(&network.path).unwrap().ino()
    );
    assert_eq!(spec["linux"]["uidMappings"][0]["hostID"], 300_000);
    assert_eq!(driver.status().unwrap().1["pause"]["holder"], "process");
    driver.stop().unwrap();
    driver.shut_down();
    drop(network);
    daemon.end();
}

#[test]
fn a_sandbox_that_cannot_be_made_says_why_and_leaves_nothing() {
    ours_only!("the stock shim has no Sandbox API");
    let daemon = daemon();
    let driver = Driver::start(&daemon, "refused23");
    let (answer, text) = refusal(driver.create_with("runtime.v1.Other", vec![], ""));
    assert_eq!(answer, Code::INVALID_ARGUMENT);
    assert!(
        text.contains("runtime.v1.Other") && text.contains(CONFIG),
        "{text}"
    );
    let (answer, text) = refusal(driver.create_with(CONFIG, vec![0xff; 9], ""));
    assert_eq!(answer, Code::INVALID_ARGUMENT);
    assert!(text.contains("decode"), "{text}");
    let (answer, text) = refusal(driver.create(&config("refused23", &daemon), "/nowhere/netns"));
    assert_eq!(answer, Code::NOT_FOUND);
    assert!(text.contains("/nowhere/netns"), "{text}");
    assert!(
        !driver.bundle.path.join("work/files").exists() && !driver.bundle.path.join("shm").exists(),
        "the pod's files stay"
    );
    assert_eq!(code(&driver.status()), Code::NOT_FOUND);
    assert_eq!(code(&driver.stop()), Code::NOT_FOUND);
    // After a failed CreateSandbox containerd calls ShutdownSandbox.
    driver.shut_down();
    daemon.end();
}

#[test]
fn a_sandbox_that_nobody_starts_ends_with_its_shim() {
    ours_only!("the stock shim has no Sandbox API");
    let daemon = daemon();
    let [never, started, patient] =
        [("never", "3"), ("started", "3"), ("patient", "0")].map(|(id, seconds)| {
            let driver =
                Driver::start_with(&daemon, id, &format!("sandbox_start_timeout = {seconds}"));
            let mut host = PodSpec::new(id).host_network().config;
            host.linux.as_mut().unwrap().cgroup_parent = daemon.names.cgroup_parent();
            driver.create(&host, "").unwrap();
            driver
        });
    let (pid, _) = started.start_sandbox();
    let shim = never.shim();
    let began = std::time::Instant::now();
    wait_until_gone(shim);
    assert!(
        began.elapsed() > Duration::from_secs(1),
        "not at once: {:?}",
        began.elapsed()
    );
    // What is left is what containerd has made, and removes with `delete`.
    assert!(!never.socket.exists());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let bundle = never.bundle.path.display().to_string();
    assert!(!mounts.contains(&bundle), "{mounts}");
    assert!(!never.bundle.path.join("work/files").exists());
    let deleted = never.bundle.delete();
    assert!(deleted.status.success(), "{}", deleted.text());
    drop(never);
    // The others were made at the same time.
    eventually(Duration::from_secs(10), || {
        ok_if(began.elapsed() > Duration::from_secs(4), || {
            "too early".to_owned()
        })
    });
    let (status, _) = started.status().unwrap();
    assert_eq!(
        (status.state.as_str(), status.pid),
        ("SANDBOX_READY", pid.pid)
    );
    let (_, info) = patient.status().unwrap();
    assert_eq!(
        info["pause"]["holder"], "thread",
        "still there, and may still be started"
    );
    patient.start_sandbox();
    for driver in [started, patient] {
        driver.stop().unwrap();
        driver.shut_down();
    }
    daemon.end();
}

#[test]
fn a_killed_shim_leaves_nothing_of_the_pod() {
    ours_only!("the stock shim has no Sandbox API");
    let daemon = daemon();
    let network = Network::make(&daemon, &["--net"]);
    let driver = Driver::start(&daemon, "killed23");
    driver
        .create(&config("killed23", &daemon), &network.path())
        .unwrap();
    driver.start_sandbox();
    let shim = driver.shim();
    shim_tests::proc::kill(shim, Signal::KILL);
    wait_until_gone(shim);
    // containerd runs `delete` for the sandbox only, not for its containers.
    let deleted = driver.bundle.delete();
    assert!(deleted.status.success(), "{}", deleted.text());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(
        !mounts.contains(&driver.bundle.path.display().to_string()),
        "{mounts}"
    );
    assert!(!driver.socket.exists());
    drop(driver);
    drop(network);
    daemon.end();
}
