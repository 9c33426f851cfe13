//! Makes one mount, in up to three steps: mount(2) or its replacement, the propagation, and a bind mount's own flags.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::mount::{MountFlags, MountPropagationFlags};

use super::detached::{Beside, Depth, Detached};
use super::idmap::{mapped_clone, mount_layers};
use super::options::{
    Flags, MountOptions, PER_MOUNT, Remount, below_parent, bind_flags, present_flags, shorten,
};
use super::point::{Made, MountPoint};
use super::unmount::unmount_once;
use super::{Mount, failed, unsupported};
use crate::error::IoError;

/// Makes one mount. `done` gets the mount also if a step after the first fails.
pub(super) fn mount_one(mount: &Mount, rootfs: &Path, done: &mut Vec<Made>) -> Result<(), IoError> {
    let point = MountPoint::find(rootfs, &mount.target)?;
    let refuse = failed("mount", &point.path);
    if mount.kind.starts_with("fuse.") || mount.kind.starts_with("fuse3.") {
        return Err(refuse(unsupported(format!(
            "the filesystem {:?} needs a helper program",
            mount.kind
        ))));
    }
    let MountOptions {
        flags,
        id_maps,
        data,
    } = MountOptions::parse(&mount.options).map_err(refuse)?;
    let user = id_maps.user_namespace().map_err(refuse)?;
    let step = FirstStep {
        mount,
        rootfs,
        path: &point.path,
        flags: flags.set,
        data,
        user,
    };
    let at = if flags.remount == Remount::Yes {
        step.remount(&point)?;
        point.call_path()
    } else {
        let made = step.make(&point)?;
        let at = made.call_path();
        done.push(made);
        at
    };
    set_propagation(&at, &point.path, &flags)?;
    set_bind_flags(&at, &point.path, &flags)
}

/// The first step of a mount: mount(2) or its replacement, without propagation and a bind mount's own flags.
struct FirstStep<'a> {
    mount: &'a Mount,
    rootfs: &'a Path,
    /// The mount point, for errors.
    path: &'a Path,
    flags: MountFlags,
    data: Vec<String>,
    /// The user namespace whose id maps the mount gets.
    user: Option<OwnedFd>,
}

impl FirstStep<'_> {
    /// Changes an existing mount.
    fn remount(&self, point: &MountPoint) -> Result<(), IoError> {
        if self.user.is_some() {
            return Err(failed("mount", self.path)(unsupported(
                "uidmap= and gidmap= cannot be given to what is mounted already".to_owned(),
            )));
        }
        let data = c_string(&self.data).map_err(failed("mount", self.path))?;
        rustix::mount::mount_remount(point.call_path(), self.flags, data.as_c_str())
            .map_err(|error| failed("remount", self.path)(error.into()))
    }

    /// Makes a new mount.
    fn make(&self, point: &MountPoint) -> Result<Made, IoError> {
        let mount = if point.is_inside() {
            let attached = self.detached()?.attach(&point.call_path());
            Some(attached.map_err(failed("mount", self.path))?)
        } else {
            self.mount_at(self.path)?;
            None
        };
        Ok(Made {
            path: self.path.to_owned(),
            mount,
        })
    }

    /// Makes a new mount that is attached nowhere.
    fn detached(&self) -> Result<Detached, IoError> {
        let refuse = failed("mount", self.path);
        if self.flags.contains(MountFlags::BIND) {
            return self.clone_of_source();
        }
        let beside = Beside::make(self.rootfs, "beside").map_err(refuse)?;
        if let Err(error) = self.mount_at(&beside.directory) {
            beside.remove();
            return Err(error);
        }
        let cloned = clone_as_private(&beside.directory);
        beside.unmount().map_err(refuse)?;
        cloned.map_err(refuse)
    }

    /// Makes a new mount at a path that only root can change.
    fn mount_at(&self, target: &Path) -> Result<(), IoError> {
        match &self.user {
            None => self.plain(target),
            Some(user) if self.mount.kind == "overlay" => {
                self.overlay_with_mapped_ids(target, user)
            }
            Some(user) => self.with_mapped_ids(target, user),
        }
    }

    /// Makes a mount of any type without mapped ids.
    fn plain(&self, target: &Path) -> Result<(), IoError> {
        let refuse = failed("mount", self.path);
        let (directory, data) = shorten(&self.mount.kind, self.data.clone());
        let data = c_string(&data).map_err(refuse)?;
        self.mount_from(directory, target, &data).map_err(refuse)
    }

    /// Makes an overlay on clones of its layers with mapped ids.
    fn overlay_with_mapped_ids(&self, target: &Path, user: &OwnedFd) -> Result<(), IoError> {
        let refuse = failed("mount", self.path);
        let (parent, data) = below_parent(&self.data).ok_or_else(|| {
            refuse(unsupported(
                "uidmap= and gidmap= need layers with a directory in common".to_owned(),
            ))
        })?;
        let data = c_string(&data).map_err(refuse)?;
        let map = failed(
            "map the owners (uidmap=, gidmap=) of the layers in",
            &parent,
        );
        let layers = mount_layers(&parent, self.rootfs, user).map_err(map)?;
        let mounted = self.mount_from(Some(layers.directory.clone()), target, &data);
        let unmounted = layers.unmount().map_err(map);
        mounted.map_err(failed(
            "mount an overlay on layers with mapped owners (Linux 5.19) at",
            self.path,
        ))?;
        if unmounted.is_err() {
            unmount_once(target)?;
        }
        unmounted
    }

    /// Makes a bind mount, or a mount of another filesystem, with mapped ids.
    fn with_mapped_ids(&self, target: &Path, user: &OwnedFd) -> Result<(), IoError> {
        let refuse = failed("mount", self.path);
        let mapped = if self.flags.contains(MountFlags::BIND) {
            self.clone_of_source()?
        } else {
            let data = c_string(&self.data).map_err(refuse)?;
            self.mount_from(None, target, &data).map_err(refuse)?;
            // The kernel maps only a mount that is attached nowhere, so a clone takes the new mount's place.
            let map = failed("map the owners (uidmap=, gidmap=) of", self.path);
            let mapped = mapped_clone(target, Depth::One, user).map_err(map);
            unmount_once(target)?;
            mapped?
        };
        mapped.attach(target).map(drop).map_err(refuse)
    }

    /// A clone of a bind mount's source, with mapped ids if there are maps.
    fn clone_of_source(&self) -> Result<Detached, IoError> {
        let source = Path::new(&self.mount.source);
        let depth = if self.flags.contains(MountFlags::REC) {
            Depth::All
        } else {
            Depth::One
        };
        match &self.user {
            None => Detached::clone_of(source, depth).map_err(failed("mount", self.path)),
            Some(user) => mapped_clone(source, depth, user)
                .map_err(failed("map the owners (uidmap=, gidmap=) of", self.path)),
        }
    }

    /// Calls mount(2), with `directory` as the working directory if there is one.
    fn mount_from(&self, directory: Option<PathBuf>, target: &Path, data: &CStr) -> io::Result<()> {
        let (source, kind) = (&*self.mount.source, &*self.mount.kind);
        let call = || rustix::mount::mount(source, target, kind, self.flags, data);
        let Some(directory) = directory else {
            return Ok(call()?);
        };
        // The call runs on a thread of its own, which has a working directory of its own and ends with the call.
        std::thread::scope(|scope| {
            let in_directory = move || {
                pause::own_cwd()?;
                rustix::process::chdir(directory)?;
                Ok(call()?)
            };
            let thread = std::thread::Builder::new()
                .name("mount".to_owned())
                .spawn_scoped(scope, in_directory)?;
            thread
                .join()
                .unwrap_or_else(|_| Err(io::Error::other("the mounting thread panicked")))
        })
    }
}

/// A clone of a mount in the bundle, without the propagation that the mount has from the bundle's filesystem.
fn clone_as_private(path: &Path) -> io::Result<Detached> {
    rustix::mount::mount_change(path, MountPropagationFlags::PRIVATE)?;
    Detached::clone_of(path, Depth::One)
}

/// Second step: the propagation of the mount at `at`. mount(2) takes the propagation only in a call of its own.
fn set_propagation(at: &Path, shown: &Path, flags: &Flags) -> Result<(), IoError> {
    if flags.propagation.is_empty() {
        return Ok(());
    }
    rustix::mount::mount_change(at, flags.propagation)
        .map_err(|error| failed("set the propagation of", shown)(error.into()))
}

/// Third step: a bind mount's own flags. mount(2) ignores these flags in the call that makes a bind mount, so they take
/// a remount.
fn set_bind_flags(at: &Path, shown: &Path, flags: &Flags) -> Result<(), IoError> {
    let own = flags.set.contains(MountFlags::BIND) && flags.set.intersects(PER_MOUNT);
    if flags.remount == Remount::Yes || !own {
        return Ok(());
    }
    let present = present_flags(at).map_err(failed("read the flags of", shown))?;
    rustix::mount::mount_remount(at, bind_flags(flags, present), c"")
        .map_err(|error| failed("set the flags of the bind mount", shown)(error.into()))
}

/// The data for mount(2). Refuses data that the kernel would cut off silently.
fn c_string(data: &[String]) -> io::Result<CString> {
    let data = data.join(",");
    let most = rustix::param::page_size() - 1;
    if data.len() > most {
        let text = format!(
            "the mount options have {} bytes, the kernel takes {most}",
            data.len()
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    Ok(CString::new(data)?)
}
