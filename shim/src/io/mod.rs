//! The streams of a process: from the names that containerd passes to the files that the process has open.
//!
//! ```text
//!  without a terminal                               with a terminal
//!  containerd ──FIFO──▶ shim ──pipe──▶ process      containerd ──FIFO──▶ shim ──▶ pty master ═ slave ── process
//!  containerd ◀──FIFO── process (an init)           containerd ◀──FIFO── shim ◀──     ║
//!  containerd ◀──FIFO── shim ◀──pipe── an exec,         logger ◀──pipe── shim ◀──     ║
//!                                      a confined init
//!      logger ◀──pipe── process
//!        file ◀──────── shim ◀──pipe── process
//! ```
//!
//! Every copy has back-pressure: the shim reads no faster than the other side takes the bytes. A logger or a file takes
//! both outputs: the name of stdout decides, and the shim ignores the name of stderr.

mod copied;
mod fifo;
mod logger;
mod pty;
mod streams;
pub(crate) mod uri;

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::task::JoinHandle;

pub use self::pty::{Console, Size};
pub use self::streams::{Recipient, StreamOwner, Streams, Writer};

use self::copied::Copied;
use self::logger::{Logger, Source};
use self::uri::Destination;
use crate::error::{Error, IoError, Result};

/// What containerd asks for: the streams by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Request {
    /// Where input comes from; empty for none.
    pub stdin: String,
    /// Where output goes; empty for nowhere.
    pub stdout: String,
    /// Where errors go; empty for nowhere.
    pub stderr: String,
    /// Whether the process gets a terminal.
    pub terminal: bool,
}

/// The streams of a process that is about to be made.
#[derive(Debug)]
pub enum Prepared {
    /// The process gets the FIFOs themselves, or pipes.
    Files(Files),
    /// A terminal, whose master comes through a socket.
    Console(Console),
}

/// The shim's hold on the streams of a process that runc has made.
#[derive(Debug)]
pub enum Io {
    /// Without a terminal.
    Files(Files),
    /// A terminal that is copied from and to.
    Terminal(pty::Terminal),
    /// The process has ended, and the shim is letting the streams go.
    Closing(Vec<Closing>),
}

/// The streams that the shim holds and copies, so that containerd may come and go.
#[derive(Debug)]
pub struct Files {
    stdin: Option<copied::Input>,
    outputs: Vec<Output>,
}

#[derive(Debug)]
enum Output {
    /// The process writes the FIFO itself.
    Direct(fifo::Output),
    /// A pipe from the process is copied into a FIFO or a file.
    Copied(Copied),
    /// A program reads the pipes from the process.
    Logger(Logger),
}

/// A stream that the shim is letting go.
#[derive(Debug)]
pub enum Closing {
    /// Output into a FIFO, whose reader sees the end by itself. Holds the task that lets the FIFO go, and the request
    /// to drain a copy.
    Fifo(JoinHandle<()>, Option<oneshot::Sender<()>>),
    /// Output into a file. Holds the task that copies, and the request to drain.
    File(JoinHandle<()>, oneshot::Sender<()>),
    /// Output to a logger.
    Logger(Logger),
}

/// How long the delivery of a deleted process's output may take.
const LAST_READ: Duration = Duration::from_secs(10);

impl Closing {
    /// The process is deleted: drains the stream. The output so far is still delivered, and nothing waits for more.
    ///
    /// The task ends when the output is delivered, or when the time for that is over. None for a FIFO, whose reader
    /// sees the end by itself.
    fn end(self) -> Option<JoinHandle<()>> {
        let finish = |mut task: JoinHandle<()>| {
            tokio::spawn(async move {
                if tokio::time::timeout(LAST_READ, &mut task).await.is_err() {
                    task.abort();
                }
            })
        };
        // The copy may have ended by itself: then nobody receives the request.
        match self {
            Self::Fifo(task, drain) => {
                let _ = drain.map(|drain| drain.send(()));
                finish(task);
                None
            }
            Self::File(task, drain) => {
                let _ = drain.send(());
                Some(finish(task))
            }
            Self::Logger(logger) => Some(logger.end()),
        }
    }
}

impl Request {
    /// Opens the FIFOs, or a socket for the terminal, and starts the logger.
    ///
    /// # Errors
    /// `Io` when a stream cannot be opened or a logger cannot be started, `FailedPrecondition` when the logger does not
    /// become ready, `InvalidArgument` for a stream of another kind.
    pub async fn prepare(&self, process: Recipient<'_>) -> Result<(Prepared, Streams)> {
        if self.terminal {
            let console = Console::listen(self, process).await?;
            let streams = Streams::Console(console.path());
            return Ok((Prepared::Console(console), streams));
        }
        let stdin = uri::input(&self.stdin)?;
        let (outputs, stdout, stderr) = self.outputs(process).await?;
        let (stdin, stdin_stream) = match stdin {
            None => (None, Stdio::null()),
            Some(path) => {
                let (held, stream) = copied::Input::new(&path)?;
                (Some(held), process.owner.take(stream, &path)?)
            }
        };
        Ok((
            Prepared::Files(Files { stdin, outputs }),
            Streams::Files([stdin_stream, stdout, stderr]),
        ))
    }

    async fn outputs(&self, process: Recipient<'_>) -> Result<(Vec<Output>, Stdio, Stdio)> {
        let owned = |stream, name: &Path| process.owner.take(stream, name);
        match uri::parse(&self.stdout)? {
            Destination::Program(program) => {
                let (logger, pipes) =
                    Logger::start(&program, process.source(), process.exits).await?;
                let stdout = owned(pipes.stdout, &program.path)?;
                let stderr = owned(pipes.stderr, &program.path)?;
                Ok((vec![Output::Logger(logger)], stdout, stderr))
            }
            Destination::File(path) => {
                let file = copied::open_file(&path)?;
                let (stdout, stdout_stream) = Copied::into_file(&path, &file)?;
                let (stderr, stderr_stream) = Copied::into_file(&path, &file)?;
                Ok((
                    vec![Output::Copied(stdout), Output::Copied(stderr)],
                    owned(stdout_stream, &path)?,
                    owned(stderr_stream, &path)?,
                ))
            }
            stdout @ (Destination::Null | Destination::Path(_)) => {
                let mut outputs = Vec::with_capacity(2);
                let stdout = process.output(stdout, &self.stdout, &mut outputs)?;
                let stderr = uri::parse(&self.stderr)?;
                let stderr = process.output(stderr, &self.stderr, &mut outputs)?;
                Ok((outputs, stdout, stderr))
            }
        }
    }
}

impl<'a> Recipient<'a> {
    fn source(self) -> Source<'a> {
        Source {
            id: self.id,
            namespace: self.namespace,
        }
    }

    /// One output into an existing FIFO or file. Adds the shim's part to `outputs`.
    fn output(self, target: Destination, name: &str, outputs: &mut Vec<Output>) -> Result<Stdio> {
        let path = match target {
            Destination::Null => return Ok(Stdio::null()),
            Destination::Path(path) => path,
            Destination::File(_) | Destination::Program(_) => {
                return Err(Error::InvalidArgument(format!(
                    "stderr {name}: a file or a logger takes both outputs, name it as stdout, too"
                )));
            }
        };
        let stream = if !fifo::is_fifo(&path)? {
            let (copied, stream) = Copied::into_file(&path, &copied::open_there(&path)?)?;
            outputs.push(Output::Copied(copied));
            stream
        } else if self.writer == Writer::Process {
            let (held, stream) = fifo::output(&path)?;
            outputs.push(Output::Direct(held));
            stream
        } else {
            let (copied, stream) = Copied::into_fifo(&path)?;
            outputs.push(Output::Copied(copied));
            stream
        };
        self.owner.take(stream, &path)
    }
}

impl Prepared {
    /// The shim's hold on the streams, once runc has made the process.
    ///
    /// # Errors
    /// `Io` when runc sent no terminal, or a FIFO cannot be opened.
    pub async fn attach(self) -> Result<Io> {
        match self {
            Self::Files(mut files) => {
                for output in &mut files.outputs {
                    if let Output::Copied(copied) = output {
                        copied.begin();
                    }
                }
                Ok(Io::Files(files))
            }
            Self::Console(console) => Ok(Io::Terminal(console.attach().await?)),
        }
    }
}

impl Io {
    /// The process starts: begins to copy the input.
    ///
    /// # Errors
    /// `Io` when the FIFO cannot be opened.
    pub fn start(&mut self) -> Result<()> {
        match self {
            Self::Files(Files {
                stdin: Some(stdin), ..
            }) => stdin.start(),
            Self::Files(_) | Self::Terminal(_) | Self::Closing(_) => Ok(()),
        }
    }

    /// Before a container's program starts: checks that the logger, if any, still runs.
    ///
    /// # Errors
    /// `FailedPrecondition` when the logger has ended.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Files(files) => files.outputs.iter().try_for_each(|output| match output {
                Output::Logger(logger) => logger.check(),
                Output::Direct(_) | Output::Copied(_) => Ok(()),
            }),
            Self::Terminal(terminal) => terminal.check(),
            Self::Closing(_) => Ok(()),
        }
    }

    /// CloseIO: the process sees the end of its input when containerd, too, has closed the FIFO.
    pub fn close_stdin(&mut self) {
        match self {
            Self::Files(files) => {
                if let Some(stdin) = &mut files.stdin {
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
    pub fn resize(&self, size: Size) -> Result<()> {
        match self {
            Self::Terminal(terminal) => terminal.resize(size),
            // No error, as in the stock shim: clients resize every process, and kubectl also a process that has just
            // ended.
            Self::Files(_) | Self::Closing(_) => Ok(()),
        }
    }

    /// No streams, for a process that has none (yet).
    pub fn none() -> Self {
        Self::Closing(Vec::new())
    }

    /// The wait for the readers of an ended init's output; none if no reader has output left to read. Resolves when the
    /// output is read, or after two seconds. containerd before 1.6.22 closes its ends of the FIFOs when containerd
    /// receives the exit, and loses the rest of the output.
    pub fn unread(&mut self) -> Option<impl Future<Output = ()> + use<>> {
        let unread: Vec<_> = match self {
            Self::Files(files) => files
                .outputs
                .iter_mut()
                .filter_map(Output::unread)
                .collect(),
            Self::Terminal(terminal) => terminal.unread().into_iter().collect(),
            Self::Closing(_) => Vec::new(),
        };
        (!unread.is_empty()).then(|| fifo::until_read(unread))
    }

    /// Lets the streams go after the process has ended. The output of the process is still delivered. Readers then see
    /// the end, unless a process in the background still holds the stream.
    pub fn close(&mut self) {
        let closing = match std::mem::replace(self, Self::none()) {
            Self::Files(files) => files.outputs.into_iter().map(Output::close).collect(),
            Self::Terminal(terminal) => terminal.release(),
            Self::Closing(closing) => closing,
        };
        *self = Self::Closing(closing);
    }

    /// The process is deleted: readers see the end, even if a process in the background still holds a stream of an
    /// exec.
    ///
    /// Returns the tasks to wait for: each ends, within a bounded time, when a file has the output or a logger has
    /// ended.
    pub fn end(mut self) -> Vec<JoinHandle<()>> {
        self.close();
        match self {
            Self::Closing(closing) => closing.into_iter().filter_map(Closing::end).collect(),
            Self::Files(_) | Self::Terminal(_) => Vec::new(),
        }
    }
}

impl Output {
    fn unread(&mut self) -> Option<fifo::Unread> {
        match self {
            Self::Direct(held) => held.unread(),
            Self::Copied(copied) => copied.unread(),
            Self::Logger(_) => None,
        }
    }

    fn close(self) -> Closing {
        match self {
            Self::Direct(held) => Closing::Fifo(tokio::spawn(held.release()), None),
            Self::Copied(copied) => copied.close(),
            Self::Logger(logger) => Closing::Logger(logger),
        }
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
