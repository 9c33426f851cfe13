//! Loggers: a program takes a process's output, through pipes that the shim does not touch.
//!
//! ```text
//!  process ──stdout──▶ 3 ┐
//!  process ──stderr──▶ 4 ├ logger ──5──▶ shim: ready
//!                        └ CONTAINER_ID, CONTAINER_NAMESPACE, and nothing else in its environment
//!
//!  runs ──▶ ends by itself (its input ended, or it died): said in the log
//!    └─ process deleted ──▶ has DRAIN to read to the end ──▶ SIGTERM ──▶ has FLUSH ──▶ SIGKILL
//! ```
//!
//! The logger of an exec that left others in the background does not see the end of its input, so it is asked to end.
//! It runs beside the shim, in its cgroup, and dies with it.

use std::io::PipeReader;
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use log::{info, warn};
use rustix::process::Signal;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::io_error;
use super::uri::{Program, Readiness};
use crate::error::{Error, Result};
use crate::kernel::exits::{Child, Claim, Exited, Exits};

/// How long a logger may take until it is ready.
const READY: Duration = Duration::from_secs(10);
/// How long it may read on when its process has been deleted.
const DRAIN: Duration = Duration::from_secs(3);
/// How long it may take to end when it has been asked to.
const FLUSH: Duration = Duration::from_secs(10);

/// Whose output a logger takes; it finds this in its environment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    /// `CONTAINER_ID`: the container's id, or the exec's.
    pub(super) id: &'a str,
    /// `CONTAINER_NAMESPACE`: containerd's namespace.
    pub(super) namespace: &'a str,
}

/// A running logger. When this is dropped, it is ended.
#[derive(Debug)]
pub struct Logger {
    name: String,
    /// Dropped to begin its end.
    _end: oneshot::Sender<()>,
    supervisor: JoinHandle<()>,
}

/// The ends of the pipes that a process writes.
#[derive(Debug)]
pub(super) struct Pipes {
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
}

impl Logger {
    /// Starts `program` and waits until it is ready.
    ///
    /// # Errors
    /// `Io` when it cannot be started, `FailedPrecondition` when it does not get ready in time.
    pub(super) async fn start(
        program: &Program,
        source: Source<'_>,
        exits: &Arc<Exits>,
    ) -> Result<(Self, Pipes)> {
        let failed = |operation| io_error(operation, &program.path);
        let pipe = || std::io::pipe().map_err(io_error("make a pipe for", &program.path));
        let (stdout_reader, stdout) = pipe()?;
        let (stderr_reader, stderr) = pipe()?;
        let (ready, ready_writer) = pipe()?;
        let mut command = Command::new(&program.path);
        command
            .args(&program.arguments)
            .env_clear()
            .env("CONTAINER_ID", source.id)
            .env("CONTAINER_NAMESPACE", source.namespace)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        pause::die_with_parent(&mut command);
        let handed = [
            stdout_reader.into(),
            stderr_reader.into(),
            ready_writer.into(),
        ];
        pause::hand_over(&mut command, handed).map_err(failed("hand pipes to"))?;
        let Claim { child, exit } = exits
            .spawn(&mut command)
            .map_err(failed("start the logger"))?;
        // The command holds the shim's copies of the logger's ends of the pipes.
        drop(command);
        let name = program.name().to_string_lossy().into_owned();
        if let Err(why) = until_ready(ready, program.readiness).await {
            // Nothing has been written that it could still deliver.
            let _ = child.signal(Signal::KILL);
            return Err(Error::FailedPrecondition(format!("logger {name}: {why}")));
        }
        let (end, ending) = oneshot::channel();
        let supervisor = supervise(name.clone(), child, exit, ending);
        let logger = Self {
            name,
            _end: end,
            supervisor: tokio::spawn(supervisor),
        };
        let pipes = Pipes {
            stdout: stdout.into(),
            stderr: stderr.into(),
        };
        Ok((logger, pipes))
    }

    /// Checks that it is still there to read what will be written.
    ///
    /// # Errors
    /// `FailedPrecondition` when it has ended.
    pub(super) fn check(&self) -> Result<()> {
        if self.supervisor.is_finished() {
            return Err(Error::FailedPrecondition(format!(
                "logger {} has ended before its process began: it must read file descriptors 3 and 4 to their end",
                self.name
            )));
        }
        Ok(())
    }

    /// The process is deleted: the logger is ended. Resolves when it has, after [`DRAIN`] and [`FLUSH`] at the latest.
    pub(super) fn end(self) -> JoinHandle<()> {
        self.supervisor
    }
}

async fn until_ready(ready: PipeReader, readiness: Readiness) -> Result<(), String> {
    let mut byte = [0];
    let mut ready = pipe::Receiver::from_owned_fd(ready.into())
        .map_err(|error| format!("wait until it is ready: {error}"))?;
    match (timeout(READY, ready.read(&mut byte)).await, readiness) {
        (Ok(Ok(0)), Readiness::Byte) => Err(
            "ended or closed file descriptor 5 without a word: one of binary-v2 writes a byte to it when it is ready"
                .to_owned(),
        ),
        (Ok(Ok(_)), Readiness::Byte | Readiness::Close) => Ok(()),
        (Ok(Err(error)), _) => Err(format!("wait until it is ready: {error}")),
        (Err(_), Readiness::Byte) => Err(format!(
            "not ready within {READY:?}: it must write a byte to file descriptor 5"
        )),
        (Err(_), Readiness::Close) => Err(format!(
            "not ready within {READY:?}: it must close file descriptor 5"
        )),
    }
}

/// Sees a logger to its end. The one waiter reaps it.
async fn supervise(name: String, child: Child, mut exit: Exited, end: oneshot::Receiver<()>) {
    let by_itself = tokio::select! {
        exit = &mut exit => Some(exit),
        // Nothing is ever sent: the sender is dropped.
        _ = end => timeout(DRAIN, &mut exit).await.ok(),
    };
    match by_itself {
        Some(Ok(exit)) if exit.status != 0 => {
            return warn!("logger {name} ended with status {}", exit.status);
        }
        Some(_) => return info!("logger {name} ended"),
        None => {}
    }
    // What has ended meanwhile needs no signal.
    let _ = child.signal(Signal::TERM);
    if timeout(FLUSH, exit).await.is_err() {
        warn!("logger {name} did not end within {FLUSH:?} of SIGTERM and is killed");
        let _ = child.signal(Signal::KILL);
    }
}
