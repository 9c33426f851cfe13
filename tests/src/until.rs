//! Waiting without guessed sleeps: a condition is asked again and again until it holds, or until the deadline.
//!
//! A deadline is time that the machine had for the test. While more tasks want to go on than the machine has processors,
//! the clock of a deadline goes slower by as much: five seconds are ten on a machine with two processors and four tasks
//! that want them all the time. So a deadline may be strict, and does not fail for a machine that is busy.

use std::fs;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// The shortest deadline. A test of speed measures the time, with [`timed`].
const LEAST: Duration = Duration::from_secs(5);

/// The longest time by the wall's clock that a shorter deadline takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// The time between two looks.
const STEP: Duration = Duration::from_millis(10);

/// Asks `what` every few milliseconds until the answer is `Ok`. After `deadline`, but not before [`LEAST`], panics with
/// the last `Err`.
#[track_caller]
pub fn eventually<T>(deadline: Duration, mut what: impl FnMut() -> Result<T, String>) -> T {
    let begin = Instant::now();
    match within(deadline, &mut what) {
        Ok(value) => value,
        Err(why) => panic!(
            "not within {:?} ({:.1} s of the clock on the wall): {why}",
            deadline.max(LEAST),
            begin.elapsed().as_secs_f64()
        ),
    }
}

/// As [`eventually`], but returns the last `Err`. In the VM, which is slow and does not see how busy this machine is, every
/// deadline is twelve times as long.
pub fn within<T>(deadline: Duration, what: impl FnMut() -> Result<T, String>) -> Result<T, String> {
    let slower = if crate::vm::inside() { 12 } else { 1 };
    let deadline = deadline.max(LEAST) * slower;
    until(deadline, deadline.max(PATIENCE), what)
}

/// Asks until the machine has had time as long as `deadline`, or until the clock on the wall says `longest`.
fn until<T>(
    deadline: Duration,
    longest: Duration,
    mut what: impl FnMut() -> Result<T, String>,
) -> Result<T, String> {
    let (begin, mut clock) = (Instant::now(), Clock::start());
    loop {
        let why = match what() {
            Ok(value) => return Ok(value),
            Err(why) => why,
        };
        if clock.look() >= deadline || begin.elapsed() >= longest {
            return Err(why);
        }
        thread::sleep(STEP);
    }
}

/// The result of a call, and how long the call took of the time that the machine had for it.
pub fn timed<T>(call: impl FnOnce() -> T) -> (T, Duration) {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let mut clock = Clock::start();
            while !over.load(Ordering::Acquire) {
                clock.look();
                thread::sleep(STEP);
            }
            clock.look()
        });
        let answer = call();
        over.store(true, Ordering::Release);
        (answer, watch.join().unwrap())
    })
}

/// The time that the machine has had for us.
struct Clock {
    looked: Instant,
    had: Duration,
}

impl Clock {
    fn start() -> Self {
        Self {
            looked: Instant::now(),
            had: Duration::ZERO,
        }
    }

    /// The time until now. What passed since the last look counts as busy as the machine is at this moment.
    fn look(&mut self) -> Duration {
        let now = Instant::now();
        self.had += (now - self.looked).mul_f64(share());
        self.looked = now;
        self.had
    }
}

/// The part of a processor that each task has which wants to go on now: all of one at most.
fn share() -> f64 {
    let processors = thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let processors = u32::try_from(processors).unwrap_or(u32::MAX);
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let wanting = tasks_that_want_to_go_on(&stat).max(processors);
    f64::from(processors) / f64::from(wanting)
}

/// The tasks that wait for a processor or have one, and those that wait for a disk, without the one that asks.
fn tasks_that_want_to_go_on(stat: &str) -> u32 {
    let number = |name| {
        let line = stat.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|number| number.trim().parse().ok())
    };
    let running: u32 = number("procs_running ").unwrap_or(0);
    running.saturating_sub(1) + number("procs_blocked ").unwrap_or(0)
}

/// `Ok` when `condition` holds, else the text as `Err`: an answer for [`eventually`].
///
/// # Errors
/// `otherwise`, when `condition` does not hold.
pub fn ok_if(condition: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if condition { Ok(()) } else { Err(otherwise()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_that_run_and_tasks_that_are_blocked_want_to_go_on() {
        let stat = "cpu  1 2 3\nprocesses 77\nprocs_running 4\nprocs_blocked 2\nsoftirq 1\n";
        assert_eq!(tasks_that_want_to_go_on(stat), 5);
        assert_eq!(
            tasks_that_want_to_go_on("procs_running 1\nprocs_blocked 0\n"),
            0
        );
        assert_eq!(tasks_that_want_to_go_on(""), 0);
    }

    #[test]
    fn a_busy_machine_has_less_time_for_each() {
        let over = AtomicBool::new(false);
        let busy = 4 * thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let second = Duration::from_secs(1);
        let took = thread::scope(|scope| {
            for _ in 0..busy {
                scope.spawn(|| {
                    while !over.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                });
            }
            let ((), took) = timed(|| thread::sleep(second));
            over.store(true, Ordering::Relaxed);
            took
        });
        assert!(took < second.mul_f64(0.6), "{took:?}");
    }

    #[test]
    fn what_never_comes_is_given_up() {
        let (deadline, longest) = (Duration::from_millis(200), Duration::from_secs(2));
        let (begin, mut asked) = (Instant::now(), 0);
        let answer: Result<(), String> = until(deadline, longest, || {
            asked += 1;
            Err(format!("asked {asked} times"))
        });
        let took = begin.elapsed();
        assert_eq!(answer, Err(format!("asked {asked} times")));
        assert!(asked > 1, "{asked}");
        assert!(took >= deadline && took < 2 * longest, "{took:?}");
    }
}
