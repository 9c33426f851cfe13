//! The binary `containerd-shim-pause-v2`: runs the command line, and prints the error.
#![forbid(unsafe_code)]

use std::io::Write;
use std::process::ExitCode;

use shim::cli;

fn main() -> ExitCode {
    match cli::run(std::env::args_os().skip(1)) {
        Ok(code) => code,
        Err(error) => {
            // A person or containerd reads the error from here; nobody is left to tell when stderr is closed.
            let _ = writeln!(std::io::stderr(), "containerd-shim-pause-v2: {error}");
            ExitCode::from(cli::FAILED)
        }
    }
}
