//! The same two steps for crun.
//!
//! ```text
//!  <root>/<id>/status, config.json   from `crun create` to `crun delete`: the cgroup, the hooks
//!              exec.fifo             from `crun create` to `crun start`
//!
//!   init: opened exec.fifo for reading ─── waits ───▶ reads one byte ──▶ executes the user's program
//!                                                     ▲
//!   start: ── opens exec.fifo for writing, removes ───┘ writes one byte
//! ```
//!
//! Poststart hooks run in `crun start`, poststop hooks in `crun delete`: crun starts or deletes a container that has such
//! a hook. Where systemd makes the cgroups, `crun create` pins the program that guards the devices, and `crun delete`
//! removes the pin. Of cgroup v1, crun removes more than one directory, and that is left to crun.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use log::debug;
use rustix::fs::OFlags;
use rustix::io::Errno;
use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};

use super::{EXEC_FIFO, Shortcut, is_fifo};
use crate::error::IoError;
use crate::kernel::cgroup::{self, Cgroup, Driver, Hierarchy};

/// Where crun pins the programs that guard the devices, one for each scope.
const PINNED: &str = "/sys/fs/bpf/crun";

/// The state of a container as crun keeps it. A key that is not here is of a release that the shim does not know, and the
/// state cannot be read.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
#[expect(dead_code, reason = "of some keys, the name alone matters")]
pub(crate) struct CrunStatus {
    /// Relative to the root of the cgroups; empty where crun has made none.
    cgroup_path: String,
    /// systemd's unit; empty without systemd.
    scope: String,
    systemd_cgroup: bool,
    pid: Option<IgnoredAny>,
    process_start_time: Option<IgnoredAny>,
    rootfs: Option<IgnoredAny>,
    bundle: Option<IgnoredAny>,
    created: Option<IgnoredAny>,
    owner: Option<IgnoredAny>,
    detached: Option<IgnoredAny>,
    #[serde(rename = "external_descriptors")]
    external_descriptors: Option<IgnoredAny>,
}

/// What of the container's spec adds to a start or a delete.
#[derive(Default, Deserialize)]
#[serde(default)]
pub(crate) struct CrunConfig {
    hooks: Option<Hooks>,
    linux: Option<Linux>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Hooks {
    poststart: Option<Vec<IgnoredAny>>,
    poststop: Option<Vec<IgnoredAny>>,
}

#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Linux {
    intel_rdt: Option<IgnoredAny>,
}

impl CrunConfig {
    fn starts_plainly(&self) -> bool {
        let hooks = self.hooks.as_ref();
        hooks.is_none_or(|hooks| hooks.poststart.iter().flatten().count() == 0)
    }

    fn ends_plainly(&self) -> bool {
        let hooks = self.hooks.as_ref();
        hooks.is_none_or(|hooks| hooks.poststop.iter().flatten().count() == 0)
            && self
                .linux
                .as_ref()
                .is_none_or(|linux| linux.intel_rdt.is_none())
    }
}

/// Lets the init of a created container execute the user's program. `dir` is the directory of the container's state.
pub(in super::super) fn start(dir: &Path) -> Shortcut {
    match read(dir) {
        Ok((_, config)) if config.starts_plainly() => {}
        Ok(_) => return Shortcut::NotHere,
        Err(error) => {
            debug!(error:%; "left to crun");
            return Shortcut::NotHere;
        }
    }
    let fifo = dir.join(EXEC_FIFO);
    if !is_fifo(&fifo) {
        return Shortcut::NotHere;
    }
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let opened = File::options()
        .write(true)
        .custom_flags(nonblocking)
        .open(&fifo);
    let mut writer = match opened {
        Ok(writer) => writer,
        // Nobody has the FIFO open for reading (open(2)).
        Err(error) if has(&error, Errno::NXIO) => return Shortcut::Dead,
        Err(_) => return Shortcut::NotHere,
    };
    // First, as crun does: without the FIFO, the container is a started one.
    if fs::remove_file(&fifo).is_err() {
        return Shortcut::NotHere;
    }
    match writer.write_all(&[0]) {
        Ok(()) => Shortcut::Done,
        Err(_) => Shortcut::Dead,
    }
}

/// Removes crun's state of a container, and the container's cgroup. The container's processes must have ended, and systemd
/// must have forgotten the unit of a cgroup that systemd has made. Blocks.
pub(in super::super) fn delete(dir: &Path) -> Shortcut {
    let removed = read(dir).and_then(|(status, config)| {
        if Hierarchy::detect()? == Hierarchy::V1 || !config.ends_plainly() {
            return Ok(Shortcut::NotHere);
        }
        if !status.cgroup_path.is_empty() {
            let cgroup = Cgroup::at(&status.cgroup_path, Driver::Cgroupfs)?;
            // v2 has one directory for all controllers.
            let directory = cgroup.directory("memory").map(Path::to_owned);
            cgroup::remove_leaves(directory.into_iter())?;
        }
        if status.systemd_cgroup && !status.scope.is_empty() {
            remove(&pinned(&status.scope))?;
        }
        fs::remove_dir_all(dir).map_err(IoError::at("remove", dir))?;
        Ok(Shortcut::Done)
    });
    match removed {
        Ok(outcome) => outcome,
        // crun goes on from here, or says what is wrong.
        Err(error) => {
            debug!(error:%; "left to crun");
            Shortcut::NotHere
        }
    }
}

/// The name has no dots, which bpffs(5) does not allow.
fn pinned(scope: &str) -> PathBuf {
    Path::new(PINNED).join(scope.replace('.', "_"))
}

fn remove(path: &Path) -> Result<(), IoError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(IoError::at("remove", path)(error))
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

fn has(error: &io::Error, errno: Errno) -> bool {
    error.raw_os_error() == Some(errno.raw_os_error())
}

/// Reads the state and the spec in the directory `dir`.
///
/// # Errors
/// The errors of reading the files, and an error for a state that the shim does not know.
fn read(dir: &Path) -> Result<(CrunStatus, CrunConfig), IoError> {
    Ok((
        decode(&dir.join("status"))?,
        decode(&dir.join("config.json"))?,
    ))
}

fn decode<T: DeserializeOwned>(path: &Path) -> Result<T, IoError> {
    let text = fs::read(path).map_err(IoError::at("read", path))?;
    serde_json::from_slice(&text).map_err(|error| IoError::at("decode", path)(error))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Read;

    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use tempfile::TempDir;

    use super::*;

    const STATUS: &str = r#"{"pid": 7, "process-start-time": 9, "cgroup-path": "", "scope": "", "rootfs": "/r",
        "systemd-cgroup": false, "bundle": "/b", "created": "now", "detached": true, "external_descriptors": "[]"}"#;

    fn created(status: &str, config: &str) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("status"), status).unwrap();
        fs::write(dir.path().join("config.json"), config).unwrap();
        let fifo = dir.path().join(EXEC_FIFO);
        mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        dir
    }

    /// An init that waits for its start.
    fn init(dir: &TempDir) -> File {
        let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
        let mut open = File::options();
        let open = open.read(true).custom_flags(nonblocking);
        open.open(dir.path().join(EXEC_FIFO)).unwrap()
    }

    #[test]
    fn an_init_is_released_and_the_fifo_goes() {
        let dir = created(
            STATUS,
            r#"{"hooks": {"poststop": [{"path": "/x"}], "prestart": []}}"#,
        );
        let mut init = init(&dir);
        assert_eq!(start(dir.path()), Shortcut::Done);
        assert_eq!(init.read(&mut [0; 8]).unwrap(), 1);
        assert!(!dir.path().join(EXEC_FIFO).exists());
        assert_eq!(start(dir.path()), Shortcut::NotHere);
    }

    #[test]
    fn an_init_that_has_ended_is_dead() {
        let dir = created(STATUS, "{}");
        drop(init(&dir));
        assert_eq!(start(dir.path()), Shortcut::Dead);
        assert!(dir.path().join(EXEC_FIFO).exists());
    }

    #[test]
    fn what_is_not_plain_is_left_to_crun_as_it_is() {
        let newer = STATUS.replace("\"pid\"", "\"checkpoints\": 1, \"pid\"");
        let poststart = r#"{"hooks": {"poststart": [{"path": "/x"}]}}"#;
        for (status, config, starts) in [
            (&*newer, "{}", false),
            ("{}", "{}", false),
            (STATUS, "[", false),
            (STATUS, poststart, false),
            (STATUS, r#"{"hooks": {"poststop": [{"path": "/x"}]}}"#, true),
            (STATUS, r#"{"linux": {"intelRdt": {}}}"#, true),
        ] {
            let dir = created(status, config);
            let _init = init(&dir);
            if config != poststart {
                assert_eq!(delete(dir.path()), Shortcut::NotHere, "{status} {config}");
            }
            assert!(dir.path().join("status").exists());
            let expected = if starts {
                Shortcut::Done
            } else {
                Shortcut::NotHere
            };
            assert_eq!(start(dir.path()), expected, "{status} {config}");
        }
    }

    #[test]
    fn a_pin_has_no_dots() {
        let pin = pinned("cri-containerd-1.scope");
        assert_eq!(pin, Path::new("/sys/fs/bpf/crun/cri-containerd-1_scope"));
    }
}
