//! What exec probes cost, which nodes run all day.

use crate::columns::{Column, in_turn};
use crate::memory::{float, look};
use crate::node::{CniOrHost, Node, milliseconds, now, remove};
use crate::throughput::together;

/// How many clients ask at once.
const CLIENTS: [usize; 2] = [1, 10];
/// The execs are shared out to so many pods of each shim, one after the other.
const ROUNDS: usize = 5;

/// So many execs of `true`: wall time and CPU time of one, and the memory after all.
pub(crate) fn run(node: &Node, columns: &mut [Column], network: CniOrHost, execs: usize) {
    in_turn(node, columns, "execs", network, ROUNDS, |column, _| {
        let pod = node.run(column.shim, network)?;
        for clients in CLIENTS {
            let before = node.accounting.used();
            let begin = now();
            let codes = together(node, clients, vec![(); execs / ROUNDS], |calls, ()| {
                calls.exec(&pod.app, &["true"])
            })?;
            let wall = milliseconds(now() - begin) / float(codes.len());
            let after = node.accounting.used();
            let mut add = |what: &str, all: f64| {
                let name = format!("execs, {clients} at a time: {what}");
                column.add(&name, "ms", all);
            };
            add("wall time of one", wall);
            add(
                "CPU of one",
                (after.others - before.others) / float(codes.len()),
            );
            let containerd = after.containerd - before.containerd;
            add("CPU of containerd for one", containerd / float(codes.len()));
        }
        let when = format!("1 pod after {} execs", 2 * execs / ROUNDS);
        look(node, column, std::slice::from_ref(&pod), &when)?;
        remove(&node.calls, &pod)?;
        node.settle()
    });
}
