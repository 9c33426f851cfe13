//! Mounts that are attached nowhere yet: open_tree(2) and move_mount(2), Linux 5.2.
//!
//! A mount inside a root filesystem is made so, because the filesystem may be writable by others, and a path through
//! such a filesystem may lead elsewhere at the next call. A descriptor leads to one mount, and stays with the mount.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};

use super::unmount::detach;

/// How much of a tree of mounts to clone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Depth {
    /// The mount without those below.
    One,
    /// The mount and all mounts below.
    All,
}

/// A clone of a mount, attached nowhere. Dropping the clone ends it.
#[derive(Debug)]
pub(super) struct Detached(OwnedFd);

impl Detached {
    /// Clones the mount at `path`.
    pub(super) fn clone_of(path: &Path, depth: Depth) -> io::Result<Self> {
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        if depth == Depth::All {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        Ok(Self(rustix::mount::open_tree(CWD, path, flags)?))
    }

    /// Attaches the clone at `target`. Returns a descriptor of the attached mount.
    pub(super) fn attach(self, target: &Path) -> io::Result<OwnedFd> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
        rustix::mount::move_mount(&self.0, "", CWD, target, flags)?;
        Ok(self.0)
    }
}

impl AsFd for Detached {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// An empty directory beside the root filesystem, to mount something for a short time. A shim that is killed meanwhile
/// leaves the mount in the bundle, and `delete` takes the mount away.
#[derive(Debug)]
pub(super) struct Beside {
    pub(super) directory: PathBuf,
}

impl Beside {
    pub(super) fn make(rootfs: &Path, name: &str) -> io::Result<Self> {
        let directory = rootfs.with_file_name(name);
        match std::fs::create_dir(&directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(Self { directory }),
        }
    }

    /// Takes the mount away, and the directory.
    pub(super) fn unmount(self) -> io::Result<()> {
        detach(&self.directory)?;
        std::fs::remove_dir(&self.directory)
    }

    /// Takes the directory away, on which nothing was mounted. A directory that stays goes with the bundle.
    pub(super) fn remove(self) {
        let _ = std::fs::remove_dir(&self.directory);
    }
}
