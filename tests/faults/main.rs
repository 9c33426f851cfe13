//! The campaign of faults: every system call of the shim fails once, and SIGKILL comes at every one. See
//! `tests/README.md`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test reports by failing"
)]
#![cfg(target_arch = "x86_64")]

mod campaign;
mod life;
mod scenes;
mod syscalls;
mod tracer;

use shim_tests::ours_only;

use crate::campaign::{Mode, Subject, go_through};
use crate::scenes::{CONTROL, ENDING, MAKING, PROGRAMS, RUNNING, SANDBOX, Scene};

fn subjects(scenes: &'static [Scene]) -> Vec<Subject> {
    scenes.iter().map(Subject::Scene).collect()
}

macro_rules! campaign {
    ($($fails:ident $killed:ident: $subjects:expr;)*) => {$(
        #[test]
        fn $fails() {
            ours_only!("the expectations are our shim's");
            go_through(stringify!($fails), Mode::Fail, &$subjects);
        }

        #[test]
        fn $killed() {
            ours_only!("the expectations are our shim's");
            go_through(stringify!($killed), Mode::Kill, &$subjects);
        }
    )*};
}

campaign! {
    every_call_of_the_programs_fails_once the_programs_are_killed_at_every_call: PROGRAMS.map(Subject::Program);
    every_call_of_the_making_fails_once the_shim_is_killed_at_every_call_of_the_making: subjects(MAKING);
    every_call_of_the_running_fails_once the_shim_is_killed_at_every_call_of_the_running: subjects(RUNNING);
    every_call_of_the_control_fails_once the_shim_is_killed_at_every_call_of_the_control: subjects(CONTROL);
    every_call_of_the_ending_fails_once the_shim_is_killed_at_every_call_of_the_ending: subjects(ENDING);
    every_call_of_a_sandbox_fails_once the_shim_is_killed_at_every_call_of_a_sandbox: subjects(SANDBOX);
}
