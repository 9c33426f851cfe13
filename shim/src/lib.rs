//! `containerd-shim-pause-v2`: a containerd runtime-v2 shim with the pause container built in.
//!
//! ```text
//!                    ┌ start  ─▶ boot      makes or finds the pod's server, answers where it listens
//!  containerd ─exec──┼ delete ─▶ cleanup   takes down what a dead server has left
//!                    ├ -v, -info           says who it is
//!                    └ (none) ─▶ server ─▶ task, sandbox ─▶ pod ─┬▶ container ─▶ runc, io, cgroup, mounts, exits, events
//!                                                                └▶ holder ─▶ the crate `pause`, podfiles
//! ```
#![forbid(unsafe_code)]

pub mod cli;
pub mod container;
pub mod containerd;
pub mod error;
pub mod io;
pub mod kernel;
pub mod pod;
pub mod runtime;
