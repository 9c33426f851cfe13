//! Who repairs the node when the program that changes it is killed.
//!
//! ```text
//!  killed ──┬─▶ a timer of systemd, some seconds later ──▶ `repair` of a copy of this program, until one succeeds
//!           │      (a kubelet cannot start the pod again while containerd is down)
//!           └─▶ a reboot: a unit before containerd's ──▶ `repair-files`: no timer outlives the boot
//! ```
//! The rescue is ready before the first change, and called off when no journal is left.

use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::Path;

use super::host::run;
use super::journal::{self, Journal};
use super::{JOURNAL, folder};
use crate::error::{IoError, Result};
use crate::node::programs;

/// The copy of this program.
const PROGRAM: &str = "rescue";
/// The timer and its service.
const UNIT: &str = "containerd-shim-pause-v2-rescue";
/// How the service is made. After ten seconds the rescue waits for the lock, which the program that makes the change holds
/// for as long as it lives. A rescue that fails is tried again, and not for ever.
const TIMER: [&str; 8] = [
    "--quiet",
    "--collect",
    "--on-active=10",
    // A timer of systemd may otherwise be a minute late.
    "--timer-property=AccuracySec=1s",
    "--property=Restart=on-failure",
    "--property=RestartSec=10",
    "--property=StartLimitIntervalSec=3600",
    "--property=StartLimitBurst=10",
];

/// Where a person's units are.
const UNITS: &str = "/etc/systemd/system";
/// The unit for a reboot. Nothing runs it but a boot, so that systemd need not be told of it.
const BOOT: &str = "containerd-shim-pause-v2-boot.service";
const WANTS: &str = "multi-user.target.wants";

/// Makes the rescue ready. `program` is this program.
///
/// # Errors
/// `Io`, and `FailedPrecondition` with systemd's words.
pub(super) fn arm(program: &[u8]) -> Result<()> {
    disarm();
    let copy = folder(PROGRAM);
    journal::replace(&copy, program, 0o700, None)?;
    enable(&copy)?;
    let (unit, copy) = (format!("--unit={UNIT}"), copy.to_string_lossy());
    let command = [unit.as_str(), "--", &copy, "repair"];
    run("systemd-run", &[&TIMER[..], &command].concat()).map(drop)
}

/// Lets the next boot undo what a journal names, before containerd reads the files.
fn enable(copy: &Path) -> Result<()> {
    let unit = format!(
        "# Written for the time of a change by `containerd-shim-pause-v2`, and removed at the end.\n\
         [Unit]\n\
         Description=Undo what an interrupted installation of containerd-shim-pause-v2 has left\n\
         Before=containerd.service\n\
         ConditionPathExists={}\n\
         RequiresMountsFor={} /etc/containerd /usr/local/bin\n\
         \n\
         [Service]\n\
         Type=oneshot\n\
         ExecStart={} repair-files\n\
         \n\
         [Install]\n\
         WantedBy=multi-user.target\n",
        Journal::file(&folder(JOURNAL)).display(),
        folder(JOURNAL).display(),
        copy.display()
    );
    let path = Path::new(UNITS).join(BOOT);
    journal::replace(&path, unit.as_bytes(), 0o644, None)?;
    let wants = Path::new(UNITS).join(WANTS);
    std::fs::create_dir_all(&wants).map_err(IoError::at("make", &wants))?;
    let link = wants.join(BOOT);
    match symlink(&path, &link) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => {
            Err(IoError::at("make", &link)(error).into())
        }
        Ok(()) | Err(_) => journal::sync_folder_of(&link),
    }
}

/// Calls the rescue off. The rescue itself, at its end, is called off by that end.
pub(super) fn disarm() {
    let copy = folder(PROGRAM);
    if !programs::is_this(&copy) {
        for kind in ["timer", "service"] {
            let _ = run("systemctl", &["stop", &format!("{UNIT}.{kind}")]);
        }
        let _ = run("systemctl", &["reset-failed", &format!("{UNIT}.service")]);
    }
    let units = Path::new(UNITS);
    for file in [units.join(WANTS).join(BOOT), units.join(BOOT), copy] {
        let _ = std::fs::remove_file(file);
    }
}
