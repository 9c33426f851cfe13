//! How often the shim of an idle pod wakes up.

use std::fs;
use std::time::Duration;

use shim_tests::proc::Process;

use crate::columns::{Column, Shim, in_turn};
use crate::node::{CniOrHost, Node, Running, remove};

/// How long what was started may still be busy with that.
const CALM: Duration = Duration::from_secs(3);

pub(crate) fn run(node: &Node, columns: &mut [Column], network: CniOrHost, seconds: usize) {
    let mut pods: Vec<(Shim, Running, Process)> = Vec::new();
    in_turn(node, columns, "idle", network, 1, |column, _| {
        let pod = node.run(column.shim, network)?;
        let mut shims = node.shims();
        shims.retain(|shim| pods.iter().all(|(_, _, other)| other.pid != shim.pid));
        if let Some(shim) = shims.pop() {
            pods.push((column.shim, pod, shim));
        }
        Ok(())
    });
    std::thread::sleep(CALM);
    let look = || -> Vec<u64> { pods.iter().map(|(.., shim)| switches(shim.pid)).collect() };
    let before = look();
    std::thread::sleep(Duration::from_secs(seconds as u64));
    let after = look();
    for (number, (shim, ..)) in pods.iter().enumerate() {
        let column = columns.iter_mut().find(|column| column.shim == *shim);
        let times = u32::try_from(after[number].saturating_sub(before[number])).unwrap();
        let name = format!("idle {seconds} s: wake-ups of the shim");
        column.unwrap().add(&name, "", times.into());
    }
    in_turn(
        node,
        columns,
        "idle, the end",
        network,
        1,
        |column, _| match pods.iter().find(|(shim, ..)| *shim == column.shim) {
            Some((_, pod, _)) => remove(&node.calls, pod),
            None => Ok(()),
        },
    );
}

/// How often the threads of a process went to sleep or were put to sleep, which is how often they woke up.
fn switches(pid: i32) -> u64 {
    let threads = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten();
    let status = threads
        .flatten()
        .map(|thread| fs::read_to_string(thread.path().join("status")));
    let of_one = |status: String| -> u64 {
        let lines = status
            .lines()
            .filter(|line| line.contains("ctxt_switches:"));
        lines
            .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
            .sum()
    };
    status.flatten().map(of_one).sum()
}
