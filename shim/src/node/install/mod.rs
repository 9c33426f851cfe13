//! `install` and `uninstall`: the binary and the handler onto a node, and off again.
//!
//! ```text
//!  lock ── repair what a killed run has left ── look (`host`) ── plan ── journal
//!      ── change the files ── compare `containerd config dump` ── restart ── wait for CRI ── close the journal
//!                  └──────────────────┴─────────────────┴──────────┴── failed: every file as before, restart, say why
//! ```
//! containerd is restarted only when one of its files has changed. Between the restart and the end, a timer of systemd is
//! ready to do the repair, should this program be killed.

mod handler;
mod host;
mod journal;
mod look;
mod plan;
pub(crate) mod text;

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use self::journal::Journal;
use self::look::{look, read, this_program};
use self::plan::{Change, Found, HANDLER, Reader};
use super::containerd::Containerd;
use crate::error::{Error, IoError, Result};
use crate::runtime::options::DEFAULT_FILE;

/// What is kept while a change is under way; the folder goes with the end.
const STATE: &str = "/var/lib/containerd-shim-pause-v2";

/// What an effective configuration must say in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Handler {
    Listed,
    Gone,
}

/// Puts this program and its handler onto the node, and says on `out` what was done.
///
/// # Errors
/// `FailedPrecondition` for a node that this program does not change, and for a containerd that did not take the change:
/// then the node is as before. `Io` for what the kernel refuses.
pub fn install(out: &mut dyn Write) -> Result<()> {
    let program = this_program()?;
    host::enter()?;
    let _lock = host::lock()?;
    undo_interrupted(out)?;
    let containerd = host::containerd()?;
    let found = look(&containerd)?;
    let changes = plan::install(&found, &program)?;
    if changes.is_empty() {
        say(
            out,
            &format!(
                "containerd {} has the handler {HANDLER}: nothing to do",
                found.version
            ),
        );
        return Ok(());
    }
    let digest = digest(&found, &changes);
    refuse_what_has_failed(&digest)?;
    let node = Node {
        containerd,
        found,
        program,
    };
    match node.carry_out(out, &changes, Handler::Listed) {
        Ok(()) => {
            say(
                out,
                &format!(
                    "containerd {} has the handler {HANDLER}",
                    node.found.version
                ),
            );
            forget_failure();
            Ok(())
        }
        Err(Failure::Passing(why)) => Err(why),
        Err(Failure::RolledBack(why)) => {
            remember_failure(&digest, &why);
            Err(why)
        }
    }
}

/// Takes off the node what [`install`] has put there, and nothing else.
///
/// # Errors
/// As [`install`]; `FailedPrecondition` also while pods of the node run under the shim.
pub fn uninstall(out: &mut dyn Write) -> Result<()> {
    let program = this_program()?;
    host::enter()?;
    let _lock = host::lock()?;
    undo_interrupted(out)?;
    let shims = host::shims();
    if shims > 0 {
        return Err(Error::FailedPrecondition(format!(
            "{shims} pods of this node run under this shim: delete the pods first (kubectl get pods -A -o wide), and \
             try again"
        )));
    }
    let containerd = host::containerd()?;
    let found = look(&containerd)?;
    let changes = plan::uninstall(&found)?;
    forget_failure();
    if changes.is_empty() {
        say(out, "nothing of the shim's is on this node");
        return Ok(());
    }
    let node = Node {
        containerd,
        found,
        program,
    };
    node.carry_out(out, &changes, Handler::Gone)
        .map_err(Failure::into_error)?;
    for change in &changes {
        // Folders that the installer has made, unless somebody else uses them.
        let ours = [plan::drop_in(&node.found), DEFAULT_FILE.into()].contains(&change.path);
        if let Some(folder) = change.path.parent().filter(|_| ours) {
            let _ = fs::remove_dir(folder);
        }
    }
    say(out, "the shim is off this node");
    Ok(())
}

/// Undoes what a killed [`install`] or [`uninstall`] has left. systemd runs this, too.
///
/// # Errors
/// `Io`, or `FailedPrecondition` for a file that somebody else has changed since.
pub fn repair(out: &mut dyn Write) -> Result<()> {
    host::enter()?;
    let _lock = host::lock()?;
    undo_interrupted(out)
}

fn undo_interrupted(out: &mut dyn Write) -> Result<()> {
    let Some(journal) = Journal::left(&folder("journal"))? else {
        return Ok(());
    };
    say(out, "an earlier run was interrupted: every file as before");
    undo(out, journal)?;
    remove_state();
    Ok(())
}

/// Makes every file as before, and the containerd with it: also where a file cannot be put back, for a node without a
/// containerd is worse than that. One restart is enough, whatever comes of it: no later run makes another.
fn undo(out: &mut dyn Write, mut journal: Journal) -> Result<()> {
    let undone = journal.undo();
    let mut up = Ok(());
    if journal.may_have_been_read() {
        say(out, "restart containerd");
        up = host::restart()
            .and_then(|()| journal.after_restart())
            .and_then(|()| host::wait().map(drop));
    }
    // A restart that was not made is the next run's to make.
    let closed = match undone {
        Ok(()) if !journal.may_have_been_read() => journal.close(),
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

/// Why a change was not made.
enum Failure {
    /// Something that another run may find otherwise.
    Passing(Error),
    /// The node is as before, if the words say nothing else.
    RolledBack(Error),
}

impl Failure {
    fn into_error(self) -> Error {
        match self {
            Self::Passing(why) | Self::RolledBack(why) => why,
        }
    }
}

/// A node to be changed.
struct Node {
    containerd: Containerd,
    found: Found,
    program: Vec<u8>,
}

impl Node {
    fn carry_out(
        &self,
        out: &mut dyn Write,
        changes: &[Change],
        handler: Handler,
    ) -> Result<(), Failure> {
        let restarts = changes
            .iter()
            .any(|change| change.reader == Reader::Containerd);
        if restarts {
            let files: Vec<_> = self
                .found
                .files
                .iter()
                .map(|(path, _)| path.clone())
                .collect();
            host::refuse_if_a_restart_is_due(&self.containerd, &files).map_err(Failure::Passing)?;
            // What the end of the change is told by must be true, and known, before.
            host::has_cri(&self.containerd).map_err(Failure::Passing)?;
        }
        let mut journal = Journal::begin(&folder("journal"), changes).map_err(Failure::Passing)?;
        let changed = self.change(out, &mut journal, changes, handler);
        let ended = match changed {
            Ok(()) => journal.close().map_err(Failure::Passing),
            Err(why) => {
                say(out, &format!("failed: {why}"));
                Err(Failure::RolledBack(roll_back(out, journal, &why)))
            }
        };
        host::disarm();
        remove_state();
        ended
    }

    fn change(
        &self,
        out: &mut dyn Write,
        journal: &mut Journal,
        changes: &[Change],
        handler: Handler,
    ) -> Result<()> {
        for change in changes {
            let verb = if change.content.is_some() {
                "write"
            } else {
                "remove"
            };
            say(out, &format!("{verb} {}", change.path.display()));
            journal.apply(change)?;
        }
        if !changes
            .iter()
            .any(|change| change.reader == Reader::Containerd)
        {
            return Ok(());
        }
        // What containerd would make of the files is known before it has to live with them.
        self.compare(&self.containerd, handler)?;
        let rescue = folder("rescue");
        fs::write(&rescue, &self.program)
            .and_then(|()| fs::set_permissions(&rescue, fs::Permissions::from_mode(0o700)))
            .map_err(IoError::at("write", &rescue))?;
        host::arm(&rescue)?;
        journal.before_restart()?;
        say(out, "restart containerd");
        host::restart()?;
        self.compare(&host::wait()?, handler)
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

// --- what has failed once -----------------------------------------------------------------------------------------

/// A pod that fails is started again and again; containerd must not be.
fn refuse_what_has_failed(digest: &str) -> Result<()> {
    let path = folder("failed");
    match read(&path)?
        .as_deref()
        .and_then(|text| text.split_once('\n'))
    {
        Some((failed, why)) if failed == digest => Err(Error::FailedPrecondition(format!(
            "the same change has failed before, and is not tried again until something differs or {} is removed: {}",
            path.display(),
            why.trim()
        ))),
        _ => Ok(()),
    }
}

fn remember_failure(digest: &str, why: &Error) {
    let path = folder("failed");
    let _ = fs::create_dir_all(STATE);
    let _ = fs::write(path, format!("{digest}\n{why}\n"));
}

fn forget_failure() {
    let _ = fs::remove_file(folder("failed"));
    remove_state();
}

/// Names a change on a node.
fn digest(found: &Found, changes: &[Change]) -> String {
    let mut digest = Sha256::new();
    digest.update(format!("{} ", found.version));
    digest.update(serde_json::to_vec(&found.dump).unwrap_or_default());
    for change in changes {
        digest.update(change.path.as_os_str().as_encoded_bytes());
        digest.update(change.content.as_deref().unwrap_or_default());
    }
    digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn folder(name: &str) -> PathBuf {
    Path::new(STATE).join(name)
}

fn remove_state() {
    let _ = fs::remove_file(folder("rescue"));
    // Something else may be there.
    let _ = fs::remove_dir(STATE);
}

fn say(out: &mut dyn Write, words: &str) {
    let _ = writeln!(out, "{words}").and_then(|()| out.flush());
}
