//! Mounts: a container's root filesystem as containerd's snapshotter describes it, and taking mounts away again.
//!
//! ```text
//!   Mount { kind, source, options }      option ──► flag        MS_RDONLY, MS_BIND, …       1st mount(2)
//!                                               ──► propagation MS_PRIVATE, MS_SLAVE, …     a mount(2) of its own
//!                                               ──► data        lowerdir=…, size=…          1st mount(2)
//!                                               ──► owners      uidmap=…, gidmap=…          see owners.rs
//!   a bind mount's flags                                                                    a remount
//! ```
//!
//! The kernel's side: mount(2), mount_namespaces(7), Documentation/filesystems/overlayfs.rst, proc_pid_mountinfo(5).
//! Everything here blocks; call it where blocking is allowed.

mod options;
mod owners;
mod table;

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use self::options::{
    Options, PER_MOUNT, Remount, below_parent, bind_flags, present_flags, shorten,
};
use self::owners::{Depth, Layers, Mapped};
pub use self::table::{MountedAt, mounts_that};
use crate::error::IoError;

/// More mounts than anybody stacks on one path; a loop that needs more is not getting anywhere.
const MOST_STACKED: usize = 128;

/// How often the mount table is read again while something at or below a directory is still mounted.
const MOST_PASSES: usize = 4;

/// One mount, as `containerd.types.Mount` has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Mount {
    /// The filesystem's type; the kernel ignores it for a bind mount.
    pub kind: String,
    /// What to mount: a path, a device, or a name without meaning.
    pub source: String,
    /// Where, inside the root filesystem; empty for the root filesystem itself. The directory must exist.
    pub target: String,
    /// Options as in fstab(5): flags by name, everything else is data for the filesystem.
    pub options: Vec<String>,
}

/// Mounts that [`mount_all`] made, in that order.
#[derive(Debug)]
#[must_use = "the mounts stay"]
pub struct Mounted {
    targets: Vec<PathBuf>,
}

impl Mounted {
    /// Where each of them is mounted.
    #[cfg(test)]
    pub fn targets(&self) -> &[PathBuf] {
        &self.targets
    }

    /// Takes them away again, the last first. Goes on after a failure; what failed is returned.
    #[must_use = "these are failures"]
    pub fn unmount(self) -> Vec<IoError> {
        // One at a time, not all that is stacked there: what was mounted at that path before is not ours.
        let undo = |target: &PathBuf| unmount_once(target).err();
        self.targets.iter().rev().filter_map(undo).collect()
    }
}

/// Mounts `mounts` in their order onto `rootfs` (or a directory in it). If one fails, those before it are taken away
/// again; a failure of that is logged, and the first error is returned.
///
/// # Errors
/// What mount(2) says; `InvalidInput` for data longer than the kernel takes; `Unsupported` for the option `loop`, for
/// filesystems that need a helper program, and where the kernel cannot map owners (`uidmap=`, `gidmap=`); `ENOSYS` for a
/// mount with a `target` on Linux before 5.6.
pub fn mount_all(mounts: &[Mount], rootfs: &Path) -> Result<Mounted, IoError> {
    // Absolute, because an overlay with many layers is mounted from another working directory.
    let rootfs =
        std::fs::canonicalize(rootfs).map_err(failed("find the root filesystem", rootfs))?;
    let mut done = Mounted {
        targets: Vec::with_capacity(mounts.len()),
    };
    for mount in mounts {
        if let Err(error) = mount_one(mount, &rootfs, &mut done.targets) {
            for failure in done.unmount() {
                log::warn!("undo after a mount that failed: {failure}");
            }
            return Err(error);
        }
    }
    Ok(done)
}

/// Takes away everything that is mounted at `path`, the topmost first. A path that is no mount point, or does not
/// exist, is no error. A busy mount is detached and goes when its last user goes.
///
/// # Errors
/// What umount(2) says.
pub fn unmount(path: &Path) -> Result<(), IoError> {
    for _ in 0..MOST_STACKED {
        match detach(path) {
            Ok(()) => {}
            // EINVAL: it is not a mount point (any more).
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(error) => return Err(failed("unmount", path)(error.into())),
        }
    }
    Err(failed("unmount", path)(io::Error::other(
        "there are always more mounts at this path",
    )))
}

/// Takes away everything that is mounted at or below `directory`, the deepest first. Goes on after a failure; what
/// failed is returned. A directory that does not exist is no failure.
#[must_use = "these are failures"]
pub fn unmount_below(directory: &Path) -> Vec<IoError> {
    // The mount table has paths without symbolic links.
    let directory = match std::fs::canonicalize(directory) {
        Ok(directory) => directory,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Vec::new(),
        Err(error) => return vec![failed("find the mounts below", directory)(error)],
    };
    let mut failures = Vec::new();
    // A mount may have been hidden below another one, and shows only when that is gone: hence more than one pass.
    for _ in 0..MOST_PASSES {
        let mut targets = match targets_below(&directory) {
            Ok(targets) if targets.is_empty() => return Vec::new(),
            Ok(targets) => targets,
            Err(error) => {
                failures.push(error);
                return failures;
            }
        };
        targets.sort_by_key(|target| std::cmp::Reverse(target.components().count()));
        targets.dedup();
        failures = targets
            .iter()
            .filter_map(|target| unmount(target).err())
            .collect();
    }
    if failures.is_empty() {
        // The last pass may just have done it.
        match targets_below(&directory) {
            Ok(targets) => {
                let still = || io::Error::other("it is still mounted");
                let left = targets
                    .iter()
                    .map(|target| failed("unmount", target)(still()));
                failures.extend(left);
            }
            Err(error) => failures.push(error),
        }
    }
    failures
}

fn targets_below(directory: &Path) -> Result<Vec<PathBuf>, IoError> {
    let below = mounts_that(|mount| mount.target.starts_with(directory))?;
    Ok(below.into_iter().map(|mount| mount.target).collect())
}

/// Mounts one; what it mounted is in `done` even if a later step of it failed.
fn mount_one(mount: &Mount, rootfs: &Path, done: &mut Vec<PathBuf>) -> Result<(), IoError> {
    let target = Target::find(rootfs, &mount.target)?;
    let call_path = target.call_path();
    let refuse = failed("mount", &target.path);
    if mount.kind.starts_with("fuse.") || mount.kind.starts_with("fuse3.") {
        return Err(refuse(unsupported(format!(
            "the filesystem {:?} needs a helper program",
            mount.kind
        ))));
    }
    let Options {
        flags,
        owners,
        data,
    } = Options::parse(&mount.options).map_err(refuse)?;
    let user = owners.user_namespace().map_err(refuse)?;

    match (flags.remount, user) {
        (Remount::Yes, Some(_)) => {
            return Err(refuse(unsupported(
                "uidmap= and gidmap= cannot be given to what is mounted already".to_owned(),
            )));
        }
        (Remount::Yes, None) => {
            rustix::mount::mount_remount(
                &call_path,
                flags.set,
                c_string(&data.join(",")).map_err(refuse)?.as_c_str(),
            )
            .map_err(|error| failed("remount", &target.path)(error.into()))?;
        }
        (Remount::No, None) => {
            let (directory, data) = shorten(&mount.kind, data);
            let data = c_string(&data.join(",")).map_err(refuse)?;
            mount_from(directory, mount, &call_path, flags.set, data).map_err(refuse)?;
            done.push(target.path.clone());
        }
        (Remount::No, Some(user)) if mount.kind == "overlay" => {
            let (parent, data) = below_parent(&data).ok_or_else(|| {
                refuse(unsupported(
                    "uidmap= and gidmap= need layers with a directory in common".to_owned(),
                ))
            })?;
            let data = c_string(&data.join(",")).map_err(refuse)?;
            let map = failed(
                "map the owners (uidmap=, gidmap=) of the layers in",
                &parent,
            );
            let layers = Layers::mount(&parent, rootfs, &user).map_err(map)?;
            let directory = Some(layers.directory.clone());
            let mounted = mount_from(directory, mount, &call_path, flags.set, data);
            if mounted.is_ok() {
                done.push(target.path.clone());
            }
            let unmounted = layers.unmount().map_err(map);
            mounted.map_err(failed(
                "mount an overlay on layers with mapped owners (Linux 5.19) at",
                &target.path,
            ))?;
            unmounted?;
        }
        (Remount::No, Some(user)) => {
            let map = failed("map the owners (uidmap=, gidmap=) of", &target.path);
            let depth = if flags.set.contains(MountFlags::REC) {
                Depth::All
            } else {
                Depth::One
            };
            let mapped = if flags.set.contains(MountFlags::BIND) {
                Mapped::clone_of(Path::new(&mount.source), depth, &user).map_err(map)?
            } else {
                let data = c_string(&data.join(",")).map_err(refuse)?;
                mount_from(None, mount, &call_path, flags.set, data).map_err(refuse)?;
                // Only what is attached nowhere can be mapped.
                let mapped = Mapped::clone_of(&target.path, depth, &user).map_err(map);
                unmount_once(&target.path)?;
                mapped?
            };
            mapped.attach(&call_path).map_err(refuse)?;
            done.push(target.path.clone());
        }
    }
    // Not `call_path` from here on where it goes through a descriptor: that one leads below the new mount.
    if !flags.propagation.is_empty() {
        rustix::mount::mount_change(&target.path, flags.propagation)
            .map_err(|error| failed("set the propagation of", &target.path)(error.into()))?;
    }
    // mount(2) takes no other flag when it makes a bind mount, so these need a second call.
    if flags.remount == Remount::No
        && flags.set.contains(MountFlags::BIND)
        && flags.set.intersects(PER_MOUNT)
    {
        let present =
            present_flags(&target.path).map_err(failed("read the flags of", &target.path))?;
        rustix::mount::mount_remount(&target.path, bind_flags(&flags, present), c"").map_err(
            |error| failed("set the flags of the bind mount", &target.path)(error.into()),
        )?;
    }
    Ok(())
}

/// Where a mount goes.
struct Target {
    path: PathBuf,
    /// Keeps the place that was found, if it had to be looked for inside the root filesystem.
    place: Option<OwnedFd>,
}

impl Target {
    /// `inside` within `rootfs`. What is mounted there already comes from an image: its symbolic links must not lead
    /// out, so the kernel resolves them as if `rootfs` were the root (openat2(2), Linux 5.6).
    fn find(rootfs: &Path, inside: &str) -> Result<Self, IoError> {
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

    /// The path to give to mount(2).
    fn call_path(&self) -> PathBuf {
        self.place
            .as_ref()
            .map_or_else(|| self.path.clone(), descriptor_path)
    }
}

/// A path that leads to what a descriptor has open.
fn descriptor_path(descriptor: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", descriptor.as_raw_fd()))
}

/// Calls mount(2), with `directory` as working directory if there is one.
fn mount_from(
    directory: Option<PathBuf>,
    mount: &Mount,
    target: &Path,
    flags: MountFlags,
    data: CString,
) -> io::Result<()> {
    let Some(directory) = directory else {
        return Ok(rustix::mount::mount(
            &*mount.source,
            target,
            &*mount.kind,
            flags,
            data.as_c_str(),
        )?);
    };
    // A thread of its own: it can have a working directory of its own, and takes it along when it ends.
    std::thread::scope(|scope| {
        let in_directory = move || {
            pause::own_cwd()?;
            rustix::process::chdir(directory)?;
            Ok(rustix::mount::mount(
                &*mount.source,
                target,
                &*mount.kind,
                flags,
                data.as_c_str(),
            )?)
        };
        let thread = std::thread::Builder::new()
            .name("mount".to_owned())
            .spawn_scoped(scope, in_directory)?;
        thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the mounting thread panicked")))
    })
}

/// Data for mount(2), checked for what the kernel would silently cut off.
fn c_string(data: &str) -> io::Result<CString> {
    let most = page_size() - 1;
    if data.len() > most {
        let text = format!(
            "the mount options have {} bytes, the kernel takes {most}",
            data.len()
        );
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    Ok(CString::new(data)?)
}

fn page_size() -> usize {
    rustix::param::page_size()
}

/// Takes away the topmost mount at `path`. None there is no error.
fn unmount_once(path: &Path) -> Result<(), IoError> {
    match detach(path) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(error) => Err(failed("unmount", path)(error.into())),
    }
}

/// One umount(2). Detached, since a process that left a file open must not keep the mount; never through a symbolic
/// link, which could lead to a mount that is not ours.
fn detach(path: &Path) -> rustix::io::Result<()> {
    rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
}

fn unsupported(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, text)
}

/// For `map_err`: what was tried, and on what.
fn failed(operation: &'static str, path: &Path) -> impl Fn(io::Error) -> IoError + Copy {
    move |source| IoError {
        operation,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests;
