//! The events of containers and sandboxes, and the queue that keeps the order of the events.
//!
//! ```text
//!  Actor, the sandbox's owner ──Events::send──▶ queue ──EventQueue──▶ the publisher (containerd::events)
//! ```

use std::path::PathBuf;
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
pub struct Events(mpsc::UnboundedSender<(SystemTime, Event)>);

/// The end of the queue for the publisher, which receives each event with the time at which the event was sent.
pub type EventQueue = mpsc::UnboundedReceiver<(SystemTime, Event)>;

impl Events {
    /// An empty queue. The queue closes when every [`Events`] is dropped.
    pub fn queue() -> (Self, EventQueue) {
        let (sender, queue) = mpsc::unbounded_channel();
        (Self(sender), queue)
    }

    /// Puts `event` at the end of the queue.
    pub fn send(&self, event: Event) {
        debug!("event {event:?}");
        if let Err(mpsc::error::SendError((_, event))) = self.0.send((SystemTime::now(), event)) {
            warn!("event after the end of the publisher: {event:?}");
        }
    }
}
