//! One run of the OCI runtime: the command line and the log.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};

use super::bundle::RuncRecord;
use super::criu::{self, Work};
use crate::io::Streams;

/// A run that has not begun.
pub(super) struct Call {
    pub(super) name: &'static str,
    pub(super) command: Command,
    pub(super) log: PathBuf,
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
        command
            .arg(name)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Self { name, command, log }
    }

    /// Whether this run moves a process into the container's cgroup.
    pub(super) fn moves(&self) -> bool {
        matches!(self.name, "create" | "exec" | "restore")
    }

    pub(super) fn criu(&mut self, work: &Work) {
        self.command
            .arg("--work-path")
            .arg(work.folder())
            .env(criu::CONFIG_VARIABLE, work.config());
    }

    pub(super) fn streams(&mut self, streams: Streams) {
        match streams {
            Streams::Files([stdin, stdout, stderr]) => {
                self.command.stdin(stdin).stdout(stdout).stderr(stderr);
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
