//! What a pod costs beside its apps: the processes of shim and pause, and their memory.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use crate::Daemon;
use crate::proc::{self, Process};
use crate::until::{ok_if, within};

/// Memory of one or more processes, in kB.
#[derive(Clone, Copy, Debug, Default)]
pub struct Memory {
    /// Pages that only these processes have.
    pub private: u64,
    /// Proportional set size: a page that n processes share counts as an nth.
    pub pss: u64,
    /// Resident set size: all pages in memory, shared or not.
    pub rss: u64,
}

impl Memory {
    /// The memory of these processes together.
    pub fn of<'a>(processes: impl IntoIterator<Item = &'a Process>) -> Self {
        let mut sum = Self::default();
        for process in processes {
            let rollup = fs::read_to_string(format!("/proc/{}/smaps_rollup", process.pid));
            let rollup = rollup.unwrap_or_default();
            sum.private += proc::private_kb(process.pid);
            sum.pss += kb(&rollup, "Pss:");
            sum.rss += kb(&rollup, "Rss:");
        }
        sum
    }
}

fn kb(rollup: &str, field: &str) -> u64 {
    let line = rollup.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or_default()
}

/// Whether the process is a shim, and not a pause process.
pub fn is_shim(process: &Process) -> bool {
    process.command_line().contains("containerd-shim-")
}

/// The processes of the slot that belong to no app and are not in `before`. `apps` are the first processes of the apps.
///
/// # Errors
/// When a runc does not end.
pub fn beside_the_apps(
    daemon: &Daemon,
    before: &BTreeSet<i32>,
    apps: &BTreeSet<i32>,
) -> Result<Vec<Process>, String> {
    let is_runc = |process: &Process| process.name.starts_with("runc");
    within(Duration::from_secs(5), || {
        let all = daemon.processes();
        let of_apps: BTreeSet<i32> = proc::with_descendants(apps, &all)
            .iter()
            .map(|one| one.pid)
            .collect();
        let others: Vec<Process> = all
            .into_iter()
            .filter(|one| !of_apps.contains(&one.pid) && !before.contains(&one.pid))
            .collect();
        // A runc that just ended may still be there for a moment.
        ok_if(!others.iter().any(is_runc), || {
            "runc does not end".to_owned()
        })
        .map(|()| others)
    })
}
