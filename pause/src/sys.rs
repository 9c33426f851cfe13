//! The only unsafe code of this crate: system calls that have no safe form.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::io::Errno;
use rustix::ioctl::{self, Ioctl, IoctlOutput, Opcode};
use rustix::process::{Signal, getpid, getppid, set_parent_process_death_signal};
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

/// Makes a mount, and those below it, an idmapped one: files of a user that `user` maps belong there to whom it maps
/// that user to. The mounts also become private, so that nothing of what is done to them reaches where they were cloned
/// from. They must be attached nowhere yet (a clone by open_tree(2)).
///
/// # Errors
/// What mount_setattr(2) says: `ENOSYS` before Linux 5.12, `EINVAL` for a filesystem that the kernel cannot map.
pub fn map_owners(mount: BorrowedFd<'_>, user: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: u64::try_from(user.as_raw_fd()).map_err(io::Error::other)?,
    };
    // SAFETY: the path is a string that ends in 0, the kernel only reads the structure, whose size it is told, and both
    // live during the call.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if answer == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}
