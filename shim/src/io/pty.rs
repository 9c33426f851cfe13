//! Terminals: runc makes the pty and sends its master through a socket; the shim copies between it and the FIFOs.
//!
//! The socket lives in the bundle, whose path is longer than a socket address may be. runc is therefore told the path
//! of the shim's open bundle directory in `/proc`, which is short. See pty(7), unix(7) (SCM_RIGHTS).

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
use super::{Closing, Request, fifo, fifo_path, io_error};
use crate::error::Result;

/// Columns and rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    /// Columns.
    pub(crate) width: u16,
    /// Rows.
    pub(crate) height: u16,
}

/// A socket that waits for the terminal of a process.
#[derive(Debug)]
pub(crate) struct Console {
    listener: UnixListener,
    dir: OwnedFd,
    name: String,
    file: PathBuf,
    request: Request,
}

/// How long runc, which has ended well, may have taken to send the terminal: it is in the socket by then.
const SENT: Duration = Duration::from_secs(5);
/// How long a process in the background may keep the terminal of an ended one from its end.
const DRAIN: Duration = Duration::from_secs(2);

impl Console {
    /// Listens in `dir` under `name`.
    ///
    /// # Errors
    /// `Io` when the socket cannot be made.
    pub(super) fn listen(dir: &Path, name: &str, request: Request) -> Result<Self> {
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
            request,
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

    /// Takes the terminal and starts to copy.
    ///
    /// # Errors
    /// `Io` when no terminal came, or a FIFO cannot be opened.
    pub(super) async fn attach(self) -> Result<Terminal> {
        let master = tokio::time::timeout(SENT, self.receive())
            .await
            .map_err(|_| std::io::Error::from(std::io::ErrorKind::TimedOut))
            .and_then(|received| received)
            .map_err(io_error("receive the terminal from", &self.file))?;
        Terminal::new(master, &self.request)
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
        // Goes with the bundle otherwise.
        let _ = std::fs::remove_file(&self.file);
    }
}

/// A terminal whose master the shim has.
#[derive(Debug)]
pub(crate) struct Terminal {
    master: OwnedFd,
    input: Option<JoinHandle<()>>,
    /// Held until CloseIO.
    writer: Option<File>,
    output: Option<(JoinHandle<()>, fifo::Output)>,
}

impl Terminal {
    fn new(master: OwnedFd, request: &Request) -> Result<Self> {
        let here = Path::new("/dev/ptmx");
        let flags = rustix::fs::fcntl_getfl(&master).map_err(io_error("read flags of", here))?;
        rustix::fs::fcntl_setfl(&master, flags | OFlags::NONBLOCK)
            .map_err(io_error("set flags of", here))?;
        // All FIFOs are opened before anything is copied: a failure leaves no task behind.
        let stdin = fifo_path(&request.stdin)?
            .map(|path| fifo::open_input(&path))
            .transpose()?;
        let stdout = fifo_path(&request.stdout)?
            .map(|path| fifo::hold(&path))
            .transpose()?;
        // A terminal is read and written like a pipe, and so polled like one.
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
        let output = match stdout {
            None => None,
            Some(fifo) => {
                let from = master
                    .try_clone()
                    .and_then(pipe::Receiver::from_owned_fd_unchecked);
                let to = fifo
                    .try_clone()
                    .and_then(pipe::Sender::from_owned_fd_unchecked);
                Some((
                    from.map_err(io_error("poll", here))?,
                    to.map_err(io_error("poll", here))?,
                    fifo,
                ))
            }
        };
        Ok(Self {
            input: input.map(|(from, to)| tokio::spawn(copy(from, to))),
            writer,
            output: output.map(|(from, to, fifo)| (tokio::spawn(copy(from, to)), fifo)),
            master,
        })
    }

    /// CloseIO: what has been written is still read; nothing ends on the terminal, as it would not for a person.
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

    /// Copies what is left, then lets go.
    pub(super) fn release(mut self) -> Option<Closing> {
        self.stop_input();
        let (mut copying, held) = self.output.take()?;
        let task = tokio::spawn(async move {
            if tokio::time::timeout(DRAIN, &mut copying).await.is_err() {
                copying.abort();
            }
            held.release().await;
        });
        Some(Closing { task, drain: None })
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
