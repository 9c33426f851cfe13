//! The streams for a process that is about to be made, and what the shim knows of that process.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::Arc;

use rustix::fs::{Gid, Uid};

use super::io_error;
use crate::error::Result;
use crate::kernel::exits::Exits;

/// The standard streams of a process. The OCI runtime gets these streams and hands them on to the process.
#[derive(Debug)]
pub enum Streams {
    /// Files: FIFOs, pipes, or `/dev/null`.
    Files([Stdio; 3]),
    /// A terminal: the runtime sends the master to this socket.
    Console(PathBuf),
}

/// The process that streams are made for.
#[derive(Debug, Clone, Copy)]
pub struct Recipient<'a> {
    /// The id for the logger: the container's, or the exec's.
    pub id: &'a str,
    /// containerd's namespace.
    pub namespace: &'a str,
    /// The folder of the socket for a terminal, and the socket's name.
    pub console: (&'a Path, &'a str),
    /// Who writes the output FIFOs.
    pub writer: Writer,
    /// Who owns the streams.
    pub owner: StreamOwner,
    /// The waiter, which reaps the logger.
    pub exits: &'a Arc<Exits>,
}

/// Who writes a process's output FIFOs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Writer {
    /// The process itself.
    Process,
    /// The shim, from a pipe.
    Shim,
}

/// The owner of the streams, who may open the streams again as `/dev/stdout`: options `IoUid` and `IoGid`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamOwner {
    /// The user id on the node.
    pub uid: u32,
    /// The group id on the node.
    pub gid: u32,
}

impl StreamOwner {
    /// Gives `stream` to this owner. An error message calls the stream `name`.
    pub(super) fn take(self, stream: OwnedFd, name: &Path) -> Result<Stdio> {
        if (self.uid, self.gid) != (0, 0) {
            let (uid, gid) = (Uid::from_raw(self.uid), Gid::from_raw(self.gid));
            rustix::fs::fchown(&stream, Some(uid), Some(gid))
                .map_err(io_error("change the owner of", name))?;
        }
        Ok(stream.into())
    }
}
