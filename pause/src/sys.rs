//! The only unsafe code of this crate: system calls, signal numbers, and work between fork and exec, which have no safe
//! form.

use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use rustix::fs::fstatfs;
use rustix::io::Errno;
use rustix::ioctl::{self, Ioctl, IoctlOutput, Opcode};
use rustix::process::{
    Resource, Rlimit, Signal, getpid, getppid, set_parent_process_death_signal, setrlimit,
};
use rustix::thread::UnshareFlags;

use crate::NamespaceKind;

/// Moves the calling thread into a new namespace. A process namespace takes the thread's future children instead.
pub(crate) fn unshare(kind: NamespaceKind) -> io::Result<()> {
    // SAFETY: only `CLONE_FILES` makes unshare unsafe: a descriptor would mean different files in different threads.
    // The flag of a kind is a namespace flag, which leaves the table of descriptors shared.
    unsafe { rustix::thread::unshare_unsafe(kind.unshare_flag()) }.map_err(io::Error::from)
}

/// Gives the calling thread a working directory, root and umask of its own, so that its `chdir` moves no other thread.
///
/// # Errors
/// What unshare(2) says for `CLONE_FS`.
pub fn own_cwd() -> io::Result<()> {
    // SAFETY: only `CLONE_FILES` makes unshare unsafe: a descriptor would mean different files in different threads.
    // `CLONE_FS` alone leaves the table of descriptors shared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }.map_err(io::Error::from)
}

/// A file of nsfs, the kernel's file system of namespaces. Only such a file takes the calls of ioctl_ns(2).
pub(crate) struct NamespaceFile(File);

impl NamespaceFile {
    /// `None` for a file of another file system.
    ///
    /// # Errors
    /// What fstatfs(2) says.
    pub(crate) fn new(file: File) -> io::Result<Option<Self>> {
        const NSFS_MAGIC: u32 = 0x6e73_6673;
        let magic = fstatfs(&file)?.f_type;
        Ok((u32::try_from(magic) == Ok(NSFS_MAGIC)).then_some(Self(file)))
    }

    pub(crate) fn into_file(self) -> File {
        self.0
    }

    /// The flag of unshare(2) for this kind of namespace (`NS_GET_NSTYPE`).
    pub(crate) fn unshare_flag(&self) -> io::Result<u32> {
        struct GetType;
        // SAFETY: NS_GET_NSTYPE takes no argument and answers with its return value, so the kernel touches no memory.
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
        // SAFETY: the file is on nsfs (`new` has checked it), where this number is NS_GET_NSTYPE.
        unsafe { ioctl::ioctl(self.0.as_fd(), GetType) }.map_err(io::Error::from)
    }

    /// The user namespace that owns this namespace (`NS_GET_USERNS`).
    ///
    /// # Errors
    /// `EPERM` if the owner is outside of the caller's user namespace.
    pub(crate) fn owner(&self) -> io::Result<OwnedFd> {
        struct GetOwner;
        // SAFETY: NS_GET_USERNS takes no argument and answers with a new descriptor, so the kernel touches no memory.
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
                // SAFETY: the call has not failed, so `out` is a descriptor that the kernel made for this call, with
                // O_CLOEXEC, and that nobody else owns.
                Ok(unsafe { OwnedFd::from_raw_fd(out) })
            }
        }
        // SAFETY: the file is on nsfs (`new` has checked it), where this number is NS_GET_USERNS.
        unsafe { ioctl::ioctl(self.0.as_fd(), GetOwner) }.map_err(io::Error::from)
    }
}

/// The signal with this number; `None` for 0 and from 65 on. Real-time signals, which have no name, are included
/// (signal(7)).
pub fn signal_from_number(number: u32) -> Option<Signal> {
    const LAST: i32 = 64;
    let number = i32::try_from(number)
        .ok()
        .filter(|number| (1..=LAST).contains(number))?;
    // SAFETY: the number is one of the kernel's signals, 1 to 64. The function warns of a handler for a signal that the
    // C library reserves. This signal is only sent, and to programs with other libraries.
    Some(unsafe { Signal::from_raw_unchecked(number) })
}

/// Has the kernel kill a child (SIGKILL) when the **thread** that spawns the child ends (`PR_SET_PDEATHSIG` of
/// prctl(2)). The child asks the kernel for this before exec, and does not exec if this process is gone by then.
///
/// The thread counts, not the process. So spawn from a thread that lives as long as the child may, never from a pool of
/// threads that shrinks.
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
    // SAFETY: between fork and exec only async-signal-safe code may run. `ask` makes two system calls, allocates
    // nothing, takes no lock, and its errors are plain numbers.
    unsafe { command.pre_exec(ask) }
}

/// Gives a child this limit of open files (`RLIMIT_NOFILE` of setrlimit(2)) instead of this process's limit.
pub fn limit_open_files(command: &mut Command, limit: Rlimit) -> &mut Command {
    let ask = move || Ok(setrlimit(Resource::Nofile, limit)?);
    // SAFETY: between fork and exec only async-signal-safe code may run. `ask` makes one system call with two numbers
    // that are there already, allocates nothing, takes no lock, and its error is a plain number.
    unsafe { command.pre_exec(ask) }
}

/// The first descriptor behind the standard streams.
const FIRST: RawFd = 3;

/// Gives a child these descriptors as 3, 4, … in this order. This process's copies are closed when `command` is
/// dropped.
///
/// # Errors
/// What fcntl(2) says for `F_DUPFD_CLOEXEC`.
pub fn hand_over<const N: usize>(
    command: &mut Command,
    fds: [OwnedFd; N],
) -> io::Result<&mut Command> {
    let targets: Vec<RawFd> = (FIRST..).take(N).collect();
    // A descriptor of the child is lost if its number is the target of another descriptor. So no source has such a
    // number. The standard library makes a pipe later, for the error of exec: `taken` keeps such numbers from the pipe.
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
        // Moves `taken` into the closure, which the command owns.
        let _ = &taken;
        for (source, target) in sources.iter().zip(&targets) {
            // SAFETY: nothing else uses this number between fork and exec, when the child has one thread. dup2 closes
            // what had the number, and `ManuallyDrop` keeps the new descriptor open.
            let mut target = ManuallyDrop::new(unsafe { OwnedFd::from_raw_fd(*target) });
            rustix::io::dup2(source, &mut target)?;
        }
        Ok(())
    };
    // SAFETY: between fork and exec only async-signal-safe code may run. `place` makes system calls, allocates nothing,
    // takes no lock, and its errors are plain numbers.
    Ok(unsafe { command.pre_exec(place) })
}

/// Makes a mount and the mounts below it idmapped (`MOUNT_ATTR_IDMAP` of mount_setattr(2)): a file of user n on disk
/// belongs, through the mount, to the user that the user namespace `user` maps n to.
///
/// The mounts also become private, so that later mounts in them do not propagate to the mounts they were cloned from.
/// The mounts must not be attached anywhere yet: `mount` is a clone by open_tree(2).
///
/// # Errors
/// What mount_setattr(2) says: `ENOSYS` before Linux 5.12, `EINVAL` for a file system that cannot be idmapped.
pub fn map_owners(mount: BorrowedFd<'_>, user: BorrowedFd<'_>) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: libc::MS_PRIVATE,
        userns_fd: u64::try_from(user.as_raw_fd()).map_err(io::Error::other)?,
    };
    // SAFETY: the path ends with a zero byte. The kernel only reads `attributes`, whose size it is told. Both live
    // during the call.
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
