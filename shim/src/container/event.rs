//! The events of containers and sandboxes, and the queue that keeps the order of the events.
//!
//! ```text
//!  Actor, the sandbox's owner ──Events::send──▶ queue ──EventQueue──▶ the publisher (containerd::events)
//! ```
//!
//! The queue has no limit, because no event may be lost while containerd is away. What makes events then has an end: a
//! call needs containerd, and a process ends once. Only OOM kills come in a loop, so the queue takes one OOM event of a
//! container at a time: a second one says nothing that the first does not say.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use log::{debug, warn};
use rustix::process::Pid;
use tokio::sync::mpsc;

use crate::io;
use crate::kernel::exits::Exit;
use crate::kernel::mounts::Mount;

/// Something that happened to a container or a sandbox.
#[derive(Debug)]
pub enum Event {
    /// runc has made the container, or the sandbox stands.
    Create(Box<Created>),
    /// The container runs.
    Start {
        /// The container.
        container: String,
        /// The init.
        pid: Pid,
    },
    /// An exec was added. The exec does not run yet.
    ExecAdded {
        /// The container.
        container: String,
        /// The exec.
        exec: String,
    },
    /// An exec runs.
    ExecStarted {
        /// The container.
        container: String,
        /// The exec.
        exec: String,
        /// The exec's process.
        pid: Pid,
    },
    /// The kernel has killed a process of the container for lack of memory.
    Oom {
        /// The container.
        container: String,
    },
    /// All processes are frozen.
    Paused {
        /// The container.
        container: String,
    },
    /// The processes run again.
    Resumed {
        /// The container.
        container: String,
    },
    /// The container was saved.
    Checkpointed {
        /// The container.
        container: String,
        /// The folder of the images.
        image: PathBuf,
    },
    /// A process has ended.
    Exit {
        /// The container.
        container: String,
        /// The exec, or the container's id for the init.
        id: String,
        /// The process; none for a process that never had a pid.
        pid: Option<Pid>,
        /// How the process ended.
        exit: Exit,
    },
    /// Nothing is left of the container.
    Delete {
        /// The container.
        container: String,
        /// The init; none if the container was never restored.
        pid: Option<Pid>,
        /// How the init ended.
        exit: Exit,
    },
}

/// A container or a sandbox that has been made.
#[derive(Debug, Clone)]
pub struct Created {
    /// The container.
    pub container: String,
    /// The bundle.
    pub bundle: PathBuf,
    /// The mounts of the root filesystem.
    pub rootfs: Vec<Mount>,
    /// The streams.
    pub io: io::Request,
    /// The checkpoint that the container is to be restored from.
    pub checkpoint: Option<PathBuf>,
    /// The init; none for a container that is to be restored.
    pub pid: Option<Pid>,
}

/// The end of the queue for containers and the sandbox, which send events.
#[derive(Debug, Clone)]
pub struct Events {
    sender: mpsc::UnboundedSender<(SystemTime, Event)>,
    queued_ooms: QueuedOoms,
}

/// The end of the queue for the publisher.
#[derive(Debug)]
pub struct EventQueue {
    receiver: mpsc::UnboundedReceiver<(SystemTime, Event)>,
    queued_ooms: QueuedOoms,
}

/// The containers that have an OOM event in the queue. The lock is held only to add or remove one.
#[derive(Debug, Clone, Default)]
struct QueuedOoms(Arc<Mutex<HashSet<String>>>);

impl QueuedOoms {
    fn lock(&self) -> MutexGuard<'_, HashSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Events {
    /// An empty queue. The queue closes when every [`Events`] is dropped.
    pub fn queue() -> (Self, EventQueue) {
        let (sender, receiver) = mpsc::unbounded_channel();
        let queued_ooms = QueuedOoms::default();
        let events = Self {
            sender,
            queued_ooms: queued_ooms.clone(),
        };
        let queue = EventQueue {
            receiver,
            queued_ooms,
        };
        (events, queue)
    }

    /// Puts `event` at the end of the queue. An OOM event of a container that has one in the queue is left out.
    pub fn send(&self, event: Event) {
        if let Event::Oom { container } = &event
            && !self.queued_ooms.lock().insert(container.clone())
        {
            return debug!(container; "OOM event is in the queue already");
        }
        debug!(event:?; "event queued");
        let sent = self.sender.send((SystemTime::now(), event));
        if let Err(mpsc::error::SendError((_, event))) = sent {
            warn!(event:?; "event after the end of the publisher");
        }
    }
}

impl Event {
    /// The container that the event is about.
    pub fn container(&self) -> &str {
        match self {
            Self::Create(created) => &created.container,
            Self::Start { container, .. }
            | Self::ExecAdded { container, .. }
            | Self::ExecStarted { container, .. }
            | Self::Oom { container }
            | Self::Paused { container }
            | Self::Resumed { container }
            | Self::Checkpointed { container, .. }
            | Self::Exit { container, .. }
            | Self::Delete { container, .. } => container,
        }
    }
}

impl EventQueue {
    /// Takes the first event, with the time at which the event was sent. None when the queue is closed and empty.
    pub async fn next(&mut self) -> Option<(SystemTime, Event)> {
        let (at, event) = self.receiver.recv().await?;
        if let Event::Oom { container } = &event {
            self.queued_ooms.lock().remove(container);
        }
        Some((at, event))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn oom(container: &str) -> Event {
        Event::Oom {
            container: container.into(),
        }
    }

    fn exit(container: &str) -> Event {
        Event::Exit {
            container: container.into(),
            id: container.into(),
            pid: None,
            exit: Exit::now(0),
        }
    }

    #[tokio::test]
    async fn one_oom_event_of_a_container_waits_at_a_time() {
        let (events, mut queue) = Events::queue();
        for event in [oom("a"), oom("a"), oom("b"), exit("b"), oom("a"), oom("b")] {
            events.send(event);
        }
        let mut taken = Vec::new();
        for _ in 0..3 {
            taken.extend(queue.next().await.map(|(_, event)| event));
        }
        assert!(
            matches!(&taken[..], [Event::Oom { container: a }, Event::Oom { container: b }, Event::Exit { .. }]
                if a == "a" && b == "b"),
            "{taken:?}"
        );
        // The first has been taken: the next one counts.
        events.send(oom("a"));
        drop(events);
        assert!(matches!(queue.next().await, Some((_, Event::Oom { .. }))));
        assert!(queue.next().await.is_none());
    }
}
