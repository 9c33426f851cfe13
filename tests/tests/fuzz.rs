//! The fuzzers' corpora, replayed and changed at random for a short time: what `fuzz/` does with a nightly toolchain and
//! coverage for hours, done with the same functions by every run of the tests.
//!
//! `FUZZ_SECONDS` is the time for each target (1 when it is not set).
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test reports by failing, and this one by what it did, too"
)]

use std::fs;
use std::panic::catch_unwind;
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use shim::fuzzing::{TARGETS, Target};

/// How long one input may take. The inputs are small; the bound is for a machine that is busy.
const SLOWEST: Duration = Duration::from_secs(5);
/// The longest input, in bytes.
const LONGEST: usize = 4096;

/// Pieces that some parser knows.
const WORDS: [&str; 26] = [
    "\n",
    "=",
    "/",
    "..",
    ":",
    "-",
    "--",
    " - ",
    "%41",
    "\\040",
    "{",
    "}",
    "[",
    "\"",
    "0",
    "max",
    "18446744073709551615",
    "-1",
    "://",
    "?",
    "+",
    "\0",
    "\u{fffd}",
    ".slice",
    "null",
    "path",
];

/// xorshift64*: the same seed gives the same inputs.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() >> 33).unwrap() % end.max(1)
    }
}

/// A new input from those of the corpus.
fn mutated(random: &mut Random, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut input = corpus[random.below(corpus.len())].clone();
    for _ in 0..=random.below(4) {
        let at = random.below(input.len() + 1);
        match random.below(6) {
            0 if at < input.len() => input[at] ^= 1 << random.below(8),
            1 => {
                let end = at + random.below(input.len() - at + 1);
                input.drain(at..end);
            }
            2 => {
                let word = WORDS[random.below(WORDS.len())];
                input.splice(at..at, word.bytes());
            }
            3 => {
                // A part of another input.
                let other = &corpus[random.below(corpus.len())];
                let from = random.below(other.len() + 1);
                let end = from + random.below(other.len() - from + 1);
                input.splice(at..at, other[from..end].iter().copied());
            }
            4 => {
                // A part of the same, again and again.
                let end = at + random.below((input.len() - at + 1).min(64));
                let part = input[at..end].to_vec();
                for _ in 0..random.below(40) {
                    input.splice(at..at, part.iter().copied());
                }
            }
            _ => input.insert(at, u8::try_from(random.below(256)).unwrap()),
        }
        input.truncate(LONGEST);
    }
    input
}

/// Runs one input. Says which, if the target panics or takes too long.
fn run(name: &str, target: Target, input: &[u8]) {
    let begin = Instant::now();
    let result = catch_unwind(|| target(input));
    let took = begin.elapsed();
    let shown = input.escape_ascii();
    assert!(result.is_ok(), "{name} panics on b\"{shown}\"");
    assert!(took < SLOWEST, "{name} takes {took:?} for b\"{shown}\"");
}

fn corpus(name: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../fuzz/corpus")
        .join(name);
    let files =
        fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    files
        .map(|file| fs::read(file.unwrap().path()).unwrap())
        .collect()
}

#[test]
fn nothing_from_outside_makes_a_parser_panic() {
    let seconds = std::env::var("FUZZ_SECONDS").map_or(1, |text| text.parse().unwrap());
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    for (name, target) in TARGETS {
        let corpus = corpus(name);
        for input in &corpus {
            run(name, target, input);
        }
        let mut random = Random(now.as_secs() | 1);
        let end = Instant::now() + Duration::from_secs(seconds);
        let mut inputs: u64 = 0;
        while Instant::now() < end {
            run(name, target, &mutated(&mut random, &corpus));
            inputs += 1;
        }
        eprintln!("{name}: {} of the corpus, {inputs} new", corpus.len());
    }
}
