//! Mounts: makes a container's root filesystem from the mounts of containerd's snapshotter, and takes mounts away.
//!
//! ```text
//!   Mount { kind, source, options }      option ──► flag        MS_RDONLY, MS_BIND, …       1st mount(2)
//!                                               ──► propagation MS_PRIVATE, MS_SLAVE, …     a mount(2) of its own
//!                                               ──► data        lowerdir=…, size=…          1st mount(2)
//!                                               ──► id maps     uidmap=…, gidmap=…          see idmap.rs
//!   a bind mount's flags                                                                    a remount
//! ```
//!
//! A mount on a directory inside the root filesystem is made elsewhere, and attached there: see detached.rs.
//!
//! Kernel documents: mount(2), mount_namespaces(7), Documentation/filesystems/overlayfs.rst, proc_pid_mountinfo(5). All
//! functions block; call them where blocking is allowed.

mod detached;
mod idmap;
mod mount;
pub(crate) mod options;
mod point;
pub(crate) mod table;
mod unmount;

#[cfg(test)]
mod tests;

use std::io;
use std::path::Path;

use self::point::Made;
pub use self::table::{MountedAt, mounts_that};
pub use self::unmount::{unmount, unmount_below};
use crate::error::IoError;

/// A mount to make, as `containerd.types.Mount` describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mount {
    /// The filesystem's type. The kernel ignores the type of a bind mount.
    pub kind: String,
    /// The source: a path, a device, or a name without meaning.
    pub source: String,
    /// The mount point inside the root filesystem; empty for the root filesystem itself. The directory must exist.
    pub target: String,
    /// Options as in fstab(5): flags by name; all other options are data for the filesystem.
    pub options: Vec<String>,
}

/// The mounts that [`mount_all`] made, in order.
#[derive(Debug)]
#[must_use = "the mounts stay"]
pub struct Mounted {
    mounts: Vec<Made>,
}

impl Mounted {
    /// The mount points.
    #[cfg(test)]
    pub fn points(&self) -> Vec<&Path> {
        self.mounts.iter().map(|made| &*made.path).collect()
    }

    /// Takes the mounts away, the last first. A failure does not stop the others; all failures are returned.
    #[must_use = "these are failures"]
    pub fn unmount(self) -> Vec<IoError> {
        // One unmount for each mount: the path may hold an older mount, which stays.
        let undo = |made: &Made| made.unmount().err();
        self.mounts.iter().rev().filter_map(undo).collect()
    }
}

/// Makes `mounts` in order, each on `rootfs` or on a directory inside. After a failure the earlier mounts are taken
/// away again; failures of that are logged, and the first error is returned.
///
/// # Errors
/// The error of mount(2); `InvalidInput` for data longer than the kernel takes; `Unsupported` for the option `loop`,
/// for filesystems that need a helper program, and for `uidmap=` and `gidmap=` where the kernel cannot map ids;
/// `ENOSYS` for a mount with a `target` before Linux 5.6.
pub fn mount_all(mounts: &[Mount], rootfs: &Path) -> Result<Mounted, IoError> {
    // The path must be absolute: an overlay with many layers is mounted from another working directory.
    let rootfs =
        std::fs::canonicalize(rootfs).map_err(failed("find the root filesystem", rootfs))?;
    let mut done = Mounted {
        mounts: Vec::with_capacity(mounts.len()),
    };
    for mount in mounts {
        if let Err(error) = mount::mount_one(mount, &rootfs, &mut done.mounts) {
            for failure in done.unmount() {
                log::warn!(error:% = failure; "mount stays after one that failed");
            }
            return Err(error);
        }
    }
    Ok(done)
}

fn unsupported(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, text)
}

/// For `map_err`: adds the operation and the path to an error.
fn failed(operation: &'static str, path: &Path) -> impl Fn(io::Error) -> IoError + Copy {
    move |source| IoError {
        operation,
        path: path.to_owned(),
        source,
    }
}
