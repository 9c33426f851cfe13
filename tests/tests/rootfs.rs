//! The root filesystem that containerd describes by mounts, sent to the shim directly. The shim mounts in the given
//! order; all mounts are gone after Delete, after `delete`, and after a failed create.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_shim_protos::types::mount::Mount;
use rustix::process::Signal;
use serde_json::json;
use shim_tests::calls::Shim;
use shim_tests::proc::{Process, kill};
use shim_tests::raw::Bundle;
use shim_tests::slot::text;
use shim_tests::{Daemon, ShimUnderTest, Version, eventually, image, on_every_containerd};

fn mount_message(kind: &str, source: &Path, options: &[&str]) -> Mount {
    Mount {
        type_: kind.to_owned(),
        source: text(source),
        options: options.iter().map(|&option| option.to_owned()).collect(),
        ..Mount::default()
    }
}

/// A folder of the slot.
fn make_folder(daemon: &Daemon, name: &str) -> PathBuf {
    let path = daemon.directory().join("rootfs").join(name);
    fs::create_dir_all(&path).unwrap();
    path
}

/// A folder with busybox in it.
fn make_busybox_folder(daemon: &Daemon) -> PathBuf {
    let path = make_folder(daemon, "busybox");
    image::unpack_busybox(&path);
    path
}

/// The mount points at or below `path`.
fn mounts_below(path: &Path) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let points = table.lines().filter_map(|line| line.split(' ').nth(4));
    points
        .filter(|point| Path::new(point).starts_with(path))
        .map(str::to_owned)
        .collect()
}

/// A container, made by hand.
struct Task<'a> {
    bundle: Bundle<'a>,
    shim: Shim,
    process: Process,
}

impl<'a> Task<'a> {
    /// Starts the shim, and makes no call yet.
    fn new(daemon: &'a Daemon, command: &[&str]) -> Self {
        Self::with(daemon, command, |_| ())
    }

    fn with(
        daemon: &'a Daemon,
        command: &[&str],
        change: impl FnOnce(&mut serde_json::Value),
    ) -> Self {
        let bundle = Bundle::new(daemon, "mounted");
        fs::remove_dir_all(bundle.path.join("rootfs")).unwrap();
        fs::create_dir(bundle.path.join("rootfs")).unwrap();
        let mut spec = bundle.plain_spec(command);
        change(&mut spec);
        let bundle = bundle.write_spec(&spec);
        let started = bundle.start(b"");
        assert!(started.status.success(), "{}", started.text());
        let shim = Shim::connect(&started);
        let process = daemon.shim();
        daemon.look();
        Self {
            bundle,
            shim,
            process,
        }
    }

    fn rootfs(&self) -> PathBuf {
        self.bundle.path.join("rootfs")
    }

    #[track_caller]
    fn create(&self, mounts: Vec<Mount>) {
        self.bundle.create_on(&self.shim, mounts).unwrap();
    }

    fn start(&self) {
        self.shim.start(&self.bundle.id, "").unwrap();
    }

    /// The exit code.
    fn wait(&self) -> u32 {
        self.shim.wait(&self.bundle.id, "").unwrap()
    }

    fn kill(&self) {
        self.shim.kill(&self.bundle.id, "", 9).unwrap();
        self.wait();
    }

    /// Delete, after which nothing may be mounted; then ends the shim.
    #[track_caller]
    fn delete(self) {
        self.shim.delete(&self.bundle.id, "").unwrap();
        assert_eq!(mounts_below(&self.bundle.path), Vec::<String>::new());
        self.end();
    }

    /// Ends the shim as containerd does after a delete or a failed create.
    fn end(self) {
        self.bundle.shut_down(&self.shim);
        eventually(Duration::from_secs(10), || {
            if self.process.alive() {
                Err("the shim stays".to_owned())
            } else {
                Ok(())
            }
        });
    }
}

/// Sixty layers whose paths together are longer than a page; the last one holds busybox.
fn sixty_layers(daemon: &Daemon) -> String {
    let layers: Vec<String> = (0..60)
        .map(|number| {
            let layer = make_folder(daemon, &format!("{}/{number}/fs", "x".repeat(100)));
            fs::write(layer.join(format!("layer-{number}")), "").unwrap();
            if number == 59 {
                image::unpack_busybox(&layer);
            }
            text(&layer)
        })
        .collect();
    let lower = format!("lowerdir={}", layers.join(":"));
    assert!(lower.len() > 4096);
    lower
}

on_every_containerd! {
    fn an_overlay_of_sixty_layers_with_long_paths(version) {
        let daemon = Daemon::start(version);
        let lower = sixty_layers(&daemon);
        let (upper, work) = (make_folder(&daemon, "upper"), make_folder(&daemon, "work"));
        let task = Task::new(&daemon, &["sh", "-c", "touch /new; exit $(ls / | grep -c layer-)"]);
        let (upper_option, work) = (format!("upperdir={}", text(&upper)), format!("workdir={}", text(&work)));
        task.create(vec![mount_message("overlay", Path::new("overlay"), &[&work, &upper_option, &lower])]);
        task.start();
        assert_eq!(task.wait(), 60);
        assert!(upper.join("new").exists());
        task.delete();
        daemon.end();
    }

    fn a_read_only_bind(version) {
        let daemon = Daemon::start(version);
        let source = make_busybox_folder(&daemon);
        for mount_point in ["proc", "dev"] {
            fs::create_dir_all(source.join(mount_point)).unwrap();
        }
        let task = Task::with(&daemon, &["sh", "-c", "touch /new || exit 30"], |spec| {
            let dev = json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs"});
            spec["mounts"].as_array_mut().unwrap().push(dev);
        });
        task.create(vec![mount_message("bind", &source, &["ro", "rbind"])]);
        task.start();
        assert_eq!(task.wait(), 30);
        assert!(!source.join("new").exists());
        task.delete();
        daemon.end();
    }

    fn mounts_on_top_of_each_other_all_go(version) {
        let daemon = Daemon::start(version);
        let source = make_busybox_folder(&daemon);
        let task = Task::new(&daemon, &["true"]);
        let tmpfs = mount_message("tmpfs", Path::new("tmpfs"), &["size=64k"]);
        task.create(vec![tmpfs.clone(), tmpfs, mount_message("bind", &source, &["rw", "rbind"])]);
        task.start();
        assert_eq!(task.wait(), 0);
        task.delete();
        daemon.end();
    }

    fn a_mount_that_fails_takes_those_before_it_away(version) {
        let daemon = Daemon::start(version);
        let source = make_busybox_folder(&daemon);
        let task = Task::new(&daemon, &["true"]);
        let mounts = vec![mount_message("bind", &source, &["rw", "rbind"]), mount_message("no-such-filesystem", &source, &[])];
        let failure = task.bundle.create_on(&task.shim, mounts).unwrap_err();
        if ShimUnderTest::get() == ShimUnderTest::Pause {
            assert!(failure.message.contains(&text(&task.rootfs())), "{failure}");
        }
        assert_eq!(mounts_below(&task.bundle.path), Vec::<String>::new());
        task.end();
        daemon.end();
    }

    fn a_create_that_fails_after_its_mounts_takes_them_away(version) {
        let daemon = Daemon::start(version);
        let source = make_busybox_folder(&daemon);
        // runc finds no program to run.
        let task = Task::with(&daemon, &[], |spec| spec["process"]["args"] = json!([]));
        task.bundle.create_on(&task.shim, vec![mount_message("bind", &source, &["rw", "rbind"])]).unwrap_err();
        assert_eq!(mounts_below(&task.bundle.path), Vec::<String>::new());
        task.end();
        daemon.end();
    }

    fn a_busy_root_filesystem_is_unmounted_all_the_same(version) {
        let daemon = Daemon::start(version);
        let source = make_busybox_folder(&daemon);
        let task = Task::new(&daemon, &["sleep", "3600"]);
        task.create(vec![mount_message("tmpfs", Path::new("tmpfs"), &["size=8m"]), mount_message("bind", &source, &["rw", "rbind"])]);
        task.start();
        let busy = fs::File::create(task.rootfs().join("open")).unwrap();
        task.kill();
        task.delete();
        drop(busy);
        daemon.end();
    }

    fn delete_unmounts_what_a_killed_shim_left(version) {
        let daemon = Daemon::start(version);
        let source = make_busybox_folder(&daemon);
        let task = Task::new(&daemon, &["sleep", "3600"]);
        let tmpfs = mount_message("tmpfs", Path::new("tmpfs"), &["size=64k"]);
        task.create(vec![tmpfs, mount_message("bind", &source, &["rw", "rbind"])]);
        task.start();
        kill(task.process.pid, Signal::KILL);
        eventually(Duration::from_secs(10), || {
            if task.process.alive() { Err("the shim stays".to_owned()) } else { Ok(()) }
        });
        assert!(!mounts_below(&task.bundle.path).is_empty());
        let deleted = task.bundle.delete();
        assert!(deleted.status.success(), "{}", deleted.text());
        assert_eq!(mounts_below(&task.bundle.path), Vec::<String>::new());
        drop(task);
        daemon.end();
    }

    fn delete_removes_the_mount_points_of_a_create_that_was_cut_short(version) {
        shim_tests::ours_only!("the bundle stays as it is");
        let daemon = Daemon::start(version);
        let source = make_busybox_folder(&daemon);
        let task = Task::new(&daemon, &["sleep", "3600"]);
        task.create(vec![mount_message("bind", &source, &["rw", "rbind"])]);
        kill(task.process.pid, Signal::KILL);
        eventually(Duration::from_secs(10), || {
            if task.process.alive() { Err("the shim stays".to_owned()) } else { Ok(()) }
        });
        // What containerd does when the connection is cut, and then an init that it did not wait for.
        let rootfs = task.rootfs();
        rustix::mount::unmount(&rootfs, rustix::mount::UnmountFlags::DETACH).unwrap();
        fs::create_dir_all(rootfs.join("dev/shm")).unwrap();
        fs::write(rootfs.join("dev/hosts"), "").unwrap();
        // Not a mount point.
        fs::write(rootfs.join("data"), "kept").unwrap();
        let deleted = task.bundle.delete();
        assert!(deleted.status.success(), "{}", deleted.text());
        let left: Vec<_> = fs::read_dir(&rootfs).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(left, ["data"]);
        // The image's own are not touched.
        assert!(source.join("bin").exists());
        drop(task);
        daemon.end();
    }

    fn layers_have_the_owners_that_are_asked_for(version) {
        if ShimUnderTest::get() == ShimUnderTest::Runc && version < Version::V2_0 {
            shim_tests::ours_only!("the shims of 1.6 and 1.7 do not know uidmap= and gidmap=");
        }
        let daemon = Daemon::start(version);
        let lower = sixty_layers(&daemon);
        let (upper, work) = (make_folder(&daemon, "upper"), make_folder(&daemon, "work"));
        std::os::unix::fs::chown(&upper, Some(100_000), Some(100_000)).unwrap();
        let script = "touch /new; test $(stat -c %u /layer-7) = 0 && test $(stat -c %u /new) = 0 && exit 60";
        let task = Task::with(&daemon, &["sh", "-c", script], |spec| {
            let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
            spec["linux"]["uidMappings"] = map.clone();
            spec["linux"]["gidMappings"] = map;
            spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
        });
        let (upper_option, work) = (format!("upperdir={}", text(&upper)), format!("workdir={}", text(&work)));
        let maps = ["uidmap=0:100000:65536", "gidmap=0:100000:65536"];
        task.create(vec![mount_message("overlay", Path::new("overlay"), &[maps[0], maps[1], &work, &upper_option, &lower])]);
        assert_eq!(fs::metadata(task.rootfs().join("layer-7")).unwrap().uid(), 100_000);
        assert_eq!(mounts_below(&task.bundle.path).len(), 1);
        task.start();
        assert_eq!(task.wait(), 60);
        assert_eq!(fs::metadata(upper.join("new")).unwrap().uid(), 100_000);
        task.delete();
        daemon.end();
    }
}
