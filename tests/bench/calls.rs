//! What the calls cost that are made every second: State, Pids, Stats.

use std::fs;
use std::time::Duration;

use serde_json::Value;
use shim_tests::calls::Shim;
use shim_tests::cri::Failure;
use shim_tests::proc::{self, Process};

use crate::columns::{Column, in_turn};
use crate::memory::float;
use crate::node::{CniOrHost, Node, milliseconds, now, remove};

/// CPU time of a shim for so many calls of each kind about a container, one after the other, and how long one takes.
pub(crate) fn run(node: &Node, columns: &mut [Column], network: CniOrHost, calls: usize) {
    in_turn(node, columns, "calls", network, 1, |column, _| {
        let pod = node.run(column.shim, network)?;
        let shims = node.shims();
        let shim = connect(node, &pod.app)?;
        let said = |refusal| Failure(format!("{refusal}"));
        for what in ["State", "Pids", "Stats"] {
            let before = cpu(&shims);
            let begin = now();
            for _ in 0..calls {
                match what {
                    "State" => shim.state(&pod.app, "").map(drop),
                    "Pids" => shim.pids(&pod.app).map(drop),
                    _ => shim.stats(&pod.app).map(drop),
                }
                .map_err(said)?;
            }
            let wall = milliseconds(now() - begin) / float(calls);
            let used = (cpu(&shims) - before).as_secs_f64();
            column.add(&format!("calls: CPU of {calls} {what}"), "s", used);
            column.add(&format!("calls: wall time of one {what}"), "ms", wall);
        }
        remove(&node.calls, &pod)?;
        node.settle()
    });
}

/// A connection to the shim of a container, as containerd finds it.
fn connect(node: &Node, container: &str) -> Result<Shim, Failure> {
    let tasks = node
        .daemon
        .directory()
        .join("state/io.containerd.runtime.v2.task/k8s.io");
    let bundle = tasks.join(container);
    let unread = |error| Failure(format!("{}: {error}", bundle.display()));
    let found = fs::read(bundle.join("bootstrap.json")).map_err(unread);
    let (address, version) = match found {
        Ok(json) => {
            let json: Value = serde_json::from_slice(&json).unwrap_or_default();
            let address = json["address"].as_str().unwrap_or_default().to_owned();
            (address, json["version"].as_u64().unwrap_or(2))
        }
        // Before 2.0.
        Err(_) => (
            fs::read_to_string(bundle.join("address")).map_err(unread)?,
            2,
        ),
    };
    let service = match version {
        3.. => "containerd.task.v3.Task",
        _ => "containerd.task.v2.Task",
    };
    Shim::try_dial(&address, service, Duration::from_secs(10)).map_err(Failure)
}

fn cpu(processes: &[Process]) -> Duration {
    processes.iter().map(|one| proc::cpu_time(one.pid)).sum()
}
