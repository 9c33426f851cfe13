//! The kernel's side: children, work that blocks, cgroups, mounts.

pub mod blocking;
pub mod cgroup;
pub mod exits;
pub mod mounts;
