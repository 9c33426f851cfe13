//! The harness: a private, real containerd for every test, and what a test wants to ask of it.
//!
//! ```text
//!   lab      which containerd versions and which shim, and where their binaries are (made by tests/lab/prepare)
//!   image    images without a registry: busybox, nginx, pause
//!   slot     a number that only this test has: directory, bridge, subnet, cgroup parent follow from it
//!   daemon   one containerd in its slot: start, kill, restart, ctr, events
//!   cri      Pod and Container, as kubelet would make them
//!   raw      the shim binary alone, driven as containerd does, for what containerd would never send
//!   task     one container on such a shim, by Task calls
//!   cgroups  the files of a process's cgroup, on either version
//!   terminal a program on a terminal of its own
//!   proc     processes, namespaces, threads, memory
//!   leaks    what is left of a test
//!   takedown removes what is left, also when a test fails or is killed
//! ```
//!
//! A test: start a [`daemon::Daemon`], do things, call [`daemon::Daemon::end`], which fails if anything is left.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test harness reports by failing"
)]

pub mod cgroups;
pub mod cri;
pub mod daemon;
pub mod image;
pub mod lab;
pub mod leaks;
pub mod proc;
pub mod raw;
pub mod slot;
pub mod takedown;
pub mod task;
pub mod terminal;
pub mod until;

pub use cri::{Container, ContainerSpec, Pod, PodSpec};
pub use daemon::{Daemon, Options};
pub use lab::{ShimUnderTest, Version};
pub use terminal::Terminal;
pub use until::eventually;

/// Makes one test per containerd version out of each function: `name::v1_6`, `name::v1_7`, `name::v2_1`.
#[macro_export]
macro_rules! on_every_containerd {
    ($($(#[$meta:meta])* fn $name:ident($version:ident) $body:block)*) => {$(
        $(#[$meta])*
        mod $name {
            #[allow(unused_imports, reason = "not every test uses all of its file's imports")]
            use super::*;

            fn body($version: $crate::Version) $body

            #[test]
            fn v1_6() {
                body($crate::Version::V1_6);
            }

            #[test]
            fn v1_7() {
                body($crate::Version::V1_7);
            }

            #[test]
            fn v2_1() {
                body($crate::Version::V2_1);
            }
        }
    )*};
}

/// Ends a test early when what it tests cannot be had here. The test and the reason are written to
/// `target/lab/left-out.txt`, so that a run says what it did not check.
#[macro_export]
macro_rules! left_out {
    ($reason:expr) => {{
        $crate::lab::left_out(module_path!(), $reason);
        return;
    }};
}

/// Ends a test early under `SHIM_UNDER_TEST=runc`, when what it tests exists only in our shim. The test and the reason
/// are written to `target/lab/left-out.txt`, as by [`left_out`].
#[macro_export]
macro_rules! ours_only {
    ($reason:expr) => {
        if $crate::ShimUnderTest::get() == $crate::ShimUnderTest::Runc {
            $crate::left_out!(concat!("not on the stock shim: ", $reason));
        }
    };
}
