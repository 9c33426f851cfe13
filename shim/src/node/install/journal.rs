//! Changes of files that are made whole or not at all.
//!
//! ```text
//!  begin ── copies what is there, and writes the journal ──▶ apply, apply, … ──▶ close   the journal goes
//!                                                               └── undo ──▶ close   every file is as before
//! ```
//! A journal that is found later is that of a program that was killed: its changes are undone first. So the journal is on
//! disk before the first change, and each file of the node is replaced by a rename.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::host::Start;
use super::plan::Change;
use crate::error::{Error, IoError, Result, first_failure};

const FILE: &str = "journal.json";
/// What a killed program may leave beside a file. The next one writes over it.
const TEMPORARY: &str = ".containerd-shim-pause-v2.new";

/// Changes under way.
#[derive(Debug)]
pub(super) struct Journal {
    folder: PathBuf,
    record: Record,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    /// In the order of the changes.
    files: Vec<Kept>,
    /// Folders that were made for the files, the outer ones first.
    folders: Vec<PathBuf>,
    /// The containerd that has read the files as they were, and not since; none when nobody knows of one.
    before: Option<Start>,
}

/// A file as it was.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    path: PathBuf,
    /// The copy in the journal's folder; none for a file that was not there.
    copy: Option<Saved>,
    /// The digest of what the change writes; none when the change removes the file.
    change: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    name: String,
    modified: SystemTime,
    attributes: Attributes,
}

/// Mode and owner.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) struct Attributes {
    mode: u32,
    uid: u32,
    gid: u32,
}

impl Attributes {
    fn of(metadata: &Metadata) -> Self {
        Self {
            mode: metadata.mode(),
            uid: metadata.uid(),
            gid: metadata.gid(),
        }
    }
}

impl Journal {
    /// Keeps what these changes will change. The folder is the journal's alone. `now` is the containerd that runs.
    ///
    /// # Errors
    /// `Io` when a copy or the journal cannot be written. Then nothing is changed.
    pub(super) fn begin(folder: &Path, changes: &[Change], now: Option<Start>) -> Result<Self> {
        remove_folder(folder)?;
        make_private(folder)?;
        let mut record = Record {
            before: now,
            ..Record::default()
        };
        for (number, change) in changes.iter().enumerate() {
            let path = real(&change.path)?;
            record
                .folders
                .extend(missing_folders(&path, &record.folders));
            let copy = match metadata(&path)? {
                None => None,
                Some(metadata) => {
                    let name = format!("before-{number}");
                    let content = fs::read(&path).map_err(IoError::at("read", &path))?;
                    write_synced(&folder.join(&name), &content)?;
                    let modified = metadata.modified();
                    let modified = modified.map_err(IoError::at("look at", &path))?;
                    Some(Saved {
                        name,
                        modified,
                        attributes: Attributes::of(&metadata),
                    })
                }
            };
            let change = change.content.as_deref().map(digest);
            record.files.push(Kept { path, copy, change });
        }
        let journal = Self {
            folder: folder.to_owned(),
            record,
        };
        journal.write()?;
        Ok(journal)
    }

    /// The journal of a program that was killed. What is in the folder without a journal means nothing, and goes.
    ///
    /// # Errors
    /// `Io` or `FailedPrecondition` for a journal that cannot be read: then nobody knows what was changed.
    pub(super) fn left(folder: &Path) -> Result<Option<Self>> {
        let path = folder.join(FILE);
        let content = match fs::read(&path) {
            Ok(content) => content,
            Err(error) if error.kind() == ErrorKind::NotFound => {
                remove_folder(folder)?;
                return Ok(None);
            }
            Err(error) => return Err(IoError::at("read", &path)(error).into()),
        };
        let record = serde_json::from_slice(&content)
            .map_err(|error| Error::FailedPrecondition(format!("{}: {error}", path.display())))?;
        Ok(Some(Self {
            folder: folder.to_owned(),
            record,
        }))
    }

    /// The file that tells of changes under way.
    pub(super) fn file(folder: &Path) -> PathBuf {
        folder.join(FILE)
    }

    /// Whether there is a journal, and so something to repair.
    pub(super) fn is_left(folder: &Path) -> bool {
        Self::file(folder).exists()
    }

    /// Whether a containerd may have read the changed files: this program has started one, or another runs than before.
    pub(super) fn may_have_been_read(&self, now: Option<Start>) -> bool {
        self.record.before.is_none() || self.record.before != now
    }

    /// Writes down that containerd reads the changed files from now on.
    ///
    /// # Errors
    /// `Io` when the journal cannot be written.
    pub(super) fn before_restart(&mut self) -> Result<()> {
        self.record.before = None;
        self.write()
    }

    /// Writes down that `now` has read the files as they are: after [`Self::undo`], the earlier ones.
    ///
    /// # Errors
    /// `Io` when the journal cannot be written.
    pub(super) fn after_restart(&mut self, now: Option<Start>) -> Result<()> {
        self.record.before = now;
        self.write()
    }

    fn write(&self) -> Result<()> {
        let path = self.folder.join(FILE);
        let content = serde_json::to_vec(&self.record).unwrap_or_default();
        replace(&path, &content, 0o600, None)
    }

    /// Makes one of the changes.
    ///
    /// # Errors
    /// `Io` when the file cannot be written or removed.
    pub(super) fn apply(&self, change: &Change) -> Result<()> {
        let path = real(&change.path)?;
        match &change.content {
            Some(content) => {
                make_parent(&path)?;
                let earlier = metadata(&path)?;
                replace(
                    &path,
                    content,
                    change.mode,
                    earlier.as_ref().map(Attributes::of),
                )
            }
            None => remove_file(&path),
        }
    }

    /// Puts every file back, the last change first, with its time. Goes on after a failure. The journal stays until
    /// [`Self::close`].
    ///
    /// # Errors
    /// The first failure, and `FailedPrecondition` for a file that somebody else has changed since.
    pub(super) fn undo(&self) -> Result<()> {
        first_failure(
            self.record
                .files
                .iter()
                .rev()
                .map(|kept| self.put_back(kept)),
        )?;
        for folder in self.record.folders.iter().rev() {
            // Somebody else may have put a file there.
            let _ = fs::remove_dir(folder);
        }
        Ok(())
    }

    fn put_back(&self, kept: &Kept) -> Result<()> {
        let path = &kept.path;
        let _ = fs::remove_file(path.with_file_name(TEMPORARY));
        let before = match &kept.copy {
            None => None,
            Some(saved) => {
                let copy = self.folder.join(&saved.name);
                Some(fs::read(&copy).map_err(IoError::at("read", &copy))?)
            }
        };
        let now = match fs::read(path) {
            Ok(now) => Some(now),
            Err(error) if error.kind() == ErrorKind::NotFound => None,
            Err(error) => return Err(IoError::at("read", path)(error).into()),
        };
        if now == before {
            return Ok(());
        }
        if now.as_deref().map(digest) != kept.change {
            return Err(Error::FailedPrecondition(format!(
                "{} was changed by somebody else while `containerd-shim-pause-v2` was at work: the files as they were \
                 are in {}; put right what is wrong, remove that folder, and try again",
                path.display(),
                self.folder.display()
            )));
        }
        let (Some(before), Some(saved)) = (before, &kept.copy) else {
            return remove_file(path);
        };
        make_parent(path)?;
        replace(path, &before, saved.attributes.mode, Some(saved.attributes))?;
        let file = File::open(path).map_err(IoError::at("open", path))?;
        Ok(file
            .set_modified(saved.modified)
            .map_err(IoError::at("set the time of", path))?)
    }

    /// Ends the changes: they stay as they are.
    ///
    /// # Errors
    /// `Io` when the journal cannot be removed: the next program would undo the changes.
    pub(super) fn close(self) -> Result<()> {
        remove_file(&self.folder.join(FILE))?;
        remove_folder(&self.folder)
    }
}

/// The file behind symbolic links, which stay.
fn real(path: &Path) -> Result<PathBuf> {
    match fs::canonicalize(path) {
        Ok(real) => Ok(real),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(path.to_owned()),
        Err(error) => Err(IoError::at("look for", path)(error).into()),
    }
}

fn metadata(path: &Path) -> Result<Option<Metadata>> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(IoError::at("look at", path)(error).into()),
    }
}

/// The folders that a file needs and that are not there, the outer ones first.
fn missing_folders(path: &Path, known: &[PathBuf]) -> Vec<PathBuf> {
    let missing = path
        .ancestors()
        .skip(1)
        .take_while(|folder| !folder.exists() && !known.iter().any(|known| known == folder));
    let mut missing: Vec<_> = missing.map(Path::to_owned).collect();
    missing.reverse();
    missing
}

fn make_parent(path: &Path) -> Result<()> {
    let parent = path.parent().unwrap_or(Path::new("/"));
    Ok(fs::create_dir_all(parent).map_err(IoError::at("make", parent))?)
}

fn make_private(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(IoError::at("make", folder))?;
    let private = Permissions::from_mode(0o700);
    Ok(fs::set_permissions(folder, private).map_err(IoError::at("set the mode of", folder))?)
}

/// Replaces a file, whole or not at all, with these attributes; a file that is new is this program's, with this mode.
///
/// # Errors
/// `Io`.
pub(super) fn replace(
    path: &Path,
    content: &[u8],
    mode: u32,
    attributes: Option<Attributes>,
) -> Result<()> {
    let new = path.with_file_name(TEMPORARY);
    remove_file(&new)?;
    let replaced = write_synced(&new, content).and_then(|()| {
        let mode = attributes.map_or(mode, |attributes| attributes.mode);
        fs::set_permissions(&new, Permissions::from_mode(mode & 0o7777))
            .and_then(|()| match attributes {
                Some(Attributes { uid, gid, .. }) => chown(&new, Some(uid), Some(gid)),
                None => Ok(()),
            })
            .map_err(IoError::at("set mode and owner of", &new))?;
        fs::rename(&new, path).map_err(IoError::at("write", path))?;
        sync_folder_of(path)
    });
    replaced.inspect_err(|_| {
        let _ = fs::remove_file(&new);
    })
}

fn write_synced(path: &Path, content: &[u8]) -> Result<()> {
    let written = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| file.write_all(content).and_then(|()| file.sync_all()));
    Ok(written.map_err(IoError::at("write", path))?)
}

fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => sync_folder_of(path),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(IoError::at("remove", path)(error).into()),
    }
}

fn remove_folder(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(IoError::at("remove", folder)(error).into())
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

fn digest(content: &[u8]) -> String {
    let digest = Sha256::digest(content);
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Makes sure that a name in a folder outlives a crash.
///
/// # Errors
/// `Io`.
pub(super) fn sync_folder_of(path: &Path) -> Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    Ok(synced.map_err(IoError::at("sync", folder))?)
}

#[cfg(test)]
mod tests;
