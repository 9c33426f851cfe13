//! Mounts with mapped ids: files have other owners in the mount than on disk. The options are `uidmap=` and `gidmap=`.
//!
//! containerd 2.x sets these options for a pod with a user namespace. In an image's layers root is 0; in the pod root
//! is, for example, user 100000 of the node. The kernel translates owners at the mount (mount_setattr(2), Linux 5.12;
//! as layers of an overlay, 5.19), so no layer needs a copy with other owners.
//!
//! ```text
//!   overlay    the directory that all lower layers are in ──clone, map──▶ BUNDLE/layers ──▶ lowerdir=…, unmounted again
//!   bind       the source                                 ──clone, map──▶ the target
//!   others     mounted at the target, taken away          ──clone, map──▶ the target
//! ```
//! Writes go to the overlay's upper layer, which belongs to the pod's root already: containerd sees to that. The kernel
//! keeps clones of the layers, so only the overlay stays mounted.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use pause::IdMap;

use super::detached::{Beside, Depth, Detached};
use super::unsupported;

/// The id maps of a mount: the options `uidmap=` and `gidmap=`, each a list of `inside:outside:count`.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct IdMaps {
    pub(super) uid_map: Vec<IdMap>,
    pub(super) gid_map: Vec<IdMap>,
}

impl IdMaps {
    /// Reads an option; `false` if the option is no id map.
    ///
    /// # Errors
    /// `InvalidInput` for a malformed list.
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

    /// Makes a user namespace with these maps; `None` without maps.
    ///
    /// # Errors
    /// `InvalidInput` if only one of the two maps is there; the errors of [`pause::user_namespace`].
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

/// Clones the mount at `path`, with mapped ids.
///
/// # Errors
/// The error of open_tree(2); `Unsupported` for an old kernel, or a filesystem whose ids the kernel cannot map.
pub(super) fn mapped_clone(path: &Path, depth: Depth, user: &OwnedFd) -> io::Result<Detached> {
    let clone = Detached::clone_of(path, depth).map_err(too_old)?;
    pause::map_owners(clone.as_fd(), user.as_fd()).map_err(|error| {
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
    Ok(clone)
}

fn too_old(error: io::Error) -> io::Error {
    if error.raw_os_error() == Some(rustix::io::Errno::NOSYS.raw_os_error()) {
        unsupported("mounts with mapped owners (uidmap=, gidmap=) need Linux 5.12".to_owned())
    } else {
        error
    }
}

/// Mounts the layers of an overlay, with mapped ids, beside `rootfs` until the overlay is made: a clone of `parent`, the
/// directory that all layers are in.
pub(super) fn mount_layers(parent: &Path, rootfs: &Path, user: &OwnedFd) -> io::Result<Beside> {
    let mapped = mapped_clone(parent, Depth::All, user)?;
    let layers = Beside::make(rootfs, "layers")?;
    match mapped.attach(&layers.directory) {
        Ok(_) => Ok(layers),
        Err(error) => {
            layers.remove();
            Err(error)
        }
    }
}
