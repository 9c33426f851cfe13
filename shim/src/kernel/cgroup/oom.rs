//! Kills for lack of memory (OOM kills): a kernel counter has their number, a file descriptor says when to look.
//!
//! ```text
//!        counter of kills                         readable when the counter may have changed
//!   v1   memory.oom_control: oom_kill             an eventfd registered in cgroup.event_control
//!   v2   memory.events: oom_kill                  inotify on memory.events
//! ```
//!
//! The counter decides, never the notification. v1 also notifies the cgroups below a full one (the other containers of
//! a pod that has reached its own limit) and removed cgroups. v2 also notifies of a limit that was only touched.
//!
//! The kernel counts a kill before sending SIGKILL, also when the whole node is short of memory. A look after a process
//! has ended therefore misses no earlier kill, however short the process's life was.
//!
//! One exception: systemd removes the cgroup of an empty scope, with its counter, possibly before that look. Then two
//! facts together tell of a kill: a notification since the last look, and a higher counter in the cgroup above, which
//! includes the removed one.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::inotify;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

use super::files::Table;
use super::{Cgroup, Hierarchy, failed, write};
use crate::error::IoError;
use crate::kernel::blocking;

/// The number of further looks after a v1 notification that found the counter unchanged: v1 notifies before the kernel
/// chooses a process to kill. All looks together take one second; a kernel that writes its report to a serial console
/// takes a part of that.
const LOOKS_V1: u32 = 20;

/// The number of further looks after a v2 notification. v2 notifies at most once in 10 ms
/// (CGROUP_FILE_NOTIFY_MIN_INTV), first of the limit that is reached, and only then of the kill that follows.
const LOOKS_V2: u32 = 1;

/// The time between two looks.
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// A watch over the OOM kills in a cgroup.
#[derive(Debug)]
pub struct OomKills {
    hierarchy: Hierarchy,
    /// The cgroup's directory under the memory controller.
    directory: PathBuf,
    /// The notifications; `None` once the cgroup is gone.
    notified: Option<pipe::Receiver>,
    /// The counter at the last look.
    known: u64,
    /// The looks still to be taken after a notification.
    looks: u32,
    /// v2: the kills in the cgroup above, when `changed` was last cleared.
    above: u64,
    /// v2: the kernel has notified of a change that no look has explained yet. A look soon after the notification does
    /// not count, because the kernel may not have killed yet.
    changed: bool,
}

impl Cgroup {
    /// Watches for OOM kills from now on. The kernel wakes the watcher; a cgroup with enough memory costs nothing.
    ///
    /// # Errors
    /// `NotFound` if no memory controller has this cgroup; the errors of eventfd(2), inotify(7) and the registration.
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
        // Both kinds of descriptor can be read and polled like a pipe.
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
    /// Ends the watch, without waiting for the kernel: closing an inotify(7) descriptor takes some 15 ms.
    pub fn end(self) {
        if self.hierarchy == Hierarchy::V2 {
            blocking::spawn(|| drop(self));
        }
    }

    /// Resolves when there are kills that no look has reported yet. Cancel safe: the future may be dropped at any time,
    /// and the method called again. Never resolves once the cgroup is gone.
    pub async fn next(&mut self) {
        loop {
            let Some(notified) = &mut self.notified else {
                return std::future::pending().await;
            };
            if let Some(left) = self.looks.checked_sub(1) {
                tokio::time::sleep(BETWEEN_LOOKS).await;
                self.looks = left;
            } else {
                // An eventfd returns eight bytes, inotify as many events as fit.
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

    /// Takes in a notification.
    fn heard(&mut self, bytes: &[u8]) {
        match self.hierarchy {
            Hierarchy::V1 => self.looks = LOOKS_V1,
            Hierarchy::V2 => {
                self.changed |= is_change(bytes);
                self.looks = LOOKS_V2;
            }
        }
    }

    /// Reads the counter: whether there are kills that no look has reported yet. This look reports them.
    pub fn look(&mut self) -> bool {
        match self.count() {
            Ok(count) => {
                let new = count > self.known;
                // The count may also fall: a removed cgroup below takes its own count along.
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
                log::debug!(cgroup:% = self.directory.display(), error:%; "cgroup is gone");
                self.notified = None;
                false
            }
        }
    }

    /// As [`OomKills::look`], for after a process has ended by SIGKILL: also answers if the cgroup is gone already.
    pub fn look_after_a_kill(&mut self) -> bool {
        let mut buffer = [0; 512];
        // A notification that the runtime has not delivered to `next` yet.
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

    /// The kills in the cgroup above; zero on v1, where a parent does not count the kills of its children.
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
            // The file includes the kills in the cgroups below.
            Hierarchy::V2 => oom_kill(&self.directory.join("memory.events")),
        }
    }
}

/// Whether these inotify(7) events tell of a change, and not only of a removed file.
fn is_change(mut events: &[u8]) -> bool {
    // The fields of `struct inotify_event`: wd, mask, cookie, and the length of the name that follows.
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

/// v1 counts each cgroup by itself, so this function adds up the cgroup and those below.
fn v1_count(directory: &Path) -> io::Result<u64> {
    let mut count = oom_kill(&directory.join("memory.oom_control"))?;
    for entry in fs::read_dir(directory)?.filter_map(Result::ok) {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            // A cgroup below may be removed at any time.
            count = count.saturating_add(v1_count(&entry.path()).unwrap_or(0));
        }
    }
    Ok(count)
}

/// Registers an eventfd for OOM notifications (Documentation/admin-guide/cgroup-v1/memory.rst, 10. OOM Control).
/// Closing the eventfd ends the registration.
fn v1_notifications(directory: &Path) -> Result<OwnedFd, IoError> {
    let file = directory.join("memory.oom_control");
    let control = fs::File::open(&file).map_err(failed("open", &file))?;
    let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
        .map_err(|error| failed("make an eventfd for", &file)(error.into()))?;
    let registration = format!("{} {}", event.as_raw_fd(), control.as_raw_fd());
    write(directory, "cgroup.event_control", &registration)?;
    Ok(event)
}

/// Watches memory.events with inotify(7): a change of memory.events generates a file modified event
/// (Documentation/admin-guide/cgroup-v2.rst).
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

    /// Whether kills are reported within a second. A test must not wait for the kernel for ever.
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
            // Only the neighbours' count has changed; or only this cgroup's file, by a limit that was touched.
            ("", "oom_kill 8\n", false),
            ("max 1\noom_kill 0\n", "oom_kill 7\n", false),
        ] {
            // The shim may read the notification before learning of the process's end.
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
