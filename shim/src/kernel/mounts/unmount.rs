//! Takes mounts away: umount(2).

use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use super::{failed, mounts_that};
use crate::error::IoError;

/// The limit of mounts stacked on one path. A loop that finds more makes no progress.
const MOST_STACKED: usize = 128;

/// How often the mount table is read again while a directory still has mounts at or below its path.
const MOST_PASSES: usize = 4;

/// Takes away all mounts at `path`, the topmost first. A missing path, or one without a mount, is no error. A busy
/// mount is detached: the mount ends when its last user ends.
///
/// # Errors
/// The error of umount(2).
pub fn unmount(path: &Path) -> Result<(), IoError> {
    for _ in 0..MOST_STACKED {
        match detach(path) {
            Ok(()) => {}
            // EINVAL: the path is no mount point (any more).
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => return Err(failed("unmount", path)(error.into())),
        }
    }
    Err(failed("unmount", path)(io::Error::other(
        "there are always more mounts at this path",
    )))
}

/// Takes away all mounts at or below `directory`, the deepest first. A failure does not stop the others; all failures
/// are returned. A missing directory is no failure.
#[must_use = "these are failures"]
pub fn unmount_below(directory: &Path) -> Vec<IoError> {
    // The paths of the mount table have no symbolic links.
    let directory = match std::fs::canonicalize(directory) {
        Ok(directory) => directory,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => return vec![failed("find the mounts below", directory)(error)],
    };
    let mut failures = Vec::new();
    // More than one pass: a mount can hide an older one, which shows only after the upper mount is gone.
    for _ in 0..MOST_PASSES {
        let mut points = match points_below(&directory) {
            Ok(points) if points.is_empty() => return Vec::new(),
            Ok(points) => points,
            Err(error) => {
                failures.push(error);
                return failures;
            }
        };
        points.sort_by_key(|point| std::cmp::Reverse(point.components().count()));
        points.dedup();
        failures = points
            .iter()
            .filter_map(|point| unmount(point).err())
            .collect();
    }
    if failures.is_empty() {
        // The last pass may have taken away the rest, and no pass has read the mount table since.
        match points_below(&directory) {
            Ok(points) => {
                let still = || io::Error::other("it is still mounted");
                let left = points.iter().map(|point| failed("unmount", point)(still()));
                failures.extend(left);
            }
            Err(error) => failures.push(error),
        }
    }
    failures
}

fn points_below(directory: &Path) -> Result<Vec<PathBuf>, IoError> {
    let below = mounts_that(|mount| mount.target.starts_with(directory))?;
    Ok(below.into_iter().map(|mount| mount.target).collect())
}

/// Takes away the topmost mount at `path`. A path without a mount is no error.
pub(super) fn unmount_once(path: &Path) -> Result<(), IoError> {
    match detach(path) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(error) => Err(failed("unmount", path)(error.into())),
    }
}

/// One umount(2). MNT_DETACH: a process with an open file must not keep the mount. UMOUNT_NOFOLLOW: a symbolic link
/// could lead to a mount of somebody else.
pub(super) fn detach(path: &Path) -> rustix::io::Result<()> {
    rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
}
