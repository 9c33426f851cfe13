//! What a pod costs beside its app: memory, threads, processes, cgroups.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use shim_tests::cri::Failure;
use shim_tests::footprint::{self, Memory};
use shim_tests::{cgroups, leaks};

use crate::columns::{Column, in_turn};
use crate::node::{CniOrHost, Node, Running, ready, remove};
use crate::throughput::together;

/// How long what was started may still be busy with that.
const CALM: Duration = Duration::from_secs(1);

/// So many clients start and end many pods, so that it does not take so long.
pub(crate) const CLIENTS: usize = 4;

/// With so many pods at once.
pub(crate) fn run(node: &Node, columns: &mut [Column], network: CniOrHost, most: usize) {
    in_turn(node, columns, "memory", network, 1, |column, _| {
        let mut pods = Vec::new();
        for number in [1, 10, 50, 100] {
            if number > most {
                break;
            }
            let more = (pods.len()..number).map(|_| node.pod(network)).collect();
            pods.extend(together(node, CLIENTS, more, |calls, config| {
                ready(calls, &config, column.shim)
            })?);
            let plural = if number == 1 { "" } else { "s" };
            look(node, column, &pods, &format!("{number} pod{plural}"))?;
        }
        together(node, CLIENTS, pods, |calls, pod| remove(calls, &pod))?;
        node.settle()
    });
}

/// Notes what the pods cost together, as `memory WHEN: …`.
pub(crate) fn look(
    node: &Node,
    column: &mut Column,
    pods: &[Running],
    when: &str,
) -> Result<(), Failure> {
    std::thread::sleep(CALM);
    let apps: Result<BTreeSet<i32>, Failure> =
        pods.iter().map(|pod| node.calls.pid(&pod.app)).collect();
    let others = footprint::beside_the_apps(&node.daemon, &BTreeSet::new(), &apps?);
    let others = others.map_err(Failure)?;
    let memory = Memory::of(&others);
    let threads: usize = others.iter().map(|process| process.threads).sum();
    let mut add = |what: &str, unit, of_all: usize| {
        let each = float(of_all) / float(pods.len());
        column.add(&format!("memory {when}: {what} per pod"), unit, each);
    };
    let kb = |number: u64| usize::try_from(number).unwrap();
    add("private", "kB", kb(memory.private));
    add("PSS", "kB", kb(memory.pss));
    add("RSS", "kB", kb(memory.rss));
    add("threads", "", threads);
    add("processes", "", others.len());
    add(
        "descriptors of shims",
        "",
        descriptors(others.iter().map(|one| one.pid)),
    );
    add(
        "descriptors of containerd",
        "",
        descriptors([node.daemon.pid()]),
    );
    add("cgroups", "", groups(node));
    Ok(())
}

/// How many files these processes have open.
fn descriptors(pids: impl IntoIterator<Item = i32>) -> usize {
    let folders = pids
        .into_iter()
        .map(|pid| fs::read_dir(format!("/proc/{pid}/fd")));
    folders.flatten().map(Iterator::count).sum()
}

/// The pods' cgroups, in one hierarchy.
fn groups(node: &Node) -> usize {
    let root = cgroups::root("memory");
    let all = leaks::cgroups(&node.daemon.names);
    all.iter().filter(|group| group.starts_with(&root)).count()
}

pub(crate) fn float(number: usize) -> f64 {
    f64::from(u32::try_from(number).unwrap())
}
