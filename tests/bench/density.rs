//! Many pods on one node: what each costs, and what the next one and an exec take.

use std::time::{Duration, Instant};

use shim_tests::cri::Failure;
use shim_tests::proc;

use crate::columns::{Column, in_turn};
use crate::memory::{CLIENTS, float, look};
use crate::node::{CniOrHost, Node, Running, milliseconds, now, ready, remove};
use crate::throughput::together;

/// How many pods stand while it is measured.
const STANDING: [usize; 4] = [10, 100, 250, 500];
/// So often each call is timed.
const TIMED: usize = 10;
/// kubelet lists all pods and containers every second, and asks for statistics every ten.
const LIST: Duration = Duration::from_secs(1);
const STATISTICS: u32 = 10;

/// Up to so many pods; and the CPU time of a rest of so many seconds.
pub(crate) fn run(
    node: &Node,
    columns: &mut [Column],
    network: CniOrHost,
    most: usize,
    seconds: usize,
) {
    in_turn(node, columns, "density", network, 1, |column, _| {
        let mut pods: Vec<Running> = Vec::new();
        for number in STANDING.into_iter().filter(|&number| number <= most) {
            let more = (pods.len()..number).map(|_| node.pod(network)).collect();
            pods.extend(together(node, CLIENTS, more, |calls, config| {
                ready(calls, &config, column.shim)
            })?);
            let when = format!("{number:3} standing pods");
            look(node, column, &pods, &when)?;
            time(node, column, network, &pods, &when)?;
            rest(node, column, &when, seconds)?;
        }
        together(node, CLIENTS, pods, |calls, pod| remove(calls, &pod))?;
        node.settle()
    });
}

/// How long RunPodSandbox and ExecSync take beside these pods.
fn time(
    node: &Node,
    column: &mut Column,
    network: CniOrHost,
    pods: &[Running],
    when: &str,
) -> Result<(), Failure> {
    for round in 0..TIMED {
        let config = node.pod(network);
        let begin = now();
        let pod = node.calls.run_pod(&config, column.shim.name())?;
        let ran = milliseconds(now() - begin);
        column.add(&format!("density, {when}: RunPodSandbox"), "ms", ran);
        node.calls.stop_pod(&pod)?;
        node.calls.remove_pod(&pod)?;
        let begin = now();
        node.calls.exec(&pods[round % pods.len()].app, &["true"])?;
        let ran = milliseconds(now() - begin);
        column.add(&format!("density, {when}: ExecSync"), "ms", ran);
    }
    Ok(())
}

/// CPU time of the shims and of containerd while nothing happens but kubelet's questions.
fn rest(node: &Node, column: &mut Column, when: &str, seconds: usize) -> Result<(), Failure> {
    let shims = node.shims();
    let cpu = || -> Duration { shims.iter().map(|shim| proc::cpu_time(shim.pid)).sum() };
    let containerd = || proc::cpu_time(node.daemon.pid());
    let (shims_before, before) = (cpu(), containerd());
    let begin = Instant::now();
    for second in 0..u32::try_from(seconds).unwrap() {
        node.calls.list(second % STATISTICS == 0)?;
        // Not a wait for something: the beat of the questions.
        std::thread::sleep((LIST * (second + 1)).saturating_sub(begin.elapsed()));
    }
    let mut add = |who: &str, used: Duration| {
        let each = used.as_secs_f64() * 1e3 / float(shims.len());
        let name = format!("density, {when}: CPU of {who} per pod in a rest of {seconds} s");
        column.add(&name, "ms", each);
    };
    add("shims", cpu() - shims_before);
    add("containerd", containerd() - before);
    Ok(())
}
