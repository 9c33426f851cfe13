//! The one place that decides when the shim ends.
//!
//! ```text
//!  what happened            what is left       the shim
//!  ──────────────           ────────────       ────────
//!  Shutdown                 nothing            ends
//!  Shutdown                 orphans            ends with the last orphan: containerd sends no other Shutdown
//!  Shutdown                 other members      stays
//!  a Delete is over (*)     nothing            ends
//!  any other Delete is over ┐
//!  a create has failed      ├ nothing          ends after 30 s without a new member: containerd has forgotten the shim
//!  the server begins        ┘
//!  anything but Shutdown    any member         stays
//!  SIGTERM, SIGINT          anything           stays: a pod ends through containerd
//!
//!  (*) after a Shutdown that found orphans
//! ```
//!
//! Orphans are containers whose sandbox is deleted.
//!
//! The end itself: the shim removes the socket, so that a `start` makes a new server. Then callers hang up, calls are
//! answered, and events are published ([`last_words`]).

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

/// How long a shim without a member waits for a Create or a Shutdown. containerd sends one of the two at once.
const FORGOTTEN: Duration = Duration::from_secs(30);

/// How long a caller may stay connected after the order to end. containerd closes the connection within milliseconds of
/// the answer.
const HANGING_UP: Duration = Duration::from_millis(500);

/// How long the last answers may take when the server ends, and how long the last events.
pub const LAST_WORDS: Duration = Duration::from_secs(5);

/// Something that happened, after which the shim may have to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Occasion {
    /// The server begins to serve.
    Begin,
    /// The making of a member has failed.
    CreateFailed,
    /// The deletion of a member or an exec is over, also if the deletion has failed.
    Deleted,
    /// containerd calls Shutdown or ShutdownSandbox. A Shutdown follows each deletion of a task, except of a container
    /// that joined the shim of its sandbox.
    Shutdown,
}

/// What the pod still has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Left {
    /// No member.
    Nothing,
    /// Containers whose sandbox is deleted.
    Orphans,
    /// Members whose deletion a Shutdown will follow.
    Members,
}

/// What the shim does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Next {
    Stay,
    /// Ends when the last member is deleted, without another Shutdown.
    EndWithTheLast,
    /// Ends after [`FORGOTTEN`], unless a member comes.
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

/// The decision, as in the table above.
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

/// The state that the end of the shim depends on, besides the members.
#[derive(Debug)]
pub struct Lifecycle {
    /// The server's socket.
    socket: PathBuf,
    /// True when the server is to end.
    ending: watch::Sender<bool>,
    orphaned: AtomicBool,
    /// The number of members whose making has begun.
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

    /// A receiver that becomes true with the order to end.
    pub fn order_to_end(&self) -> watch::Receiver<bool> {
        self.ending.subscribe()
    }

    /// The making of a member begins. The shim is not forgotten.
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

    /// Removes the socket, and then orders the end. In this order, a `start` that follows the end makes a new server.
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
    /// Ends the shim if `occasion` leaves the shim no reason to stay.
    pub fn settle(self: &Arc<Self>, occasion: Occasion) {
        let lifecycle = &self.lifecycle;
        // Subscribed before `left`, so that the timer sees a member that begins in between.
        let begun = lifecycle.begun.subscribe();
        match next(occasion, self.left(), lifecycle.orphaned()) {
            Next::Stay => {}
            Next::EndWithTheLast => lifecycle.orphaned.store(true, Ordering::Relaxed),
            Next::EndIfForgotten => self.end_if_forgotten(begun),
            Next::End(reason) => lifecycle.end(reason),
        }
    }

    /// Ends the shim after [`FORGOTTEN`] without a member. A containerd that died between `start` and Create, or in the
    /// middle of a deletion, sends no Shutdown after its restart.
    fn end_if_forgotten(self: &Arc<Self>, mut begun: watch::Receiver<u64>) {
        // Weak, because the pod keeps the queue of events open, and the publisher ends when the queue is closed.
        let pod = Arc::downgrade(self);
        tokio::spawn(async move {
            // The first member cancels the timer: a pod at rest wakes nobody.
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

/// The end of the server, after the order to end. Waits in this order, and for each with a time limit: `callers_gone`
/// resolves when nobody is connected, `answered` when every call is answered, `published` when every event is
/// published.
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

/// Ignores SIGTERM and SIGINT from now on, with a line in the log. A service manager that stops containerd may send
/// SIGTERM to every process that the manager finds, and the pod must live on.
///
/// # Errors
/// `Io` when the kernel refuses the handler.
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
