//! The OCI runtime's side: the bundle and its spec, runc, and what the shim does without runc.

pub mod bundle;
mod call;
mod confinement;
pub mod criu;
pub mod leftovers;
pub(crate) mod log;
pub mod options;
pub mod release;
pub mod runc;
pub(crate) mod shortcuts;
pub mod spec;
pub mod teardown;
