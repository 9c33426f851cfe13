//! Compiles the pause program (`init/`) for the target and leaves it in OUT_DIR, for `src/program.rs` to embed.
//!
//! By hand and not as a dependency: cargo cannot yet build a binary of another package for a crate that embeds it.

#![expect(clippy::panic, reason = "a build script has no other way to fail")]

use std::env;
use std::path::Path;
use std::process::Command;

fn main() {
    println!("cargo:rerun-if-changed=init/src");
    println!("cargo:rerun-if-changed=init/link.ld");
    let get = |name: &str| env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"));
    let folder = Path::new(&get("CARGO_MANIFEST_DIR")).join("init");
    let out = Path::new(&get("OUT_DIR")).join("pause");

    let mut rustc = Command::new(get("RUSTC"));
    // OUT_DIR as working directory: rustc leaves its intermediate files there.
    rustc.current_dir(get("OUT_DIR"));
    rustc.args([
        "--crate-name",
        "pause",
        "--crate-type",
        "bin",
        "--edition",
        "2021",
    ]);
    rustc.args(["--target", &get("TARGET")]);
    for option in [
        "opt-level=s",
        "panic=abort",
        "codegen-units=1",
        "strip=symbols",
    ] {
        rustc.args(["-C", option]);
    }
    // At a fixed address: it has no start files that could relocate it, and nothing in it that is worth hiding.
    rustc.args([
        "-C",
        "relocation-model=static",
        "-C",
        "target-feature=+crt-static",
    ]);
    let script = format!("-Wl,-T,{}", folder.join("link.ld").display());
    for argument in [
        "-nostartfiles",
        "-nodefaultlibs",
        "-static",
        "-no-pie",
        "-Wl,--build-id=none",
        &script,
    ] {
        rustc.arg("-C").arg(format!("link-arg={argument}"));
    }
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg("-C").arg(format!("linker={linker}"));
    }
    rustc.arg("-o").arg(&out).arg(folder.join("src/main.rs"));
    let status = rustc.status();
    assert!(
        matches!(&status, Ok(s) if s.success()),
        "compile the pause program: {rustc:?}: {status:?}"
    );
}
