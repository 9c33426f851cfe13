//! Compiles the pause program (`init/`) for the target and leaves it in OUT_DIR, for `src/program.rs` to embed.
//!
//! Calls rustc directly: cargo cannot yet build the binary of another package for a crate that embeds it.

#![expect(clippy::panic, reason = "a build script has no other way to fail")]

use std::env;
use std::path::Path;
use std::process::Command;

/// Static relocation: the program lies at a fixed address, because it has no start files that could relocate it.
/// Nothing in it is worth hiding at a random address.
const CODE_OPTIONS: [&str; 6] = [
    "opt-level=s",
    "panic=abort",
    "codegen-units=1",
    "strip=symbols",
    "relocation-model=static",
    "target-feature=+crt-static",
];

const LINK_ARGUMENTS: [&str; 5] = [
    "-nostartfiles",
    "-nodefaultlibs",
    "-static",
    "-no-pie",
    "-Wl,--build-id=none",
];

fn main() {
    println!("cargo:rerun-if-changed=init/src");
    println!("cargo:rerun-if-changed=init/link.ld");
    let source = Path::new(&variable("CARGO_MANIFEST_DIR")).join("init");
    let mut rustc = compile(&source, Path::new(&variable("OUT_DIR")));
    let status = rustc.status();
    assert!(
        matches!(&status, Ok(s) if s.success()),
        "compile the pause program: {rustc:?}: {status:?}"
    );
}

/// The call of rustc that makes `pause` in the folder `out`.
fn compile(source: &Path, out: &Path) -> Command {
    let mut rustc = Command::new(variable("RUSTC"));
    // rustc leaves its intermediate files in the working directory.
    rustc.current_dir(out);
    rustc.args(["--crate-name", "pause", "--crate-type", "bin"]);
    rustc.args(["--edition", "2021", "--target", &variable("TARGET")]);
    for option in CODE_OPTIONS {
        rustc.args(["-C", option]);
    }
    let script = format!("-Wl,-T,{}", source.join("link.ld").display());
    for argument in LINK_ARGUMENTS.into_iter().chain([script.as_str()]) {
        rustc.arg("-C").arg(format!("link-arg={argument}"));
    }
    if let Ok(linker) = env::var("RUSTC_LINKER") {
        rustc.arg("-C").arg(format!("linker={linker}"));
    }
    // The same bytes from every folder.
    let remap = format!("--remap-path-prefix={}=pause/init", source.display());
    rustc.arg(remap);
    rustc.arg("-o").arg(out.join("pause"));
    rustc.arg(source.join("src/main.rs"));
    rustc
}

fn variable(name: &str) -> String {
    env::var(name).unwrap_or_else(|_| panic!("cargo sets {name}"))
}
