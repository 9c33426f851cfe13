//! Who repairs the node when the program that changes it is killed.
//!
//! ```text
//!  killed            a kubelet cannot start the pod again while containerd is down
//!     └─▶ a timer of systemd, some seconds later ──▶ `repair` of a copy of this program, until one succeeds
//! ```
//! The rescue is ready before the first change, and called off when no journal is left.

use super::host::run;
use super::{folder, journal};
use crate::error::Result;
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

/// Makes the rescue ready. `program` is this program.
///
/// # Errors
/// `Io`, and `FailedPrecondition` with systemd's words.
pub(super) fn arm(program: &[u8]) -> Result<()> {
    disarm();
    let copy = folder(PROGRAM);
    journal::replace(&copy, program, 0o700, None)?;
    let (unit, copy) = (format!("--unit={UNIT}"), copy.to_string_lossy());
    let command = [unit.as_str(), "--", &copy, "repair"];
    run("systemd-run", &[&TIMER[..], &command].concat()).map(drop)
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
    let _ = std::fs::remove_file(copy);
}
