//! The containerds and the shims of the tests, and the places of their binaries.

use std::ffi::OsString;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

/// A containerd that the tests run on: a line of releases, and how its pods are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    major: u32,
    minor: u32,
    sandbox_api: bool,
}

impl Version {
    /// 1.6.20, Debian 12.
    pub const V1_6: Self = Self::of(1, 6);
    /// 1.7.24, Debian 13.
    pub const V1_7: Self = Self::of(1, 7);
    /// 2.0, which has the Sandbox API.
    pub const V2_0: Self = Self::of(2, 0);
    /// 2.1.9, Debian unstable.
    pub const V2_1: Self = Self::of(2, 1);
    /// 2.3, which asks every shim for its features, and makes every pod through the Sandbox API that asks for that.
    pub const V2_3: Self = Self::of(2, 3);
    /// 2.4, which can do without a pause image.
    pub const V2_4: Self = Self::of(2, 4);

    /// A line of releases. Pods are made in containerd's usual mode.
    pub const fn of(major: u32, minor: u32) -> Self {
        Self {
            major,
            minor,
            sandbox_api: false,
        }
    }

    /// The same, with pods made through the Sandbox API (`sandboxer = "shim"`).
    #[must_use]
    pub const fn through_the_sandbox_api(self) -> Self {
        Self {
            sandbox_api: true,
            ..self
        }
    }

    /// The containerd of `CONTAINERD_BIN`, or the newest of `tests/lab/prepare`.
    pub fn newest() -> Self {
        Given::get().map_or(Self::V2_1, |given| given.version)
    }

    /// `1.6`, `1.7`, `2.1`: also the folder's name in the lab.
    pub fn line(self) -> String {
        format!("{}.{}", self.major, self.minor)
    }

    /// The whole version, as the containerd tells it.
    pub fn exact(self) -> String {
        match self.given() {
            Some(given) => given.exact.to_owned(),
            None => {
                let exact = std::fs::read_to_string(self.binaries().join("version"));
                exact.unwrap_or_default().trim().to_owned()
            }
        }
    }

    /// The pause image that this containerd looks for when nothing else is configured; none where no pod needs one.
    pub fn pause_image(self) -> Option<&'static str> {
        // Through the Sandbox API, 2.3 pulls the image all the same.
        if self.sandbox_api && self.line() != "2.3" {
            return None;
        }
        Some(match self.given() {
            Some(given) => given.pause_image,
            None if self < Self::V1_7 => "registry.k8s.io/pause:3.6",
            None if self < Self::V2_0 => "registry.k8s.io/pause:3.8",
            None => "registry.k8s.io/pause:3.10",
        })
    }

    /// Whether pods are made through the Sandbox API.
    pub fn sandbox_api(self) -> bool {
        self.sandbox_api
    }

    /// Whether a pod's sandbox is a task to containerd, with a task's events.
    pub fn sandboxes_are_tasks(self) -> bool {
        !self.sandbox_api
    }

    /// The folder with containerd, ctr and containerd-shim-runc-v2.
    pub fn binaries(self) -> PathBuf {
        self.given()
            .map_or_else(|| lab().join(self.line()), |given| given.folder.into())
    }

    fn given(self) -> Option<Given> {
        Given::get().filter(|given| given.version.line() == self.line())
    }
}

/// The containerd of `CONTAINERD_BIN`, as `build.rs` has found it. All tests run on that one.
#[derive(Clone, Copy)]
struct Given {
    version: Version,
    exact: &'static str,
    folder: &'static str,
    pause_image: &'static str,
}

impl Given {
    fn get() -> Option<Self> {
        let exact = option_env!("GIVEN_CONTAINERD_VERSION")?;
        let mut numbers = exact.split('.').map(|number| number.parse().unwrap());
        Some(Self {
            version: Version::of(numbers.next().unwrap(), numbers.next().unwrap()),
            exact,
            folder: option_env!("GIVEN_CONTAINERD_FOLDER")?,
            pause_image: option_env!("GIVEN_CONTAINERD_PAUSE_IMAGE")?,
        })
    }
}

/// Whether `CONTAINERD_BIN` names the containerd that the tests run on.
pub fn is_given() -> bool {
    Given::get().is_some()
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
            Self::Runc => stock_shim(version),
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

/// A PATH with `first`, the runc of the tests, and the places where iptables, mount and ip live.
pub fn path(first: &Path) -> OsString {
    let mut folders = vec![first.to_path_buf(), runc().parent().unwrap().to_owned()];
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

/// The runc that all suites use: `RUNC`, or the machine's.
pub fn runc() -> PathBuf {
    let runc = runtime_of("RUNC").unwrap_or_else(|| lab().join("host/runc"));
    assert!(
        runc.ends_with("runc"),
        "RUNC={}: name a file with the name `runc`; the shims look for that name in PATH",
        runc.display()
    );
    runc
}

/// The runc for pods with a user namespace. containerd 2.x wants 1.2 or later: `RUNC` if that is one, or the newest.
pub fn runc_for_user_namespaces() -> PathBuf {
    runtime_of("RUNC")
        .filter(|runc| runc_line(runc) >= (1, 2))
        .unwrap_or_else(|| newer_runtime("runc"))
}

/// The release of a runc: `1.3`.
pub fn runc_line(runc: &Path) -> (u32, u32) {
    let output = Command::new(runc).arg("--version").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let exact = text.lines().next().unwrap().rsplit(' ').next().unwrap();
    let mut numbers = exact.split('.').map(|number| number.parse().unwrap());
    (numbers.next().unwrap(), numbers.next().unwrap())
}

/// The crun of the suite `runtimes`: `CRUN`, or the newest.
pub fn crun() -> PathBuf {
    runtime_of("CRUN").unwrap_or_else(|| newer_runtime("crun"))
}

/// The name that a runtime must have for the shim to know it: `runc` for `runc-1.1.15`.
pub fn program_name(runtime: &Path) -> String {
    let name = runtime.file_name().unwrap().to_string_lossy();
    name.split('-').next().unwrap_or_default().to_owned()
}

/// The program that a variable names.
fn runtime_of(variable: &str) -> Option<PathBuf> {
    let named = std::env::var_os(variable).filter(|named| !named.is_empty())?;
    let program = std::path::absolute(&named).unwrap();
    assert!(
        program.is_file(),
        "{variable}={}: no such file",
        named.display()
    );
    Some(program)
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

/// The folder with dockerd and docker, those of the Debian that has this containerd, or of the newest one.
pub fn docker(version: Version) -> PathBuf {
    run_prepare(&["docker"]);
    let packaged = version.min(Version::V2_1);
    lab().join("docker").join(packaged.line())
}

/// The root file system of a [`crate::node`].
pub fn node() -> PathBuf {
    run_prepare(&["node"]);
    lab().join("node")
}

fn run_prepare(what: &[&str]) {
    if crate::vm::inside() || crate::node::inside() {
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
    helper_beside(&std::env::current_exe().unwrap(), name)
}

/// The helper program that was built with the test binary `exe`.
pub fn helper_beside(exe: &Path, name: &str) -> PathBuf {
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

fn stock_shim(version: Version) -> PathBuf {
    let shim = version.binaries().join(ShimUnderTest::Runc.binary_name());
    assert!(
        shim.is_file(),
        "no {}: put the stock shim of this containerd beside it",
        shim.display()
    );
    shim
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

/// A criu that works on this machine: the one named by `CRIU`, the installed one, or the one of `lab/prepare criu`.
///
/// # Errors
/// Why no criu works.
pub fn criu() -> Result<PathBuf, String> {
    if let Some(given) = std::env::var_os("CRIU") {
        return check_criu(PathBuf::from(given));
    }
    let path = path(&lab().join("criu"));
    let mut found = std::env::split_paths(&path)
        .map(|folder| folder.join("criu"))
        .filter(|criu| criu.is_file())
        .map(check_criu);
    let advice = "`tests/lab/prepare criu` gets the newest, for most kernels";
    match (found.next(), found.next()) {
        (Some(Ok(criu)), _) | (_, Some(Ok(criu))) => Ok(criu),
        (Some(Err(why)), _) => Err(format!("{why}: {advice}")),
        (None, _) => Err(format!("criu is not installed: {advice}")),
    }
}

fn check_criu(criu: PathBuf) -> Result<PathBuf, String> {
    let output = Command::new(&criu)
        .arg("check")
        .output()
        .map_err(|error| format!("{}: {error}", criu.display()))?;
    if output.status.success() {
        return Ok(criu);
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    let first = errors.lines().next().unwrap_or_default();
    Err(format!("{} check: {first}", criu.display()))
}
