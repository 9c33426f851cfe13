//! How long each call in the life of a pod takes, and how much CPU time its whole life.

use crate::columns::{Column, in_turn};
use crate::node::{CniOrHost, Node, STEPS, life};

pub(crate) fn run(node: &Node, columns: &mut [Column], network: CniOrHost, rounds: usize) {
    let what = format!("latency, {} network", network.name());
    let name = |step: &str| format!("latency {}: {step}", network.name());
    in_turn(
        node,
        columns,
        &what,
        network,
        rounds + 1,
        |column, round| {
            let before = node.accounting.used();
            let times = life(node, column.shim, network)?;
            // The first pod of each is slower, for what is not yet in memory.
            if round == 0 {
                return Ok(());
            }
            let after = node.accounting.used();
            for (step, time) in STEPS.iter().zip(&times) {
                column.add(&name(step), "ms", time.until(*time));
            }
            // From the first call's begin until the container runs.
            column.add(&name("pod ready"), "ms", times[0].until(times[2]));
            if node.is_busy() {
                // The other client's time would be in it.
                return Ok(());
            }
            let mut cpu = |who: &str, used: f64| {
                column.add(&format!("cpu {}: {who}", network.name()), "ms", used);
            };
            cpu("of a pod's life", after.others - before.others);
            cpu("containerd meanwhile", after.containerd - before.containerd);
            Ok(())
        },
    );
}
