//! The system calls that the program makes, and their constants.
//!
//! Each call is a safe function: its arguments are numbers, or references from which the function takes the addresses.

use core::ffi::CStr;

use crate::machine::{nr, raw_call};

pub type Errno = i32;

/// What a call returned, or its errno.
pub type Answer = Result<usize, Errno>;

pub const EINTR: Errno = 4;
pub const EINVAL: Errno = 22;

pub const SIGINT: i32 = 2;
pub const SIGTERM: i32 = 15;
pub const SIGCHLD: i32 = 17;
/// What the program waits for, as the kernel's `sigset_t`: bit n-1 is signal n.
pub static SIGNALS: u64 = 1 << (SIGINT - 1) | 1 << (SIGTERM - 1) | 1 << (SIGCHLD - 1);
const SIGNALS_SIZE: usize = 8;

pub const WNOHANG: usize = 1;
/// `__WALL`: also children whose exit signal is not SIGCHLD.
pub const WALL: usize = 0x4000_0000;

pub const CLONE_NEWNS: usize = 0x0002_0000;
pub const CLONE_NEWCGROUP: usize = 0x0200_0000;
pub const CLONE_NEWUTS: usize = 0x0400_0000;
pub const CLONE_NEWIPC: usize = 0x0800_0000;
pub const CLONE_NEWUSER: usize = 0x1000_0000;
pub const CLONE_NEWPID: usize = 0x2000_0000;
pub const CLONE_NEWNET: usize = 0x4000_0000;

pub const POLLHUP: u16 = 0x10;

/// # Safety
/// Each argument that the call `n` takes for an address must be valid for what the call does with the address.
#[inline(always)]
pub unsafe fn call(n: usize, a: [usize; 5]) -> Answer {
    // SAFETY: the caller promises what `raw_call` asks.
    let result = unsafe { raw_call(n, a) };
    if result < 0 {
        Err(-result as Errno)
    } else {
        Ok(result as usize)
    }
}

pub fn exit(code: usize) -> ! {
    loop {
        // SAFETY: exit_group takes no address.
        let _ = unsafe { call(nr::EXIT_GROUP, [code, 0, 0, 0, 0]) };
    }
}

pub fn process_id() -> Answer {
    // SAFETY: getpid takes no address.
    unsafe { call(nr::GETPID, [0; 5]) }
}

/// Writes all of `bytes`; gives up at an error.
pub fn write(fd: usize, bytes: &[u8]) {
    let mut rest = bytes;
    while !rest.is_empty() {
        // SAFETY: `rest` is readable for its whole length.
        match unsafe { call(nr::WRITE, [fd, rest.as_ptr() as usize, rest.len(), 0, 0]) } {
            Ok(written) => rest = rest.get(written..).unwrap_or(&[]),
            Err(EINTR) => {}
            Err(_) => return,
        }
    }
}

/// Waits for one byte, which is thrown away. Returns 0 at the end of the stream.
pub fn read_byte(fd: usize) -> Answer {
    let mut byte = [0_u8; 1];
    // SAFETY: `byte` is writable for the one byte that is asked for.
    unsafe { call(nr::READ, [fd, byte.as_mut_ptr() as usize, 1, 0, 0]) }
}

/// The events of `fd` that poll(2) always reports (such as [`POLLHUP`]), without a wait.
pub fn poll(fd: usize) -> Result<u16, Errno> {
    #[repr(C)]
    struct PollFd {
        fd: u32,
        events: u16,
        revents: u16,
    }
    let mut poll = PollFd {
        fd: fd as u32,
        events: 0,
        revents: 0,
    };
    let no_time = [0_usize; 2];
    let (fds, timeout) = (&mut poll as *mut PollFd, no_time.as_ptr());
    // SAFETY: `fds` is one writable pollfd, `timeout` one readable timespec, and no signal set is passed.
    unsafe { call(nr::PPOLL, [fds as usize, 1, timeout as usize, 0, 8]) }?;
    Ok(poll.revents)
}

pub fn close(fd: usize) -> Answer {
    // SAFETY: close takes no address, and no value in this program owns a descriptor.
    unsafe { call(nr::CLOSE, [fd, 0, 0, 0, 0]) }
}

/// Closes `first` and every descriptor above it. Fails before Linux 5.9.
pub fn close_from(first: usize) -> Answer {
    // SAFETY: close_range takes no address, and no value in this program owns a descriptor.
    unsafe { call(nr::CLOSE_RANGE, [first, u32::MAX as usize, 0, 0, 0]) }
}

/// Moves the process into new namespaces of these kinds (`CLONE_NEW*`).
pub fn unshare(kinds: usize) -> Answer {
    // SAFETY: unshare takes no address.
    unsafe { call(nr::UNSHARE, [kinds, 0, 0, 0, 0]) }
}

/// Moves the process into the namespace of this kind (`CLONE_NEW*`) behind `fd`.
pub fn setns(fd: usize, kind: usize) -> Answer {
    // SAFETY: setns takes no address.
    unsafe { call(nr::SETNS, [fd, kind, 0, 0, 0]) }
}

/// fork(2), except that the child is a child of this process's parent: a sibling. Returns 0 in the sibling.
pub fn fork_sibling() -> Answer {
    const CLONE_PARENT: usize = 0x0000_8000;
    // SAFETY: without CLONE_VM the child has a copy of the memory, and no address is passed.
    unsafe { call(nr::CLONE, [CLONE_PARENT | SIGCHLD as usize, 0, 0, 0, 0]) }
}

/// Sets the real, effective and saved user id.
pub fn set_user(id: usize) -> Answer {
    // SAFETY: setresuid takes no address.
    unsafe { call(nr::SETRESUID, [id, id, id, 0, 0]) }
}

/// Sets the real, effective and saved group id.
pub fn set_group(id: usize) -> Answer {
    // SAFETY: setresgid takes no address.
    unsafe { call(nr::SETRESGID, [id, id, id, 0, 0]) }
}

/// Leaves every supplementary group.
pub fn clear_groups() -> Answer {
    // SAFETY: a list of no groups is not read.
    unsafe { call(nr::SETGROUPS, [0; 5]) }
}

/// Empties the effective, permitted and inheritable set.
pub fn clear_capabilities() -> Answer {
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0];
    let none = [0_u32; 6];
    let (header, none) = (header.as_ptr() as usize, none.as_ptr() as usize);
    // SAFETY: `header` and `none` are a header and the two sets of version 3, and live during the call.
    unsafe { call(nr::CAPSET, [header, none, 0, 0, 0]) }
}

/// Mounts a file system of type `kind`, which is also the name of its source.
pub fn mount(kind: &CStr, target: &CStr, flags: usize, options: &CStr) -> Answer {
    let (kind, target) = (kind.as_ptr() as usize, target.as_ptr() as usize);
    // SAFETY: the four addresses are of strings that end with a zero byte.
    unsafe {
        call(
            nr::MOUNT,
            [kind, target, kind, flags, options.as_ptr() as usize],
        )
    }
}

/// Makes a mount and those below it private: later mounts do not propagate from or to them.
pub fn make_private(target: &CStr) -> Answer {
    const MS_PRIVATE_REC: usize = 1 << 18 | 1 << 14;
    // SAFETY: `target` ends with a zero byte. A change of propagation reads neither source, type nor options.
    unsafe {
        call(
            nr::MOUNT,
            [0, target.as_ptr() as usize, 0, MS_PRIVATE_REC, 0],
        )
    }
}

/// Unmounts what is mounted at `target` as soon as nobody uses it (`MNT_DETACH`).
pub fn detach(target: &CStr) -> Answer {
    const MNT_DETACH: usize = 2;
    // SAFETY: `target` ends with a zero byte.
    unsafe { call(nr::UMOUNT2, [target.as_ptr() as usize, MNT_DETACH, 0, 0, 0]) }
}

pub fn pivot_root(new: &CStr, put_old: &CStr) -> Answer {
    let (new, put_old) = (new.as_ptr() as usize, put_old.as_ptr() as usize);
    // SAFETY: both end with a zero byte.
    unsafe { call(nr::PIVOT_ROOT, [new, put_old, 0, 0, 0]) }
}

pub fn chroot(path: &CStr) -> Answer {
    // SAFETY: `path` ends with a zero byte.
    unsafe { call(nr::CHROOT, [path.as_ptr() as usize, 0, 0, 0, 0]) }
}

pub fn chdir(path: &CStr) -> Answer {
    // SAFETY: `path` ends with a zero byte.
    unsafe { call(nr::CHDIR, [path.as_ptr() as usize, 0, 0, 0, 0]) }
}

/// # Safety
/// Where `option` takes an address, `a` must be valid for what prctl(2) does with the address.
#[inline(always)]
unsafe fn prctl(option: usize, a: usize) -> Answer {
    // SAFETY: the caller promises it for `a`; the other arguments are 0.
    unsafe { call(nr::PRCTL, [option, a, 0, 0, 0]) }
}

/// Has the kernel kill this process (SIGKILL) when the thread that started it ends.
pub fn die_with_parent() -> Answer {
    const PR_SET_PDEATHSIG: usize = 1;
    const SIGKILL: usize = 9;
    // SAFETY: PR_SET_PDEATHSIG takes no address.
    unsafe { prctl(PR_SET_PDEATHSIG, SIGKILL) }
}

pub fn set_not_dumpable() -> Answer {
    const PR_SET_DUMPABLE: usize = 4;
    // SAFETY: PR_SET_DUMPABLE takes no address.
    unsafe { prctl(PR_SET_DUMPABLE, 0) }
}

/// Sets the name in `/proc/<pid>/comm`.
pub fn set_comm(name: &CStr) -> Answer {
    const PR_SET_NAME: usize = 15;
    // SAFETY: `name` ends with a zero byte, where the kernel stops reading.
    unsafe { prctl(PR_SET_NAME, name.as_ptr() as usize) }
}

/// Takes a capability out of the bounding set. `EINVAL` if the kernel does not know the capability.
pub fn drop_from_bounding_set(capability: usize) -> Answer {
    const PR_CAPBSET_DROP: usize = 24;
    // SAFETY: PR_CAPBSET_DROP takes no address.
    unsafe { prctl(PR_CAPBSET_DROP, capability) }
}

pub fn set_no_new_privileges() -> Answer {
    const PR_SET_NO_NEW_PRIVS: usize = 38;
    // SAFETY: PR_SET_NO_NEW_PRIVS takes no address.
    unsafe { prctl(PR_SET_NO_NEW_PRIVS, 1) }
}

pub fn clear_ambient_set() -> Answer {
    const PR_CAP_AMBIENT: usize = 47;
    const PR_CAP_AMBIENT_CLEAR_ALL: usize = 4;
    // SAFETY: PR_CAP_AMBIENT_CLEAR_ALL takes no address.
    unsafe { prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL) }
}

/// Blocks the signals that the program waits for.
///
/// The kernel keeps a blocked signal for rt_sigtimedwait(2), also for PID 1 of a process namespace. A signal that is
/// not blocked would be lost there: the kernel delivers none to PID 1 that would take its default action.
pub fn block_signals() {
    const SIG_BLOCK: usize = 0;
    let set = &SIGNALS as *const u64 as usize;
    // SAFETY: `set` is a sigset_t of the size that is passed, and the old set is not asked for.
    let _ = unsafe { call(nr::RT_SIGPROCMASK, [SIG_BLOCK, set, 0, SIGNALS_SIZE, 0]) };
}

/// Waits, without a timeout, for one of the blocked signals.
pub fn next_signal() -> i32 {
    let set = &SIGNALS as *const u64 as usize;
    loop {
        // SAFETY: `set` is a sigset_t of the size that is passed; neither siginfo nor a timeout is passed.
        if let Ok(signal) = unsafe { call(nr::RT_SIGTIMEDWAIT, [set, 0, 0, SIGNALS_SIZE, 0]) } {
            return signal as i32;
        }
    }
}

/// Reaps every child that has ended. One SIGCHLD may stand for many children.
pub fn reap() {
    const ALL_CHILDREN: usize = usize::MAX;
    // SAFETY: neither status nor rusage is asked for.
    while let Ok(1..) = unsafe { call(nr::WAIT4, [ALL_CHILDREN, 0, WNOHANG | WALL, 0, 0]) } {}
}
