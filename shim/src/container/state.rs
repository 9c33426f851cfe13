//! The life of a process, and the calls that each state allows. Pure: no function here has an effect on the world.
//!
//! ```text
//!  (nothing) ──▶ Created ◀──▶ Starting ──▶ Running ◀──▶ Paused
//!                   │            │            │           │
//!                   └────────────┼────────────┴───────────┴──▶ Ended ──▶ Stopped ──▶ (nothing)
//!                                └──▶ Failed ──▶ (nothing)
//! ```
//!
//! | from | to | when |
//! |---|---|---|
//! | – | Created | Create, Exec |
//! | Created | Starting | Start |
//! | Starting | Running | the start has succeeded |
//! | Starting | Created | the start of the init has failed |
//! | Starting | Failed | the start of an exec has failed |
//! | Running, Paused | Paused, Running | Pause, Resume |
//! | Created, Running, Paused | Ended | the process has ended |
//! | Starting | Ended | the start is over, and the process ended during the start |
//! | Ended | Stopped | the exit is published |
//! | Created, Failed, Stopped | – | Delete |
//!
//! An exit is published once, and never while a start is under way. The exit of an init also waits for the exits of the
//! execs, for a checkpoint under way, and for a reader of the output: see [`exit_to_publish`]. No wait is without an
//! end: a start or a checkpoint that hangs is given up (`start.rs`, `control.rs`).
//!
//! What the rest of the shim sees is the [`Status`]. State and Wait agree: while something else than the reader holds
//! an exit back, the process still runs for State ([`Status::Ending`]).

use std::sync::Arc;

use tokio::sync::{Notify, watch};

use super::mailbox::Request;
use crate::error::{Error, Result};
use crate::kernel::exits::Exit;

/// The state of a process, as the actor keeps it.
#[derive(Debug)]
pub enum Life {
    /// The init is made, or the exec is added. No program of the user runs yet.
    Created,
    /// The start is under way.
    Starting(Start),
    /// The process runs.
    Running,
    /// The container is frozen.
    Paused,
    /// The process has ended, and the exit is not published yet.
    Ended(End),
    /// The start of the exec has failed. The exec never ran, and has no exit to publish; a Wait gets this one.
    Failed(Exit),
    /// The process has ended, and the exit is published.
    Stopped(Exit),
}

/// A start that is under way.
#[derive(Debug, Default)]
pub struct Start {
    /// Calls that wait for the end of the start.
    pub waiting: Vec<Request>,
    /// Dropped when somebody waits for the end of the start: see [`Life::hurry`].
    pub hurry: Option<watch::Sender<()>>,
    /// The end of a process that ended before the start was over.
    pub end: Option<End>,
}

/// An exit, and what holds the exit back.
#[derive(Debug)]
pub struct End {
    /// The exit.
    pub exit: Exit,
    /// What has become of the output of the process.
    pub output: Output,
    /// Whether an exec or a checkpoint holds the exit back.
    pub held: bool,
}

/// What has become of the output of a process that has ended.
#[derive(Debug)]
pub enum Output {
    /// The output has been read, or nobody reads the output.
    Delivered,
    /// Somebody still reads. A notification ends the wait for the reader.
    BeingRead(Arc<Notify>),
}

/// The state of a process, as the rest of the shim sees the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// No program of the user runs yet.
    Created,
    /// The process runs.
    Running,
    /// The container is frozen.
    Paused,
    /// The process has ended, and a start, an exec or a checkpoint holds the exit back. For State, the process runs.
    Ending(Exit),
    /// The process has ended, and at most a reader of the output holds the exit back, for two seconds.
    Ended(Exit),
    /// The start of the exec has failed. For State, the exec is created.
    Failed(Exit),
    /// The process has ended, and the exit is published.
    Stopped(Exit),
}

/// Whether a checkpoint of the container is being made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checkpointing {
    /// No checkpoint is being made.
    No,
    /// criu is at work.
    UnderWay,
}

/// The process of an exit, and what the exit waits for besides the process's own start and output.
#[derive(Debug, Clone, Copy)]
pub enum Whose<'a> {
    /// The exit of an exec waits for nothing else.
    Exec,
    /// The exit of an init comes last: after the exits of these execs and after a checkpoint.
    Init(&'a [&'a Life], Checkpointing),
}

impl Whose<'_> {
    /// Whether an exec or a checkpoint holds the exit back.
    fn waits(self) -> bool {
        match self {
            Self::Exec => false,
            Self::Init(execs, checkpointing) => {
                checkpointing == Checkpointing::UnderWay
                    || execs.iter().any(|exec| exec.has_exit_to_come())
            }
        }
    }
}

/// The exit of the process with this `life`, if the exit may be published now.
pub fn exit_to_publish(life: &Life, whose: Whose<'_>) -> Option<Exit> {
    let Life::Ended(End {
        exit,
        output: Output::Delivered,
        ..
    }) = life
    else {
        return None;
    };
    (!whose.waits()).then_some(*exit)
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
    /// The status that the rest of the shim sees.
    pub fn status(&self) -> Status {
        match self {
            Self::Created | Self::Starting(Start { end: None, .. }) => Status::Created,
            Self::Running => Status::Running,
            Self::Paused => Status::Paused,
            Self::Starting(Start {
                end: Some(End { exit, .. }),
                ..
            })
            | Self::Ended(End {
                exit, held: true, ..
            }) => Status::Ending(*exit),
            Self::Ended(End { exit, .. }) => Status::Ended(*exit),
            Self::Failed(exit) => Status::Failed(*exit),
            Self::Stopped(exit) => Status::Stopped(*exit),
        }
    }

    /// The exit, if the exit is known and not published.
    pub fn unpublished(&self) -> Option<Exit> {
        match self {
            Self::Starting(Start { end, .. }) => end.as_ref().map(|end| end.exit),
            Self::Ended(end) => Some(end.exit),
            Self::Created | Self::Running | Self::Paused | Self::Failed(_) | Self::Stopped(_) => {
                None
            }
        }
    }

    /// Whether the exit of this process is still to be published. An exec that never ran has no exit.
    pub fn has_exit_to_come(&self) -> bool {
        match self {
            Self::Starting(_) | Self::Running | Self::Paused | Self::Ended(_) => true,
            Self::Created | Self::Failed(_) | Self::Stopped(_) => false,
        }
    }

    /// Whether the process is being started.
    pub fn is_starting(&self) -> bool {
        matches!(self, Self::Starting(_))
    }

    /// Puts an end to a start that is under way: the start is given up unless the start is over soon.
    pub fn hurry(&mut self) {
        if let Self::Starting(start) = self {
            start.hurry = None;
        }
    }

    /// The state after the end of the process. During a start the exit is kept until the start is over.
    #[must_use]
    pub fn ended(self, end: End) -> Self {
        match self {
            Self::Created | Self::Running | Self::Paused => Self::Ended(end),
            Self::Starting(start) => Self::Starting(Start {
                waiting: start.waiting,
                hurry: None,
                end: Some(end),
            }),
            Self::Ended(_) | Self::Failed(_) | Self::Stopped(_) => self,
        }
    }

    /// The state of a process whose exit may be held back by something else than the reader.
    #[must_use]
    pub fn held_back(mut self, whose: Whose<'_>) -> Self {
        if let Self::Ended(end) = &mut self {
            end.held = whose.waits();
        }
        self
    }

    /// The state after the output has been read.
    #[must_use]
    pub fn delivered(mut self) -> Self {
        if let Self::Ended(end) | Self::Starting(Start { end: Some(end), .. }) = &mut self {
            end.output = Output::Delivered;
        }
        self
    }

    /// The state after a start that has succeeded, and the calls that waited for the start.
    pub fn started(self) -> (Self, Vec<Request>) {
        self.start_over(Self::Running)
    }

    /// The state after a start that has failed, and the calls that waited. The process is as before, unless the process
    /// has ended.
    pub fn start_failed(self) -> (Self, Vec<Request>) {
        self.start_over(Self::Created)
    }

    fn start_over(self, otherwise: Self) -> (Self, Vec<Request>) {
        match self {
            Self::Starting(Start { waiting, end, .. }) => {
                (end.map_or(otherwise, Self::Ended), waiting)
            }
            Self::Created
            | Self::Running
            | Self::Paused
            | Self::Ended(_)
            | Self::Failed(_)
            | Self::Stopped(_) => (self, Vec::new()),
        }
    }
}

impl Status {
    /// The exit of a process that has ended.
    pub fn exit(self) -> Option<Exit> {
        match self {
            Self::Ending(exit) | Self::Ended(exit) | Self::Stopped(exit) => Some(exit),
            Self::Created | Self::Running | Self::Paused | Self::Failed(_) => None,
        }
    }

    /// The exit, once the exit is published. A Wait resolves with this exit.
    pub fn published_exit(self) -> Option<Exit> {
        match self {
            Self::Failed(exit) | Self::Stopped(exit) => Some(exit),
            Self::Created | Self::Running | Self::Paused | Self::Ending(_) | Self::Ended(_) => None,
        }
    }

    /// The word for this status in an error.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Failed(_) => "failed",
            Self::Ending(_) | Self::Ended(_) | Self::Stopped(_) => "stopped",
        }
    }

    /// Refuses `call` if this status does not allow the call.
    ///
    /// # Errors
    /// `NotFound` for a Kill of a process that has ended: containerd then takes the process for dead.
    /// `FailedPrecondition` for all other calls.
    pub fn check(self, call: Call) -> Result<()> {
        let fits = match call {
            Call::Start => matches!(self, Self::Created),
            Call::Delete => !matches!(self, Self::Running | Self::Paused),
            Call::Pause => matches!(self, Self::Running),
            // An exec may be added to what runs for State, and is refused at its Start.
            Call::Exec => matches!(self, Self::Created | Self::Running | Self::Ending(_)),
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
