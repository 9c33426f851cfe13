//! What the shim keeps in a bundle, the directory that containerd makes for a container.
//!
//! | file | by | for |
//! |---|---|---|
//! | `config.json`, `rootfs/`, `log` | containerd | the spec, the root filesystem, the shim's log FIFO |
//! | `address` | `start` | containerd 1.6 and 1.7, which dial it again after a restart |
//! | `shim.pid` | `start` | `delete`, which ends a shim that no longer answers |
//! | `pause.json` | the server | `delete`: what to take down ([`Record`]) |
//! | `pod/ID` | the server, in the first bundle of a pod | `delete` of a dead shim's pod: the bundles of its containers |
//!
//! The records are what lets `delete` take down a whole pod after its shim was killed, without asking anybody.

use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{IoError, Result};

const RECORD: &str = "pause.json";
const POD: &str = "pod";

/// What has to be taken down for one container.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The OCI runtime that made the container; absent for a sandbox that no runtime knows.
    pub(crate) runc: Option<RuncRecord>,
    /// The cgroup that the shim made for a sandbox: `cgroupsPath` of its spec.
    pub(crate) cgroups_path: Option<String>,
}

/// How to call the OCI runtime.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RuncRecord {
    /// The program.
    pub(crate) binary: PathBuf,
    /// `--root`, with the containerd namespace.
    pub(crate) root: PathBuf,
    /// `--systemd-cgroup`.
    pub(crate) systemd_cgroup: bool,
}

impl Record {
    /// Writes the record into `bundle`.
    ///
    /// # Errors
    /// `Io` when the file cannot be written.
    pub(crate) fn save(&self, bundle: &Path) -> Result<()> {
        let path = bundle.join(RECORD);
        let text = serde_json::to_vec(self).map_err(|e| IoError::at("encode", &path)(e))?;
        Ok(std::fs::write(&path, text).map_err(IoError::at("write", &path))?)
    }

    /// Reads the record of `bundle`; there is none when nothing has been made yet.
    ///
    /// # Errors
    /// `Io` when the file is there and cannot be read.
    pub(crate) fn load(bundle: &Path) -> Result<Option<Self>> {
        let path = bundle.join(RECORD);
        match std::fs::read(&path) {
            Ok(text) => Ok(Some(
                serde_json::from_slice(&text).map_err(|e| IoError::at("decode", &path)(e))?,
            )),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(IoError::at("read", &path)(error).into()),
        }
    }
}

/// Notes in the pod's first bundle that container `id` in `bundle` belongs to the pod.
///
/// # Errors
/// `Io` when the note cannot be written.
pub(crate) fn add_member(first: &Path, id: &str, bundle: &Path) -> Result<()> {
    let pod = first.join(POD);
    std::fs::create_dir_all(&pod).map_err(IoError::at("create", &pod))?;
    let link = pod.join(id);
    match symlink(bundle, &link) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            Err(IoError::at("create", &link)(error).into())
        }
        _ => Ok(()),
    }
}

/// Takes the note of [`add_member`] back.
///
/// # Errors
/// `Io` when the note is there and cannot be removed.
pub(crate) fn remove_member(first: &Path, id: &str) -> Result<()> {
    let link = first.join(POD).join(id);
    match std::fs::remove_file(&link) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(IoError::at("remove", &link)(error).into())
        }
        _ => Ok(()),
    }
}

/// The containers noted in `first`: id and bundle.
///
/// # Errors
/// `Io` when the notes are there and cannot be read.
pub(crate) fn members(first: &Path) -> Result<Vec<(String, PathBuf)>> {
    let pod = first.join(POD);
    let entries = match std::fs::read_dir(&pod) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(IoError::at("list", &pod)(error).into()),
    };
    let mut members = Vec::new();
    for entry in entries {
        let entry = entry.map_err(IoError::at("list", &pod))?;
        let bundle =
            std::fs::read_link(entry.path()).map_err(IoError::at("read", entry.path()))?;
        members.push((entry.file_name().to_string_lossy().into_owned(), bundle));
    }
    Ok(members)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_record_comes_back_as_it_was_written() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Record::load(dir.path()).unwrap(), None);
        let record = Record {
            runc: None,
            cgroups_path: Some("/kubepods/x".into()),
        };
        record.save(dir.path()).unwrap();
        assert_eq!(Record::load(dir.path()).unwrap(), Some(record));
    }

    #[test]
    fn members_come_and_go() {
        let dir = tempfile::tempdir().unwrap();
        assert!(members(dir.path()).unwrap().is_empty());
        add_member(dir.path(), "a", Path::new("/bundles/a")).unwrap();
        add_member(dir.path(), "a", Path::new("/bundles/a")).unwrap();
        assert_eq!(
            members(dir.path()).unwrap(),
            [("a".to_owned(), PathBuf::from("/bundles/a"))]
        );
        remove_member(dir.path(), "a").unwrap();
        remove_member(dir.path(), "a").unwrap();
        assert!(members(dir.path()).unwrap().is_empty());
    }
}
