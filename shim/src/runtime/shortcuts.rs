//! The two steps of a container's life for which runc need not run: the start and the delete. This module does what
//! runc would do; [`crun`] does the same for crun.
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

pub(crate) mod crun;

use std::collections::HashMap;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;
use std::{fmt, fs};

use log::{debug, warn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use serde::de::{Error as _, IgnoredAny, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use tokio::time::sleep;

use crate::error::IoError;
use crate::kernel::cgroup;

type Watch = tokio::net::unix::pipe::Receiver;

const STATE: &str = "state.json";
const EXEC_FIFO: &str = "exec.fifo";

/// How often the shim looks at a FIFO that the kernel does not watch.
const LOOK: Duration = Duration::from_millis(10);

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
        debug!(error:%; "left to runc");
        return Shortcut::NotHere;
    }
    if !is_fifo(&fifo) {
        return Shortcut::NotHere;
    }
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let opened = File::options()
        .read(true)
        .custom_flags(nonblocking)
        .open(&fifo);
    let Ok(reader) = opened else {
        return Shortcut::NotHere;
    };
    // From here on the init goes on, and a `runc start` would wait for ever for its byte.
    // Of a copy: the descriptor is lost when the kernel refuses the watch.
    let copy = reader.try_clone().and_then(Watch::from_file_unchecked);
    let mut released = false;
    tokio::select! {
        biased;
        () = read_to_end(&reader, copy.ok(), &mut released) => {}
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
        warn!(error:% = IoError::at("remove", &fifo)(error); "FIFO of the start stays");
    }
    Shortcut::Done
}

fn is_fifo(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|data| data.file_type().is_fifo())
}

/// Waits for the first writer, and reads until the last writer has closed the FIFO. `any` becomes true when something
/// was written.
async fn read_to_end(mut fifo: &File, watch: Option<Watch>, any: &mut bool) {
    loop {
        // Before the first writer, a FIFO has no event (fifo(7), poll(2)), although a read would return the end.
        let read = match &watch {
            Some(watch) => match watch.readable().await {
                Ok(()) => watch.try_read(&mut [0; 8]),
                Err(_) => return,
            },
            None if has_event(fifo) => fifo.read(&mut [0; 8]),
            // The kernel had no room for a watch (epoll_ctl(2)): the shim looks from time to time.
            None => {
                sleep(LOOK).await;
                continue;
            }
        };
        match read {
            Ok(0) => return,
            Ok(_) => *any = true,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

fn has_event(fifo: &File) -> bool {
    let mut fds = [PollFd::new(fifo, PollFlags::IN)];
    poll(&mut fds, Some(&Timespec::default())).is_ok_and(|events| events > 0)
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

/// Removes runc's state of a container, and the container's cgroups. The container's processes must have ended, and
/// systemd must have forgotten the unit of a cgroup that systemd has made. `dir` is the directory of the state. Blocks.
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
            debug!(error:%; "left to runc");
            Shortcut::NotHere
        }
    }
}

#[cfg(test)]
mod tests;
