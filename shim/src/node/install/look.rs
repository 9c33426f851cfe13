//! What there is on the node: containerd's release, its configuration, its files, and what an earlier run has put there.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use super::super::config::Config;
use super::super::containerd::Containerd;
use super::super::kubelet::{self, CgroupDriver};
use super::plan::{self, Found, PROGRAM};
use super::text;
use crate::error::{Error, IoError, Result};
use crate::kernel::cgroup::Driver;
use crate::runtime::options::DEFAULT_FILE;

/// Looks at what [`plan`] decides by.
///
/// # Errors
/// The errors of containerd's program, and `Io`.
pub(super) fn look(containerd: &Containerd) -> Result<Found> {
    let version = containerd.version()?;
    let dump = text::parse(&containerd.dump()?)?;
    // A containerd without its own file imports nothing.
    let paths = match containerd.config.exists() {
        true => Config::of(&dump).files(&containerd.config),
        false => Vec::new(),
    };
    let mut found = Found {
        version,
        config: containerd.config.clone(),
        files: Vec::new(),
        dump,
        search_path: std::env::split_paths(&containerd.search_path).collect(),
        kubelet: cgroup_driver(read(kubelet::CONFIG)?.as_deref()),
        options: read(DEFAULT_FILE)?,
        program: read_bytes(PROGRAM)?,
        drop_in: None,
    };
    found.drop_in = read(plan::drop_in(&found))?;
    for path in paths {
        if found.files.iter().all(|(known, _)| *known != path)
            && let Some(text) = read(&path)?
        {
            found.files.push((path, text));
        }
    }
    Ok(found)
}

/// The cgroup driver that the kubelet's configuration names; none where the node's `runc` has to say.
fn cgroup_driver(config: Option<&str>) -> Option<Driver> {
    match CgroupDriver::parse(config?) {
        CgroupDriver::Set(driver) => Some(driver),
        CgroupDriver::NoFile | CgroupDriver::Unset | CgroupDriver::Unknown(_) => None,
    }
}

/// This program's own bytes, whatever has become of its file.
///
/// # Errors
/// `Io`.
pub(super) fn this_program() -> Result<Vec<u8>> {
    const SELF: &str = "/proc/self/exe";
    Ok(fs::read(SELF).map_err(IoError::at("read", SELF))?)
}

fn read_bytes(path: impl AsRef<Path>) -> Result<Option<Vec<u8>>> {
    match fs::read(path.as_ref()) {
        Ok(content) => Ok(Some(content)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(IoError::at("read", path)(error).into()),
    }
}

/// The text of a file; none if there is no such file.
///
/// # Errors
/// `Io`, and `FailedPrecondition` for what is no text.
pub(super) fn read(path: impl AsRef<Path>) -> Result<Option<String>> {
    let Some(content) = read_bytes(path.as_ref())? else {
        return Ok(None);
    };
    let text = String::from_utf8(content);
    Ok(Some(text.map_err(|_| {
        Error::FailedPrecondition(format!("{} is no UTF-8 text", path.as_ref().display()))
    })?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kubelets_driver_is_read() {
        for (text, driver) in [
            (
                "apiVersion: x\ncgroupDriver: systemd\nclusterDNS:\n",
                Some(Driver::Systemd),
            ),
            (
                "cgroupDriver: \"cgroupfs\" # ours\n",
                Some(Driver::Cgroupfs),
            ),
            ("x:\n  cgroupDriver: systemd\n", None),
            ("# cgroupDriver: systemd\n", None),
            ("cgroupDriver:\n", None),
        ] {
            assert_eq!(cgroup_driver(Some(text)), driver, "{text}");
        }
    }
}
