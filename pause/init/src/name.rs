//! What `ps` and `/proc/1/cmdline` show once the start-up stack is gone.

use core::ptr::addr_of;

use crate::final_loop::LARGEST_PAGE;
use crate::machine::nr;
use crate::sys::{call, Answer};

const NAME: [u8; 7] = *b"/pause\0";

extern "C" {
    // Symbols of `link.ld`, of which only the addresses count.
    static program_start: u8;
    static program_end: u8;
}

/// The page of the name, which begins behind the program. The name has a page of its own, because the kernel reads a
/// command line from anonymous memory only.
fn page() -> usize {
    addr_of!(program_end) as usize
}

/// The end of what the holder keeps mapped.
pub fn end() -> usize {
    page() + LARGEST_PAGE
}

/// Gives the name its page.
pub fn publish() -> Answer {
    const READ: usize = 1;
    const WRITE: usize = 2;
    const PRIVATE_FIXED_ANONYMOUS: usize = 0x02 | 0x10 | 0x20;
    let (page, flags) = (page(), PRIVATE_FIXED_ANONYMOUS);
    // SAFETY: the mapping replaces nothing. `link.ld` ends the program before this page, and the kernel maps stack and
    // vdso near the top of the address space.
    unsafe {
        call(
            nr::MMAP,
            [page, NAME.len(), READ | WRITE, flags, usize::MAX],
        )
    }?;
    // SAFETY: the page has just been mapped, is writable, and nothing refers to what is in it.
    unsafe { (page as *mut [u8; NAME.len()]).write(NAME) };
    // SAFETY: no code of this program writes to the page from here on.
    unsafe { call(nr::MPROTECT, [page, NAME.len(), READ, 0, 0]) }
}

/// Tells the kernel that the command line is the name, and that environment and auxiliary vector are gone: `environ`
/// then has no bytes. A kernel without CONFIG_CHECKPOINT_RESTORE refuses; `cmdline` and `environ` then lead to the
/// unmapped stack, which is as empty.
pub fn forget_start() {
    const PR_SET_MM: usize = 35;
    const PR_SET_MM_MAP: usize = 14;
    /// `struct prctl_mm_map` of `linux/prctl.h`; each pair is a start and an end.
    #[repr(C)]
    struct Map {
        code: [usize; 2],
        data: [usize; 2],
        brk: [usize; 2],
        stack: usize,
        arguments: [usize; 2],
        environment: [usize; 2],
        auxv: usize,
        auxv_size: u32,
        exe_fd: u32,
    }
    let (start, end) = (addr_of!(program_start) as usize, page());
    let at_null = [0_usize; 2];
    let map = Map {
        code: [start, end],
        data: [start, start],
        brk: [end, end],
        stack: start,
        arguments: [end, end + NAME.len()],
        environment: [start, start],
        auxv: at_null.as_ptr() as usize,
        auxv_size: 16,
        exe_fd: u32::MAX,
    };
    let (address, size) = (&map as *const Map as usize, size_of::<Map>());
    // SAFETY: the kernel reads `map`, whose size it is told, and the auxiliary vector in it; both live during the call.
    // The other addresses are noted, not read or written.
    let _ = unsafe { call(nr::PRCTL, [PR_SET_MM, PR_SET_MM_MAP, address, size, 0]) };
}
