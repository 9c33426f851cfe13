//! One containerd, private to a test.

mod config;
mod ctr;
mod events;

use std::cell::{Cell, RefCell};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;

pub use self::config::{Driver, HANDLER, Handler, Network, Options};
pub use self::events::{Event, Events};
use crate::cri::Cri;
use crate::image;
use crate::lab::{self, ShimUnderTest, Version};
use crate::leaks::{self, MARK, Seen};
use crate::proc::{self, Process};
use crate::slot::{Names, Slot, text};
use crate::takedown::{Guard, take_down};
use crate::until::{eventually, ok_if};

/// A running containerd.
pub struct Daemon {
    /// The names of the containerd's slot.
    pub names: Names,
    version: Cell<Version>,
    options: Options,
    guard: RefCell<Guard>,
    process: RefCell<Option<Child>>,
    seen: RefCell<Seen>,
    cri: Cri,
    ended: Cell<bool>,
    _slot: Slot,
}

impl Daemon {
    /// Starts a containerd with the usual options.
    pub fn start(version: Version) -> Self {
        Self::with(version, &Options::default())
    }

    /// Starts a containerd with the image of nginx.
    pub fn with_nginx(version: Version) -> Self {
        Self::with(version, &Options::nginx())
    }

    /// Starts a containerd with these options.
    pub fn with(version: Version, options: &Options) -> Self {
        lab::prepare();
        let slot = Slot::take();
        let names = slot.names.clone();
        // The last user of this slot may have been killed together with its guard.
        let left = take_down(&names);
        assert!(
            left.is_empty(),
            "{} of an earlier run cannot be removed: {left:?}",
            names.name()
        );
        let guard = Guard::start(&slot);

        lay_out(&names, options);
        let daemon = Self {
            version: Cell::new(version),
            cri: Cri::new(&leaks::grpc_address(&names)),
            options: options.clone(),
            guard: RefCell::new(guard),
            process: RefCell::new(None),
            seen: RefCell::new(Seen::default()),
            ended: Cell::new(false),
            _slot: slot,
            names,
        };
        daemon.configure();
        daemon.launch();
        daemon.import_images();
        daemon
    }

    /// The version of the containerd.
    pub fn version(&self) -> Version {
        self.version.get()
    }

    fn import_images(&self) {
        self.import(&image::busybox(), image::BUSYBOX);
        self.import_pause_image();
        if self.options.nginx {
            self.import(&image::nginx(), image::NGINX);
        }
    }

    /// Each version looks for another pause image.
    fn import_pause_image(&self) {
        if let Some(name) = self.version().pause_image() {
            self.import(&image::pause(name, self.options.pause_image), name);
        }
    }

    /// Imports an image with links into `victim`, a folder of the node. Gives the image's name.
    pub fn import_trap(&self, trap: image::Trap, victim: &Path) -> String {
        let name = trap.name();
        self.import(&image::trapped(trap, victim), &name);
        name
    }

    fn import(&self, archive: &Path, name: &str) {
        self.ctr_in("k8s.io", &["images", "import", &text(archive)]);
        // CRI hears of a new image through an event, which takes a moment.
        eventually(Duration::from_secs(10), || {
            ok_if(self.cri.has_image(name), || {
                format!("CRI does not know the image {name}")
            })
        });
    }

    fn launch(&self) {
        let directory = self.directory();
        let log = fs::File::options()
            .append(true)
            .create(true)
            .open(self.log_path())
            .unwrap();
        let mut command = Command::new(self.version().binaries().join("containerd"));
        command
            .arg("--config")
            .arg(directory.join("config.toml"))
            .env("PATH", lab::path(&directory.join("bin")))
            .env(MARK, &directory)
            // containerd leaves the files of a restore there.
            .env("TMPDIR", &directory)
            .envs(
                self.options
                    .environment
                    .iter()
                    .map(|(name, value)| (name, value)),
            )
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        *self.process.borrow_mut() = Some(command.spawn().unwrap());
        eventually(Duration::from_secs(20), || {
            if let Ok(Some(status)) = self.process.borrow_mut().as_mut().unwrap().try_wait() {
                panic!("containerd ended at once, {status}:\n{}", self.log_tail(30));
            }
            self.cri.ready()
        });
    }

    /// The slot's directory.
    pub fn directory(&self) -> PathBuf {
        self.names.directory()
    }

    /// containerd's pid.
    pub fn pid(&self) -> i32 {
        self.process.borrow().as_ref().map_or_else(
            || panic!("containerd is down"),
            |child| child.id().cast_signed(),
        )
    }

    /// The cgroup parent of the pods, in the form of the cgroup driver.
    pub fn cgroup_parent(&self) -> String {
        match self.options.driver {
            Driver::Cgroupfs => self.names.cgroup_parent(),
            Driver::Systemd => self.names.slice(),
        }
    }

    /// The CRI client.
    pub fn cri(&self) -> &Cri {
        &self.cri
    }

    /// SIGKILL to containerd, and to no other process.
    pub fn kill(&self) {
        self.look();
        let mut child = self.process.borrow_mut().take().expect("containerd is up");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Starts containerd again after [`Self::kill`].
    pub fn start_again(&self) {
        assert!(self.process.borrow().is_none(), "containerd is up");
        self.launch();
    }

    /// Stops containerd, as a service manager does: SIGTERM, and no signal to any other process.
    pub fn stop(&self) {
        self.look();
        self.terminate();
    }

    /// Starts another version after [`Self::stop`], as after an upgrade or a downgrade of the node's package: on the same
    /// folders and the same address, with a configuration in this version's words, and with this version's stock shim.
    pub fn start_as(&self, version: Version) {
        assert!(self.process.borrow().is_none(), "containerd is up");
        self.version.set(version);
        self.configure();
        self.launch();
        self.import_pause_image();
    }

    /// Writes containerd's configuration, and puts the shim's binary into the folder that is first in PATH.
    fn configure(&self) {
        let version = self.version();
        let directory = self.directory();
        let shim = ShimUnderTest::get();
        let link = directory.join("bin").join(shim.binary_name());
        let _ = fs::remove_file(&link);
        std::os::unix::fs::symlink(shim.binary(version), link).unwrap();
        fs::write(
            directory.join("config.toml"),
            config::config(version, &self.names, &self.options),
        )
        .unwrap();
    }

    /// Puts a copy of the shim's binary in the binary's place, as an upgrade of the shim does: a new file, which every
    /// later `start` and `delete` runs. A running shim goes on with the old file.
    pub fn replace_shim(&self) {
        let shim = ShimUnderTest::get();
        let place = self.directory().join("bin").join(shim.binary_name());
        let new = place.with_extension("new");
        fs::copy(shim.binary(self.version()), &new).unwrap();
        fs::rename(new, place).unwrap();
    }

    /// Remembers the slot's present processes and tasks. [`Self::left`] looks for all of them, wherever they move.
    pub fn look(&self) {
        self.seen.borrow_mut().look(&self.names);
    }

    /// The slot's processes, without the children of the test itself (containerd, `ctr`).
    pub fn processes(&self) -> Vec<Process> {
        let all = leaks::processes(&self.names).into_iter();
        all.filter(|process| !leaks::is_our_own(process)).collect()
    }

    /// The shims of the slot.
    pub fn shims(&self) -> Vec<Process> {
        let name = ShimUnderTest::get().binary_name();
        let mut shims = self.processes();
        shims.retain(|process| {
            let command = process.command_line();
            let mut words = command.split(' ');
            words.next().is_some_and(|program| program.ends_with(name))
        });
        // A fork of a shim that has not executed its program yet looks like a shim.
        let pids: Vec<i32> = shims.iter().map(|shim| shim.pid).collect();
        shims.retain(|shim| !pids.contains(&shim.parent));
        shims
    }

    /// The only shim; panics unless there is exactly one.
    #[track_caller]
    pub fn shim(&self) -> Process {
        let mut shims = self.shims();
        assert_eq!(
            shims.len(),
            1,
            "one shim expected: {:?}",
            shims.iter().map(Process::describe).collect::<Vec<_>>()
        );
        shims.remove(0)
    }

    /// Starts listening to containerd's events, of all namespaces.
    pub fn events(&self) -> Events {
        Events::listen(self)
    }

    /// containerd's log.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_path()).unwrap_or_default()
    }

    /// The end of containerd's log.
    pub fn log_tail(&self, lines: usize) -> String {
        let log = self.log();
        let all: Vec<&str> = log.lines().collect();
        // Lines are cut: debug lines of CRI hold whole specs.
        let short = |line: &&str| line.chars().take(400).collect::<String>();
        all[all.len().saturating_sub(lines)..]
            .iter()
            .map(short)
            .collect::<Vec<_>>()
            .join("\n")
    }

    fn log_path(&self) -> PathBuf {
        self.directory().join("containerd.log")
    }

    /// What is left of pods and containers now, one line each. containerd itself does not count.
    pub fn left(&self) -> Vec<String> {
        let process = self.process.borrow();
        let daemon: Vec<i32> = process
            .iter()
            .map(|child| child.id().cast_signed())
            .collect();
        self.seen.borrow().left(&self.names, &daemon)
    }

    /// Fails if something is left of pods and containers after five seconds. containerd goes on.
    #[track_caller]
    pub fn assert_nothing_left(&self) {
        eventually(Duration::from_secs(5), || {
            let left = self.left();
            ok_if(left.is_empty(), || {
                format!("left behind:\n  {}", left.join("\n  "))
            })
        });
    }

    /// Stops and removes all pods and containers, fails if anything is left of them, and ends containerd.
    #[track_caller]
    pub fn end(self) {
        self.look();
        self.cri.remove_all_pods();
        let namespace = self.names.name();
        for id in self
            .ctr(&["containers", "list", "--quiet"])
            .split_whitespace()
        {
            self.try_ctr(&["tasks", "kill", "--signal", "SIGKILL", "--all", id]);
            self.try_ctr(&["tasks", "delete", "--force", id]);
            self.ctr(&["containers", "delete", id]);
            self.seen.borrow_mut().task(&namespace, id);
        }
        self.assert_nothing_left();
        self.seen.borrow().remove_traces(&self.names);
        self.terminate();
        let left = take_down(&self.names);
        assert!(left.is_empty(), "cannot be removed: {left:?}");
        self.guard.borrow_mut().dismiss();
        self.ended.set(true);
    }

    fn terminate(&self) {
        if let Some(mut child) = self.process.borrow_mut().take() {
            proc::kill(child.id().cast_signed(), Signal::TERM);
            let ended = crate::until::within(Duration::from_secs(10), || match child.try_wait() {
                Ok(Some(_)) => Ok(()),
                _ => Err("containerd does not end".to_owned()),
            });
            if ended.is_err() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

/// Makes the folders of the slot's directory, and the configuration of the network.
fn lay_out(names: &Names, options: &Options) {
    let directory = names.directory();
    for folder in ["bin", "net.d", "logs", "fifo"] {
        fs::create_dir_all(directory.join(folder)).unwrap();
    }
    fs::write(
        directory.join("net.d/10-test.conflist"),
        config::cni_config(names, options.network),
    )
    .unwrap();
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.ended.get() {
            return;
        }
        let test = std::thread::current()
            .name()
            .unwrap_or("test")
            .replace("::", ".");
        let failed = lab::lab().join("failed");
        let kept = failed.join(format!("{test}.log"));
        let _ = fs::create_dir_all(&failed);
        let _ = fs::copy(self.log_path(), &kept);
        eprintln!(
            "containerd's last lines (all of them in {}):\n{}",
            kept.display(),
            self.log_tail(40)
        );
        if let Some(mut child) = self.process.borrow_mut().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        self.seen.borrow().remove_traces(&self.names);
        let left = take_down(&self.names);
        if !left.is_empty() {
            eprintln!("cannot be removed: {left:?}");
        }
        self.guard.borrow_mut().dismiss();
    }
}
