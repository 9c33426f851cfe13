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
//! container removes the container's cgroups and that directory. This holds for every release from 1.0 to 1.4. A run of
//! runc takes 12 ms for such a step, and a forced delete takes 100 ms more from release 1.3 on.
//!
//! Poststart hooks run in `runc create`, and startContainer hooks in the init. Poststop hooks run in `runc delete`, so
//! runc deletes a container that has such a hook. Everything else that looks unusual is left to runc, too.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use log::debug;
use serde::Deserialize;
use serde::de::IgnoredAny;
use tokio::net::unix::pipe;

use crate::error::IoError;
use crate::kernel::cgroup;
use crate::runtime::options::RUNC;

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

/// Whether `binary` passes for runc: the file's name is `runc`, and the file is no script. Another program, or a script
/// around runc, may do more in its start and its delete.
pub(super) fn is_runc(binary: &Path) -> bool {
    let is_program = |path: &Path| {
        let mut magic = [0; 4];
        let read = fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic));
        read.is_ok() && magic == *b"\x7fELF"
    };
    if binary.file_name() != Some(OsStr::new(RUNC)) {
        return false;
    }
    if binary != Path::new(RUNC) {
        return is_program(binary);
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut found = std::env::split_paths(&path).map(|dir| dir.join(RUNC));
    // The first file in PATH is the one that is run.
    found
        .find(|path| path.is_file())
        .is_some_and(|path| is_program(&path))
}

/// Lets the init of a created container execute the user's program, and returns when the init does. `ended` resolves
/// when the init has ended. `dir` is the directory of the container's state.
pub(super) async fn start(dir: &Path, ended: impl Future<Output = ()>) -> Shortcut {
    let fifo = dir.join(EXEC_FIFO);
    if !dir.join(STATE).is_file() {
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
    match fs::remove_file(&fifo) {
        Ok(()) => Shortcut::Done,
        // While the FIFO exists, runc takes the container for one that has not been started. runc then says what is
        // wrong.
        Err(_) => Shortcut::NotHere,
    }
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

/// The needed part of `state.json`. runc itself reads the file as libcontainer's `State`.
#[derive(Deserialize)]
struct RuncState {
    config: Config,
    /// The directory of each controller's cgroup.
    #[serde(default)]
    cgroup_paths: HashMap<String, PathBuf>,
    #[serde(default)]
    intel_rdt_path: String,
}

#[derive(Deserialize)]
struct Config {
    #[serde(default, rename = "Hooks")]
    hooks: Option<HashMap<String, Option<Vec<IgnoredAny>>>>,
}

impl RuncState {
    /// Whether a delete removes only the cgroups and the directory.
    fn is_plain(&self) -> bool {
        let hooks = self.config.hooks.iter().flatten();
        let mut poststop = hooks.filter(|(name, _)| *name == "poststop");
        self.intel_rdt_path.is_empty()
            && poststop.all(|(_, hooks)| hooks.iter().flatten().count() == 0)
    }
}

/// Removes runc's state of a container, and the container's cgroups. The container's processes must have ended, and its
/// cgroups must not be systemd's. `dir` is the directory of the state. Blocks.
pub(super) fn delete(dir: &Path) -> Shortcut {
    let read =
        || -> Option<RuncState> { serde_json::from_slice(&fs::read(dir.join(STATE)).ok()?).ok() };
    let Some(state) = read().filter(RuncState::is_plain) else {
        return Shortcut::NotHere;
    };
    let removed = cgroup::remove_leaves(state.cgroup_paths.into_values())
        .and_then(|()| fs::remove_dir_all(dir).map_err(IoError::at("remove", dir)));
    match removed {
        Ok(()) => Shortcut::Done,
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

    #[test]
    fn a_script_is_not_runc_and_another_name_is_another_program() {
        let dir = tempfile::tempdir().unwrap();
        let (runc, other) = (dir.path().join("runc"), dir.path().join("crun"));
        assert!(!is_runc(&runc));
        for path in [&runc, &other] {
            fs::copy("/proc/self/exe", path).unwrap();
        }
        assert!(is_runc(&runc) && !is_runc(&other));
        fs::write(&runc, "#!/bin/sh\nexec runc.real \"$@\"\n").unwrap();
        assert!(!is_runc(&runc));
    }

    #[tokio::test]
    async fn an_init_is_released_and_the_fifo_goes() {
        let dir = created("{}");
        let init = init(&dir, b"0");
        assert_eq!(start(dir.path(), pending()).await, Shortcut::Done);
        init.join().unwrap();
        assert!(!dir.path().join(EXEC_FIFO).exists());
        // runc must refuse another start.
        assert_eq!(start(dir.path(), pending()).await, Shortcut::NotHere);
    }

    #[tokio::test]
    async fn an_init_that_is_released_and_ends_at_once_was_started() {
        let dir = created("{}");
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
        let dir = created("{}");
        assert_eq!(start(dir.path(), ready(())).await, Shortcut::Dead);
        let init = init(&dir, b"");
        assert_eq!(start(dir.path(), pending()).await, Shortcut::Dead);
        init.join().unwrap();
        assert!(dir.path().join(EXEC_FIFO).exists());
    }

    #[tokio::test]
    async fn the_state_of_another_program_is_left_to_it() {
        let dir = created("{}");
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
            r#"{{"config": {{"Hooks": {hooks}}}, "cgroup_paths": {{"cpu": {leaf:?}, "": {gone:?}}}, "intel_rdt_path": ""}}"#
        ));
        assert_eq!(delete(dir.path()), Shortcut::Done);
        assert!(!leaf.exists() && !dir.path().exists());
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
