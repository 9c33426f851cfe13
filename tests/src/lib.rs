//! The harness: a private, real containerd for every test, and all that a test asks of a containerd.
//!
//! ```text
//!   lab      the containerds, the shims and the OCI runtimes, and the places of their binaries (made by tests/lab/prepare)
//!   image    images without a registry: busybox, nginx, pause
//!   oci      the tiny pause image
//!   slot     a number that only this test has; directory, bridge, subnet, cgroup parent follow from the number
//!   daemon   one containerd in its slot: start, kill, restart, ctr, events
//!   docker   a Docker daemon on the containerd of a test
//!   cri      Pod and Container, as kubelet would make them
//!   calls    the ttrpc calls of a shim, with the code of each answer
//!   cri_calls  CRI calls and nothing else, for measurements
//!   footprint  the processes and the memory of a pod beside its apps
//!   spread   many measurements of one thing
//!   rescue   for programs: takes everything down after a failure or Ctrl-C
//!   screen   for programs: plain text
//!   raw      the shim binary alone, driven as containerd does, for input that containerd would never send
//!   driver   the Sandbox API as containerd 2.3 and later speaks it; no packaged containerd does so yet
//!   task     one container on a shim of its own, by Task calls
//!   direct   the Task service of one shim, from many threads at once
//!   cgroups  the files of a process's cgroup, under cgroup v1 or v2
//!   fake_runc  a program for the place of runc that writes its calls down
//!   hold     a runc that waits, for kills in the middle of a call
//!   terminal a program on a terminal of its own
//!   flood    gigabytes of output that can be checked byte by byte
//!   proc     processes, namespaces, threads, memory
//!   leaks    what is left of a test
//!   takedown removes what is left, also when a test fails or is killed
//!   node     a node with systemd as PID 1, in namespaces
//!   vm       hands a test over to a virtual machine with cgroup v2 and systemd
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

pub mod calls;
pub mod cgroups;
pub mod cri;
pub mod cri_calls;
pub mod daemon;
pub mod direct;
pub mod docker;
pub mod driver;
pub mod fake_runc;
pub mod flood;
pub mod footprint;
pub mod frames;
pub mod hold;
pub mod image;
pub mod lab;
pub mod leaks;
pub mod node;
pub mod oci;
pub mod proc;
pub mod raw;
pub mod rescue;
pub mod screen;
pub mod slot;
pub mod spread;
pub mod takedown;
pub mod task;
pub mod terminal;
pub mod until;
pub mod vm;

pub use cri::{Container, ContainerSpec, Pod, PodSpec};
pub use daemon::{Daemon, Options};
pub use lab::{ShimUnderTest, Version};
pub use terminal::Terminal;
pub use until::eventually;

/// Makes one test per containerd version out of each function: `name::v1_6`, `name::v1_7`, `name::v2_1`. With
/// `CONTAINERD_BIN`, one test on that containerd: `name::v2_3`.
#[macro_export]
macro_rules! on_every_containerd {
    ($($tests:tt)*) => { $crate::tests_of! { every_containerd $($tests)* } };
}

/// As [`on_every_containerd`], and one more test with pods made through the Sandbox API: `name::v2_1_sandbox_api`.
#[macro_export]
macro_rules! in_every_mode {
    ($($tests:tt)*) => { $crate::tests_of! { every_mode $($tests)* } };
}

/// One test of each function, with pods made through the Sandbox API.
#[macro_export]
macro_rules! through_the_sandbox_api {
    ($($tests:tt)*) => { $crate::tests_of! { sandbox_api $($tests)* } };
}

/// One test of each function, on the newest containerd.
#[macro_export]
macro_rules! on_the_newest_containerd {
    ($($tests:tt)*) => { $crate::tests_of! { newest_containerd $($tests)* } };
}

/// One test of each function, on the two newest containerds: those that Docker is packaged with.
#[macro_export]
macro_rules! on_the_two_newest_containerds {
    ($($tests:tt)*) => { $crate::tests_of! { two_newest_containerds $($tests)* } };
}

/// As [`on_the_newest_containerd`], and one more test with pods made through the Sandbox API.
#[macro_export]
macro_rules! on_the_newest_in_every_mode {
    ($($tests:tt)*) => { $crate::tests_of! { newest_in_every_mode $($tests)* } };
}

/// The common part of [`on_every_containerd`] and its like.
#[doc(hidden)]
#[macro_export]
macro_rules! tests_of {
    ($containerds:ident $($(#[$meta:meta])* fn $name:ident($version:ident) $body:block)*) => {$(
        $(#[$meta])*
        mod $name {
            #[allow(unused_imports, reason = "not every test uses all of its file's imports")]
            use super::*;

            #[allow(dead_code, reason = "containerd 1.x has no Sandbox API")]
            fn body($version: $crate::Version) $body

            $crate::tests_on! { $containerds }
        }
    )*};
}

/// One test on each of these containerds. With `CONTAINERD_BIN`, `build.rs` writes this macro.
#[cfg(not(given_containerd))]
#[doc(hidden)]
#[macro_export]
macro_rules! tests_on {
    (every_containerd) => {
        $crate::test_on! { v1_6 $crate::Version::V1_6 }
        $crate::test_on! { v1_7 $crate::Version::V1_7 }
        $crate::tests_on! { newest_containerd }
    };
    (every_mode) => {
        $crate::tests_on! { every_containerd }
        $crate::tests_on! { sandbox_api }
    };
    (sandbox_api) => {
        $crate::test_on! { v2_1_sandbox_api $crate::Version::V2_1.through_the_sandbox_api() }
    };
    (two_newest_containerds) => {
        $crate::test_on! { v1_7 $crate::Version::V1_7 }
        $crate::tests_on! { newest_containerd }
    };
    (newest_containerd) => {
        $crate::test_on! { v2_1 $crate::Version::V2_1 }
    };
    (newest_in_every_mode) => {
        $crate::tests_on! { newest_containerd }
        $crate::tests_on! { sandbox_api }
    };
}
#[cfg(given_containerd)]
include!(concat!(env!("OUT_DIR"), "/given.rs"));

/// One test.
#[doc(hidden)]
#[macro_export]
macro_rules! test_on {
    ($name:ident $version:expr) => {
        #[test]
        fn $name() {
            $crate::vm::here_or_there(module_path!(), stringify!($name), || body($version));
        }
    };
}

/// Ends a test early on a machine or containerd that lacks the subject of the test. The test and the reason are written
/// to `target/lab/left-out.txt`: a run says what was not checked.
#[macro_export]
macro_rules! left_out {
    ($reason:expr) => {{
        $crate::lab::left_out(module_path!(), $reason);
        return;
    }};
}

/// Ends a test early under `SHIM_UNDER_TEST=runc`, when only our shim has the subject of the test. The test and the
/// reason are written to `target/lab/left-out.txt`, as by [`left_out`].
#[macro_export]
macro_rules! ours_only {
    ($reason:expr) => {
        if $crate::ShimUnderTest::get() == $crate::ShimUnderTest::Runc {
            $crate::left_out!(concat!("not on the stock shim: ", $reason));
        }
    };
}
