//! CPU time of all that a containerd starts, however short it lives.
//!
//! On cgroup v1, containerd gets a cgroup of its own. Shims, runc, CNI plugins stay in that cgroup, and containers are in
//! others below the same parent; the parent's time is everybody's. On cgroup v2 the node is the bench's alone, so all that
//! is not containerd's and not the bench's counts: systemd and D-Bus, too, which work for pods there. containerd's own time
//! is known from the kernel's count, in ticks: one pod's figure is rough, the median of many is not.

use std::fs;
use std::path::{Path, PathBuf};

use shim_tests::cgroups::{self, Hierarchy, hierarchy};
use shim_tests::{Daemon, proc};

/// Whose time is counted.
pub(crate) struct Accounting {
    daemon: i32,
    /// On cgroup v1.
    own: Option<Own>,
}

/// The cgroup with containerd in it.
struct Own {
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
    /// Puts containerd into its cgroup, where it needs one.
    pub(crate) fn of(daemon: &Daemon) -> Self {
        let own = (hierarchy() == Hierarchy::V1).then(|| {
            let home = cgroups::directory(daemon.pid(), "cpuacct").unwrap();
            let parent = cgroups::root("cpuacct").join(daemon.names.name());
            let own = parent.join("containerd");
            fs::create_dir_all(&own).unwrap();
            enter(&own, daemon.pid()).unwrap();
            Own { parent, home }
        });
        Self {
            daemon: daemon.pid(),
            own,
        }
    }

    /// Takes it out again.
    pub(crate) fn end(&self) {
        if let Some(own) = &self.own {
            // It may have crashed.
            let _ = enter(&own.home, self.daemon);
            let _ = fs::remove_dir(own.parent.join("containerd"));
        }
    }

    /// What was used until now.
    pub(crate) fn used(&self) -> Used {
        let milliseconds = |pid| proc::cpu_time(pid).as_secs_f64() * 1e3;
        let containerd = milliseconds(self.daemon);
        let others = match &self.own {
            Some(own) => number(&own.parent.join("cpuacct.usage"), "") / 1e6 - containerd,
            None => {
                let all = cgroups::root("cpu").join("cpu.stat");
                let ourselves = rustix::process::getpid().as_raw_nonzero().get();
                number(&all, "usage_usec ") / 1e3 - containerd - milliseconds(ourselves)
            }
        };
        Used { containerd, others }
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
