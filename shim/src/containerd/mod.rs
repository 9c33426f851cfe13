//! containerd's side: the two ttrpc services, the events, the log. Wire types live here and in `cli`, and nowhere else.

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
