//! The socket of a pod's server: its path, and who listens there.
//!
//! ```text
//!  connect ──┬─ accepted ──▶ the pod has a server
//!            ├─ refused ───▶ the server was killed: remove the socket ─┐
//!            └─ not found ─────────────────────────────────────────────┴▶ listen
//! ```

use std::fs::{DirBuilder, File};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, Mode, flock};
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

/// Listens at `socket`; none when a server already listens there. A lock on the directory keeps two starts of one pod
/// apart.
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
    // The kernel releases the lock when this function closes the file.
    let lock = File::open(directory).map_err(IoError::at("open", directory))?;
    flock(&lock, FlockOperation::LockExclusive).map_err(IoError::at("lock", directory))?;
    match UnixStream::connect(socket) {
        Ok(_) => return Ok(None),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            std::fs::remove_file(socket).map_err(IoError::at("remove stale socket", socket))?;
        }
        Err(error) => return Err(IoError::at("connect to", socket)(error).into()),
    }
    // The socket has its mode from the beginning: there is no moment in which another user may connect.
    let before = umask(Mode::RWXG | Mode::RWXO | Mode::XUSR);
    let listener = UnixListener::bind(socket);
    umask(before);
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
    if UnixStream::connect(socket).is_ok() {
        return Ok(());
    }
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(IoError::at("remove", socket)(error).into())
        }
        _ => Ok(()),
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
}
