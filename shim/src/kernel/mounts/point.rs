//! Finds the place of a mount inside a root filesystem.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::mount::UnmountFlags;

use super::failed;
use super::unmount::unmount_once;
use crate::error::IoError;

/// The place of a mount.
#[derive(Debug)]
pub(super) struct MountPoint {
    /// The path without symbolic links.
    pub(super) path: PathBuf,
    /// Keeps hold of the place inside the root filesystem; `None` if the mount point is the root filesystem itself.
    place: Option<OwnedFd>,
}

impl MountPoint {
    /// Finds `inside` in `rootfs`. What is already mounted on `rootfs` comes from an image, and the image's symbolic
    /// links must not lead out. So the kernel resolves links as if `rootfs` were the root (openat2(2), Linux 5.6).
    pub(super) fn find(rootfs: &Path, inside: &str) -> Result<Self, IoError> {
        let inside = inside.trim_start_matches('/');
        if inside.is_empty() {
            return Ok(Self {
                path: rootfs.to_owned(),
                place: None,
            });
        }
        let find = || -> io::Result<Self> {
            let root =
                rustix::fs::openat(CWD, rootfs, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let place =
                rustix::fs::openat2(root, inside, flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
            Ok(Self {
                path: std::fs::read_link(descriptor_path(&place))?,
                place: Some(place),
            })
        };
        find().map_err(failed("find the mount's target", &rootfs.join(inside)))
    }

    /// Whether the mount goes inside the root filesystem, where a path may lead elsewhere at the next call.
    pub(super) fn is_inside(&self) -> bool {
        self.place.is_some()
    }

    /// The path for a system call: to mount here, or to change the mount that was here when the place was found. Leads
    /// below what is mounted here later.
    pub(super) fn call_path(&self) -> PathBuf {
        self.place
            .as_ref()
            .map_or_else(|| self.path.clone(), descriptor_path)
    }
}

/// A mount that has been made.
#[derive(Debug)]
pub(super) struct Made {
    /// The path of the mount point, without symbolic links when the mount was made.
    pub(super) path: PathBuf,
    /// The mount itself; `None` for the root filesystem, whose path only root can change.
    pub(super) mount: Option<OwnedFd>,
}

impl Made {
    /// The path for a system call on this mount.
    pub(super) fn call_path(&self) -> PathBuf {
        self.mount
            .as_ref()
            .map_or_else(|| self.path.clone(), descriptor_path)
    }

    /// Takes the mount away; of mounts that are stacked on the root filesystem, the topmost.
    pub(super) fn unmount(&self) -> Result<(), IoError> {
        match &self.mount {
            None => unmount_once(&self.path),
            // The last part of a descriptor's path is a link, which must be followed.
            Some(mount) => rustix::mount::unmount(descriptor_path(mount), UnmountFlags::DETACH)
                .map_err(|error| failed("unmount", &self.path)(error.into())),
        }
    }
}

/// A path that leads to a descriptor's open file.
fn descriptor_path(descriptor: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))
}
