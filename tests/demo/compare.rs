//! The same pod on this shim and on the stock shim, in turn, with medians.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::time::{Duration, Instant};

use shim_tests::cri::Failure;
use shim_tests::cri_calls::{self, Calls};
use shim_tests::footprint::{self, Memory};
use shim_tests::proc::{self, Process};
use shim_tests::spread::Spread;
use shim_tests::{Daemon, PodSpec, image, screen};

use crate::CLIENT;
use crate::node::{self, OURS, PAUSELESS, STOCK};

const ROUNDS: usize = 7;

/// The measurements of one pod.
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

/// Measures, and shows the table. The last column is the stock shim's.
pub(crate) fn run(daemon: &Daemon) {
    // One more pod of each kind stays all the time, as on a node with many pods: so the shims share their pages.
    let mut columns = vec![Column::new("this shim", OURS)];
    if node::has_pauseless(daemon.version()) {
        columns.push(Column::new("Sandbox API", PAUSELESS));
    }
    columns.push(Column::new("stock shim", STOCK));
    for column in &columns {
        let pod = PodSpec::new(&format!("neighbour-{}", column.handler))
            .handler(column.handler)
            .run(daemon);
        pod.sleeper("app");
    }
    let calls = Calls::new(&daemon.names);
    for round in 0..ROUNDS {
        // No column is always the first.
        columns.rotate_left(1);
        for column in &mut columns {
            let taken = self::round(&calls, daemon, column.handler, round);
            column
                .rounds
                .push(taken.unwrap_or_else(|failure| panic!("{failure}")));
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
    rows.extend(
        FIGURES
            .iter()
            .map(|figure| figure.row(columns, stock, ours)),
    );
    screen::table(&rows);
    explain(daemon, columns);
}

/// A row of the table.
struct Figure {
    what: &'static str,
    unit: &'static str,
    of: fn(&Round) -> f64,
}

const fn figure(what: &'static str, unit: &'static str, of: fn(&Round) -> f64) -> Figure {
    Figure { what, unit, of }
}

const FIGURES: &[Figure] = &[
    figure("sandbox ready (RunPodSandbox)", "ms", |round| round.sandbox),
    figure("pod ready (and two containers)", "ms", |round| round.ready),
    figure("pod stopped (StopPodSandbox)", "ms", |round| round.stopped),
    figure("pod stopped and removed", "ms", |round| round.gone),
    figure("processes beside the apps", "", |round| {
        count(round.processes)
    }),
    figure("threads of the shim", "", |round| count(round.threads)),
    figure("private memory, shim", "kB", |round| kb(round.shim.private)),
    figure("private memory, pause", "kB", |round| {
        kb(round.pause.private)
    }),
    figure("private memory, both", "kB", |round| {
        kb(round.shim.private + round.pause.private)
    }),
    figure("PSS, both", "kB", |round| {
        kb(round.shim.pss + round.pause.pss)
    }),
];

impl Figure {
    /// The medians of all columns, and the ratio of each of `ours` to `stock`.
    fn row(&self, columns: &[Column], stock: &Column, ours: &[Column]) -> Vec<String> {
        let values = |column: &Column| -> Spread { column.rounds.iter().map(self.of).collect() };
        let other = values(stock);
        let mut cells = vec![self.what.to_owned()];
        let medians = columns
            .iter()
            .map(|column| shown(&values(column), self.unit));
        cells.extend(medians);
        cells.extend(ours.iter().map(|column| {
            let this = values(column);
            if this.median() > 0.0 && other.median() > 0.0 {
                format!("{:.2}", this.median() / other.median())
            } else {
                String::new()
            }
        }));
        cells
    }
}

/// How the figures were measured, and how far they can be trusted.
fn explain(daemon: &Daemon, columns: &[Column]) {
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

/// The slowest pod's time divided by the fastest pod's.
fn noise(column: &Column) -> f64 {
    let ready: Spread = column.rounds.iter().map(|round| round.ready).collect();
    ready.most() / ready.least()
}

fn shown(spread: &Spread, unit: &str) -> String {
    if spread.most() == 0.0 {
        return "none".to_owned();
    }
    let mut shown = format!("{:.0} {unit}", spread.median());
    if spread.least().round() < spread.most().round() {
        write!(shown, " ({:.0}–{:.0})", spread.least(), spread.most()).unwrap();
    }
    shown
}

fn count(number: usize) -> f64 {
    f64::from(u32::try_from(number).unwrap())
}

fn kb(number: u64) -> f64 {
    f64::from(u32::try_from(number).unwrap())
}

fn round(calls: &Calls, daemon: &Daemon, handler: &str, round: usize) -> Result<Round, Failure> {
    let before: BTreeSet<i32> = daemon.processes().iter().map(|one| one.pid).collect();
    let config = cri_calls::pod_config(
        &daemon.names,
        PodSpec::new(&format!("round{round}-{handler}")),
    );

    let begin = Instant::now();
    let id = calls.run_pod(&config, handler)?;
    let sandbox = milliseconds(begin);
    let container = |name: &str, image: &str, command: &[&str]| {
        let container = calls.create((&id, &config), name, image, command, &[])?;
        calls.start(&container).map(|()| container)
    };
    let apps = [
        container("nginx", image::NGINX, &[])?,
        container("client", image::BUSYBOX, &["sh", "-c", CLIENT])?,
    ];
    let ready = milliseconds(begin);

    daemon.look();
    std::thread::sleep(Duration::from_millis(500));
    let apps: BTreeSet<i32> = [calls.pid(&apps[0])?, calls.pid(&apps[1])?].into();
    let others = footprint::beside_the_apps(daemon, &before, &apps).map_err(Failure)?;
    let (shim, pause): (Vec<&Process>, Vec<&Process>) = others
        .iter()
        .partition(|process| footprint::is_shim(process));
    let threads = shim.iter().map(|shim| proc::threads(shim.pid)).sum();
    let (shim, pause) = (Memory::of(shim), Memory::of(pause));

    let begin = Instant::now();
    calls.stop_pod(&id)?;
    let stopped = milliseconds(begin);
    calls.remove_pod(&id)?;
    Ok(Round {
        sandbox,
        ready,
        stopped,
        gone: milliseconds(begin),
        shim,
        pause,
        threads,
        processes: others.len(),
    })
}

fn milliseconds(since: Instant) -> f64 {
    since.elapsed().as_secs_f64() * 1000.0
}
