//! A node with a real systemd as PID 1, in namespaces of its own.
//!
//! The root file system is `target/lab/node`, and what the node writes lies over that. The node's processes are in a cgroup
//! of the slot, so the slot's takedown ends them, and the mounts go with the processes. cgroup v2 is what the node sees;
//! where the machine's controllers are in v1 hierarchies, the node has none, and its containers no limits.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use crate::image;
use crate::lab::{self, ShimUnderTest, Version};
use crate::leaks;
use crate::proc::{self, Process};
use crate::slot::{Slot, text};
use crate::takedown::{Guard, take_down};
use crate::until::{eventually, ok_if};

const INSIDE: &str = "SHIM_TESTS_NODE";

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

/// Whether this process runs in a node, by the variable that [`Node::run_again`] sets.
pub fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs the body of a test in a node: hands the test, one of [`crate::on_every_containerd`], over to itself there.
///
/// # Errors
/// As [`Node::boot`].
#[track_caller]
pub fn in_a_node(test: &str, version: Version, body: impl FnOnce()) -> Result<(), String> {
    if inside() {
        body();
        return Ok(());
    }
    let node = Node::with_the_lab(version)?;
    let name = format!("{test}::v{}", version.line().replace('.', "_"));
    let status = node.run_again(
        &[name, "--exact".to_owned(), "--nocapture".to_owned()],
        &lab::runc(),
    );
    assert!(status.success(), "{test} in a node: {status}");
    Ok(())
}

/// A node that is up.
pub struct Node {
    slot: Slot,
    guard: Guard,
    unshare: Child,
    init: Process,
}

impl Node {
    /// Boots a node that sees these files and folders of the machine, under the same paths.
    ///
    /// # Errors
    /// Why the namespaces, the mounts or the cgroup of a node cannot be made on this machine.
    pub fn boot(paths: &[PathBuf]) -> Result<Self, String> {
        let Some(cgroup2) = cgroup2() else {
            return Err("no cgroup2 file system is mounted".to_owned());
        };
        let root = lab::node();
        let slot = Slot::take();
        let left = take_down(&slot.names);
        assert!(left.is_empty(), "of an earlier run: {left:?}");
        let guard = Guard::start(&slot);
        fs::create_dir_all(slot.directory().join("data/bin")).unwrap();
        let cgroup = cgroup2.join(slot.names.name()).join("node");
        fs::create_dir_all(&cgroup).map_err(|error| format!("{}: {error}", cgroup.display()))?;
        let mut node = Self {
            unshare: unshare(&cgroup, &root, &slot.directory(), paths),
            init: Process::of(1).unwrap(),
            slot,
            guard,
        };
        node.init = node.wait_for_systemd()?;
        Ok(node)
    }

    /// Boots a node in which a program of the tests can run, see [`Self::run_again`].
    ///
    /// # Errors
    /// As [`Self::boot`].
    pub fn with_the_lab(version: Version) -> Result<Self, String> {
        let node = Self::boot(&what_the_harness_needs(version))?;
        fs::create_dir(node.data().join("inner")).unwrap();
        Ok(node)
    }

    /// Boots a node with containerd as a service of systemd, for this shim.
    ///
    /// # Errors
    /// As [`Self::boot`].
    pub fn with_containerd(version: Version, shim: ShimUnderTest) -> Result<Self, String> {
        let node = Self::boot(&[])?;
        let data = node.data();
        let binaries = version.binaries();
        let programs = [
            ("containerd", binaries.join("containerd")),
            ("ctr", binaries.join("ctr")),
            ("runc", lab::runc()),
            // `SHIM_BINARY` may have any name; containerd looks for one.
            (shim.binary_name(), shim.binary(version)),
        ];
        for (name, program) in programs {
            fs::copy(program, data.join("bin").join(name)).unwrap();
        }
        fs::write(data.join("config.toml"), config(version)).unwrap();
        fs::copy(image::busybox(), data.join("busybox.tar")).unwrap();
        fs::write(data.join("containerd.service"), UNIT).unwrap();
        node.run(&["systemctl", "link", "/data/containerd.service"]);
        node.run(&["systemctl", "start", "containerd"]);
        node.run(&["ctr", "images", "import", "/data/busybox.tar"]);
        Ok(node)
    }

    /// What is `/data` in the node.
    pub fn data(&self) -> PathBuf {
        self.slot.directory().join("data")
    }

    /// A path of the node, as this process sees it.
    pub fn seen(&self, path: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{path}", self.init.pid))
    }

    /// Runs a command in the node: whether it succeeds, and its output and errors.
    pub fn try_run(&self, command: &[&str]) -> (bool, String) {
        let output = enter(self.init.pid, command);
        let words = [output.stdout, output.stderr].concat();
        (
            output.status.success(),
            String::from_utf8_lossy(&words).into_owned(),
        )
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

    /// Runs this program in the node, as a service of systemd, and waits for its end. What it writes goes where this
    /// process writes to. `runc` is the runc of the tests there.
    pub fn run_again(&self, arguments: &[String], runc: &Path) -> ExitStatus {
        let kept = ["SHIM_BINARY", "SHIM_UNDER_TEST", "CRUN"];
        let kept = kept
            .into_iter()
            .filter_map(|name| Some((name, std::env::var(name).ok()?)));
        let more = [
            (INSIDE, "1".to_owned()),
            // On the machine's disk, as a node's containerd is. No end of this path is the path of a slot outside, whose
            // test would take the node's processes for its own.
            ("TMPDIR", "/data/inner".to_owned()),
            ("RUNC", text(runc)),
            ("LAB_DIR", text(&lab::lab())),
            ("CARGO_TARGET_DIR", text(&lab::target())),
        ];
        let variables = kept
            .chain(more)
            .map(|(name, value)| format!("--setenv={name}={value}"));
        // With a cgroup that is the program's own, as containerd's unit has it.
        let run = ["systemd-run", "--quiet", "--collect", "--pipe", "--wait"];
        entering(self.init.pid)
            .args(run)
            .args(["--property=Delegate=yes", "--property=TasksMax=infinity"])
            .args(variables)
            .arg("--")
            .arg(std::env::current_exe().unwrap())
            .args(arguments)
            .stdin(Stdio::null())
            .status()
            .unwrap()
    }

    /// `ctr run --detach` of a shell command under this shim.
    #[track_caller]
    pub fn run_container(&self, shim: ShimUnderTest, id: &str, script: &str) {
        let runtime = shim.runtime_type();
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

/// What of the machine a program of the tests needs in a node.
fn what_the_harness_needs(version: Version) -> Vec<PathBuf> {
    let shim = ShimUnderTest::get();
    let wanted = [
        lab::repository(),
        lab::target(),
        lab::lab(),
        version.binaries(),
        shim.binary(version),
        lab::runc(),
        lab::newer_runtime("runc"),
        lab::crun(),
        // Beside a plugin are those that it calls.
        fs::canonicalize(lab::cni_plugins().join("bridge"))
            .unwrap()
            .with_file_name(""),
    ];
    let mut paths: Vec<PathBuf> = Vec::new();
    for path in wanted {
        let real = fs::canonicalize(&path).unwrap_or(path);
        if real.exists() && !paths.iter().any(|other| real.starts_with(other)) {
            paths.push(real);
        }
    }
    paths
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
fn unshare(cgroup: &Path, root: &Path, directory: &Path, paths: &[PathBuf]) -> Child {
    let console = fs::File::create(directory.join("console")).unwrap();
    let namespaces =
        "unshare --pid --fork --kill-child --mount --uts --ipc --net --cgroup -- \"$@\"";
    Command::new("sh")
        .arg("-euc")
        .arg(format!(
            "echo $$ >\"$CGROUP/cgroup.procs\"; exec {namespaces}"
        ))
        .arg("sh")
        .arg(lab::repository().join("tests/node/boot"))
        .arg(root)
        .args([directory.join("over"), directory.join("data")])
        .args(paths)
        .env("CGROUP", cgroup)
        .stdin(Stdio::null())
        .stdout(console.try_clone().unwrap())
        .stderr(console)
        .spawn()
        .unwrap()
}

/// Runs a command in the namespaces of PID 1.
fn enter(init: i32, command: &[&str]) -> Output {
    let mut entering = entering(init);
    entering
        .args(command)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// A command for the namespaces of PID 1, without its own words yet.
fn entering(init: i32) -> Command {
    let mut command = Command::new("nsenter");
    command
        .args(["--all", "--target", &init.to_string(), "env", "-i"])
        .arg("PATH=/data/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command
}

/// containerd's configuration: the usual places, and its root where an overlay can be made.
fn config(version: Version) -> String {
    let format = if version < Version::V2_0 { 2 } else { 3 };
    format!(
        "version = {format}\nroot = '/data/root'\n[plugins.'io.containerd.internal.v1.opt']\npath = '/data/opt'\n"
    )
}
