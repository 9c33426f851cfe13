//! What a person on the node runs, and what that person is told: containerd and its configuration.
//!
//! Nothing here changes the node but `install`.

pub mod config;
pub mod containerd;
pub mod install;
