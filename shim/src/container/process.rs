//! A process of a container: its streams, its pidfd, what is known of its end.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::process::{Pid, Signal, pidfd_send_signal};
use serde_json::{Map, Value};
use tokio::sync::{oneshot, watch};

use super::Shared;
use crate::container::mailbox::{Command, View};
use crate::container::state::State;
use crate::containerd::events::{Event, Events};
use crate::error::{Error, Result};
use crate::io::{self, Io, Owner, Prepared, Writer};
use crate::kernel::exits::Exit;
use crate::runtime::runc::{Runc, Started};

/// A process of the container.
#[derive(Debug)]
pub(super) struct Process {
    pub(super) view: watch::Sender<View>,
    pub(super) pidfd: Option<rustix::io::Result<OwnedFd>>,
    pub(super) io: Io,
    /// A start is under way, and what waits for its end.
    pub(super) starting: Option<Vec<Command>>,
}

impl Process {
    pub(super) fn new(view: watch::Sender<View>) -> Self {
        Self {
            view,
            pidfd: None,
            io: Io::none(),
            starting: None,
        }
    }

    pub(super) fn state(&self) -> State {
        self.view.borrow().state
    }

    pub(super) fn pid(&self) -> Option<Pid> {
        self.view.borrow().pid
    }

    pub(super) fn set_state(&self, state: State) {
        self.view.send_modify(|view| view.state = state);
    }

    /// It has ended, and nobody has been told yet.
    pub(super) fn untold(&self) -> Option<Exit> {
        match self.state() {
            State::Ended(exit) => Some(exit),
            State::Created | State::Running | State::Paused | State::Stopped(_) => None,
        }
    }

    /// Whether its exit is still to come, or to be told.
    pub(super) fn lives(&self) -> bool {
        self.starting.is_some()
            || matches!(
                self.state(),
                State::Running | State::Paused | State::Ended(_)
            )
    }
}

/// A process that was added.
#[derive(Debug)]
pub(super) struct Exec {
    pub(super) process: Process,
    pub(super) files: ExecFiles,
}

/// Tells of the exit of `process`, once.
pub(super) fn tell_exit(
    container: &str,
    id: &str,
    process: &mut Process,
    events: &Events,
) -> Option<Exit> {
    let exit = process.untold()?;
    process.io.close();
    process.pidfd = None;
    let pid = process.pid();
    process.set_state(State::Stopped(exit));
    events.send(&Event::exited(container, id, pid, exit));
    Some(exit)
}

/// The files of an exec in the bundle.
#[derive(Debug, Clone)]
pub(super) struct ExecFiles {
    pub(super) bundle: PathBuf,
    pub(super) console: String,
    pub(super) process: PathBuf,
    pub(super) pid: PathBuf,
}

impl ExecFiles {
    /// The files of the exec with this number: an id may be what no file name can be, and may come again.
    pub(super) fn new(bundle: &Path, number: u64) -> Self {
        Self {
            bundle: bundle.to_owned(),
            console: format!("console-{number}"),
            process: bundle.join(format!("exec-{number}.json")),
            pid: bundle.join(format!("exec-{number}.pid")),
        }
    }

    /// What stays goes with the bundle.
    pub(super) fn remove(&self) {
        let _ = std::fs::remove_file(&self.process);
        let _ = std::fs::remove_file(&self.pid);
    }
}

/// The OCI process of an exec for runc: JSON that says what the request says about the terminal.
///
/// # Errors
/// `InvalidArgument` when it is no JSON object.
pub(super) fn exec_process(json: &[u8], terminal: bool) -> Result<Vec<u8>> {
    let wrong = |e: serde_json::Error| Error::InvalidArgument(format!("process of the exec: {e}"));
    let mut process: Map<String, Value> = serde_json::from_slice(json).map_err(wrong)?;
    process.insert("terminal".into(), terminal.into());
    serde_json::to_vec(&process).map_err(wrong)
}

/// Runs a saved container's processes again, with new streams.
pub(super) async fn restore(
    runc: &Runc,
    container: &str,
    bundle: &Path,
    image: &Path,
    io: &io::Request,
    owner: Owner,
    shared: &Shared,
) -> Result<(Started, Io)> {
    let streams_for = io::For {
        id: container,
        namespace: &shared.namespace,
        console: (bundle, "console"),
        writer: Writer::Process,
        owner,
        exits: &shared.exits,
    };
    let (prepared, streams) = io.prepare(streams_for).await?;
    let started = runc.restore(image, streams).await?;
    attach(prepared, started).await
}

pub(super) async fn start_exec(
    runc: &Runc,
    exec: &str,
    files: &ExecFiles,
    io: &io::Request,
    owner: Owner,
    shared: &Shared,
) -> Result<(Started, Io)> {
    let streams_for = io::For {
        id: exec,
        namespace: &shared.namespace,
        console: (&files.bundle, &files.console),
        writer: Writer::Shim,
        owner,
        exits: &shared.exits,
    };
    let (prepared, streams) = io.prepare(streams_for).await?;
    let started = runc.exec(&files.process, &files.pid, streams).await?;
    attach(prepared, started).await
}

/// Lets the streams of a process that runs already flow.
async fn attach(prepared: Prepared, started: Started) -> Result<(Started, Io)> {
    let attached = prepared.attach().await.and_then(|mut io| {
        io.start()?;
        Ok(io)
    });
    match attached {
        Ok(io) => Ok((started, io)),
        Err(error) => {
            // Without its streams it must not run on unseen.
            if let Some(Ok(pidfd)) = started.pidfd() {
                let _ = pidfd_send_signal(pidfd, Signal::KILL);
            }
            Err(error)
        }
    }
}

pub(super) fn answer<T>(reply: oneshot::Sender<Result<T>>, result: Result<T>) {
    // The caller may have given up; the work is done all the same.
    let _ = reply.send(result);
}
