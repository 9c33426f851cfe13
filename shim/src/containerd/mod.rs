//! containerd's side: the two ttrpc services, the events, the log. Wire types live here and in `cli`, and nowhere else.

pub mod callers;
pub mod convert;
pub mod events;
pub mod logging;
pub mod sandbox;
pub mod server;
pub mod task;
