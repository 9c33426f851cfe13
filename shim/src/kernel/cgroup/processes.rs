//! The processes of a cgroup: find, freeze, thaw and kill them.

use std::collections::BTreeSet;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::path::DecInt;
use rustix::process::{Pid, PidfdFlags, Signal, getpid, pidfd_open, pidfd_send_signal};

use super::{Cgroup, Directory, Hierarchy, PROCS, Pause, before, failed, v1, v2, write};
use crate::error::IoError;

/// How long freezing, thawing and killing may take. Uninterruptible IO is what takes long.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long killing waits for a freeze, which it can do without.
const PATIENCE_BEFORE_KILL: Duration = Duration::from_millis(100);

/// Readies the kernel for a process that is about to be moved into another cgroup.
///
/// A move takes a lock against all forks (`cgroup_threadgroup_rwsem` of kernel/cgroup/cgroup.c). Whoever takes it first
/// waits for an RCU grace period, some 8 ms of doing nothing; whoever takes it soon after that does not
/// (kernel/rcu/sync.c). runc, which has just been started, comes to it some 10 ms later.
#[derive(Debug)]
pub struct MoveInPlace {
    procs: PathBuf,
    pid: Pid,
}

impl MoveInPlace {
    /// Of a process that has just been started: to where it is.
    ///
    /// # Errors
    /// As [`Cgroup::of_pid`].
    pub fn of(pid: Pid) -> Result<Self, IoError> {
        let cgroup = Cgroup::of_pid(pid)?;
        // Any hierarchy will do: there is one lock for all. A cpuset may refuse.
        let directory = cgroup.find("pids").or(cgroup.directories.first());
        let directory = directory.ok_or_else(|| cgroup.not_found("find"))?;
        Ok(Self {
            procs: directory.path.join(PROCS),
            pid,
        })
    }

    /// Takes the lock, and changes nothing.
    pub fn make(self) -> Result<(), IoError> {
        // One write of a few bytes: no memory is taken from the thread's own heap.
        let pid = DecInt::new(self.pid.as_raw_nonzero().get());
        OpenOptions::new()
            .write(true)
            .open(&self.procs)
            .and_then(|mut file| file.write_all(pid.as_bytes()))
            .map_err(|error| failed("write to", &self.procs)(error))
    }
}

impl Cgroup {
    /// The processes in it and in the cgroups below it, sorted, each once, as the shim's pid namespace has their pids.
    ///
    /// # Errors
    /// `NotFound` if it does not exist; `InvalidInput` for the root.
    pub fn pids(&self) -> Result<Vec<Pid>, IoError> {
        let operation = "list the processes of the cgroup";
        let top = &self.existing(operation)?.path;
        let mut pids = BTreeSet::new();
        let mut directories = vec![top.clone()];
        while let Some(directory) = directories.pop() {
            match fs::read_to_string(directory.join(PROCS)) {
                // A process of another pid namespace has the pid 0 and is left out.
                Ok(text) => pids.extend(
                    text.lines()
                        .filter_map(|line| line.parse::<i32>().ok())
                        .filter(|pid| *pid > 0),
                ),
                Err(error) if directory == *top => return Err(failed(operation, top)(error)),
                // Below the top cgroups come and go; one with threads only (v2) refuses, and its parent has the pids.
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

    /// Stops all its processes and those below it, and returns when they have stopped. They are thawed again if that
    /// takes more than five seconds.
    ///
    /// # Errors
    /// `TimedOut`; `NotFound` if it does not exist; `InvalidInput` if the shim is in it, or for the root.
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
            log::warn!("undo after a freeze that failed: {error}");
        }
        frozen
    }

    /// Lets its processes go on. Nothing happens to one that is not frozen.
    ///
    /// # Errors
    /// `TimedOut` if that takes more than five seconds (as it does if a parent is frozen); `NotFound` if it does not
    /// exist; `InvalidInput` for the root.
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

    /// Kills its processes and those below it, frozen or not, and returns when there are none (a zombie is none).
    ///
    /// # Errors
    /// `TimedOut` if some are left after five seconds; `NotFound` if it does not exist; `InvalidInput` if the shim is in
    /// it, or for the root.
    pub fn kill_all(&self) -> Result<(), IoError> {
        let operation = "kill the processes of the cgroup";
        self.refuse_own(operation)?;
        let path = &self.existing(operation)?.path;
        let deadline = Instant::now() + PATIENCE;
        let mut pause = Pause::default();
        loop {
            if self.remaining()?.is_empty() {
                return Ok(());
            }
            if !before(deadline) {
                return Err(failed(operation, path)(io::ErrorKind::TimedOut.into()));
            }
            match self.hierarchy {
                // Linux 5.14 and later do it for us, and no fork escapes.
                Hierarchy::V2 if write(path, "cgroup.kill", "1").is_ok() => {}
                Hierarchy::V1 | Hierarchy::V2 => self.kill_each()?,
            }
            pause.sleep();
        }
    }

    /// One SIGKILL for each process that is in it now.
    pub(super) fn kill_each(&self) -> Result<(), IoError> {
        // Frozen, none forks away while the list is worked off. Unfrozen works as well, only not at once.
        let frozen = self.freeze_within(PATIENCE_BEFORE_KILL);
        let candidates = self.remaining()?;
        let open = |pid: Pid| Some((pid, pidfd_open(pid, PidfdFlags::empty()).ok()?));
        let opened: Vec<_> = candidates.into_iter().filter_map(open).collect();
        // A pid may have become somebody else's before it was opened. What is in the cgroup still, is what we opened.
        let still_here = self.remaining()?;
        for (pid, process) in opened.iter().filter(|(pid, _)| still_here.contains(pid)) {
            match pidfd_send_signal(process, Signal::KILL) {
                Ok(()) | Err(Errno::SRCH) => {}
                Err(error) => log::warn!("kill process {}: {error}", pid.as_raw_nonzero()),
            }
        }
        // v1 delivers no signal to a frozen process; and it may have been frozen before we came.
        match self.thaw() {
            Err(error) if frozen.is_ok() && !gone(&error) => Err(error),
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// As [`Self::pids`]; none if it has gone, as systemd removes a scope whose last process has.
    ///
    /// # Errors
    /// `InvalidInput` for the root.
    pub fn remaining(&self) -> Result<Vec<Pid>, IoError> {
        match self.pids() {
            Err(error) if gone(&error) => Ok(Vec::new()),
            result => result,
        }
    }

    /// Its directory in the hierarchy to look for processes in: in v1 any will do that has it.
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

    /// An error if the shim itself is in it, or below.
    pub(super) fn refuse_own(&self, operation: &'static str) -> Result<(), IoError> {
        if self.pids()?.contains(&getpid()) {
            let error = io::Error::new(io::ErrorKind::InvalidInput, "the shim itself is in it");
            return Err(failed(operation, self.any_path())(error));
        }
        Ok(())
    }
}

/// Whether an operation failed because the cgroup has been removed: ENODEV is for a file that was open already.
fn gone(error: &IoError) -> bool {
    error.source.kind() == io::ErrorKind::NotFound
        || error.source.raw_os_error() == Some(Errno::NODEV.raw_os_error())
}
