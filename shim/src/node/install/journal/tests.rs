#![allow(clippy::unwrap_used, clippy::expect_used)]
use std::os::unix::fs::symlink;
use std::time::Duration;

use rustix::process::{Pid, getpid};

use super::super::plan::Reader;
use super::*;

fn change(path: &Path, content: Option<&str>) -> Change {
    Change {
        path: path.to_owned(),
        content: content.map(|text| text.as_bytes().to_owned()),
        mode: 0o644,
        reader: Reader::Containerd,
    }
}

/// All files below a folder, with content, mode and time; links with where they lead.
fn tree(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let metadata = fs::symlink_metadata(&path).unwrap();
        let (mode, time) = (metadata.mode(), metadata.modified().unwrap());
        if metadata.is_dir() {
            found.push(format!("{}", path.display()));
            found.extend(tree(&path));
        } else if metadata.is_symlink() {
            found.push(format!("{path:?} {:?}", fs::read_link(&path).unwrap()));
        } else {
            found.push(format!(
                "{path:?} {mode:o} {time:?} {:?}",
                fs::read(&path).unwrap()
            ));
        }
    }
    found.sort();
    found
}

/// A node with three files, one of them behind a link, and four changes for it.
fn node(root: &Path) -> Vec<Change> {
    fs::create_dir_all(root.join("etc/real")).unwrap();
    for (name, mode) in [
        ("program", 0o755),
        ("real/config.toml", 0o640),
        ("gone.toml", 0o600),
    ] {
        let path = root.join("etc").join(name);
        fs::write(&path, name).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
        let file = File::open(&path).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::new(1_700_000_000, 123_456_789))
            .unwrap();
    }
    symlink("real/config.toml", root.join("etc/config.toml")).unwrap();
    vec![
        change(&root.join("etc/program"), Some("new")),
        change(&root.join("etc/conf.d/deep/drop-in.toml"), Some("new")),
        change(&root.join("etc/config.toml"), Some("new")),
        change(&root.join("etc/gone.toml"), None),
    ]
}

#[test]
fn wherever_a_program_is_killed_the_next_one_undoes_all() {
    for done in 0..=4 {
        let dir = tempfile::tempdir().unwrap();
        let (root, state) = (dir.path().join("root"), dir.path().join("state"));
        let changes = node(&root);
        let before = tree(&root);
        let mut journal = Journal::begin(&state, &changes, Start::of(getpid())).unwrap();
        for change in &changes[..done] {
            journal.apply(change).unwrap();
        }
        assert_eq!(tree(&root) == before, done == 0);
        if done == 4 {
            journal.before_restart().unwrap();
        }
        // Half of the next file.
        fs::write(root.join("etc").join(TEMPORARY), "ha").unwrap();
        drop(journal);

        let mut left = Journal::left(&state).unwrap().unwrap();
        assert_eq!(left.may_have_been_read(Start::of(getpid())), done == 4);
        assert!(left.may_have_been_read(None), "containerd has ended since");
        assert!(
            left.may_have_been_read(Start::of(Pid::INIT)),
            "or another was started"
        );
        left.undo().unwrap();
        left.after_restart(Start::of(Pid::INIT)).unwrap();
        let again = Journal::left(&state).unwrap().unwrap();
        assert!(
            !again.may_have_been_read(Start::of(Pid::INIT)),
            "one restart is enough"
        );
        assert_eq!(tree(&root), before, "after {done} changes");
        left.undo()
            .expect("the second time, after a kill in the first");
        assert_eq!(tree(&root), before);
        left.close().unwrap();
        assert!(Journal::left(&state).unwrap().is_none());
        assert!(!state.exists());
    }
}

#[test]
fn what_is_closed_stays_and_keeps_mode_and_link() {
    let dir = tempfile::tempdir().unwrap();
    let (root, state) = (dir.path().join("root"), dir.path().join("state"));
    let changes = node(&root);
    let journal = Journal::begin(&state, &changes, Start::of(getpid())).unwrap();
    for change in &changes {
        journal.apply(change).unwrap();
    }
    journal.close().unwrap();
    assert!(Journal::left(&state).unwrap().is_none());
    let config = root.join("etc/config.toml");
    assert!(fs::symlink_metadata(&config).unwrap().is_symlink());
    assert_eq!(fs::read_to_string(&config).unwrap(), "new");
    assert_eq!(fs::metadata(&config).unwrap().mode() & 0o7777, 0o640);
    assert!(!root.join("etc/gone.toml").exists());
    let new = fs::metadata(root.join("etc/conf.d/deep/drop-in.toml")).unwrap();
    assert_eq!(new.mode() & 0o7777, 0o644);
}

#[test]
fn a_killed_begin_means_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    fs::create_dir(&state).unwrap();
    fs::write(state.join("before-0"), "half").unwrap();
    assert!(Journal::left(&state).unwrap().is_none());
    assert!(!state.exists());
}

#[test]
fn what_somebody_else_has_written_since_is_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    let (root, state) = (dir.path().join("root"), dir.path().join("state"));
    let changes = node(&root);
    let journal = Journal::begin(&state, &changes, Start::of(getpid())).unwrap();
    for change in &changes {
        journal.apply(change).unwrap();
    }
    fs::write(root.join("etc/config.toml"), "a person's").unwrap();
    let error = Journal::left(&state).unwrap().unwrap().undo().unwrap_err();
    assert!(matches!(error, Error::FailedPrecondition(_)), "{error}");
    assert_eq!(
        fs::read_to_string(root.join("etc/config.toml")).unwrap(),
        "a person's"
    );
    // The others are as before, and the copies are there for the person.
    assert_eq!(
        fs::read_to_string(root.join("etc/program")).unwrap(),
        "program"
    );
    assert_eq!(
        fs::read_to_string(state.join("before-2")).unwrap(),
        "real/config.toml"
    );
}

#[test]
fn a_file_that_cannot_be_written_stops_the_change_and_nothing_stays() {
    let dir = tempfile::tempdir().unwrap();
    let (root, state) = (dir.path().join("root"), dir.path().join("state"));
    let mut changes = node(&root);
    // A file stands where a folder must be; root may write into a folder without a write bit.
    changes.push(change(&root.join("etc/program/x"), Some("new")));
    let before = tree(&root);
    let error = Journal::begin(&state, &changes, Start::of(getpid())).unwrap_err();
    assert!(matches!(error, Error::Io(_)), "{error}");
    assert_eq!(tree(&root), before);
}
