//! The socket of a pod's server: its path, and who listens there.
//!
//! ```text
//!  connect ──┬─ accepted ──▶ the pod has a server
//!            ├─ no room ───▶ the pod has a server, which hangs: callers wait to be accepted
//!            ├─ refused ───▶ the server was killed: remove the socket ─┐
//!            └─ not found ─────────────────────────────────────────────┴▶ listen
//! ```
//!
//! All pods of a node have their sockets in one directory, and one lock on that directory. Nothing is waited for under
//! the lock, so that a server that hangs costs no other pod its `start`.

use std::fs::{DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use rustix::process::umask;
use sha2::{Digest, Sha256};

use crate::error::{Error, IoError, Result};

/// The directory of the shims' sockets, unless containerd names another.
pub(super) const DIRECTORY: &str = "/run/containerd/s";
/// The bytes of `sockaddr_un.sun_path` without the closing NUL (unix(7)).
const PATH_MAX: usize = 107;

/// The path of a pod's socket in `directory`. The name is the one that containerd computes: the SHA-256 sum of
/// containerd's own socket, the namespace and the pod's id.
///
/// # Errors
/// `InvalidArgument` for a path that is longer than the kernel takes.
pub(super) fn path(
    directory: &Path,
    address: &str,
    namespace: &str,
    group: &str,
) -> Result<PathBuf> {
    let name = Sha256::digest(format!("{address}/{namespace}/{group}"));
    let socket = directory.join(format!("{name:x}"));
    if socket.as_os_str().len() > PATH_MAX {
        return Err(Error::InvalidArgument(format!(
            "socket path {} is longer than {PATH_MAX} bytes: choose a shorter socket directory",
            socket.display()
        )));
    }
    Ok(socket)
}

/// Listens at `socket`; none when a server already listens there.
///
/// # Errors
/// `Io` when the kernel refuses.
pub(super) fn listen(socket: &Path) -> Result<Option<UnixListener>> {
    let directory = socket.parent().unwrap_or(Path::new("/"));
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(IoError::at("create", directory))?;
    // Keeps two starts of one pod apart.
    let _lock = lock(directory)?;
    match server(socket)? {
        Server::Listens => return Ok(None),
        Server::Missing => {}
        Server::Dead => {
            std::fs::remove_file(socket).map_err(IoError::at("remove stale socket", socket))?;
        }
    }
    // The socket has its mode from the beginning: there is no moment in which another user may connect.
    let before = umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
    let listener = UnixListener::bind(socket);
    umask(before);
    if let Err(error) = &listener
        && error.kind() != ErrorKind::AddrInUse
    {
        // bind(2) makes the socket, and listen(2) may fail after that.
        remove_quietly(socket);
    }
    Ok(Some(listener.map_err(IoError::at("listen on", socket))?))
}

/// Removes the socket of a start that failed.
pub(super) fn remove_quietly(socket: &Path) {
    // The caller returns the error of the start, which says more.
    let _ = std::fs::remove_file(socket);
}

/// Removes the socket of a dead server. A socket that somebody listens at stays.
///
/// # Errors
/// `Io` when the kernel refuses; a missing socket is no error.
pub(super) fn remove_stale(socket: &Path) -> Result<()> {
    let directory = socket.parent().unwrap_or(Path::new("/"));
    let _lock = match lock(directory) {
        // No directory, no socket.
        Err(error) if error.source.kind() == ErrorKind::NotFound => return Ok(()),
        locked => locked?,
    };
    match server(socket)? {
        Server::Listens | Server::Missing => Ok(()),
        Server::Dead => Ok(std::fs::remove_file(socket).map_err(IoError::at("remove", socket))?),
    }
}

/// Locks the directory of the sockets until the file is closed.
fn lock(directory: &Path) -> Result<File, IoError> {
    let lock = File::open(directory).map_err(IoError::at("open", directory))?;
    flock(&lock, FlockOperation::LockExclusive).map_err(IoError::at("lock", directory))?;
    Ok(lock)
}

/// The server of a socket.
enum Server {
    Listens,
    /// The socket is left of a server that was killed.
    Dead,
    /// There is no socket.
    Missing,
}

/// Looks for a server, and waits for nothing: a server that hangs accepts nobody, and once its queue is full, a blocking
/// connect(2) has no end.
fn server(socket: &Path) -> Result<Server, IoError> {
    let failed = IoError::at::<Errno>("connect to", socket);
    let connected = SocketAddrUnix::new(socket).and_then(|address| {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let caller = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&caller, &address)
    });
    match connected {
        // Again: the queue of callers is full.
        Ok(()) | Err(Errno::AGAIN) => Ok(Server::Listens),
        Err(Errno::CONNREFUSED) => Ok(Server::Dead),
        Err(Errno::NOENT) => Ok(Server::Missing),
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_socket_has_the_name_that_containerd_computes() {
        let of_pod1 = |directory| {
            path(
                directory,
                "/run/containerd/containerd.sock",
                "k8s.io",
                "pod1",
            )
        };
        let socket = of_pod1(Path::new(DIRECTORY)).unwrap();
        // printf %s /run/containerd/containerd.sock/k8s.io/pod1 | sha256sum
        let name = format!(
            "{:x}",
            Sha256::digest("/run/containerd/containerd.sock/k8s.io/pod1")
        );
        assert_eq!(socket, Path::new(DIRECTORY).join(name));
        assert!(of_pod1(Path::new(&"/x".repeat(40))).is_err());
    }

    #[test]
    fn a_second_start_of_a_pod_finds_the_first_ones_server() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let first = listen(&socket).unwrap();
        assert!(first.is_some());
        assert!(listen(&socket).unwrap().is_none());
        drop(first);
        assert!(
            listen(&socket).unwrap().is_some(),
            "a stale socket is replaced"
        );
    }

    #[test]
    fn nobody_but_root_may_connect() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let _listener = listen(&socket).unwrap();
        let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_server_that_accepts_nobody_is_waited_for_by_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let hung = socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        rustix::net::bind(&hung, &SocketAddrUnix::new(&socket).unwrap()).unwrap();
        rustix::net::listen(&hung, 0).unwrap();
        let _queued = std::os::unix::net::UnixStream::connect(&socket).unwrap();
        assert!(listen(&socket).unwrap().is_none(), "somebody listens there");
        remove_stale(&socket).unwrap();
        assert!(socket.exists());
        drop(hung);
        remove_stale(&socket).unwrap();
        assert!(!socket.exists());
        remove_stale(&socket).unwrap();
    }
}
