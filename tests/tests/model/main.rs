//! Random calls to the real shim, checked against a model: thousands of sequences, calls made at once, kills of
//! containers and of runc, and a containerd that does not take events for a while.
//!
//! `MODEL_CASES` is the number of sequences of containers (200 when it is not set; of sandboxes a fourth), `MODEL_SEED`
//! the first one's seed, and each next sequence has the next seed. A failure prints the shortest sequence found, as JSON: a file in `corpus/` with that line
//! is run every time.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::wildcard_enum_match_arm,
    reason = "a test reports by failing, and by what it did; a model names the rule, not every other case"
)]

mod engine;
mod events;
mod lane;
mod receiver;
mod sandbox;
mod tasks;

use std::cell::RefCell;
use std::fs;
use std::path::Path;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngSeed, TestCaseError, TestError, TestRunner};
use serde::Serialize;
use serde::de::DeserializeOwned;
use shim_tests::{Daemon, Version, ours_only};

use crate::lane::Lane;

/// How many, unless the environment says.
const CASES: u64 = 200;
/// How often a failure is tried again with a shorter sequence.
const SHRINKS: u32 = 60;

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable)
        .ok()
        .map(|text| text.parse().unwrap())
}

/// How many sequences each test runs.
fn cases() -> u64 {
    number("MODEL_CASES").unwrap_or(CASES)
}

/// Runs `each` for the sequences in a folder of the corpus.
fn replay<S: DeserializeOwned>(folder: &str, mut each: impl FnMut(&S) -> Result<(), String>) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/model/corpus");
    for file in fs::read_dir(corpus.join(folder)).unwrap() {
        let file = file.unwrap().path();
        let sequence = serde_json::from_str(&fs::read_to_string(&file).unwrap()).unwrap();
        each(&sequence).unwrap_or_else(|why| panic!("{}: {why}", file.display()));
    }
}

/// Runs `each` for sequences of this kind that nobody has thought of.
fn random<S: Strategy<Value: Serialize>>(
    kind: &S,
    cases: u64,
    each: impl FnMut(&S::Value) -> Result<(), String>,
) {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    let first = number("MODEL_SEED").unwrap_or(now.as_secs());
    let begin = Instant::now();
    let each = RefCell::new(each);
    for seed in first..first + cases {
        let mut runner = TestRunner::new(Config {
            cases: 1,
            failure_persistence: None,
            max_shrink_iters: SHRINKS,
            rng_seed: RngSeed::Fixed(seed),
            ..Config::default()
        });
        let result = runner.run(kind, |sequence| {
            each.borrow_mut()(&sequence).map_err(|why| {
                eprintln!("seed {seed} fails: {why}");
                TestCaseError::fail(why)
            })
        });
        match result {
            Ok(()) => {}
            Err(TestError::Fail(why, shortest)) => panic!(
                "MODEL_SEED={seed} MODEL_CASES=1: {why}\nthe shortest sequence found:\n{}",
                serde_json::to_string(&shortest).unwrap()
            ),
            Err(TestError::Abort(why)) => panic!("{why}"),
        }
    }
    eprintln!(
        "{cases} sequences from seed {first} in {:?}",
        begin.elapsed()
    );
}

#[test]
fn random_calls_to_containers() {
    ours_only!("the stock shim has other codes for calls that do not fit the state");
    let daemon = Daemon::start(Version::newest());
    let mut lane = Lane::new(&daemon);
    replay("tasks", |sequence| lane.run(sequence));
    random(&tasks::sequence(), cases(), |sequence| lane.run(sequence));
    eprintln!("answers: {:?}", lane.answers);
    lane.end();
    daemon.end();
}

#[test]
fn random_calls_to_a_sandbox() {
    ours_only!("the stock shim has no Sandbox API");
    let daemon = Daemon::start(Version::newest());
    let mut number = 0;
    let mut run = |sequence: &sandbox::Sequence| {
        number += 1;
        sandbox::run(&daemon, &format!("s{number}"), sequence)
    };
    replay("sandbox", &mut run);
    // A shim that ends waits half a second for its callers to hang up.
    random(&sandbox::sequence(), cases().div_ceil(4), &mut run);
    daemon.end();
}
