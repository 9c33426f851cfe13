//! systemd's unit of a container's cgroup, and its end.
//!
//! ```text
//!  the last process ends ──▶ cgroup.events: populated 0 ──▶ systemd: the scope is dead ──▶ removes the cgroup,
//!                                                                    │                      forgets the unit,
//!                                                                    ▼                      removes the unit's file
//!                                                           failed: the unit stays, with its file
//! ```
//!
//! The file of a unit that a program has asked for lies in `/run/systemd/transient` as long as systemd has the unit
//! (systemd.unit(5)). When the file has gone, nothing of the unit is left to be stopped or reset.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::inotify;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::time::timeout;

use super::Driver;
use super::paths::cgroups_path;
use crate::kernel::blocking;

/// The folder of such units' files.
const TRANSIENT: &str = "/run/systemd/transient";

/// How long systemd may take: a few times what an idle one takes. Who gives up lets the runtime ask systemd, and that takes
/// longer.
const PATIENCE: Duration = Duration::from_millis(50);

/// A unit of systemd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    file: PathBuf,
}

impl Unit {
    /// The unit of the OCI spec's `linux.cgroupsPath`, in systemd's form. None if the path names none.
    pub fn of(path: &str) -> Option<Self> {
        Self::below(Path::new(TRANSIENT), path)
    }

    fn below(transient: &Path, path: &str) -> Option<Self> {
        let path = cgroups_path(path, Driver::Systemd).ok()?;
        Some(Self {
            file: transient.join(path.file_name()?),
        })
    }

    /// Waits until systemd has forgotten the unit, whose processes have ended. False where systemd takes too long, keeps a
    /// unit that has failed, or cannot be seen.
    pub async fn is_gone(&self) -> bool {
        let Some(folder) = self.file.parent().filter(|folder| folder.is_dir()) else {
            return false;
        };
        if !self.file.exists() {
            return true;
        }
        let Some(mut watch) = watch(folder) else {
            return false;
        };
        let gone = timeout(PATIENCE, self.end(&mut watch)).await;
        // Closing an inotify(7) descriptor takes some 15 ms.
        blocking::spawn(|| drop(watch));
        gone.unwrap_or(false)
    }

    /// False if the kernel tells no more.
    async fn end(&self, watch: &mut pipe::Receiver) -> bool {
        while self.file.exists() {
            if !matches!(watch.read(&mut [0; 4096]).await, Ok(1..)) {
                return false;
            }
        }
        true
    }
}

/// The removals in a folder.
fn watch(folder: &Path) -> Option<pipe::Receiver> {
    let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
    let events = inotify::init(flags).ok()?;
    inotify::add_watch(&events, folder, inotify::WatchFlags::DELETE).ok()?;
    pipe::Receiver::from_owned_fd_unchecked(events).ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::fs;

    use super::*;

    #[tokio::test]
    async fn a_unit_is_gone_with_its_file() {
        let folder = tempfile::tempdir().unwrap();
        let unit = Unit::below(folder.path(), "a-b.slice:cri-containerd:1").unwrap();
        assert!(unit.is_gone().await);
        let file = folder.path().join("cri-containerd-1.scope");
        fs::write(&file, "").unwrap();
        assert!(!unit.is_gone().await);
        let other = folder.path().join("cri-containerd-2.scope");
        fs::write(&other, "").unwrap();
        let removed = tokio::spawn(async move {
            tokio::task::yield_now().await;
            fs::remove_file(&other).unwrap();
            tokio::task::yield_now().await;
            fs::remove_file(&file).unwrap();
        });
        assert!(unit.is_gone().await);
        removed.await.unwrap();
    }

    #[tokio::test]
    async fn where_systemd_cannot_be_seen_nothing_is_known() {
        let folder = tempfile::tempdir().unwrap();
        let absent = folder.path().join("transient");
        let unit = Unit::below(&absent, "system.slice::1").unwrap();
        assert!(!unit.is_gone().await);
        assert_eq!(Unit::below(&absent, "/kubepods/1"), None);
    }
}
