//! The stack as the kernel leaves it to a new program: argc, argv, a null, the environment, a null, the auxiliary
//! vector of pairs up to AT_NULL, and the strings behind them.

/// The address of argc.
#[derive(Clone, Copy)]
pub struct StartStack(*const usize);

impl StartStack {
    /// # Safety
    /// `argc` must be the stack pointer that the program was started with, and what lies there must stay as the kernel
    /// left it.
    pub unsafe fn new(argc: *const usize) -> Self {
        Self(argc)
    }

    /// Argument `n`, where argument 0 is the name of the program. Empty if there is none.
    pub fn argument(self, n: usize) -> &'static [u8] {
        // SAFETY: `new` promises the kernel's layout. Below argc, entry `n` of argv is a string that nobody changes.
        unsafe {
            if n < *self.0 {
                text(*self.0.add(1 + n) as *const u8)
            } else {
                b""
            }
        }
    }

    pub fn address(self) -> usize {
        self.0 as usize
    }

    /// The end of the highest string on the stack, which is the one of AT_EXECFN.
    pub fn end(self) -> usize {
        const AT_EXECFN: usize = 31;
        // SAFETY: `new` promises the kernel's layout. Reading stops at the entry that ends the auxiliary vector.
        unsafe {
            let mut at = self.0.add(*self.0 + 2);
            while *at != 0 {
                at = at.add(1);
            }
            at = at.add(1);
            while *at != 0 {
                if *at == AT_EXECFN {
                    let name = *at.add(1);
                    return name + text(name as *const u8).len();
                }
                at = at.add(2);
            }
            at as usize
        }
    }
}

/// # Safety
/// `start` must be a string that ends with a zero byte and never changes.
unsafe fn text(start: *const u8) -> &'static [u8] {
    let mut length = 0;
    // SAFETY: the caller promises a zero byte, which is the last byte read.
    unsafe {
        while *start.add(length) != 0 {
            length += 1;
        }
        core::slice::from_raw_parts(start, length)
    }
}
