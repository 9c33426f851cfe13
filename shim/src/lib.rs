//! `containerd-shim-pause-v2`: a containerd runtime-v2 shim with the pause container built in.
//!
//! ```text
//!  containerd ──exec──▶ cli          start, delete, -info, or the server
//!  a person ────exec──▶ node         what is on this node
//!  containerd ──ttrpc─▶ containerd   the Task and the Sandbox service, the publisher of events
//!                          │
//!                         pod        which id is which container, the sandbox, when the shim ends
//!                          │
//!                       container    one task per container: the init, the execs, the order of events
//!                          │
//!                        runtime     runc, the bundle and the spec, the options, the teardown
//!                          │
//!                          io        the streams of a process
//!                          │
//!                        kernel      reaping, blocking work, cgroups, mounts
//!                          │
//!                        error       the one error, and the one table to ttrpc codes
//! ```
//!
//! A room uses the rooms below, and none above. The crate `pause` makes the namespaces and what holds the namespaces.
#![forbid(unsafe_code)]

pub mod cli;
pub mod container;
pub mod containerd;
pub mod error;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
pub mod io;
pub mod kernel;
pub mod node;
pub mod pod;
pub mod runtime;
