//! The kernel's side: children, cgroups, mounts.

pub mod cgroup;
pub mod exits;
pub mod mounts;
