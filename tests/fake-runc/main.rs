//! A program for the place of runc: writes the command down, and then is the real runc. See `shim_tests::fake_runc`.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::exit,
    reason = "a helper of the tests"
)]

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, exit};

fn main() {
    let program = std::env::current_exe().unwrap();
    let setting = |name: &str| fs::read_to_string(program.with_extension(name)).ok();
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let mut calls = OpenOptions::new()
        .append(true)
        .create(true)
        .open(program.with_extension("calls"))
        .unwrap();
    // One write: several may run at a time.
    let line = format!("{}\n", arguments.join(" "));
    calls.write_all(line.as_bytes()).unwrap();
    if arguments == ["--version"]
        && let Some(version) = setting("version")
    {
        println!("runc version {version}\ncommit: none\nspec: 1.2.1");
        return;
    }
    if let Some(command) = setting("crashes")
        && arguments.contains(&command)
    {
        eprintln!("panic: no {command} today\n\ngoroutine 1 [running]:\nmain.main()");
        exit(2);
    }
    let real = setting("real").unwrap();
    let error = Command::new(Path::new(&real)).args(arguments).exec();
    eprintln!("{real}: {error}");
    exit(127);
}
