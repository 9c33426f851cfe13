//! The binary `containerd-shim-pause-v2`: reads the command line, runs it, and says why it failed.
#![forbid(unsafe_code)]

use std::io::Write;
use std::process::ExitCode;

use shim::cli;

fn main() -> ExitCode {
    match cli::run(std::env::args_os().skip(1)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The one place where a person or containerd reads why.
            let _ = writeln!(std::io::stderr(), "containerd-shim-pause-v2: {error}");
            ExitCode::FAILURE
        }
    }
}
