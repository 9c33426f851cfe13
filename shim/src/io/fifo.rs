//! Output FIFOs: the shim holds a FIFO open, and the process (or a copy, see `copied.rs`) writes into the FIFO.
//!
//! A FIFO loses its content when nobody has the FIFO open, and SIGPIPE kills a writer without a reader. So the shim
//! holds each output FIFO open for reading and writing while the process lives: containerd may be away, and a process
//! that finds the FIFO full just waits. After the end of the process the shim must let the FIFO go, because containerd
//! waits for the end of the stream. But the shim lets go only once somebody reads, or once nothing is left to read:
//!
//! ```text
//!  process lives        ──▶ held for reading and writing
//!  ended, reader there  ──▶ let go
//!  ended, FIFO empty    ──▶ let go
//!  ended, else          ──▶ held for writing until somebody opens the FIFO (inotify), or the process is deleted
//! ```
//!
//! The exit of a container's init is published when the init's output has been read, if there is a reader.
//!
//! See fifo(7), inotify(7).

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Weak;
use std::time::Duration;

use log::warn;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::fs::inotify;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::task::AbortHandle;

use super::io_error;
use crate::error::Result;
use crate::kernel::blocking;

/// How long the shim waits for a reader to read what a process has left in the FIFO.
const READING: Duration = Duration::from_secs(2);
/// How often the shim looks at the FIFO meanwhile: the kernel does not report that a pipe has run empty.
const BETWEEN_LOOKS: Duration = Duration::from_millis(2);

pub(super) const NONBLOCK: i32 = OFlags::NONBLOCK.bits().cast_signed();

/// An output FIFO that the shim holds open: for reading and writing while the process lives, later for writing only.
#[derive(Debug)]
pub(super) struct Output {
    held: File,
    path: PathBuf,
    reads: bool,
}

/// Output that waits for its reader in a FIFO, or that a copy has yet to write into the FIFO.
#[derive(Debug)]
pub(super) struct Unread {
    fifo: OwnedFd,
    ahead: Ahead,
}

/// What comes before a FIFO.
#[derive(Debug)]
pub(super) enum Ahead {
    /// Nothing: the process writes into the FIFO.
    Nothing,
    /// The copy of a terminal, until the copy ends.
    Copy(AbortHandle),
    /// A pipe that is copied, until the pipe is empty. A process in the background may keep the pipe open.
    Pipe(Weak<pipe::Receiver>),
}

/// Whether `path` is a FIFO. An error if nothing is at `path`.
pub(super) fn is_fifo(path: &Path) -> Result<bool> {
    let found = std::fs::metadata(path).map_err(io_error("open stream", path))?;
    Ok(found.file_type().is_fifo())
}

/// Opens the FIFO at `path` as output of a process. Returns the shim's hold, and the stream of the process.
pub(super) fn output(path: &Path) -> Result<(Output, OwnedFd)> {
    let held = hold(path)?;
    let writer = open(path, OpenOptions::new().write(true))?;
    Ok((held, writer.into()))
}

/// Opens the FIFO at `path` twice: to read from, and to hold for writing. The reader sees the end when the hold is
/// dropped and all other writers have closed the FIFO.
pub(super) fn open_input(path: &Path) -> Result<(pipe::Receiver, File)> {
    // The first open is for reading and writing, so neither of the other two opens waits for a partner.
    let both = hold(path)?;
    let reader = open(path, OpenOptions::new().read(true).custom_flags(NONBLOCK))?;
    let writer = open(path, OpenOptions::new().write(true))?;
    drop(both);
    let reader = pipe::Receiver::from_file(reader).map_err(io_error("poll", path))?;
    Ok((reader, writer))
}

/// Opens the FIFO at `path` for reading and writing, with no stream for a process.
pub(super) fn hold(path: &Path) -> Result<Output> {
    let held = open(
        path,
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(NONBLOCK),
    )?;
    Ok(Output {
        held,
        path: path.to_owned(),
        reads: true,
    })
}

/// Opens the FIFO at `path` for a copy: the hold, and what the copy writes to.
pub(super) fn hold_for_copy(path: &Path) -> Result<(Output, pipe::Sender)> {
    let held = hold(path)?;
    let to = held
        .held
        .as_fd()
        .try_clone_to_owned()
        .and_then(pipe::Sender::from_owned_fd_unchecked)
        .map_err(io_error("poll", path))?;
    Ok((held, to))
}

fn open(path: &Path, options: &OpenOptions) -> Result<File> {
    options.open(path).map_err(io_error("open stream", path))
}

impl Output {
    /// Another hold on the same FIFO.
    pub(super) fn try_clone(&self) -> std::io::Result<OwnedFd> {
        self.held.as_fd().try_clone_to_owned()
    }

    /// What is left in the FIFO after the last writing process has ended; none if nothing is left, or if nobody reads.
    pub(super) fn unread(&mut self) -> Option<Unread> {
        if left(&self.held) == 0 {
            return None;
        }
        self.stop_reading().ok()?;
        let unread = Unread {
            fifo: self.try_clone().ok()?,
            ahead: Ahead::Nothing,
        };
        Some(unread).filter(Unread::is_awaited)
    }

    /// What is left in the FIFO, and what is `ahead`. A copy holds the FIFO for reading, too.
    pub(super) fn uncopied(&self, ahead: Ahead) -> Option<Unread> {
        let unread = Unread {
            fifo: self.try_clone().ok()?,
            ahead,
        };
        Some(unread).filter(Unread::is_awaited)
    }

    /// Lets the FIFO go once somebody reads or nothing is left, and not before.
    pub(super) async fn release(self) {
        let path = self.path.clone();
        let released = match self.let_go() {
            Ok(Some(unread)) => until_opened(unread).await,
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = released {
            warn!(fifo:% = path.display(), error:%; "FIFO not let go");
        }
    }

    /// Lets the FIFO go. If something is left and nobody reads, returns the FIFO instead, still held for writing.
    fn let_go(mut self) -> std::io::Result<Option<File>> {
        if left(&self.held) == 0 {
            return Ok(None);
        }
        self.stop_reading()?;
        Ok((!has_reader(&self.held)).then_some(self.held))
    }

    /// Holds the FIFO for writing only: from then on, a reader is somebody else.
    fn stop_reading(&mut self) -> std::io::Result<()> {
        if self.reads {
            // Opens the open file again, not the name: containerd may have removed the name. The open does not wait for
            // a reader, because `held` is one.
            self.held = OpenOptions::new().write(true).open(own_path(&self.held))?;
            self.reads = false;
        }
        Ok(())
    }
}

/// Resolves when each FIFO is empty or has no reader, after [`READING`] at the latest.
pub(super) async fn until_read(outputs: Vec<Unread>) {
    let read = async {
        while outputs.iter().any(Unread::is_awaited) {
            tokio::time::sleep(BETWEEN_LOOKS).await;
        }
    };
    // A reader that is too slow for this limit has lost nothing yet: the shim lets the FIFO go as ever.
    let _ = tokio::time::timeout(READING, read).await;
}

impl Unread {
    fn is_awaited(&self) -> bool {
        let comes = match &self.ahead {
            Ahead::Nothing => false,
            Ahead::Copy(copy) => !copy.is_finished(),
            Ahead::Pipe(pipe) => pipe.upgrade().is_some_and(|pipe| left(&*pipe) > 0),
        };
        comes || (left(&self.fifo) > 0 && has_reader(&self.fifo))
    }
}

/// The number of bytes in a FIFO.
fn left(fifo: impl AsFd) -> u64 {
    // FIONREAD does not fail on an open FIFO.
    rustix::io::ioctl_fionread(fifo).unwrap_or(0)
}

fn own_path(file: &File) -> String {
    format!("/proc/self/fd/{}", file.as_raw_fd())
}

/// Whether somebody reads. poll(2) reports POLLERR for a writer without a reader.
fn has_reader(writer: impl AsFd) -> bool {
    let mut fds = [PollFd::new(&writer, PollFlags::empty())];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    poll(&mut fds, Some(&now)).is_ok() && !fds[0].revents().contains(PollFlags::ERR)
}

/// Holds `writer` until somebody reads.
async fn until_opened(writer: File) -> std::io::Result<()> {
    let opens = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
    inotify::add_watch(&opens, own_path(&writer), inotify::WatchFlags::OPEN)?;
    // An inotify descriptor becomes readable like a pipe, and the same calls read from it.
    let mut opens = pipe::Receiver::from_owned_fd_unchecked(opens)?;
    while !has_reader(&writer) {
        // The content of the events does not matter, only that the FIFO was opened.
        let mut events = [0; 512];
        let _ = opens.read(&mut events).await?;
    }
    // On a worker thread, because the kernel takes some 15 ms to close an inotify watch.
    blocking::spawn(move || drop(opens));
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::io::{Read, Write};
    use std::process::Command;

    use super::*;

    fn fifo(dir: &Path) -> PathBuf {
        let path = dir.join("out");
        assert!(
            Command::new("mkfifo")
                .arg(&path)
                .status()
                .unwrap()
                .success()
        );
        path
    }

    /// Runs `echo` to its end, with its output in the FIFO, while nobody reads.
    fn echo(path: &Path) -> Output {
        let (held, stream) = output(path).unwrap();
        let mut echo = Command::new("echo");
        assert!(echo.arg("hello").stdout(stream).status().unwrap().success());
        held
    }

    async fn read_all(path: PathBuf) -> String {
        let read = blocking::run(move || {
            let mut text = String::new();
            File::open(path).unwrap().read_to_string(&mut text).unwrap();
            Ok(text)
        });
        tokio::time::timeout(Duration::from_secs(5), read)
            .await
            .unwrap()
            .unwrap()
    }

    #[tokio::test]
    async fn what_an_ended_process_wrote_waits_for_its_reader() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path());
        let released = tokio::spawn(echo(&path).release());
        tokio::task::yield_now().await;
        assert_eq!(read_all(path).await, "hello\n");
        released.await.unwrap();
    }

    #[tokio::test]
    async fn a_reader_that_is_there_sees_the_end() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path());
        let held = hold(&path).unwrap();
        let reader = tokio::spawn(read_all(path.clone()));
        while held_readers(&path) < 2 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        OpenOptions::new()
            .write(true)
            .open(&path)
            .unwrap()
            .write_all(b"x")
            .unwrap();
        held.release().await;
        assert_eq!(reader.await.unwrap(), "x");
    }

    fn held_readers(path: &Path) -> usize {
        std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok())
            .filter(|target| target == path)
            .count()
    }

    #[tokio::test]
    async fn what_is_left_is_waited_for_while_somebody_may_read_it_and_not_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path());
        let mut held = echo(&path);
        assert!(held.unread().is_none(), "nobody has it open");
        let mut reader = File::open(&path).unwrap();
        let begin = std::time::Instant::now();
        until_read(vec![held.unread().unwrap()]).await;
        assert!(begin.elapsed() >= READING);
        let waiting = tokio::spawn(until_read(vec![held.unread().unwrap()]));
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        reader.read_exact(&mut [0; 6]).unwrap();
        waiting.await.unwrap();
        assert!(held.unread().is_none());
    }

    #[tokio::test]
    async fn a_reader_that_goes_is_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = fifo(dir.path());
        let mut held = echo(&path);
        let reader = File::open(&path).unwrap();
        let waiting = tokio::spawn(until_read(vec![held.unread().unwrap()]));
        drop(reader);
        let begin = std::time::Instant::now();
        waiting.await.unwrap();
        assert!(begin.elapsed() < READING);
        let released = tokio::spawn(held.release());
        assert_eq!(read_all(path).await, "hello\n");
        released.await.unwrap();
    }

    #[test]
    fn a_stream_that_is_not_there_is_named() {
        let error = is_fifo(Path::new("/nowhere/out")).unwrap_err().to_string();
        assert!(error.contains("open stream /nowhere/out"), "{error}");
    }
}
