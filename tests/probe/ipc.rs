//! System V and POSIX IPC objects.

use std::ffi::CString;
use std::io;

const SIZE: usize = 4096;

fn checked(result: i32, what: &str) -> io::Result<i32> {
    if result >= 0 {
        Ok(result)
    } else {
        Err(failed(what))
    }
}

fn failed(what: &str) -> io::Error {
    let error = io::Error::last_os_error();
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

pub(crate) fn shm_create(key: i32, text: &str) -> io::Result<String> {
    // SAFETY: no pointers.
    let id = checked(
        unsafe { libc::shmget(key, SIZE, libc::IPC_CREAT | libc::IPC_EXCL | 0o666) },
        "shmget",
    )?;
    let bytes = text.as_bytes();
    assert!(bytes.len() < SIZE);
    // SAFETY: shmat maps SIZE fresh zero bytes, the text is shorter, and the mapping lives until the process ends.
    unsafe {
        let at = libc::shmat(id, std::ptr::null(), 0);
        if at as isize == -1 {
            return Err(failed("shmat"));
        }
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), at.cast(), bytes.len());
    }
    Ok(String::new())
}

pub(crate) fn shm_read(key: i32) -> io::Result<String> {
    // SAFETY: no pointers.
    let id = checked(unsafe { libc::shmget(key, SIZE, 0) }, "shmget")?;
    // SAFETY: the segment has SIZE bytes, ends in zeros (the writer's text is shorter), and nobody writes to it now.
    unsafe {
        let at = libc::shmat(id, std::ptr::null(), libc::SHM_RDONLY);
        if at as isize == -1 {
            return Err(failed("shmat"));
        }
        Ok(std::ffi::CStr::from_ptr(at.cast())
            .to_string_lossy()
            .into_owned())
    }
}

pub(crate) fn sem_create(key: i32, value: i32) -> io::Result<String> {
    // SAFETY: no pointers; SETVAL takes an int.
    unsafe {
        let id = checked(
            libc::semget(key, 1, libc::IPC_CREAT | libc::IPC_EXCL | 0o666),
            "semget",
        )?;
        checked(libc::semctl(id, 0, libc::SETVAL, value), "semctl")?;
    }
    Ok(String::new())
}

pub(crate) fn sem_read(key: i32) -> io::Result<String> {
    // SAFETY: no pointers.
    let value = unsafe {
        let id = checked(libc::semget(key, 1, 0), "semget")?;
        checked(libc::semctl(id, 0, libc::GETVAL), "semctl")?
    };
    Ok(value.to_string())
}

pub(crate) fn mq_send(name: &str, text: &str) -> io::Result<String> {
    let name = CString::new(name)?;
    // SAFETY: the name and the attributes live through the call; the message pointer and length are the text's.
    unsafe {
        let mut attributes: libc::mq_attr = std::mem::zeroed();
        attributes.mq_maxmsg = 4;
        attributes.mq_msgsize = 256;
        let flags = libc::O_CREAT | libc::O_WRONLY;
        let queue = checked(
            libc::mq_open(name.as_ptr(), flags, 0o666, &raw mut attributes),
            "mq_open",
        )?;
        checked(
            libc::mq_send(queue, text.as_ptr().cast(), text.len(), 0),
            "mq_send",
        )?;
    }
    Ok(String::new())
}

pub(crate) fn mq_receive(name: &str) -> io::Result<String> {
    let name = CString::new(name)?;
    let mut buffer = [0_u8; 256];
    // SAFETY: the name lives through the call; the length is the buffer's.
    let length = unsafe {
        let queue = checked(
            libc::mq_open(name.as_ptr(), libc::O_RDONLY | libc::O_NONBLOCK),
            "mq_open",
        )?;
        libc::mq_receive(
            queue,
            buffer.as_mut_ptr().cast(),
            buffer.len(),
            std::ptr::null_mut(),
        )
    };
    let length = usize::try_from(length).map_err(|_| failed("mq_receive"))?;
    Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
}
