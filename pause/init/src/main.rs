//! The pause program: PID 1 of a pod that shares its process namespace, and the entry point of a pause image.
//!
//! ```text
//!   /pause                alone: warns unless it is PID 1, reaps, ends with 0 on SIGINT and SIGTERM
//!   /pause -v             prints its version
//!   pause hold <orders>   started by the crate `pause` from a sealed memfd: enters what only a process with one thread
//!                         can enter, locks itself in, reports that it is ready, reaps (hold.rs)
//! ```
//!
//! The program has no libc, no heap, no thread, no timer and no signal handler. The three signals are blocked and
//! waited for, so no signal is lost between reaping and sleeping.
//!
//! | file | |
//! |---|---|
//! | `hold.rs` | the holder's conversation with the shim, and the namespaces that the holder makes |
//! | `lock_in.rs`, `name.rs`, `filter.rs` | what the holder gives up, its name in `ps`, its seccomp filter |
//! | `final_loop.rs` | the holder's last step: no memory |
//! | `sys.rs`, `x86_64.rs`, `aarch64.rs` | system calls, and what differs between the machines |
//! | `start_stack.rs`, `memory.rs` | what a libc would do: arguments, memcpy |
#![no_std]
#![no_main]
// Else a loop over bytes may become a call of a libc that is not there.
#![no_builtins]
#![deny(unsafe_op_in_unsafe_fn)]

// The lines that follow would only say that a module is missing.
#[cfg(not(all(
    target_os = "linux",
    target_pointer_width = "64",
    target_endian = "little",
    any(target_arch = "x86_64", target_arch = "aarch64")
)))]
compile_error!(
    "the pause program, and so containerd-shim-pause-v2, is for Linux on x86-64 and arm64: \
     another machine needs a file as pause/init/src/x86_64.rs and aarch64.rs"
);

mod filter;
mod final_loop;
mod hold;
mod lock_in;
#[cfg_attr(target_arch = "x86_64", path = "x86_64.rs")]
#[cfg_attr(target_arch = "aarch64", path = "aarch64.rs")]
mod machine;
mod memory;
mod name;
mod start_stack;
mod sys;

use start_stack::StartStack;

/// Called by `_start` (`x86_64.rs`, `aarch64.rs`) with the stack pointer that the kernel set.
unsafe extern "C" fn start(stack: *const usize) -> ! {
    // SAFETY: `_start` passes the stack pointer on before anything has used the stack.
    let stack = unsafe { StartStack::new(stack) };
    match stack.argument(1) {
        b"-v" => {
            sys::write(
                1,
                concat!("pause ", env!("CARGO_PKG_VERSION"), "\n").as_bytes(),
            );
            sys::exit(0)
        }
        b"hold" => hold::run(stack.argument(2), stack),
        _ => alone(),
    }
}

/// The entry point of a pause image.
fn alone() -> ! {
    sys::block_signals();
    let _ = sys::set_no_new_privileges();
    let _ = sys::set_not_dumpable();
    if sys::process_id() != Ok(1) {
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
