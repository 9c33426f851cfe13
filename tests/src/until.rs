//! Waiting without guessed sleeps: a condition is asked again and again until it holds, or until the deadline.

use std::time::{Duration, Instant};

/// The shortest wait before a failure: a busy machine may leave a test without CPU time for seconds. So a short
/// deadline asserts nothing. A test of speed must measure the time.
const PATIENCE: Duration = Duration::from_secs(30);

/// Asks `what` every few milliseconds until the answer is `Ok`. After `deadline`, but not before [`PATIENCE`], panics
/// with the last `Err`.
#[track_caller]
pub fn eventually<T>(deadline: Duration, mut what: impl FnMut() -> Result<T, String>) -> T {
    match within(deadline, &mut what) {
        Ok(value) => value,
        Err(why) => panic!("not within {:?}: {why}", deadline.max(PATIENCE)),
    }
}

/// As [`eventually`], but returns the last `Err`. In the VM, which is slow, every deadline is six times as long.
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

/// `Ok` when `condition` holds, else the text as `Err`: an answer for [`eventually`].
///
/// # Errors
/// `otherwise`, when `condition` does not hold.
pub fn ok_if(condition: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if condition { Ok(()) } else { Err(otherwise()) }
}
