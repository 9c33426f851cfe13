//! System calls of the two machines, and the constants that the program uses.

use core::arch::asm;

pub type Errno = i32;

#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
pub mod nr {
    pub const READ: usize = 0;
    pub const WRITE: usize = 1;
    pub const CLOSE: usize = 3;
    pub const MMAP: usize = 9;
    pub const MPROTECT: usize = 10;
    pub const MUNMAP: usize = 11;
    pub const RT_SIGPROCMASK: usize = 14;
    pub const GETPID: usize = 39;
    pub const CLONE: usize = 56;
    pub const WAIT4: usize = 61;
    pub const CHDIR: usize = 80;
    pub const SETGROUPS: usize = 116;
    pub const SETRESUID: usize = 117;
    pub const SETRESGID: usize = 119;
    pub const CAPSET: usize = 126;
    pub const RT_SIGTIMEDWAIT: usize = 128;
    pub const PIVOT_ROOT: usize = 155;
    pub const PRCTL: usize = 157;
    pub const CHROOT: usize = 161;
    pub const MOUNT: usize = 165;
    pub const UMOUNT2: usize = 166;
    pub const EXIT_GROUP: usize = 231;
    pub const PPOLL: usize = 271;
    pub const UNSHARE: usize = 272;
    pub const SETNS: usize = 308;
    pub const SECCOMP: usize = 317;
    pub const CLOSE_RANGE: usize = 436;
    /// AUDIT_ARCH_X86_64
    pub const AUDIT_ARCH: u32 = 0xc000_003e;
}

#[cfg(target_arch = "aarch64")]
#[rustfmt::skip]
pub mod nr {
    pub const UMOUNT2: usize = 39;
    pub const MOUNT: usize = 40;
    pub const PIVOT_ROOT: usize = 41;
    pub const CHDIR: usize = 49;
    pub const CHROOT: usize = 51;
    pub const CLOSE: usize = 57;
    pub const READ: usize = 63;
    pub const WRITE: usize = 64;
    pub const PPOLL: usize = 73;
    pub const CAPSET: usize = 91;
    pub const EXIT_GROUP: usize = 94;
    pub const UNSHARE: usize = 97;
    pub const RT_SIGPROCMASK: usize = 135;
    pub const RT_SIGTIMEDWAIT: usize = 137;
    pub const SETRESUID: usize = 147;
    pub const SETRESGID: usize = 149;
    pub const SETGROUPS: usize = 159;
    pub const PRCTL: usize = 167;
    pub const GETPID: usize = 172;
    pub const MUNMAP: usize = 215;
    pub const CLONE: usize = 220;
    pub const MMAP: usize = 222;
    pub const MPROTECT: usize = 226;
    pub const WAIT4: usize = 260;
    pub const SETNS: usize = 268;
    pub const SECCOMP: usize = 277;
    pub const CLOSE_RANGE: usize = 436;
    /// AUDIT_ARCH_AARCH64
    pub const AUDIT_ARCH: u32 = 0xc000_00b7;
}

pub const SIGINT: i32 = 2;
pub const SIGKILL: usize = 9;
pub const SIGTERM: i32 = 15;
pub const SIGCHLD: i32 = 17;
/// What the program waits for, as the kernel's `sigset_t`: bit n-1 is signal n.
pub const SIGNALS: u64 = 1 << (SIGINT - 1) | 1 << (SIGTERM - 1) | 1 << (SIGCHLD - 1);

pub const WNOHANG: usize = 1;
/// Also children whose exit signal is not SIGCHLD.
pub const WALL: usize = 0x4000_0000;
pub const ALL_CHILDREN: usize = usize::MAX;

pub const CLONE_NEWNS: usize = 0x0002_0000;
pub const CLONE_NEWCGROUP: usize = 0x0200_0000;
pub const CLONE_NEWUTS: usize = 0x0400_0000;
pub const CLONE_NEWIPC: usize = 0x0800_0000;
pub const CLONE_NEWUSER: usize = 0x1000_0000;
pub const CLONE_NEWPID: usize = 0x2000_0000;
pub const CLONE_NEWNET: usize = 0x4000_0000;
pub const CLONE_PARENT: usize = 0x0000_8000;

/// The sixth argument is 0 for every call that is made here.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn raw(n: usize, a: [usize; 5]) -> isize {
    let result: isize;
    // SAFETY: the kernel clobbers rcx and r11 and changes only memory that the caller of `call` vouches for.
    unsafe {
        asm!("syscall", inlateout("rax") n => result, in("rdi") a[0], in("rsi") a[1], in("rdx") a[2], in("r10") a[3],
             in("r8") a[4], in("r9") 0, lateout("rcx") _, lateout("r11") _, options(nostack));
    }
    result
}

#[cfg(target_arch = "aarch64")]
#[inline(always)]
unsafe fn raw(n: usize, a: [usize; 5]) -> isize {
    let result: isize;
    // SAFETY: the kernel preserves every other register and changes only memory that the caller of `call` vouches for.
    unsafe {
        asm!("svc 0", in("x8") n, inlateout("x0") a[0] => result, in("x1") a[1], in("x2") a[2], in("x3") a[3],
             in("x4") a[4], in("x5") 0, options(nostack));
    }
    result
}

/// # Safety
/// Each argument that the call `n` takes for an address must be valid for what that call does with it.
#[inline(always)]
pub unsafe fn call(n: usize, a: [usize; 5]) -> Result<usize, Errno> {
    // SAFETY: as the caller promises.
    let result = unsafe { raw(n, a) };
    if result < 0 {
        Err(-result as Errno)
    } else {
        Ok(result as usize)
    }
}

pub fn exit(code: usize) -> ! {
    loop {
        // SAFETY: takes no address.
        let _ = unsafe { call(nr::EXIT_GROUP, [code, 0, 0, 0, 0]) };
    }
}

pub fn write(fd: usize, bytes: &[u8]) {
    let mut rest = bytes;
    while !rest.is_empty() {
        // SAFETY: `rest` is readable for its whole length.
        match unsafe { call(nr::WRITE, [fd, rest.as_ptr() as usize, rest.len(), 0, 0]) } {
            Ok(written) => rest = rest.get(written..).unwrap_or(&[]),
            Err(4) => {}
            Err(_) => return,
        }
    }
}

/// prctl with plain numbers.
pub fn prctl(option: usize, a: usize, b: usize) -> Result<usize, Errno> {
    // SAFETY: callers of this safe form pass no address but a constant string's.
    unsafe { call(nr::PRCTL, [option, a, b, 0, 0]) }
}

pub const PR_SET_PDEATHSIG: usize = 1;
pub const PR_SET_DUMPABLE: usize = 4;
pub const PR_SET_NAME: usize = 15;
pub const PR_CAPBSET_DROP: usize = 24;
pub const PR_SET_MM: usize = 35;
pub const PR_SET_MM_MAP: usize = 14;
pub const PR_SET_NO_NEW_PRIVS: usize = 38;
pub const PR_CAP_AMBIENT: usize = 47;
pub const PR_CAP_AMBIENT_CLEAR_ALL: usize = 4;

/// Blocks the signals that the program waits for. A blocked signal is kept for `rt_sigtimedwait`, also for PID 1 of a
/// pid namespace, to which the kernel does not deliver a signal that would take its default action.
pub fn block_signals() {
    let set = SIGNALS;
    const SIG_BLOCK: usize = 0;
    // SAFETY: `set` is a sigset_t of 8 bytes; the old set is not wanted.
    let _ = unsafe {
        call(
            nr::RT_SIGPROCMASK,
            [SIG_BLOCK, &set as *const u64 as usize, 0, 8, 0],
        )
    };
}

/// Waits, without a timeout, for one of the blocked signals.
pub fn next_signal() -> i32 {
    let set = SIGNALS;
    loop {
        // SAFETY: `set` is a sigset_t of 8 bytes; neither siginfo nor a timeout is passed.
        let signal = unsafe {
            call(
                nr::RT_SIGTIMEDWAIT,
                [&set as *const u64 as usize, 0, 0, 8, 0],
            )
        };
        if let Ok(signal) = signal {
            return signal as i32;
        }
    }
}

/// Reaps every child that has ended. One SIGCHLD may stand for many of them.
pub fn reap() {
    // SAFETY: neither status nor rusage is asked for.
    while let Ok(1..) = unsafe { call(nr::WAIT4, [ALL_CHILDREN, 0, WNOHANG | WALL, 0, 0]) } {}
}

/// What rustc may call for copies: there is no libc here.
mod memory {
    #[no_mangle]
    unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
        for i in 0..n {
            // SAFETY: memcpy's contract: both are valid for n bytes.
            unsafe { *to.add(i) = *from.add(i) };
        }
        to
    }

    #[no_mangle]
    unsafe extern "C" fn memset(to: *mut u8, byte: i32, n: usize) -> *mut u8 {
        for i in 0..n {
            // SAFETY: memset's contract: `to` is valid for n bytes.
            unsafe { *to.add(i) = byte as u8 };
        }
        to
    }

    #[no_mangle]
    unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
        for i in 0..n {
            // SAFETY: memcmp's contract: both are valid for n bytes.
            let (x, y) = unsafe { (*a.add(i), *b.add(i)) };
            if x != y {
                return i32::from(x) - i32::from(y);
            }
        }
        0
    }

    #[no_mangle]
    unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
        // SAFETY: the same contract.
        unsafe { memcmp(a, b, n) }
    }
}
