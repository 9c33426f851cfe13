//! containerd's side: the two ttrpc services, the events, the log.
//!
//! Wire types stay in this room and in `cli`, with two exceptions: `kernel::cgroup` fills containerd's metrics
//! messages, and `error` names the ttrpc codes.

pub mod callers;
pub mod checkpoint;
pub mod convert;
pub mod events;
pub mod logging;
pub mod options;
pub mod podconfig;
pub mod sandbox;
pub mod server;
pub mod task;
mod wire;
