//! The processes of a cgroup: list, freeze, thaw, kill.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal};

use super::{Backoff, Cgroup, Directory, Hierarchy, PROCS, before, failed, v1, v2, write};
use crate::error::IoError;

/// The longest wait of freeze, thaw and kill. Only a process in uninterruptible IO needs such a long wait.
const PATIENCE: Duration = Duration::from_secs(5);

/// The longest wait for the freeze before a kill. The kill also works without the freeze.
const PATIENCE_BEFORE_KILL: Duration = Duration::from_millis(100);

/// How many processes are open at a time: descriptors are few, processes may be many.
const OPEN_AT_ONCE: usize = 100;

/// Prepares the kernel for a process that is about to move into another cgroup.
///
/// A move takes a lock against all forks (`cgroup_threadgroup_rwsem` of kernel/cgroup/cgroup.c). The first taker of the
/// lock sleeps for an RCU grace period, some 8 ms; takers soon afterwards do not (kernel/rcu/sync.c). A runc that has
/// just been started takes the lock some 10 ms after its start, so a move in place made at its start saves runc the
/// sleep. Any process may make that move, and the shim makes its own.
#[derive(Debug)]
pub struct MoveInPlace {
    procs: PathBuf,
}

impl MoveInPlace {
    /// Plans the move of the shim to the cgroup that the shim is in already.
    ///
    /// # Errors
    /// The errors of [`Cgroup::of_pid`].
    pub fn of_the_shim() -> Result<Self, IoError> {
        let cgroup = Cgroup::of_pid(getpid())?;
        // Any hierarchy will do: all share one lock. Preferably not cpuset, which may refuse a move.
        let directory = cgroup.find("pids").or(cgroup.directories.first());
        let directory = directory.ok_or_else(|| cgroup.not_found("find"))?;
        Ok(Self {
            procs: directory.path.join(PROCS),
        })
    }

    /// Makes the move: takes the lock and changes nothing.
    ///
    /// # Errors
    /// The errors of open(2) and write(2).
    pub fn make(self) -> Result<(), IoError> {
        // 0 is the writer, so no stranger can be moved. The thread's own heap allocates nothing.
        OpenOptions::new()
            .write(true)
            .open(&self.procs)
            .and_then(|mut file| file.write_all(b"0"))
            .map_err(|error| failed("write to", &self.procs)(error))
    }
}

impl Cgroup {
    /// The processes in the cgroup and in the cgroups below, each once, sorted. The pids are those of the shim's pid
    /// namespace.
    ///
    /// # Errors
    /// `NotFound` if the cgroup does not exist; `InvalidInput` for the root.
    pub fn pids(&self) -> Result<Vec<Pid>, IoError> {
        let operation = "list the processes of the cgroup";
        let top = &self.existing(operation)?.path;
        let mut pids = BTreeSet::new();
        let mut directories = vec![top.clone()];
        while let Some(directory) = directories.pop() {
            match fs::read_to_string(directory.join(PROCS)) {
                // The kernel writes 0 for a process that the shim's pid namespace does not have.
                Ok(text) => pids.extend(
                    text.lines()
                        .filter_map(|line| line.parse::<i32>().ok())
                        .filter(|pid| *pid > 0),
                ),
                Err(error) if directory == *top => return Err(failed(operation, top)(error)),
                // Cgroups below the top come and go. A threaded one (v2) refuses the read; its parent lists its pids.
                Err(_) => continue,
            }
            if let Ok(entries) = fs::read_dir(&directory) {
                let is_directory =
                    |entry: &fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_dir());
                directories.extend(
                    entries
                        .filter_map(Result::ok)
                        .filter(is_directory)
                        .map(|entry| entry.path()),
                );
            }
        }
        Ok(pids.into_iter().filter_map(Pid::from_raw).collect())
    }

    /// Freezes all processes of the cgroup and of the cgroups below, and returns when all are frozen. A freeze that
    /// takes more than five seconds is undone.
    ///
    /// # Errors
    /// `TimedOut` after five seconds; `NotFound` if the cgroup does not exist; `InvalidInput` if the shim is in the
    /// cgroup, or for the root.
    pub fn freeze(&self) -> Result<(), IoError> {
        self.refuse_own("freeze the cgroup")?;
        self.freeze_within(PATIENCE)
    }

    fn freeze_within(&self, patience: Duration) -> Result<(), IoError> {
        let path = self.freezer("freeze the cgroup")?;
        let frozen = match self.hierarchy {
            Hierarchy::V1 => v1::freeze(path, patience),
            Hierarchy::V2 => v2::freeze(path, patience),
        };
        if frozen.as_ref().is_err_and(|error| !gone(error))
            && let Err(error) = self.thaw()
        {
            log::warn!(error:%; "cgroup stays frozen after a freeze that failed");
        }
        frozen
    }

    /// Thaws the cgroup's processes. A process that is not frozen is not affected.
    ///
    /// # Errors
    /// `TimedOut` after five seconds, for example if a parent is frozen; `NotFound` if the cgroup does not exist;
    /// `InvalidInput` for the root.
    pub fn thaw(&self) -> Result<(), IoError> {
        let path = self.freezer("thaw the cgroup")?;
        match self.hierarchy {
            Hierarchy::V1 => v1::thaw(path, PATIENCE),
            Hierarchy::V2 => v2::thaw(path, PATIENCE),
        }
    }

    fn freezer(&self, operation: &'static str) -> Result<&Path, IoError> {
        let directory = self
            .find("freezer")
            .ok_or_else(|| self.not_found(operation))?;
        directory.refuse_root(operation)?;
        Ok(&directory.path)
    }

    /// Kills the processes of the cgroup and of the cgroups below, frozen or not, and returns when none is left. A
    /// zombie does not count.
    ///
    /// # Errors
    /// `TimedOut` if processes are left after five seconds; `NotFound` if the cgroup does not exist; `InvalidInput` if
    /// the shim is in the cgroup, or for the root.
    pub fn kill_all(&self) -> Result<(), IoError> {
        let operation = "kill the processes of the cgroup";
        self.refuse_own(operation)?;
        let path = &self.existing(operation)?.path;
        let deadline = Instant::now() + PATIENCE;
        let mut backoff = Backoff::default();
        loop {
            if self.remaining()?.is_empty() {
                return Ok(());
            }
            if !before(deadline) {
                return Err(failed(operation, path)(io::ErrorKind::TimedOut.into()));
            }
            match self.hierarchy {
                // Linux 5.14 and later: the kernel kills all processes at once, and no fork escapes.
                Hierarchy::V2 if write(path, "cgroup.kill", "1").is_ok() => {}
                Hierarchy::V1 | Hierarchy::V2 => self.kill_each()?,
            }
            backoff.sleep();
        }
    }

    /// Sends SIGKILL to each process that is in the cgroup now.
    pub(super) fn kill_each(&self) -> Result<(), IoError> {
        // A frozen process cannot fork while the list is worked through. Without a freeze the kill takes more rounds.
        let frozen = self.freeze_within(PATIENCE_BEFORE_KILL);
        let killed = match self.signal_each(Signal::KILL) {
            Err(error) if !gone(&error) => Err(error),
            Ok(()) | Err(_) => Ok(()),
        };
        // v1 delivers no signal to a frozen process, and the cgroup may have been frozen before the kill.
        match self.thaw() {
            Err(error) if frozen.is_ok() && !gone(&error) => killed.and(Err(error)),
            Ok(()) | Err(_) => killed,
        }
    }

    /// Sends `signal` to each process that is in the cgroup, or in a cgroup below, now.
    ///
    /// # Errors
    /// `NotFound` if the cgroup does not exist; `InvalidInput` for the root.
    pub fn signal_each(&self, signal: Signal) -> Result<(), IoError> {
        for pids in self.pids()?.chunks(OPEN_AT_ONCE) {
            let open = |pid: &Pid| Some((*pid, pidfd_open(*pid, PidfdFlags::empty()).ok()?));
            let opened: Vec<_> = pids.iter().filter_map(open).collect();
            // Guards against a reused pid: a pid that the cgroup still lists after the open belongs to the opened
            // process.
            let still_here = self.remaining()?;
            for (pid, process) in opened.iter().filter(|(pid, _)| still_here.contains(pid)) {
                match pidfd_send_signal(process, signal) {
                    Ok(()) | Err(Errno::SRCH) => {}
                    Err(error) => log::warn!(pid:%, error:%; "process not signalled"),
                }
            }
        }
        Ok(())
    }

    /// Thaws the cgroup's processes, if the cgroup is frozen. On v1 a frozen process does not die before the thaw.
    ///
    /// # Errors
    /// As [`Self::thaw`]; a cgroup that does not exist is no error.
    pub fn thaw_if_frozen(&self) -> Result<(), IoError> {
        match self
            .is_frozen()
            .and_then(|frozen| if frozen { self.thaw() } else { Ok(()) })
        {
            Err(error) if !gone(&error) => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    fn is_frozen(&self) -> Result<bool, IoError> {
        let path = self.freezer("look whether the cgroup is frozen")?;
        match self.hierarchy {
            Hierarchy::V1 => v1::is_frozen(path),
            Hierarchy::V2 => v2::is_frozen(path),
        }
    }

    /// As [`Self::pids`], but empty for a cgroup that has gone: systemd removes a scope after the end of its last
    /// process.
    ///
    /// # Errors
    /// `InvalidInput` for the root.
    pub fn remaining(&self) -> Result<Vec<Pid>, IoError> {
        match self.pids() {
            Err(error) if gone(&error) => Ok(Vec::new()),
            result => result,
        }
    }

    /// The directory to list processes from. v1: any hierarchy that has the cgroup will do.
    fn existing(&self, operation: &'static str) -> Result<&Directory, IoError> {
        let preferred = ["pids", "memory", "freezer"]
            .into_iter()
            .filter_map(|controller| self.find(controller));
        let found = preferred
            .chain(&self.directories)
            .find(|directory| directory.path.is_dir());
        let directory = found.ok_or_else(|| self.not_found(operation))?;
        directory.refuse_root(operation)?;
        Ok(directory)
    }

    /// An error if the shim itself is in the cgroup, or below.
    pub(super) fn refuse_own(&self, operation: &'static str) -> Result<(), IoError> {
        if self.pids()?.contains(&getpid()) {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "the shim itself is in it");
            return Err(failed(operation, self.any_path())(error));
        }
        Ok(())
    }
}

/// Whether an operation failed because the cgroup has been removed. A file that was open before the removal reports
/// ENODEV.
fn gone(error: &IoError) -> bool {
    error.source.kind() == io::ErrorKind::NotFound
        || error.source.raw_os_error() == Some(Errno::NODEV.raw_os_error())
}
