//! Control groups: where the kernel counts, limits, freezes and finds the processes of a container.
//!
//! ```text
//!   v1   /sys/fs/cgroup/memory/<path>        one directory in each hierarchy, and each hierarchy has
//!        /sys/fs/cgroup/cpu,cpuacct/<path>   its own controllers
//!        /sys/fs/cgroup/freezer/<path>
//!
//!   v2   /sys/fs/cgroup/<path>               one directory for all controllers
//! ```
//!
//! A machine with v1 may have an empty v2 hierarchy beside it ("hybrid"); that one is ignored, but for what a killed runc
//! left there. The root of a hierarchy is the node itself and never a container: what would change it, or list it, is
//! refused.
//!
//! The kernel's side: Documentation/admin-guide/cgroup-v2.rst, …/cgroup-v1/, cgroups(7). All waits are bounded, and all
//! functions block; call them where blocking is allowed.

mod oom;
mod parse;
mod processes;
mod v1;
mod v2;

#[cfg(test)]
mod tests;

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use rustix::io::Errno;
use rustix::process::Pid;

pub use self::oom::OomKills;
pub use self::processes::MoveInPlace;
use crate::error::IoError;

/// Where every distribution mounts them.
const ROOT: &str = "/sys/fs/cgroup";

/// Exists if systemd is the init of this system, see `sd_booted(3)`.
const SYSTEMD_RUNS: &str = "/run/systemd/system";

/// The list of a cgroup's processes; a pid written to it moves that process there.
const PROCS: &str = "cgroup.procs";

/// How long a cgroup whose last process has just gone may say that it is busy.
const PATIENCE_TO_REMOVE: Duration = Duration::from_millis(200);

/// Which version of cgroups has the controllers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Hierarchy {
    /// Version 1, also with an unused version 2 beside it.
    V1,
    /// Version 2, also called unified.
    V2,
}

impl Hierarchy {
    /// What this machine has: the filesystem at `/sys/fs/cgroup` tells.
    ///
    /// # Errors
    /// What statfs(2) says.
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

/// Who makes the cgroups of containers, and so the form of the OCI spec's `linux.cgroupsPath`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Driver {
    /// The runtime, by mkdir: a path such as `/kubepods/pod1/container1`.
    Cgroupfs,
    /// systemd: `slice:prefix:name`, such as `kubepods-pod1.slice:cri-containerd:container1`.
    Systemd,
}

impl Driver {
    /// The one for a container with this `linux.cgroupsPath`: systemd, if the option `SystemdCgroup` says so, or if the
    /// path has the form that only systemd's driver reads, on a node that systemd runs. The kubelet's driver decides on
    /// the form. To the other driver it would name a directory `kubepods-….slice:cri-containerd:…` in the root, outside
    /// of the pod's limits, and nobody would be told.
    pub fn choose(systemd_cgroup: bool, cgroups_path: Option<&str>) -> Self {
        let systemd_runs = || Path::new(SYSTEMD_RUNS).is_dir();
        Self::of(systemd_cgroup || (cgroups_path.is_some_and(parse::is_systemds) && systemd_runs()))
    }

    /// The one that has been chosen.
    pub fn of(systemd_cgroup: bool) -> Self {
        if systemd_cgroup {
            Self::Systemd
        } else {
            Self::Cgroupfs
        }
    }
}

/// A cgroup, which need not exist.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    hierarchy: Hierarchy,
    /// v1: one for each hierarchy. v2: exactly one.
    directories: Vec<Directory>,
    /// v1: its place in the v2 hierarchy beside it, where nothing is to be found out. runc makes it there, too.
    beside: Option<Directory>,
}

/// A cgroup in one hierarchy.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Directory {
    /// v1: the hierarchy's controllers, or its name as `name=systemd`. v2: empty, all controllers are here.
    controllers: Vec<String>,
    /// The hierarchy's root.
    root: PathBuf,
    path: PathBuf,
}

impl Cgroup {
    /// The cgroup that a process is in. It must be alive: v1 says `/` for a process that has exited.
    ///
    /// # Errors
    /// `NotFound`, or `ESRCH`, if there is no such process; what reading its cgroups says; `InvalidInput` for a path that
    /// leads out of the shim's cgroup namespace.
    pub fn of_pid(pid: Pid) -> Result<Self, IoError> {
        let source = PathBuf::from(format!("/proc/{}/cgroup", pid.as_raw_nonzero()));
        let text = fs::read_to_string(&source)
            .map_err(failed("read the cgroups of a process from", &source))?;
        let memberships = parse::memberships(&text).map_err(failed("understand", &source))?;
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

    /// The cgroup that the OCI spec's `linux.cgroupsPath` names. A path that is not absolute counts from the root, too.
    ///
    /// # Errors
    /// `InvalidInput` for a path that is empty, leads upwards, or is not of the driver's form.
    pub fn at(cgroups_path: &str, driver: Driver) -> Result<Self, IoError> {
        let path = parse::cgroups_path(cgroups_path, driver).map_err(failed(
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
                // Only for the controllers' names: which of a mount's options is one, the mount table does not tell.
                let names = text
                    .lines()
                    .filter_map(|line| line.split(':').nth(1))
                    .map(parse::controllers);
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

    /// A cgroup v2 whose root is not `/sys/fs/cgroup`.
    #[cfg(test)]
    fn v2_at(root: &Path, path: &str) -> Self {
        Self {
            hierarchy: Hierarchy::V2,
            directories: vec![Directory::new(root, Path::new(path))],
            beside: None,
        }
    }

    /// An error instead of a cgroup that is in no hierarchy.
    fn or_nowhere(self, source: &Path) -> Result<Self, IoError> {
        if self.directories.is_empty() {
            return Err(failed("find a mounted cgroup hierarchy for", source)(
                io::ErrorKind::NotFound.into(),
            ));
        }
        Ok(self)
    }

    /// The one that this one is in; of the root, the root.
    pub fn parent(&self) -> Self {
        let mut parent = self.clone();
        for directory in parent.directories.iter_mut().chain(&mut parent.beside) {
            if directory.path != directory.root {
                directory.path.pop();
            }
        }
        parent
    }

    /// Which version of cgroups this one is of.
    #[cfg(test)]
    pub fn hierarchy(&self) -> Hierarchy {
        self.hierarchy
    }

    /// Where a controller has this cgroup; `None` if no hierarchy has that controller. v2 has all in one place,
    /// whether enabled or not. The directory need not exist.
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

    /// Makes it in every hierarchy, with the parents that are missing. It may exist. v1: the cpus and memory nodes of
    /// new cpusets are their parent's, without which no process could join. v2: the controllers of a new parent are
    /// enabled for its children, as far as they go. What was made is removed again if something fails.
    ///
    /// # Errors
    /// What mkdir(2) and writing the parameters say; `InvalidInput` for the root.
    pub fn create(&self) -> Result<(), IoError> {
        let mut made = Vec::new();
        let result = self.directories.iter().try_for_each(|directory| {
            directory.refuse_root("create the cgroup")?;
            self.create_directory(directory, &mut made)
        });
        if result.is_err() {
            for path in made.iter().rev() {
                if let Err(error) = fs::remove_dir(path) {
                    log::warn!(
                        "undo after a cgroup that could not be made: {}: {error}",
                        path.display()
                    );
                }
            }
        }
        result
    }

    fn create_directory(
        &self,
        directory: &Directory,
        made: &mut Vec<PathBuf>,
    ) -> Result<(), IoError> {
        let below_root =
            |path: &&Path| path.starts_with(&directory.root) && *path != directory.root;
        let mut missing: Vec<_> = directory.path.ancestors().take_while(below_root).collect();
        missing.reverse();
        for path in missing {
            match fs::create_dir(path) {
                Ok(()) => made.push(path.to_owned()),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(failed("create the cgroup", path)(error)),
            }
            match self.hierarchy {
                Hierarchy::V1 if directory.has("cpuset") => v1::inherit_cpuset(path)?,
                Hierarchy::V2 if path != directory.path => v2::enable_controllers(path),
                Hierarchy::V1 | Hierarchy::V2 => {}
            }
        }
        Ok(())
    }

    /// Moves a process into it, in every hierarchy where it exists. With the shim's own pid this is how the shim joins
    /// the cgroup of its option `shim_cgroup`.
    ///
    /// # Errors
    /// `NotFound` if it exists in no hierarchy; what the kernel says to the pid, such as `ESRCH`.
    pub fn add(&self, pid: Pid) -> Result<(), IoError> {
        let mut joined = Err(self.not_found("join the cgroup"));
        for directory in self
            .directories
            .iter()
            .filter(|directory| directory.path.is_dir())
        {
            write(&directory.path, PROCS, &pid.as_raw_nonzero().to_string())?;
            joined = Ok(());
        }
        joined
    }

    /// Removes it in every hierarchy; its parents stay. That it is not there is no failure. Goes on after a failure;
    /// what failed is returned. A cgroup with processes or children stays and is a failure (`EBUSY`).
    #[must_use = "these are failures"]
    pub fn remove(&self) -> Vec<IoError> {
        let deadline = Instant::now() + PATIENCE_TO_REMOVE;
        let remove = |directory: &Directory| {
            directory.refuse_root("remove the cgroup")?;
            remove_directory(&directory.path, deadline)
        };
        self.directories
            .iter()
            .chain(&self.beside)
            .filter_map(|directory| remove(directory).err())
            .collect()
    }

    /// What the kernel counted, as containerd wants it: an `io.containerd.cgroups.v1.Metrics` or `….v2.Metrics`. v1 has
    /// times in nanoseconds, v2 in microseconds. Controllers and files that are not there are left out, or zero.
    ///
    /// # Errors
    /// `NotFound` if the cgroup does not exist in any hierarchy, or is the root in all of them.
    pub fn stats(&self) -> Result<Any, IoError> {
        let operation = "read the statistics of the cgroup";
        let exists =
            |directory: &Directory| directory.path != directory.root && directory.path.is_dir();
        if !self.directories.iter().any(exists) {
            return Err(self.not_found(operation));
        }
        let (type_url, value) = match self.hierarchy {
            Hierarchy::V1 => (
                "io.containerd.cgroups.v1.Metrics",
                v1::metrics(self).write_to_bytes(),
            ),
            Hierarchy::V2 => (
                "io.containerd.cgroups.v2.Metrics",
                v2::metrics(self).write_to_bytes(),
            ),
        };
        let value =
            value.map_err(|error| failed(operation, self.any_path())(io::Error::other(error)))?;
        Ok(Any {
            type_url: type_url.to_owned(),
            value,
            ..Any::default()
        })
    }

    fn not_found(&self, operation: &'static str) -> IoError {
        failed(operation, self.any_path())(io::ErrorKind::NotFound.into())
    }

    /// A path for messages.
    fn any_path(&self) -> &Path {
        self.directories
            .first()
            .map_or(Path::new(ROOT), |directory| &directory.path)
    }
}

impl Directory {
    /// For v2. `path` is relative or counts from the root.
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

    /// An error if it is the hierarchy's root.
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

/// `path`, absolute or not, below `root`; `root` itself if it is empty.
fn below(root: &Path, path: &Path) -> PathBuf {
    path.strip_prefix("/")
        .unwrap_or(path)
        .components()
        .fold(root.to_owned(), |whole, part| whole.join(part))
}

/// Removes these cgroups, by their directories. That one is not there is no failure.
///
/// # Errors
/// At the first that has children, whose owner may want them, and at the first that the kernel refuses to remove.
pub fn remove_leaves(directories: impl Iterator<Item = PathBuf>) -> Result<(), IoError> {
    let deadline = Instant::now() + PATIENCE_TO_REMOVE;
    for directory in directories {
        let mut entries = fs::read_dir(&directory).into_iter().flatten().flatten();
        if entries.any(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            return Err(failed("remove the cgroup", &directory)(Errno::BUSY.into()));
        }
        remove_directory(&directory, deadline)?;
    }
    Ok(())
}

/// The last process may be gone and the kernel not quite done with it.
fn remove_directory(directory: &Path, deadline: Instant) -> Result<(), IoError> {
    let mut pause = Pause::default();
    loop {
        match fs::remove_dir(directory) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error)
                if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) && before(deadline) =>
            {
                pause.sleep();
            }
            Err(error) => return Err(failed("remove the cgroup", directory)(error)),
        }
    }
}

/// Sleeps between two looks: one millisecond at first, then twice as long each time, up to sixteen.
#[derive(Debug, Default)]
struct Pause {
    taken: u32,
}

impl Pause {
    fn sleep(&mut self) {
        std::thread::sleep(Duration::from_millis(1 << self.taken.min(4)));
        self.taken += 1;
    }
}

fn before(deadline: Instant) -> bool {
    Instant::now() < deadline
}

/// Writes a parameter.
fn write(directory: &Path, file: &str, value: &str) -> Result<(), IoError> {
    let path = directory.join(file);
    // Not `fs::write`: that creates, and in a cgroup's directory nothing can be created.
    let write = || {
        io::Write::write_all(
            &mut fs::OpenOptions::new().write(true).open(&path)?,
            value.as_bytes(),
        )
    };
    write().map_err(failed("write to", &path))
}

/// For `map_err`: what was tried, and on what.
fn failed(operation: &'static str, path: &Path) -> impl Fn(io::Error) -> IoError + Copy {
    move |source| IoError {
        operation,
        path: path.to_owned(),
        source,
    }
}
