//! Takes down what is left of a container or a sandbox, in one list of steps.
//!
//! | step | deleted | not made | shim died |
//! |---|---|---|---|
//! | kill the processes in the cgroup | – | of a container | yes |
//! | the OCI runtime's delete | `delete` | `delete --force` | `delete --force` |
//! | unmount | the mount points | the mount points | all below the bundle |
//! | remove the directories that the shim made | yes | yes | – |
//! | remove empty mount points in the root filesystem | – | – | yes |
//! | remove the cgroup | of a sandbox | yes | yes |
//! | remove the records | yes, and mark the bundle as deleted | yes | yes |
//!
//! Each step runs, even if an earlier step has failed; the first failure is returned. The records stay after a failure,
//! so that `delete` finds what is left.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use log::warn;

use super::bundle::{self, Record};
use super::runc::Runc;
use crate::error::{IoError, Result, first_failure};
use crate::kernel::blocking;
use crate::kernel::cgroup::{Cgroup, Driver};
use crate::kernel::mounts;

/// What may be left of a container or a sandbox.
#[derive(Debug, Clone)]
pub struct Remains {
    /// The id.
    pub id: String,
    /// The bundle, and where the cgroup is.
    pub record: Record,
    /// The OCI runtime; none for a sandbox that no runtime knows.
    pub runc: Option<Runc>,
    /// The pod's first bundle, which has a record of each member.
    pub first_bundle: PathBuf,
    /// The mount points of what the shim has mounted.
    pub mount_points: Vec<PathBuf>,
    /// The directories that the shim has made beside the bundle's own.
    pub directories: Vec<PathBuf>,
}

/// The reason for a teardown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Why {
    /// The processes have ended, and containerd deletes the container.
    Deleted,
    /// The container or sandbox could not be made.
    NotMade,
    /// The shim was killed.
    ShimDied,
}

/// Takes down what is left.
///
/// # Errors
/// The first failure.
pub async fn take_down(what: Remains, why: Why) -> Result<()> {
    let (cgroup, found) = match what.cgroup(why) {
        Ok(cgroup) => (cgroup, Ok(())),
        Err(error) => (None, Err(error)),
    };
    let killed = match (why, cgroup.clone()) {
        (Why::Deleted, _) | (_, None) => Ok(()),
        // A sandbox that was not made has ended, and the cgroup may be somebody else's.
        (Why::NotMade, Some(_)) if what.runc.is_none() => Ok(()),
        // Where several containers share a process namespace, runc kills only the init.
        (Why::NotMade | Why::ShimDied, Some(cgroup)) => {
            blocking::run_anyway(move || kill(&cgroup)).await
        }
    };
    let deleted = match (&what.runc, why) {
        (None, _) => Ok(()),
        (Some(runc), Why::Deleted) => runc.delete(what.record.cgroups_path.as_deref()).await,
        (Some(runc), Why::NotMade | Why::ShimDied) => runc.delete_by_force().await,
    };
    blocking::run_anyway(move || {
        let unmounted = what.unmount(why);
        let removed = what.remove_cgroup(why, cgroup);
        first_failure([found, killed, deleted, unmounted, removed])?;
        what.forget(why)
    })
    .await
}

fn kill(cgroup: &Cgroup) -> Result<()> {
    match cgroup.kill_all() {
        Err(error) if error.source.kind() != ErrorKind::NotFound => Err(error.into()),
        Ok(()) | Err(_) => Ok(()),
    }
}

impl Remains {
    /// The same for a later time: containerd removes the bundle after a failed create, and runc's logs go into the pod's
    /// first bundle.
    pub(super) fn without_bundle(mut self) -> Self {
        let runc = self.runc.map(|runc| runc.with_logs_in(&self.first_bundle));
        self.runc = runc;
        self
    }

    /// The cgroup, if this teardown removes one. For a deleted container, `runc delete` removes the cgroup.
    ///
    /// # Errors
    /// `Io` when the kernel does not say where the cgroup is.
    fn cgroup(&self, why: Why) -> Result<Option<Cgroup>> {
        if why == Why::Deleted && self.runc.is_some() {
            return Ok(None);
        }
        let Some(path) = self.record.cgroups_path.as_deref() else {
            return Ok(None);
        };
        match Cgroup::at(path, Driver::of(self.record.systemd_cgroup)) {
            Ok(cgroup) => Ok(Some(cgroup)),
            // No cgroup can have such a path.
            Err(error) if error.source.kind() == ErrorKind::InvalidInput => {
                warn!(container = self.id, error:%; "no cgroup removed");
                Ok(None)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn unmount(&self, why: Why) -> Result<()> {
        if why == Why::ShimDied {
            let failures = mounts::unmount_below(&self.record.bundle);
            let unmounted = first_failure(failures.into_iter().map(Err));
            if unmounted.is_ok() && self.record.mounts_rootfs {
                remove_mount_points(&self.record.bundle.join("rootfs"));
            }
            return unmounted;
        }
        let mount_points = self.mount_points.iter();
        first_failure(mount_points.map(|path| mounts::unmount(path)))?;
        // The `?` above ends this function if a mount stays: the removal below would delete the mount's files.
        first_failure(self.directories.iter().map(|path| remove_directory(path)))
    }

    fn remove_cgroup(&self, why: Why, cgroup: Option<Cgroup>) -> Result<()> {
        let Some(cgroup) = cgroup else {
            return Ok(());
        };
        let removed = first_failure(cgroup.remove().into_iter().map(Err));
        match (removed, why) {
            // No failure: a process of the sandbox may still be dying, and the pod's cgroup goes with the pod in any
            // case.
            (Err(error), Why::Deleted) => {
                warn!(container = self.id, error:%; "cgroup stays");
                Ok(())
            }
            (removed, _) => removed,
        }
    }

    fn forget(&self, why: Why) -> Result<()> {
        let forget = || bundle::forget(&self.first_bundle, &self.id);
        match why {
            Why::Deleted => {
                // No failure: nothing is left, and a full disk is no reason to delete once more.
                if let Err(error) = bundle::set_deleted(&self.record.bundle).and_then(|()| forget())
                {
                    warn!(container = self.id, error:%; "record stays");
                }
                Ok(())
            }
            Why::NotMade | Why::ShimDied => forget(),
        }
    }
}

fn remove_directory(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(IoError::at("remove the pod's files", path)(error).into())
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// Removes the empty files and directories in `directory`, where nothing is mounted any more.
///
/// When a shim dies during a create, containerd unmounts the root filesystem at once. A container's init may live a
/// moment longer, and makes its mount points in the bare directory. containerd can never remove a bundle with such
/// mount points.
fn remove_mount_points(directory: &Path) {
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        let removed = match entry.metadata() {
            Ok(data) if data.is_dir() => {
                remove_mount_points(&path);
                std::fs::remove_dir(&path)
            }
            Ok(data) if data.is_file() && data.len() == 0 => std::fs::remove_file(&path),
            _ => continue,
        };
        if let Err(error) = removed {
            warn!(error:% = IoError::at("remove", &path)(error); "mount point stays");
        }
    }
}
