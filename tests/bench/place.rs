//! Where the shims run.
//!
//! ```text
//!   bench ── node::Node::boot ── systemd-run ── bench --inside PLACE ── containerd, shims
//!     │       (namespaces)        (a service)                │
//!     └──────────────── run.json: all figures ───────────────┘
//! ```

use std::{env, fs};

use shim_tests::daemon::Driver;
use shim_tests::node::Node;
use shim_tests::{Version, lab, screen};

use crate::columns::Shim;
use crate::report::Run;

/// Where the shims run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    /// A node in namespaces, with systemd as PID 1 and as the cgroup driver, and cgroup v2.
    Systemd,
    /// The same, while another client starts and ends containers and execs all the time.
    Busy,
    /// This machine as it is, without systemd's cgroup driver.
    Machine,
}

impl Place {
    /// In the order in which they are measured and reported.
    pub(crate) const ALL: [Self; 3] = [Self::Systemd, Self::Busy, Self::Machine];

    /// Its name on the command line.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Systemd => "systemd",
            Self::Busy => "busy",
            Self::Machine => "machine",
        }
    }

    /// What is said of it in a title.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::Systemd => "cgroup v2, systemd's cgroups, quiet",
            Self::Busy => "cgroup v2, systemd's cgroups, busy with another pod",
            Self::Machine => "this machine, cgroups made by the runtime",
        }
    }

    /// The cgroup driver.
    pub(crate) fn driver(self) -> Driver {
        match self {
            Self::Systemd | Self::Busy => Driver::Systemd,
            Self::Machine => Driver::Cgroupfs,
        }
    }

    /// Whether bench measures this shim here.
    pub(crate) fn has(self, shim: Shim) -> bool {
        match shim {
            Shim::This | Shim::Stock => true,
            Shim::ThisCrun | Shim::StockCrun => self == Self::Systemd,
            Shim::Api | Shim::Published => self != Self::Busy,
        }
    }
}

/// Measures one containerd on a node: runs this program again, there. Gives what was measured, also when that was not all.
pub(crate) fn elsewhere(place: Place, version: Version) -> Result<Run, String> {
    let node = Node::with_the_lab(version)?;
    let mut arguments: Vec<String> = env::args().skip(1).collect();
    let more = [
        "--inside",
        place.name(),
        "--containerd",
        &version.line(),
        "--out",
        "/data",
    ];
    arguments.extend(more.map(str::to_owned));
    // `RUNC`, or the newest: nodes that have cgroup v2 have that, too.
    let runc = match env::var_os("RUNC").filter(|named| !named.is_empty()) {
        Some(_) => lab::runc(),
        None => lab::newer_runtime("runc"),
    };
    let status = node.run_again(&arguments, &runc);
    let measured = fs::read(node.data().join("run.json"))
        .map_err(|_| format!("nothing was measured in the node: {status}"))?;
    if !status.success() {
        screen::alarm(&format!("The bench in the node did not end well: {status}"));
    }
    Ok(Run::from_json(&measured, place, version))
}
