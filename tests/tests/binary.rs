//! The binary itself: one static file, with its version, info and usage.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::path::PathBuf;
use std::process::{Command, Output};

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::types::introspection::RuntimeInfo;
use shim_tests::{ShimUnderTest, Version, lab};

fn binary() -> PathBuf {
    ShimUnderTest::Pause.binary(Version::newest())
}

fn run_shim(arguments: &[&str]) -> Output {
    Command::new(binary()).args(arguments).output().unwrap()
}

fn info() -> RuntimeInfo {
    let output = run_shim(&["-info"]);
    assert!(output.status.success(), "{output:?}");
    RuntimeInfo::parse_from_bytes(&output.stdout).unwrap()
}

#[test]
fn it_prints_its_version() {
    let output = run_shim(&["-v"]);
    assert!(output.status.success());
    let said = String::from_utf8(output.stdout).unwrap();
    let expected = concat!("containerd-shim-pause-v2 ", env!("CARGO_PKG_VERSION"), " ");
    let commit = said.strip_prefix(expected).expect(&said);
    let commit = commit.strip_suffix('\n').expect(&said);
    assert_eq!(commit, info().version.revision);
    // `make build` names the commit, where packaging/commit knows it.
    let script = lab::repository().join("packaging/commit");
    let here = Command::new(script).output().unwrap();
    let here = String::from_utf8(here.stdout).unwrap();
    if here.trim() != "unknown" {
        let hash = commit.strip_suffix("-dirty").unwrap_or(commit);
        assert!(
            hash.len() >= 40 && hash.bytes().all(|b| b.is_ascii_hexdigit()),
            "{commit:?} is no commit: was the binary built by `make build`?"
        );
    }
}

/// As Go's flag package: one dash or two, and the long name.
#[test]
fn it_prints_its_version_by_any_name() {
    let expected = run_shim(&["-v"]).stdout;
    for flag in ["--v", "-version", "--version"] {
        let output = run_shim(&[flag]);
        assert_eq!(
            (output.status.success(), &output.stdout),
            (true, &expected),
            "{flag}"
        );
    }
}

/// containerd reads both streams as one, so nothing but the message may be there.
#[test]
fn what_it_does_not_understand_it_names() {
    for (arguments, name) in [
        (&["-frobnicate", "start"][..], "frobnicate"),
        (
            &["-namespace", "n", "-id", "a", "-address", "x", "restart"],
            "restart",
        ),
        (&["-namespace", "n", "-address", "x", "start"], "-id"),
        (&["delete"], "-id"),
    ] {
        let output = run_shim(arguments);
        assert!(
            !output.status.success() && output.stdout.is_empty(),
            "{arguments:?}"
        );
        let message = String::from_utf8_lossy(&output.stderr);
        assert!(
            message.contains(name) && message.lines().count() == 1,
            "{message}"
        );
    }
}

/// containerd reads a bare `RuntimeInfo`. A `RuntimeInfo` in an `Any` would decode, too, with a wrong name.
#[test]
fn its_info_is_a_runtime_info() {
    let info = info();
    assert_eq!(info.name, "io.containerd.pause.v2");
    assert_eq!(info.version.version, env!("CARGO_PKG_VERSION"));
    assert!(info.special_fields.unknown_fields().iter().next().is_none());
}

#[test]
fn it_is_static_and_small() {
    let bytes = std::fs::read(binary()).unwrap();
    assert!(bytes.len() < 5_000_000, "{} bytes", bytes.len());
    // ELF64, little endian: a program header of type PT_INTERP (3) would name a loader.
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    let half = |at: usize| usize::from(u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap()));
    let (table, size, count) = (usize::try_from(word(0x20)).unwrap(), half(0x36), half(0x38));
    assert!(count > 0);
    for header in 0..count {
        let at = table + header * size;
        let kind = u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        assert_ne!(kind, 3, "it asks for a dynamic loader");
    }
}

/// Where the binary was built must not show: two builds of one commit, in two folders, are one and the same file
/// (`make reproducible`).
#[test]
fn no_path_of_the_build_is_in_it() {
    let bytes = std::fs::read(binary()).unwrap();
    let named = |name: &str| std::env::var(name).ok().filter(|path| !path.is_empty());
    let home = named("HOME").unwrap_or_else(|| "/root".to_owned());
    let target = named("CARGO_TARGET_DIR").unwrap_or_else(|| "target".to_owned());
    let root = lab::repository();
    for path in [
        root.display().to_string(),
        root.join(target).display().to_string(),
        named("CARGO_HOME").unwrap_or_else(|| format!("{home}/.cargo")),
        named("RUSTUP_HOME").unwrap_or_else(|| format!("{home}/.rustup")),
    ] {
        let at = bytes
            .windows(path.len())
            .position(|part| part == path.as_bytes());
        let text = at.map(|at| String::from_utf8_lossy(&bytes[at..(at + 200).min(bytes.len())]));
        assert!(
            text.is_none(),
            "{path} is there, from a build without make: {text:?}"
        );
    }
    // What stands there instead.
    let remapped = b"/cargo/registry/src/";
    assert!(bytes.windows(remapped.len()).any(|part| part == remapped));
}

#[test]
fn a_person_who_runs_it_learns_what_it_is_for() {
    let output = run_shim(&[]);
    assert!(!output.status.success());
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(message.contains("run by containerd"), "{message}");
}
