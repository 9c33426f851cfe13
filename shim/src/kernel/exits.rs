//! The reaper: the only place in the shim that reaps children. A [`Child`] is signalled from here, too.
//!
//! ```text
//!  SIGCHLD ──▶ reap all ──┬─ the pid is claimed ──────▶ the exit goes to the claimer
//!                         ├─ an `Expected` lives ─────▶ the exit is kept for a later claim
//!                         └─ neither (an orphan) ─────▶ the exit is dropped
//!
//!  Child::signal ──▶ is this claim still there? ──┬─ yes ─▶ kill(2)
//!                                                 └─ no ──▶ ESRCH: the process has been reaped
//! ```
//!
//! The shim is the subreaper of its containers (prctl(2)): orphans in the containers become children of the shim. The
//! shim may learn a pid only after the exit, because runc writes the pid into a file, and a short-lived process may
//! have ended by then. While an [`Expected`] lives, the reaper keeps exits that nobody has claimed. The reaper keeps no
//! exit for longer, because the kernel reuses pids.
//!
//! A claimed pid is always the pid of the claimed process. The kernel frees a pid when the process is reaped, only this
//! module reaps, and reaping removes the claim under the same lock. A signal to a claimed pid therefore needs no pidfd.

use std::collections::{BTreeSet, HashMap};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use log::{debug, warn};
use rustix::io::Errno;
use rustix::process::{
    Pid, Resource, Rlimit, Signal, WaitId, WaitIdOptions, WaitOptions, WaitStatus, getrlimit,
    kill_process, kill_process_group, setrlimit,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

use crate::error::{IoError, Result};

/// How a process ended, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The exit code, or 128 + the number of the signal that killed the process.
    pub status: u32,
    /// When the process was reaped.
    pub at: SystemTime,
}

impl Exit {
    /// An exit with `status`, now.
    pub fn now(status: u32) -> Self {
        Self {
            status,
            at: SystemTime::now(),
        }
    }

    fn from_wait(status: WaitStatus) -> Self {
        let code = status
            .exit_status()
            .or_else(|| status.terminating_signal().map(|signal| 128 + signal));
        Self::now(
            code.and_then(|code| u32::try_from(code).ok())
                .unwrap_or(255),
        )
    }
}

/// Resolves when the process ends.
pub type Exited = oneshot::Receiver<Exit>;

/// A process whose exit goes to the holder of this claim.
#[derive(Debug)]
pub struct Claim {
    /// To signal the process.
    pub child: Child,
    /// The exit.
    pub exit: Exited,
}

/// A claimed child. The child takes signals until the child is reaped.
#[derive(Debug, Clone)]
pub struct Child {
    exits: Arc<Exits>,
    pid: Pid,
    claim: u64,
}

impl Child {
    /// The pid in the node's process namespace.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends `signal`. A zombie takes every signal, without an effect.
    ///
    /// # Errors
    /// `ESRCH` when the process has been reaped, and the errors of kill(2).
    pub fn signal(&self, signal: Signal) -> rustix::io::Result<()> {
        self.unless_reaped(|pid| kill_process(pid, signal))
    }

    /// Sends SIGKILL to the process group that the process leads, see [`std::os::unix::process::CommandExt::process_group`].
    ///
    /// # Errors
    /// As [`Child::signal`].
    pub fn kill_group(&self) -> rustix::io::Result<()> {
        self.unless_reaped(|pid| kill_process_group(pid, Signal::KILL))
    }

    fn unless_reaped(
        &self,
        send: impl FnOnce(Pid) -> rustix::io::Result<()>,
    ) -> rustix::io::Result<()> {
        // The lock keeps the reaper from reaping, so the pid stays the pid of this process.
        let books = self.exits.books();
        match books.claimed.get(&self.pid) {
            Some(claimed) if claimed.number == self.claim => send(self.pid),
            Some(_) | None => Err(Errno::SRCH),
        }
    }

    /// Whether a SIGKILL is pending (proc(5), `SigPnd` and `ShdPnd`). In a process that cgroup v1 has frozen, a SIGKILL
    /// stays pending until the process is thawed.
    pub fn has_kill_pending(&self) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid));
        status.is_ok_and(|status| has_kill_pending(&status))
    }
}

fn has_kill_pending(status: &str) -> bool {
    const SIGKILL: u64 = 1 << (9 - 1);
    ["SigPnd:", "ShdPnd:"].into_iter().any(|field| {
        let mask = status.lines().find_map(|line| line.strip_prefix(field));
        mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok())
            .is_some_and(|mask| mask & SIGKILL != 0)
    })
}

/// The reaper, shared by everybody who has children. The lock is never held across an await.
#[derive(Debug, Default)]
pub struct Exits {
    books: Mutex<Books>,
    /// The limit of open files that children get; none where that is the shim's own limit.
    open_files: Option<Rlimit>,
}

#[derive(Debug, Default)]
struct Books {
    claimed: HashMap<Pid, Claimed>,
    last_claim: u64,
    /// Kept exits. The number is that of the newest [`Expected`] at the time when the process was reaped.
    unclaimed: HashMap<Pid, (u64, Exit)>,
    /// The numbers of all [`Expected`] that live.
    expected: BTreeSet<u64>,
    last_expected: u64,
}

#[derive(Debug)]
struct Claimed {
    /// Distinguishes two claims of the same pid.
    number: u64,
    exit: oneshot::Sender<Exit>,
}

impl Books {
    fn claim(&mut self, pid: Pid, exit: oneshot::Sender<Exit>) -> u64 {
        self.last_claim += 1;
        let number = self.last_claim;
        self.claimed.insert(pid, Claimed { number, exit });
        number
    }

    /// A process has been reaped.
    fn ended(&mut self, pid: Pid, exit: Exit) {
        if let Some(claimed) = self.claimed.remove(&pid) {
            // The claimer may be gone. Nobody else wants the exit.
            let _ = claimed.exit.send(exit);
        } else if !self.expected.is_empty() {
            let during = self.last_expected;
            self.unclaimed.insert(pid, (during, exit));
        } else {
            debug!(pid:%, status = exit.status; "orphan reaped");
        }
    }
}

/// While an `Expected` lives, the reaper keeps the exits of unclaimed processes for a later [`Exits::claim`].
#[derive(Debug)]
pub struct Expected {
    exits: Arc<Exits>,
    number: u64,
}

impl Drop for Expected {
    fn drop(&mut self) {
        let mut books = self.exits.books();
        books.expected.remove(&self.number);
        // Drops exits older than the oldest `Expected` that lives; otherwise a busy pod would never clear the map.
        let oldest = books.expected.first().copied();
        books
            .unclaimed
            .retain(|_, (during, _)| oldest.is_some_and(|oldest| *during >= oldest));
    }
}

impl Exits {
    /// Makes this process the subreaper of its descendants (prctl(2)), and starts the reaper task.
    ///
    /// Raises the soft limit of open files to the hard limit: an exec with all its streams takes eleven descriptors,
    /// and a service manager may give containerd 1024. Children get the limit from before, which the containers
    /// inherit.
    ///
    /// # Errors
    /// `Io` when the kernel refuses the subreaper attribute or the signal handler.
    pub fn watch() -> Result<Arc<Self>> {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
            .map_err(IoError::at("become subreaper of", "/proc/self"))?;
        let mut children =
            signal(SignalKind::child()).map_err(IoError::at("handle SIGCHLD of", "/proc/self"))?;
        let exits = Arc::new(Self {
            open_files: raise_open_files(),
            ..Self::default()
        });
        let waiter = exits.clone();
        tokio::spawn(async move {
            while children.recv().await.is_some() {
                waiter.reap();
            }
        });
        Ok(exits)
    }

    fn reap(&self) {
        // The lock is held from wait(2) on. Otherwise a signal could go to a pid that is reaped and still claimed.
        let mut books = self.books();
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => books.ended(pid, Exit::from_wait(status)),
                Ok(None) | Err(Errno::CHILD) => return,
                Err(Errno::INTR) => {}
                Err(error) => return warn!(error:%; "children not waited for"),
            }
        }
    }

    /// Keeps the exits of unclaimed processes until the returned [`Expected`] is dropped.
    pub fn expect(self: &Arc<Self>) -> Expected {
        let mut books = self.books();
        books.last_expected += 1;
        let number = books.last_expected;
        books.expected.insert(number);
        Expected {
            exits: self.clone(),
            number,
        }
    }

    /// Claims the exit of `pid`: the kept exit, if the process was reaped while an [`Expected`] lived, otherwise the
    /// exit to come.
    pub fn claim(self: &Arc<Self>, pid: Pid) -> Claim {
        let (sender, exit) = oneshot::channel();
        let mut books = self.books();
        let claim = match books.unclaimed.remove(&pid) {
            Some((_, past)) if !is_unreaped(pid) => {
                let _ = sender.send(past);
                // No claim has the number 0: the process is reaped and takes no signal.
                0
            }
            // A kept exit of a pid that is not reaped yet belongs to an earlier process: an orphan with the same pid.
            _ => books.claim(pid, sender),
        };
        Claim {
            child: self.child(pid, claim),
            exit,
        }
    }

    /// Starts `command` and claims the exit of the child.
    ///
    /// # Errors
    /// The errors of `Command::spawn`.
    pub fn spawn(self: &Arc<Self>, command: &mut Command) -> std::io::Result<Claim> {
        if let Some(limit) = &self.open_files {
            pause::limit_open_files(command, *limit);
        }
        let (sender, exit) = oneshot::channel();
        // The lock is held so that the child is not reaped before the claim. `std::process::Child` is dropped without a
        // wait, which would take the exit away from the reaper.
        let mut books = self.books();
        let pid = Pid::from_child(&command.spawn()?);
        let claim = books.claim(pid, sender);
        Ok(Claim {
            child: self.child(pid, claim),
            exit,
        })
    }

    fn child(self: &Arc<Self>, pid: Pid, claim: u64) -> Child {
        Child {
            exits: self.clone(),
            pid,
            claim,
        }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Raises the soft limit of open files to the hard limit. Returns the limit from before, if the limit has changed.
fn raise_open_files() -> Option<Rlimit> {
    let before = getrlimit(Resource::Nofile);
    if before.current == before.maximum {
        return None;
    }
    let raised = Rlimit {
        current: before.maximum,
        maximum: before.maximum,
    };
    match setrlimit(Resource::Nofile, raised) {
        Ok(()) => Some(before),
        Err(error) => {
            warn!(error:%; "limit of open files not raised");
            None
        }
    }
}

/// Whether `pid` is a child that has ended or runs and is not reaped yet (waitid(2): `ECHILD` if there is no such
/// child).
fn is_unreaped(pid: Pid) -> bool {
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    rustix::process::waitid(WaitId::Pid(pid), look).is_ok()
}

#[cfg(test)]
mod tests;
