//! The life of a cgroup: create, join, remove.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::process::Pid;

use super::{Backoff, Cgroup, Directory, Hierarchy, PROCS, before, failed, v1, v2, write};
use crate::error::IoError;

/// How long the kernel may report a cgroup busy after the cgroup's last process has gone.
const PATIENCE_TO_REMOVE: Duration = Duration::from_millis(200);

impl Cgroup {
    /// Creates the cgroup in every hierarchy, with its missing parents. An existing cgroup is no error. A failure
    /// removes what this call created.
    ///
    /// v1: a new cpuset takes the cpus and memory nodes of its parent; without them no process could join. v2: a new
    /// parent passes its controllers on to its children, as far as the kernel allows.
    ///
    /// # Errors
    /// The errors of mkdir(2) and of writing the parameters; `InvalidInput` for the root.
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
                        cgroup:% = path.display(), error:%;
                        "cgroup stays after one that could not be made"
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

    /// Moves a process into the cgroup, in every hierarchy where the cgroup exists. With its own pid the shim joins the
    /// cgroup of the option `shim_cgroup`.
    ///
    /// # Errors
    /// `NotFound` if the cgroup exists in no hierarchy; the kernel's error for the pid, such as `ESRCH`.
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

    /// Sets the CPU weight, as cgroup v1 counts: 2 to 262144. v2 counts from 1 to 10000.
    ///
    /// # Errors
    /// `NotFound` without the controller, and the errors of write(2).
    pub fn set_cpu_shares(&self, shares: u64) -> Result<(), IoError> {
        let directory = self
            .find("cpu")
            .ok_or_else(|| self.not_found("set the CPU weight of the cgroup"))?;
        let shares = shares.clamp(2, 262_144);
        match self.hierarchy {
            Hierarchy::V1 => write(&directory.path, "cpu.shares", &shares.to_string()),
            Hierarchy::V2 => {
                let weight = 1 + (shares - 2) * 9_999 / 262_142;
                write(&directory.path, "cpu.weight", &weight.to_string())
            }
        }
    }

    /// Removes the cgroup in every hierarchy; its parents stay. A missing cgroup is no failure. A failure does not stop
    /// the removal in the other hierarchies; all failures are returned. A cgroup with processes or children stays, with
    /// the failure `EBUSY`.
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
}

/// Removes cgroups by their directories. A missing directory is no failure.
///
/// # Errors
/// Stops at the first cgroup that has children (`EBUSY`; the children's owner may need them), and at the first that the
/// kernel refuses to remove.
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

/// Retries while the cgroup is busy: the kernel may still be cleaning up after the last process.
fn remove_directory(directory: &Path, deadline: Instant) -> Result<(), IoError> {
    let mut backoff = Backoff::default();
    loop {
        match fs::remove_dir(directory) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error)
                if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) && before(deadline) =>
            {
                backoff.sleep();
            }
            Err(error) => return Err(failed("remove the cgroup", directory)(error)),
        }
    }
}
