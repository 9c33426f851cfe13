//! cgroup v2: controllers and the freezer. Documentation/admin-guide/cgroup-v2.rst.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use super::files::Table;
use super::{Backoff, before, failed, write};
use crate::error::IoError;

/// Enables the controllers of the cgroup at `path` for its children. Each controller takes a write of its own: one that
/// the kernel refuses (such as the cpu controller while realtime processes exist) must not keep out the others.
pub(super) fn enable_controllers(path: &Path) {
    let available = fs::read_to_string(path.join("cgroup.controllers")).unwrap_or_default();
    for controller in available.split_ascii_whitespace() {
        if let Err(error) = write(path, "cgroup.subtree_control", &format!("+{controller}")) {
            log::debug!(controller, error:%; "controller not enabled");
        }
    }
}

/// Freezes the cgroup and waits until every process is frozen.
pub(super) fn freeze(path: &Path, patience: Duration) -> Result<(), IoError> {
    write(path, "cgroup.freeze", "1")?;
    wait_for(path, 1, patience).map_err(failed("freeze the cgroup", path))
}

/// Thaws the cgroup and waits until every process is thawed.
pub(super) fn thaw(path: &Path, patience: Duration) -> Result<(), IoError> {
    write(path, "cgroup.freeze", "0")?;
    wait_for(path, 0, patience).map_err(failed("thaw the cgroup", path))
}

/// Whether the cgroup is told to freeze.
pub(super) fn is_frozen(path: &Path) -> Result<bool, IoError> {
    let file = path.join("cgroup.freeze");
    let text = fs::read_to_string(&file).map_err(failed("read", &file))?;
    Ok(text.trim() == "1")
}

fn wait_for(path: &Path, frozen: u64, patience: Duration) -> io::Result<()> {
    let deadline = Instant::now() + patience;
    let mut backoff = Backoff::default();
    loop {
        if Table::parse(&fs::read_to_string(path.join("cgroup.events"))?).get("frozen") == frozen {
            return Ok(());
        }
        if !before(deadline) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        backoff.sleep();
    }
}
