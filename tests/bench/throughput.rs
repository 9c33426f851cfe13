//! How many pods become ready per second when several clients ask at once.

use std::sync::Mutex;

use shim_tests::cri::Failure;
use shim_tests::cri_calls::Calls;

use crate::columns::{Column, in_turn};
use crate::node::{CniOrHost, Node, milliseconds, now, ready, remove};

/// How many clients ask at once.
const CLIENTS: [usize; 3] = [1, 4, 8];

/// What the name of a figure ends with that is better when it is more.
pub(crate) const PER_SECOND: &str = "pods ready per second";

pub(crate) fn run(node: &Node, columns: &mut [Column], network: CniOrHost, pods: usize) {
    // The first pod of each is slower, for what is not yet in memory, and does not count.
    let rounds: Vec<usize> = [0].into_iter().chain(CLIENTS).collect();
    in_turn(
        node,
        columns,
        "throughput",
        network,
        rounds.len(),
        |column, round| {
            let clients = rounds[round];
            if clients == 0 {
                return remove(&node.calls, &node.run(column.shim, network)?)
                    .and_then(|()| node.settle());
            }
            let configs = (0..pods).map(|_| node.pod(network)).collect();
            let begin = now();
            let running = together(node, clients, configs, |calls, config| {
                ready(calls, &config, column.shim)
            })?;
            let seconds = milliseconds(now() - begin) / 1000.0;
            let pods = f64::from(u32::try_from(running.len()).unwrap());
            let name = format!("throughput, {clients} clients: {PER_SECOND}");
            column.add(&name, "", pods / seconds);
            together(node, clients, running, |calls, pod| remove(calls, &pod))?;
            node.settle()
        },
    );
}

/// Works on all of it with so many clients at once.
pub(crate) fn together<T: Send, U: Send>(
    node: &Node,
    clients: usize,
    work: Vec<T>,
    one: impl Fn(&Calls, T) -> Result<U, Failure> + Sync,
) -> Result<Vec<U>, Failure> {
    let names = &node.daemon.names;
    let work = Mutex::new(work);
    std::thread::scope(|scope| {
        let client = || {
            let calls = Calls::new(names);
            let next = || work.lock().unwrap().pop();
            std::iter::from_fn(next)
                .map(|item| one(&calls, item))
                .collect::<Result<Vec<U>, Failure>>()
        };
        let clients: Vec<_> = (0..clients).map(|_| scope.spawn(client)).collect();
        let done = clients.into_iter().map(|client| client.join().unwrap());
        Ok(done
            .collect::<Result<Vec<_>, Failure>>()?
            .into_iter()
            .flatten()
            .collect())
    })
}
