//! Loggers: a program takes a process's output, through pipes that the shim does not touch.
//!
//! ```text
//!  process ──stdout──▶ 3 ┐
//!  process ──stderr──▶ 4 ├ logger ──5──▶ shim: ready
//!                        └ CONTAINER_ID, CONTAINER_NAMESPACE, and nothing else in its environment
//!
//!  runs ──▶ ends by itself (its input ended, or the logger died): the log says so
//!    └─ process deleted ──▶ has DRAIN to read to the end ──▶ SIGTERM ──▶ has FLUSH ──▶ SIGKILL
//! ```
//!
//! An exec may leave processes in the background that keep its output open. The logger of such an exec sees no end of
//! its input, so the shim ends the logger. A logger runs beside the shim, in the shim's cgroup, and dies with the shim.

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

/// How long a logger may take to become ready.
const READY: Duration = Duration::from_secs(10);
/// How long a logger may read on after its process has been deleted.
const DRAIN: Duration = Duration::from_secs(3);
/// The grace period between SIGTERM and SIGKILL.
const FLUSH: Duration = Duration::from_secs(10);

/// Whose output a logger takes. The logger finds these values in its environment.
#[derive(Debug, Clone, Copy)]
pub(super) struct Source<'a> {
    /// `CONTAINER_ID`: the container's id, or the exec's.
    pub(super) id: &'a str,
    /// `CONTAINER_NAMESPACE`: containerd's namespace.
    pub(super) namespace: &'a str,
}

/// A running logger. Dropping this value ends the logger.
#[derive(Debug)]
pub struct Logger {
    name: String,
    /// Dropped to begin the end of the logger.
    _end: oneshot::Sender<()>,
    supervisor: JoinHandle<()>,
}

/// The pipe ends that a process writes into.
#[derive(Debug)]
pub(super) struct Pipes {
    pub(super) stdout: OwnedFd,
    pub(super) stderr: OwnedFd,
}

impl Logger {
    /// Starts `program` as a logger and waits until the logger is ready.
    ///
    /// # Errors
    /// `Io` when the program cannot be started, `FailedPrecondition` when the logger is not ready in time.
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
        // Closes the shim's copies of the logger's pipe ends, which the command holds.
        drop(command);
        let name = program.name().to_string_lossy().into_owned();
        if let Err(why) = until_ready(ready, program.readiness).await {
            // SIGKILL at once: the process has not begun, so the logger has no output to deliver.
            let _ = child.signal(Signal::KILL);
            return Err(Error::FailedPrecondition(format!("logger {name}: {why}")));
        }
        let (end, ending) = oneshot::channel();
        let supervisor = supervise((name.clone(), source.id.to_owned()), child, exit, ending);
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

    /// Checks that the logger still runs, to read what will be written.
    ///
    /// # Errors
    /// `FailedPrecondition` when the logger has ended.
    pub(super) fn check(&self) -> Result<()> {
        if self.supervisor.is_finished() {
            return Err(Error::FailedPrecondition(format!(
                "logger {} has ended before its process began: it must read file descriptors 3 and 4 to their end",
                self.name
            )));
        }
        Ok(())
    }

    /// The process is deleted: ends the logger. The task ends with the logger, after [`DRAIN`] and [`FLUSH`] at the
    /// latest.
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

/// Follows a logger to its end. The log names the logger and the process whose output the logger takes. The one waiter,
/// [`Exits`], reaps the logger.
async fn supervise(
    (name, process): (String, String),
    child: Child,
    mut exit: Exited,
    end: oneshot::Receiver<()>,
) {
    let by_itself = tokio::select! {
        exit = &mut exit => Some(exit),
        // Nothing is ever sent: the drop of the sender is the message.
        _ = end => timeout(DRAIN, &mut exit).await.ok(),
    };
    match by_itself {
        Some(Ok(exit)) if exit.status != 0 => {
            return warn!(logger = name, process, status = exit.status; "logger ended");
        }
        Some(_) => return info!(logger = name, process; "logger ended"),
        None => {}
    }
    // A logger that has ended meanwhile needs no signal.
    let _ = child.signal(Signal::TERM);
    if timeout(FLUSH, exit).await.is_err() {
        warn!(
            logger = name, process, after = FLUSH.as_secs();
            "logger did not end after SIGTERM and is killed"
        );
        let _ = child.signal(Signal::KILL);
    }
}
