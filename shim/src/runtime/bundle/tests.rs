#![allow(clippy::unwrap_used, clippy::panic)]
use std::os::unix::fs::PermissionsExt;

use serde_json::{Value, json};

use super::*;
use crate::runtime::options::{Holder, Options};
use crate::runtime::runc::read_pid;

fn record(bundle: &Path) -> Record {
    Record {
        bundle: bundle.to_owned(),
        mounts_rootfs: true,
        runc: None,
        systemd_cgroup: false,
        cgroups_path: Some("/kubepods/x".into()),
    }
}

#[test]
fn a_record_comes_back_as_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    assert_eq!(Record::load(dir.path()).unwrap(), None);
    record(dir.path()).save(dir.path(), "a").unwrap();
    assert_eq!(Record::load(dir.path()).unwrap(), Some(record(dir.path())));
    assert!(members(dir.path()).unwrap().is_empty());
}

#[test]
fn a_member_is_known_to_the_first_also_when_its_own_bundle_is_gone() {
    let (first, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    record(own.path()).save(first.path(), "b.c").unwrap();
    assert!(Record::load(own.path()).unwrap().is_some());
    let expected = record(own.path());
    drop(own);
    std::fs::write(first.path().join(POD).join("broken.json"), "").unwrap();
    let mut found = members(first.path()).unwrap();
    found.sort_by(|a, b| a.0.cmp(&b.0));
    let [(id, record), (broken, unreadable)] = &found[..] else {
        panic!("{found:?}");
    };
    assert_eq!((id.as_str(), record.as_ref().unwrap()), ("b.c", &expected));
    assert!(broken == "broken" && unreadable.is_err());
    forget(first.path(), "broken").unwrap();
    forget(first.path(), "b.c").unwrap();
    forget(first.path(), "b.c").unwrap();
    assert!(members(first.path()).unwrap().is_empty());
}

#[test]
fn a_deleted_container_has_a_mark_in_place_of_its_record() {
    let dir = tempfile::tempdir().unwrap();
    record(dir.path()).save(dir.path(), "a").unwrap();
    assert!(!is_deleted(dir.path()));
    let files = || std::fs::read_dir(dir.path()).unwrap().count();
    let before = files();
    for _ in 0..2 {
        set_deleted(dir.path()).unwrap();
        assert!(is_deleted(dir.path()));
        assert_eq!(Record::load(dir.path()).unwrap(), None);
        assert_eq!(files(), before, "the mark needs no room");
    }
}

#[test]
fn a_file_with_secrets_is_for_its_owner_alone() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("exec-1.json");
    write_private(&file, b"{}").unwrap();
    let mode = std::fs::metadata(&file).unwrap().mode();
    assert_eq!(mode & 0o777, 0o600);
}

#[test]
fn a_replaced_file_keeps_its_mode_and_a_failure_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.json");
    std::fs::write(&file, "old").unwrap();
    std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o640)).unwrap();
    replace_file(&file, b"new").unwrap();
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "new");
    assert_eq!(std::fs::metadata(&file).unwrap().mode() & 0o777, 0o640);
    // A directory cannot be replaced by a file.
    let directory = dir.path().join("folder");
    std::fs::create_dir(&directory).unwrap();
    assert!(replace_file(&directory, b"new").is_err());
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 2);
}

/// The files of one release, as they lie in a bundle.
struct Golden {
    /// `pause.json` of a container, also in the pod's first bundle as `pod/ID.json`, and as the mark `deleted`.
    container: &'static str,
    /// The same where systemd makes the cgroups.
    systemd: &'static str,
    /// `pause.json` of a sandbox that no OCI runtime knows.
    sandbox: &'static str,
    options: &'static str,
    address: &'static str,
    pid: &'static str,
    started: &'static str,
}

macro_rules! golden {
    ($release:literal) => {
        Golden {
            container: include_str!(concat!("golden/", $release, "/container/pause.json")),
            systemd: include_str!(concat!("golden/", $release, "/systemd/pause.json")),
            sandbox: include_str!(concat!("golden/", $release, "/sandbox/pause.json")),
            options: include_str!(concat!("golden/", $release, "/options.json")),
            address: include_str!(concat!("golden/", $release, "/address")),
            pid: include_str!(concat!("golden/", $release, "/shim.pid")),
            started: include_str!(concat!("golden/", $release, "/shim.started")),
        }
    };
}

/// A row for each release that has changed a file; this release's is the last.
const GOLDEN: [Golden; 1] = [golden!("0.1")];

const CHANGED: &str = "this release writes something else than its golden files have: has a release been made with these \
                       files? Then they stay, and new ones come beside them (docs/changing.md, \"A file in the bundle\")";

fn of_a_container(bundle: &str, systemd_cgroup: bool, cgroups_path: &str) -> Record {
    Record {
        bundle: bundle.into(),
        mounts_rootfs: true,
        runc: Some(RuncRecord {
            binary: "runc".into(),
            root: "/run/containerd/runc/k8s.io".into(),
            systemd_cgroup,
        }),
        systemd_cgroup,
        cgroups_path: Some(cgroups_path.into()),
    }
}

/// The records of the golden files: a container's, one with systemd's cgroups, a sandbox's.
fn golden_records() -> [Record; 3] {
    let container = of_a_container("/bundles/web", false, "/kubepods/pod1/web");
    let systemd = of_a_container(
        "/bundles/web",
        true,
        "kubepods-pod1.slice:cri-containerd:web",
    );
    let sandbox = Record {
        bundle: "/bundles/pod1".into(),
        mounts_rootfs: false,
        runc: None,
        ..of_a_container("", false, "/kubepods/pod1/pod1")
    };
    [container, systemd, sandbox]
}

/// Each option with another value than its default.
fn golden_options() -> Options {
    Options {
        binary_name: "/usr/local/sbin/runc".into(),
        root: "/run/runc".into(),
        systemd_cgroup: true,
        no_pivot_root: true,
        no_new_keyring: true,
        shim_cgroup: Some("/shims".into()),
        io_uid: 1000,
        io_gid: 1001,
        criu_image_path: Some("/images".into()),
        criu_work_path: Some("/work".into()),
        criu_path: None,
        holder: Holder::Process,
        shortcuts: false,
        sandbox_start_timeout: 60,
    }
}

fn value(text: &str) -> Value {
    serde_json::from_str(text).unwrap()
}

#[test]
fn the_files_of_every_release_are_read_to_the_same_values() {
    for golden in &GOLDEN {
        let (first, own) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        std::fs::create_dir(first.path().join(POD)).unwrap();
        let texts = [golden.container, golden.systemd, golden.sandbox];
        for (text, record) in texts.into_iter().zip(golden_records()) {
            std::fs::write(own.path().join(RECORD), text).unwrap();
            assert_eq!(Record::load(own.path()).unwrap().unwrap(), record);
            std::fs::write(member(first.path(), "web"), text).unwrap();
            let [(id, known)] = &members(first.path()).unwrap()[..] else {
                panic!("one member")
            };
            assert_eq!((id.as_str(), known.as_ref().unwrap()), ("web", &record));
        }
        let mark = tempfile::tempdir().unwrap();
        std::fs::write(mark.path().join("deleted"), golden.container).unwrap();
        assert!(is_deleted(mark.path()));

        for (name, text) in [
            ("options.json", golden.options),
            ("shim.pid", golden.pid),
            ("shim.started", golden.started),
        ] {
            std::fs::write(own.path().join(name), text).unwrap();
        }
        assert_eq!(Options::kept(own.path()).unwrap(), golden_options());
        let pid = read_pid(&own.path().join(SHIM_PID)).unwrap();
        assert_eq!(pid.as_raw_nonzero().get(), 4711);
        assert_eq!(shim_started(own.path()), Some(1_234_567));
    }
}

#[test]
fn this_release_writes_its_golden_files() {
    let golden = GOLDEN.last().unwrap();
    let texts = [golden.container, golden.systemd, golden.sandbox];
    for (text, record) in texts.into_iter().zip(golden_records()) {
        let dir = tempfile::tempdir().unwrap();
        record.write(&dir.path().join("pause.json")).unwrap();
        let written = std::fs::read_to_string(dir.path().join("pause.json")).unwrap();
        assert_eq!(value(&written), value(text), "{CHANGED}");
    }
    let dir = tempfile::tempdir().unwrap();
    golden_options().keep(dir.path()).unwrap();
    let written = std::fs::read_to_string(dir.path().join("options.json")).unwrap();
    assert_eq!(value(&written), value(golden.options), "{CHANGED}");
    save_address(dir.path(), Path::new("/run/containerd/s/0123abcd")).unwrap();
    let written = std::fs::read_to_string(dir.path().join("address")).unwrap();
    assert_eq!(written, golden.address, "{CHANGED}");
}

/// `text` with one more key in each of its objects.
fn with_unknown_keys(text: &str) -> String {
    let mut value = value(text);
    if value["runc"].is_object() {
        value["runc"]["of a later release"] = json!([1]);
    }
    value["of a later release"] = json!({ "any": "thing" });
    value.to_string()
}

#[test]
fn what_a_later_release_has_added_is_ignored() {
    let dir = tempfile::tempdir().unwrap();
    let golden = GOLDEN.last().unwrap();
    let texts = [golden.container, golden.systemd, golden.sandbox];
    for (text, record) in texts.into_iter().zip(golden_records()) {
        std::fs::write(dir.path().join(RECORD), with_unknown_keys(text)).unwrap();
        assert_eq!(Record::load(dir.path()).unwrap().unwrap(), record);
    }
    let options = with_unknown_keys(golden.options);
    std::fs::write(dir.path().join("options.json"), options).unwrap();
    assert_eq!(Options::kept(dir.path()).unwrap(), golden_options());
}

#[test]
fn an_option_that_an_earlier_release_did_not_have_has_its_default() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("options.json"), "{}").unwrap();
    assert_eq!(Options::kept(dir.path()).unwrap(), Options::default());
}
