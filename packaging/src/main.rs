//! `packaging copyright TARGET`: the file `copyright` of the packages, with the licenses of all that is linked into the
//! shim. `packaging sbom TARGET`: the same as a bill of materials (CycloneDX). `packaging/release` calls both.
//!
//! Both read what cargo itself says of this checkout, and print the same for the same `Cargo.lock`: no time, no random
//! number, no path.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "it prints a file, or why there is none"
)]

mod copyright;
mod linked;
mod sbom;

use std::process::ExitCode;

/// Any error ends the program, with its words.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let printed = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["copyright", target] => linked::linked(target).and_then(|linked| copyright::text(&linked)),
        ["sbom", target] => linked::linked(target).and_then(|linked| sbom::json(&linked, target)),
        _ => Err("usage: packaging copyright|sbom TARGET".into()),
    };
    match printed {
        Ok(text) => {
            print!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("packaging: {error}");
            ExitCode::FAILURE
        }
    }
}
