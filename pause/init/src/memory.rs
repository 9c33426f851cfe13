//! What rustc may call to copy, fill and compare bytes: there is no libc here.

#[no_mangle]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, n: usize) -> *mut u8 {
    for i in 0..n {
        // SAFETY: the caller of memcpy promises that both are valid for n bytes.
        unsafe { *to.add(i) = *from.add(i) };
    }
    to
}

#[no_mangle]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, n: usize) -> *mut u8 {
    for i in 0..n {
        // SAFETY: the caller of memset promises that `to` is valid for n bytes.
        unsafe { *to.add(i) = byte as u8 };
    }
    to
}

#[no_mangle]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    for i in 0..n {
        // SAFETY: the caller of memcmp promises that both are valid for n bytes.
        let (x, y) = unsafe { (*a.add(i), *b.add(i)) };
        if x != y {
            return i32::from(x) - i32::from(y);
        }
    }
    0
}

#[no_mangle]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, n: usize) -> i32 {
    // SAFETY: the caller of bcmp promises that both are valid for n bytes, as memcmp asks.
    unsafe { memcmp(a, b, n) }
}
