//! What differs on aarch64: the first instruction, the system calls, and the loop that needs no memory.

use core::arch::{asm, global_asm, naked_asm};

use crate::sys::{SIGINT, SIGNALS, SIGTERM, WALL, WNOHANG};

global_asm!(
    ".globl _start",
    "_start:",
    "mov x29, xzr",
    "mov x0, sp",
    "b {start}",
    start = sym crate::start
);

/// Numbers of the system calls (`asm-generic/unistd.h`).
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
}

/// `AUDIT_ARCH_AARCH64`: how a seccomp filter knows the machine.
pub const AUDIT_ARCH: u32 = 0xc000_00b7;

/// A system call: its number, five arguments, and 0 as the sixth. Returns what the kernel leaves in the result
/// register.
///
/// # Safety
/// Each argument that the call `n` takes for an address must be valid for what the call does with the address.
#[inline(always)]
pub unsafe fn raw_call(n: usize, a: [usize; 5]) -> isize {
    let result: isize;
    // SAFETY: the kernel changes x0, which is named here, and memory that the caller vouches for.
    unsafe {
        asm!("svc 0", in("x8") n, inlateout("x0") a[0] => result, in("x1") a[1], in("x2") a[2], in("x3") a[3],
             in("x4") a[4], in("x5") 0, options(nostack));
    }
    result
}

/// Unmaps `length` bytes from `low`, then everything from `end` to the top of the address space, closes descriptor 0,
/// and goes on with [`reap_and_wait`].
///
/// # Safety
/// The process must have one thread. The program and its name must lie behind `low + length` or below `low`, and before
/// `end`.
#[unsafe(naked)]
pub unsafe extern "C" fn unmap_and_loop(low: usize, length: usize, end: usize) -> ! {
    naked_asm!(
        "mov x22, x2",
        // munmap(low, length)
        "mov x8, {munmap}",
        "svc 0",
        // munmap [end, 16 MiB), then [2^n, 2^(n+1)) up to 2^57, each but for its last 64 KiB
        "mov x20, 0x1000000",
        "2:",
        "mov x8, {munmap}",
        "mov x0, x22",
        "sub x1, x20, 0x10, lsl 12",
        "sub x1, x1, x22",
        "svc 0",
        "mov x22, x20",
        "add x20, x20, x20",
        "tbz x20, 58, 2b",
        // close(0)
        "mov x8, {close}",
        "mov x0, 0",
        "svc 0",
        "b {reap_and_wait}",
        munmap = const nr::MUNMAP,
        close = const nr::CLOSE,
        reap_and_wait = sym reap_and_wait,
    )
}

/// Reaps and waits until SIGINT or SIGTERM, then ends the process with 0.
///
/// Safe without a stack: the loop uses registers and [`SIGNALS`], which lies in the program.
#[unsafe(naked)]
extern "C" fn reap_and_wait() -> ! {
    naked_asm!(
        // while wait4(-1, 0, WNOHANG | __WALL, 0) > 0 {}
        "3:",
        "mov x8, {wait4}",
        "mov x0, -1",
        "mov x1, 0",
        "mov x2, {wnohang}",
        "orr x2, x2, {wall}",
        "mov x3, 0",
        "svc 0",
        "cmp x0, 0",
        "b.gt 3b",
        // rt_sigtimedwait(&SIGNALS, 0, 0, 8); the program fits into the reach of `adr`
        "mov x8, {sigtimedwait}",
        "adr x0, {signals}",
        "mov x1, 0",
        "mov x2, 0",
        "mov x3, 8",
        "svc 0",
        "cmp x0, {sigint}",
        "b.eq 4f",
        "cmp x0, {sigterm}",
        "b.ne 3b",
        // exit_group(0)
        "4:",
        "mov x8, {exit_group}",
        "mov x0, 0",
        "svc 0",
        "b 4b",
        wait4 = const nr::WAIT4,
        wnohang = const WNOHANG,
        wall = const WALL,
        sigtimedwait = const nr::RT_SIGTIMEDWAIT,
        exit_group = const nr::EXIT_GROUP,
        sigint = const SIGINT,
        sigterm = const SIGTERM,
        signals = sym SIGNALS,
    )
}
