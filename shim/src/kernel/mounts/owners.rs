//! Mounts whose files belong to somebody else than on disk: the options `uidmap=` and `gidmap=`.
//!
//! containerd 2.x asks for them when a pod has a user namespace. On an image's layers root is 0; in the pod root is, say,
//! user 100000 of the node. Instead of a copy of each layer with other owners, the kernel translates at the mount
//! (mount_setattr(2), Linux 5.12; as layers of an overlay, 5.19).
//!
//! ```text
//!   overlay    the directory that all lower layers are in ──clone, map──▶ BUNDLE/layers ──▶ lowerdir=…, unmounted again
//!   bind       the source                                 ──clone, map──▶ the target
//!   others     mounted at the target, taken away          ──clone, map──▶ the target
//! ```
//! What is written goes to an overlay's upper layer, which containerd gives to the pod's root as it is. The kernel keeps
//! clones of the layers, so nothing but the overlay stays mounted.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use pause::IdMap;
use rustix::fs::CWD;
use rustix::mount::{MoveMountFlags, OpenTreeFlags};

use super::{detach, unsupported};

/// Who the files of a mount belong to: `uidmap=` and `gidmap=` with their lists of `inside:outside:count`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Owners {
    pub(super) uid_map: Vec<IdMap>,
    pub(super) gid_map: Vec<IdMap>,
}

impl Owners {
    /// Takes in an option; `false` if it is another one.
    pub(super) fn take(&mut self, option: &str) -> io::Result<bool> {
        let (map, list) = if let Some(list) = option.strip_prefix("uidmap=") {
            (&mut self.uid_map, list)
        } else if let Some(list) = option.strip_prefix("gidmap=") {
            (&mut self.gid_map, list)
        } else {
            return Ok(false);
        };
        let parsed: Option<Vec<IdMap>> = list.split(',').map(id_map).collect();
        *map = parsed.ok_or_else(|| {
            invalid(format!(
                "the mount option {option:?} is not a list of container-id:host-id:size"
            ))
        })?;
        Ok(true)
    }

    /// The user namespace that maps so; `None` when no option asked for one.
    pub(super) fn user_namespace(self) -> io::Result<Option<OwnedFd>> {
        match (self.uid_map.is_empty(), self.gid_map.is_empty()) {
            (true, true) => Ok(None),
            (false, false) => pause::user_namespace(self.uid_map, self.gid_map)
                .map(Some)
                .map_err(io::Error::other),
            _ => Err(invalid(
                "of the mount options uidmap= and gidmap= there must be both, or none".to_owned(),
            )),
        }
    }
}

fn id_map(text: &str) -> Option<IdMap> {
    let mut numbers = text.split(':').map(|number| number.parse().ok());
    let map = IdMap {
        container: numbers.next()??,
        host: numbers.next()??,
        size: numbers.next()??,
    };
    (map.size > 0 && numbers.next().is_none()).then_some(map)
}

fn invalid(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text)
}

/// How much of a tree of mounts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Depth {
    /// The mount alone.
    One,
    /// And what is mounted below it.
    All,
}

/// A clone of a mount with other owners, attached nowhere: if it is dropped, it is gone.
#[derive(Debug)]
pub(super) struct Mapped(OwnedFd);

impl Mapped {
    /// Clones what is at `path`.
    pub(super) fn clone_of(path: &Path, depth: Depth, user: &OwnedFd) -> io::Result<Self> {
        let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        if depth == Depth::All {
            flags |= OpenTreeFlags::AT_RECURSIVE;
        }
        let tree = rustix::mount::open_tree(CWD, path, flags).map_err(|e| too_old(e.into()))?;
        pause::map_owners(tree.as_fd(), user.as_fd()).map_err(|error| {
            if error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) {
                unsupported(format!(
                    "this kernel cannot map the owners (uidmap=, gidmap=) of the filesystem that {} is on: \
                     take a newer kernel, another filesystem for containerd's root, or a pod without a user namespace",
                    path.display()
                ))
            } else {
                too_old(error)
            }
        })?;
        Ok(Self(tree))
    }

    /// Mounts it at `target`.
    pub(super) fn attach(self, target: &Path) -> io::Result<()> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_SYMLINKS;
        Ok(rustix::mount::move_mount(self.0, "", CWD, target, flags)?)
    }
}

fn too_old(error: io::Error) -> io::Error {
    if error.raw_os_error() == Some(rustix::io::Errno::NOSYS.raw_os_error()) {
        unsupported("mounts with mapped owners (uidmap=, gidmap=) need Linux 5.12".to_owned())
    } else {
        error
    }
}

/// The layers of an overlay with other owners, mounted beside the root filesystem as long as the overlay is being made.
/// A shim that is killed meanwhile leaves it in the bundle, where `delete` takes it away.
#[derive(Debug)]
pub(super) struct Layers {
    pub(super) directory: PathBuf,
}

impl Layers {
    /// Mounts `parent`, the directory that all layers are in, beside `rootfs`.
    pub(super) fn mount(parent: &Path, rootfs: &Path, user: &OwnedFd) -> io::Result<Self> {
        let mapped = Mapped::clone_of(parent, Depth::All, user)?;
        let directory = rootfs.with_file_name("layers");
        match std::fs::create_dir(&directory) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let layers = Self { directory };
        match mapped.attach(&layers.directory) {
            Ok(()) => Ok(layers),
            Err(error) => {
                // Empty; if it stays, it goes with the bundle.
                let _ = std::fs::remove_dir(&layers.directory);
                Err(error)
            }
        }
    }

    /// Takes them away again.
    pub(super) fn unmount(self) -> io::Result<()> {
        detach(&self.directory)?;
        std::fs::remove_dir(&self.directory)
    }
}
