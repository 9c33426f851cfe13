//! The size of a terminal, at the start and at each change.

use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::process::exit;

/// Blocks these signals, for `sigwait`. Gives the set of the signals.
fn block(signals: &[i32]) -> libc::sigset_t {
    let mut set = MaybeUninit::uninit();
    // SAFETY: sigemptyset initializes the set; the others read and change only that set and this thread's mask.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        for &signal in signals {
            libc::sigaddset(set.as_mut_ptr(), signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, set.as_ptr(), std::ptr::null_mut());
        set.assume_init()
    }
}

fn next(set: &libc::sigset_t) -> i32 {
    let mut signal = 0;
    // SAFETY: both pointers are to live values of the right type.
    unsafe { libc::sigwait(set, &raw mut signal) };
    signal
}

/// Prints the window's size now and at each change.
pub(crate) fn print() -> io::Result<String> {
    let set = block(&[libc::SIGWINCH]);
    std::thread::spawn(|| {
        let mut rest = Vec::new();
        let _ = io::stdin().read_to_end(&mut rest);
        exit(0);
    });
    loop {
        let size = rustix::termios::tcgetwinsize(io::stdout())?;
        println!("size {} {}", size.ws_row, size.ws_col);
        next(&set);
    }
}
