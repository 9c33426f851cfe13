//! A change on a node, from the journal to the restart, and back where something fails.

use std::io::Write;

use super::host::Start;
use super::journal::Journal;
use super::plan::{Change, Found, HANDLER, Reader};
use super::{Handler, JOURNAL, failed, folder, handler, host, rescue, say, settle, text};
use crate::error::{Error, Result};
use crate::node::containerd::Containerd;

/// Why a change was not made.
enum Failure {
    /// containerd has not seen the change: another run may try again.
    Passing(Error),
    /// containerd was restarted for the change.
    Restarted(Error),
}

impl From<Error> for Failure {
    /// Whether containerd was restarted, the journal knows.
    fn from(why: Error) -> Self {
        Self::Restarted(why)
    }
}

/// A node to be changed.
pub(super) struct Node {
    pub(super) containerd: Containerd,
    pub(super) found: Found,
    pub(super) program: Vec<u8>,
}

impl Node {
    /// Makes the changes, and sees containerd come up with them.
    ///
    /// # Errors
    /// Why the node is as before; `FailedPrecondition` also for a change that has failed before.
    pub(super) fn carry_out(
        &self,
        out: &mut dyn Write,
        changes: &[Change],
        handler: Handler,
    ) -> Result<()> {
        let digest = failed::digest(&self.found, changes, handler);
        failed::refuse(&digest)?;
        match self.all_or_nothing(out, changes, handler) {
            Ok(()) => {
                failed::forget();
                Ok(())
            }
            Err(Failure::Passing(why)) => Err(why),
            Err(Failure::Restarted(why)) => {
                failed::remember(&digest, &why);
                Err(why)
            }
        }
    }

    fn all_or_nothing(
        &self,
        out: &mut dyn Write,
        changes: &[Change],
        handler: Handler,
    ) -> Result<(), Failure> {
        let restarts = changes
            .iter()
            .any(|change| change.reader == Reader::Containerd);
        if restarts {
            host::refuse_if_a_restart_is_due(&self.containerd, &self.found.paths())
                .map_err(Failure::Passing)?;
            // What the end of the change is told by must be true, and known, before.
            host::has_cri(&self.containerd).map_err(Failure::Passing)?;
        }
        let before = self.containerd.pid.and_then(Start::of);
        host::ignore_signals().map_err(Failure::Passing)?;
        let mut journal =
            Journal::begin(&folder(JOURNAL), changes, before).map_err(Failure::Passing)?;
        let changed = self.change(out, &mut journal, changes, handler);
        let ended = match changed {
            Ok(()) => journal.close().map_err(Failure::Passing),
            Err(failure) => {
                let restarted = matches!(failure, Failure::Restarted(_))
                    && journal.may_have_been_read(Start::now());
                let (Failure::Passing(why) | Failure::Restarted(why)) = failure;
                say(out, &format!("failed: {why}"));
                let why = roll_back(out, journal, &why);
                Err(match restarted {
                    true => Failure::Restarted(why),
                    false => Failure::Passing(why),
                })
            }
        };
        settle();
        ended
    }

    fn change(
        &self,
        out: &mut dyn Write,
        journal: &mut Journal,
        changes: &[Change],
        handler: Handler,
    ) -> Result<(), Failure> {
        rescue::arm(&self.program)?;
        // What pods need goes when no pod can start any more.
        let (before, after): (Vec<_>, Vec<_>) = changes
            .iter()
            .partition(|change| handler == Handler::Listed || change.reader == Reader::Containerd);
        apply(out, journal, &before)?;
        if changes
            .iter()
            .any(|change| change.reader == Reader::Containerd)
        {
            // What containerd would make of the files is known before it has to live with them.
            self.compare(&self.containerd, handler)?;
            journal.before_restart()?;
            say(out, "restart containerd");
            host::restart()?;
            self.compare(&host::wait()?, handler)?;
        }
        if handler == Handler::Gone {
            refuse_pods().map_err(Failure::Passing)?;
        }
        Ok(apply(out, journal, &after)?)
    }

    /// Compares the effective configuration with the one from before: our handler, and nothing else.
    fn compare(&self, containerd: &Containerd, expected: Handler) -> Result<()> {
        let dump = text::parse(&containerd.dump()?)?;
        if let Some(key) = handler::difference(&self.found.dump, &dump) {
            return Err(Error::FailedPrecondition(format!(
                "the change would change more of containerd's configuration than the handler {HANDLER}: {key}"
            )));
        }
        let listed = match handler::of_dump(&dump, HANDLER) {
            Some(_) if handler::is_listed(&dump) => Some(Handler::Listed),
            Some(_) => None,
            None => Some(Handler::Gone),
        };
        if listed != Some(expected) {
            return Err(Error::FailedPrecondition(format!(
                "containerd makes something else of its files: `containerd config dump` shows the handler {HANDLER} as \
                 {}",
                listed.map_or("another program's".to_owned(), |seen| format!("{seen:?}")
                    .to_lowercase())
            )));
        }
        Ok(())
    }
}

fn apply(out: &mut dyn Write, journal: &Journal, changes: &[&Change]) -> Result<()> {
    for change in changes {
        let verb = if change.content.is_some() {
            "write"
        } else {
            "remove"
        };
        say(out, &format!("{verb} {}", change.path.display()));
        journal.apply(change)?;
    }
    Ok(())
}

/// Refuses to take the shim away from pods.
///
/// # Errors
/// `FailedPrecondition`, with what to do.
pub(super) fn refuse_pods() -> Result<()> {
    match host::shims() {
        0 => Ok(()),
        shims => Err(Error::FailedPrecondition(format!(
            "{shims} shims serve on this node: `containerd-shim-pause-v2 pods` lists them; delete those pods, and try \
             again"
        ))),
    }
}

/// Makes every file as before, and the containerd with it. Returns what to say.
fn roll_back(out: &mut dyn Write, journal: Journal, why: &Error) -> Error {
    say(out, "roll back: every file as before");
    let why = why.to_string();
    let why = why.trim_end_matches('.');
    match undo(out, journal) {
        Ok(()) => Error::FailedPrecondition(format!("{why}. The node is as before")),
        Err(error) => {
            Error::FailedPrecondition(format!("{why}. AND THE ROLL-BACK FAILED: {error}"))
        }
    }
}

/// Makes every file as before, and the containerd with it: also where a file cannot be put back, for a node without a
/// containerd is worse than that. One restart is enough, whatever comes of it: no later run makes another.
pub(super) fn undo(out: &mut dyn Write, mut journal: Journal) -> Result<()> {
    let undone = journal.undo();
    let mut due = journal.may_have_been_read(Start::now());
    let mut up = Ok(());
    if due {
        say(out, "restart containerd");
        up = host::restart()
            .and_then(|()| {
                due = false;
                journal.after_restart(Start::now())
            })
            .and_then(|()| host::wait().map(drop));
    }
    // A restart that was not made is the next run's to make.
    let closed = match undone {
        Ok(()) if !due => journal.close(),
        undone => undone,
    };
    both(closed, up)
}

/// Both failures in one.
fn both(one: Result<()>, other: Result<()>) -> Result<()> {
    match (one, other) {
        (Err(one), Err(other)) => Err(Error::FailedPrecondition(format!("{one}; and {other}"))),
        (one, other) => one.and(other),
    }
}
