//! A cgroup's counters as containerd's metrics.

mod v1;
mod v2;

use containerd_shim_protos::{cgroups, cgroups_v2};

use super::{Cgroup, Directory, Hierarchy};
use crate::error::IoError;

/// The counters of one cgroup. v1 counts time in nanoseconds, v2 in microseconds.
///
/// The two messages are containerd's own. Own types would repeat some eighty fields and add nothing.
#[derive(Debug, Clone, PartialEq)]
pub enum Metrics {
    /// `io.containerd.cgroups.v1.Metrics`.
    V1(Box<cgroups::metrics::Metrics>),
    /// `io.containerd.cgroups.v2.Metrics`.
    V2(Box<cgroups_v2::metrics::Metrics>),
}

impl Cgroup {
    /// The kernel's counters. A missing controller or file leaves its fields out, or zero.
    ///
    /// # Errors
    /// `NotFound` if the cgroup exists in no hierarchy, or is the root of every hierarchy.
    pub fn stats(&self) -> Result<Metrics, IoError> {
        let exists =
            |directory: &Directory| directory.path != directory.root && directory.path.is_dir();
        if !self.directories.iter().any(exists) {
            return Err(self.not_found("read the statistics of the cgroup"));
        }
        Ok(match self.hierarchy {
            Hierarchy::V1 => Metrics::V1(Box::new(v1::metrics(self))),
            Hierarchy::V2 => Metrics::V2(Box::new(v2::metrics(self))),
        })
    }
}
