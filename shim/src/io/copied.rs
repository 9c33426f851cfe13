//! Streams that the shim copies between a pipe and a FIFO: the input of every process, and the output of an exec.
//!
//! An exec's process may leave others behind in the container that keep its output open. containerd then deletes the exec
//! and waits for the end of its FIFOs, so nobody but the shim may have them open. (A container's init takes all its
//! processes with it, and writes its FIFOs itself.)

use std::fs::File;
use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::pin::pin;

use log::warn;
use rustix::pipe::PipeFlags;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use super::{fifo, io_error};
use crate::error::Result;

const BUFFER: usize = 16 * 1024;

/// Input: a pipe to the process, filled from a FIFO.
///
/// Output needs no copy, but input does: its end comes from two sides, and the order matters. The shim holds the FIFO
/// open for writing until CloseIO, so that the process does not see its end when containerd goes away; and it opens the
/// FIFO only when the process starts, because some clients read their own input to its end before they are ready to
/// say so with CloseIO.
#[derive(Debug)]
pub(super) struct Input {
    path: PathBuf,
    state: InputState,
    /// CloseIO has been called.
    closed: bool,
}

#[derive(Debug)]
enum InputState {
    /// The process has not started.
    Waiting(OwnedFd),
    /// It may read. The writer is held, not written to.
    Open {
        copying: JoinHandle<()>,
        writer: Option<File>,
    },
}

impl Input {
    /// A pipe for the process, to be filled from the FIFO at `path`.
    pub(super) fn new(path: &Path) -> Result<(Self, OwnedFd)> {
        std::fs::metadata(path).map_err(io_error("open stream", path))?;
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
            .map_err(io_error("make a pipe for", path))?;
        let input = Self {
            path: path.to_owned(),
            state: InputState::Waiting(writer),
            closed: false,
        };
        Ok((input, reader))
    }

    /// The process starts: its input flows.
    pub(super) fn start(&mut self) -> Result<()> {
        let InputState::Waiting(pipe) = &self.state else {
            return Ok(());
        };
        let (from, writer) = fifo::open_input(&self.path)?;
        let to = pipe
            .try_clone()
            .and_then(pipe::Sender::from_owned_fd)
            .map_err(io_error("poll", &self.path))?;
        self.state = InputState::Open {
            copying: tokio::spawn(copy(from, to)),
            writer: (!self.closed).then_some(writer),
        };
        Ok(())
    }

    /// CloseIO: the process sees the end when containerd has closed its side, too.
    pub(super) fn close(&mut self) {
        self.closed = true;
        if let InputState::Open { writer, .. } = &mut self.state {
            *writer = None;
        }
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        if let InputState::Open { copying, .. } = &self.state {
            copying.abort();
        }
    }
}

/// Output: a pipe from the process, emptied into a FIFO.
#[derive(Debug)]
pub(super) struct Copied {
    copying: JoinHandle<()>,
    drain: oneshot::Sender<()>,
    held: fifo::Output,
}

impl Copied {
    /// A pipe for the process, copied into the FIFO at `path`.
    pub(super) fn new(path: &Path) -> Result<(Self, OwnedFd)> {
        let held = fifo::hold(path)?;
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
            .map_err(io_error("make a pipe for", path))?;
        let from = pipe::Receiver::from_owned_fd(reader).map_err(io_error("poll", path))?;
        let to = held
            .try_clone()
            .and_then(pipe::Sender::from_owned_fd_unchecked)
            .map_err(io_error("poll", path))?;
        let (drain, drained) = oneshot::channel();
        let copied = Self {
            copying: tokio::spawn(copy_until(from, to, drained)),
            drain,
            held,
        };
        Ok((copied, writer))
    }

    /// Copies on until the other end is closed, or [`Copied::drain`]'s sender is used; then lets go of the FIFO.
    pub(super) fn release(self) -> (impl Future<Output = ()> + Send, oneshot::Sender<()>) {
        let Self {
            copying,
            drain,
            held,
        } = self;
        let released = async move {
            // It does not panic, and nobody else has a handle to abort it.
            let _ = copying.await;
            held.release().await;
        };
        (released, drain)
    }
}

/// As [`copy`], but after `drain` only what is there already.
async fn copy_until(
    mut from: pipe::Receiver,
    mut to: pipe::Sender,
    mut drain: oneshot::Receiver<()>,
) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = tokio::select! {
            read = from.read(&mut buffer) => read,
            drained = &mut drain => match drained {
                Ok(()) => break,
                // The sender went with the process, which never came to be.
                Err(_) => return,
            },
        };
        let mut writing = pin!(write(&mut to, read.map(|read| &buffer[..read])));
        let (more, draining) = tokio::select! {
            more = &mut writing => (more, false),
            drained = &mut drain => match drained {
                Ok(()) => (writing.await, true),
                Err(_) => return,
            },
        };
        match (more, draining) {
            (false, _) => return,
            (true, true) => break,
            (true, false) => {}
        }
    }
    loop {
        match from.try_read(&mut buffer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return,
            read => {
                if !write(&mut to, read.map(|read| &buffer[..read])).await {
                    return;
                }
            }
        }
    }
}

/// Copies until the source ends, or the other side is closed. A pty master ends with EIO when its last slave is closed.
pub(super) async fn copy(mut from: pipe::Receiver, mut to: pipe::Sender) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = from.read(&mut buffer).await;
        if !write(&mut to, read.map(|read| &buffer[..read])).await {
            return;
        }
    }
}

/// Hands on what was read. False at the end of either side.
async fn write(to: &mut pipe::Sender, read: std::io::Result<&[u8]>) -> bool {
    let bytes = match read {
        Ok([]) => return false,
        Ok(bytes) => bytes,
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
            return false;
        }
        Err(error) => {
            warn!("read a stream: {error}");
            return false;
        }
    };
    match to.write_all(bytes).await {
        Ok(()) => true,
        Err(error) if error.kind() == ErrorKind::BrokenPipe => false,
        Err(error) => {
            warn!("write a stream: {error}");
            false
        }
    }
}
