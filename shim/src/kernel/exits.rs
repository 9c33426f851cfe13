//! The only place that waits for children.
//!
//! ```text
//!  SIGCHLD ──▶ reap everything ──┬─ somebody has claimed the pid ────▶ its channel
//!                                ├─ a pid is still to become known ──▶ kept until it is claimed
//!                                └─ neither (an orphan) ─────────────▶ forgotten
//! ```
//!
//! The shim is the subreaper of its containers, so the kernel hands it processes whose pid it learns later than their
//! exit: runc writes the pid into a file, and a short-lived process may have ended by then. While an [`Expected`] lives,
//! exits that nobody has claimed are therefore kept, and no longer: numbers come again. Since nobody else waits for
//! children, a pid that has not been handed over here is still that process, and not another one with the same number.

use std::collections::{BTreeSet, HashMap};
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use log::{debug, warn};
use rustix::process::{
    Pid, Resource, Rlimit, WaitId, WaitIdOptions, WaitOptions, WaitStatus, getrlimit, setrlimit,
};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

use crate::error::{IoError, Result};

/// How a process ended, and when.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// The exit code, or 128 + the signal that killed it.
    pub status: u32,
    /// When it was reaped.
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
pub type Claim = oneshot::Receiver<Exit>;

/// The waiter's books. Shared; the lock is never held across an await.
#[derive(Debug, Default)]
pub struct Exits {
    books: Mutex<Books>,
    /// What children get, where the shim's own limit is another one.
    open_files: Option<Rlimit>,
}

#[derive(Debug, Default)]
struct Books {
    claimed: HashMap<Pid, oneshot::Sender<Exit>>,
    /// With the number of the last [`Expected`] that was there when the process was reaped.
    unclaimed: HashMap<Pid, (u64, Exit)>,
    /// The numbers of those that live.
    expected: BTreeSet<u64>,
    last_expected: u64,
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
        // In a busy pod there is always another one: what is older than all of them is nobody's.
        let oldest = books.expected.first().copied();
        books
            .unclaimed
            .retain(|_, (during, _)| oldest.is_some_and(|oldest| *during >= oldest));
    }
}

impl Exits {
    /// Makes this process the subreaper of its descendants and starts to wait for children.
    ///
    /// Its own limit of open files becomes the highest that it may have: an exec with all its streams takes eleven, and
    /// a service manager may give containerd 1024. Children get the limit that there was, which containers inherit.
    ///
    /// # Errors
    /// `Io` when the kernel refuses the subreaper attribute or the signal handler.
    pub fn watch() -> Result<Arc<Self>> {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid()))
            .map_err(IoError::at("become subreaper of", "/proc/self"))?;
        let children =
            signal(SignalKind::child()).map_err(IoError::at("handle SIGCHLD of", "/proc/self"))?;
        let exits = Arc::new(Self {
            open_files: raise_open_files(),
            ..Self::default()
        });
        tokio::spawn(exits.clone().wait_for_children(children));
        Ok(exits)
    }

    async fn wait_for_children(self: Arc<Self>, mut children: Signal) {
        while children.recv().await.is_some() {
            self.reap();
        }
    }

    fn reap(&self) {
        loop {
            match rustix::process::wait(WaitOptions::NOHANG) {
                Ok(Some((pid, status))) => self.ended(pid, Exit::from_wait(status)),
                Ok(None) | Err(rustix::io::Errno::CHILD) => return,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return warn!("wait for children: {error}"),
            }
        }
    }

    fn ended(&self, pid: Pid, exit: Exit) {
        let mut books = self.books();
        if let Some(claim) = books.claimed.remove(&pid) {
            // The claimer may have given up; nobody else wants the exit.
            let _ = claim.send(exit);
        } else if !books.expected.is_empty() {
            let during = books.last_expected;
            books.unclaimed.insert(pid, (during, exit));
        } else {
            debug!("reaped orphan {pid}, status {}", exit.status);
        }
    }

    /// From now on, and until the answer is dropped, no exit is forgotten.
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

    /// The exit of `pid`: past, if it was reaped while an [`Expected`] lived, or to come.
    pub fn claim(&self, pid: Pid) -> Claim {
        let (sender, claim) = oneshot::channel();
        let mut books = self.books();
        match books.unclaimed.remove(&pid) {
            Some((_, exit)) if !is_unreaped(pid) => {
                let _ = sender.send(exit);
            }
            // One that is still to be reaped is not the one that was: an orphan had the same number before.
            _ => {
                books.claimed.insert(pid, sender);
            }
        }
        claim
    }

    /// Starts `command` and claims its exit.
    ///
    /// # Errors
    /// What `Command::spawn` says.
    pub fn spawn(&self, command: &mut Command) -> std::io::Result<(Pid, Claim)> {
        // Under the lock, so that the child cannot be reaped before it is claimed. The `Child` itself is not waited
        // for: that would take the exit away from the one waiter.
        if let Some(limit) = &self.open_files {
            pause::limit_open_files(command, *limit);
        }
        let mut books = self.books();
        let child = command.spawn()?;
        let pid = Pid::from_child(&child);
        let (sender, claim) = oneshot::channel();
        books.claimed.insert(pid, sender);
        Ok((pid, claim))
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Raises the soft limit of open files to the hard one. The limit that there was, if it was another one.
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
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn pid(number: i32) -> Pid {
        Pid::from_raw(number).unwrap()
    }

    #[test]
    fn an_exit_before_its_pid_is_known_is_kept() {
        let exits = Arc::new(Exits::default());
        let _expected = exits.expect();
        exits.ended(pid(7), Exit::now(3));
        assert_eq!(exits.claim(pid(7)).try_recv().unwrap().status, 3);
    }

    #[test]
    fn an_exit_is_handed_to_who_claimed_the_pid() {
        let exits = Arc::new(Exits::default());
        let mut claim = exits.claim(pid(7));
        assert!(claim.try_recv().is_err());
        exits.ended(pid(8), Exit::now(1));
        exits.ended(pid(7), Exit::now(2));
        assert_eq!(claim.try_recv().unwrap().status, 2);
    }

    #[test]
    fn an_orphan_is_forgotten_when_nobody_expects_anything() {
        let exits = Arc::new(Exits::default());
        let first = exits.expect();
        let second = exits.expect();
        exits.ended(pid(7), Exit::now(1));
        drop(first);
        assert_eq!(exits.books().unclaimed.len(), 1);
        drop(second);
        assert_eq!(exits.books().unclaimed.len(), 0);
        exits.ended(pid(8), Exit::now(1));
        assert_eq!(exits.books().unclaimed.len(), 0);
    }

    #[test]
    fn what_only_ended_calls_could_claim_is_forgotten_while_others_run() {
        let exits = Arc::new(Exits::default());
        let first = exits.expect();
        exits.ended(pid(7), Exit::now(1));
        let second = exits.expect();
        exits.ended(pid(8), Exit::now(2));
        drop(first);
        let _third = exits.expect();
        assert!(!exits.books().unclaimed.contains_key(&pid(7)));
        assert!(exits.books().unclaimed.contains_key(&pid(8)));
        drop(second);
        assert!(exits.books().unclaimed.is_empty());
    }

    #[test]
    fn the_exit_of_an_earlier_process_with_the_same_pid_is_not_taken() {
        let exits = Arc::new(Exits::default());
        let _expected = exits.expect();
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let pid = Pid::from_child(&child);
        exits.ended(pid, Exit::now(1));
        let mut claim = exits.claim(pid);
        assert!(claim.try_recv().is_err());
        child.kill().unwrap();
        child.wait().unwrap();
        exits.ended(pid, Exit::now(137));
        assert_eq!(claim.try_recv().unwrap().status, 137);
    }

    #[tokio::test]
    async fn children_are_reaped_with_their_codes_and_signals() {
        let exits = Exits::watch().unwrap();
        for (script, status) in [("exit 7", 7), ("kill -9 $$", 137)] {
            let (_, claim) = exits
                .spawn(Command::new("/bin/sh").args(["-c", script]))
                .unwrap();
            assert_eq!(claim.await.unwrap().status, status);
        }
    }
}
