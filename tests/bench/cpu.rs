//! CPU time of all that a containerd starts, however short it lives: containerd has a cgroup of its own.
//!
//! Shims, runc, CNI plugins stay in that cgroup, and containers are in others below the same parent; the parent's time
//! is everybody's. containerd's own is known from the kernel's count of it, in ticks: one pod's figure is rough, the median
//! of many is not.

use std::fs;
use std::path::{Path, PathBuf};

use shim_tests::cgroups::{self, Hierarchy, hierarchy};
use shim_tests::{Daemon, proc};

/// The cgroup with containerd in it.
pub(crate) struct Accounting {
    daemon: i32,
    parent: PathBuf,
    /// Where containerd was before.
    home: PathBuf,
}

/// Milliseconds of CPU time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Used {
    pub(crate) containerd: f64,
    /// Shims, runc, CNI plugins, pause processes, and the apps.
    pub(crate) others: f64,
}

impl Accounting {
    /// Puts containerd into its cgroup.
    pub(crate) fn of(daemon: &Daemon) -> Self {
        let home = cgroups::directory(daemon.pid(), "cpuacct").unwrap();
        let parent = cgroups::root("cpuacct").join(daemon.names.name());
        let own = parent.join("containerd");
        fs::create_dir_all(&own).unwrap();
        enter(&own, daemon.pid()).unwrap();
        Self {
            daemon: daemon.pid(),
            parent,
            home,
        }
    }

    /// Takes it out again.
    pub(crate) fn end(&self) {
        // It may have crashed.
        let _ = enter(&self.home, self.daemon);
        let _ = fs::remove_dir(self.parent.join("containerd"));
    }

    /// What was used until now.
    pub(crate) fn used(&self) -> Used {
        let all = match hierarchy() {
            Hierarchy::V1 => number(&self.parent.join("cpuacct.usage"), "") / 1e6,
            Hierarchy::V2 => number(&self.parent.join("cpu.stat"), "usage_usec ") / 1e3,
        };
        let containerd = proc::cpu_time(self.daemon).as_secs_f64() * 1e3;
        Used {
            containerd,
            others: all - containerd,
        }
    }
}

/// The number behind this word in the file.
fn number(file: &Path, word: &str) -> f64 {
    let text = fs::read_to_string(file).unwrap_or_default();
    let line = text.lines().find_map(|line| line.strip_prefix(word));
    let number = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
    number.unwrap_or_else(|| panic!("no number in {}: {text:?}", file.display()))
}

fn enter(cgroup: &Path, pid: i32) -> std::io::Result<()> {
    fs::write(cgroup.join("cgroup.procs"), pid.to_string())
}
