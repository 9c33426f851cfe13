//! The only unsafe code of this crate: a few system calls that have no safe form.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::io::Errno;
use rustix::ioctl::{self, Ioctl, IoctlOutput, Opcode};
use rustix::process::{
    Resource, Rlimit, Signal, getpid, getppid, set_parent_process_death_signal, setrlimit,
};
use rustix::thread::UnshareFlags;

/// Moves the calling thread into a new namespace. One of the namespace flags only.
pub(crate) fn unshare(flag: UnshareFlags) -> io::Result<()> {
    debug_assert!(!flag.intersects(UnshareFlags::FILES | UnshareFlags::FS | UnshareFlags::SYSVSEM));
    // SAFETY: what makes unshare unsafe is CLONE_FILES: file descriptors would mean different files in different
    // threads. A namespace flag leaves the table of files shared.
    unsafe { rustix::thread::unshare_unsafe(flag) }.map_err(io::Error::from)
}

/// Gives the calling thread a working directory, root and umask of its own, so that its `chdir` moves no other thread.
///
/// # Errors
/// What unshare(2) says for `CLONE_FS`.
pub fn own_cwd() -> io::Result<()> {
    // SAFETY: the function is unsafe because of `CLONE_FILES`, which could take descriptors away from other threads;
    // `CLONE_FS` alone leaves the table of descriptors shared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }.map_err(io::Error::from)
}

/// The clone flag of the kind of namespace behind `fd` (NS_GET_NSTYPE), or ENOTTY.
pub(crate) fn namespace_type(fd: BorrowedFd<'_>) -> io::Result<u32> {
    struct GetType;
    // SAFETY: NS_GET_NSTYPE takes no argument and answers with its return value, so no memory is involved.
    unsafe impl Ioctl for GetType {
        type Output = u32;
        const IS_MUTATING: bool = false;
        fn opcode(&self) -> Opcode {
            ioctl::opcode::none(0xb7, 0x3)
        }
        fn as_ptr(&mut self) -> *mut rustix::ffi::c_void {
            std::ptr::null_mut()
        }
        unsafe fn output_from_ptr(
            out: IoctlOutput,
            _: *mut rustix::ffi::c_void,
        ) -> rustix::io::Result<u32> {
            u32::try_from(out).map_err(|_| Errno::INVAL)
        }
    }
    // SAFETY: the caller has checked that the file is on the namespace file system, where this number means this.
    unsafe { ioctl::ioctl(fd.as_fd(), GetType) }.map_err(io::Error::from)
}

/// Lets a child die (SIGKILL) with the **thread** that spawns it, also when that thread is gone before the child asks.
///
/// A thread, not the process: spawn from one that lives as long as the child may, never from a pool of threads that
/// shrinks.
pub fn die_with_parent(command: &mut Command) -> &mut Command {
    let parent = getpid();
    let ask = move || {
        set_parent_process_death_signal(Some(Signal::KILL))?;
        if getppid() == Some(parent) {
            Ok(())
        } else {
            Err(io::Error::from(Errno::SRCH))
        }
    };
    // SAFETY: between fork and exec only what is async-signal-safe may run: `ask` makes two system calls, neither
    // allocates nor takes a lock, and its errors are plain numbers.
    unsafe { command.pre_exec(ask) }
}

/// Gives a child this limit of open files (setrlimit(2), `RLIMIT_NOFILE`) instead of the one of this process.
pub fn limit_open_files(command: &mut Command, limit: Rlimit) -> &mut Command {
    let ask = move || Ok(setrlimit(Resource::Nofile, limit.clone())?);
    // SAFETY: between fork and exec only what is async-signal-safe may run: `ask` makes one system call with two numbers
    // that are there already, neither allocates nor takes a lock, and its error is a plain number.
    unsafe { command.pre_exec(ask) }
}
