//! The pause program: PID 1 of a pod that shares its process namespace, and the entry point of a pause image.
//!
//! ```text
//!   /pause            alone: says so when it is not PID 1, reaps, ends with 0 on SIGINT and SIGTERM
//!   /pause -v         prints its version
//!   pause hold <how>  started by the crate `pause` from a sealed memfd: enters what only a process with one thread
//!                     can enter, locks itself in, reports that it is ready, reaps (hold.rs)
//! ```
//!
//! It has no libc, no heap, no thread, no timer and no signal handler: the three signals are blocked and waited for,
//! so none is lost between reaping and sleeping.
#![no_std]
#![no_main]
// Else a loop over bytes may become a call of a libc that is not there.
#![no_builtins]
#![deny(unsafe_op_in_unsafe_fn)]

mod hold;
mod sealed;
mod sys;

#[cfg(target_arch = "x86_64")]
core::arch::global_asm!(
    ".globl _start",
    "_start:",
    "xor ebp, ebp",
    "mov rdi, rsp",
    "and rsp, -16",
    "call {start}",
    start = sym start
);

#[cfg(target_arch = "aarch64")]
core::arch::global_asm!(
    ".globl _start",
    "_start:",
    "mov x29, xzr",
    "mov x0, sp",
    "b {start}",
    start = sym start
);

/// `stack` is what the kernel left: argc, argv, a null, the environment, a null, the auxiliary vector.
unsafe extern "C" fn start(stack: *const usize) -> ! {
    // SAFETY: the kernel's start-up stack, see above. Reading stops at argc.
    let argument = |n: usize| unsafe {
        if n < *stack {
            text(*stack.add(1 + n) as *const u8)
        } else {
            b""
        }
    };
    match argument(1) {
        b"-v" => {
            sys::write(
                1,
                concat!("pause ", env!("CARGO_PKG_VERSION"), "\n").as_bytes(),
            );
            sys::exit(0)
        }
        b"hold" => hold::run(argument(2), stack as usize),
        _ => alone(),
    }
}

/// # Safety
/// `start` must be a string that ends with a zero byte and is never changed.
unsafe fn text(start: *const u8) -> &'static [u8] {
    let mut length = 0;
    // SAFETY: as the caller promises; the zero byte is the last one read.
    unsafe {
        while *start.add(length) != 0 {
            length += 1;
        }
        core::slice::from_raw_parts(start, length)
    }
}

fn alone() -> ! {
    sys::block_signals();
    let _ = sys::prctl(sys::PR_SET_NO_NEW_PRIVS, 1, 0);
    let _ = sys::prctl(sys::PR_SET_DUMPABLE, 0, 0);
    // SAFETY: getpid takes no address.
    if unsafe { sys::call(sys::nr::GETPID, [0; 5]) } != Ok(1) {
        sys::write(2, b"Warning: pause should be the first process\n");
    }
    loop {
        sys::reap();
        let name: &[u8] = match sys::next_signal() {
            sys::SIGINT => b"Interrupt\n",
            sys::SIGTERM => b"Terminated\n",
            _ => continue,
        };
        sys::write(2, b"Shutting down, got signal: ");
        sys::write(2, name);
        sys::exit(0)
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    sys::exit(101)
}

/// Named by the unwinding tables of `core`, which the link throws away.
#[no_mangle]
extern "C" fn rust_eh_personality() {}
