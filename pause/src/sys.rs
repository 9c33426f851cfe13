//! The only unsafe code of this crate: system calls, numbers, and what happens between fork and exec, that have no safe form.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
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

/// The user namespace that owns the namespace behind `fd` (NS_GET_USERNS of ioctl_ns(2)), or EPERM if it is outside of
/// the caller's.
pub(crate) fn owner(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    struct GetOwner;
    // SAFETY: NS_GET_USERNS takes no argument and answers with a new file descriptor, so no memory is involved, and
    // nobody else owns that descriptor.
    unsafe impl Ioctl for GetOwner {
        type Output = OwnedFd;
        const IS_MUTATING: bool = false;
        fn opcode(&self) -> Opcode {
            ioctl::opcode::none(0xb7, 0x1)
        }
        fn as_ptr(&mut self) -> *mut rustix::ffi::c_void {
            std::ptr::null_mut()
        }
        unsafe fn output_from_ptr(
            out: IoctlOutput,
            _: *mut rustix::ffi::c_void,
        ) -> rustix::io::Result<OwnedFd> {
            // SAFETY: a call that did not fail has returned a descriptor that was made for it (with O_CLOEXEC).
            Ok(unsafe { OwnedFd::from_raw_fd(out) })
        }
    }
    // SAFETY: the caller has checked that the file is on the namespace file system, where this number means this.
    unsafe { ioctl::ioctl(fd.as_fd(), GetOwner) }.map_err(io::Error::from)
}

/// The signal with this number, also one that has no name (a real-time signal, signal(7)). None for 0 and from 65 on.
pub fn signal(number: u32) -> Option<Signal> {
    const LAST: i32 = 64;
    let number = i32::try_from(number)
        .ok()
        .filter(|number| (1..=LAST).contains(number))?;
    // SAFETY: not zero, and no more than the kernel has. What the function warns of is a handler for a signal that the C
    // library keeps to itself; this one is only sent, and to programs with other libraries.
    Some(unsafe { Signal::from_raw_unchecked(number) })
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
    let ask = move || Ok(setrlimit(Resource::Nofile, limit)?);
    // SAFETY: between fork and exec only what is async-signal-safe may run: `ask` makes one system call with two numbers
    // that are there already, neither allocates nor takes a lock, and its error is a plain number.
    unsafe { command.pre_exec(ask) }
}

/// The first descriptor behind the standard streams.
const FIRST: RawFd = 3;

/// Gives a child these descriptors as 3, 4, … in this order. The parent's are closed when `command` is dropped.
///
/// # Errors
/// What fcntl(2) says for `F_DUPFD_CLOEXEC`.
pub fn hand_over<const N: usize>(
    command: &mut Command,
    fds: [OwnedFd; N],
) -> io::Result<&mut Command> {
    let targets: Vec<RawFd> = (FIRST..).take(N).collect();
    // A descriptor whose number is the target of another would be lost in the child. The standard library's own pipe,
    // too, which brings the error of exec: so all of these numbers are taken before it makes it.
    let mut taken = Vec::new();
    let mut sources = Vec::with_capacity(N);
    for fd in fds {
        loop {
            let copy = rustix::io::fcntl_dupfd_cloexec(&fd, FIRST)?;
            if targets.contains(&copy.as_raw_fd()) {
                taken.push(copy);
            } else {
                sources.push(copy);
                break;
            }
        }
    }
    let place = move || {
        // Moved in, to be closed with the command.
        let _ = &taken;
        for (source, target) in sources.iter().zip(&targets) {
            // SAFETY: this runs in the child, alone, where nothing uses the number again before exec; what had it is
            // closed by dup2, and `ManuallyDrop` keeps it from being closed here.
            let mut target = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(*target) });
            rustix::io::dup2(source, &mut target)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only what is async-signal-safe may run: `place` makes system calls, neither
    // allocates nor takes a lock, and its errors are plain numbers.
    Ok(unsafe { command.pre_exec(place) })
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

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};

    use super::*;

    #[test]
    fn a_child_finds_what_is_handed_over_in_this_order() -> io::Result<()> {
        let (mut first, first_writer) = io::pipe()?;
        let (mut second, second_writer) = io::pipe()?;
        let (third_reader, mut third) = io::pipe()?;
        third.write_all(b"in")?;
        drop(third);
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "echo one >&3; echo two >&4; cat <&5 >&4"]);
        let fds = [
            first_writer.into(),
            second_writer.into(),
            third_reader.into(),
        ];
        assert!(hand_over(&mut command, fds)?.status()?.success());
        drop(command);
        let mut texts = [String::new(), String::new()];
        first.read_to_string(&mut texts[0])?;
        second.read_to_string(&mut texts[1])?;
        assert_eq!(texts, ["one\n", "two\nin"]);
        Ok(())
    }

    #[test]
    fn a_program_that_is_not_there_is_an_error_all_the_same() -> io::Result<()> {
        let (reader, writer) = io::pipe()?;
        let mut command = Command::new("/no/such/program");
        let error = hand_over(&mut command, [reader.into(), writer.into()])?.spawn();
        assert_eq!(
            error.map(drop).map_err(|e| e.kind()),
            Err(io::ErrorKind::NotFound)
        );
        Ok(())
    }
}
