//! A node is powered off: how long systemd waits for what is left of the pods.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test reports by failing, and this one by its measurements, too"
)]

use std::time::Duration;

use shim_tests::lab::ShimUnderTest;
use shim_tests::node::Node;
use shim_tests::until::ok_if;
use shim_tests::{eventually, left_out, on_every_containerd};

/// systemd's own patience for a process that does not end is 90 seconds.
const LONGEST: Duration = Duration::from_secs(10);

on_every_containerd! {
    fn a_node_with_a_container_powers_off_at_once(version) {
        for shim in [ShimUnderTest::Runc, ShimUnderTest::get()] {
            let node = match Node::with_containerd(version, shim) {
                Ok(node) => node,
                Err(why) => left_out!(&format!("no node with systemd can be made here: {why}")),
            };
            // As most servers do, and unlike a plain `sleep`, the container ends at SIGTERM.
            node.run_container(shim, "app", "trap 'exit 0' TERM; sleep 3600 & wait");
            assert_eq!(node.processes_named("containerd-shim").len(), 1);
            eventually(Duration::from_secs(5), || {
                ok_if(!node.processes_named("sleep").is_empty(), || "the container is not up".to_owned())
            });
            let took = node.power_off();
            eprintln!("poweroff with {}: {:.1} s", shim.binary_name(), took.as_secs_f64());
            assert!(took < LONGEST, "{}: {took:?}", shim.binary_name());
        }
    }
}
