//! The same pod on this shim and on the stock shim, in turn, with medians.
//!
//! The CRI calls are made here, because those of the harness look at all processes in between.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::time::{Duration, Instant};

use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{self as api};
use shim_tests::proc::{self, Process};
use shim_tests::slot::text;
use shim_tests::until::so;
use shim_tests::{Daemon, PodSpec, eventually, image, leaks};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

use crate::node::{self, OURS, PAUSELESS, STOCK};
use crate::{CLIENT, screen};

const ROUNDS: usize = 7;

/// What one pod took.
struct Round {
    /// Milliseconds until the sandbox, until both containers, until all is stopped, and for all to go away.
    sandbox: f64,
    ready: f64,
    stopped: f64,
    gone: f64,
    shim: Memory,
    pause: Memory,
    processes: usize,
    threads: usize,
}

/// Of one or more processes, in kB.
#[derive(Default)]
struct Memory {
    private: u64,
    pss: u64,
}

/// Measures, and shows the table. The last column is the stock shim's.
pub(crate) fn run(daemon: &Daemon) {
    // One more pod of each kind stays all the while, as on a node with many pods: what shims share is shared.
    let mut columns = vec![Column::new("this shim", OURS)];
    if node::has_pauseless(daemon.version) {
        columns.push(Column::new("Sandbox API", PAUSELESS));
    }
    columns.push(Column::new("stock shim", STOCK));
    for column in &columns {
        let pod = PodSpec::new(&format!("neighbour-{}", column.handler))
            .handler(column.handler)
            .run(daemon);
        pod.sleeper("app");
    }
    let cri = Calls::new(daemon);
    for round in 0..ROUNDS {
        // None is always the first.
        columns.rotate_left(1);
        for column in &mut columns {
            column.rounds.push(cri.round(daemon, column.handler, round));
        }
    }
    columns.sort_by_key(|column| column.place);
    show(daemon, &columns);
}

/// The pods of one handler.
struct Column {
    name: &'static str,
    handler: &'static str,
    place: usize,
    rounds: Vec<Round>,
}

impl Column {
    fn new(name: &'static str, handler: &'static str) -> Self {
        let place = [OURS, PAUSELESS, STOCK]
            .iter()
            .position(|&one| one == handler);
        Self {
            name,
            handler,
            place: place.unwrap(),
            rounds: Vec::new(),
        }
    }
}

fn show(daemon: &Daemon, columns: &[Column]) {
    let Some((stock, ours)) = columns.split_last() else {
        return;
    };
    let mut head = vec![String::new()];
    head.extend(columns.iter().map(|column| column.name.to_owned()));
    head.extend(ours.iter().map(|column| format!("{} / stock", column.name)));
    let mut rows = vec![head];
    let mut row = |what: &str, unit: &str, of: &dyn Fn(&Round) -> f64| {
        let values = |column: &Column| -> Spread { column.rounds.iter().map(of).collect() };
        let other = values(stock);
        let mut cells = vec![what.to_owned()];
        cells.extend(columns.iter().map(|column| values(column).shown(unit)));
        cells.extend(ours.iter().map(|column| {
            let this = values(column);
            if this.median > 0.0 && other.median > 0.0 {
                format!("{:.2}", this.median / other.median)
            } else {
                String::new()
            }
        }));
        rows.push(cells);
    };
    row("sandbox ready (RunPodSandbox)", "ms", &|round| {
        round.sandbox
    });
    row("pod ready (and two containers)", "ms", &|round| round.ready);
    row("pod stopped (StopPodSandbox)", "ms", &|round| round.stopped);
    row("pod stopped and removed", "ms", &|round| round.gone);
    row("processes beside the apps", "", &|round| {
        count(round.processes)
    });
    row("threads of the shim", "", &|round| count(round.threads));
    row("private memory, shim", "kB", &|round| {
        kb(round.shim.private)
    });
    row("private memory, pause", "kB", &|round| {
        kb(round.pause.private)
    });
    row("private memory, both", "kB", &|round| {
        kb(round.shim.private + round.pause.private)
    });
    row("PSS, both", "kB", &|round| {
        kb(round.shim.pss + round.pause.pss)
    });
    screen::table(&rows);
    screen::line("");
    screen::text(&format!(
        "Medians of {ROUNDS} pods each, made in turn; in brackets the least and the most. Memory is that of all \
         processes of the pod but the apps, half a second after the pod was ready, while one more pod of each kind \
         was running; in PSS, memory shared by n processes counts as an nth. The stock shim is the one of this \
         containerd; its pause image is the tiny one of `make pause-image`, because none is pulled."
    ));
    if node::is_debug_build(&daemon.directory()) {
        screen::text(
            "This shim is a DEBUG build: its figures say nothing. `make demo` takes the release build.",
        );
    }
    let noise = columns.iter().map(noise).fold(1.0, f64::max);
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load.split(' ').next().unwrap_or_default().to_owned();
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let loud = if noise > 1.5 {
        ": a noisy machine, look at the ratios only"
    } else {
        ""
    };
    screen::text(&format!(
        "{processors} processors, load {load}; the slowest pod took {noise:.1} times the fastest{loud}."
    ));
}

/// How much one and the same thing differed from pod to pod.
fn noise(column: &Column) -> f64 {
    let ready: Spread = column.rounds.iter().map(|round| round.ready).collect();
    ready.most / ready.least
}

/// Figures of many pods.
struct Spread {
    least: f64,
    median: f64,
    most: f64,
}

impl FromIterator<f64> for Spread {
    fn from_iter<I: IntoIterator<Item = f64>>(values: I) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        Self {
            least: values[0],
            median: values[values.len() / 2],
            most: values[values.len() - 1],
        }
    }
}

impl Spread {
    fn shown(&self, unit: &str) -> String {
        if self.most == 0.0 {
            return "none".to_owned();
        }
        let mut shown = format!("{:.0} {unit}", self.median);
        if self.least.round() < self.most.round() {
            write!(shown, " ({:.0}–{:.0})", self.least, self.most).unwrap();
        }
        shown
    }
}

fn count(number: usize) -> f64 {
    f64::from(u32::try_from(number).unwrap())
}

fn kb(number: u64) -> f64 {
    f64::from(u32::try_from(number).unwrap())
}

/// The runtime service, with nothing in between.
struct Calls {
    runtime: Runtime,
    channel: Channel,
}

/// Calls one method of the runtime service by name.
macro_rules! call {
    ($calls:expr, $method:ident, $request:expr) => {{
        let calls = $calls;
        let request = $request;
        let mut client = RuntimeServiceClient::new(calls.channel.clone());
        calls.runtime.block_on(async move {
            let limit = Duration::from_secs(30);
            match tokio::time::timeout(limit, client.$method(request)).await {
                Ok(Ok(response)) => response.into_inner(),
                Ok(Err(status)) => panic!("{}: {}", stringify!($method), status.message()),
                Err(_) => panic!("{}: no answer within {limit:?}", stringify!($method)),
            }
        })
    }};
}

impl Calls {
    fn new(daemon: &Daemon) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let address = format!("unix://{}", leaks::grpc_address(&daemon.names));
        let channel = {
            let _inside = runtime.enter();
            Endpoint::from_shared(address).unwrap().connect_lazy()
        };
        Self { runtime, channel }
    }

    fn round(&self, daemon: &Daemon, handler: &str, round: usize) -> Round {
        let before: BTreeSet<i32> = daemon.processes().iter().map(|one| one.pid).collect();
        let mut pod = PodSpec::new(&format!("round{round}-{handler}")).config;
        let logs = daemon
            .directory()
            .join("logs")
            .join(format!("round{round}-{handler}"));
        fs::create_dir_all(&logs).unwrap();
        pod.log_directory = text(&logs);
        pod.linux.as_mut().unwrap().cgroup_parent = daemon.names.cgroup_parent();

        let begin = Instant::now();
        let request = api::RunPodSandboxRequest {
            config: Some(pod.clone()),
            runtime_handler: handler.to_owned(),
        };
        let id = call!(self, run_pod_sandbox, request).pod_sandbox_id;
        let sandbox = milliseconds(begin);
        let apps = [
            self.container(&id, &pod, "nginx", image::NGINX, &[]),
            self.container(&id, &pod, "client", image::BUSYBOX, &["sh", "-c", CLIENT]),
        ];
        let ready = milliseconds(begin);

        daemon.look();
        std::thread::sleep(Duration::from_millis(500));
        let apps: BTreeSet<i32> = apps.iter().map(|app| self.pid(app)).collect();
        let others = beside_the_apps(daemon, &before, &apps);
        let (shim, pause): (Vec<&Process>, Vec<&Process>) = others
            .iter()
            .partition(|process| process.command_line().contains("containerd-shim-"));
        let result = (
            Memory::of(&shim),
            Memory::of(&pause),
            shim.iter().map(|shim| proc::threads(shim.pid)).sum(),
        );

        let begin = Instant::now();
        let pod_sandbox_id = id.clone();
        call!(
            self,
            stop_pod_sandbox,
            api::StopPodSandboxRequest { pod_sandbox_id }
        );
        let stopped = milliseconds(begin);
        call!(
            self,
            remove_pod_sandbox,
            api::RemovePodSandboxRequest { pod_sandbox_id: id }
        );
        Round {
            sandbox,
            ready,
            stopped,
            gone: milliseconds(begin),
            shim: result.0,
            pause: result.1,
            threads: result.2,
            processes: others.len(),
        }
    }

    fn container(
        &self,
        pod: &str,
        of: &api::PodSandboxConfig,
        name: &str,
        image: &str,
        command: &[&str],
    ) -> String {
        let security = of
            .linux
            .as_ref()
            .unwrap()
            .security_context
            .as_ref()
            .unwrap();
        let config = api::ContainerConfig {
            metadata: Some(api::ContainerMetadata {
                name: name.to_owned(),
                attempt: 0,
            }),
            image: Some(api::ImageSpec {
                image: image.to_owned(),
                ..Default::default()
            }),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            log_path: format!("{name}.log"),
            linux: Some(api::LinuxContainerConfig {
                security_context: Some(api::LinuxContainerSecurityContext {
                    namespace_options: security.namespace_options.clone(),
                    ..Default::default()
                }),
                resources: Some(api::LinuxContainerResources::default()),
            }),
            ..Default::default()
        };
        let request = api::CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(config),
            sandbox_config: Some(of.clone()),
        };
        let container_id = call!(self, create_container, request).container_id;
        let id = container_id.clone();
        call!(
            self,
            start_container,
            api::StartContainerRequest { container_id }
        );
        id
    }

    fn pid(&self, container: &str) -> i32 {
        let request = api::ContainerStatusRequest {
            container_id: container.to_owned(),
            verbose: true,
        };
        let status = call!(self, container_status, request);
        let info = status.info.get("info").cloned().unwrap_or_default();
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        let pid = info["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        pid.unwrap_or_else(|| panic!("no pid in {info}"))
    }
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}

/// What the pod brought that is neither an app nor was there before.
fn beside_the_apps(daemon: &Daemon, before: &BTreeSet<i32>, apps: &BTreeSet<i32>) -> Vec<Process> {
    let is_runc = |process: &Process| process.name.starts_with("runc");
    eventually(Duration::from_secs(5), || {
        let all = daemon.processes();
        let of_apps: BTreeSet<i32> = proc::with_descendants(apps, &all)
            .iter()
            .map(|one| one.pid)
            .collect();
        let others: Vec<Process> = all
            .into_iter()
            .filter(|one| !of_apps.contains(&one.pid) && !before.contains(&one.pid))
            .collect();
        // A runc that just ended may still be there for a moment.
        so(!others.iter().any(is_runc), || {
            "runc does not end".to_owned()
        })
        .map(|()| others)
    })
}

impl Memory {
    fn of(processes: &[&Process]) -> Self {
        let mut sum = Self::default();
        for process in processes {
            sum.private += proc::private_kb(process.pid);
            sum.pss += pss_kb(process.pid);
        }
        sum
    }
}

/// The memory of a process in kB, where what it shares with n others counts as a share of n + 1.
fn pss_kb(pid: i32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    rollup
        .lines()
        .find_map(|line| line.strip_prefix("Pss:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or_default()
}
