//! The end of a program, such as the demo, that fails or is interrupted: everything is taken down, and the person reads
//! what to do.
//!
//! A panic aborts the program, in both profiles, so nothing can be left to destructors. After SIGKILL not even this
//! file runs: then the harness' guard takes the slot down.

use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};

use crate::slot::Names;
use crate::until::{ok_if, within};
use crate::{lab, leaks, proc, screen, takedown};

/// The present step of the program, and the advice for a failure of the step.
static STEP: Mutex<(&str, &str)> = Mutex::new(("getting ready", ""));
/// A thread is taking everything down.
static ENDING: AtomicBool = AtomicBool::new(false);

/// From here on, this file handles failures and signals. `program` names the log that is kept.
pub fn arm(program: &'static str) {
    std::panic::set_hook(Box::new(move |info| {
        let message = info
            .payload_as_str()
            .unwrap_or("no message")
            .trim()
            .to_owned();
        let place = info.location().map(ToString::to_string);
        failed(program, &message, &place.unwrap_or_default());
    }));
    std::thread::spawn(|| {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let number = runtime.block_on(async {
            let listen = |kind| signal(kind).unwrap();
            let mut interrupt = listen(SignalKind::interrupt());
            let mut terminate = listen(SignalKind::terminate());
            let mut hangup = listen(SignalKind::hangup());
            tokio::select! {
                _ = interrupt.recv() => 2,
                _ = terminate.recv() => 15,
                _ = hangup.recv() => 1,
            }
        });
        first_or_never();
        screen::alarm("Interrupted: taking everything down.");
        take_down();
        std::process::exit(128 + number);
    });
}

/// Sets what the program does from here on, and what a person can do when the step fails.
pub fn step(what: &'static str, advice: &'static str) {
    if let Ok(mut step) = STEP.lock() {
        *step = (what, advice);
    }
}

/// Ends the program with an advice, when there is nothing to take down yet.
pub fn refuse(what: &str, advice: &str) -> ! {
    screen::alarm(&format!("This cannot run: {what}"));
    screen::note("what to do", advice);
    std::process::exit(1);
}

/// Returns to the first caller only; later callers wait for ever. A failure caused by another failure is of no
/// interest.
fn first_or_never() {
    if ENDING.swap(true, Ordering::SeqCst) {
        loop {
            std::thread::park();
        }
    }
}

fn failed(program: &str, message: &str, place: &str) -> ! {
    first_or_never();
    let (doing, advice) = STEP.lock().map_or(("", ""), |step| *step);
    screen::alarm(&format!("FAILED while {doing}"));
    screen::note("what", &screen::short(message, 2000));
    screen::note("where", place);
    if let Some((kept, log)) = keep_log(program) {
        screen::note("log", &format!("{} (containerd and shims)", kept.display()));
        let errors: Vec<&str> = log
            .lines()
            .filter(|line| line.contains("level=error") || line.contains("level=fatal"))
            .collect();
        for line in &errors[errors.len().saturating_sub(5)..] {
            screen::note("", &screen::short(line, 400));
        }
    }
    for advice in [advice, advice_for(message)] {
        if !advice.is_empty() {
            screen::note("what to do", advice);
        }
    }
    take_down();
    std::process::exit(1);
}

/// The frequent cause of such a message, and the remedy.
fn advice_for(message: &str) -> &'static str {
    let has = |words: &[&str]| words.iter().any(|word| message.contains(word));
    if has(&["cni", "bridge", "veth"]) {
        "The network comes from the CNI plugins in target/lab/host/cni. They need the kernel's bridge and veth: \
         `ip link add demo0 type bridge && ip link delete demo0` shows whether this machine has them."
    } else if has(&["cgroup"]) {
        "Are the cgroups writable? `mkdir /sys/fs/cgroup/demo && rmdir /sys/fs/cgroup/demo` (on cgroup v1, in one of \
         the folders there) must work. In an unprivileged container it does not."
    } else if has(&["not permitted", "permission denied", "EPERM"]) {
        "The demo needs all of root's rights: a machine or a VM, or a privileged container."
    } else if has(&["runc"]) {
        "`target/lab/host/runc --version` must work; if it does not: apt-get install runc, remove target/lab/host, and \
         try again."
    } else {
        ""
    }
}

/// Copies the log out of the slot, before the slot is removed.
fn keep_log(program: &str) -> Option<(PathBuf, String)> {
    let directory = slot()?.directory();
    let folder = lab::lab().join("failed");
    fs::create_dir_all(&folder).ok()?;
    let _ = fs::copy(
        directory.join("config.toml"),
        folder.join(format!("{program}.toml")),
    );
    let log = fs::read_to_string(directory.join("containerd.log")).ok()?;
    let kept = folder.join(format!("{program}.log"));
    fs::write(&kept, &log).ok()?;
    Some((kept, log))
}

fn take_down() {
    let Some(names) = slot() else { return };
    // Another thread may still be at work, until its next `checkpoint`.
    let left = within(Duration::from_secs(5), || {
        let mut left = takedown::take_down(&names);
        left.extend(leaks::links(&names));
        ok_if(left.is_empty(), || left.join("\n"))
    });
    match left {
        Ok(()) => screen::note("taken down", "everything; nothing is left"),
        Err(left) => screen::note("left", &left),
    }
}

/// Waits for ever while everything is taken down.
pub fn checkpoint() {
    if ENDING.load(Ordering::SeqCst) {
        loop {
            std::thread::park();
        }
    }
}

/// The slot of this program. The slot's guard is a child of this process and has the number as its last argument.
fn slot() -> Option<Names> {
    let ourselves = std::process::id().cast_signed();
    proc::children(ourselves).iter().find_map(|child| {
        let command = child.command_line();
        let (program, number) = command.split_once(" guard ")?;
        let number = number.parse().ok()?;
        program.ends_with("/probe").then(|| Names::of(number))
    })
}
