//! Processes, as `/proc` shows them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

/// A process. The start time tells a process from a later one with the same pid.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Process {
    /// Its pid.
    pub pid: i32,
    /// The start time, in clock ticks since boot.
    pub start: u64,
    /// Its parent's pid.
    pub parent: i32,
    /// The state: `R`, `S`, `Z`, …
    pub state: char,
    /// Number of threads.
    pub threads: usize,
    /// The name that the kernel has: at most 15 bytes of the program's name.
    pub name: String,
}

impl Process {
    /// The process with this pid, if there is one.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (open, close) = (stat.find('(')?, stat.rfind(')')?);
        let fields: Vec<&str> = stat[close + 1..].split_whitespace().collect();
        Some(Self {
            pid,
            start: fields.get(19)?.parse().ok()?,
            parent: fields.get(1)?.parse().ok()?,
            state: fields.first()?.chars().next()?,
            threads: fields.get(17)?.parse().ok()?,
            name: stat[open + 1..close].to_owned(),
        })
    }

    /// The arguments, joined by spaces; empty for a zombie or a kernel thread.
    pub fn command_line(&self) -> String {
        let raw = fs::read(format!("/proc/{}/cmdline", self.pid)).unwrap_or_default();
        String::from_utf8_lossy(&raw)
            .trim_end_matches('\0')
            .replace('\0', " ")
    }

    /// Whether this very process is still there.
    pub fn alive(&self) -> bool {
        Self::of(self.pid).is_some_and(|now| now.start == self.start)
    }

    /// For a failure text: pid, state, name, arguments.
    pub fn describe(&self) -> String {
        format!(
            "{} {} {} [{}]",
            self.pid,
            self.state,
            self.name,
            self.command_line()
        )
    }
}

/// All processes of the machine, kernel threads left out.
pub fn all() -> Vec<Process> {
    let Ok(entries) = fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter_map(Process::of)
        .filter(|process| process.parent != 2 && process.pid != 2)
        .collect()
}

/// The children of a process.
pub fn children(pid: i32) -> Vec<Process> {
    all()
        .into_iter()
        .filter(|process| process.parent == pid)
        .collect()
}

/// The processes of `roots` and their descendants, out of one listing.
pub fn with_descendants(roots: &BTreeSet<i32>, listing: &[Process]) -> Vec<Process> {
    let mut pids = roots.clone();
    loop {
        let before = pids.len();
        pids.extend(
            listing
                .iter()
                .filter(|process| pids.contains(&process.parent))
                .map(|p| p.pid)
                .collect::<Vec<_>>(),
        );
        if pids.len() == before {
            break;
        }
    }
    listing
        .iter()
        .filter(|process| pids.contains(&process.pid))
        .cloned()
        .collect()
}

/// The namespaces of a process or thread: kind → number.
pub fn namespaces(pid: i32) -> BTreeMap<&'static str, u64> {
    ["net", "ipc", "uts", "mnt", "pid", "user", "cgroup", "time"]
        .into_iter()
        .map(|kind| (kind, namespace(pid, kind)))
        .collect()
}

/// One namespace of a process or thread.
#[track_caller]
pub fn namespace(pid: i32, kind: &str) -> u64 {
    let path = format!("/proc/{pid}/ns/{kind}");
    let link = fs::read_link(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let link = link.to_string_lossy();
    link.split(['[', ']'])
        .nth(1)
        .and_then(|number| number.parse().ok())
        .unwrap_or_else(|| panic!("{path}: {link}"))
}

/// The private memory of a process in kB (`Private_Clean` + `Private_Dirty`).
pub fn private_kb(pid: i32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
    rollup
        .lines()
        .filter(|line| line.starts_with("Private_Clean:") || line.starts_with("Private_Dirty:"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u64>().ok())
        .sum()
}

/// The memory of a process that no file backs, in kB. Pages of the program file are left out: each counts as private or
/// shared, as other processes of the same program come and go.
pub fn anonymous_kb(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("RssAnon:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok())
        .unwrap()
}

/// The CPU time of a process and its threads, children left out; as exact as the kernel's clock tick.
#[track_caller]
pub fn cpu_time(pid: i32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<u64> = stat[stat.rfind(')').unwrap() + 1..]
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(|ticks| ticks.parse().unwrap())
        .collect();
    Duration::from_millis(
        fields.iter().sum::<u64>() * 1000 / rustix::param::clock_ticks_per_second(),
    )
}

/// The number of threads that a process has now.
pub fn threads(pid: i32) -> usize {
    Process::of(pid).map_or(0, |process| process.threads)
}

/// Whether we may make a process less likely to be killed for lack of memory: CAP_SYS_RESOURCE, number 24.
pub fn may_lower_oom_scores() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    effective
        .and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .is_some_and(|mask| mask & (1 << 24) != 0)
}

/// The names of a process's threads, for a failure text.
pub fn thread_names(pid: i32) -> Vec<String> {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
        return Vec::new();
    };
    tasks
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join("comm")).ok())
        .map(|name| name.trim().to_owned())
        .collect()
}

/// Sends a signal to one process.
pub fn kill(pid: i32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid).expect("a pid is never 0 here");
    rustix::process::kill_process(pid, signal)
        .unwrap_or_else(|error| panic!("kill {pid:?}: {error}"));
}
