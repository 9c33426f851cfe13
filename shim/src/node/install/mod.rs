//! `install` and `uninstall`: the binary and the handler onto a node, and off again.
//!
//! ```text
//!  lock ── repair what a killed run has left ── look (`host`) ── plan ── journal
//!      ── change the files ── compare `containerd config dump` ── restart ── wait for CRI ── close the journal
//!                  └──────────────────┴─────────────────┴──────────┴── failed: every file as before, restart, say why
//! ```
//! containerd is restarted only when one of its files has changed. From the journal to the end, `rescue` is ready to do the
//! repair, should this program be killed.

mod carry;
mod failed;
mod handler;
mod host;
mod journal;
mod look;
mod plan;
mod rescue;
pub(crate) mod text;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use self::carry::Node;
use self::journal::Journal;
use self::look::{look, this_program};
use self::plan::HANDLER;
use crate::error::{Error, Result};
use crate::runtime::options::DEFAULT_FILE;

/// What is kept while a change is under way; the folder goes with the end.
const STATE: &str = "/var/lib/containerd-shim-pause-v2";

const JOURNAL: &str = "journal";

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
        failed::forget();
        say(
            out,
            &format!(
                "containerd {} has the handler {HANDLER}: nothing to do",
                found.version
            ),
        );
        // Another's change, or one that a person has put back: the handler may be in the files alone.
        if let Err(why) = host::refuse_if_a_restart_is_due(&containerd, &found.paths()) {
            say(out, &format!("note: {why}"));
        }
        return Ok(());
    }
    let node = Node {
        containerd,
        found,
        program,
    };
    node.carry_out(out, &changes, Handler::Listed)?;
    say(
        out,
        &format!(
            "containerd {} has the handler {HANDLER}",
            node.found.version
        ),
    );
    Ok(())
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
    carry::refuse_pods()?;
    let containerd = host::containerd()?;
    let found = look(&containerd)?;
    let changes = plan::uninstall(&found)?;
    if changes.is_empty() {
        failed::forget();
        say(out, "nothing of the shim's is on this node");
        return Ok(());
    }
    let node = Node {
        containerd,
        found,
        program,
    };
    node.carry_out(out, &changes, Handler::Gone)?;
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

/// As [`repair`], before containerd starts: the unit of a boot runs this. A restart would wait for that unit's end.
///
/// # Errors
/// As [`repair`]; `FailedPrecondition` while containerd runs.
pub fn repair_files(out: &mut dyn Write) -> Result<()> {
    host::enter()?;
    let _lock = host::lock()?;
    let Some(journal) = Journal::left(&folder(JOURNAL))? else {
        return Ok(());
    };
    if host::main_pid()?.is_some() {
        return Err(Error::FailedPrecondition(
            "containerd runs, and may have read the files: run `containerd-shim-pause-v2 repair`"
                .to_owned(),
        ));
    }
    say(out, "an earlier run was interrupted: every file as before");
    journal.undo()?;
    journal.close()?;
    settle();
    Ok(())
}

fn undo_interrupted(out: &mut dyn Write) -> Result<()> {
    let Some(journal) = Journal::left(&folder(JOURNAL))? else {
        return Ok(());
    };
    say(out, "an earlier run was interrupted: every file as before");
    let undone = carry::undo(out, journal);
    settle();
    undone
}

fn folder(name: &str) -> PathBuf {
    Path::new(STATE).join(name)
}

/// Takes away what is kept for a repair, when there is nothing left to repair.
fn settle() {
    if !Journal::is_left(&folder(JOURNAL)) {
        rescue::disarm();
        // Something else may be there.
        let _ = fs::remove_dir(STATE);
    }
}

fn say(out: &mut dyn Write, words: &str) {
    let _ = writeln!(out, "{words}").and_then(|()| out.flush());
}
