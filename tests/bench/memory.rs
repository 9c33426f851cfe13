//! What a pod costs beside its app: memory, threads, processes, cgroups.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use shim_tests::cgroups::{Hierarchy, hierarchy};
use shim_tests::cri::Failure;
use shim_tests::footprint::{self, Memory};
use shim_tests::leaks;

use crate::columns::{Column, in_turn};
use crate::node::{CniOrHost, Node, Running};

/// How long what was started may still be busy with that.
const CALM: Duration = Duration::from_secs(1);

/// With so many pods at once, and after so many execs in one container.
pub(crate) fn run(
    node: &Node,
    columns: &mut [Column],
    network: CniOrHost,
    most: usize,
    execs: usize,
) {
    in_turn(node, columns, "memory", network, 1, |column| {
        let mut pods = Vec::new();
        for number in [1, 10, 50, 100] {
            if number > most {
                break;
            }
            while pods.len() < number {
                pods.push(node.run(column.shim, network)?);
            }
            look(node, column, &pods, &format!("{number} pods"))?;
            if number == 1 && execs > 0 {
                for _ in 0..execs {
                    node.calls.exec(&pods[0].app, &["true"])?;
                }
                look(node, column, &pods, &format!("1 pod after {execs} execs"))?;
            }
        }
        for pod in &pods {
            node.remove(pod)?;
        }
        node.settle()
    });
}

fn look(node: &Node, column: &mut Column, pods: &[Running], when: &str) -> Result<(), Failure> {
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
    add("cgroups", "", cgroups(node));
    Ok(())
}

/// The pods' cgroups, in one hierarchy.
fn cgroups(node: &Node) -> usize {
    let root = match hierarchy() {
        Hierarchy::V1 => Path::new("/sys/fs/cgroup/memory"),
        Hierarchy::V2 => Path::new("/sys/fs/cgroup"),
    };
    let all = leaks::cgroups(&node.daemon.names);
    all.iter().filter(|group| group.starts_with(root)).count()
}

fn float(number: usize) -> f64 {
    f64::from(u32::try_from(number).unwrap())
}
