//! Streams that the shim copies between a pipe and a FIFO or a file: the input of every process, the output of an exec
//! and of an init that may not write the FIFO, and all output into a file.
//!
//! A process gets no descriptor of a file on the node: with a descriptor, the process could read back, truncate or
//! change the content.
//!
//! An exec's process may leave other processes behind in the container that keep the exec's output open. containerd
//! then deletes the exec and waits for the end of the exec's FIFOs. So the shim copies an exec's output: on the
//! container's side, nobody but the shim may have these FIFOs open. (When a container's init ends, all processes of the
//! container end, so an init writes its FIFOs itself.)

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::{Arc, Weak};

use log::warn;
use rustix::io::Errno;
use rustix::pipe::PipeFlags;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::oneshot;
use tokio::task::{AbortHandle, JoinHandle};

use super::{Closing, fifo, io_error};
use crate::error::Result;
use crate::kernel::blocking;

const BUFFER: usize = 16 * 1024;

/// Input: a pipe to the process, filled from a FIFO.
///
/// An init's output needs no copy, but input does: two sides end the input, and the order matters.
///
/// - The shim holds the FIFO open for writing until CloseIO. So the process sees no end of its input when containerd
///   goes away.
/// - The shim opens the FIFO only when the process starts. Some clients read their own input to its end before they are
///   ready to say so with CloseIO.
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
    /// The process has started. `writer` only holds the FIFO open; nothing is written to it.
    Open {
        copying: JoinHandle<()>,
        writer: Option<File>,
    },
}

impl Input {
    /// A pipe for the process, to fill from the FIFO at `path`. Returns the process's end of the pipe, too.
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

    /// The process starts: opens the FIFO and begins to copy.
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

    /// CloseIO: the process sees the end of its input when containerd, too, has closed the FIFO.
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

/// Output: a pipe from the process, emptied into a FIFO or a file.
#[derive(Debug)]
pub(super) struct Copied {
    copying: JoinHandle<()>,
    /// Dropped without a message when the process was never made: the pipe then has runc's own words.
    begin: Option<oneshot::Sender<()>>,
    /// The pipe, as long as `copying` has the pipe.
    pipe: Weak<pipe::Receiver>,
    drain: oneshot::Sender<()>,
    /// The hold on the FIFO; none for a file.
    held: Option<fifo::Output>,
}

/// Opens a file to append to. Makes the file, and its folder, where missing.
pub(super) fn open_file(path: &Path) -> Result<Arc<File>> {
    if let Some(folder) = path.parent() {
        let mut builder = DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o755)
            .create(folder)
            .map_err(io_error("make the folder", folder))?;
    }
    open_with(path, OpenOptions::new().create(true).mode(0o644))
}

/// Opens an existing file to append to.
pub(super) fn open_there(path: &Path) -> Result<Arc<File>> {
    open_with(path, &mut OpenOptions::new())
}

fn open_with(path: &Path, options: &mut OpenOptions) -> Result<Arc<File>> {
    // Nonblocking, because the open of something else than a plain file may wait.
    let options = options.append(true).custom_flags(fifo::NONBLOCK);
    let file = options.open(path).map_err(io_error("open stream", path))?;
    Ok(Arc::new(file))
}

/// Where output is copied to.
enum Sink {
    Fifo(pipe::Sender),
    File(Lines),
}

/// A file that output is appended to.
struct Lines {
    file: Arc<File>,
    path: PathBuf,
    /// The last write failed, and the log says so.
    failing: bool,
}

impl Copied {
    /// A pipe for the process, copied into the FIFO at `path`. Returns the process's end of the pipe, too.
    pub(super) fn into_fifo(path: &Path) -> Result<(Self, OwnedFd)> {
        let (held, to) = fifo::hold_for_copy(path)?;
        Self::new(path, Sink::Fifo(to), Some(held))
    }

    /// A pipe for the process, copied into the open file at `path`. Returns the process's end of the pipe, too.
    pub(super) fn into_file(path: &Path, file: &Arc<File>) -> Result<(Self, OwnedFd)> {
        let lines = Lines {
            file: file.clone(),
            path: path.to_owned(),
            failing: false,
        };
        Self::new(path, Sink::File(lines), None)
    }

    fn new(path: &Path, to: Sink, held: Option<fifo::Output>) -> Result<(Self, OwnedFd)> {
        let (reader, writer) = rustix::pipe::pipe_with(PipeFlags::CLOEXEC)
            .map_err(io_error("make a pipe for", path))?;
        let from = pipe::Receiver::from_owned_fd(reader).map_err(io_error("poll", path))?;
        let from = Arc::new(from);
        let (drain, drained) = oneshot::channel();
        let (begin, begun) = oneshot::channel();
        let copied = Self {
            begin: Some(begin),
            pipe: Arc::downgrade(&from),
            copying: tokio::spawn(copy_until(from, to, begun, drained)),
            drain,
            held,
        };
        Ok((copied, writer))
    }

    /// runc has made the process: begins to copy.
    pub(super) fn begin(&mut self) {
        let _ = self.begin.take().map(|begin| begin.send(()));
    }

    /// The init has ended: what the pipe and the FIFO still hold. None for a file.
    pub(super) fn unread(&self) -> Option<fifo::Unread> {
        let held = self.held.as_ref()?;
        held.uncopied(fifo::Ahead::Pipe(self.pipe.clone()))
    }

    /// The process has ended. Copies on until all writers have closed the pipe, or until the drain is done; then lets
    /// the stream go.
    pub(super) fn close(self) -> Closing {
        let (copying, drain) = (self.copying, self.drain);
        let Some(held) = self.held else {
            return Closing::File(copying, drain);
        };
        // The copy ends when the release is cancelled: without a reader, the copy would wait for ever.
        let guard = AbortOnDrop(copying.abort_handle());
        let released = async move {
            let _guard = guard;
            // No error to handle: the copy does not panic.
            let _ = copying.await;
            held.release().await;
        };
        Closing::Fifo(tokio::spawn(released), Some(drain))
    }
}

struct AbortOnDrop(AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Sink {
    /// As [`write`], but a failed write into a file is no end: a full disk must not end the process.
    async fn write(&mut self, read: std::io::Result<&[u8]>) -> bool {
        match self {
            Self::Fifo(fifo) => write(fifo, read).await,
            Self::File(lines) => match checked(read) {
                Some(bytes) => {
                    lines.append(bytes.to_vec()).await;
                    true
                }
                None => false,
            },
        }
    }
}

impl Lines {
    async fn append(&mut self, bytes: Vec<u8>) {
        let file = self.file.clone();
        // On a worker thread, because a disk may be slow.
        let path = self.path.clone();
        let written = blocking::run_anyway(move || {
            (&*file).write_all(&bytes).map_err(io_error("write", &path))
        });
        match written.await {
            Ok(()) => self.failing = false,
            Err(error) => {
                if !std::mem::replace(&mut self.failing, true) {
                    warn!(error:%; "output is lost until it can be written again");
                }
            }
        }
    }
}

/// As [`copy`], but from `begin` on, and once `drain` is received, only what the pipe holds already.
async fn copy_until(
    from: Arc<pipe::Receiver>,
    mut to: Sink,
    begin: oneshot::Receiver<()>,
    mut drain: oneshot::Receiver<()>,
) {
    if begin.await.is_err() {
        return;
    }
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = tokio::select! {
            read = read_some(&from, &mut buffer) => read,
            drained = &mut drain => if drained.is_ok() { break } else { return },
        };
        let mut writing = pin!(to.write(read.map(|read| &buffer[..read])));
        let (more, draining) = tokio::select! {
            more = &mut writing => (more, false),
            drained = &mut drain => if drained.is_ok() { (writing.await, true) } else { return },
        };
        match (more, draining) {
            (false, _) => return,
            (true, true) => break,
            (true, false) => {}
        }
    }
    loop {
        // Asks the kernel, not tokio: tokio may not know yet of a write that has just been made.
        match rustix::io::read(&*from, &mut buffer) {
            Err(Errno::AGAIN) => return,
            Err(Errno::INTR) => {}
            read => {
                let read = read.map(|read| &buffer[..read]);
                if !to.write(read.map_err(std::io::Error::from)).await {
                    return;
                }
            }
        }
    }
}

/// Reads what is there, or waits for the first byte or the end.
async fn read_some(from: &pipe::Receiver, buffer: &mut [u8]) -> std::io::Result<usize> {
    loop {
        from.readable().await?;
        match from.try_read(buffer) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            read => return read,
        }
    }
}

/// Copies until the source ends, or the other side is closed. A pty master ends with EIO when the last slave is closed.
pub(super) async fn copy(mut from: pipe::Receiver, mut to: pipe::Sender) {
    let mut buffer = vec![0; BUFFER];
    loop {
        let read = from.read(&mut buffer).await;
        if !write(&mut to, read.map(|read| &buffer[..read])).await {
            return;
        }
    }
}

/// Writes the bytes that were read. False at the end of either side.
async fn write(to: &mut pipe::Sender, read: std::io::Result<&[u8]>) -> bool {
    let Some(bytes) = checked(read) else {
        return false;
    };
    match to.write_all(bytes).await {
        Ok(()) => true,
        Err(error) if error.kind() == ErrorKind::BrokenPipe => false,
        Err(error) => {
            warn!(error:%; "stream not written");
            false
        }
    }
}

/// The bytes that were read; none at the end of the source.
fn checked(read: std::io::Result<&[u8]>) -> Option<&[u8]> {
    match read {
        Ok([]) => None,
        Ok(bytes) => Some(bytes),
        Err(error) if error.raw_os_error() == Some(Errno::IO.raw_os_error()) => None,
        Err(error) => {
            warn!(error:%; "stream not read");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::time::Duration;

    use super::*;

    /// Writes `text` through a pipe that is copied into `path`, and waits for the end of the copy.
    async fn copy_all(path: &Path, file: &Arc<File>, text: &str) {
        let (mut copied, writer) = Copied::into_file(path, file).unwrap();
        copied.begin();
        let mut writer = pipe::Sender::from_owned_fd(writer).unwrap();
        writer.write_all(text.as_bytes()).await.unwrap();
        drop(writer);
        let end = copied.close().end().unwrap();
        tokio::time::timeout(Duration::from_secs(5), end)
            .await
            .unwrap()
            .unwrap();
    }

    #[tokio::test]
    async fn output_is_added_to_a_file_in_a_folder_that_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/log");
        for text in ["one\n", "two\n"] {
            copy_all(&path, &open_file(&path).unwrap(), text).await;
        }
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "one\ntwo\n");
    }

    #[tokio::test]
    async fn a_full_disk_does_not_stop_a_process() {
        let path = Path::new("/dev/full");
        let much = "x".repeat(1 << 20);
        copy_all(path, &open_there(path).unwrap(), &much).await;
    }
}
