//! S12: the pause program on its own, as the entry point of a pause image or in a shell.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout
)]

mod common;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

const WARNING: &str = "Warning: pause should be the first process\n";

/// The program from the sealed memfd, as the crate starts it.
fn command(program: &File) -> Command {
    let mut command = Command::new(format!("/proc/self/fd/{}", program.as_raw_fd()));
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

fn program() -> File {
    pause::program_memfd().unwrap().into()
}

/// Starts the program and waits until it is about to enter its loop: the warning is its last step before.
fn started() -> (Child, BufReader<std::process::ChildStderr>) {
    let mut child = command(&program()).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    assert_eq!(line, WARNING);
    (child, stderr)
}

/// The system call that the process sleeps in, once that is rt_sigtimedwait.
fn asleep(pid: i32) -> Option<String> {
    let number = if cfg!(target_arch = "x86_64") {
        "128 "
    } else {
        "137 "
    };
    let call = fs::read_to_string(format!("/proc/{pid}/syscall")).ok()?;
    call.starts_with(number).then_some(call)
}

fn send(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

#[test]
fn s12_v_prints_the_version() {
    let output = command(&program()).arg("-v").output().unwrap();
    assert!(output.status.success());
    let expected = concat!("pause ", env!("CARGO_PKG_VERSION"), "\n");
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
    assert!(output.stderr.is_empty());
}

#[test]
fn s12_it_warns_when_it_is_not_pid_1_and_ends_with_0_on_sigterm_and_sigint() {
    for (signal, name) in [(Signal::TERM, "Terminated"), (Signal::INT, "Interrupt")] {
        let (mut child, mut stderr) = started();
        send(&child, signal);
        assert_eq!(child.wait().unwrap().code(), Some(0));
        let mut rest = String::new();
        stderr.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, format!("Shutting down, got signal: {name}\n"));
    }
}

#[test]
fn s12_as_pid_1_it_does_not_warn_and_takes_sigterm() {
    let program = program();
    let path = format!("/proc/{}/fd/{}", std::process::id(), program.as_raw_fd());
    let child = Command::new("unshare")
        .args(["--pid", "--fork", "--kill-child", &path])
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let unshare = child.id();
    let children = format!("/proc/{unshare}/task/{unshare}/children");
    let pause = common::soon(|| {
        let pid = fs::read_to_string(&children).ok()?.trim().parse().ok()?;
        asleep(pid).map(|_| pid)
    });
    kill_process(Pid::from_raw(pause).unwrap(), Signal::TERM).unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(
        String::from_utf8_lossy(&output.stderr),
        "Shutting down, got signal: Terminated\n"
    );
}

#[test]
fn s12_it_sleeps_without_a_timer_in_under_40_kb() {
    let (mut child, _stderr) = started();
    let pid = i32::try_from(child.id()).unwrap();
    let call = common::soon(|| asleep(pid));
    // (set, no siginfo, no timeout, 8)
    let words: Vec<&str> = call.split(' ').collect();
    assert_eq!((words[2], words[3], words[4]), ("0x0", "0x0", "0x8"));
    let private = common::private_kb(pid);
    println!("private memory: {private} kB");
    assert!(private < 40, "{private} kB");
    send(&child, Signal::TERM);
    child.wait().unwrap();
}

#[test]
fn s12_other_signals_are_not_its_business() {
    let (mut child, _stderr) = started();
    send(&child, Signal::CHILD);
    send(&child, Signal::WINCH);
    send(&child, Signal::HUP);
    // SIGHUP ends the program, as any program without a handler.
    assert_eq!(child.wait().unwrap().signal(), Some(1));
}

#[test]
fn the_memfd_is_sealed_against_every_change() {
    let mut program = program();
    assert!(program.write_all(b"x").is_err());
    assert!(program.set_len(1).is_err());
    assert!(program.set_len(1 << 20).is_err());
    let seals = rustix::fs::fcntl_get_seals(&program).unwrap();
    assert!(seals.contains(rustix::fs::SealFlags::SEAL | rustix::fs::SealFlags::WRITE));
}

/// The one segment that is loaded, by the ELF file's header and program headers: its alignment and its length in the file
/// and in memory.
fn loaded() -> [u64; 3] {
    let word = |at: usize| u64::from_le_bytes(pause::PROGRAM[at..at + 8].try_into().unwrap());
    let half = |at: usize| {
        usize::from(u16::from_le_bytes(
            pause::PROGRAM[at..at + 2].try_into().unwrap(),
        ))
    };
    let (table, size, count) = (usize::try_from(word(32)).unwrap(), half(54), half(56));
    let headers = (0..count).map(|index| table + index * size);
    const PT_LOAD: u32 = 1;
    let loads: Vec<usize> = headers
        .filter(|&at| u32::try_from(word(at) & 0xffff_ffff) == Ok(PT_LOAD))
        .collect();
    let [load] = loads[..] else {
        panic!("{} segments are loaded", loads.len());
    };
    let flags = word(load) >> 32;
    assert_eq!(
        flags, 5,
        "the segment is readable and executable, and no more"
    );
    [word(load + 48), word(load + 32), word(load + 40)]
}

#[test]
fn the_program_is_a_static_elf_file_of_one_page() {
    assert!(pause::PROGRAM.starts_with(b"\x7fELF"));
    let [alignment, in_file, in_memory] = loaded();
    assert!(in_file <= 4096, "{in_file} bytes are loaded");
    assert_eq!(in_file, in_memory, "nothing is added in memory");
    // Else a kernel with larger pages cannot load it.
    let largest_page = if cfg!(target_arch = "aarch64") {
        0x1_0000
    } else {
        0x1000
    };
    assert_eq!(alignment % largest_page, 0, "{alignment:#x}");
}
