//! The kernel's side: reaping of children, blocking work, cgroups, mounts.

pub mod blocking;
pub mod cgroup;
pub mod exits;
pub mod mounts;
pub mod process;
