//! A logger for `binary://`. The logger keeps its input in a folder, and behaves as the folder's file `mode` says.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::process::exit;
use std::thread;

use rustix::process::getpid;

/// Takes a descriptor that this program was started with.
fn inherited(number: i32) -> File {
    // SAFETY: the shim starts a logger with the descriptors 3, 4 and 5, and each is taken once.
    unsafe { OwnedFd::from_raw_fd(number) }.into()
}

fn ignore_sigterm() {
    // SAFETY: to ignore a signal installs no handler.
    unsafe { libc::signal(libc::SIGTERM, libc::SIG_IGN) };
}

/// Runs the logger that keeps its files in `folder`.
pub(crate) fn run(folder: &str) -> std::io::Result<String> {
    let folder = Path::new(folder).to_owned();
    let note = |name: &str, text: String| fs::write(folder.join(name), text);
    // Before anything is opened.
    let mut fds: Vec<String> = fs::read_dir("/proc/self/fd")?
        .flatten()
        .map(|fd| (fd.file_name(), fs::read_link(fd.path())))
        // The descriptor of the listing itself is closed by now, or leads to the folder `fd`.
        .filter_map(|(name, target)| Some((name.into_string().ok()?, target.ok()?)))
        .filter(|(_, target)| !target.ends_with("fd"))
        .map(|(name, target)| format!("{name} {}", target.display()))
        .collect();
    fds.sort_unstable();
    note("fds", fds.join("\n"))?;
    let mut environment: Vec<_> = std::env::vars()
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    environment.sort();
    note("environment", environment.join(" "))?;
    note("pid", getpid().as_raw_nonzero().to_string())?;

    let mode = fs::read_to_string(folder.join("mode")).unwrap_or_default();
    let (mut stdout, mut stderr, mut ready) = (inherited(3), inherited(4), inherited(5));
    match mode.trim() {
        "dies" => exit(3),
        "never-ready" => loop {
            thread::park();
        },
        "one-read" => {
            drop(ready);
            let mut buffer = [0; 512];
            let read = stdout.read(&mut buffer)?;
            fs::write(folder.join("stdout"), &buffer[..read])?;
            exit(0);
        }
        // A good logger ignores SIGTERM, to read what is left in the pipes.
        "" | "closes" | "stubborn" => ignore_sigterm(),
        "waits-for-sigterm" => {}
        other => panic!("mode {other:?}"),
    }
    if mode.trim() != "closes" {
        ready.write_all(b"x")?;
    }
    drop(ready);
    let open = |name: &str| {
        let mut options = File::options();
        options.append(true).create(true).open(folder.join(name))
    };
    let (mut out, mut err) = (open("stdout")?, open("stderr")?);
    let errors = thread::spawn(move || std::io::copy(&mut stderr, &mut err));
    std::io::copy(&mut stdout, &mut out)?;
    errors.join().expect("no panic")?;
    note("end", String::new())?;
    if ["stubborn", "waits-for-sigterm"].contains(&mode.trim()) {
        loop {
            thread::park();
        }
    }
    Ok(String::new())
}
