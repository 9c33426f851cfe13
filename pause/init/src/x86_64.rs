//! What differs on x86_64: the first instruction, the system calls, and the loop that needs no memory.

use core::arch::{asm, global_asm, naked_asm};

use crate::sys::{SIGINT, SIGNALS, SIGTERM, WALL, WNOHANG};

global_asm!(
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    "mov rdi, rsp",
    "and rsp, -16",
    "call {start}",
    start = sym crate::start
);

/// Numbers of the system calls (`asm/unistd_64.h`).
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
}

/// `AUDIT_ARCH_X86_64`: how a seccomp filter knows the machine.
pub const AUDIT_ARCH: u32 = 0xc000_003e;

/// A system call: its number, five arguments, and 0 as the sixth. Returns what the kernel leaves in the result
/// register.
///
/// # Safety
/// Each argument that the call `n` takes for an address must be valid for what the call does with the address.
#[inline(always)]
pub unsafe fn raw_call(n: usize, a: [usize; 5]) -> isize {
    let result: isize;
    // SAFETY: the kernel changes rax, rcx and r11, which are named here, and memory that the caller vouches for.
    unsafe {
        asm!("syscall", inlateout("rax") n => result, in("rdi") a[0], in("rsi") a[1], in("rdx") a[2], in("r10") a[3],
             in("r8") a[4], in("r9") 0, lateout("rcx") _, lateout("r11") _, options(nostack));
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
        "mov r12, rdx",
        // munmap(low, length)
        "mov eax, {munmap}",
        "syscall",
        // munmap [end, 16 MiB), then [2^n, 2^(n+1)) up to 2^57, each but for its last 64 KiB
        "mov r13d, 0x1000000",
        "2:",
        "mov eax, {munmap}",
        "mov rdi, r12",
        "lea rsi, [r13 - 0x10000]",
        "sub rsi, r12",
        "syscall",
        "mov r12, r13",
        "add r13, r13",
        "bt r13, 58",
        "jnc 2b",
        // close(0)
        "mov eax, {close}",
        "xor edi, edi",
        "syscall",
        "jmp {reap_and_wait}",
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
        "mov eax, {wait4}",
        "mov rdi, -1",
        "xor esi, esi",
        "mov edx, {how}",
        "xor r10d, r10d",
        "syscall",
        "test rax, rax",
        "jg 3b",
        // rt_sigtimedwait(&SIGNALS, 0, 0, 8)
        "mov eax, {sigtimedwait}",
        "lea rdi, [rip + {signals}]",
        "xor esi, esi",
        "xor edx, edx",
        "mov r10d, 8",
        "syscall",
        "cmp rax, {sigint}",
        "je 4f",
        "cmp rax, {sigterm}",
        "jne 3b",
        // exit_group(0)
        "4:",
        "mov eax, {exit_group}",
        "xor edi, edi",
        "syscall",
        "jmp 4b",
        wait4 = const nr::WAIT4,
        how = const WNOHANG | WALL,
        sigtimedwait = const nr::RT_SIGTIMEDWAIT,
        exit_group = const nr::EXIT_GROUP,
        sigint = const SIGINT,
        sigterm = const SIGTERM,
        signals = sym SIGNALS,
    )
}
