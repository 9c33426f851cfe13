//! containerd is replaced by another version, or our binary by another one, while pods run.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test reports by failing"
)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_shim_protos::protobuf::Message;
use rustix::process::Signal;
use serde_json::{Value, json};
use shim_tests::calls::{Shim, runtime_options};
use shim_tests::daemon::Handler;
use shim_tests::proc::{Process, kill, namespace};
use shim_tests::raw::Bundle;
use shim_tests::slot::text;
use shim_tests::until::ok_if;
use shim_tests::{
    Container, Daemon, Options, Pod, PodSpec, ShimUnderTest, Version, eventually, in_every_mode,
    lab, leaks, ours_only,
};

/// The node's user id of root in a pod with a user namespace.
const ROOT: u32 = 300_000;

/// containerd 2.1, with pods made through the Sandbox API.
const SANDBOX_API: Version = Version::V2_1.through_the_sandbox_api();

/// Prints numbered lines for ever.
const COUNT: &str = "i=0; while true; do i=$((i+1)); echo line $i; sleep 0.1; done";

/// A containerd with a handler for pods that a process holds, and one for pods with a user namespace.
fn daemon(version: Version) -> Daemon {
    let runc = lab::newer_runtime("runc");
    if version.sandbox_api() {
        // This version has no way to name a runc, and no handler of these pods can have options.
        let daemon = Daemon::start(version);
        std::os::unix::fs::symlink(runc, daemon.directory().join("bin/runc")).unwrap();
        return daemon;
    }
    let shim = ShimUnderTest::get();
    let process = Handler {
        name: "process".to_owned(),
        runtime_type: shim.runtime_type().to_owned(),
        runtime_path: None,
        options: match shim {
            ShimUnderTest::Pause => "holder = 'process'".to_owned(),
            ShimUnderTest::Runc => String::new(),
        },
        sandbox_api: false,
    };
    let runtime = format!("BinaryName = '{}'", text(&runc));
    let userns = Handler::of_the_stock_type("userns", version, &runtime);
    Daemon::with(
        version,
        &Options {
            handlers: vec![process, userns],
            ..Options::default()
        },
    )
}

/// A container that counts, and what must stay as it is while containerd is replaced.
struct Counter<'a> {
    container: Container<'a>,
    pid: i32,
    sandbox: i32,
    /// None where containerd forgets the address: 1.7 that of its pods with a user namespace.
    ip: Option<String>,
    /// Whether the pod has a user namespace.
    mapped: bool,
    /// Lines that containerd may have lost: it had read them, and not written them yet.
    lost: usize,
}

impl<'a> Counter<'a> {
    fn start(daemon: &Daemon, pod: &Pod<'a>, name: &str, tty: bool) -> Self {
        let mut spec = pod.container(name).shell(COUNT);
        if tty {
            spec = spec.tty();
        }
        let container = spec.start();
        let mapped =
            namespace(pod.pid(), "user") != namespace(std::process::id().cast_signed(), "user");
        let forgotten = mapped && daemon.version() == Version::V1_7;
        Self {
            pid: container.pid(),
            sandbox: pod.pid(),
            ip: (!forgotten).then(|| pod.ip()),
            mapped,
            container,
            lost: 0,
        }
    }

    fn pod(&self) -> &Pod<'a> {
        &self.container.pod
    }

    fn numbers(&self) -> Vec<usize> {
        let lines = self.container.log_lines("stdout");
        let number = |line: &String| line.trim().strip_prefix("line ").unwrap().parse().unwrap();
        lines.iter().map(number).collect()
    }

    /// The container and its pod are what they were, the log goes on, an exec works.
    #[track_caller]
    fn assert_goes_on(&mut self) {
        let (pod, container) = (self.pod(), &self.container);
        assert!(pod.ready() && container.running(), "{}", container.id);
        assert_eq!((container.pid(), pod.pid()), (self.pid, self.sandbox));
        if let Some(ip) = &self.ip {
            assert_eq!(pod.ip(), *ip);
        }
        assert_eq!(container.output(&["echo", "exec works"]), "exec works");
        self.lost += 1;
        let seen = self.numbers().len();
        eventually(Duration::from_secs(10), || {
            let now = self.numbers().len();
            ok_if(now > seen + 3, || format!("{seen} lines, then {now}"))
        });
        let numbers = self.numbers();
        assert!(numbers.is_sorted_by(|one, next| one < next), "{numbers:?}");
        let lost = numbers.last().unwrap() - numbers.len();
        assert!(lost <= self.lost, "{lost} lines are lost: {numbers:?}");
    }
}

/// A node whose containerd is replaced.
struct Node<'a> {
    daemon: &'a Daemon,
    counters: Vec<Counter<'a>>,
    /// The folder that releases the containers of [`Self::leavers`].
    go: PathBuf,
    steps: u32,
}

impl<'a> Node<'a> {
    /// A pod of each kind that this version has.
    fn new(daemon: &'a Daemon) -> Self {
        let go = daemon.directory().join("go");
        fs::create_dir(&go).unwrap();
        let mut node = Self {
            daemon,
            counters: Vec::new(),
            go,
            steps: 0,
        };
        node.run(PodSpec::new("plain"));
        let plain = node.counters[0].pod().clone();
        node.counters
            .push(Counter::start(daemon, &plain, "terminal", true));
        node.run(PodSpec::new("shared").shared_processes());
        if daemon.version() != SANDBOX_API {
            // containerd 2.1 crashes on such a pod of the Sandbox API.
            node.run(PodSpec::new("host").host_network());
            node.run(PodSpec::new("process").handler("process"));
        }
        node.run_mapped();
        node
    }

    fn run(&mut self, spec: PodSpec) {
        let pod = spec.run(self.daemon);
        self.counters
            .push(Counter::start(self.daemon, &pod, "counter", false));
    }

    /// A pod with a user namespace, where containerd knows the request.
    fn run_mapped(&mut self) {
        let spec = PodSpec::new(&format!("mapped{}", self.steps)).user_namespace(ROOT);
        let version = self.daemon.version();
        if version.sandbox_api() {
            self.run(spec);
        } else if version >= Version::V1_7 {
            self.run(spec.handler("userns"));
        }
    }

    /// The pods that this containerd can give a further container. 1.6 does not know user namespaces.
    fn pods(&self) -> Vec<Pod<'a>> {
        let old = self.daemon.version() == Version::V1_6;
        let usable = self.counters.iter().filter(|one| !(old && one.mapped));
        let mut pods: Vec<Pod<'a>> = usable.map(|one| one.pod().clone()).collect();
        pods.dedup_by(|one, next| one.id == next.id);
        pods
    }

    /// The number of all pods.
    fn all_pods(&self) -> usize {
        let pods: BTreeSet<&str> = self
            .counters
            .iter()
            .map(|one| one.pod().id.as_str())
            .collect();
        pods.len()
    }

    /// In each pod a container that ends while containerd is away.
    fn leavers(&self) -> Vec<(Container<'a>, Process)> {
        let script = format!(
            "while [ ! -e /go/{} ]; do sleep 0.05; done; exit 42",
            self.steps
        );
        let start = |pod: &Pod<'a>| {
            let spec = pod.container(&format!("leaver{}", self.steps));
            let leaver = spec.mount(&text(&self.go), "/go").shell(&script).start();
            let init = Process::of(leaver.pid()).unwrap();
            (leaver, init)
        };
        self.pods().iter().map(start).collect()
    }

    /// Replaces containerd by another version. Some containers end meanwhile; all else goes on, and can be used.
    #[track_caller]
    fn go_on_as(&mut self, version: Version) {
        let leavers = self.leavers();
        self.daemon.stop();
        fs::write(self.go.join(self.steps.to_string()), "").unwrap();
        eventually(Duration::from_secs(5), || {
            let left = leavers.iter().find(|(_, init)| init.alive());
            ok_if(left.is_none(), || {
                format!(
                    "still runs: {left:?}",
                    left = left.map(|one| one.1.describe())
                )
            })
        });
        self.daemon.start_as(version);
        self.steps += 1;

        for counter in &mut self.counters {
            counter.assert_goes_on();
        }
        for (leaver, _) in &leavers {
            let code = leaver.wait();
            // Of an exit while containerd 1.7 and 2.1 are away, the stock shim's code is lost.
            let lost = ShimUnderTest::get() == ShimUnderTest::Runc && code == 255;
            assert!(code == 42 || lost, "{}: {code}", leaver.id);
        }
        assert_eq!(self.daemon.cri().pods().len(), self.all_pods());
        for pod in self.pods() {
            self.assert_takes_a_later_container(&pod);
        }
        self.assert_nobody_becomes_root_of_the_node();
        let pod = PodSpec::new(&format!("new{}", self.steps)).run(self.daemon);
        self.counters
            .push(Counter::start(self.daemon, &pod, "counter", false));
        self.run_mapped();
    }

    /// 1.6 asks for a container in the node's user namespace, in a pod that has one of its own.
    #[track_caller]
    fn assert_nobody_becomes_root_of_the_node(&self) {
        let ours = ShimUnderTest::get() == ShimUnderTest::Pause;
        if self.daemon.version() >= Version::V1_7 || !ours {
            return;
        }
        for one in self.counters.iter().filter(|one| one.mapped) {
            let root = one.pod().container(&format!("root{}", self.steps));
            let refused = root.command(&["sleep", "3600"]).try_start().err();
            let words = refused.expect("the shim refuses the container").0;
            assert!(words.contains("has a user namespace"), "{words}");
        }
    }

    #[track_caller]
    fn assert_takes_a_later_container(&self, pod: &Pod<'a>) {
        let later = pod.sleeper(&format!("later{}", self.steps));
        for kind in ["net", "ipc", "uts", "user"] {
            assert_eq!(
                namespace(later.pid(), kind),
                namespace(pod.pid(), kind),
                "{kind}"
            );
        }
        assert_eq!(later.exec(&["sh", "-c", "exit 7"]).code, 7);
        later.stop(0);
        assert_eq!(later.wait(), 137);
        later.remove();
    }
}

fn go_through(versions: &[Version]) {
    let daemon = daemon(versions[0]);
    let mut node = Node::new(&daemon);
    for &version in &versions[1..] {
        node.go_on_as(version);
    }
    drop(node);
    daemon.end();
}

#[test]
fn up_1_6_to_1_7_to_2_1() {
    go_through(&[Version::V1_6, Version::V1_7, Version::V2_1]);
}

#[test]
fn down_2_1_to_1_7_and_up_again() {
    go_through(&[Version::V2_1, Version::V1_7, Version::V2_1]);
}

#[test]
fn down_2_1_to_1_6() {
    go_through(&[Version::V2_1, Version::V1_6]);
}

#[test]
fn down_1_7_to_1_6() {
    go_through(&[Version::V1_7, Version::V1_6]);
}

#[test]
fn restart_v2_1_sandbox_api() {
    go_through(&[SANDBOX_API, SANDBOX_API]);
}

/// containerd 1.x does not know pods of the Sandbox API: CRI lists none, their containers run on, and a 2.1 that comes
/// back finds all again.
fn a_pod_of_the_sandbox_api_goes_down_and_up_again(below: Version) {
    ours_only!("no Sandbox API");
    let daemon = daemon(SANDBOX_API);
    let pod = PodSpec::new("hidden").run(&daemon);
    let mut counter = Counter::start(&daemon, &pod, "counter", false);
    daemon.stop();
    daemon.start_as(below);
    assert!(daemon.cri().pods().is_empty());
    assert!(counter.container.running());
    assert_eq!(counter.container.output(&["hostname"]), "hidden");
    counter.lost += 1;
    daemon.stop();
    daemon.start_as(SANDBOX_API);
    counter.assert_goes_on();
    assert_eq!(pod.sleeper("later").output(&["hostname"]), "hidden");
    daemon.end();
}

#[test]
fn down_to_1_7_and_up_v2_1_sandbox_api() {
    a_pod_of_the_sandbox_api_goes_down_and_up_again(Version::V1_7);
}

#[test]
fn down_to_1_6_and_up_v2_1_sandbox_api() {
    a_pod_of_the_sandbox_api_goes_down_and_up_again(Version::V1_6);
}

/// What `/proc` says of the program of a process that has been replaced since.
const REPLACED: &str = " (deleted)";

fn program_is_replaced(shim: &Process) -> bool {
    let program = fs::read_link(format!("/proc/{}/exe", shim.pid)).unwrap();
    text(&program).ends_with(REPLACED)
}

in_every_mode! {
    fn our_binary_is_replaced_under_a_running_pod(version) {
        let daemon = Daemon::start(version);
        daemon.replace_shim();
        let pod = PodSpec::new("older").shared_processes().run(&daemon);
        let mut counter = Counter::start(&daemon, &pod, "counter", false);
        let shim = daemon.shim();
        daemon.replace_shim();
        assert!(program_is_replaced(&shim));

        // containerd 1.6 and 1.7 run the new binary's `start` and `delete` for each container, and find the old shim.
        let later = pod.sleeper("later");
        assert_eq!(namespace(later.pid(), "net"), namespace(pod.pid(), "net"));
        later.stop(0);
        assert_eq!(later.wait(), 137);
        later.remove();
        daemon.stop();
        daemon.start_as(version);
        counter.assert_goes_on();
        assert_eq!(daemon.shim().pid, shim.pid);

        // A pod of the new binary, beside; and the new binary's `delete` takes down the old one's pod.
        let newer = PodSpec::new("newer").run(&daemon);
        let neighbour = newer.sleeper("neighbour");
        assert!(daemon.shims().iter().any(|shim| !program_is_replaced(shim)));
        let last = pod.sleeper("last");
        daemon.look();
        kill(shim.pid, Signal::KILL);
        pod.wait_until_not_ready();
        eventually(Duration::from_secs(5), || {
            let mut left = daemon.left().into_iter();
            // CRI keeps its own files until the pod is removed.
            let left = left.find(|line| line.contains(&last.id) && !line.contains("/io.containerd.grpc.v1.cri/"));
            ok_if(left.is_none(), || format!("left behind: {left:?}"))
        });
        assert!(neighbour.running());
        daemon.end();
    }
}

/// The golden files of each release, the latest last: `shim/src/runtime/bundle/golden/RELEASE`.
fn golden_files() -> Vec<PathBuf> {
    let folder = lab::repository().join("shim/src/runtime/bundle/golden");
    let entries = fs::read_dir(folder).unwrap();
    let mut found: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    found.sort();
    found
}

/// A golden record of this kind, with the paths of a real container or sandbox in the place of its own.
fn record_of(golden: &Path, kind: &str, bundle: &Bundle<'_>, cgroups_path: &str) -> Value {
    let namespace = bundle.namespace();
    let record = fs::read_to_string(golden.join(kind).join("pause.json")).unwrap();
    let record = ["web", "pod1"].iter().fold(record, |record, id| {
        record
            .replace(&format!("/bundles/{id}"), &text(&bundle.path))
            .replace(&format!("/kubepods/pod1/{id}"), cgroups_path)
    });
    let record = record.replace("runc/k8s.io", &format!("runc/{namespace}"));
    serde_json::from_str(&record).unwrap()
}

fn kept(bundle: &Bundle<'_>, name: &str) -> Value {
    serde_json::from_slice(&fs::read(bundle.path.join(name)).unwrap()).unwrap()
}

#[test]
fn a_running_shim_writes_the_latest_golden_record_of_a_sandbox() {
    ours_only!("the stock shim keeps no record");
    let daemon = Daemon::start(Version::V2_1);
    let bundle = Bundle::new(&daemon, "pod1");
    let mut spec = bundle.sandbox_spec("");
    spec["linux"]["namespaces"][4] = json!({"type": "network"});
    let cgroups_path = spec["linux"]["cgroupsPath"].as_str().unwrap().to_owned();
    let bundle = bundle.write_spec(&spec);
    let shim = Shim::connect(&bundle.start(b""));
    bundle.create(&shim).unwrap();
    let golden = golden_files().pop().unwrap();
    let expected = record_of(&golden, "sandbox", &bundle, &cgroups_path);
    assert_eq!(kept(&bundle, "pause.json"), expected);
    shim.start("pod1", "").unwrap();
    shim.kill("pod1", "", 9).unwrap();
    shim.wait("pod1", "").unwrap();
    shim.delete("pod1", "").unwrap();
    bundle.shut_down(&shim);
    drop(bundle);
    daemon.end();
}

#[test]
fn start_writes_the_latest_golden_options_for_the_sandbox_api() {
    ours_only!("the stock shim keeps no options");
    let daemon = Daemon::start(Version::V2_1);
    let bundle = Bundle::empty(&daemon, "pod1");
    let golden = fs::read_to_string(golden_files().pop().unwrap().join("options.json")).unwrap();
    let group = format!("{}/of-shims", daemon.names.cgroup_parent());
    let golden: Value = serde_json::from_str(&golden.replace("/shims", &group)).unwrap();
    let lines: Vec<_> = golden.as_object().unwrap().iter().collect();
    let lines = lines
        .iter()
        .map(|(name, value)| format!("{name} = {value}\n"));
    let options = runtime_options(&lines.collect::<String>());
    let shim = Shim::connect(&bundle.start(&options.write_to_bytes().unwrap()));
    assert_eq!(kept(&bundle, "options.json"), golden);
    bundle.shut_down(&shim);
    drop(bundle);
    leaks::remove_cgroups_of_shims(&daemon.names);
    daemon.end();
}

#[test]
fn delete_takes_down_what_the_record_of_each_release_names() {
    ours_only!("the stock shim keeps no record");
    let daemon = Daemon::start(Version::V2_1);
    for golden in golden_files() {
        let bundle = Bundle::new(&daemon, "golden");
        let spec = bundle.plain_spec(&["sleep", "3600"]);
        let cgroups_path = spec["linux"]["cgroupsPath"].as_str().unwrap().to_owned();
        let bundle = bundle.write_spec(&spec);
        let shim = Shim::connect(&bundle.start(b""));
        let init = Process::of(bundle.create(&shim).unwrap().cast_signed()).unwrap();
        shim.start("golden", "").unwrap();
        daemon.look();
        let process = daemon.shim();
        kill(process.pid, Signal::KILL);
        eventually(Duration::from_secs(5), || {
            ok_if(!process.alive(), || "the shim stays".to_owned())
        });

        // The record of that release in the place of ours, with what a later one may add.
        let place = bundle.path.join("pause.json");
        let ours = kept(&bundle, "pause.json");
        let mut record = record_of(&golden, "container", &bundle, &cgroups_path);
        record["mounts_rootfs"] = ours["mounts_rootfs"].clone();
        if Some(&golden) == golden_files().last() {
            assert_eq!(record, ours, "{}", golden.display());
        }
        record["of a later release"] = true.into();
        record["runc"]["of a later release"] = true.into();
        fs::write(&place, record.to_string()).unwrap();
        let deleted = bundle.delete();
        assert!(deleted.status.success(), "{}", deleted.text());
        eventually(Duration::from_secs(5), || {
            ok_if(!init.alive(), || init.describe())
        });
        drop(bundle);
        daemon.assert_nothing_left();
    }
    daemon.end();
}
