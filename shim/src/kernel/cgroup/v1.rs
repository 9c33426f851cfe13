//! cgroup v1: hierarchies, cpusets and the freezer. Documentation/admin-guide/cgroup-v1/.

use std::fs;
use std::io;
use std::path::Path;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use super::{Backoff, Directory, before, below, failed, write};
use crate::error::IoError;
use crate::kernel::mounts::{MountedAt, mounts_that};

const STATE: &str = "freezer.state";

/// The mounts of the hierarchies, read once: these mounts do not change while a node runs.
///
/// # Errors
/// The error of reading the mount table.
pub(super) fn mounts() -> Result<&'static [MountedAt], IoError> {
    static MOUNTS: OnceLock<Vec<MountedAt>> = OnceLock::new();
    if let Some(mounts) = MOUNTS.get() {
        return Ok(mounts);
    }
    let mounts = mounts_that(|mount| matches!(&*mount.kind, "cgroup" | "cgroup2"))?;
    Ok(MOUNTS.get_or_init(|| mounts))
}

/// The directory of a line of `/proc/<pid>/cgroup`, in the hierarchy with the line's controllers; `None` if that
/// hierarchy is not mounted, or is v2.
pub(super) fn directory(
    mounts: &[MountedAt],
    controllers: &[String],
    path: &Path,
) -> Option<Directory> {
    if controllers.is_empty() {
        return None;
    }
    let mount = mount_with(mounts, controllers)?;
    // A container without a cgroup namespace has only a part of the hierarchy mounted.
    let mounted_part = mount.root.strip_prefix("/").unwrap_or(&mount.root);
    let path = path.strip_prefix(mounted_part).unwrap_or(path);
    Some(Directory {
        controllers: controllers.to_vec(),
        root: mount.target.clone(),
        path: below(&mount.target, path),
    })
}

/// The directories of a cgroup that has the same path in every mounted hierarchy.
pub(super) fn directories_at(
    mounts: &[MountedAt],
    hierarchies: impl Iterator<Item = Vec<String>>,
    path: &Path,
) -> Vec<Directory> {
    let at = |controllers: Vec<String>| {
        let root = mount_with(mounts, &controllers)
            .filter(|_| !controllers.is_empty())?
            .target
            .clone();
        Some(Directory {
            controllers,
            path: below(&root, path),
            root,
        })
    };
    hierarchies.filter_map(at).collect()
}

/// The mount of the v1 hierarchy with these controllers.
fn mount_with<'a>(mounts: &'a [MountedAt], controllers: &[String]) -> Option<&'a MountedAt> {
    let has = |mount: &MountedAt, name: &String| {
        mount.super_options.split(',').any(|option| option == name)
    };
    mounts
        .iter()
        .find(|mount| mount.kind == "cgroup" && controllers.iter().all(|name| has(mount, name)))
}

/// Gives a new cpuset the cpus and memory nodes of its parent. A new cpuset has none, and no process can join a cpuset
/// without them.
pub(super) fn inherit_cpuset(path: &Path) -> Result<(), IoError> {
    let Some(parent) = path.parent() else {
        return Ok(());
    };
    for file in ["cpuset.cpus", "cpuset.mems"] {
        let read = |directory: &Path| {
            let path = directory.join(file);
            fs::read_to_string(&path)
                .map_err(failed("read", &path))
                .map(|text| text.trim().to_owned())
        };
        if read(path)?.is_empty() {
            write(path, file, &read(parent)?)?;
        }
    }
    Ok(())
}

/// Writes FROZEN until the state is FROZEN.
pub(super) fn freeze(path: &Path, patience: Duration) -> Result<(), IoError> {
    let deadline = Instant::now() + patience;
    let mut backoff = Backoff::default();
    loop {
        write(path, STATE, "FROZEN")?;
        if state(path)? == "FROZEN" {
            return Ok(());
        }
        if !before(deadline) {
            return Err(failed("freeze the cgroup", path)(
                io::ErrorKind::TimedOut.into(),
            ));
        }
        backoff.sleep();
        // A process frozen in the middle of a fork can keep the others from freezing; one thaw lets the fork finish.
        if backoff.taken.is_multiple_of(10) {
            write(path, STATE, "THAWED")?;
        }
    }
}

/// Writes THAWED until the state is THAWED.
pub(super) fn thaw(path: &Path, patience: Duration) -> Result<(), IoError> {
    let deadline = Instant::now() + patience;
    let mut backoff = Backoff::default();
    loop {
        write(path, STATE, "THAWED")?;
        if state(path)? == "THAWED" {
            return Ok(());
        }
        if !before(deadline) {
            return Err(failed("thaw the cgroup", path)(
                io::ErrorKind::TimedOut.into(),
            ));
        }
        backoff.sleep();
    }
}

/// Whether the cgroup, or a parent, is frozen or is being frozen.
pub(super) fn is_frozen(path: &Path) -> Result<bool, IoError> {
    Ok(state(path)? != "THAWED")
}

fn state(path: &Path) -> Result<String, IoError> {
    let file = path.join(STATE);
    fs::read_to_string(&file)
        .map_err(failed("read", &file))
        .map(|text| text.trim().to_owned())
}
