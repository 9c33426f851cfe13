//! The life of a process, and which call fits which part of it. Pure: nothing here touches the world.
//!
//! ```text
//!             Create              Start               Kill, or it ends         its exit is told
//!  (nothing) ───────▶ Created ───────────▶ Running ──────────────────────▶ Ended ────────────────▶ Stopped
//!                        │                 │     ▲                          ▲                         │
//!                        │           Pause ▼     │ Resume                   │                  Delete ▼
//!                        │                 Paused ──────────────────────────┤                     (nothing)
//!                        └────────────────────── Kill, or it ends ──────────┘
//! ```

use crate::error::{Error, Result};
use crate::kernel::exits::Exit;

/// Where a process is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It is there (an init) or known (an exec), and runs nothing of the user's yet.
    Created,
    /// It runs.
    Running,
    /// Its container is frozen.
    Paused,
    /// It has ended. That is told when it may be: after its start, an init's after its execs', and when what it wrote has
    /// been read.
    Ended(Exit),
    /// It has ended, and the exit is told.
    Stopped(Exit),
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

impl State {
    /// The exit, once there is one.
    pub fn exit(self) -> Option<Exit> {
        match self {
            Self::Ended(exit) | Self::Stopped(exit) => Some(exit),
            Self::Created | Self::Running | Self::Paused => None,
        }
    }

    /// The exit, once it is told: for who waits for it.
    pub fn told(self) -> Option<Exit> {
        match self {
            Self::Stopped(exit) => Some(exit),
            Self::Created | Self::Running | Self::Paused | Self::Ended(_) => None,
        }
    }

    /// Whether `call` fits this state.
    ///
    /// # Errors
    /// `NotFound` for a kill of what has ended (containerd then takes it for dead), `FailedPrecondition` otherwise.
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
            let state = match self {
                Self::Created => "created",
                Self::Running => "running",
                Self::Paused => "paused",
                Self::Ended(_) | Self::Stopped(_) => "stopped",
            };
            Err(Error::FailedPrecondition(format!(
                "cannot {call} a {state} process"
            )))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_call_fits_the_states_it_is_for() {
        let states = [
            State::Created,
            State::Running,
            State::Paused,
            State::Ended(Exit::now(0)),
            State::Stopped(Exit::now(0)),
        ];
        for (call, fits) in [
            (Call::Start, [true, false, false, false, false]),
            (Call::Delete, [true, false, false, true, true]),
            (Call::Pause, [false, true, false, false, false]),
            (Call::Exec, [true, true, false, false, false]),
            (Call::Checkpoint, [false, true, true, false, false]),
            (Call::Resume, [false, false, true, false, false]),
            (Call::Update, [true, true, true, false, false]),
            (Call::Kill, [true, true, true, false, false]),
        ] {
            for (state, fits) in states.into_iter().zip(fits) {
                assert_eq!(state.check(call).is_ok(), fits, "{call:?} in {state:?}");
            }
        }
    }

    #[test]
    fn a_kill_of_the_dead_is_not_found_and_all_else_a_failed_precondition() {
        let dead = State::Stopped(Exit::now(0));
        assert!(matches!(dead.check(Call::Kill), Err(Error::NotFound(_))));
        for call in [
            Call::Start,
            Call::Pause,
            Call::Resume,
            Call::Exec,
            Call::Update,
            Call::Checkpoint,
        ] {
            assert!(matches!(
                dead.check(call),
                Err(Error::FailedPrecondition(_))
            ));
        }
    }
}
