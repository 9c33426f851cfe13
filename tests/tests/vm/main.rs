//! What runs in the VM with cgroup v2 and systemd: see `tests/vm/README.md`.
//!
//! The other binaries' suites are here a second time, as they are; `.config/nextest.toml` says which of their tests a
//! run takes. Only suites whose every test stands in `on_every_containerd!` may be: the macro hands them to the VM.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

mod apparmor;
mod machine;
mod systemd;

#[path = "../checkpoint.rs"]
mod checkpoint;
#[path = "../oom.rs"]
mod oom;
#[path = "../resources.rs"]
mod resources;
#[path = "../s11_ctr.rs"]
mod s11_ctr;
#[path = "../s5_shared_processes.rs"]
mod s5_shared_processes;
#[path = "../s8_kills.rs"]
mod s8_kills;
#[path = "../s9_tasks.rs"]
mod s9_tasks;
#[path = "../small_limits.rs"]
mod small_limits;
#[path = "../stats.rs"]
mod stats;
