//! What the kernel says: the mount table, mount options, the names and the files of cgroups.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::{assert_inside, assert_relative};
use crate::containerd::convert;
use crate::kernel::cgroup::{Cgroup, Driver, paths};
use crate::kernel::mounts::MountedAt;
use crate::kernel::mounts::options::{MountOptions, relative_layers};
use crate::kernel::mounts::table::mounts_in;

/// The mount table.
pub(super) fn mountinfo(data: &[u8]) {
    let read = |text: &[u8]| mounts_in(text, |_| true).unwrap_or_default();
    let mounts = read(data);
    assert!(mounts.len() <= data.split(|byte| *byte == b'\n').count());
    let again: Vec<u8> = mounts.iter().flat_map(mountinfo_line).collect();
    assert_eq!(read(&again), mounts);
}

/// A line of the mount table, as the kernel writes the line.
fn mountinfo_line(mount: &MountedAt) -> Vec<u8> {
    let escaped = |path: &Path| -> Vec<u8> {
        let escape = |byte: &u8| match byte {
            b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
            other => vec![*other],
        };
        path.as_os_str()
            .as_bytes()
            .iter()
            .flat_map(escape)
            .collect()
    };
    let fields: [&[u8]; 10] = [
        b"1",
        b"2",
        b"0:3",
        &escaped(&mount.root),
        &escaped(&mount.target),
        b"rw",
        b"-",
        mount.kind.as_bytes(),
        b"source",
        mount.super_options.as_bytes(),
    ];
    [&fields.join(&b' '), b"\n".as_slice()].concat()
}

/// The options of a mount, one a line, and the layers of an overlay.
pub(super) fn mount_options(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let options: Vec<String> = text.lines().map(str::to_owned).collect();
    if let Ok(parsed) = MountOptions::parse(&options) {
        assert!(parsed.data.len() <= options.len());
        assert!((parsed.flags.set & parsed.flags.cleared).is_empty());
    }
    for layers in &options {
        let Some((parent, relative)) = relative_layers(layers) else {
            continue;
        };
        assert!(parent.is_absolute() && parent != Path::new("/"), "{layers}");
        let whole = relative.split(':').map(|layer| match layer {
            "" => PathBuf::new(),
            layer => parent.join(layer),
        });
        let given = layers.split(':').map(PathBuf::from);
        assert!(whole.eq(given), "{layers}: {relative} in {parent:?}");
    }
}

/// The texts that name cgroups: `/proc/PID/cgroup`, and `linux.cgroupsPath`.
pub(super) fn cgroup_paths(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    for (_, path) in paths::memberships(&text).unwrap_or_default() {
        assert_relative(&path);
    }
    assert_inside(&text, Driver::Cgroupfs);
    assert_inside(&text, Driver::Systemd);
    let _ = paths::has_systemd_form(&text);
}

/// The statistics files of a cgroup: parts that begin with a line `== NAME`.
pub(super) fn cgroup_files(data: &[u8]) {
    let root = std::env::temp_dir().join(format!("shim-fuzzing-{}", std::process::id()));
    let directory = root.join("c");
    let name = |name: &&str| {
        let known = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '_';
        !name.is_empty()
            && name.len() < 64
            && name.starts_with(char::is_alphabetic)
            && name.chars().all(known)
    };
    let written = fs::create_dir_all(&directory).and_then(|()| {
        let text = String::from_utf8_lossy(data);
        let parts = text.split("== ").filter_map(|part| part.split_once('\n'));
        for (file, content) in parts.filter(|(file, _)| name(file)) {
            fs::write(directory.join(file), content)?;
        }
        Ok(())
    });
    assert!(written.is_ok(), "{written:?}");
    let controllers = [
        "cpu", "cpuacct", "memory", "pids", "blkio", "hugetlb", "rdma",
    ];
    for cgroup in [
        Cgroup::v1_at(&root, "c", &controllers),
        Cgroup::v2_at(&root, "c"),
    ] {
        let stats = cgroup.stats();
        assert!(stats.is_ok(), "{stats:?}");
        if let Ok(stats) = stats {
            assert!(!convert::metrics(&stats).value.is_empty());
        }
    }
    let removed = fs::remove_dir_all(&root);
    assert!(removed.is_ok(), "{removed:?}");
}
