//! `make bench`: this shim beside the stock shim and the published Rust shim, on real containerds, measured.
//!
//! ```text
//!   arguments   the command line
//!   place       where: a node with systemd and cgroup v2, quiet and busy, and this machine
//!   columns     the shims, and the figures of each
//!   node        one containerd, its pods, the life of a pod
//!   latency     how long each call takes, and the CPU time of all of them (cpu: how that is known)
//!   throughput  pods per second with several clients
//!   memory      memory, threads, processes, cgroups
//!   execs       wall time and CPU time of execs
//!   calls       CPU time of State, Pids, Stats
//!   density     many pods on one node
//!   busy        another client of the same containerd
//!   logs        CPU time for a container's output
//!   idle        wake-ups
//!   trace       which programs run in each call (connector: how that is known)
//!   targets     what is to be reached, and whether it is
//!   report      JSON and Markdown
//!   chart       a picture of the ratios
//! ```
//!
//! A shim that fails is noted with what it said, and the others go on. What fails of the harness ends the bench, as it
//! ends the demo, and everything is taken down.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "it fails as a test does; the harness' rescue.rs makes it readable"
)]

mod arguments;
mod busy;
mod calls;
mod chart;
mod columns;
mod connector;
mod cpu;
mod density;
mod execs;
mod idle;
mod latency;
mod logs;
mod memory;
mod node;
mod place;
mod report;
mod targets;
mod throughput;
mod trace;

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use arguments::{USAGE, Wanted, What};
use busy::Busy;
use columns::Column;
use node::{CniOrHost, Node};
use place::Place;
use report::Run;
use shim_tests::daemon::Network;
use shim_tests::{lab, rescue, screen};

/// Pods of each shim that are traced, at most.
const TRACED: usize = 10;
/// Pods that several clients make together, at most.
const THROUGH: usize = 40;

fn main() {
    let begin = Instant::now();
    let wanted =
        Wanted::of(std::env::args().skip(1)).unwrap_or_else(|why| rescue::refuse(&why, USAGE));
    if !rustix::process::geteuid().is_root() {
        rescue::refuse(
            "namespaces and mounts need root.",
            "`make bench` calls sudo when you are not root.",
        );
    }
    if std::env::var("SHIM_UNDER_TEST").is_ok_and(|shim| shim != "pause") {
        rescue::refuse(
            "SHIM_UNDER_TEST is set, but the bench always measures all shims.",
            "env -u SHIM_UNDER_TEST make bench",
        );
    }
    rescue::arm("bench");
    let out = wanted
        .out
        .as_ref()
        .map_or_else(|| lab::target().join("bench"), PathBuf::from);
    fs::create_dir_all(&out).unwrap();
    if let Some(place) = wanted.inside {
        let mut run = [Run::new(place, wanted.containerds[0], &wanted.shims)];
        measure(&wanted, begin, &mut run, &|run| {
            fs::write(out.join("run.json"), run[0].json().to_string()).unwrap();
        });
        return;
    }
    let machine = machine();
    let mut runs = Vec::new();
    // What there is stays, whatever becomes of the rest.
    let save = |runs: &[Run]| {
        let json = serde_json::to_vec_pretty(&report::json(&machine, runs)).unwrap();
        fs::write(out.join("bench.json"), json).unwrap();
        fs::write(out.join("bench.md"), report::markdown(&machine, runs)).unwrap();
        fs::write(out.join("bench.svg"), chart::svg(&runs[0])).unwrap();
    };
    for &place in &wanted.places {
        for &version in &wanted.containerds {
            screen::title(&format!("containerd {}: {}", version.line(), place.title()));
            rescue::step(
                "measuring",
                "The log says what containerd and the shims did.",
            );
            if place == Place::Machine {
                runs.push(Run::new(place, version, &wanted.shims));
                measure(&wanted, begin, &mut runs, &save);
            } else {
                match place::elsewhere(place, version) {
                    Ok(run) => runs.push(run),
                    Err(why) => screen::alarm(&format!("Not measured: {why}")),
                }
            }
            if !runs.is_empty() {
                save(&runs);
            }
        }
    }
    screen::title("Results");
    for line in report::markdown(&machine, &runs).lines() {
        screen::line(line);
    }
    screen::line(&format!(
        "In {}. It took {:.0} s.",
        out.display(),
        begin.elapsed().as_secs_f64()
    ));
}

/// Everything that is wanted, on the containerd of the last run. `save` is called whenever something was measured.
fn measure(wanted: &Wanted, begin: Instant, runs: &mut [Run], save: &dyn Fn(&[Run])) {
    let place = runs.last().unwrap().place;
    let parts = parts(wanted, place);
    for cni in [Network::Loopback, Network::Bridge] {
        let mut parts = parts
            .iter()
            .copied()
            .filter(|(_, network)| network.cni() == cni)
            .peekable();
        if parts.peek().is_none() {
            continue;
        }
        let run = runs.last().unwrap();
        let shims: Vec<_> = run.columns.iter().map(|column| column.shim).collect();
        let node = Node::start(place, run.version, cni, &shims);
        let busy = (place == Place::Busy).then(|| Busy::start(&node));
        for (what, network) in parts {
            screen::line(&format!("{:4} s", begin.elapsed().as_secs()));
            let columns = &mut runs.last_mut().unwrap().columns[..];
            part(wanted, &node, columns, what, network);
            save(runs);
        }
        if let Some(busy) = busy {
            let lives = busy.end(&node);
            screen::line(&format!("The other client ended {lives} containers."));
        }
        node.end();
    }
}

/// One part, with one network.
fn part(wanted: &Wanted, node: &Node, columns: &mut [Column], what: What, network: CniOrHost) {
    match what {
        What::Latency | What::Cpu => latency::run(node, columns, network, wanted.rounds),
        What::Trace => trace::run(node, columns, network, wanted.rounds.min(TRACED)),
        What::Throughput => throughput::run(node, columns, network, wanted.pods.min(THROUGH)),
        What::Memory => memory::run(node, columns, network, wanted.pods),
        What::Execs => execs::run(node, columns, network, wanted.execs),
        What::Calls => calls::run(node, columns, network, wanted.calls),
        What::Density => density::run(node, columns, network, wanted.standing, wanted.seconds),
        What::Logs => logs::run(node, columns, network, wanted.mib),
        What::Idle => idle::run(node, columns, network, wanted.seconds),
    }
}

/// What is measured in this place, in this order, and with which network.
fn parts(wanted: &Wanted, place: Place) -> Vec<(What, CniOrHost)> {
    let mut parts = Vec::new();
    for &network in &wanted.networks {
        parts.extend([What::Latency, What::Trace].map(|what| (what, network)));
    }
    // What does not depend on the network is measured with the one that costs least and suits everybody.
    let cheap = CniOrHost::Cni(Network::Loopback);
    let others = [
        What::Throughput,
        What::Memory,
        What::Execs,
        What::Calls,
        What::Density,
        What::Logs,
        What::Idle,
    ];
    parts.extend(others.map(|what| (what, cheap)));
    parts.retain(|&(what, network)| match place {
        // The kernel tells its process events to nobody in a pid namespace.
        Place::Systemd => what != What::Trace,
        Place::Busy => what == What::Latency && network == CniOrHost::Host,
        // A comparison with other places' figures, which takes long enough.
        Place::Machine => ![What::Execs, What::Calls, What::Density].contains(&what),
    });
    parts.retain(|(what, _)| wanted.has(*what));
    parts
}

/// What is said of the machine, and of the programs whose versions stand nowhere else.
fn machine() -> String {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let first_word = |file: &str| {
        let text = fs::read_to_string(file).unwrap_or_default();
        text.split_whitespace().next().unwrap_or("?").to_owned()
    };
    // What cargo has written down: "NAME VERSION (SOURCE)" = ["BINARY"]
    let installed = fs::read_to_string(node::published().with_file_name("../.crates.toml"));
    let installed = installed.unwrap_or_default();
    let published = installed
        .split('"')
        .nth(1)
        .and_then(|name| name.split(" (").next());
    format!(
        "{processors} processors, Linux {}, load {} at the start; published Rust shim: {}",
        first_word("/proc/sys/kernel/osrelease"),
        first_word("/proc/loadavg"),
        published.unwrap_or("none")
    )
}
