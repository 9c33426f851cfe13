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

#[tokio::test]
async fn an_init_is_released_also_where_the_kernel_watches_nothing() {
    for (byte, released) in [(&b"0"[..], true), (b"", false)] {
        let dir = created(PLAIN);
        let init = init(&dir, byte);
        let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
        let mut open = File::options();
        let open = open.read(true).custom_flags(nonblocking);
        let fifo = open.open(dir.path().join(EXEC_FIFO)).unwrap();
        let mut any = false;
        read_to_end(&fifo, None, &mut any).await;
        assert_eq!(any, released);
        init.join().unwrap();
    }
}
