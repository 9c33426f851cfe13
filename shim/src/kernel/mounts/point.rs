//! Finds the place of a mount inside a root filesystem.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};

use super::failed;
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

    /// The path for the system call that makes the mount. After that call a path through a descriptor leads below the
    /// new mount; use `path` then.
    pub(super) fn call_path(&self) -> PathBuf {
        self.place
            .as_ref()
            .map_or_else(|| self.path.clone(), descriptor_path)
    }
}

/// A path that leads to a descriptor's open file.
fn descriptor_path(descriptor: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))
}
