//! When the shim ends: in one place.
//!
//! ```text
//!  what happened           what is left          the shim
//!  ──────────────          ────────────          ────────
//!  Shutdown                nothing               ends
//!  Shutdown                orphans               ends with the last of them: containerd sends no other Shutdown
//!  Shutdown                the sandbox, others   stays
//!  a member is deleted     nothing, orphaned     ends
//!  a member is deleted  ┐
//!  a create has failed  ├  nothing               ends after 30 s without a new member: containerd has forgotten the shim
//!  the server begins    ┘
//!  SIGTERM, SIGINT         anything              stays: a pod ends through containerd
//! ```
//!
//! Orphans are containers whose sandbox is deleted. The end itself: the socket goes first, so that a `start` makes a new
//! server; then callers hang up, calls are answered, events are sent ([`last_words`]).

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use log::{info, warn};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::timeout;

use super::Pod;
use crate::error::{IoError, Result};

/// How long a shim without a member waits for a Create or a Shutdown. containerd sends either at once.
const FORGOTTEN: Duration = Duration::from_secs(30);

/// How long a caller may stay connected when there is nothing left to serve. containerd closes the connection within
/// milliseconds of the answer.
const HANGING_UP: Duration = Duration::from_millis(500);

/// How long the last events and answers may take when the server ends.
pub const LAST_WORDS: Duration = Duration::from_secs(5);

/// Something after which the shim may have to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Occasion {
    /// The server begins to serve.
    Begin,
    /// The making of a member has failed.
    CreateFailed,
    /// A member has been deleted, or an exec.
    Deleted,
    /// containerd calls Shutdown. containerd does so after every deletion.
    Shutdown,
}

/// What the pod still has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// No member.
    Nothing,
    /// Containers whose sandbox is deleted.
    Orphans,
    /// Members that will get a Shutdown of their own.
    Members,
}

/// What the shim does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Stay,
    /// Ends when the last member is deleted, without another Shutdown.
    EndWithTheLast,
    /// Ends unless a member comes.
    EndIfForgotten,
    End(Reason),
}

/// Why the shim ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reason {
    Shutdown,
    LastOrphan,
    Forgotten,
}

/// The decision. `orphaned`: a Shutdown has come while there were orphans.
fn next(occasion: Occasion, left: Left, orphaned: Orphaned) -> Next {
    match (occasion, left, orphaned) {
        (Occasion::Shutdown, Left::Nothing, _) => Next::End(Reason::Shutdown),
        (Occasion::Shutdown, Left::Orphans, _) => Next::EndWithTheLast,
        (Occasion::Deleted, Left::Nothing, Orphaned::Yes) => Next::End(Reason::LastOrphan),
        (
            Occasion::Begin | Occasion::CreateFailed | Occasion::Deleted,
            Left::Nothing,
            Orphaned::Yes | Orphaned::No,
        ) => Next::EndIfForgotten,
        (_, Left::Orphans | Left::Members, _) => Next::Stay,
    }
}

/// Whether a Shutdown has come while there were orphans.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Orphaned {
    No,
    Yes,
}

impl Reason {
    fn words(self) -> &'static str {
        match self {
            Self::Shutdown => "shutdown: nothing is left",
            Self::LastOrphan => "the last container of an ended pod is deleted",
            Self::Forgotten => "no container, and no Shutdown for 30 s",
        }
    }
}

/// What the end of the shim depends on.
#[derive(Debug)]
pub struct Lifecycle {
    /// The server's socket.
    socket: PathBuf,
    /// True when the server is to end.
    ending: watch::Sender<bool>,
    orphaned: AtomicBool,
    /// How many members have been begun.
    begun: watch::Sender<u64>,
}

impl Lifecycle {
    /// The lifecycle of a shim that listens at `socket`.
    pub fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            ending: watch::Sender::new(false),
            orphaned: AtomicBool::new(false),
            begun: watch::Sender::new(0),
        }
    }

    /// Resolves to the order to end.
    pub fn order_to_end(&self) -> watch::Receiver<bool> {
        self.ending.subscribe()
    }

    /// A member is being made: nobody has forgotten the shim.
    pub(super) fn member_begins(&self) {
        self.begun.send_modify(|begun| *begun += 1);
    }

    fn orphaned(&self) -> Orphaned {
        if self.orphaned.load(Ordering::Relaxed) {
            Orphaned::Yes
        } else {
            Orphaned::No
        }
    }

    /// From now on a `start` makes a new server: the socket is gone before containerd can hear of the end.
    fn end(&self, reason: Reason) {
        if *self.ending.borrow() {
            return;
        }
        info!("{}, ending", reason.words());
        if let Err(error) = std::fs::remove_file(&self.socket) {
            warn!("remove {}: {error}", self.socket.display());
        }
        self.ending.send_replace(true);
    }
}

impl Pod {
    /// Ends the shim if there is no more reason to stay, now that this has happened.
    pub fn settle(self: &Arc<Self>, occasion: Occasion) {
        let lifecycle = &self.lifecycle;
        // Subscribed before the look: a member that comes in between is seen.
        let begun = lifecycle.begun.subscribe();
        match next(occasion, self.left(), lifecycle.orphaned()) {
            Next::Stay => {}
            Next::EndWithTheLast => lifecycle.orphaned.store(true, Ordering::Relaxed),
            Next::EndIfForgotten => self.end_if_forgotten(begun),
            Next::End(reason) => lifecycle.end(reason),
        }
    }

    /// A containerd that died between `start` and Create, or in the middle of a deletion, sends no Shutdown when it is back.
    fn end_if_forgotten(self: &Arc<Self>, mut begun: watch::Receiver<u64>) {
        // Weak: the publisher ends only when nobody can send events any more.
        let pod = Arc::downgrade(self);
        tokio::spawn(async move {
            // With the first member the timer goes: a pod at rest wakes nobody.
            let forgotten = timeout(FORGOTTEN, begun.changed()).await;
            if forgotten.is_err()
                && let Some(pod) = pod.upgrade()
                && pod.left() == Left::Nothing
            {
                pod.lifecycle.end(Reason::Forgotten);
            }
        });
    }
}

/// The end of the server, after the order to end: `callers_gone` resolves when nobody is connected, `answered` when every
/// call is answered, `published` when every event is sent. Each has its time.
pub async fn last_words(callers_gone: impl Future, answered: impl Future, published: impl Future) {
    if timeout(HANGING_UP, callers_gone).await.is_err() {
        info!("a caller stays connected");
    }
    if timeout(LAST_WORDS, answered).await.is_err() {
        warn!("connections were still open at the end");
    }
    if timeout(LAST_WORDS, published).await.is_err() {
        warn!("events were still unsent at the end");
    }
}

/// Takes SIGTERM and SIGINT from now on. A service manager that stops containerd may send SIGTERM to every process that the
/// manager finds, and the pod must live on.
///
/// # Errors
/// `Io` when the kernel takes no handler.
pub fn ignore_terminations() -> Result<()> {
    let handler = |kind| signal(kind).map_err(IoError::at("handle signals of", "/proc/self"));
    let mut terminate = handler(SignalKind::terminate())?;
    let mut interrupt = handler(SignalKind::interrupt())?;
    tokio::spawn(async move {
        loop {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            warn!(
                "{name} ignored: a pod ends through containerd; SIGKILL ends the shim and the pod with it"
            );
        }
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shim_ends_when_nothing_is_left_and_somebody_says_so() {
        use Left::{Members, Nothing, Orphans};
        use Occasion::{Begin, CreateFailed, Deleted, Shutdown};
        use Orphaned::{No, Yes};
        for (occasion, left, orphaned, expected) in [
            (Begin, Nothing, No, Next::EndIfForgotten),
            (CreateFailed, Nothing, No, Next::EndIfForgotten),
            (CreateFailed, Members, No, Next::Stay),
            (Deleted, Nothing, No, Next::EndIfForgotten),
            (Deleted, Members, No, Next::Stay),
            (Deleted, Orphans, No, Next::Stay),
            (Deleted, Orphans, Yes, Next::Stay),
            (Deleted, Nothing, Yes, Next::End(Reason::LastOrphan)),
            (Shutdown, Nothing, No, Next::End(Reason::Shutdown)),
            (Shutdown, Nothing, Yes, Next::End(Reason::Shutdown)),
            (Shutdown, Members, No, Next::Stay),
            (Shutdown, Orphans, No, Next::EndWithTheLast),
        ] {
            assert_eq!(
                next(occasion, left, orphaned),
                expected,
                "{occasion:?}, {left:?}, {orphaned:?}"
            );
        }
    }
}
