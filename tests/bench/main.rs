//! `make bench`: this shim beside the stock shim and the published Rust shim, on real containerds, measured.
//!
//! ```text
//!   arguments   the command line
//!   columns     the shims, and the figures of each
//!   node        one containerd, its pods, the life of a pod
//!   latency     how long each call takes, and the CPU time of all of them (cpu: how that is known)
//!   throughput  pods per second with several clients
//!   memory      memory, threads, processes, cgroups
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
mod chart;
mod columns;
mod connector;
mod cpu;
mod idle;
mod latency;
mod logs;
mod memory;
mod node;
mod report;
mod targets;
mod throughput;
mod trace;

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use arguments::{USAGE, Wanted, What};
use node::{CniOrHost, Node};
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
    let machine = machine();
    let mut runs = Vec::new();
    for &version in &wanted.containerds {
        screen::title(&format!("containerd {}", version.line()));
        rescue::step(
            "measuring",
            "The log says what containerd and the shims did.",
        );
        runs.push(Run::new(version, &wanted.shims));
        // What there is stays, whatever becomes of the rest.
        measure(&wanted, begin, &mut runs, &|runs| {
            let json = serde_json::to_vec_pretty(&report::json(&machine, runs)).unwrap();
            fs::write(out.join("bench.json"), json).unwrap();
            fs::write(out.join("bench.md"), report::markdown(&machine, runs)).unwrap();
            // The newest containerd comes first.
            fs::write(out.join("bench.svg"), chart::svg(&runs[0])).unwrap();
        });
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
    let parts = parts(wanted);
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
        let node = Node::start(run.version, cni, &shims);
        for (what, network) in parts {
            screen::line(&format!("{:4} s", begin.elapsed().as_secs()));
            let columns = &mut runs.last_mut().unwrap().columns[..];
            match what {
                What::Latency | What::Cpu => latency::run(&node, columns, network, wanted.rounds),
                What::Trace => trace::run(&node, columns, network, wanted.rounds.min(TRACED)),
                What::Throughput => {
                    throughput::run(&node, columns, network, wanted.pods.min(THROUGH));
                }
                What::Memory => memory::run(&node, columns, network, wanted.pods, wanted.execs),
                What::Logs => logs::run(&node, columns, network, wanted.mib),
                What::Idle => idle::run(&node, columns, network, wanted.seconds),
            }
            save(runs);
        }
        node.end();
    }
}

/// What is measured, in this order, and with which network.
fn parts(wanted: &Wanted) -> Vec<(What, CniOrHost)> {
    let mut parts = Vec::new();
    for &network in &wanted.networks {
        parts.extend([What::Latency, What::Trace].map(|what| (what, network)));
    }
    // What does not depend on the network is measured with the one that costs least and suits everybody.
    let cheap = CniOrHost::Cni(Network::Loopback);
    let others = [What::Throughput, What::Memory, What::Logs, What::Idle];
    parts.extend(others.map(|what| (what, cheap)));
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
    let runc = Command::new(lab::runc()).arg("--version").output();
    let runc = String::from_utf8(runc.unwrap().stdout).unwrap();
    // What cargo has written down: "NAME VERSION (SOURCE)" = ["BINARY"]
    let installed = fs::read_to_string(node::published().with_file_name("../.crates.toml"));
    let installed = installed.unwrap_or_default();
    let published = installed
        .split('"')
        .nth(1)
        .and_then(|name| name.split(" (").next());
    format!(
        "{processors} processors, Linux {}, load {} at the start; {}; published Rust shim: {}",
        first_word("/proc/sys/kernel/osrelease"),
        first_word("/proc/loadavg"),
        runc.lines()
            .next()
            .unwrap_or("runc ?")
            .replace(" version", ""),
        published.unwrap_or("none")
    )
}
