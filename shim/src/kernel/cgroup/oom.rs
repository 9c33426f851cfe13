//! Kills for lack of memory: the kernel's counter says how many, a file descriptor says when to look.
//!
//! ```text
//!        counter of kills                         readable when it may have changed
//!   v1   memory.oom_control: oom_kill             an eventfd that cgroup.event_control knows
//!   v2   memory.events: oom_kill                  inotify on memory.events
//! ```
//!
//! The counter decides, never the notification: v1 also notifies the cgroups below the one that is full (the other
//! containers of a pod whose own limit is reached), and those that are removed; v2 notifies of limits that were only
//! touched. And the kernel counts before it sends SIGKILL, also when the whole node is short of memory. Who looks when a
//! process has ended therefore misses none of the kills before, however short its life was.
//!
//! One thing comes in between: systemd removes the cgroup of an empty scope, counter and all, and may do so before that
//! look. Then the notification that came since the last look, and the counter of the cgroup above, which includes it, tell.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::inotify;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::parse::Table;
use super::{Cgroup, Hierarchy, failed, write};
use crate::error::IoError;

/// v1 notifies before it chooses what to kill. So its counter is looked at this often, and with this pause, after a
/// notification that found it unchanged. Together one second: a kernel that writes its report to a serial console takes
/// a part of that. v2 notifies once in 10 ms at the most (CGROUP_FILE_NOTIFY_MIN_INTV), of the limit that is reached and
/// only then of the kill that follows: there it is looked at once more.
const LOOKS_V1: u32 = 20;
const LOOKS_V2: u32 = 1;
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// The kills in a cgroup since it is watched.
#[derive(Debug)]
pub struct OomKills {
    hierarchy: Hierarchy,
    /// Where the memory controller has the cgroup.
    directory: PathBuf,
    /// None once the cgroup is gone.
    notified: Option<pipe::Receiver>,
    /// Kills that somebody knows of.
    known: u64,
    /// Looks still to be taken after a notification.
    looks: u32,
    /// v2: kills in the cgroup above, at the time of the last look.
    above: u64,
    /// v2: the kernel has notified of a change, and no look has told which, or one came too early to tell.
    changed: bool,
}

impl Cgroup {
    /// Watches for kills from now on. The kernel wakes the watcher; a cgroup with memory enough costs nothing.
    ///
    /// # Errors
    /// `NotFound` if no memory controller has this cgroup; what eventfd(2), inotify(7) and the registration say.
    pub fn watch_oom_kills(&self) -> Result<OomKills, IoError> {
        let operation = "watch for kills for lack of memory in the cgroup";
        let directory = self
            .find("memory")
            .ok_or_else(|| self.not_found(operation))?;
        directory.refuse_root(operation)?;
        let path = &directory.path;
        let notified = match self.hierarchy {
            Hierarchy::V1 => v1_notifications(path)?,
            Hierarchy::V2 => v2_notifications(path)?,
        };
        // Both are read like a pipe, and so polled like one.
        let notified =
            pipe::Receiver::from_owned_fd_unchecked(notified).map_err(failed(operation, path))?;
        let mut kills = OomKills {
            hierarchy: self.hierarchy,
            directory: path.clone(),
            notified: Some(notified),
            known: 0,
            looks: 0,
            above: 0,
            changed: false,
        };
        kills.above = kills.count_above();
        kills.known = kills.count().map_err(failed(operation, path))?;
        Ok(kills)
    }
}

impl OomKills {
    /// No longer watches. The kernel takes some 15 ms to close what inotify(7) gave, and is not waited for.
    pub fn end(self) {
        if self.hierarchy == Hierarchy::V2 {
            // At the shim's end the runtime waits for it, for a while.
            drop(tokio::task::spawn_blocking(|| drop(self)));
        }
    }

    /// Resolves when there have been kills since the last one that was known. May be dropped at any time, and called
    /// again. Never resolves once the cgroup is gone.
    pub async fn next(&mut self) {
        loop {
            let Some(notified) = &mut self.notified else {
                return std::future::pending().await;
            };
            if let Some(left) = self.looks.checked_sub(1) {
                tokio::time::sleep(BETWEEN_LOOKS).await;
                self.looks = left;
            } else {
                // An eventfd gives eight bytes, inotify as many events as fit; that there was something is what counts.
                let mut buffer = [0; 512];
                match notified.read(&mut buffer).await {
                    Ok(length @ 1..) => self.heard(&buffer[..length]),
                    Ok(0) | Err(_) => self.notified = None,
                }
            }
            if self.look() {
                return;
            }
        }
    }

    /// A notification has come.
    fn heard(&mut self, bytes: &[u8]) {
        match self.hierarchy {
            Hierarchy::V1 => self.looks = LOOKS_V1,
            Hierarchy::V2 => {
                self.changed |= is_change(bytes);
                self.looks = LOOKS_V2;
            }
        }
    }

    /// Whether there have been kills since the last one that was known. They are known then.
    pub fn look(&mut self) -> bool {
        match self.count() {
            Ok(count) => {
                let new = count > self.known;
                // A cgroup below may have been removed, with its count.
                self.known = count;
                if new {
                    self.looks = 0;
                }
                if self.looks == 0 {
                    self.changed = false;
                    self.above = self.count_above();
                }
                new
            }
            Err(error) => {
                log::debug!("{} is gone: {error}", self.directory.display());
                self.notified = None;
                false
            }
        }
    }

    /// As [`OomKills::look`], after a process has ended by SIGKILL: also when the cgroup is gone already.
    pub fn look_after_a_kill(&mut self) -> bool {
        let mut buffer = [0; 512];
        // What the runtime has not heard of yet.
        if self.hierarchy == Hierarchy::V2
            && let Some(notified) = &self.notified
            && let Ok(length) = rustix::io::read(notified, &mut buffer)
        {
            self.changed |= is_change(&buffer[..length]);
        }
        self.look()
            || (self.notified.is_none()
                && std::mem::take(&mut self.changed)
                && self.count_above() > self.above)
    }

    /// Zero where it is not counted so.
    fn count_above(&self) -> u64 {
        match self.hierarchy {
            Hierarchy::V1 => 0,
            Hierarchy::V2 => self
                .directory
                .parent()
                .and_then(|above| oom_kill(&above.join("memory.events")).ok())
                .unwrap_or(0),
        }
    }

    fn count(&self) -> io::Result<u64> {
        match self.hierarchy {
            Hierarchy::V1 => v1_count(&self.directory),
            // With what the cgroups below count.
            Hierarchy::V2 => oom_kill(&self.directory.join("memory.events")),
        }
    }
}

/// Whether these bytes of inotify(7) tell of a change, and not only of a file that is gone.
fn is_change(mut events: &[u8]) -> bool {
    // wd, mask, cookie, length of the name that follows.
    while let Some((header, rest)) = events.split_first_chunk::<16>() {
        let [_, mask, _, length] = [0, 4, 8, 12].map(|at| {
            let bytes = [header[at], header[at + 1], header[at + 2], header[at + 3]];
            u32::from_ne_bytes(bytes)
        });
        if mask & inotify::ReadFlags::MODIFY.bits() != 0 {
            return true;
        }
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        events = rest.get(length..).unwrap_or_default();
    }
    false
}

fn oom_kill(file: &Path) -> io::Result<u64> {
    Ok(Table::parse(&fs::read_to_string(file)?).get("oom_kill"))
}

/// v1 counts each cgroup by itself.
fn v1_count(directory: &Path) -> io::Result<u64> {
    let mut count = oom_kill(&directory.join("memory.oom_control"))?;
    for entry in fs::read_dir(directory)?.filter_map(Result::ok) {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            // It may be removed at any time.
            count = count.saturating_add(v1_count(&entry.path()).unwrap_or(0));
        }
    }
    Ok(count)
}

/// Documentation/admin-guide/cgroup-v1/memory.rst, 10. OOM Control. The kernel forgets the eventfd when it is closed.
fn v1_notifications(directory: &Path) -> Result<OwnedFd, IoError> {
    let file = directory.join("memory.oom_control");
    let control = fs::File::open(&file).map_err(failed("open", &file))?;
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|error| failed("make an eventfd for", &file)(error.into()))?;
    let registration = format!("{} {}", event.as_raw_fd(), control.as_raw_fd());
    write(directory, "cgroup.event_control", &registration)?;
    Ok(event)
}

/// Documentation/admin-guide/cgroup-v2.rst: a change of memory.events generates a file modified event.
fn v2_notifications(directory: &Path) -> Result<OwnedFd, IoError> {
    let file = directory.join("memory.events");
    let watch = || {
        let flags = inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK;
        let events = inotify::init(flags)?;
        inotify::add_watch(&events, &file, inotify::WatchFlags::MODIFY)?;
        Ok(events)
    };
    watch().map_err(|error: rustix::io::Errno| failed("watch", &file)(error.into()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// What waits for the kernel must not wait for ever.
    async fn within_a_second(kills: &mut OomKills) -> bool {
        tokio::time::timeout(Duration::from_secs(1), kills.next())
            .await
            .is_ok()
    }

    fn v2(events: &str) -> (tempfile::TempDir, Cgroup) {
        let root = tempfile::tempdir().unwrap();
        let cgroup = Cgroup::v2_at(root.path(), "/c");
        fs::create_dir_all(cgroup.any_path()).unwrap();
        fs::write(cgroup.any_path().join("memory.events"), events).unwrap();
        (root, cgroup)
    }

    #[tokio::test]
    async fn v2_only_a_kill_is_told_and_each_once() {
        let (_root, cgroup) = v2("oom 1\noom_kill 1\n");
        let file = cgroup.any_path().join("memory.events");
        let mut kills = cgroup.watch_oom_kills().unwrap();
        assert!(!kills.look());
        fs::write(&file, "max 9\noom 2\noom_kill 1\n").unwrap();
        assert!(!within_a_second(&mut kills).await);
        fs::write(&file, "oom 2\noom_kill 2\n").unwrap();
        assert!(within_a_second(&mut kills).await);
        assert!(!kills.look());
        fs::write(&file, "oom 3\noom_kill 4\n").unwrap();
        assert!(kills.look());
        assert!(!within_a_second(&mut kills).await);
    }

    #[tokio::test]
    async fn v2_a_kill_is_known_when_the_cgroup_is_gone_before_anybody_looked() {
        for (own, above, told) in [
            ("oom_kill 1\n", "oom_kill 8\n", true),
            // Only the neighbours' number has changed, or only this one's, by a limit that was touched.
            ("", "oom_kill 8\n", false),
            ("max 1\noom_kill 0\n", "oom_kill 7\n", false),
        ] {
            // The notification may have been read before the process was known to have ended.
            for read_before in [false, true] {
                let (root, cgroup) = v2("oom_kill 0\n");
                let events_above = root.path().join("memory.events");
                fs::write(&events_above, "oom_kill 7\n").unwrap();
                let mut kills = cgroup.watch_oom_kills().unwrap();
                if !own.is_empty() {
                    fs::write(cgroup.any_path().join("memory.events"), own).unwrap();
                }
                fs::write(&events_above, above).unwrap();
                fs::remove_dir_all(cgroup.any_path()).unwrap();
                if read_before {
                    assert!(!within_a_second(&mut kills).await);
                }
                assert_eq!(kills.look_after_a_kill(), told, "{own:?} {above:?}");
                assert!(!kills.look_after_a_kill());
            }
        }
    }

    #[tokio::test]
    async fn v2_a_kill_right_after_a_limit_that_was_touched_is_known_though_nobody_notified_of_it()
    {
        for (looked_again, told) in [(false, true), (true, false)] {
            let (root, cgroup) = v2("oom_kill 0\n");
            let events_above = root.path().join("memory.events");
            fs::write(&events_above, "oom_kill 7\n").unwrap();
            let mut kills = cgroup.watch_oom_kills().unwrap();
            let file = cgroup.any_path().join("memory.events");
            fs::write(&file, "max 1\noom_kill 0\n").unwrap();
            let mut buffer = [0; 512];
            let length = rustix::io::read(kills.notified.as_ref().unwrap(), &mut buffer).unwrap();
            kills.heard(&buffer[..length]);
            assert!(!kills.look());
            if looked_again {
                kills.looks = 0;
                assert!(!kills.look());
            }
            fs::write(&events_above, "oom_kill 8\n").unwrap();
            fs::remove_dir_all(cgroup.any_path()).unwrap();
            assert_eq!(kills.look_after_a_kill(), told, "{looked_again}");
        }
    }

    #[tokio::test]
    async fn v2_a_removed_cgroup_is_silent() {
        let (_root, cgroup) = v2("oom_kill 0\n");
        let mut kills = cgroup.watch_oom_kills().unwrap();
        fs::remove_dir_all(cgroup.any_path()).unwrap();
        assert!(!kills.look());
        assert!(!within_a_second(&mut kills).await);
        let error = cgroup.watch_oom_kills().unwrap_err();
        assert_eq!(error.source.kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn v1_kills_below_count() {
        let root = tempfile::tempdir().unwrap();
        let control = |directory: &Path, kills| {
            let text = format!("oom_kill_disable 0\nunder_oom 0\noom_kill {kills}\n");
            fs::create_dir_all(directory).unwrap();
            fs::write(directory.join("memory.oom_control"), text).unwrap();
        };
        control(root.path(), 2);
        control(&root.path().join("a"), 1);
        control(&root.path().join("a/b"), 4);
        assert_eq!(v1_count(root.path()).unwrap(), 7);
    }
}
