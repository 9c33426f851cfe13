//! What the shim keeps in a bundle, the directory that containerd makes for a container.
//!
//! | file | by | for |
//! |---|---|---|
//! | `config.json`, `rootfs/`, `log` | containerd | the spec, the root filesystem, the shim's log FIFO |
//! | `address` | `start`; the server, for a container that joins the pod | containerd 1.6 and 1.7, which dial the address again after a restart, also after a downgrade from 2.x |
//! | `shim.pid`, `shim.started` | `start` | `delete`, which ends a shim that no longer answers: pid and start time |
//! | `options.json` | `start`, for the Sandbox API | the server, which has no other source of the operator's settings |
//! | `pause.json` | the server | `delete`: what to take down ([`Record`]) |
//! | `deleted` | the server: `pause.json`, renamed | `delete`, which containerd runs after an ordinary deletion, too: nothing is left to do |
//! | `pod/ID.json` | the server, in a pod's first bundle | `delete` of a pod whose shim died: the others' records |
//!
//! Another release may have written any of these files, an older one or a newer one: an upgrade and a downgrade leave
//! running pods to the shim that started them, and `delete` is the new binary's. So a key that is unknown is ignored, and
//! a key that the first release did not have has a default. `bundle/golden/` has the files of each release.
//!
//! From the records alone, `delete` can take down a whole pod whose shim was killed. A container has two records,
//! because containerd may remove the container's bundle before it calls `delete` for the pod's first bundle.

use std::fs::OpenOptions;
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, chown};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{IoError, Result};

/// The file with the server's pid.
pub const SHIM_PID: &str = "shim.pid";
/// The file with the server's start time, in clock ticks since the node's boot.
pub const SHIM_STARTED: &str = "shim.started";

/// The file with the address of the server's socket.
pub const ADDRESS: &str = "address";
const RECORD: &str = "pause.json";
const POD: &str = "pod";
const NEW: &str = "new";
const DELETED: &str = "deleted";

/// What has to be taken down for one container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The container's bundle, to unmount what is mounted there.
    pub bundle: PathBuf,
    /// Whether the bundle's `rootfs` is only a mount point. Once nothing is mounted there, anything in the directory is
    /// a leftover.
    #[serde(default)]
    pub mounts_rootfs: bool,
    /// The OCI runtime that made the container; absent for a sandbox that no runtime knows.
    pub runc: Option<RuncRecord>,
    /// Whether systemd makes the container's cgroup.
    pub systemd_cgroup: bool,
    /// `cgroupsPath` of the container's spec.
    pub cgroups_path: Option<String>,
}

/// How to call the OCI runtime.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuncRecord {
    /// The program.
    pub binary: PathBuf,
    /// `--root`, with the containerd namespace.
    pub root: PathBuf,
    /// `--systemd-cgroup`.
    pub systemd_cgroup: bool,
}

impl Record {
    /// Writes the record of container `id` into the container's bundle, and into the pod's first bundle `first`, if
    /// that is another bundle.
    ///
    /// # Errors
    /// `Io` when a file cannot be written.
    pub fn save(&self, first: &Path, id: &str) -> Result<()> {
        if first != self.bundle {
            let pod = first.join(POD);
            match std::fs::create_dir(&pod) {
                // The pod's first container has been deleted with its bundle: nobody will look for the record there.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                    return Err(IoError::at("create", &pod)(error).into());
                }
                _ => self.write(&member(first, id))?,
            }
        }
        self.write(&self.bundle.join(RECORD))
    }

    fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_vec(self).map_err(|e| IoError::at("encode", path)(e))?;
        replace_file(path, &text)
    }

    /// Reads the record of `bundle`; none if nothing has been made yet.
    ///
    /// # Errors
    /// `Io` when the file exists and cannot be read.
    pub fn load(bundle: &Path) -> Result<Option<Self>> {
        Self::read(&bundle.join(RECORD))
    }

    fn read(path: &Path) -> Result<Option<Self>> {
        match std::fs::read(path) {
            Ok(text) => Ok(Some(
                serde_json::from_slice(&text).map_err(|e| IoError::at("decode", path)(e))?,
            )),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(IoError::at("read", path)(error).into()),
        }
    }
}

/// Writes the address of the server that listens at `socket` into `bundle`. Returns the address. `delete` and containerd
/// may read the file at any moment, and the first container's bundle has the file of `start`.
///
/// # Errors
/// `Io` when the file cannot be written.
pub fn save_address(bundle: &Path, socket: &Path) -> Result<String> {
    let address = format!("unix://{}", socket.display());
    let file = bundle.join(ADDRESS);
    replace_file(&file, address.as_bytes())?;
    Ok(address)
}

/// Writes a file that only root may read: an environment may hold secrets.
///
/// # Errors
/// `Io` when the file cannot be written.
pub fn write_private(path: &Path, content: &[u8]) -> Result<()> {
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(content));
    Ok(written.map_err(IoError::at("write", path))?)
}

/// Writes a file whole or not at all: the shim may be killed at any moment. Mode and owner of an earlier file stay.
///
/// # Errors
/// `Io` when the file cannot be written.
pub fn replace_file(path: &Path, content: &[u8]) -> Result<()> {
    let new = path.with_extension(NEW);
    let replaced = write_private(&new, content).and_then(|()| {
        if let Ok(earlier) = std::fs::metadata(path) {
            std::fs::set_permissions(&new, earlier.permissions())
                .and_then(|()| chown(&new, Some(earlier.uid()), Some(earlier.gid())))
                .map_err(IoError::at("set mode and owner of", &new))?;
        }
        Ok(std::fs::rename(&new, path).map_err(IoError::at("write", path))?)
    });
    replaced.inspect_err(|_| {
        // The error says more than a failure to remove the half that was written.
        let _ = std::fs::remove_file(&new);
    })
}

fn member(first: &Path, id: &str) -> PathBuf {
    first.join(POD).join(format!("{id}.json"))
}

/// Removes the record of container `id` from the pod's first bundle, once nothing is left of the container.
///
/// # Errors
/// `Io` when the record exists and cannot be removed.
pub fn forget(first: &Path, id: &str) -> Result<()> {
    let path = member(first, id);
    match std::fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(IoError::at("remove", &path)(error).into())
        }
        _ => Ok(()),
    }
}

/// Marks the container of `bundle` as properly deleted: the record becomes the mark, which needs no room. Without the
/// mark, a `delete` would end a shim that still has containers.
///
/// # Errors
/// `Io` when the record cannot be renamed.
pub fn set_deleted(bundle: &Path) -> Result<()> {
    let record = bundle.join(RECORD);
    match std::fs::rename(&record, bundle.join(DELETED)) {
        // Somebody has removed the bundle: nobody will look for the mark there.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        renamed => Ok(renamed.map_err(IoError::at("mark as deleted", &record))?),
    }
}

/// Whether [`set_deleted`] has been called.
pub fn is_deleted(bundle: &Path) -> bool {
    bundle.join(DELETED).exists()
}

/// Lists the records in `first`, the first bundle of a pod: one for each container of the pod except the first. An
/// entry has the container's id, and the record or the error of reading the record.
///
/// # Errors
/// `Io` when the records cannot be listed.
pub fn members(first: &Path) -> Result<Vec<(String, Result<Record>)>> {
    let pod = first.join(POD);
    let entries = match std::fs::read_dir(&pod) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(IoError::at("list", &pod)(error).into()),
    };
    let mut members = Vec::new();
    for entry in entries {
        let path = entry.map_err(IoError::at("list", &pod))?.path();
        if path.extension().is_some_and(|extension| extension == NEW) {
            continue;
        }
        let id = path.file_stem().unwrap_or_default().to_string_lossy();
        if let Some(record) = Record::read(&path).transpose() {
            members.push((id.into_owned(), record));
        }
    }
    Ok(members)
}

/// The start time of the server that `start` made in `bundle`; none when it was not noted.
pub fn shim_started(bundle: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(bundle.join(SHIM_STARTED)).ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests;
