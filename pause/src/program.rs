//! The pause program (`init/`) as bytes, and as a file that nobody can change (memfd_create(2), `F_ADD_SEALS` of
//! fcntl(2)).

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use rustix::fs::{MemfdFlags, Mode, SealFlags, fchmod, fcntl_add_seals, memfd_create};
use rustix::io::Errno;

/// The pause program for this machine: a static ELF file.
pub const PROGRAM: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/pause"));

/// The pause program in a sealed memfd (close-on-exec). `/proc/1/exe` of a pod leads to this copy, which can be neither
/// written nor resized, and never to a file of the node.
///
/// # Errors
/// What the kernel says to a step of making the memfd.
pub fn program_memfd() -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // With vm.memfd_noexec=1, only a memfd made with MFD_EXEC can be executed. Before Linux 6.3 the flag is unknown
    // (EINVAL).
    let fd = match memfd_create("pause", flags | MemfdFlags::EXEC) {
        Err(Errno::INVAL) => memfd_create("pause", flags)?,
        other => other?,
    };
    let mut file = File::from(fd);
    file.write_all(PROGRAM)?;
    fchmod(&file, Mode::from_raw_mode(0o555))?;
    fcntl_add_seals(
        &file,
        SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL,
    )?;
    Ok(file.into())
}
