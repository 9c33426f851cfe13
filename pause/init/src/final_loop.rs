//! The end of the holder: the program gives up its memory, and the loop that is left needs none.

use crate::machine;
use crate::name;
use crate::start_stack::StartStack;

/// The largest page of a supported machine.
pub const LARGEST_PAGE: usize = 0x1_0000;

/// Unmaps everything but the program and its name, closes the lifeline, and from then on only reaps and waits.
///
/// The loop is written in assembly, because compiled code may need the stack, which is unmapped first.
///
/// munmap(2) takes any page-aligned range, whether or not anything is mapped there. Ranges that double reach the top of
/// every address space. A range fails alone and leaves the others done: a range beyond the top, or one with a vdso that
/// the kernel has sealed. Each range ends 64 KiB early, because the last page below the top of an address space may
/// belong to the kernel.
pub fn run(stack: StartStack) -> ! {
    const LARGEST_STACK_AT_START: usize = 0x10_0000;
    let low = (stack.address() - LARGEST_STACK_AT_START) & !(LARGEST_PAGE - 1);
    let length = stack.end() - low;
    // SAFETY: the process has one thread, and this call never returns to what the stack held. The program and its name
    // lie before `name::end()`, far below the stack.
    unsafe { machine::unmap_and_loop(low, length, name::end()) }
}
