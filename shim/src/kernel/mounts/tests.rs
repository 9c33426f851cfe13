//! These tests make real mounts, below a directory of their own, and need root.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::symlink;
use std::path::PathBuf;

use rustix::fs::{CWD, RenameFlags};
use rustix::mount::{MountFlags, MountPropagationFlags};

use super::options::{MountOptions, Remount, present_flags, relative_layers};
use super::table::{mounts_in, unescape};
use super::*;

/// A directory whose drop takes away all mounts below, also after a failed test.
struct Scratch(tempfile::TempDir);

impl Scratch {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn directory(&self, name: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn mounts(&self) -> usize {
        mounts_that(|mount| mount.target.starts_with(self.0.path()))
            .unwrap()
            .len()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = unmount_below(self.0.path());
    }
}

fn mount(kind: &str, source: &Path, options: &[&str]) -> Mount {
    Mount {
        kind: kind.to_owned(),
        source: source.to_str().unwrap().to_owned(),
        target: String::new(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
    }
}

fn tmpfs() -> Mount {
    mount("tmpfs", Path::new("tmpfs"), &["size=64k", "nosuid"])
}

fn source_kind(result: Result<Mounted, IoError>) -> io::ErrorKind {
    result.unwrap_err().source.kind()
}

#[test]
fn the_mount_table_is_read_with_its_escapes_and_tags() {
    let text = b"36 35 98:0 /mnt1 /mnt\\0402 rw,noatime master:1 shared:7 - ext3 /dev/root rw,errors=continue\n\
        40 31 0:37 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct\n\
        not a mount\n";
    let expected = [
        ("/mnt1", "/mnt 2", "ext3", "rw,errors=continue"),
        (
            "/",
            "/sys/fs/cgroup/cpu,cpuacct",
            "cgroup",
            "rw,cpu,cpuacct",
        ),
    ];
    let table = mounts_in(&text[..], |_| true).unwrap();
    assert_eq!(table.len(), expected.len());
    for (mount, (root, target, kind, options)) in table.iter().zip(expected) {
        assert_eq!(
            (&*mount.root, &*mount.target),
            (Path::new(root), Path::new(target))
        );
        assert_eq!((&*mount.kind, &*mount.super_options), (kind, options));
    }
    let kept = mounts_in(&text[..], |mount| mount.kind == "cgroup").unwrap();
    assert_eq!(kept, table[1..]);
    assert_eq!(unescape(b"a\\134040\\011\\9"), "a\\040\t\\9");
    assert_eq!(unescape(b"ends in \\04"), "ends in \\04");
    assert_eq!(unescape(b"\\777"), "\\777");
}

#[test]
fn options_are_sorted_into_flags_propagation_and_data() {
    let words = [
        "ro",
        "nosuid",
        "suid",
        "rbind",
        "rslave",
        "lowerdir=/a:/b",
        "mode=755",
        "defaults",
    ];
    let options = MountOptions::parse(&words.map(str::to_owned)).unwrap();
    assert_eq!(
        options.flags.set,
        MountFlags::RDONLY | MountFlags::BIND | MountFlags::REC
    );
    assert_eq!(options.flags.cleared, MountFlags::NOSUID);
    assert_eq!(
        options.flags.propagation,
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC
    );
    assert_eq!(options.flags.remount, Remount::No);
    assert_eq!(options.data, ["lowerdir=/a:/b", "mode=755"]);
}

#[test]
fn what_is_not_supported_is_refused_by_name() {
    let scratch = Scratch::new();
    let error = mount_all(
        &[mount("tmpfs", Path::new("x"), &["loop"])],
        scratch.0.path(),
    )
    .unwrap_err();
    assert_eq!(error.source.kind(), io::ErrorKind::Unsupported);
    assert!(error.to_string().contains("loop"), "{error}");
    let fuse = mount("fuse3.fuse-overlayfs", Path::new("x"), &[]);
    assert_eq!(
        source_kind(mount_all(&[fuse], scratch.0.path())),
        io::ErrorKind::Unsupported
    );
    let internal = mount("tmpfs", Path::new("x"), &["X-containerd.mkdir.path=/x"]);
    assert_eq!(
        source_kind(mount_all(&[internal], scratch.0.path())),
        io::ErrorKind::InvalidInput
    );
    assert_eq!(scratch.mounts(), 0);
}

#[test]
fn layers_become_relative_to_their_common_parent() {
    let relative = |layers| {
        relative_layers(layers)
            .map(|(parent, layers)| (parent.to_str().unwrap().to_owned(), layers))
    };
    let some = |parent: &str, layers: &str| Some((parent.to_owned(), layers.to_owned()));
    assert_eq!(relative("/s/12/fs:/s/1/fs"), some("/s", "12/fs:1/fs"));
    assert_eq!(
        relative("/s/12/fs:/s/12/fs/sub"),
        some("/s/12", "fs:fs/sub")
    );
    assert_eq!(relative("/s/12/fs"), some("/s/12", "fs"));
    assert_eq!(relative("/s/1::/s/2"), some("/s", "1::2"));
    assert_eq!(relative("/a/1:/b/1"), None);
    assert_eq!(relative("a/1:a/2"), None);
    assert_eq!(relative("/s/1\\:2:/s/3"), None);
}

#[test]
fn a_read_only_bind_mount_is_read_only_and_keeps_the_flags_of_its_source() {
    let scratch = Scratch::new();
    let (source, rootfs) = (scratch.directory("source"), scratch.directory("rootfs"));
    let _source_mounted = mount_all(&[tmpfs()], &source).unwrap();
    fs::write(source.join("file"), "text").unwrap();

    let _mounted = mount_all(
        &[mount(
            "bind",
            &source,
            &["rbind", "ro", "nodev", "rprivate"],
        )],
        &rootfs,
    )
    .unwrap();
    assert_eq!(fs::read_to_string(rootfs.join("file")).unwrap(), "text");
    let error = fs::write(rootfs.join("file"), "new").unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    let flags = present_flags(&rootfs).unwrap();
    assert!(
        flags.contains(MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOSUID),
        "{flags:?}"
    );

    fs::write(source.join("file"), "the source stays writable").unwrap();
}

#[test]
fn an_option_by_name_takes_a_flag_of_the_source_away() {
    let scratch = Scratch::new();
    let (source, rootfs) = (scratch.directory("source"), scratch.directory("rootfs"));
    let _source_mounted = mount_all(&[tmpfs()], &source).unwrap();
    let _mounted = mount_all(
        &[mount(
            "bind",
            &source,
            &["bind", "suid", "noexec", "noatime"],
        )],
        &rootfs,
    )
    .unwrap();
    let flags = present_flags(&rootfs).unwrap();
    assert!(!flags.contains(MountFlags::NOSUID), "{flags:?}");
    assert!(
        flags.contains(MountFlags::NOEXEC | MountFlags::NOATIME),
        "{flags:?}"
    );
}

#[test]
fn an_overlay_of_sixty_layers_with_long_paths_is_mounted() {
    let scratch = Scratch::new();
    let long = format!("snapshots-{}", "x".repeat(120));
    let layers: Vec<_> = (0..60)
        .map(|number| {
            let layer = scratch.directory(&format!("{long}/{number}/fs"));
            fs::write(layer.join(format!("file{number}")), number.to_string()).unwrap();
            fs::write(layer.join("top"), number.to_string()).unwrap();
            layer.to_str().unwrap().to_owned()
        })
        .collect();
    let (upper, work) = (scratch.directory("upper"), scratch.directory("work"));
    let rootfs = scratch.directory("rootfs");
    let options = [
        format!("workdir={}", work.display()),
        format!("upperdir={}", upper.display()),
        format!("lowerdir={}", layers.join(":")),
    ];
    assert!(options[2].len() > 2 * 4096);
    let cwd = std::env::current_dir().unwrap();

    let options: Vec<_> = options.iter().map(String::as_str).collect();
    let mounted = mount_all(&[mount("overlay", Path::new("overlay"), &options)], &rootfs).unwrap();

    assert_eq!(std::env::current_dir().unwrap(), cwd);
    for number in 0..60 {
        assert_eq!(
            fs::read_to_string(rootfs.join(format!("file{number}"))).unwrap(),
            number.to_string()
        );
    }
    assert_eq!(fs::read_to_string(rootfs.join("top")).unwrap(), "0");
    fs::write(rootfs.join("new"), "").unwrap();
    assert!(upper.join("new").exists());
    assert!(mounted.unmount().is_empty());
    assert_eq!(scratch.mounts(), 0);
}

#[test]
fn data_that_the_kernel_would_cut_off_is_refused() {
    let scratch = Scratch::new();
    let option = format!("size=64k,{}", "x".repeat(rustix::param::page_size()));
    let result = mount_all(
        &[mount("tmpfs", Path::new("x"), &[&option])],
        scratch.0.path(),
    );
    assert_eq!(source_kind(result), io::ErrorKind::InvalidInput);
}

#[test]
fn a_failure_leaves_nothing_mounted() {
    let scratch = Scratch::new();
    let rootfs = scratch.directory("rootfs");
    let unknown = mount("no-such-filesystem", Path::new("x"), &[]);
    mount_all(&[tmpfs(), tmpfs(), unknown], &rootfs).unwrap_err();
    assert_eq!(scratch.mounts(), 0);

    // The kernel takes only one kind of propagation: the first step of the mount succeeds, the second fails.
    let torn = mount("tmpfs", Path::new("x"), &["private", "shared"]);
    let error = mount_all(&[tmpfs(), torn], &rootfs).unwrap_err();
    assert_eq!(error.operation, "set the propagation of");
    assert_eq!(scratch.mounts(), 0);
}

#[test]
fn a_target_is_found_inside_the_root_filesystem_whatever_its_links_say() {
    let scratch = Scratch::new();
    let rootfs = scratch.directory("rootfs");
    let outside = scratch.directory("outside");
    let first = mount_all(&[tmpfs()], &rootfs).unwrap();
    let inside = rootfs.join(outside.strip_prefix("/").unwrap());
    fs::create_dir_all(&inside).unwrap();
    symlink(&outside, rootfs.join("link")).unwrap();
    symlink("../../../../link", rootfs.join("up")).unwrap();

    let bound = Mount {
        target: "/up".to_owned(),
        ..mount("tmpfs", Path::new("x"), &["ro"])
    };
    let second = mount_all(&[bound], &rootfs).unwrap();
    assert_eq!(second.points(), [inside.canonicalize().unwrap()]);
    assert!(fs::write(inside.join("file"), "").is_err());
    fs::write(outside.join("file"), "").unwrap();

    let missing = Mount {
        target: "missing".to_owned(),
        ..tmpfs()
    };
    assert_eq!(
        source_kind(mount_all(&[missing], &rootfs)),
        io::ErrorKind::NotFound
    );
    assert!(second.unmount().is_empty() && first.unmount().is_empty());
    assert_eq!(scratch.mounts(), 0);
}

#[test]
fn a_bind_mount_below_the_root_gets_its_flags() {
    let scratch = Scratch::new();
    let (source, rootfs) = (scratch.directory("source"), scratch.directory("rootfs"));
    scratch.directory("rootfs/sub");
    let bound = Mount {
        target: "sub".to_owned(),
        ..mount("bind", &source, &["bind", "ro", "private"])
    };
    let mounted = mount_all(&[bound], &rootfs).unwrap();
    assert!(fs::write(rootfs.join("sub/file"), "").is_err());
    fs::write(rootfs.join("file"), "").unwrap();
    assert!(mounted.unmount().is_empty());
}

#[test]
fn a_remount_changes_what_is_there() {
    let scratch = Scratch::new();
    let rootfs = scratch.directory("rootfs");
    let again = mount("tmpfs", Path::new("x"), &["remount", "ro"]);
    let mounted = mount_all(&[tmpfs(), again], &rootfs).unwrap();
    assert_eq!(mounted.points().len(), 1);
    assert!(fs::write(rootfs.join("file"), "").is_err());
    assert!(mounted.unmount().is_empty());
    assert_eq!(scratch.mounts(), 0);
}

#[test]
fn stacked_mounts_all_go_even_if_one_is_busy() {
    let scratch = Scratch::new();
    let rootfs = scratch.directory("rootfs");
    let _mounted = mount_all(&[tmpfs(), tmpfs(), tmpfs()], &rootfs).unwrap();
    assert_eq!(scratch.mounts(), 3);
    let _busy = fs::File::create(rootfs.join("open")).unwrap();
    unmount(&rootfs).unwrap();
    assert_eq!(scratch.mounts(), 0);
    unmount(&rootfs).unwrap();
    unmount(&rootfs.join("missing")).unwrap();
}

#[test]
fn unmount_does_not_follow_a_link() {
    let scratch = Scratch::new();
    let rootfs = scratch.directory("rootfs");
    let mounted = mount_all(&[tmpfs()], &rootfs).unwrap();
    let link = scratch.0.path().join("link");
    symlink(&rootfs, &link).unwrap();
    unmount(&link).unwrap();
    assert_eq!(scratch.mounts(), 1);
    assert!(mounted.unmount().is_empty());
}

#[test]
fn everything_below_a_directory_goes_and_nothing_beside_it() {
    let scratch = Scratch::new();
    let bundle = scratch.directory("bundle");
    let beside = scratch.directory("bundle2");
    let kept = mount_all(&[tmpfs()], &beside).unwrap();
    let inner = scratch.directory("bundle/root fs\\x");
    let _inner = mount_all(&[tmpfs(), tmpfs()], &inner).unwrap();
    fs::create_dir(inner.join("deep")).unwrap();
    let _deep = mount_all(&[tmpfs()], &inner.join("deep")).unwrap();
    // The last mount hides the others and must go first.
    let _over = mount_all(&[tmpfs()], &bundle).unwrap();
    assert_eq!(scratch.mounts(), 5);

    let failures = unmount_below(&bundle);
    assert!(failures.is_empty(), "{failures:?}");
    assert_eq!(scratch.mounts(), 1);
    assert!(unmount_below(&bundle).is_empty());
    assert!(unmount_below(&bundle.join("missing")).is_empty());
    assert!(kept.unmount().is_empty());
}

/// Somebody else writes in the root filesystem: a directory on the way to the mount point is exchanged for a link that
/// leads out, again and again.
#[test]
fn no_step_of_a_mount_follows_a_link_that_comes_between() {
    let scratch = Scratch::new();
    let (source, rootfs) = (scratch.directory("source"), scratch.directory("rootfs"));
    scratch.directory("rootfs/way/sub");
    let outside = scratch.directory("outside/sub");
    let _outside_mounted = mount_all(&[tmpfs()], &outside).unwrap();
    symlink(outside.parent().unwrap(), rootfs.join("link")).unwrap();
    let (way, link) = (rootfs.join("way"), rootfs.join("link"));
    let device = |path: &Path| fs::metadata(path).unwrap().dev();
    let there = device(&outside);
    let exchange = || rustix::fs::renameat_with(CWD, &way, CWD, &link, RenameFlags::EXCHANGE);

    let torn = ["bind", "ro", "private", "shared"];
    let made = std::thread::scope(|scope| {
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        scope.spawn(move || {
            while stopped.try_recv() == Err(std::sync::mpsc::TryRecvError::Empty) {
                exchange().unwrap();
            }
        });
        let made = (0..10_000).filter(|round| {
            // Every second mount fails after its first step, and is taken away again.
            let options = if round % 2 == 0 { &torn[..3] } else { &torn };
            let bound = Mount {
                target: "way/sub".to_owned(),
                ..mount("bind", &source, options)
            };
            let mounted = mount_all(&[bound], &rootfs);
            let flags = present_flags(&outside).unwrap();
            assert!(
                !flags.contains(MountFlags::RDONLY),
                "outside, round {round}"
            );
            assert_eq!(
                device(&outside),
                there,
                "outside was unmounted, round {round}"
            );
            mounted.is_ok_and(|mounted| mounted.unmount().is_empty())
        });
        let made = made.count();
        drop(stop);
        made
    });
    assert!(made > 0, "no mount was made");
    assert_eq!(scratch.mounts(), 1);
}

#[test]
fn a_new_filesystem_inside_the_root_is_as_private_as_the_root() {
    let scratch = Scratch::new();
    // As in a systemd machine: the bundle is on a shared mount.
    let bundle = scratch.directory("bundle");
    let _shared = mount_all(&[mount("tmpfs", Path::new("x"), &["shared"])], &bundle).unwrap();
    let rootfs = scratch.directory("bundle/rootfs");
    let _root = mount_all(&[mount("tmpfs", Path::new("x"), &["private"])], &rootfs).unwrap();
    let sub = scratch.directory("bundle/rootfs/sub");
    let inside = |options: &[&str]| Mount {
        target: "sub".to_owned(),
        ..mount("tmpfs", Path::new("x"), options)
    };
    for (options, shared) in [(&["nosuid"] as &[_], false), (&["shared"], true)] {
        let mounted = mount_all(&[inside(options)], &rootfs).unwrap();
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let at = format!(" {} ", sub.display());
        let line = table.lines().find(|line| line.contains(&at)).unwrap();
        assert_eq!(line.contains(" shared:"), shared, "{line}");
        assert!(!bundle.join("beside").exists());
        assert!(mounted.unmount().is_empty());
    }
    // A failure leaves nothing, either.
    mount_all(&[inside(&["private", "shared"])], &rootfs).unwrap_err();
    let unknown = Mount {
        target: "sub".to_owned(),
        ..mount("no-such-filesystem", Path::new("x"), &[])
    };
    mount_all(&[unknown], &rootfs).unwrap_err();
    assert!(!bundle.join("beside").exists());
    assert_eq!(scratch.mounts(), 2);
}

/// Maps root to user 100000 and group 200000.
const MAPPED: [&str; 2] = ["uidmap=0:100000:65536", "gidmap=0:200000:65536"];

fn owner(path: &Path) -> (u32, u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.uid(), metadata.gid())
}

#[test]
fn a_bind_mount_has_the_owners_that_are_asked_for() {
    let scratch = Scratch::new();
    let (source, rootfs) = (scratch.directory("source"), scratch.directory("rootfs"));
    fs::write(source.join("file"), "text").unwrap();
    std::os::unix::fs::chown(source.join("file"), Some(7), Some(8)).unwrap();
    for access in ["rw", "ro"] {
        let options = [MAPPED[0], MAPPED[1], access, "rbind"];
        let mounted = mount_all(&[mount("bind", &source, &options)], &rootfs).unwrap();
        assert_eq!(owner(&rootfs.join("file")), (100_007, 200_008));
        assert_eq!(owner(&source.join("file")), (7, 8));
        assert_eq!(fs::write(rootfs.join("file"), "").is_ok(), access == "rw");
        assert_eq!(scratch.mounts(), 1);
        assert!(mounted.unmount().is_empty());
    }
    assert_eq!(scratch.mounts(), 0);
}

#[test]
fn a_new_filesystem_has_the_owners_that_are_asked_for() {
    let scratch = Scratch::new();
    let rootfs = scratch.directory("rootfs");
    let tmpfs = mount("tmpfs", Path::new("tmpfs"), &[MAPPED[0], MAPPED[1]]);
    let mounted = mount_all(&[tmpfs], &rootfs).unwrap();
    assert_eq!(owner(&rootfs), (100_000, 200_000));
    assert_eq!(scratch.mounts(), 1);
    assert!(mounted.unmount().is_empty());
}

#[test]
fn the_layers_of_an_overlay_have_the_owners_that_are_asked_for() {
    let scratch = Scratch::new();
    for number in [1, 60] {
        let long = format!("snapshots-{number}{}", "x".repeat(120));
        let layers: Vec<_> = (0..number)
            .map(|number| {
                let layer = scratch.directory(&format!("{long}/{number}/fs"));
                fs::write(layer.join(format!("file{number}")), "").unwrap();
                layer.to_str().unwrap().to_owned()
            })
            .collect();
        let (upper, work) = (scratch.directory("upper"), scratch.directory("work"));
        let rootfs = scratch.directory("rootfs");
        let [work, upper, lower] = [
            format!("workdir={}", work.display()),
            format!("upperdir={}", upper.display()),
            format!("lowerdir={}", layers.join(":")),
        ];
        let options = [MAPPED[0], MAPPED[1], &work, &upper, &lower];
        let overlay = mount("overlay", Path::new("overlay"), &options);
        let mounted = mount_all(&[overlay], &rootfs).unwrap();
        for number in 0..number {
            let file = rootfs.join(format!("file{number}"));
            assert_eq!(owner(&file), (100_000, 200_000));
        }
        assert_eq!(owner(Path::new(&layers[0])), (0, 0));
        assert_eq!(scratch.mounts(), 1);
        assert!(!scratch.0.path().join("layers").exists());
        assert!(mounted.unmount().is_empty());
    }
    assert_eq!(scratch.mounts(), 0);
}

#[test]
fn owners_that_cannot_be_given_are_refused_and_nothing_stays() {
    let scratch = Scratch::new();
    let rootfs = scratch.directory("rootfs");
    let bad_lists = [
        "uidmap=",
        "uidmap=0:1",
        "gidmap=0:1:0",
        "gidmap=0:1:1,x",
        "uidmap=0:1:2:3",
    ];
    for options in bad_lists
        .iter()
        .map(std::slice::from_ref)
        .chain([&MAPPED[..1]])
    {
        let refused = mount_all(&[mount("tmpfs", Path::new("x"), options)], &rootfs).unwrap_err();
        assert_eq!(refused.source.kind(), io::ErrorKind::InvalidInput);
        assert!(refused.to_string().contains("map="), "{refused}");
    }
    // A map need not include root. An id outside of the map shows as nobody (65534).
    let some = mount("tmpfs", Path::new("x"), &["uidmap=7:5:1", "gidmap=8:6:1"]);
    let mounted = mount_all(&[some], &rootfs).unwrap();
    assert_eq!(owner(&rootfs), (65534, 65534));
    assert!(mounted.unmount().is_empty());
    // The kernel maps no ids on proc.
    let proc = mount("bind", Path::new("/proc"), &[MAPPED[0], MAPPED[1], "rbind"]);
    let refused = mount_all(&[proc, tmpfs()], &rootfs).unwrap_err();
    assert_eq!(refused.source.kind(), io::ErrorKind::Unsupported);
    assert!(refused.to_string().contains("/proc"), "{refused}");
    // The layers can be mounted, the overlay cannot.
    let lower = format!("lowerdir={}", scratch.directory("lower").display());
    let torn = mount(
        "overlay",
        Path::new("x"),
        &[MAPPED[0], MAPPED[1], &lower, "nonsense"],
    );
    mount_all(&[tmpfs(), torn], &rootfs).unwrap_err();
    assert_eq!(scratch.mounts(), 0);
    assert!(!scratch.0.path().join("layers").exists());
}
