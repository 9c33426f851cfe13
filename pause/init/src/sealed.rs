//! The end of the holder: memory is given up, and what is left is a loop that needs none.

use crate::sys::{self, nr};

/// Of a supported machine.
pub const LARGEST_PAGE: usize = 0x1_0000;

/// The auxiliary vector's AT_EXECFN: the highest string on the stack.
fn end_of_stack(stack: usize) -> usize {
    const AT_EXECFN: usize = 31;
    let mut at = stack as *const usize;
    // SAFETY: the kernel's start-up stack (see `start`), read up to the entry that ends the auxiliary vector.
    unsafe {
        at = at.add(*at + 2);
        while *at != 0 {
            at = at.add(1);
        }
        at = at.add(1);
        while *at != 0 {
            if *at == AT_EXECFN {
                let name = *at.add(1);
                return name + crate::text(name as *const u8).len();
            }
            at = at.add(2);
        }
    }
    at as usize
}

/// Unmaps all but the program and its name, closes the lifeline, and from then on only reaps and waits. In assembly, because it must
/// not need the stack that it unmaps. munmap takes any page-aligned range with anything or nothing in it; ranges that
/// double reach the top of every address space, and one that fails (beyond it, or a vdso that the kernel sealed) leaves
/// the others alone.
/// `stack` is where the kernel's start-up stack began, `end` is behind the last page to keep.
pub fn run(stack: usize, end: usize) -> ! {
    const LARGEST_STACK_AT_START: usize = 0x10_0000;
    static SIGNALS: u64 = sys::SIGNALS;
    let low = (stack - LARGEST_STACK_AT_START) & !(LARGEST_PAGE - 1);
    let length = end_of_stack(stack) - low;
    // SAFETY: after the first munmap nothing is used but registers and SIGNALS, which lies in the program's mapping.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        core::arch::asm!(
            "mov eax, {munmap}",
            "syscall",
            // [behind the name's page, 16 MiB), then [2^n, 2^(n+1)) up to 2^57
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
            "mov eax, {close}",
            "xor edi, edi",
            "syscall",
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
            "4:",
            "mov eax, {exit_group}",
            "xor edi, edi",
            "syscall",
            "jmp 4b",
            munmap = const nr::MUNMAP,
            close = const nr::CLOSE,
            wait4 = const nr::WAIT4,
            how = const sys::WNOHANG | sys::WALL,
            sigtimedwait = const nr::RT_SIGTIMEDWAIT,
            exit_group = const nr::EXIT_GROUP,
            sigint = const sys::SIGINT,
            sigterm = const sys::SIGTERM,
            signals = sym SIGNALS,
            in("rdi") low,
            in("rsi") length,
            in("r12") end,
            options(noreturn, nostack)
        )
    }
    // SAFETY: as above.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        core::arch::asm!(
            "mov x8, {munmap}",
            "svc 0",
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
            "mov x8, {close}",
            "mov x0, 0",
            "svc 0",
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
            "mov x8, {sigtimedwait}",
            "mov x0, x21",
            "mov x1, 0",
            "mov x2, 0",
            "mov x3, 8",
            "svc 0",
            "cmp x0, {sigint}",
            "b.eq 4f",
            "cmp x0, {sigterm}",
            "b.ne 3b",
            "4:",
            "mov x8, {exit_group}",
            "mov x0, 0",
            "svc 0",
            "b 4b",
            munmap = const nr::MUNMAP,
            close = const nr::CLOSE,
            wait4 = const nr::WAIT4,
            wnohang = const sys::WNOHANG,
            wall = const sys::WALL,
            sigtimedwait = const nr::RT_SIGTIMEDWAIT,
            exit_group = const nr::EXIT_GROUP,
            sigint = const sys::SIGINT,
            sigterm = const sys::SIGTERM,
            in("x0") low,
            in("x1") length,
            in("x22") end,
            in("x21") core::ptr::addr_of!(SIGNALS) as usize,
            options(noreturn, nostack)
        )
    }
}
