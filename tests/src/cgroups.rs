//! The cgroup files of a process, whichever version of cgroups the machine has.

use std::fs;
use std::path::{Path, PathBuf};

/// The version of cgroups that has the controllers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hierarchy {
    /// Version 1: a hierarchy per controller.
    V1,
    /// Version 2: one hierarchy.
    V2,
}

/// The version on this machine.
pub fn hierarchy() -> Hierarchy {
    if Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        Hierarchy::V2
    } else {
        Hierarchy::V1
    }
}

/// The folder of a controller with all cgroups.
pub fn root(controller: &str) -> PathBuf {
    let root = Path::new("/sys/fs/cgroup");
    match hierarchy() {
        Hierarchy::V1 => root.join(controller),
        Hierarchy::V2 => root.to_owned(),
    }
}

/// The folder of a process's cgroup under a controller; `None` on a machine without the controller.
pub fn directory(pid: i32, controller: &str) -> Option<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (names, path) = (fields.next()?, fields.next()?);
        let found = match hierarchy() {
            Hierarchy::V1 => names.split(',').any(|name| name == controller),
            Hierarchy::V2 => names.is_empty(),
        };
        found.then(|| path.trim_start_matches('/').to_owned())
    })?;
    let directory = root(controller).join(path);
    directory.is_dir().then_some(directory)
}

/// A parameter of a process's cgroup, trimmed. `v1` and `v2` are the names of the file under the two versions; each
/// begins with the controller's name.
#[track_caller]
pub fn parameter(pid: i32, v1: &str, v2: &str) -> String {
    let name = match hierarchy() {
        Hierarchy::V1 => v1,
        Hierarchy::V2 => v2,
    };
    let controller = name.split('.').next().unwrap_or_default();
    let file = directory(pid, controller)
        .unwrap_or_else(|| panic!("process {pid} has no cgroup with {controller}"))
        .join(name);
    fs::read_to_string(&file)
        .unwrap_or_else(|error| panic!("{}: {error}", file.display()))
        .trim()
        .to_owned()
}
