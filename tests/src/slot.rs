//! The slot of a test: a number that only this test has, and the directory, bridge, subnet and cgroup parent that
//! follow from the number.
//!
//! Tests run in parallel, each in its own process. The first free lock file gives the number. The test and the test's
//! guard (see [`crate::takedown`]) hold the lock, so a free slot is a clean slot.

use std::fs::File;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};

/// The names that follow from a slot's number.
#[derive(Clone, Debug)]
pub struct Names {
    number: u8,
}

impl Names {
    /// The names of slot `number`.
    pub fn of(number: u8) -> Self {
        Self { number }
    }

    /// The number itself.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// `st7`: also the ctr namespace and the last part of [`Self::cgroup_parent`].
    pub fn name(&self) -> String {
        format!("st{}", self.number)
    }

    /// Everything that the test's containerd writes. Short: a unix socket's path has at most 107 bytes.
    pub fn directory(&self) -> PathBuf {
        slots().join(self.name())
    }

    /// The bridge of the test's pods.
    pub fn bridge(&self) -> String {
        format!("{}br", self.name())
    }

    /// The first three numbers of the pods' addresses.
    pub fn subnet(&self) -> String {
        format!("10.213.{}", self.number)
    }

    /// The parent cgroup of all pods of the test.
    pub fn cgroup_parent(&self) -> String {
        format!("/{}", self.name())
    }

    /// The parent slice of all pods, for tests of systemd's cgroup driver.
    pub fn slice(&self) -> String {
        format!("{}.slice", self.name())
    }
}

fn slots() -> PathBuf {
    let folder = std::env::temp_dir().join("shim-tests");
    assert!(
        folder.as_os_str().len() < 60,
        "TMPDIR is too long for unix sockets: {}",
        folder.display()
    );
    folder
}

/// A slot that belongs to this process.
#[derive(Debug)]
pub struct Slot {
    /// The names that follow from the slot's number.
    pub names: Names,
    lock: File,
}

impl Slot {
    /// Takes the first free slot.
    pub fn take() -> Self {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(slots())
            .unwrap();
        for number in 0..=250 {
            let names = Names::of(number);
            let lock = File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .open(slots().join(format!("{}.lock", names.name())))
                .unwrap();
            if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_ok() {
                return Self { names, lock };
            }
        }
        panic!("no free slot in {}", slots().display());
    }

    /// A second handle on the lock, for the guard.
    pub fn lock(&self) -> File {
        self.lock.try_clone().unwrap()
    }

    /// The slot's directory.
    pub fn directory(&self) -> PathBuf {
        self.names.directory()
    }
}

/// `path` as text. All paths of the harness are UTF-8.
pub fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}
