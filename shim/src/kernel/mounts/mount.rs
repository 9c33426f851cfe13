//! Makes one mount, in up to three steps: mount(2) itself, the propagation, and a bind mount's own flags.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::mount::MountFlags;

use super::idmap::{Depth, MappedLayers, MappedMount};
use super::options::{
    Flags, MountOptions, PER_MOUNT, Remount, below_parent, bind_flags, present_flags, shorten,
};
use super::point::MountPoint;
use super::unmount::unmount_once;
use super::{Mount, failed, unsupported};
use crate::error::IoError;

/// Makes one mount. `done` gets its mount point also if a step after mount(2) fails.
pub(super) fn mount_one(
    mount: &Mount,
    rootfs: &Path,
    done: &mut Vec<PathBuf>,
) -> Result<(), IoError> {
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
        point: &point,
        flags: flags.set,
    };
    match (flags.remount, user) {
        (Remount::Yes, Some(_)) => {
            return Err(refuse(unsupported(
                "uidmap= and gidmap= cannot be given to what is mounted already".to_owned(),
            )));
        }
        (Remount::Yes, None) => step.remount(&data)?,
        (Remount::No, None) => step.plain(data, done)?,
        (Remount::No, Some(user)) if mount.kind == "overlay" => {
            step.overlay_with_mapped_ids(&data, rootfs, &user, done)?;
        }
        (Remount::No, Some(user)) => step.with_mapped_ids(&data, &user, done)?,
    }
    set_propagation(&point, &flags)?;
    set_bind_flags(&point, &flags)
}

/// The first step of a mount: mount(2) or its replacement, without propagation and a bind mount's own flags.
struct FirstStep<'a> {
    mount: &'a Mount,
    point: &'a MountPoint,
    flags: MountFlags,
}

impl FirstStep<'_> {
    /// Changes an existing mount.
    fn remount(&self, data: &[String]) -> Result<(), IoError> {
        let path = &self.point.path;
        let data = c_string(data).map_err(failed("mount", path))?;
        rustix::mount::mount_remount(self.point.call_path(), self.flags, data.as_c_str())
            .map_err(|error| failed("remount", path)(error.into()))
    }

    /// Makes a mount of any type without mapped ids.
    fn plain(&self, data: Vec<String>, done: &mut Vec<PathBuf>) -> Result<(), IoError> {
        let path = &self.point.path;
        let refuse = failed("mount", path);
        let (directory, data) = shorten(&self.mount.kind, data);
        let data = c_string(&data).map_err(refuse)?;
        self.mount_from(directory, &data).map_err(refuse)?;
        done.push(path.clone());
        Ok(())
    }

    /// Makes an overlay on clones of its layers with mapped ids.
    fn overlay_with_mapped_ids(
        &self,
        data: &[String],
        rootfs: &Path,
        user: &OwnedFd,
        done: &mut Vec<PathBuf>,
    ) -> Result<(), IoError> {
        let path = &self.point.path;
        let refuse = failed("mount", path);
        let (parent, data) = below_parent(data).ok_or_else(|| {
            refuse(unsupported(
                "uidmap= and gidmap= need layers with a directory in common".to_owned(),
            ))
        })?;
        let data = c_string(&data).map_err(refuse)?;
        let map = failed(
            "map the owners (uidmap=, gidmap=) of the layers in",
            &parent,
        );
        let layers = MappedLayers::mount(&parent, rootfs, user).map_err(map)?;
        let mounted = self.mount_from(Some(layers.directory.clone()), &data);
        if mounted.is_ok() {
            done.push(path.clone());
        }
        let unmounted = layers.unmount().map_err(map);
        mounted.map_err(failed(
            "mount an overlay on layers with mapped owners (Linux 5.19) at",
            path,
        ))?;
        unmounted
    }

    /// Makes a bind mount, or a mount of another filesystem, with mapped ids.
    fn with_mapped_ids(
        &self,
        data: &[String],
        user: &OwnedFd,
        done: &mut Vec<PathBuf>,
    ) -> Result<(), IoError> {
        let path = &self.point.path;
        let refuse = failed("mount", path);
        let map = failed("map the owners (uidmap=, gidmap=) of", path);
        let depth = if self.flags.contains(MountFlags::REC) {
            Depth::All
        } else {
            Depth::One
        };
        let mapped = if self.flags.contains(MountFlags::BIND) {
            MappedMount::clone_of(Path::new(&self.mount.source), depth, user).map_err(map)?
        } else {
            let data = c_string(data).map_err(refuse)?;
            self.mount_from(None, &data).map_err(refuse)?;
            // The kernel maps only a mount that is attached nowhere, so a clone takes the new mount's place.
            let mapped = MappedMount::clone_of(path, depth, user).map_err(map);
            unmount_once(path)?;
            mapped?
        };
        mapped.attach(&self.point.call_path()).map_err(refuse)?;
        done.push(path.clone());
        Ok(())
    }

    /// Calls mount(2), with `directory` as the working directory if there is one.
    fn mount_from(&self, directory: Option<PathBuf>, data: &CStr) -> io::Result<()> {
        let target = self.point.call_path();
        let (source, kind) = (&*self.mount.source, &*self.mount.kind);
        let call = || rustix::mount::mount(source, &target, kind, self.flags, data);
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

/// Second step: the propagation. mount(2) takes the propagation only in a call of its own.
fn set_propagation(point: &MountPoint, flags: &Flags) -> Result<(), IoError> {
    if flags.propagation.is_empty() {
        return Ok(());
    }
    rustix::mount::mount_change(&point.path, flags.propagation)
        .map_err(|error| failed("set the propagation of", &point.path)(error.into()))
}

/// Third step: a bind mount's own flags. mount(2) ignores these flags in the call that makes a bind mount, so they take
/// a remount.
fn set_bind_flags(point: &MountPoint, flags: &Flags) -> Result<(), IoError> {
    let own = flags.set.contains(MountFlags::BIND) && flags.set.intersects(PER_MOUNT);
    if flags.remount == Remount::Yes || !own {
        return Ok(());
    }
    let path = &point.path;
    let present = present_flags(path).map_err(failed("read the flags of", path))?;
    rustix::mount::mount_remount(path, bind_flags(flags, present), c"")
        .map_err(|error| failed("set the flags of the bind mount", path)(error.into()))
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
