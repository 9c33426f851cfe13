//! The only place that waits for children, and the place that signals them.
//!
//! ```text
//!  SIGCHLD ──▶ reap everything ──┬─ the pid is claimed ─────────────▶ its channel
//!                                ├─ a pid is still to become known ─▶ kept until the claim
//!                                └─ neither (an orphan) ────────────▶ dropped
//!
//!  Child::signal ──▶ the pid is still claimed? ──┬─ yes ─▶ kill(2)
//!                                                └─ no ──▶ ESRCH
//! ```
//!
//! The shim is the subreaper of its containers (prctl(2)), so the kernel hands the shim processes whose pid the shim learns
//! later than their exit: runc writes the pid into a file, and a short-lived process may have ended by then. While an
//! [`Expected`] lives, the waiter keeps exits that nobody has claimed. It keeps none for longer, because the kernel reuses
//! pids.
//!
//! A pid that is claimed belongs to our process: the kernel frees a pid when the process is reaped, only this module reaps,
//! and reaping takes the claim away under the same lock. A signal to a claimed pid therefore needs no pidfd.

use std::collections::{BTreeSet, HashMap};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use log::{debug, warn};
use rustix::io::Errno;
use rustix::process::{
    Pid, Resource, Rlimit, Signal, WaitId, WaitIdOptions, WaitOptions, WaitStatus, getrlimit,
    kill_process, setrlimit,
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

/// A process whose exit comes to whoever claimed the pid.
#[derive(Debug)]
pub struct Claim {
    /// To signal the process.
    pub child: Child,
    /// The exit.
    pub exit: Exited,
}

/// A child that was claimed: it can be signalled until it is reaped.
#[derive(Debug, Clone)]
pub struct Child {
    exits: Arc<Exits>,
    pid: Pid,
    claim: u64,
}

impl Child {
    /// The pid, as the node counts.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Sends `signal`. A zombie takes every signal and does nothing.
    ///
    /// # Errors
    /// `ESRCH` when the process has been reaped, and what kill(2) says.
    pub fn signal(&self, signal: Signal) -> rustix::io::Result<()> {
        // The lock keeps the reaper away: the pid stays this process's.
        let books = self.exits.books();
        match books.claimed.get(&self.pid) {
            Some(claimed) if claimed.number == self.claim => kill_process(self.pid, signal),
            Some(_) | None => Err(Errno::SRCH),
        }
    }

    /// Whether a SIGKILL waits for the process to run again, as cgroup v1 lets it wait in a frozen process (proc(5),
    /// `SigPnd` and `ShdPnd`).
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

/// The waiter's books. Shared; the lock is never held across an await.
#[derive(Debug, Default)]
pub struct Exits {
    books: Mutex<Books>,
    /// The limit that children get, where the shim's own limit is another one.
    open_files: Option<Rlimit>,
}

#[derive(Debug, Default)]
struct Books {
    claimed: HashMap<Pid, Claimed>,
    last_claim: u64,
    /// With the number of the last [`Expected`] that lived when the process was reaped.
    unclaimed: HashMap<Pid, (u64, Exit)>,
    /// The numbers of the expectations that live.
    expected: BTreeSet<u64>,
    last_expected: u64,
}

#[derive(Debug)]
struct Claimed {
    /// Tells two claims of the same pid apart.
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
            // The claimer may have given up; nobody else wants the exit.
            let _ = claimed.exit.send(exit);
        } else if !self.expected.is_empty() {
            let during = self.last_expected;
            self.unclaimed.insert(pid, (during, exit));
        } else {
            debug!("reaped orphan {pid}, status {}", exit.status);
        }
    }
}

/// While this lives, exits of unknown processes are kept for a later [`Exits::claim`].
#[derive(Debug)]
pub struct Expected {
    exits: Arc<Exits>,
    number: u64,
}

impl Drop for Expected {
    fn drop(&mut self) {
        let mut books = self.exits.books();
        books.expected.remove(&self.number);
        // Drops exits older than the oldest expectation; otherwise a busy pod would never clear the map.
        let oldest = books.expected.first().copied();
        books
            .unclaimed
            .retain(|_, (during, _)| oldest.is_some_and(|oldest| *during >= oldest));
    }
}

impl Exits {
    /// Makes this process the subreaper of its descendants and starts to wait for children.
    ///
    /// The limit of open files becomes the highest that this process may have: an exec with all its streams takes eleven
    /// descriptors, and a service manager may give containerd 1024. Children get the earlier limit, and containers inherit
    /// that one.
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
        // Under the lock from wait(2) on: a pid that has been reaped and is still claimed would be signalled.
        let mut books = self.books();
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => books.ended(pid, Exit::from_wait(status)),
                Ok(None) | Err(Errno::CHILD) => return,
                Err(Errno::INTR) => {}
                Err(error) => return warn!("wait for children: {error}"),
            }
        }
    }

    /// Keeps the exits of unknown processes until the answer is dropped.
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

    /// Claims the exit of `pid`: a past one, if the process was reaped while an [`Expected`] lived, or the one to come.
    pub fn claim(self: &Arc<Self>, pid: Pid) -> Claim {
        let (sender, exit) = oneshot::channel();
        let mut books = self.books();
        let claim = match books.unclaimed.remove(&pid) {
            Some((_, past)) if !is_unreaped(pid) => {
                let _ = sender.send(past);
                // The number of no claim: the process takes no signal any more.
                0
            }
            // An exit that is kept while the pid is unreaped is an earlier process's: an orphan had the same pid.
            _ => books.claim(pid, sender),
        };
        Claim {
            child: self.child(pid, claim),
            exit,
        }
    }

    /// Starts `command` and claims the exit.
    ///
    /// # Errors
    /// What `Command::spawn` says.
    pub fn spawn(self: &Arc<Self>, command: &mut Command) -> std::io::Result<Claim> {
        if let Some(limit) = &self.open_files {
            pause::limit_open_files(command, *limit);
        }
        let (sender, exit) = oneshot::channel();
        // Under the lock: the child must not be reaped before the claim. `std::process::Child` is dropped, because its wait
        // would take the exit away from the one waiter.
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

/// Raises the soft limit of open files to the hard one. Returns the earlier limit, if that was another one.
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
            warn!("raise the limit of open files: {error}");
            None
        }
    }
}

/// Whether `pid` is a child that has not been reaped yet (waitid(2): `ECHILD` for what is no child).
fn is_unreaped(pid: Pid) -> bool {
    let look = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    rustix::process::waitid(WaitId::Pid(pid), look).is_ok()
}

#[cfg(test)]
mod tests;
