//! One run of the OCI runtime: the command line, the log, and what the run writes to its stderr.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::process::Signal;

use super::bundle::RuncRecord;
use super::criu::{self, Work};
use crate::io::Streams;
use crate::kernel::exits::Child;

/// A run that has not begun.
pub(super) struct Call {
    pub(super) name: &'static str,
    pub(super) command: Command,
    pub(super) log: PathBuf,
    /// What the run writes to its stderr; none where that is the container's.
    pub(super) stderr: Option<Captured>,
    /// Whether the run has children that must not outlive the run, in a process group that the run leads.
    pub(super) leads: bool,
}

impl Call {
    pub(super) fn new(name: &'static str, bundle: &Path, record: &RuncRecord) -> Self {
        static CALLS: AtomicU64 = AtomicU64::new(0);
        let number = CALLS.fetch_add(1, Ordering::Relaxed);
        let log = bundle.join(format!("runc-{name}-{number}.json"));
        let mut command = Command::new(&record.binary);
        command
            // systemd sets the variable when containerd is a service. runc would take the socket for the container's,
            // and mount the socket in the container.
            .env_remove("NOTIFY_SOCKET")
            .arg("--root")
            .arg(&record.root)
            .arg("--log")
            .arg(&log)
            .args(["--log-format", "json"]);
        if record.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        let stderr = Captured::new();
        command
            .arg(name)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(
                stderr
                    .as_ref()
                    .and_then(Captured::stdio)
                    .unwrap_or_else(Stdio::null),
            );
        Self {
            name,
            command,
            log,
            stderr,
            leads: false,
        }
    }

    /// Whether this run moves a process into the container's cgroup.
    pub(super) fn moves(&self) -> bool {
        matches!(self.name, "create" | "exec" | "restore")
    }

    /// The last argument. An id may begin with a hyphen, and is no flag.
    pub(super) fn id(&mut self, id: &str) {
        self.command.arg("--").arg(id);
    }

    /// This run runs criu, which stays in the process group.
    pub(super) fn criu(&mut self, work: &Work) {
        self.leads = true;
        self.command
            .process_group(0)
            .arg("--work-path")
            .arg(work.folder())
            .env(criu::CONFIG_VARIABLE, work.config());
    }

    pub(super) fn streams(&mut self, streams: Streams) {
        match streams {
            Streams::Files([stdin, stdout, stderr]) => {
                // The container inherits them from runc.
                self.command.stdin(stdin).stdout(stdout).stderr(stderr);
                self.stderr = None;
            }
            Streams::Console(socket) => {
                self.command.arg("--console-socket").arg(socket);
                if self.name == "exec" {
                    self.command.arg("--tty");
                }
            }
        }
    }
}

/// A running runc, killed on drop: nobody waits for runc any more.
pub(super) enum Running {
    /// The run alone: children of the run end with the run, or are the container's.
    Alone(Child),
    /// With the process group that the run leads, see [`Call::leads`].
    Group(Child),
}

impl Drop for Running {
    fn drop(&mut self) {
        // A runc that has been reaped takes no signal: the error is of no interest.
        let _ = match self {
            Self::Alone(child) => child.signal(Signal::KILL),
            Self::Group(child) => child.kill_group(),
        };
    }
}

/// What a run writes to one of its streams, in memory.
pub(super) struct Captured(File);

impl Captured {
    /// The most that a run can write. Memory is taken only for what is written.
    const SIZE: u64 = 1024 * 1024;
    /// The most that is read: Go writes the reason of a crash first, and the stacks after that.
    const READ: usize = 4096;

    /// None when the kernel has no descriptor or no memory: a run is not worth failing for that.
    pub(super) fn new() -> Option<Self> {
        let make = |flags| memfd_create("runc", MemfdFlags::CLOEXEC | flags);
        // Linux before 6.3 does not know the flag, and later ones may insist on the flag (vm.memfd_noexec).
        let file =
            make(MemfdFlags::NOEXEC_SEAL | MemfdFlags::ALLOW_SEALING).or_else(
                |error| match error {
                    Errno::INVAL => make(MemfdFlags::ALLOW_SEALING),
                    error => Err(error),
                },
            );
        let file = file.ok()?;
        ftruncate(&file, Self::SIZE).ok()?;
        fcntl_add_seals(&file, SealFlags::GROW | SealFlags::SHRINK).ok()?;
        Some(Self(file.into()))
    }

    /// The stream, for a command.
    pub(super) fn stdio(&self) -> Option<Stdio> {
        self.0.try_clone().ok().map(Stdio::from)
    }

    /// The beginning of what was written.
    pub(super) fn text(&self) -> String {
        let mut bytes = [0; Self::READ];
        let read = self.0.read_at(&mut bytes, 0).unwrap_or_default();
        let written = bytes.iter().take(read).take_while(|byte| **byte != 0);
        let written: Vec<u8> = written.copied().collect();
        String::from_utf8_lossy(&written).trim().to_owned()
    }
}
