//! The containerds and the shims of the tests, and the places of their binaries.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A containerd that the tests run on. `tests/lab/prepare` puts each into `target/lab/<line>/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    /// 1.6.20, Debian 12.
    V1_6,
    /// 1.7.24, Debian 13.
    V1_7,
    /// 2.1.9, Debian unstable.
    V2_1,
    /// 2.1.9, with pods made through the Sandbox API (`sandboxer = "shim"`), without any pause image.
    V2_1SandboxApi,
}

impl Version {
    /// `1.6`, `1.7`, `2.1`: also the folder's name.
    pub fn line(self) -> &'static str {
        match self {
            Self::V1_6 => "1.6",
            Self::V1_7 => "1.7",
            Self::V2_1 | Self::V2_1SandboxApi => "2.1",
        }
    }

    /// The pause image that this version looks for when nothing else is configured.
    pub fn pause_image(self) -> Option<&'static str> {
        match self {
            Self::V1_6 => Some("registry.k8s.io/pause:3.6"),
            Self::V1_7 => Some("registry.k8s.io/pause:3.8"),
            Self::V2_1 => Some("registry.k8s.io/pause:3.10"),
            Self::V2_1SandboxApi => None,
        }
    }

    /// Whether a pod's sandbox is a task to containerd, with a task's events.
    pub fn sandboxes_are_tasks(self) -> bool {
        self != Self::V2_1SandboxApi
    }

    /// The folder with containerd, ctr and containerd-shim-runc-v2.
    pub fn binaries(self) -> PathBuf {
        lab().join(self.line())
    }
}

/// The shim that the suite runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ShimUnderTest {
    /// This project's shim.
    Pause,
    /// The containerd version's own `containerd-shim-runc-v2`. A test that passes on both expects nothing special of
    /// ours.
    Runc,
}

impl ShimUnderTest {
    /// The shim named by `SHIM_UNDER_TEST`; ours when the variable is not set.
    pub fn get() -> Self {
        match std::env::var("SHIM_UNDER_TEST").as_deref() {
            Err(_) | Ok("" | "pause") => Self::Pause,
            Ok("runc") => Self::Runc,
            Ok(other) => panic!("SHIM_UNDER_TEST={other}: it is `pause` (default) or `runc`"),
        }
    }

    /// The `runtime_type` in containerd's configuration.
    pub fn runtime_type(self) -> &'static str {
        match self {
            Self::Pause => "io.containerd.pause.v2",
            Self::Runc => "io.containerd.runc.v2",
        }
    }

    /// The name of the binary.
    pub fn binary_name(self) -> &'static str {
        match self {
            Self::Pause => "containerd-shim-pause-v2",
            Self::Runc => "containerd-shim-runc-v2",
        }
    }

    /// The binary itself.
    pub fn binary(self, version: Version) -> PathBuf {
        match self {
            Self::Pause => our_shim(),
            Self::Runc => version.binaries().join(self.binary_name()),
        }
    }
}

/// Says that a test was left out, and why: on stderr, and once in `target/lab/left-out.txt`. See [`crate::left_out`].
pub fn left_out(test: &str, reason: &str) {
    eprintln!("left out: {test}: {reason}");
    let line = format!("{test}: {reason}\n");
    let list = lab().join("left-out.txt");
    if !std::fs::read_to_string(&list)
        .unwrap_or_default()
        .contains(&line)
    {
        let mut list = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(list)
            .unwrap();
        list.write_all(line.as_bytes()).unwrap();
    }
}

/// The workspace's folder.
pub fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_path_buf()
}

/// Cargo's target folder.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository().join("target"), PathBuf::from)
}

/// `target/lab`, or `LAB_DIR`.
pub fn lab() -> PathBuf {
    std::env::var_os("LAB_DIR").map_or_else(|| target().join("lab"), PathBuf::from)
}

/// Whether the machine has a file of options for our shim. The shim reads the file where a handler has no options.
pub fn has_options_of_the_machine() -> bool {
    Path::new("/etc/containerd-shim-pause-v2/config.toml").exists()
}

/// The folder with the CNI plugins.
pub fn cni_plugins() -> PathBuf {
    lab().join("host/cni")
}

/// A PATH with `first`, the lab's runc, and the places where iptables, mount and ip live.
pub fn path(first: &Path) -> OsString {
    let mut folders = vec![first.to_path_buf(), lab().join("host")];
    folders.extend(
        [
            "/usr/local/sbin",
            "/usr/local/bin",
            "/usr/sbin",
            "/usr/bin",
            "/sbin",
            "/bin",
        ]
        .map(PathBuf::from),
    );
    std::env::join_paths(folders).unwrap()
}

/// Runs `tests/lab/prepare`, which returns at once when the lab is there.
pub fn prepare() {
    run_prepare(&[]);
}

/// An OCI runtime that is newer than the machine's: the path of `runc` (1.3, which can do user namespaces with
/// containerd 2.x), of `runc-1.1.15` (which copies itself into memory), or of `crun`.
pub fn newer_runtime(name: &str) -> PathBuf {
    run_prepare(&["runtimes"]);
    lab().join("runtimes").join(name)
}

/// The folder with dockerd and docker, those of the Debian that has this containerd.
pub fn docker(version: Version) -> PathBuf {
    run_prepare(&["docker"]);
    lab().join("docker").join(version.line())
}

/// The root file system of a [`crate::node`].
pub fn node() -> PathBuf {
    run_prepare(&["node"]);
    lab().join("node")
}

fn run_prepare(what: &[&str]) {
    if crate::vm::inside() {
        return;
    }
    let script = repository().join("tests/lab/prepare");
    let output = Command::new(&script)
        .args(what)
        .env("LAB_DIR", lab())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{} failed:\n{}",
        script.display(),
        String::from_utf8_lossy(&output.stderr)
    );
}

/// The helper program of the tests, `probe`: see `tests/probe/main.rs`.
pub fn probe() -> PathBuf {
    helper("probe")
}

/// A helper program of the tests: `probe` or `fake-runc`.
pub fn helper(name: &str) -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    // A test binary is in <profile>/deps, the helper beside it in <profile>.
    let profile = exe.parent().and_then(Path::parent).unwrap();
    let helper = [profile.join(name), exe.parent().unwrap().join(name)]
        .into_iter()
        .find(|path| path.exists());
    helper.unwrap_or_else(|| {
        panic!(
            "no `{name}` beside {}: build with `cargo build -p shim-tests`",
            exe.display()
        )
    })
}

/// Our shim: `SHIM_BINARY`, else the newest release build in the target folder.
fn our_shim() -> PathBuf {
    if let Some(binary) = std::env::var_os("SHIM_BINARY") {
        let binary = PathBuf::from(binary);
        assert!(
            binary.is_file(),
            "SHIM_BINARY={}: no such file",
            binary.display()
        );
        return std::fs::canonicalize(binary).unwrap();
    }
    let name = ShimUnderTest::Pause.binary_name();
    let triple = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let found = [
        target().join(triple).join("release").join(name),
        target().join("release").join(name),
    ]
    .into_iter()
    .find(|binary| binary.is_file());
    found.unwrap_or_else(|| {
        panic!(
            "no {name} in {}: run `make build` first, or set SHIM_BINARY",
            target().display()
        )
    })
}
