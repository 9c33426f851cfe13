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
//!  a sandbox that nobody    nothing            ends: containerd has forgotten the sandbox
//!  has started is deleted   orphans            ends with the last orphan
//!  anything but Shutdown    any member         stays
//!
//!  (*) after a Shutdown that found orphans
//! ```
//!
//! Orphans are containers whose sandbox is deleted.
//!
//! ```text
//!  SIGTERM, SIGINT ──▶ is anybody connected? ── yes ──▶ stays: a pod ends through containerd
//!                          │ no: containerd is stopped, as when the node goes down
//!                          ▼
//!                      no process of a container is left, for two seconds ──▶ takes down what can be, ends
//!                      somebody connects ───────────────────────────────────▶ stays: the signal is forgotten
//! ```
//!
//! A service manager that shuts the node down sends SIGTERM to every process, and waits for all of them: systemd for 90
//! seconds. SIGTERM is the only word that the shim gets there.
//!
//! The end itself: the shim removes the socket, so that a `start` makes a new server. Then callers hang up, calls are
//! answered, and events are published ([`last_words`]).

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use log::{info, warn};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

use super::Pod;
use crate::error::{IoError, Result};

/// How long a shim without a member waits for a Create or a Shutdown. containerd sends one of the two at once.
const FORGOTTEN: Duration = Duration::from_secs(30);

/// How long a caller may stay connected after the order to end. containerd closes the connection within milliseconds of
/// the answer.
const HANGING_UP: Duration = Duration::from_millis(500);

/// How long a containerd that is being restarted may be away before a signal is taken for the end of the node.
const RESTARTING: Duration = Duration::from_secs(2);

/// How long the teardown of all members may take when the node goes down.
const TAKING_DOWN: Duration = Duration::from_secs(5);

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
    /// A sandbox that was not started in time is deleted.
    NeverStarted,
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
pub enum Reason {
    /// containerd has called Shutdown.
    Shutdown,
    /// The last container of a sandbox that is deleted is deleted.
    LastOrphan,
    /// containerd has forgotten the shim.
    Forgotten,
    /// containerd has forgotten a sandbox that was made and not started.
    NeverStarted,
    /// The node goes down.
    Terminated,
}

/// The decision, as in the table above.
fn next(occasion: Occasion, left: Left, orphaned: Orphaned) -> Next {
    match (occasion, left, orphaned) {
        (Occasion::Shutdown, Left::Nothing, _) => Next::End(Reason::Shutdown),
        (Occasion::NeverStarted, Left::Nothing, _) => Next::End(Reason::NeverStarted),
        (Occasion::Shutdown | Occasion::NeverStarted, Left::Orphans, _) => Next::EndWithTheLast,
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
            Self::NeverStarted => "the sandbox was not started in time",
            Self::Terminated => "terminated, and no process of a container is left",
        }
    }
}

/// The state that the end of the shim depends on, besides the members.
#[derive(Debug)]
pub struct Lifecycle {
    /// The server's socket.
    socket: PathBuf,
    /// Why the server is to end; none while the server is to serve.
    ending: watch::Sender<Option<Reason>>,
    /// The socket is gone.
    leaving: AtomicBool,
    orphaned: AtomicBool,
    /// The number of members whose making has begun.
    begun: watch::Sender<u64>,
}

impl Lifecycle {
    /// The lifecycle of a shim that listens at `socket`.
    pub fn new(socket: PathBuf) -> Self {
        Self {
            socket,
            ending: watch::Sender::new(None),
            leaving: AtomicBool::new(false),
            orphaned: AtomicBool::new(false),
            begun: watch::Sender::new(0),
        }
    }

    /// The server's socket.
    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    /// A receiver that gets a reason with the order to end.
    pub fn order_to_end(&self) -> watch::Receiver<Option<Reason>> {
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

    /// Whether the shim takes no new member any more.
    pub(super) fn is_leaving(&self) -> bool {
        self.leaving.load(Ordering::Relaxed)
    }

    /// Removes the socket, once. From now on a `start` makes a new server, and no member begins here.
    fn leave(&self) {
        if self.leaving.swap(true, Ordering::Relaxed) {
            return;
        }
        if let Err(error) = std::fs::remove_file(&self.socket) {
            warn!(socket:% = self.socket.display(), error:%; "socket not removed");
        }
    }

    /// Orders the end, after the socket is gone.
    fn end(&self, reason: Reason) {
        if self.ending.borrow().is_some() {
            return;
        }
        info!(reason = reason.words(); "shim ends");
        self.leave();
        self.ending.send_replace(Some(reason));
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

/// The end of the server, after the order to end for `reason`. Waits in this order, and for each with a time limit:
/// `callers_gone` resolves when nobody is connected, `answered` when every call is answered, `published` when every event
/// is published.
pub async fn last_words(
    reason: Reason,
    callers_gone: impl Future,
    answered: impl Future,
    published: impl Future,
) {
    if timeout(HANGING_UP, callers_gone).await.is_err() {
        info!("a caller stays connected");
    }
    if timeout(LAST_WORDS, answered).await.is_err() {
        warn!("connections were still open at the end");
    }
    let publishing = match reason {
        // containerd is stopped, and takes no event.
        Reason::Terminated => Duration::ZERO,
        Reason::Shutdown | Reason::LastOrphan | Reason::Forgotten | Reason::NeverStarted => {
            LAST_WORDS
        }
    };
    if timeout(publishing, published).await.is_err() {
        warn!("events were still unsent at the end");
    }
}

/// Takes SIGTERM and SIGINT from now on, as in the picture above. `callers` is the number of open connections.
///
/// # Errors
/// `Io` when the kernel refuses the handler.
pub fn take_terminations(pod: &Arc<Pod>, callers: &watch::Receiver<usize>) -> Result<()> {
    let handler = |kind| signal(kind).map_err(IoError::at("handle signals of", "/proc/self"));
    let mut terminate = handler(SignalKind::terminate())?;
    let mut interrupt = handler(SignalKind::interrupt())?;
    // Weak, because the pod keeps the queue of events open.
    let (pod, callers) = (Arc::downgrade(pod), callers.clone());
    tokio::spawn(async move {
        loop {
            let name = tokio::select! {
                _ = terminate.recv() => "SIGTERM",
                _ = interrupt.recv() => "SIGINT",
            };
            match pod.upgrade() {
                Some(pod) => pod.terminate(name, callers.clone()).await,
                None => return,
            }
        }
    });
    Ok(())
}

impl Pod {
    /// Ends the shim after a signal, if nobody is connected until no process of a container is left.
    async fn terminate(self: Arc<Self>, name: &str, mut callers: watch::Receiver<usize>) {
        if *callers.borrow_and_update() > 0 {
            return warn!(
                signal = name;
                "signal ignored: a pod ends through containerd; SIGKILL ends the shim and the pod with it"
            );
        }
        info!(
            signal = name;
            "the shim ends when no process of a container is left, unless somebody connects"
        );
        let mut order = self.lifecycle.order_to_end();
        let no_process_is_left = async {
            self.without_processes().await;
            sleep(RESTARTING).await;
            self.without_processes().await;
        };
        tokio::select! {
            biased;
            _ = callers.changed() => return info!(signal = name; "somebody connects: signal forgotten"),
            _ = order.wait_for(Option::is_some) => return,
            () = no_process_is_left => {}
        }
        // Before the teardown: a containerd that comes back now gets a new shim, and no member here.
        self.lifecycle.leave();
        if timeout(TAKING_DOWN, self.take_down_all()).await.is_err() {
            warn!(after = TAKING_DOWN.as_secs(); "not everything was taken down in time");
        }
        self.lifecycle.end(Reason::Terminated);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shim_ends_when_nothing_is_left_and_somebody_says_so() {
        use Left::{Members, Nothing, Orphans};
        use Occasion::{Begin, CreateFailed, Deleted, NeverStarted, Shutdown};
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
            (NeverStarted, Nothing, No, Next::End(Reason::NeverStarted)),
            (NeverStarted, Members, No, Next::Stay),
            (NeverStarted, Orphans, No, Next::EndWithTheLast),
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
