//! The streams of a process: between what containerd names and what the process has.
//!
//! ```text
//!  without a terminal                               with a terminal
//!  containerd ──FIFO──▶ shim ──pipe──▶ process      containerd ──FIFO──▶ shim ──▶ pty master ═ slave ── process
//!  containerd ◀──FIFO── process (an init)           containerd ◀──FIFO── shim ◀──     ║
//!  containerd ◀──FIFO── shim ◀──pipe── an exec
//! ```
//!
//! What is copied is copied with back-pressure: nobody is read faster than the other side takes it.

mod copied;
mod fifo;
mod pty;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rustix::fs::{Gid, Uid};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub(crate) use pty::{Console, Size};

use crate::error::{Error, IoError, Result};
use crate::runc::Streams;

/// What containerd asks for: the streams as it names them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Request {
    /// Where input comes from; empty for none.
    pub(crate) stdin: String,
    /// Where output goes; empty for nowhere.
    pub(crate) stdout: String,
    /// Where errors go; empty for nowhere.
    pub(crate) stderr: String,
    /// Whether the process gets a terminal.
    pub(crate) terminal: bool,
}

/// The streams of a process that is about to be made.
#[derive(Debug)]
pub(crate) enum Prepared {
    /// FIFOs, open; the process gets them, or pipes that are copied from and to them.
    Fifos(Fifos),
    /// A terminal, whose master comes through a socket.
    Console(Console),
}

/// The shim's hold on the streams of a process that is there.
#[derive(Debug)]
pub(crate) enum Io {
    /// FIFOs held open.
    Fifos(Fifos),
    /// A terminal that is copied from and to.
    Terminal(pty::Terminal),
    /// Being let go of: the process has ended.
    Closing(Vec<Closing>),
}

/// FIFOs held open, so that containerd may come and go.
#[derive(Debug)]
pub(crate) struct Fifos {
    stdin: Option<copied::Input>,
    outputs: Vec<Output>,
}

#[derive(Debug)]
enum Output {
    Direct(fifo::Output),
    Copied(copied::Copied),
}

/// Who writes a process's output FIFOs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Writer {
    /// The process itself.
    Process,
    /// The shim, from a pipe.
    Shim,
}

/// Who may open the streams again, as `/dev/stdout`: options `IoUid` and `IoGid`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Owner {
    /// User, as the node counts.
    pub(crate) uid: u32,
    /// Group.
    pub(crate) gid: u32,
}

impl Owner {
    fn take(self, stream: OwnedFd, name: &Path) -> Result<Stdio> {
        if (self.uid, self.gid) != (0, 0) {
            let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
            rustix::fs::fchown(&stream, Some(uid), Some(gid))
                .map_err(io_error("change the owner of", name))?;
        }
        Ok(stream.into())
    }
}

/// A stream that is being let go of.
#[derive(Debug)]
pub(crate) struct Closing {
    task: JoinHandle<()>,
    drain: Option<oneshot::Sender<()>>,
}

/// How long the output of a deleted process may take to be read.
const LAST_READ: Duration = Duration::from_secs(10);

impl Closing {
    /// The process is deleted: what has been written so far is still delivered, and nothing else is waited for.
    fn end(mut self) {
        if let Some(drain) = self.drain.take() {
            // It may have come to its end by itself.
            let _ = drain.send(());
        }
        tokio::spawn(async move {
            if tokio::time::timeout(LAST_READ, &mut self.task)
                .await
                .is_err()
            {
                self.task.abort();
            }
        });
    }
}

impl Request {
    /// Opens the FIFOs, or a socket for the terminal (in `dir`, under `name`).
    ///
    /// # Errors
    /// `Io` when a FIFO cannot be opened, `InvalidArgument` for a stream of another kind.
    pub(crate) fn prepare(
        &self,
        dir: &Path,
        name: &str,
        writer: Writer,
        owner: Owner,
    ) -> Result<(Prepared, Streams)> {
        if self.terminal {
            let console = Console::listen(dir, name, self.clone())?;
            let streams = Streams::Console(console.path());
            return Ok((Prepared::Console(console), streams));
        }
        let mut outputs = Vec::with_capacity(2);
        let mut output = |name: &str| -> Result<Stdio> {
            let Some(path) = fifo_path(name)? else {
                return Ok(Stdio::null());
            };
            let stream = match writer {
                Writer::Process => {
                    let (held, stream) = fifo::output(&path)?;
                    outputs.extend(held.map(Output::Direct));
                    stream
                }
                Writer::Shim => {
                    let (copied, stream) = copied::Copied::new(&path)?;
                    outputs.push(Output::Copied(copied));
                    stream
                }
            };
            owner.take(stream, &path)
        };
        let (stdout, stderr) = (output(&self.stdout)?, output(&self.stderr)?);
        let (stdin, stdin_stream) = match fifo_path(&self.stdin)? {
            None => (None, Stdio::null()),
            Some(path) => {
                let (held, stream) = copied::Input::new(&path)?;
                (Some(held), owner.take(stream, &path)?)
            }
        };
        Ok((
            Prepared::Fifos(Fifos { stdin, outputs }),
            Streams::Files([stdin_stream, stdout, stderr]),
        ))
    }
}

impl Prepared {
    /// The streams of the process, now that runc has made it.
    ///
    /// # Errors
    /// `Io` when runc sent no terminal, or a FIFO cannot be opened.
    pub(crate) async fn attach(self) -> Result<Io> {
        match self {
            Self::Fifos(fifos) => Ok(Io::Fifos(fifos)),
            Self::Console(console) => Ok(Io::Terminal(console.attach().await?)),
        }
    }
}

impl Io {
    /// The process starts: its input flows.
    ///
    /// # Errors
    /// `Io` when the FIFO cannot be opened.
    pub(crate) fn start(&mut self) -> Result<()> {
        match self {
            Self::Fifos(Fifos {
                stdin: Some(stdin), ..
            }) => stdin.start(),
            Self::Fifos(_) | Self::Terminal(_) | Self::Closing(_) => Ok(()),
        }
    }

    /// Ends the input: the process sees its end when containerd has closed its side, too.
    pub(crate) fn close_stdin(&mut self) {
        match self {
            Self::Fifos(fifos) => {
                if let Some(stdin) = &mut fifos.stdin {
                    stdin.close();
                }
            }
            Self::Terminal(terminal) => terminal.close_stdin(),
            Self::Closing(_) => {}
        }
    }

    /// Sets the size of the terminal, if there is one.
    ///
    /// # Errors
    /// `Io` when the kernel refuses.
    pub(crate) fn resize(&self, size: Size) -> Result<()> {
        match self {
            Self::Terminal(terminal) => terminal.resize(size),
            // As the stock shim: clients resize whatever they have, and kubectl also what has just ended.
            Self::Fifos(_) | Self::Closing(_) => Ok(()),
        }
    }

    /// No streams, for a process that has none (yet).
    pub(crate) fn none() -> Self {
        Self::Closing(Vec::new())
    }

    /// Lets go of the streams after the process has ended: what it wrote is still delivered. Readers then see the end,
    /// unless a process in the background still holds the stream.
    pub(crate) fn close(&mut self) {
        let closing = match std::mem::replace(self, Self::none()) {
            Self::Fifos(fifos) => fifos.outputs.into_iter().map(Output::close).collect(),
            Self::Terminal(terminal) => terminal.release().into_iter().collect(),
            Self::Closing(closing) => closing,
        };
        *self = Self::Closing(closing);
    }

    /// The process is deleted: readers see the end, also if a process in the background still holds a stream of an exec.
    pub(crate) fn end(mut self) {
        self.close();
        if let Self::Closing(closing) = self {
            closing.into_iter().for_each(Closing::end);
        }
    }
}

impl Output {
    fn close(self) -> Closing {
        match self {
            Self::Direct(held) => Closing {
                task: tokio::spawn(held.release()),
                drain: None,
            },
            Self::Copied(copied) => {
                let (released, drain) = copied.release();
                Closing {
                    task: tokio::spawn(released),
                    drain: Some(drain),
                }
            }
        }
    }
}

/// The FIFO that a stream's name means; none for an empty name.
fn fifo_path(name: &str) -> Result<Option<PathBuf>> {
    match name.split_once("://") {
        None if name.is_empty() => Ok(None),
        None => Ok(Some(name.into())),
        Some(("fifo", path)) => Ok(Some(path.into())),
        Some((scheme, _)) => Err(Error::InvalidArgument(format!(
            "stream {name}: this shim has no {scheme:?} streams, use a FIFO"
        ))),
    }
}

/// As [`IoError::at`], for functions that return [`Error`].
fn io_error<E: Into<std::io::Error>>(
    operation: &'static str,
    path: &Path,
) -> impl FnOnce(E) -> Error {
    let error = IoError::at(operation, path);
    move |e| Error::Io(error(e))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_stream_is_a_path_or_a_scheme_that_we_have() {
        assert_eq!(fifo_path("").unwrap(), None);
        assert_eq!(fifo_path("/run/f").unwrap(), Some("/run/f".into()));
        assert_eq!(fifo_path("fifo:///run/f").unwrap(), Some("/run/f".into()));
        let error = fifo_path("binary:///bin/logger").unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
    }
}
