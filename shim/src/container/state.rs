//! The life of a process, and which call fits which part of it. Pure: nothing here touches the world.
//!
//! ```text
//!            Create            Start               over              Kill, or it ends       may be published
//!  (nothing) ─────▶ Created ─────────▶ Starting ──────▶ Running ───────────────────▶ Ended ─────────▶ Stopped
//!                      ▲                  │  │           │   ▲                         ▲ ▲                │
//!                      └── start failed ──┘  │     Pause ▼   │ Resume                  │ │         Delete ▼
//!                                            │          Paused ────────────────────────┘ │            (nothing)
//!                                            └─────── the process ended meanwhile ───────┘
//! ```
//!
//! An exit is published once, and not before the start of the process. The exit of an init also waits for the exits of the
//! execs, for a checkpoint under way, and for a reader of the output: see [`exit_to_publish`].

use std::sync::Arc;

use tokio::sync::{Notify, oneshot};

use super::mailbox::Request;
use crate::error::{Error, Result};
use crate::kernel::exits::Exit;

/// A process, for the task that owns the process.
#[derive(Debug)]
pub enum Life {
    /// An init is there, an exec is known. Nothing of the user's runs yet.
    Created,
    /// The start is under way.
    Starting(Start),
    /// The process runs.
    Running,
    /// The container is frozen.
    Paused,
    /// The process has ended, and nobody has been told.
    Ended(End),
    /// The process has ended, and the exit is published.
    Stopped(Exit),
}

/// A start that is under way.
#[derive(Debug, Default)]
pub struct Start {
    /// Calls that wait for the end of the start.
    pub waiting: Vec<Request>,
    /// Dropped when the process ends, for whoever starts the process.
    pub ending: Option<oneshot::Sender<()>>,
    /// The process has ended before the start was over.
    pub end: Option<End>,
}

/// An exit, and what holds the exit back.
#[derive(Debug)]
pub struct End {
    /// The exit.
    pub exit: Exit,
    /// The output of the process.
    pub output: Output,
}

/// What has become of the output of a process that has ended.
#[derive(Debug)]
pub enum Output {
    /// Read, or nobody reads.
    Delivered,
    /// Being read. A notification ends the wait.
    BeingRead(Arc<Notify>),
}

/// Where a process is in its life, for everybody else.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Nothing of the user's runs yet.
    Created,
    /// The process runs.
    Running,
    /// The container is frozen.
    Paused,
    /// The process has ended, and nobody has been told.
    Ended(Exit),
    /// The process has ended, and the exit is published.
    Stopped(Exit),
}

/// Whether a checkpoint of the container is being made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checkpointing {
    /// None is.
    No,
    /// criu is at work.
    UnderWay,
}

/// What an exit waits for, besides the process itself.
#[derive(Debug, Clone, Copy)]
pub enum Whose<'a> {
    /// The exit of an exec waits for nothing else.
    Exec,
    /// The exit of an init comes last: after these execs and this checkpoint.
    Init(&'a [&'a Life], Checkpointing),
}

/// The exit of the process with this `life`, if the exit may be published now.
pub fn exit_to_publish(life: &Life, whose: Whose<'_>) -> Option<Exit> {
    let Life::Ended(End {
        exit,
        output: Output::Delivered,
    }) = life
    else {
        return None;
    };
    let waits = match whose {
        Whose::Exec => false,
        Whose::Init(execs, checkpointing) => {
            checkpointing == Checkpointing::UnderWay
                || execs.iter().any(|exec| exec.has_exit_to_come())
        }
    };
    (!waits).then_some(*exit)
}

/// A call whose answer depends on the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Call {
    /// Task.Start
    Start,
    /// Task.Delete
    Delete,
    /// Task.Pause
    Pause,
    /// Task.Resume
    Resume,
    /// Task.Exec
    Exec,
    /// Task.Update
    Update,
    /// Task.Checkpoint
    Checkpoint,
    /// Task.Kill
    Kill,
}

impl Life {
    /// What everybody else sees of this life.
    pub fn status(&self) -> Status {
        match self {
            Self::Created | Self::Starting(Start { end: None, .. }) => Status::Created,
            Self::Running => Status::Running,
            Self::Paused => Status::Paused,
            Self::Starting(Start {
                end: Some(End { exit, .. }),
                ..
            })
            | Self::Ended(End { exit, .. }) => Status::Ended(*exit),
            Self::Stopped(exit) => Status::Stopped(*exit),
        }
    }

    /// The exit that is known and not published.
    pub fn unpublished(&self) -> Option<Exit> {
        match self.status() {
            Status::Ended(exit) => Some(exit),
            Status::Created | Status::Running | Status::Paused | Status::Stopped(_) => None,
        }
    }

    /// Whether an exit of this process is still to be published. A process that was never started has none.
    pub fn has_exit_to_come(&self) -> bool {
        match self {
            Self::Starting(_) | Self::Running | Self::Paused | Self::Ended(_) => true,
            Self::Created | Self::Stopped(_) => false,
        }
    }

    /// Whether the process is being started.
    pub fn is_starting(&self) -> bool {
        matches!(self, Self::Starting(_))
    }

    /// The process has ended. The exit of a process that is being started stays with the start.
    #[must_use]
    pub fn ended(self, end: End) -> Self {
        match self {
            Self::Created | Self::Running | Self::Paused => Self::Ended(end),
            Self::Starting(start) => Self::Starting(Start {
                waiting: start.waiting,
                ending: None,
                end: Some(end),
            }),
            Self::Ended(_) | Self::Stopped(_) => self,
        }
    }

    /// The output has been read.
    #[must_use]
    pub fn delivered(mut self) -> Self {
        if let Self::Ended(end) | Self::Starting(Start { end: Some(end), .. }) = &mut self {
            end.output = Output::Delivered;
        }
        self
    }

    /// The start is over. Returns the next state and the calls that waited.
    pub fn started(self) -> (Self, Vec<Request>) {
        self.start_over(Self::Running)
    }

    /// The start has failed: the process is as before, if the process is still there.
    pub fn start_failed(self) -> (Self, Vec<Request>) {
        self.start_over(Self::Created)
    }

    fn start_over(self, otherwise: Self) -> (Self, Vec<Request>) {
        match self {
            Self::Starting(Start { waiting, end, .. }) => {
                (end.map_or(otherwise, Self::Ended), waiting)
            }
            Self::Created | Self::Running | Self::Paused | Self::Ended(_) | Self::Stopped(_) => {
                (self, Vec::new())
            }
        }
    }
}

impl Status {
    /// The exit, once there is one.
    pub fn exit(self) -> Option<Exit> {
        match self {
            Self::Ended(exit) | Self::Stopped(exit) => Some(exit),
            Self::Created | Self::Running | Self::Paused => None,
        }
    }

    /// The exit, once the exit is published: for whoever waits.
    pub fn published_exit(self) -> Option<Exit> {
        match self {
            Self::Stopped(exit) => Some(exit),
            Self::Created | Self::Running | Self::Paused | Self::Ended(_) => None,
        }
    }

    /// containerd's word for this part of the life.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ended(_) | Self::Stopped(_) => "stopped",
        }
    }

    /// Whether `call` fits.
    ///
    /// # Errors
    /// `NotFound` for a kill of what has ended (containerd then takes the process for dead), `FailedPrecondition` otherwise.
    pub fn check(self, call: Call) -> Result<()> {
        let fits = match call {
            Call::Start => matches!(self, Self::Created),
            Call::Delete => matches!(self, Self::Created | Self::Ended(_) | Self::Stopped(_)),
            Call::Pause => matches!(self, Self::Running),
            Call::Exec => matches!(self, Self::Created | Self::Running),
            Call::Checkpoint => matches!(self, Self::Running | Self::Paused),
            Call::Resume => matches!(self, Self::Paused),
            Call::Update | Call::Kill => self.exit().is_none(),
        };
        if fits {
            Ok(())
        } else if call == Call::Kill {
            Err(Error::NotFound("process already finished".into()))
        } else {
            let call = format!("{call:?}").to_lowercase();
            Err(Error::FailedPrecondition(format!(
                "cannot {call} a {} process",
                self.name()
            )))
        }
    }
}

#[cfg(test)]
mod tests;
