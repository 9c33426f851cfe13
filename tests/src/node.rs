//! A node with a real systemd as PID 1, in namespaces of its own, and containerd as one of its services.
//!
//! The root file system is `target/lab/node`, which nothing writes to. The node's processes are in a cgroup of the slot,
//! so the slot's takedown ends them, and the mounts go with the processes. cgroup v2 is what the node sees; where the
//! machine's controllers are in v1 hierarchies, the node has none, and its containers no limits.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::image;
use crate::lab::{self, ShimUnderTest, Version};
use crate::leaks;
use crate::proc::{self, Process};
use crate::slot::Slot;
use crate::takedown::{Guard, take_down};
use crate::until::{eventually, ok_if};

/// As Debian's package has it, without the lines that need more capabilities than this machine's root may have.
const UNIT: &str = "[Service]
Type=notify
ExecStart=/data/bin/containerd --config /data/config.toml
Environment=PATH=/data/bin:/usr/sbin:/usr/bin:/sbin:/bin
Delegate=yes
KillMode=process
Restart=always
RestartSec=5
TasksMax=infinity
";

/// A node that is up.
pub struct Node {
    slot: Slot,
    guard: Guard,
    unshare: Child,
    init: Process,
    shim: ShimUnderTest,
}

impl Node {
    /// Boots a node whose containerd has this shim.
    ///
    /// # Errors
    /// Why the namespaces, the mounts or the cgroup of a node cannot be made on this machine.
    pub fn boot(version: Version, shim: ShimUnderTest) -> Result<Self, String> {
        let Some(cgroup2) = cgroup2() else {
            return Err("no cgroup2 file system is mounted".to_owned());
        };
        let root = lab::node();
        let slot = Slot::take();
        let left = take_down(&slot.names);
        assert!(left.is_empty(), "of an earlier run: {left:?}");
        let guard = Guard::start(&slot);
        let data = slot.directory().join("node");
        fs::create_dir_all(data.join("bin")).unwrap();
        fs::write(data.join("containerd.service"), UNIT).unwrap();
        fs::write(data.join("config.toml"), config(version)).unwrap();
        fs::copy(image::busybox(), data.join("busybox.tar")).unwrap();
        let cgroup = cgroup2.join(slot.names.name()).join("node");
        fs::create_dir_all(&cgroup).map_err(|error| format!("{}: {error}", cgroup.display()))?;
        let mut node = Self {
            unshare: unshare(&cgroup, &root, &data, version, shim),
            init: Process::of(1).unwrap(),
            slot,
            guard,
            shim,
        };
        node.init = node.wait_for_systemd()?;
        node.run(&["systemctl", "start", "containerd"]);
        node.run(&["ctr", "images", "import", "/data/busybox.tar"]);
        Ok(node)
    }

    /// Waits until systemd is PID 1 and has started everything.
    fn wait_for_systemd(&mut self) -> Result<Process, String> {
        let parent = self.unshare.id().cast_signed();
        let unshare = &mut self.unshare;
        let init = eventually(Duration::from_secs(20), || {
            if let Ok(Some(status)) = unshare.try_wait() {
                return Ok(Err(status));
            }
            let mut children = proc::children(parent).into_iter();
            let init = children.find(|child| child.name == "systemd");
            init.map(Ok).ok_or_else(|| "no systemd".to_owned())
        });
        let init = init.map_err(|status| format!("{status}: {}", self.console()))?;
        eventually(Duration::from_secs(20), || {
            let output = enter(init.pid, &["systemctl", "is-system-running"]);
            let state = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            let up = ["running", "degraded"].contains(&state.as_str());
            ok_if(up, || format!("systemd is {state:?}: {}", self.console()))
        });
        Ok(init)
    }

    fn console(&self) -> String {
        let console = fs::read_to_string(self.slot.directory().join("console"));
        let console = console.unwrap_or_default();
        let last: Vec<&str> = console.lines().rev().take(5).collect();
        last.into_iter().rev().collect::<Vec<_>>().join("; ")
    }

    /// Runs a command in the node, which must succeed: its output.
    #[track_caller]
    pub fn run(&self, command: &[&str]) -> String {
        let output = enter(self.init.pid, command);
        assert!(
            output.status.success(),
            "{command:?}: {output:?}; {}",
            self.console()
        );
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// `ctr run --detach` of a shell command.
    #[track_caller]
    pub fn run_container(&self, id: &str, script: &str) {
        let runtime = self.shim.runtime_type();
        // Without CPU shares, because the node's cgroups may have no controllers.
        let run = [
            "ctr",
            "run",
            "--detach",
            "--cpu-shares",
            "0",
            "--runtime",
            runtime,
        ];
        self.run(&[&run[..], &[image::BUSYBOX, id, "sh", "-c", script]].concat());
    }

    /// The node's processes that the kernel knows by this name, of at most 15 bytes.
    pub fn processes_named(&self, name: &str) -> Vec<Process> {
        let mut found = self.processes();
        found.retain(|process| process.name == name);
        found
    }

    fn processes(&self) -> Vec<Process> {
        leaks::processes(&self.slot.names)
    }

    /// `systemctl poweroff`: the time until PID 1 has ended. Gives up after two minutes.
    #[track_caller]
    pub fn power_off(mut self) -> Duration {
        let begin = Instant::now();
        self.run(&["systemctl", "--no-block", "poweroff"]);
        while self.unshare.try_wait().unwrap().is_none() {
            assert!(
                begin.elapsed() < Duration::from_secs(120),
                "the node is up after two minutes: {:?}; {}",
                self.processes(),
                self.console()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
        begin.elapsed()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // The kernel ends all of the node with its PID 1, and that with the death of `unshare`.
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
        let left = take_down(&self.slot.names);
        self.guard.dismiss();
        assert!(
            left.is_empty() || std::thread::panicking(),
            "cannot be removed: {left:?}"
        );
    }
}

/// The first mount of cgroup v2.
fn cgroup2() -> Option<PathBuf> {
    let mounted = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounted.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        let point = left.split_whitespace().nth(4)?;
        right.starts_with("cgroup2 ").then(|| PathBuf::from(point))
    })
}

/// Starts PID 1: in the cgroup first, where the node's cgroup namespace then begins.
fn unshare(
    cgroup: &Path,
    root: &Path,
    data: &Path,
    version: Version,
    shim: ShimUnderTest,
) -> Child {
    let console = fs::File::create(data.with_file_name("console")).unwrap();
    let namespaces =
        "unshare --pid --fork --kill-child --mount --uts --ipc --net --cgroup -- \"$@\"";
    let binaries = version.binaries();
    // `SHIM_BINARY` may have any name; containerd looks for one.
    let program = data.with_file_name(shim.binary_name());
    std::os::unix::fs::symlink(shim.binary(version), &program).unwrap();
    Command::new("sh")
        .arg("-euc")
        .arg(format!(
            "echo $$ >\"$CGROUP/cgroup.procs\"; exec {namespaces}"
        ))
        .arg("sh")
        .arg(lab::repository().join("tests/node/boot"))
        .args([root, data])
        .args([binaries.join("containerd"), binaries.join("ctr")])
        .args([program, lab::runc()])
        .env("CGROUP", cgroup)
        .stdin(Stdio::null())
        .stdout(console.try_clone().unwrap())
        .stderr(console)
        .spawn()
        .unwrap()
}

/// Runs a command in the namespaces of PID 1.
fn enter(init: i32, command: &[&str]) -> Output {
    Command::new("nsenter")
        .args(["--all", "--target", &init.to_string(), "env", "-i"])
        .arg("PATH=/data/bin:/usr/sbin:/usr/bin:/sbin:/bin")
        .args(command)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// containerd's configuration: the usual places, and its root where an overlay can be made.
fn config(version: Version) -> String {
    let format = if version < Version::V2_0 { 2 } else { 3 };
    format!(
        "version = {format}\nroot = '/data/root'\n[plugins.'io.containerd.internal.v1.opt']\npath = '/data/opt'\n"
    )
}
