//! The seccomp filter of the holder: five system calls, and the end of the process for any other.

use crate::machine::{nr, AUDIT_ARCH};
use crate::sys::{call, Answer};

/// `struct sock_filter` of `linux/filter.h`: one instruction, with the number of instructions to skip.
#[repr(C)]
struct Instruction {
    code: u16,
    if_equal: u8,
    if_not: u8,
    k: u32,
}

/// Loads the word at this offset of `struct seccomp_data`.
const fn load(offset: u32) -> Instruction {
    instruction(0x20, 0, 0, offset)
}

/// Compares the loaded word.
const fn equal(k: u32, if_equal: u8, if_not: u8) -> Instruction {
    instruction(0x15, if_equal, if_not, k)
}

/// Ends the filter with this verdict.
const fn verdict(verdict: u32) -> Instruction {
    instruction(0x06, 0, 0, verdict)
}

const fn instruction(code: u16, if_equal: u8, if_not: u8, k: u32) -> Instruction {
    Instruction {
        code,
        if_equal,
        if_not,
        k,
    }
}

const NUMBER: u32 = 0;
const MACHINE: u32 = 4;
const ALLOW: u32 = 0x7fff_0000;
const KILL_PROCESS: u32 = 0x8000_0000;

/// The last steps need munmap and close. With no file and no memory left these two are of no use to anybody.
static FILTER: [Instruction; 10] = [
    load(MACHINE),
    equal(AUDIT_ARCH, 0, 6),
    load(NUMBER),
    equal(nr::RT_SIGTIMEDWAIT as u32, 5, 0),
    equal(nr::WAIT4 as u32, 4, 0),
    equal(nr::EXIT_GROUP as u32, 3, 0),
    equal(nr::MUNMAP as u32, 2, 0),
    equal(nr::CLOSE as u32, 1, 0),
    verdict(KILL_PROCESS),
    verdict(ALLOW),
];

/// Puts the process under the filter, for good.
pub fn install() -> Answer {
    const SECCOMP_SET_MODE_FILTER: usize = 1;
    /// `struct sock_fprog` of `linux/filter.h`.
    #[repr(C)]
    struct Program {
        length: u16,
        filter: *const Instruction,
    }
    let program = Program {
        length: FILTER.len() as u16,
        filter: FILTER.as_ptr(),
    };
    let address = &program as *const Program as usize;
    // SAFETY: the kernel reads `program` and, through it, the instructions of `FILTER`, as many as `length` says.
    unsafe { call(nr::SECCOMP, [SECCOMP_SET_MODE_FILTER, 0, address, 0, 0]) }
}
