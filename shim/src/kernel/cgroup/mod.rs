//! Control groups (cgroups): where the kernel counts, limits, freezes and lists the processes of a container.
//!
//! ```text
//!   v1   /sys/fs/cgroup/memory/<path>        one directory in each hierarchy;
//!        /sys/fs/cgroup/cpu,cpuacct/<path>   each hierarchy has controllers of its own
//!        /sys/fs/cgroup/freezer/<path>
//!
//!   v2   /sys/fs/cgroup/<path>               one directory for all controllers
//! ```
//!
//! A v1 machine may have an empty v2 hierarchy beside v1 ("hybrid"). The shim ignores that hierarchy, except to remove
//! what a killed runc left there. The root of a hierarchy is the node itself, never a container: the shim refuses to
//! change or list the root.
//!
//! Kernel documents: Documentation/admin-guide/cgroup-v2.rst, Documentation/admin-guide/cgroup-v1/, cgroups(7). All
//! waits are bounded. All functions block; call them where blocking is allowed.

mod files;
mod lifecycle;
mod metrics;
mod oom;
pub(crate) mod paths;
mod processes;
mod unit;
mod v1;
mod v2;

#[cfg(test)]
mod tests;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::process::Pid;

pub use self::lifecycle::remove_leaves;
pub use self::metrics::Metrics;
pub use self::oom::OomKills;
pub use self::processes::MoveInPlace;
pub use self::unit::Unit;
use crate::error::IoError;

/// The mount point of cgroups on every distribution.
const ROOT: &str = "/sys/fs/cgroup";

/// Exists if systemd is the init of this system: `sd_booted(3)`.
const SYSTEMD_RUNS: &str = "/run/systemd/system";

/// The list of a cgroup's processes. A pid written to this file moves the process into the cgroup.
const PROCS: &str = "cgroup.procs";

/// The cgroup version that has the controllers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hierarchy {
    /// Version 1, also with an unused version 2 beside it.
    V1,
    /// Version 2, also called unified.
    V2,
}

impl Hierarchy {
    /// The version of this machine, from the filesystem type at `/sys/fs/cgroup`.
    ///
    /// # Errors
    /// The error of statfs(2).
    pub fn detect() -> Result<Self, IoError> {
        let root = Path::new(ROOT);
        let stat = rustix::fs::statfs(root)
            .map_err(|error| failed("detect cgroups at", root)(error.into()))?;
        // CGROUP2_SUPER_MAGIC of linux/magic.h.
        Ok(if stat.f_type == 0x6367_7270 {
            Self::V2
        } else {
            Self::V1
        })
    }
}

/// Who makes the cgroups of containers. The driver decides the form of the OCI spec's `linux.cgroupsPath`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// The runtime, by mkdir(2): a path such as `/kubepods/pod1/container1`.
    Cgroupfs,
    /// systemd: `slice:prefix:name`, such as `kubepods-pod1.slice:cri-containerd:container1`.
    Systemd,
}

impl Driver {
    /// The driver for a container with this `linux.cgroupsPath`: the one whose form the path has, which is the kubelet's
    /// own. A path in systemd's form is systemd's where systemd runs this node, an absolute path is cgroupfs's. The
    /// option `SystemdCgroup` decides the rest.
    ///
    /// The cgroupfs driver would read systemd's form as the name of a directory, `kubepods-….slice:cri-containerd:…` in
    /// the root, outside of the pod's limits and without an error. systemd's driver refuses an absolute path: `ctr` and
    /// Docker would not start a container on a node whose kubelet wants `SystemdCgroup = true` in the options file.
    pub fn choose(systemd_cgroup: bool, cgroups_path: Option<&str>) -> Self {
        let systemd_runs = || Path::new(SYSTEMD_RUNS).is_dir();
        match cgroups_path {
            Some(path) if path.starts_with('/') => Self::Cgroupfs,
            Some(path) if paths::has_systemd_form(path) => {
                Self::of(systemd_cgroup || systemd_runs())
            }
            _ => Self::of(systemd_cgroup),
        }
    }

    /// systemd's driver if `systemd_cgroup`, otherwise cgroupfs.
    pub fn of(systemd_cgroup: bool) -> Self {
        if systemd_cgroup {
            Self::Systemd
        } else {
            Self::Cgroupfs
        }
    }
}

/// The place of a cgroup in all hierarchies. The cgroup itself need not exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    hierarchy: Hierarchy,
    /// v1: one for each hierarchy. v2: exactly one.
    directories: Vec<Directory>,
    /// v1: the same path in the v2 hierarchy beside v1. runc makes this cgroup too. The kernel counts nothing there.
    beside: Option<Directory>,
}

/// A cgroup in one hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Directory {
    /// v1: the hierarchy's controllers, or the hierarchy's name as `name=systemd`. v2: empty; the one directory has all
    /// controllers.
    controllers: Vec<String>,
    /// The hierarchy's root.
    root: PathBuf,
    path: PathBuf,
}

impl Cgroup {
    /// The cgroup of a process. The process must be alive: v1 reports `/` for a process that has exited.
    ///
    /// # Errors
    /// `NotFound` or `ESRCH` if there is no such process; the error of reading `/proc/<pid>/cgroup`; `InvalidInput` for
    /// a path that leads out of the shim's cgroup namespace.
    pub fn of_pid(pid: Pid) -> Result<Self, IoError> {
        let source = PathBuf::from(format!("/proc/{}/cgroup", pid.as_raw_nonzero()));
        let text = fs::read_to_string(&source)
            .map_err(failed("read the cgroups of a process from", &source))?;
        let memberships = paths::memberships(&text).map_err(failed("understand", &source))?;
        let hierarchy = Hierarchy::detect()?;
        let directories = match hierarchy {
            Hierarchy::V1 => {
                let mounts = v1::mounts()?;
                memberships
                    .iter()
                    .filter_map(|(controllers, path)| v1::directory(mounts, controllers, path))
                    .collect()
            }
            Hierarchy::V2 => {
                let root = Path::new(ROOT);
                let unified = memberships
                    .iter()
                    .filter(|(controllers, _)| controllers.is_empty());
                unified
                    .map(|(_, path)| Directory::new(root, path))
                    .collect()
            }
        };
        Self {
            hierarchy,
            directories,
            beside: None,
        }
        .or_nowhere(&source)
    }

    /// The cgroup that the OCI spec's `linux.cgroupsPath` names. A relative path also counts from the root.
    ///
    /// # Errors
    /// `InvalidInput` for a path that is empty, leads upwards, or does not have the driver's form.
    pub fn at(cgroups_path: &str, driver: Driver) -> Result<Self, IoError> {
        let path = paths::cgroups_path(cgroups_path, driver).map_err(failed(
            "understand the cgroups path",
            Path::new(cgroups_path),
        ))?;
        let hierarchy = Hierarchy::detect()?;
        let mut beside = None;
        let directories = match hierarchy {
            Hierarchy::V1 => {
                let source = Path::new("/proc/self/cgroup");
                let text = fs::read_to_string(source)
                    .map_err(failed("read the controllers from", source))?;
                // The mount table alone does not say which of a mount's options are controllers; this file names the
                // controllers of each hierarchy.
                let names = text
                    .lines()
                    .filter_map(|line| line.split(':').nth(1))
                    .map(paths::controllers);
                let mounts = v1::mounts()?;
                beside = mounts
                    .iter()
                    .find(|mount| mount.kind == "cgroup2")
                    .map(|mount| Directory::new(&mount.target, &path));
                v1::directories_at(mounts, names, &path)
            }
            Hierarchy::V2 => vec![Directory::new(Path::new(ROOT), &path)],
        };
        Self {
            hierarchy,
            directories,
            beside,
        }
        .or_nowhere(Path::new(cgroups_path))
    }

    /// A v2 cgroup below a root other than `/sys/fs/cgroup`.
    #[cfg(any(test, feature = "fuzzing"))]
    pub(crate) fn v2_at(root: &Path, path: &str) -> Self {
        Self {
            hierarchy: Hierarchy::V2,
            directories: vec![Directory::new(root, Path::new(path))],
            beside: None,
        }
    }

    /// A v1 cgroup below a root of the caller's own, which has these controllers.
    #[cfg(feature = "fuzzing")]
    pub(crate) fn v1_at(root: &Path, path: &str, controllers: &[&str]) -> Self {
        let mut directory = Directory::new(root, Path::new(path));
        directory.controllers = controllers.iter().map(|&name| name.to_owned()).collect();
        Self {
            hierarchy: Hierarchy::V1,
            directories: vec![directory],
            beside: None,
        }
    }

    /// Replaces a cgroup that is in no hierarchy by an error.
    fn or_nowhere(self, source: &Path) -> Result<Self, IoError> {
        if self.directories.is_empty() {
            return Err(failed("find a mounted cgroup hierarchy for", source)(
                io::ErrorKind::NotFound.into(),
            ));
        }
        Ok(self)
    }

    /// The parent cgroup. The parent of the root is the root.
    pub fn parent(&self) -> Self {
        let mut parent = self.clone();
        for directory in parent.directories.iter_mut().chain(&mut parent.beside) {
            if directory.path != directory.root {
                directory.path.pop();
            }
        }
        parent
    }

    /// The cgroup's version.
    #[cfg(test)]
    pub fn hierarchy(&self) -> Hierarchy {
        self.hierarchy
    }

    /// The cgroup's directory under a controller; `None` if no hierarchy has that controller. v2 has one directory for
    /// all controllers, enabled or not. The directory need not exist.
    pub fn directory(&self, controller: &str) -> Option<&Path> {
        self.find(controller).map(|directory| &*directory.path)
    }

    fn find(&self, controller: &str) -> Option<&Directory> {
        match self.hierarchy {
            Hierarchy::V1 => self
                .directories
                .iter()
                .find(|directory| directory.has(controller)),
            Hierarchy::V2 => self.directories.first(),
        }
    }

    fn not_found(&self, operation: &'static str) -> IoError {
        failed(operation, self.any_path())(io::ErrorKind::NotFound.into())
    }

    /// The first directory's path, for messages. v2 has no other.
    fn any_path(&self) -> &Path {
        self.directories
            .first()
            .map_or(Path::new(ROOT), |directory| &directory.path)
    }
}

impl Directory {
    /// A v2 directory. `path` counts from the root, also if relative.
    fn new(root: &Path, path: &Path) -> Self {
        Self {
            controllers: Vec::new(),
            root: root.to_owned(),
            path: below(root, path),
        }
    }

    fn has(&self, controller: &str) -> bool {
        self.controllers.iter().any(|name| name == controller)
    }

    /// An error if the directory is the hierarchy's root.
    fn refuse_root(&self, operation: &'static str) -> Result<(), IoError> {
        if self.path == self.root {
            let error = io::Error::new(
                io::ErrorKind::InvalidInput,
                "the root is the node, not a container",
            );
            return Err(failed(operation, &self.path)(error));
        }
        Ok(())
    }
}

/// `path`, absolute or relative, placed below `root`. An empty path is `root` itself.
fn below(root: &Path, path: &Path) -> PathBuf {
    path.strip_prefix("/")
        .unwrap_or(path)
        .components()
        .fold(root.to_owned(), |whole, part| whole.join(part))
}

/// Sleeps between two attempts: first 1 ms, then twice as long each time, up to 16 ms.
#[derive(Debug, Default)]
struct Backoff {
    /// The number of sleeps so far.
    taken: u32,
}

impl Backoff {
    fn sleep(&mut self) {
        std::thread::sleep(Duration::from_millis(1 << self.taken.min(4)));
        self.taken += 1;
    }
}

fn before(deadline: Instant) -> bool {
    Instant::now() < deadline
}

/// Writes `value` to a cgroup's parameter file.
fn write(directory: &Path, file: &str, value: &str) -> Result<(), IoError> {
    let path = directory.join(file);
    // Not `fs::write`, which creates missing files: the kernel lets nobody create a file in a cgroup's directory.
    let write = || {
        io::Write::write_all(
            &mut fs::OpenOptions::new().write(true).open(&path)?,
            value.as_bytes(),
        )
    };
    write().map_err(failed("write to", &path))
}

/// For `map_err`: adds the operation and the path to an error.
fn failed(operation: &'static str, path: &Path) -> impl Fn(io::Error) -> IoError + Copy {
    move |source| IoError {
        operation,
        path: path.to_owned(),
        source,
    }
}
