//! A process of a container: the life, the view, the streams and the child.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use log::Level;
use rustix::process::{Pid, Signal};
use serde_json::{Map, Value};
use tokio::sync::watch;

use super::event::{Event, Events};
use super::mailbox::{Request, View};
use super::start::{Hurried, given_up};
use super::state::{Life, Status, Whose, exit_to_publish};
use crate::error::{Error, Result};
use crate::io::{self, Io, Prepared, Recipient};
use crate::kernel::exits::{Child, Claim, Exit, Exits};
use crate::runtime::runc::{Runc, init_pid, read_pid};

/// A process of the container.
#[derive(Debug)]
pub(super) struct Process {
    life: Life,
    view: watch::Sender<View>,
    /// For signals: from the moment when runc has made the process until the exit is published.
    pub(super) child: Option<Child>,
    pub(super) io: Io,
}

impl Process {
    pub(super) fn new(view: watch::Sender<View>) -> Self {
        Self {
            life: Life::Created,
            view,
            child: None,
            io: Io::none(),
        }
    }

    pub(super) fn life(&self) -> &Life {
        &self.life
    }

    /// Gives access to the data of the current state. The status must stay the same, because the view does not follow.
    pub(super) fn life_mut(&mut self) -> &mut Life {
        &mut self.life
    }

    /// Goes on to the next state, and shows the new status in the view.
    pub(super) fn go_on(&mut self, next: impl FnOnce(Life) -> Life) {
        self.life = next(std::mem::replace(&mut self.life, Life::Created));
        let status = self.life.status();
        self.view.send_modify(|view| view.status = status);
    }

    /// Ends the start with `result`. Returns the calls that waited for the end of the start.
    pub(super) fn end_start(&mut self, result: &Result<Pid>) -> Vec<Request> {
        let mut waiting = Vec::new();
        self.go_on(|life| {
            let (life, waited) = match result {
                Ok(_) => life.started(),
                Err(_) => life.start_failed(),
            };
            waiting = waited;
            life
        });
        waiting
    }

    pub(super) fn status(&self) -> Status {
        self.life.status()
    }

    pub(super) fn pid(&self) -> Option<Pid> {
        self.view.borrow().pid
    }

    /// Resolves when the process has ended, published or not.
    pub(super) fn ended(&self) -> impl Future<Output = ()> + use<> {
        let mut view = self.view.subscribe();
        async move {
            // An error means that the container is deleted.
            let _ = view.wait_for(|view| view.status.exit().is_some()).await;
        }
    }

    /// The level of the log's lines on this exec. A terminal is a person's; probes, which come all the time, have none.
    pub(super) fn log_level(&self) -> Level {
        if self.view.borrow().io.terminal {
            Level::Info
        } else {
            Level::Debug
        }
    }

    /// The streams as containerd named them.
    pub(super) fn request(&self) -> io::Request {
        self.view.borrow().io.clone()
    }

    /// Takes in the process that runc has made.
    pub(super) fn has_begun(&mut self, child: Child, io: Io) {
        let pid = child.pid();
        self.child = Some(child);
        self.io = io;
        self.view.send_modify(|view| view.pid = Some(pid));
    }

    /// Publishes the exit, if the exit may be published now. Closes the streams first. Otherwise shows what holds the
    /// exit back.
    pub(super) fn publish_exit(
        &mut self,
        container: &str,
        id: &str,
        whose: Whose<'_>,
        events: &Events,
    ) -> Option<Exit> {
        let Some(exit) = exit_to_publish(&self.life, whose) else {
            if matches!(self.life, Life::Ended(_)) {
                self.go_on(|life| life.held_back(whose));
            }
            return None;
        };
        self.io.close();
        self.child = None;
        self.go_on(|_| Life::Stopped(exit));
        events.send(Event::Exit {
            container: container.to_owned(),
            id: id.to_owned(),
            pid: self.pid(),
            exit,
        });
        Some(exit)
    }
}

/// A process that was added to a container.
#[derive(Debug)]
pub(super) struct Exec {
    pub(super) process: Process,
    pub(super) files: ExecFiles,
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
    /// The files of the exec with this number. An exec's id does not name files: the id may be no file name, and a
    /// later exec may have the same id.
    pub(super) fn new(bundle: &Path, number: u64) -> Self {
        Self {
            bundle: bundle.to_owned(),
            console: format!("console-{number}"),
            process: bundle.join(format!("exec-{number}.json")),
            pid: bundle.join(format!("exec-{number}.pid")),
        }
    }

    /// Removes the files. A file that cannot be removed goes with the bundle.
    pub(super) fn remove(&self) {
        let _ = std::fs::remove_file(&self.process);
        let _ = std::fs::remove_file(&self.pid);
    }
}

/// The OCI process of an exec as JSON for runc. The field `terminal` is set to what the request says.
///
/// # Errors
/// `InvalidArgument` when `json` is no JSON object.
pub(super) fn exec_process(json: &[u8], terminal: bool) -> Result<Vec<u8>> {
    let wrong = |e: serde_json::Error| Error::InvalidArgument(format!("process of the exec: {e}"));
    let mut process: Map<String, Value> = serde_json::from_slice(json).map_err(wrong)?;
    process.insert("terminal".into(), terminal.into());
    serde_json::to_vec(&process).map_err(wrong)
}

/// Runs `runc restore`: the processes of a saved container run again, with new streams.
pub(super) async fn restore(
    runc: &Runc,
    bundle: &Path,
    image: &Path,
    io: &io::Request,
    recipient: Recipient<'_>,
    hurried: Hurried,
) -> Result<(Claim, Io)> {
    let exits = recipient.exits;
    let (prepared, streams) = io.prepare(recipient).await?;
    // The exit of a process is kept that runc has made before runc is given up.
    let _expected = exits.expect();
    match hurried.bound(runc.restore(image, streams)).await {
        Some(restored) => attach(prepared, restored?).await,
        None => {
            end_unclaimed(exits, init_pid(bundle));
            Err(given_up("runc restore"))
        }
    }
}

/// Runs `runc exec`: the exec runs, with its streams.
pub(super) async fn start_exec(
    runc: &Runc,
    files: &ExecFiles,
    io: &io::Request,
    recipient: Recipient<'_>,
    hurried: Hurried,
) -> Result<(Claim, Io)> {
    let exits = recipient.exits;
    let (prepared, streams) = io.prepare(recipient).await?;
    // As in `restore`.
    let _expected = exits.expect();
    let started = runc.exec(&files.process, &files.pid, streams);
    match hurried.bound(started).await {
        Some(started) => attach(prepared, started?).await,
        None => {
            end_unclaimed(exits, read_pid(&files.pid).ok());
            Err(given_up("runc exec"))
        }
    }
}

/// Kills the process of a runc that was given up after it had written the pid file. Nobody waits for the process.
fn end_unclaimed(exits: &Arc<Exits>, pid: Option<Pid>) {
    if let Some(pid) = pid {
        // The signal fails only if the process is reaped already.
        let _ = exits.claim(pid).child.signal(Signal::KILL);
    }
}

/// Attaches and starts the streams of a process that runs already.
async fn attach(prepared: Prepared, claim: Claim) -> Result<(Claim, Io)> {
    let attached = prepared.attach().await.and_then(|mut io| {
        io.start()?;
        Ok(io)
    });
    match attached {
        Ok(io) => Ok((claim, io)),
        Err(error) => {
            // A process without streams must not run on unseen. The signal fails only if the process is reaped already.
            let _ = claim.child.signal(Signal::KILL);
            Err(error)
        }
    }
}
