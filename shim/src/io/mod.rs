//! The streams of a process: between what containerd names and what the process has.
//!
//! ```text
//!  without a terminal                               with a terminal
//!  containerd ──FIFO──▶ shim ──pipe──▶ process      containerd ──FIFO──▶ shim ──▶ pty master ═ slave ── process
//!  containerd ◀──FIFO── process (an init)           containerd ◀──FIFO── shim ◀──     ║
//!  containerd ◀──FIFO── shim ◀──pipe── an exec          logger ◀──pipe── shim ◀──     ║
//!      logger ◀──pipe── process
//!        file ◀──────── shim ◀──pipe── process
//! ```
//!
//! What is copied is copied with back-pressure: nobody is read faster than the other side takes it. A logger and a file
//! take both outputs: the name of stdout decides, that of stderr is not looked at.

mod copied;
mod fifo;
mod logger;
mod pty;
mod streams;
mod uri;

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

/// What containerd asks for: the streams as it names them.
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

/// The shim's hold on the streams of a process that is there.
#[derive(Debug)]
pub enum Io {
    /// Without a terminal.
    Files(Files),
    /// A terminal that is copied from and to.
    Terminal(pty::Terminal),
    /// Being let go of: the process has ended.
    Closing(Vec<Closing>),
}

/// What the shim holds and copies, so that containerd may come and go.
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

/// A stream that is being let go of.
#[derive(Debug)]
pub enum Closing {
    /// Into a FIFO, whose reader sees to it that it comes to its end.
    Fifo(JoinHandle<()>, Option<oneshot::Sender<()>>),
    /// Into a file.
    File(JoinHandle<()>, oneshot::Sender<()>),
    /// To a logger.
    Logger(Logger),
}

/// How long the output of a deleted process may take to be read.
const LAST_READ: Duration = Duration::from_secs(10);

impl Closing {
    /// The process is deleted: what has been written so far is still delivered, and nothing else is waited for.
    ///
    /// Resolves when it is, or after a while. None where a client that reads knows by itself.
    fn end(self) -> Option<JoinHandle<()>> {
        let finish = |mut task: JoinHandle<()>| {
            tokio::spawn(async move {
                if tokio::time::timeout(LAST_READ, &mut task).await.is_err() {
                    task.abort();
                }
            })
        };
        // Whoever is told to drain may have come to its end by itself.
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
    /// `Io` when a stream cannot be opened or a logger not started, `FailedPrecondition` when that does not get ready,
    /// `InvalidArgument` for a stream of another kind.
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

    /// One output into something that is there already.
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
    /// The streams of the process, now that runc has made it.
    ///
    /// # Errors
    /// `Io` when runc sent no terminal, or a FIFO cannot be opened.
    pub async fn attach(self) -> Result<Io> {
        match self {
            Self::Files(files) => Ok(Io::Files(files)),
            Self::Console(console) => Ok(Io::Terminal(console.attach().await?)),
        }
    }
}

impl Io {
    /// The process starts: its input flows.
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

    /// Before a container's program starts: whoever is to take its output must still be there.
    ///
    /// # Errors
    /// `FailedPrecondition` when its logger has ended.
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

    /// Ends the input: the process sees its end when containerd has closed its side, too.
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
            // As the stock shim: clients resize whatever they have, and kubectl also what has just ended.
            Self::Files(_) | Self::Closing(_) => Ok(()),
        }
    }

    /// No streams, for a process that has none (yet).
    pub fn none() -> Self {
        Self::Closing(Vec::new())
    }

    /// What a container's init that has ended wrote into FIFOs and somebody has not read yet, if anything: resolves when it
    /// is read, or after two seconds. containerd before 1.6.22 closes its ends when it hears of the exit, and loses the
    /// rest.
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

    /// Lets go of the streams after the process has ended: what it wrote is still delivered. Readers then see the end,
    /// unless a process in the background still holds the stream.
    pub fn close(&mut self) {
        let closing = match std::mem::replace(self, Self::none()) {
            Self::Files(files) => files.outputs.into_iter().map(Output::close).collect(),
            Self::Terminal(terminal) => terminal.release(),
            Self::Closing(closing) => closing,
        };
        *self = Self::Closing(closing);
    }

    /// The process is deleted: readers see the end, also if a process in the background still holds a stream of an exec.
    ///
    /// What comes back resolves, within a time that is bounded, when a file has what was written, and a logger has ended.
    pub fn end(mut self) -> Vec<JoinHandle<()>> {
        self.close();
        match self {
            Self::Closing(closing) => closing.into_iter().filter_map(Closing::end).collect(),
            Self::Files(_) | Self::Terminal(_) => Vec::new(),
        }
    }
}

impl Output {
    /// Copied into a FIFO is only an exec's, whose exit ends no stream.
    fn unread(&mut self) -> Option<fifo::Unread> {
        match self {
            Self::Direct(held) => held.unread(),
            Self::Copied(_) | Self::Logger(_) => None,
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
