//! The containerd of a measurement, its pods, and the life of one of them.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_cri::v1::PodSandboxConfig;
use rustix::process::{Pid, Signal, kill_process};
use rustix::time::{ClockId, clock_gettime};
use shim_tests::cri::Failure;
use shim_tests::cri_calls::{self, Calls};
use shim_tests::daemon::{Driver, Handler, Network};
use shim_tests::image::{self, PauseImage};
use shim_tests::until::{ok_if, within};
use shim_tests::{Daemon, Options, PodSpec, ShimUnderTest, Version, footprint, lab, proc, screen};

use crate::columns::Shim;
use crate::cpu::Accounting;
use crate::place::Place;

/// The options of our shim where a handler has none.
const OPTIONS: &str = "/etc/containerd-shim-pause-v2/config.toml";

/// A program that ends at once on SIGTERM.
pub(crate) const APP: [&str; 3] = ["sh", "-c", "trap exit TERM; sleep 3600 & wait"];

/// The network of a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CniOrHost {
    /// The node's.
    Host,
    /// Its own, made by CNI.
    Cni(Network),
}

impl CniOrHost {
    /// In the order in which they are measured.
    pub(crate) const ALL: [Self; 3] = [
        Self::Host,
        Self::Cni(Network::Loopback),
        Self::Cni(Network::Bridge),
    ];

    /// Its name on the command line and in the figures.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Host => "host",
            Self::Cni(Network::Loopback) => "loopback",
            Self::Cni(Network::Bridge) => "bridge",
        }
    }

    /// What CNI must be configured for.
    pub(crate) fn cni(self) -> Network {
        match self {
            Self::Host => Network::Loopback,
            Self::Cni(network) => network,
        }
    }
}

/// Where `make bench` installs the published Rust shim.
pub(crate) fn published() -> PathBuf {
    lab::target().join("bench/published/bin/containerd-shim-runc-v2-rs")
}

/// Nanoseconds of the monotonic clock, which is also that of the kernel's process events.
pub(crate) fn now() -> u64 {
    let time = clock_gettime(ClockId::Monotonic);
    time.tv_sec.cast_unsigned() * 1_000_000_000 + time.tv_nsec.cast_unsigned()
}

/// One containerd with a handler for each shim.
pub(crate) struct Node {
    pub(crate) daemon: Daemon,
    pub(crate) calls: Calls,
    pub(crate) accounting: Accounting,
    pods: Cell<usize>,
    /// Pods whose shims stay, with all that they start: not those of the measurement.
    standing: RefCell<BTreeSet<i32>>,
}

/// A pod that runs, with one container.
pub(crate) struct Running {
    pub(crate) id: String,
    pub(crate) app: String,
}

impl Node {
    pub(crate) fn start(place: Place, version: Version, network: Network, shims: &[Shim]) -> Self {
        let mut shims = shims.to_vec();
        if place == Place::Busy && !shims.contains(&Shim::Stock) {
            // The other client's.
            shims.push(Shim::Stock);
        }
        let options = Options {
            handlers: shims.iter().map(|&shim| handler(shim, place)).collect(),
            pause_image: PauseImage::Works,
            debug: false,
            network,
            driver: place.driver(),
            ..Options::default()
        };
        if place != Place::Machine {
            // The node is ours. Through the Sandbox API, options come from this file only.
            fs::create_dir_all("/etc/containerd-shim-pause-v2").unwrap();
            fs::write(OPTIONS, "SystemdCgroup = true\n").unwrap();
        }
        let daemon = Daemon::with(version, &options);
        let bin = daemon.directory().join("bin");
        let mut programs = vec![
            ShimUnderTest::Runc.binary(version),
            published(),
            lab::runc(),
        ];
        if shims.iter().any(|shim| shim.crun()) {
            programs.push(lab::crun());
        }
        for program in programs {
            place_program(&program, &bin);
        }
        let calls = Calls::new(&daemon.names);
        calls
            .connect()
            .unwrap_or_else(|failure| panic!("{failure}"));
        Self {
            accounting: Accounting::of(&daemon),
            daemon,
            calls,
            pods: Cell::new(0),
            standing: RefCell::default(),
        }
    }

    /// The configuration of one more pod.
    pub(crate) fn pod(&self, network: CniOrHost) -> PodSandboxConfig {
        self.pods.set(self.pods.get() + 1);
        let pod = PodSpec::new(&format!("pod{}", self.pods.get()));
        let pod = match network {
            CniOrHost::Host => pod.host_network(),
            CniOrHost::Cni(_) => pod,
        };
        let mut config = cri_calls::pod_config(&self.daemon.names, pod);
        if let Some(linux) = &mut config.linux {
            linux.cgroup_parent = self.daemon.cgroup_parent();
        }
        config
    }

    /// This shim's pod stays while others are measured.
    pub(crate) fn leave_standing(&self, shim: &proc::Process) {
        self.standing.borrow_mut().insert(shim.pid);
    }

    /// Whether another client is at work.
    pub(crate) fn is_busy(&self) -> bool {
        !self.standing.borrow().is_empty()
    }

    /// The processes of the pods that are measured.
    fn processes(&self) -> Vec<proc::Process> {
        let mut all = self.daemon.processes();
        let standing = proc::with_descendants(&self.standing.borrow(), &all);
        all.retain(|one| standing.iter().all(|other| other.pid != one.pid));
        all
    }

    /// A pod with one container, both started.
    pub(crate) fn run(&self, shim: Shim, network: CniOrHost) -> Result<Running, Failure> {
        ready(&self.calls, &self.pod(network), shim)
    }

    /// The shims that are there now.
    pub(crate) fn shims(&self) -> Vec<proc::Process> {
        let mut all = self.processes();
        all.retain(footprint::is_shim);
        all
    }

    /// Waits until no process of any pod is left, and a moment more: what a pod leaves to be done is not to count as the
    /// time of the next one.
    pub(crate) fn settle(&self) -> Result<(), Failure> {
        within(Duration::from_secs(10), || {
            let left = self.processes();
            ok_if(left.is_empty(), || {
                let left: Vec<_> = left.iter().map(proc::Process::describe).collect();
                format!("still there: {}", left.join("; "))
            })
        })
        .map_err(Failure)?;
        std::thread::sleep(Duration::from_millis(300));
        Ok(())
    }

    /// After a failure: removes all pods, by force if need be.
    pub(crate) fn clear(&self) {
        let remove = || {
            for id in self.daemon.cri().pods() {
                let _ = self.calls.stop_pod(&id);
                let _ = self.calls.remove_pod(&id);
            }
        };
        remove();
        if self.settle().is_err() {
            for process in self.processes() {
                // It may end by itself meanwhile.
                let _ = Pid::from_raw(process.pid).map(|pid| kill_process(pid, Signal::KILL));
            }
            remove();
        }
    }

    /// Ends it. What a shim has left behind is said, and removed.
    pub(crate) fn end(self) {
        self.daemon.look();
        self.clear();
        self.accounting.end();
        let left = within(Duration::from_secs(5), || {
            let left = self.daemon.left();
            ok_if(left.is_empty(), || left.join("\n"))
        });
        match left {
            Ok(()) => self.daemon.end(),
            // Dropping it takes everything down.
            Err(left) => screen::note("left behind", &left),
        }
    }
}

/// The handler of a shim in this place.
fn handler(shim: Shim, place: Place) -> Handler {
    let mut options = format!("SystemdCgroup = {}\n", place.driver() == Driver::Systemd);
    if shim.crun() {
        options += "BinaryName = 'crun'\n";
    }
    if shim == Shim::Api {
        options.clear();
    }
    Handler {
        name: shim.name().to_owned(),
        runtime_type: shim.runtime_type().to_owned(),
        runtime_path: None,
        options,
        sandbox_api: shim == Shim::Api,
    }
}

/// Puts a program into the folder that is first in PATH. An OCI runtime gets `no-limits` before it where the node's cgroups
/// have no controllers.
fn place_program(program: &Path, bin: &Path) {
    let place = bin.join(program.file_name().unwrap());
    let controllers = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers");
    let is_runtime = place.ends_with("runc") || place.ends_with("crun");
    if is_runtime && controllers.is_ok_and(|all| !all.contains("memory")) {
        fs::copy(lab::helper("no-limits"), &place).unwrap();
        symlink(program, place.with_extension("real")).unwrap();
    } else {
        symlink(program, place).unwrap();
    }
}

/// A pod with one container, both started, by these calls.
pub(crate) fn ready(
    calls: &Calls,
    config: &PodSandboxConfig,
    shim: Shim,
) -> Result<Running, Failure> {
    let id = calls.run_pod(config, shim.name())?;
    let app = calls.create((&id, config), "app", image::BUSYBOX, &APP, &[])?;
    calls.start(&app)?;
    Ok(Running { id, app })
}

/// Stops and removes a pod.
pub(crate) fn remove(calls: &Calls, pod: &Running) -> Result<(), Failure> {
    calls.stop_pod(&pod.id)?;
    calls.remove_pod(&pod.id)
}

/// The calls in the life of a pod, in their order.
pub(crate) const STEPS: [&str; 7] = [
    "RunPodSandbox",
    "CreateContainer",
    "StartContainer",
    "ExecSync",
    "StopContainer",
    "StopPodSandbox",
    "RemovePodSandbox",
];

/// When a call began and ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Times {
    pub(crate) begin: u64,
    pub(crate) end: u64,
}

impl Times {
    /// Milliseconds until `later` ended.
    pub(crate) fn until(self, later: Self) -> f64 {
        milliseconds(later.end - self.begin)
    }
}

/// Nanoseconds as milliseconds.
pub(crate) fn milliseconds(nanoseconds: u64) -> f64 {
    Duration::from_nanos(nanoseconds).as_secs_f64() * 1000.0
}

/// The whole life of a pod, and when its [`STEPS`] were.
pub(crate) fn life(node: &Node, shim: Shim, network: CniOrHost) -> Result<Vec<Times>, Failure> {
    let calls = &node.calls;
    let config = node.pod(network);
    let mut times = Vec::new();
    let pod = timed(&mut times, || calls.run_pod(&config, shim.name()))?;
    let app = timed(&mut times, || {
        calls.create((&pod, &config), "app", image::BUSYBOX, &APP, &[])
    })?;
    timed(&mut times, || calls.start(&app))?;
    trapped(calls.pid(&app)?)?;
    let code = timed(&mut times, || calls.exec(&app, &["true"]))?;
    if code != 0 {
        return Err(Failure(format!("ExecSync: exit code {code}")));
    }
    timed(&mut times, || calls.stop(&app))?;
    timed(&mut times, || calls.stop_pod(&pod))?;
    timed(&mut times, || calls.remove_pod(&pod))?;
    node.settle()?;
    Ok(times)
}

fn timed<T>(times: &mut Vec<Times>, call: impl FnOnce() -> T) -> T {
    let begin = now();
    let result = call();
    let end = now();
    times.push(Times { begin, end });
    result
}

/// Waits until the app has its trap: it starts its child after that.
fn trapped(app: i32) -> Result<(), Failure> {
    within(Duration::from_secs(5), || {
        ok_if(!proc::children(app).is_empty(), || {
            "the app does not come so far".to_owned()
        })
    })
    .map_err(Failure)
}
