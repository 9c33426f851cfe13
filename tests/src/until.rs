//! Waiting without sleeping for a guess: ask until it is so, or until the deadline.

use std::time::{Duration, Instant};

/// How long is waited at least before it is given up: a busy machine may do nothing for a test for seconds. So a short
/// deadline asserts nothing: what must be quick is to be timed.
const PATIENCE: Duration = Duration::from_secs(30);

/// Asks `what` every few milliseconds until it answers `Ok`. After `deadline`, and [`PATIENCE`], panics with its last `Err`.
#[track_caller]
pub fn eventually<T>(deadline: Duration, mut what: impl FnMut() -> Result<T, String>) -> T {
    match within(deadline, &mut what) {
        Ok(value) => value,
        Err(why) => panic!("not within {:?}: {why}", deadline.max(PATIENCE)),
    }
}

/// As [`eventually`], but gives the last `Err` back. In the VM, which is slow, every deadline is six times as long.
pub fn within<T>(
    deadline: Duration,
    mut what: impl FnMut() -> Result<T, String>,
) -> Result<T, String> {
    let slower = if crate::vm::inside() { 6 } else { 1 };
    let end = Instant::now() + deadline.max(PATIENCE) * slower;
    loop {
        match what() {
            Ok(value) => return Ok(value),
            Err(why) if Instant::now() >= end => return Err(why),
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
}

/// `Ok` when `condition` holds, else the text as `Err`: what [`eventually`] wants to hear.
///
/// # Errors
/// `otherwise`, when `condition` does not hold.
pub fn ok_if(condition: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if condition { Ok(()) } else { Err(otherwise()) }
}

// The old name, as tests/bench uses it.
pub use self::ok_if as so;
