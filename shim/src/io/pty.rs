//! Terminals: runc makes the pty and sends the master through a socket; the shim copies between the master and the
//! FIFOs.
//!
//! The socket lives in the bundle, whose path is longer than a socket address may be. So runc gets a short path: that
//! of the shim's open bundle directory in `/proc`. See pty(7), unix(7) (SCM_RIGHTS).

use std::fs::File;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::termios::{Winsize, tcsetwinsize};
use tokio::io::Interest;
use tokio::net::UnixListener;
use tokio::net::unix::pipe;
use tokio::task::JoinHandle;

use super::copied::copy;
use super::logger::Logger;
use super::uri::{self, Destination};
use super::{Closing, Recipient, Request, fifo, io_error};
use crate::error::{Error, Result};

/// Columns and rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// A socket that waits for the terminal of a process.
#[derive(Debug)]
pub struct Console {
    listener: UnixListener,
    dir: OwnedFd,
    name: String,
    file: PathBuf,
    stdin: Option<PathBuf>,
    output: TerminalOutput,
}

/// Where a terminal's output goes. A terminal has no standard error.
#[derive(Debug)]
enum TerminalOutput {
    Nowhere,
    Fifo(PathBuf),
    /// To a logger, through this pipe.
    Logger(Logger, OwnedFd),
}

/// What is held while a terminal's output is copied.
#[derive(Debug)]
enum Held {
    Fifo(fifo::Output),
    Logger(Logger),
}

/// How long the shim waits for the terminal. The wait begins after runc has ended well: the terminal is in the socket
/// already.
const SENT: Duration = Duration::from_secs(5);
/// How long a process in the background may delay the end of an ended process's terminal.
const DRAIN: Duration = Duration::from_secs(2);

impl Console {
    /// Listens where `process` says, and starts the logger.
    ///
    /// # Errors
    /// `Io` when the socket cannot be made, `InvalidArgument` for streams that a terminal cannot have, and the errors
    /// of [`Logger::start`].
    pub(super) async fn listen(request: &Request, process: Recipient<'_>) -> Result<Self> {
        let stdin = uri::input(&request.stdin)?;
        let output = match uri::parse(&request.stdout)? {
            Destination::Null => TerminalOutput::Nowhere,
            Destination::Path(path) if fifo::is_fifo(&path)? => TerminalOutput::Fifo(path),
            Destination::Path(_) | Destination::File(_) => {
                return Err(Error::InvalidArgument(format!(
                    "stdout {}: a terminal's output goes to a FIFO or a logger, not to a file",
                    request.stdout
                )));
            }
            Destination::Program(program) => {
                let (logger, pipes) =
                    Logger::start(&program, process.source(), process.exits).await?;
                TerminalOutput::Logger(logger, pipes.stdout)
            }
        };
        let (dir, name) = process.console;
        let file = dir.join(name);
        let fd = rustix::fs::open(
            dir,
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )
        .map_err(io_error("open", dir))?;
        let short = format!("/proc/self/fd/{}/{name}", fd.as_raw_fd());
        let listener = UnixListener::bind(short).map_err(io_error("listen on", &file))?;
        Ok(Self {
            listener,
            dir: fd,
            name: name.to_owned(),
            file,
            stdin,
            output,
        })
    }

    /// The address for runc.
    pub(super) fn path(&self) -> PathBuf {
        format!(
            "/proc/{}/fd/{}/{}",
            std::process::id(),
            self.dir.as_raw_fd(),
            self.name
        )
        .into()
    }

    /// Receives the terminal and starts to copy.
    ///
    /// # Errors
    /// `Io` when no terminal came, or a FIFO cannot be opened.
    pub(super) async fn attach(mut self) -> Result<Terminal> {
        let master = tokio::time::timeout(SENT, self.receive())
            .await
            .map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))
            .and_then(|received| received)
            .map_err(io_error("receive the terminal from", &self.file))?;
        let output = std::mem::replace(&mut self.output, TerminalOutput::Nowhere);
        Terminal::new(master, self.stdin.as_deref(), output)
    }

    async fn receive(&self) -> std::io::Result<OwnedFd> {
        let (stream, _) = self.listener.accept().await?;
        stream
            .async_io(Interest::READABLE, || {
                let mut name = [0; 4096];
                let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                let mut control = RecvAncillaryBuffer::new(&mut space);
                recvmsg(
                    &stream,
                    &mut [IoSliceMut::new(&mut name)],
                    &mut control,
                    RecvFlags::CMSG_CLOEXEC,
                )?;
                control
                    .drain()
                    .find_map(|message| match message {
                        RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
                        RecvAncillaryMessage::ScmCredentials(_) | _ => None,
                    })
                    .ok_or_else(|| std::io::Error::other("a message without a file descriptor"))
            })
            .await
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        // A socket that stays is removed with the bundle.
        let _ = std::fs::remove_file(&self.file);
    }
}

/// A terminal whose master the shim has open.
#[derive(Debug)]
pub struct Terminal {
    master: OwnedFd,
    input: Option<JoinHandle<()>>,
    /// The writer of the input FIFO, held until CloseIO.
    writer: Option<File>,
    output: Option<(JoinHandle<()>, Held)>,
}

impl Terminal {
    fn new(master: OwnedFd, stdin: Option<&Path>, output: TerminalOutput) -> Result<Self> {
        let here = Path::new("/dev/ptmx");
        let flags = rustix::fs::fcntl_getfl(&master).map_err(io_error("read flags of", here))?;
        rustix::fs::fcntl_setfl(&master, flags | OFlags::NONBLOCK)
            .map_err(io_error("set flags of", here))?;
        // Opens all FIFOs before the first copy begins: a failure leaves no task behind.
        let stdin = stdin.map(fifo::open_input).transpose()?;
        let output = match output {
            TerminalOutput::Nowhere => None,
            TerminalOutput::Fifo(path) => {
                let (held, to) = fifo::hold_for_copy(&path)?;
                Some((to, Held::Fifo(held)))
            }
            TerminalOutput::Logger(logger, pipe) => {
                let to = pipe::Sender::from_owned_fd(pipe).map_err(io_error("poll", here))?;
                Some((to, Held::Logger(logger)))
            }
        };
        // A pty master is read and written like a pipe, and so polled like a pipe.
        let (input, writer) = match stdin {
            None => (None, None),
            Some((from, writer)) => {
                let to = master
                    .try_clone()
                    .and_then(pipe::Sender::from_owned_fd_unchecked)
                    .map_err(io_error("poll", here))?;
                (Some((from, to)), Some(writer))
            }
        };
        let output = match output {
            None => None,
            Some((to, held)) => {
                let from = master
                    .try_clone()
                    .and_then(pipe::Receiver::from_owned_fd_unchecked)
                    .map_err(io_error("poll", here))?;
                Some((from, to, held))
            }
        };
        Ok(Self {
            input: input.map(|(from, to)| tokio::spawn(copy(from, to))),
            writer,
            output: output.map(|(from, to, held)| (tokio::spawn(copy(from, to)), held)),
            master,
        })
    }

    /// CloseIO: the terminal still gets what has been written. No end of input follows: a terminal at which a person
    /// types has none either.
    pub(super) fn close_stdin(&mut self) {
        self.writer = None;
    }

    fn stop_input(&mut self) {
        if let Some(input) = self.input.take() {
            input.abort();
        }
    }

    pub(super) fn resize(&self, size: Size) -> Result<()> {
        let size = Winsize {
            ws_row: size.height,
            ws_col: size.width,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&self.master, size).map_err(io_error("resize", Path::new("/dev/ptmx")))
    }

    /// As [`super::Io::check`].
    pub(super) fn check(&self) -> Result<()> {
        match &self.output {
            Some((_, Held::Logger(logger))) => logger.check(),
            Some((_, Held::Fifo(_))) | None => Ok(()),
        }
    }

    /// As [`super::Io::unread`].
    pub(super) fn unread(&self) -> Option<fifo::Unread> {
        match &self.output {
            Some((copying, Held::Fifo(held))) => {
                held.uncopied(fifo::Ahead::Copy(copying.abort_handle()))
            }
            Some((_, Held::Logger(_))) | None => None,
        }
    }

    /// Copies what is left, then lets the stream go.
    pub(super) fn release(mut self) -> Vec<Closing> {
        self.stop_input();
        let Some((mut copying, held)) = self.output.take() else {
            return Vec::new();
        };
        let copied = async move {
            if tokio::time::timeout(DRAIN, &mut copying).await.is_err() {
                copying.abort();
                // The copy holds the FIFO open for reading, too, and must not pass for a reader in the release.
                let _ = copying.await;
            }
        };
        match held {
            Held::Fifo(held) => {
                let task = tokio::spawn(async move {
                    copied.await;
                    held.release().await;
                });
                vec![Closing::Fifo(task, None)]
            }
            Held::Logger(logger) => {
                tokio::spawn(copied);
                vec![Closing::Logger(logger)]
            }
        }
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        self.stop_input();
        if let Some((copying, _)) = self.output.take() {
            copying.abort();
        }
    }
}
