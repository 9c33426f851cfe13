//! The two steps of a container's life for which runc need not run: the start and the delete. This module does what
//! runc would do.
//!
//! ```text
//!  <root>/<id>/state.json   from `runc create` to `runc delete`: cgroups, hooks
//!              exec.fifo    from `runc create` to `runc start`
//!
//!   init: opens exec.fifo for writing ─── waits ──▶ writes one byte ──▶ executes the user's program
//!                                           ▲              │            (which closes the init's end of the FIFO)
//!   start: ── opens exec.fifo for reading ──┘              └──▶ reads to the end, removes exec.fifo
//! ```
//!
//! `runc start` does nothing else to a container (libcontainer's `Container.Exec`), and `runc delete` of an ended
//! container removes the container's cgroups and that directory. This holds for the releases that [`super::release`]
//! knows. A run of runc takes 12 ms for such a step, and a forced delete takes 100 ms more from release 1.3 on.
//!
//! In these releases poststart hooks run in `runc create`, and startContainer hooks in the init. Poststop hooks run in
//! `runc delete`, so runc deletes a container that has such a hook. Everything else that looks unusual is left to runc,
//! too: a state with a key that the shim does not know ([`RuncState`]).

use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::{fmt, fs};

use log::{debug, warn};
use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use tokio::net::unix::pipe;

use crate::error::IoError;
use crate::kernel::cgroup;

const STATE: &str = "state.json";
const EXEC_FIFO: &str = "exec.fifo";

/// The outcome of a shortcut.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Shortcut {
    /// The step is done.
    Done,
    /// The init has ended before its start.
    Dead,
    /// The step is left to runc.
    NotHere,
}

/// Lets the init of a created container execute the user's program, and returns when the init does. `ended` resolves
/// when the init has ended. `dir` is the directory of the container's state.
pub(super) async fn start(dir: &Path, ended: impl Future<Output = ()>) -> Shortcut {
    let fifo = dir.join(EXEC_FIFO);
    if let Err(error) = RuncState::read(dir) {
        debug!("left to runc: {error}");
        return Shortcut::NotHere;
    }
    let Ok(reader) = pipe::OpenOptions::new().open_receiver(&fifo) else {
        return Shortcut::NotHere;
    };
    let mut released = false;
    tokio::select! {
        biased;
        () = read_to_end(&reader, &mut released) => {}
        // The init may have written its byte before it ended.
        () = ended => {
            released |= rustix::io::read(&reader, &mut [0; 8]).is_ok_and(|bytes| bytes > 0);
        }
    }
    if !released {
        return Shortcut::Dead;
    }
    if let Err(error) = fs::remove_file(&fifo) {
        // The program runs. `runc start` would wait for ever for an init that was released before. While the FIFO
        // exists, runc takes the container for one that has not been started, and refuses a checkpoint.
        warn!("{}", IoError::at("remove", &fifo)(error));
    }
    Shortcut::Done
}

/// Waits for the first writer, and reads until the last writer has closed the FIFO. `any` becomes true when something
/// was written.
async fn read_to_end(fifo: &pipe::Receiver, any: &mut bool) {
    // Before the first writer, a FIFO is not readable (fifo(7), poll(2)), although a read would return the end.
    while fifo.readable().await.is_ok() {
        match fifo.try_read(&mut [0; 8]) {
            Ok(0) => return,
            Ok(_) => *any = true,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => return,
        }
    }
}

/// The state of a container as runc keeps it (libcontainer's `State`). A key that is not here is of a release or of a
/// build that the shim does not know, and the state cannot be read.
///
/// The keys of the state, of the config and of the hooks are looked at, and no deeper ones: what a release adds to a
/// container for a start or a delete to see (a resctrl group, network devices, a kind of hook) has a key of its own
/// there. What is below (mounts, seccomp, devices …) says how the container was made, which is over.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
#[expect(dead_code, reason = "of some keys, the name alone matters")]
pub(crate) struct RuncState {
    config: Config,
    /// The directory of each controller's cgroup.
    #[serde(default)]
    cgroup_paths: HashMap<String, PathBuf>,
    #[serde(default)]
    intel_rdt_path: String,
    #[serde(default)]
    intel_rdt_mon_path: String,
    id: Option<IgnoredAny>,
    init_process_pid: Option<IgnoredAny>,
    init_process_start: Option<IgnoredAny>,
    created: Option<IgnoredAny>,
    rootless: Option<IgnoredAny>,
    namespace_paths: Option<IgnoredAny>,
    external_descriptors: Option<IgnoredAny>,
}

/// libcontainer's `Config`, of which only the hooks are of interest.
#[derive(Default)]
struct Config {
    hooks: Hooks,
}

/// The hooks of each kind.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "camelCase")]
struct Hooks {
    prestart: Option<IgnoredAny>,
    create_runtime: Option<IgnoredAny>,
    create_container: Option<IgnoredAny>,
    start_container: Option<IgnoredAny>,
    poststart: Option<IgnoredAny>,
    poststop: Option<Vec<IgnoredAny>>,
}

/// The keys of libcontainer's `Config` in the releases from 1.0 to 1.5, without `Hooks`, and without `intel_rdt`: a
/// container with a resctrl group is left to runc.
#[rustfmt::skip]
const CONFIG: [&str; 39] = [
    "apparmor_profile", "capabilities", "cgroups", "devices", "domainname", "exec_cpu_affinity", "gid_mappings", "hostname",
    "io_priority", "labels", "mask_paths", "memory_policy", "mount_label", "mounts", "namespaces", "netDevices", "networks",
    "no_new_keyring", "no_new_privileges", "no_pivot_root", "oom_score_adj", "parent_death_signal", "personality",
    "process_label", "readonly_paths", "readonlyfs", "rlimits", "rootPropagation", "rootfs", "rootless_cgroups",
    "rootless_euid", "routes", "scheduler", "seccomp", "sysctl", "time_offsets", "uid_mappings", "umask", "version",
];

impl<'de> Deserialize<'de> for Config {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(ConfigKeys)
    }
}

struct ConfigKeys;

impl<'de> Visitor<'de> for ConfigKeys {
    type Value = Config;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a container's config")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Config, A::Error> {
        let mut config = Config::default();
        while let Some(key) = map.next_key::<&str>()? {
            match key {
                "Hooks" => config.hooks = map.next_value::<Option<_>>()?.unwrap_or_default(),
                key if CONFIG.contains(&key) => drop(map.next_value::<IgnoredAny>()?),
                key => return Err(A::Error::unknown_field(key, &CONFIG)),
            }
        }
        Ok(config)
    }
}

impl RuncState {
    /// Reads the state in the directory `dir`.
    ///
    /// # Errors
    /// The errors of reading the file, and an error for a state that the shim does not know.
    fn read(dir: &Path) -> Result<Self, IoError> {
        let path = dir.join(STATE);
        let text = fs::read(&path).map_err(IoError::at("read", &path))?;
        serde_json::from_slice(&text).map_err(|error| IoError::at("decode", &path)(error))
    }

    /// The directory of each controller's cgroup; none where a delete removes more than the cgroups and the directory.
    pub(crate) fn cgroups_if_plain(self) -> Option<HashMap<String, PathBuf>> {
        let plain = self.intel_rdt_path.is_empty()
            && self.intel_rdt_mon_path.is_empty()
            && self.config.hooks.poststop.iter().flatten().count() == 0;
        plain.then_some(self.cgroup_paths)
    }
}

/// Removes runc's state of a container, and the container's cgroups. The container's processes must have ended, and its
/// cgroups must not be systemd's. `dir` is the directory of the state. Blocks.
pub(super) fn delete(dir: &Path) -> Shortcut {
    let removed = RuncState::read(dir).and_then(|state| {
        let Some(cgroups) = state.cgroups_if_plain() else {
            return Ok(Shortcut::NotHere);
        };
        cgroup::remove_leaves(cgroups.into_values())?;
        fs::remove_dir_all(dir).map_err(IoError::at("remove", dir))?;
        Ok(Shortcut::Done)
    });
    match removed {
        Ok(outcome) => outcome,
        // runc goes on from here, or says what is wrong.
        Err(error) => {
            debug!("left to runc: {error}");
            Shortcut::NotHere
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::disallowed_methods)]
    use std::fs::File;
    use std::future::{pending, ready};
    use std::io::Write;

    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use tempfile::TempDir;

    use super::*;
    use crate::kernel::blocking;

    const PLAIN: &str = r#"{"config": {}}"#;

    fn created(state: &str) -> TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(STATE), state).unwrap();
        let fifo = dir.path().join(EXEC_FIFO);
        mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o622), 0).unwrap();
        dir
    }

    /// An init that waits for its start, and then writes `bytes`.
    fn init(dir: &TempDir, bytes: &'static [u8]) -> std::thread::JoinHandle<()> {
        let fifo = dir.path().join(EXEC_FIFO);
        std::thread::spawn(move || {
            let mut fifo = File::options().write(true).open(fifo).unwrap();
            fifo.write_all(bytes).unwrap();
        })
    }

    #[tokio::test]
    async fn an_init_is_released_and_the_fifo_goes() {
        let dir = created(PLAIN);
        let init = init(&dir, b"0");
        assert_eq!(start(dir.path(), pending()).await, Shortcut::Done);
        init.join().unwrap();
        assert!(!dir.path().join(EXEC_FIFO).exists());
        // runc must refuse another start.
        assert_eq!(start(dir.path(), pending()).await, Shortcut::NotHere);
    }

    #[tokio::test]
    async fn an_init_that_is_released_and_ends_at_once_was_started() {
        let dir = created(PLAIN);
        let waiting = init(&dir, b"0");
        // Resolves when the init has written and is gone.
        let ended = async {
            let joined = blocking::run(|| {
                waiting.join().unwrap();
                Ok(())
            });
            joined.await.unwrap();
        };
        assert_eq!(start(dir.path(), ended).await, Shortcut::Done);
    }

    #[tokio::test]
    async fn an_init_that_has_ended_is_dead() {
        let dir = created(PLAIN);
        assert_eq!(start(dir.path(), ready(())).await, Shortcut::Dead);
        let init = init(&dir, b"");
        assert_eq!(start(dir.path(), pending()).await, Shortcut::Dead);
        init.join().unwrap();
        assert!(dir.path().join(EXEC_FIFO).exists());
    }

    #[tokio::test]
    async fn the_state_of_another_program_is_left_to_it() {
        let dir = created(PLAIN);
        fs::rename(dir.path().join(STATE), dir.path().join("status")).unwrap();
        assert_eq!(start(dir.path(), pending()).await, Shortcut::NotHere);
        assert_eq!(delete(dir.path()), Shortcut::NotHere);
    }

    #[test]
    fn a_plain_state_goes_with_its_cgroups() {
        let cgroup = tempfile::tempdir().unwrap();
        let (leaf, gone) = (cgroup.path().join("leaf"), cgroup.path().join("gone"));
        fs::create_dir(&leaf).unwrap();
        let hooks = r#"{"poststart": [{"path": "/x"}], "poststop": null}"#;
        let dir = created(&format!(
            r#"{{"id": "c", "config": {{"umask": 18, "Hooks": {hooks}}}, "cgroup_paths": {{"cpu": {leaf:?}, "": {gone:?}}}, "intel_rdt_path": ""}}"#
        ));
        assert_eq!(delete(dir.path()), Shortcut::Done);
        assert!(!leaf.exists() && !dir.path().exists());
    }

    #[test]
    fn an_unknown_key_is_left_to_runc() {
        for (state, known) in [
            (
                r#"{"config": {"Hooks": null, "version": "1.3.0", "sysctl": {}}, "id": "c", "created": "now"}"#,
                true,
            ),
            (
                r#"{"config": {"Hooks": {"prestart": [], "startContainer": [{"path": "/x"}]}}}"#,
                true,
            ),
            // A newer release, a build of somebody's, and no state at all.
            (r#"{"config": {}, "poststart_done": false}"#, false),
            (r#"{"config": {"start_hooks": 1}}"#, false),
            (
                r#"{"config": {"intel_rdt": {"enableMonitoring": true}}}"#,
                false,
            ),
            (r#"{"config": {"Hooks": {"prestop": null}}}"#, false),
            (r#"{"id": "c"}"#, false),
            (r#"{"config": []}"#, false),
            ("", false),
        ] {
            let dir = created(state);
            let read = RuncState::read(dir.path());
            assert_eq!(read.is_ok(), known, "{state}: {:?}", read.err());
        }
    }

    #[tokio::test]
    async fn a_container_of_an_unknown_state_is_not_started() {
        let dir = created(r#"{"config": {}, "unknown": 1}"#);
        assert_eq!(start(dir.path(), pending()).await, Shortcut::NotHere);
        assert!(dir.path().join(EXEC_FIFO).exists());
    }

    #[test]
    fn what_is_not_plain_is_left_to_runc_as_it_is() {
        let cgroup = tempfile::tempdir().unwrap();
        fs::create_dir(cgroup.path().join("child")).unwrap();
        let parent = cgroup.path();
        for state in [
            "{}".to_owned(),
            r#"{"config": {"Hooks": {"poststop": [{"path": "/x"}]}}}"#.to_owned(),
            r#"{"config": {"Hooks": {"poststop": {}}}}"#.to_owned(),
            r#"{"config": {}, "intel_rdt_path": "/sys/fs/resctrl/x"}"#.to_owned(),
            r#"{"config": {}, "intel_rdt_mon_path": "/sys/fs/resctrl/mon_groups/x"}"#.to_owned(),
            format!(r#"{{"config": {{}}, "cgroup_paths": {{"cpu": {parent:?}}}}}"#),
        ] {
            let dir = created(&state);
            assert_eq!(delete(dir.path()), Shortcut::NotHere, "{state}");
            assert!(
                dir.path().join(STATE).exists() && parent.exists(),
                "{state}"
            );
        }
    }
}
