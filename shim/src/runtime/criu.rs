//! criu, which runc calls to save a container and to restore it.
//!
//! A container's output goes straight into containerd's FIFO (see `io`), a file outside of the container's own mounts.
//! criu saves such a file only when its configuration declares the file external, and restores only when its configuration
//! names the new stream for the file. runc declares pipes only, so the shim declares the FIFOs, in a configuration file:
//!
//! ```text
//!  checkpoint: FIFO ──▶ `external file[MOUNT:INODE]`, and the note IMAGE/pause-streams.json
//!  restore:    IMAGE/pause-streams.json ──▶ `inherit-fd fd[1]:file[MOUNT:INODE]`
//! ```
//!
//! Images of the stock shim have no note, and need none: the stock shim's streams are pipes. See criu(8), "External
//! resources".

use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use log::warn;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use crate::error::{Error, IoError, Result};
use crate::kernel::exits::Exits;

/// Names a configuration file that criu reads besides its own (criu(8), "Configuration files").
pub const CONFIG_VARIABLE: &str = "CRIU_CONFIG_FILE";
const NOTE: &str = "pause-streams.json";
/// The time limit of `criu check`, which tries out features of the kernel in well under a second.
const CHECKING: Duration = Duration::from_secs(10);
/// The number of criu's errors in an error message. The first ones are the cause.
const TOLD: usize = 3;

/// A container to save: where to, and how.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// The folder of the images.
    pub image: PathBuf,
    /// How to save the container.
    pub options: Options,
}

/// How to save a container, as `runc checkpoint` has the options. Empty text means runc's default.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The container ends with the checkpoint.
    pub exit: bool,
    /// Save open TCP connections.
    pub open_tcp: bool,
    /// Allow Unix sockets to processes outside of the container.
    pub external_unix_sockets: bool,
    /// Allow a terminal from outside of the container.
    pub terminal: bool,
    /// Save file locks.
    pub file_locks: bool,
    /// The namespaces to save without content, by their names in an OCI spec.
    pub empty_namespaces: Vec<String>,
    /// criu's `--manage-cgroups`: `soft`, `full`, `strict` or `ignore`.
    pub cgroups_mode: String,
    /// The folder of criu's log.
    pub work: PathBuf,
}

impl Checkpoint {
    /// Whether the container runs on after the checkpoint.
    pub fn leaves_running(&self) -> bool {
        !self.options.exit
    }

    /// The folder of criu's log, if the request names one.
    pub fn work(&self) -> Option<&Path> {
        let work = &self.options.work;
        (!work.as_os_str().is_empty()).then_some(work)
    }

    /// The flags of `runc checkpoint`.
    pub fn flags(&self) -> Vec<OsString> {
        let options = &self.options;
        let mut flags: Vec<OsString> = vec!["--image-path".into(), self.image.clone().into()];
        for (wanted, flag) in [
            (self.leaves_running(), "--leave-running"),
            (options.open_tcp, "--tcp-established"),
            (options.external_unix_sockets, "--ext-unix-sk"),
            (options.terminal, "--shell-job"),
            (options.file_locks, "--file-locks"),
        ] {
            if wanted {
                flags.push(flag.into());
            }
        }
        for namespace in &options.empty_namespaces {
            flags.extend(["--empty-ns".into(), namespace.into()]);
        }
        if !options.cgroups_mode.is_empty() {
            flags.extend([
                "--manage-cgroups-mode".into(),
                (&options.cgroups_mode).into(),
            ]);
        }
        flags
    }
}

/// A file, in criu's terms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Place {
    mount: u64,
    inode: u64,
}

impl Place {
    /// The file behind a stream's name in a request; none for a stream that is neither a FIFO nor a regular file.
    fn of(stream: &str) -> Option<Self> {
        let path = match stream.split_once("://") {
            None => stream,
            Some(("fifo" | "file", path)) => path,
            Some(_) => return None,
        };
        let only_a_place = OFlags::PATH.bits().cast_signed();
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(only_a_place)
            .open(path)
            .ok()?;
        let metadata = file.metadata().ok()?;
        if !metadata.file_type().is_fifo() && !metadata.is_file() {
            return None;
        }
        // proc(5): `mnt_id` is the id of the mount that the file was opened through.
        let info = format!("/proc/self/fdinfo/{}", file.as_raw_fd());
        let mount = std::fs::read_to_string(info)
            .ok()?
            .lines()
            .find_map(|line| line.strip_prefix("mnt_id:"))?
            .trim()
            .parse()
            .ok()?;
        Some(Self {
            mount,
            inode: metadata.ino(),
        })
    }

    fn key(self) -> String {
        format!("file[{:x}:{:x}]", self.mount, self.inode)
    }
}

/// A container's output streams, as far as the streams are files outside of the container.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedStreams {
    stdout: Option<Place>,
    stderr: Option<Place>,
}

impl SavedStreams {
    /// The streams with these names in containerd's request.
    pub fn find(stdout: &str, stderr: &str) -> Self {
        Self {
            stdout: Place::of(stdout),
            stderr: Place::of(stderr),
        }
    }

    /// Writes the note into the folder of the images, which exists.
    ///
    /// # Errors
    /// `Io` when the note cannot be written.
    pub fn save(&self, image: &Path) -> Result<()> {
        let note = image.join(NOTE);
        let text = serde_json::to_vec(self).map_err(|e| IoError::at("encode", &note)(e))?;
        Ok(std::fs::write(&note, text).map_err(IoError::at("write", &note))?)
    }

    /// Reads the note in the folder of the images; empty when another shim made the images.
    ///
    /// # Errors
    /// `Io` when the note exists and cannot be read or decoded.
    pub fn load(image: &Path) -> Result<Self> {
        let note = image.join(NOTE);
        match std::fs::read(&note) {
            Ok(text) => {
                Ok(serde_json::from_slice(&text).map_err(|e| IoError::at("decode", &note)(e))?)
            }
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(IoError::at("read", &note)(error).into()),
        }
    }

    /// criu's configuration for a checkpoint.
    pub fn when_saved(&self) -> String {
        let mut config = String::new();
        for place in [self.stdout, self.stderr].into_iter().flatten() {
            // Writing to a string does not fail.
            let _ = writeln!(config, "external {}", place.key());
        }
        config
    }

    /// criu's configuration for a restore. criu's own standard streams are the container's new streams.
    pub fn when_restored(&self) -> String {
        let mut config = String::new();
        for (number, place) in [(1, self.stdout), (2, self.stderr)] {
            if let Some(place) = place {
                let _ = writeln!(config, "inherit-fd fd[{number}]:{}", place.key());
            }
        }
        config
    }
}

/// The folder of criu's logs and work files, and criu's configuration file.
#[derive(Debug)]
pub struct Work {
    folder: PathBuf,
    /// The shim made the folder, and removes the folder.
    own: bool,
    config: PathBuf,
}

impl Work {
    /// The folder `wanted`, else a new folder in `bundle`; the configuration file in `bundle` has the text `config`.
    ///
    /// # Errors
    /// `Io` when the folder or the file cannot be made.
    pub fn new(bundle: &Path, wanted: Option<&Path>, config: &str) -> Result<Self> {
        let own = bundle.join("criu-work");
        let folder = wanted.map_or_else(|| own.clone(), Path::to_owned);
        std::fs::create_dir_all(&folder).map_err(IoError::at("create", &folder))?;
        let work = Self {
            own: folder == own,
            config: bundle.join("criu.conf"),
            folder,
        };
        // The operator's own configuration comes first.
        let mut text = match std::env::var_os(CONFIG_VARIABLE) {
            Some(path) => std::fs::read_to_string(&path)
                .map_err(IoError::at("read (CRIU_CONFIG_FILE)", &path))?,
            None => String::new(),
        };
        text.push('\n');
        text.push_str(config);
        std::fs::write(&work.config, text).map_err(IoError::at("write", &work.config))?;
        Ok(work)
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The value of [`CONFIG_VARIABLE`].
    pub fn config(&self) -> &Path {
        &self.config
    }

    /// Adds to runc's error why criu failed: criu cannot work on this node at all, or the errors in criu's `log`. The log
    /// is kept in the bundle.
    pub async fn explain(&self, failed: Error, log: &str, exits: &Arc<Exits>) -> Error {
        let Error::Runc {
            command,
            id,
            message,
        } = failed
        else {
            return failed;
        };
        let said = message.lines().next().unwrap_or_default();
        if let Some(why) = unusable(&self.folder, exits).await {
            return Error::FailedPrecondition(format!(
                "OCI runtime {command} failed: {said} (container {id}): {why}"
            ));
        }
        let from = self.folder.join(log);
        let kept = self.config.with_file_name(format!("criu-{log}"));
        let errors = errors(&from);
        if let Err(error) = std::fs::copy(&from, &kept)
            && error.kind() != ErrorKind::NotFound
        {
            warn!(container = id, log:% = from.display(), error:%; "log of criu not kept");
        }
        Error::Runc {
            command,
            id,
            message: format!("{said}; criu: {errors}; all of its log: {}", kept.display()),
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // A leftover goes with the bundle.
        let _ = std::fs::remove_file(&self.config);
        if self.own {
            let _ = std::fs::remove_dir_all(&self.folder);
        }
    }
}

/// Why criu cannot work on this node; none when `criu check` succeeds.
async fn unusable(folder: &Path, exits: &Arc<Exits>) -> Option<String> {
    let log = folder.join("check.log");
    let mut command = Command::new("criu");
    command
        .arg("check")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&log).ok()?);
    pause::die_with_parent(&mut command);
    let exit = match exits.spawn(&mut command) {
        Ok(claim) => claim.exit,
        Err(error) if error.kind() == ErrorKind::NotFound => {
            return Some("criu is not installed: install the package criu".into());
        }
        Err(error) => return Some(format!("run criu: {error}")),
    };
    let exit = tokio::time::timeout(CHECKING, exit).await.ok()?.ok()?;
    (exit.status != 0).then(|| {
        format!(
            "`criu check` says that this criu does not work with this kernel: {}; install a newer criu",
            errors(&log)
        )
    })
}

/// The first errors in criu's log.
fn errors(log: &Path) -> String {
    let text = match std::fs::read(log) {
        Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
        Err(error) => return format!("no log ({}: {error})", log.display()),
    };
    let errors: Vec<&str> = text
        .lines()
        .filter_map(|line| line.find("Error (").map(|at| line[at..].trim()))
        .take(TOLD)
        .collect();
    if errors.is_empty() {
        "no error in its log".into()
    } else {
        errors.join("; ")
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn files_are_streams_that_criu_is_told_of() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("out");
        std::fs::write(&file, "").unwrap();
        let streams = SavedStreams::find(&format!("file://{}", file.display()), "/dev/null");
        let inode = std::fs::metadata(&file).unwrap().ino();
        assert!(streams.when_saved().ends_with(&format!(":{inode:x}]\n")));
        assert!(
            streams
                .when_restored()
                .starts_with("inherit-fd fd[1]:file[")
        );
        assert_eq!(streams.stderr, None);
        streams.save(dir.path()).unwrap();
        assert_eq!(SavedStreams::load(dir.path()).unwrap(), streams);
    }

    #[test]
    fn a_note_cannot_bring_lines_of_its_own_into_the_configuration() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(
            SavedStreams::load(dir.path()).unwrap(),
            SavedStreams::default()
        );
        let note = r#"{"stdout": "x]\naction-script /evil", "stderr": null}"#;
        std::fs::write(dir.path().join(NOTE), note).unwrap();
        assert!(SavedStreams::load(dir.path()).is_err());
    }

    #[test]
    fn the_first_errors_of_a_log_are_told() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("dump.log");
        std::fs::write(
            &log,
            "(0.1) x\n(0.2) Error (a.c:1): one\n(0.3) Error (b.c:2): two\n",
        )
        .unwrap();
        assert_eq!(errors(&log), "Error (a.c:1): one; Error (b.c:2): two");
    }
}
