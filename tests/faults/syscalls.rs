//! The system calls of the shim: the errors that the kernel may give for each, or why a call is left alone.

use nix::errno::Errno;
use nix::errno::Errno::*;

use crate::tracer::Call;

/// Which argument says what a call is about.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Argument {
    /// None.
    None,
    /// The argument with this number is the address of a path.
    Path(usize),
    /// The first argument is a descriptor.
    Descriptor,
}

/// What can happen to a call.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Fate {
    /// The call may fail with one of these.
    Fails(&'static [Errno]),
    /// As reads, by what the descriptor is.
    Reads,
    /// As writes, by what the descriptor is.
    Writes,
    /// fcntl: only a duplicate may fail.
    Duplicates,
    /// prlimit64: only a new limit may be refused.
    Limits,
    /// The call is left alone, for this reason.
    LeftAlone(&'static str),
}

/// A system call.
#[derive(Debug)]
pub(crate) struct Known {
    number: i64,
    /// The name.
    pub(crate) name: &'static str,
    /// What the call is about.
    pub(crate) argument: Argument,
    /// What can happen to the call.
    pub(crate) fate: Fate,
}

const ALLOCATION: Fate = Fate::Fails(&[ENOMEM]);
const CANNOT: Fate = Fate::LeftAlone("the kernel refuses it for no lack of anything");
const LOCKS: Fate = Fate::LeftAlone("an error of it is an error of the program");
const FREES: Fate =
    Fate::LeftAlone("what it frees would stay, and no kernel leaves it: only a bug would");
const HEAP: Fate = Fate::LeftAlone(
    "glibc's malloc goes on in another place, and may abort at a later allocation: the end of a shim that is documented",
);
const RANDOM: Fate = Fate::LeftAlone("a kernel that has booted always has random bytes");

macro_rules! table {
    ($($call:ident $argument:expr, $fate:expr;)*) => {
        &[$(Known {
            number: libc::$call,
            // `SYS_` is 4 bytes.
            name: stringify!($call).split_at(4).1,
            argument: $argument,
            fate: $fate,
        },)*]
    };
}

use Argument::{Descriptor, None as Nothing, Path};
use Fate::{Duplicates, Fails, Reads, Writes};

#[rustfmt::skip]
static TABLE: &[Known] = table! {
    SYS_openat Path(1), Fails(&[EMFILE, ENOMEM, EINTR, EIO]);
    SYS_open Path(0), Fails(&[EMFILE, ENOMEM, EINTR, EIO]);
    SYS_openat2 Path(1), Fails(&[EMFILE, ENOMEM, EAGAIN]);
    SYS_read Descriptor, Reads;
    SYS_pread64 Descriptor, Reads;
    SYS_readv Descriptor, Reads;
    SYS_recvfrom Descriptor, Reads;
    SYS_recvmsg Descriptor, Reads;
    SYS_write Descriptor, Writes;
    SYS_pwrite64 Descriptor, Writes;
    SYS_writev Descriptor, Writes;
    SYS_sendto Descriptor, Writes;
    SYS_sendmsg Descriptor, Writes;
    SYS_fstat Descriptor, Fails(&[EIO]);
    SYS_stat Path(0), Fails(&[ENOMEM, EIO]);
    SYS_lstat Path(0), Fails(&[ENOMEM, EIO]);
    SYS_newfstatat Path(1), Fails(&[ENOMEM, EIO]);
    SYS_statx Path(1), Fails(&[ENOMEM, EIO]);
    SYS_statfs Path(0), Fails(&[ENOMEM, EIO]);
    SYS_fstatfs Descriptor, Fails(&[EIO]);
    SYS_access Path(0), Fails(&[ENOMEM]);
    SYS_faccessat2 Path(1), Fails(&[ENOMEM]);
    SYS_readlink Path(0), Fails(&[ENOMEM, EIO]);
    SYS_readlinkat Path(1), Fails(&[ENOMEM, EIO]);
    SYS_getcwd Nothing, Fails(&[ENOMEM]);
    SYS_chdir Path(0), Fails(&[ENOMEM, EACCES]);
    SYS_fchdir Descriptor, Fails(&[EACCES]);
    SYS_getdents64 Descriptor, Fails(&[ENOMEM, EIO]);
    SYS_mkdir Path(0), Fails(&[ENOSPC, ENOMEM, EROFS]);
    SYS_mkdirat Path(1), Fails(&[ENOSPC, ENOMEM, EROFS]);
    SYS_mknod Path(0), Fails(&[ENOSPC, EPERM]);
    SYS_mknodat Path(1), Fails(&[ENOSPC, EPERM]);
    SYS_rename Path(0), Fails(&[ENOSPC, EIO]);
    SYS_renameat Path(1), Fails(&[ENOSPC, EIO]);
    SYS_renameat2 Path(1), Fails(&[ENOSPC, EIO]);
    SYS_link Path(0), Fails(&[ENOSPC, EMLINK]);
    SYS_linkat Path(1), Fails(&[ENOSPC, EMLINK]);
    SYS_symlink Path(0), Fails(&[ENOSPC]);
    SYS_symlinkat Path(0), Fails(&[ENOSPC]);
    SYS_unlink Path(0), Fails(&[EIO, ENOMEM, EROFS]);
    SYS_unlinkat Path(1), Fails(&[EIO, ENOMEM, EROFS]);
    SYS_rmdir Path(0), Fails(&[EBUSY, EIO, ENOMEM]);
    SYS_chmod Path(0), Fails(&[EIO, EROFS]);
    SYS_fchmod Descriptor, Fails(&[EIO, EROFS]);
    SYS_fchmodat Path(1), Fails(&[EIO, EROFS]);
    SYS_chown Path(0), Fails(&[EIO, EPERM]);
    SYS_fchown Descriptor, Fails(&[EIO, EPERM]);
    SYS_fchownat Path(1), Fails(&[EIO, EPERM]);
    SYS_ftruncate Descriptor, Fails(&[EIO, EINTR]);
    SYS_fallocate Descriptor, Fails(&[ENOSPC, EINTR]);
    SYS_fsync Descriptor, Fails(&[EIO, ENOSPC]);
    SYS_flock Descriptor, Fails(&[EINTR, ENOLCK]);
    SYS_fcntl Descriptor, Duplicates;
    SYS_ioctl Descriptor, Fails(&[ENOMEM, EIO]);
    SYS_dup Descriptor, Fails(&[EMFILE]);
    SYS_dup2 Descriptor, Fails(&[EINTR, EBUSY]);
    SYS_dup3 Descriptor, Fails(&[EINTR, EBUSY]);
    SYS_pipe2 Nothing, Fails(&[EMFILE, ENFILE]);
    SYS_socket Nothing, Fails(&[EMFILE, ENOMEM]);
    SYS_socketpair Nothing, Fails(&[EMFILE, ENOMEM]);
    SYS_bind Descriptor, Fails(&[ENOMEM, EADDRINUSE]);
    SYS_listen Descriptor, Fails(&[ENOMEM]);
    SYS_accept4 Descriptor, Fails(&[EMFILE, ENOMEM, ECONNABORTED]);
    // Not EAGAIN: that says that somebody listens, and the socket then stays, as it must.
    SYS_connect Descriptor, Fails(&[ECONNREFUSED, ENOMEM]);
    SYS_shutdown Descriptor, Fails(&[ENOTCONN]);
    SYS_getsockopt Descriptor, Fails(&[ENOMEM]);
    SYS_setsockopt Descriptor, Fails(&[ENOMEM]);
    SYS_getsockname Descriptor, Fails(&[ENOBUFS]);
    SYS_getpeername Descriptor, Fails(&[ENOBUFS]);
    SYS_eventfd2 Nothing, Fails(&[EMFILE, ENOMEM]);
    SYS_epoll_create1 Nothing, Fails(&[EMFILE, ENOMEM]);
    SYS_epoll_ctl Descriptor, Fails(&[ENOMEM, ENOSPC]);
    SYS_epoll_wait Descriptor, Fails(&[EINTR]);
    SYS_epoll_pwait Descriptor, Fails(&[EINTR]);
    SYS_poll Nothing, Fails(&[EINTR, ENOMEM]);
    SYS_ppoll Nothing, Fails(&[EINTR, ENOMEM]);
    SYS_inotify_init1 Nothing, Fails(&[EMFILE, ENOMEM]);
    SYS_inotify_add_watch Descriptor, Fails(&[ENOSPC, ENOMEM]);
    SYS_inotify_rm_watch Descriptor, CANNOT;
    SYS_memfd_create Nothing, Fails(&[EMFILE, ENOMEM]);
    SYS_pidfd_open Nothing, Fails(&[EMFILE, ENOMEM]);
    SYS_pidfd_send_signal Descriptor, Fails(&[EPERM]);
    SYS_kill Nothing, Fails(&[EPERM]);
    SYS_wait4 Nothing, Fails(&[EINTR]);
    SYS_waitid Nothing, Fails(&[EINTR]);
    SYS_clone Nothing, Fails(&[EAGAIN, ENOMEM]);
    SYS_clone3 Nothing, Fails(&[EAGAIN, ENOMEM]);
    SYS_fork Nothing, Fails(&[EAGAIN, ENOMEM]);
    SYS_vfork Nothing, Fails(&[EAGAIN, ENOMEM]);
    SYS_execve Path(0), Fails(&[ENOMEM, EAGAIN, EMFILE]);
    SYS_execveat Path(1), Fails(&[ENOMEM, EAGAIN, EMFILE]);
    SYS_unshare Nothing, Fails(&[ENOMEM, ENOSPC, EPERM]);
    SYS_setns Descriptor, Fails(&[ENOMEM, EPERM]);
    SYS_sethostname Nothing, Fails(&[EPERM]);
    SYS_setdomainname Nothing, Fails(&[EPERM]);
    SYS_mount Path(1), Fails(&[ENOMEM, EBUSY, ENOSPC, EPERM]);
    SYS_umount2 Path(0), Fails(&[EBUSY, ENOMEM]);
    SYS_move_mount Path(1), Fails(&[ENOMEM, ENOSPC]);
    SYS_fsopen Path(0), Fails(&[EMFILE, ENOMEM]);
    SYS_fsconfig Descriptor, Fails(&[ENOMEM, EBUSY]);
    SYS_fsmount Descriptor, Fails(&[EMFILE, ENOMEM]);
    SYS_open_tree Path(1), Fails(&[EMFILE, ENOMEM]);
    SYS_mount_setattr Path(1), Fails(&[ENOMEM, EPERM]);
    SYS_pivot_root Path(0), Fails(&[EBUSY, ENOMEM]);
    SYS_chroot Path(0), Fails(&[ENOMEM]);
    SYS_prctl Nothing, Fails(&[EPERM]);
    SYS_setpgid Nothing, Fails(&[EPERM]);
    SYS_setsid Nothing, Fails(&[EPERM]);
    SYS_setresuid Nothing, Fails(&[EAGAIN, EPERM]);
    SYS_setresgid Nothing, Fails(&[EPERM]);
    SYS_setgroups Nothing, Fails(&[ENOMEM, EPERM]);
    SYS_capset Nothing, Fails(&[EPERM]);
    SYS_capget Nothing, CANNOT;
    SYS_prlimit64 Nothing, Fate::Limits;
    SYS_splice Descriptor, Fails(&[ENOMEM]);
    SYS_tee Descriptor, Fails(&[ENOMEM]);
    SYS_sendfile Descriptor, Fails(&[ENOMEM, EIO]);
    SYS_copy_file_range Descriptor, Fails(&[ENOMEM, EIO]);
    // The allocator's, and those of new threads. Where Rust cannot allocate, Rust aborts: see `Class::Abort`.
    SYS_mmap Nothing, ALLOCATION;
    SYS_mprotect Nothing, ALLOCATION;
    SYS_mremap Nothing, ALLOCATION;
    SYS_brk Nothing, HEAP;
    SYS_madvise Nothing, Fails(&[ENOMEM, EAGAIN]);
    SYS_munmap Nothing, FREES;
    SYS_close Descriptor, FREES;
    SYS_close_range Nothing, FREES;
    SYS_futex Nothing, LOCKS;
    SYS_lseek Descriptor, LOCKS;
    SYS_rt_sigaction Nothing, LOCKS;
    SYS_rt_sigprocmask Nothing, LOCKS;
    SYS_sigaltstack Nothing, LOCKS;
    SYS_tgkill Nothing, LOCKS;
    SYS_set_robust_list Nothing, LOCKS;
    SYS_rseq Nothing, LOCKS;
    SYS_set_tid_address Nothing, CANNOT;
    SYS_arch_prctl Nothing, CANNOT;
    SYS_rt_sigreturn Nothing, CANNOT;
    SYS_restart_syscall Nothing, CANNOT;
    SYS_exit Nothing, CANNOT;
    SYS_exit_group Nothing, CANNOT;
    SYS_umask Nothing, CANNOT;
    SYS_getpid Nothing, CANNOT;
    SYS_getppid Nothing, CANNOT;
    SYS_gettid Nothing, CANNOT;
    SYS_getuid Nothing, CANNOT;
    SYS_geteuid Nothing, CANNOT;
    SYS_getgid Nothing, CANNOT;
    SYS_getegid Nothing, CANNOT;
    SYS_uname Nothing, CANNOT;
    SYS_sched_yield Nothing, CANNOT;
    SYS_sched_getaffinity Nothing, CANNOT;
    SYS_sched_getparam Nothing, CANNOT;
    SYS_sched_getscheduler Nothing, CANNOT;
    SYS_sysinfo Nothing, CANNOT;
    SYS_pause Nothing, CANNOT;
    SYS_nanosleep Nothing, Fails(&[EINTR]);
    SYS_clock_nanosleep Nothing, Fails(&[EINTR]);
    SYS_clock_gettime Nothing, CANNOT;
    SYS_getrandom Nothing, RANDOM;
};

/// A system call by its number.
pub(crate) fn by_number(number: i64) -> Option<&'static Known> {
    TABLE.iter().find(|known| known.number == number)
}

/// A system call by its name.
pub(crate) fn by_name(name: &str) -> Option<&'static Known> {
    TABLE.iter().find(|known| known.name == name)
}

/// Why a call is left alone, where nothing of it may fail.
pub(crate) fn left_alone(name: &str) -> Option<&'static str> {
    match by_name(name)?.fate {
        Fate::LeftAlone(why) => Some(why),
        Fate::Fails(_) | Fate::Reads | Fate::Writes | Fate::Duplicates | Fate::Limits => None,
    }
}

/// The errors that this call may give; none for a call that is left alone.
pub(crate) fn errors(call: &Call) -> &'static [Errno] {
    let Some(known) = by_name(call.name) else {
        return &[];
    };
    match known.fate {
        Fate::Fails(errors) => errors,
        Fate::Reads => reads(call),
        Fate::Writes => writes(call),
        Fate::Duplicates if call.command == u64::from(libc::F_DUPFD_CLOEXEC.unsigned_abs()) => {
            &[EMFILE]
        }
        Fate::Limits if call.limit != 0 => &[EPERM],
        Fate::Duplicates | Fate::Limits | Fate::LeftAlone(_) => &[],
    }
}

/// A connection that somebody has made to the shim, and the listening socket.
pub(crate) const CALLER: &str = "caller";
/// A connection to containerd, for events.
pub(crate) const CONTAINERD: &str = "containerd";
/// A pair of sockets inside the process.
pub(crate) const OWN: &str = "own socket";

fn reads(call: &Call) -> &'static [Errno] {
    if has_no_error(call) {
        &[]
    } else if is_connection(call) {
        &[ECONNRESET, ENOMEM]
    } else if is_pipe(call) {
        &[EINTR]
    } else {
        &[EIO, EINTR, ENOMEM]
    }
}

fn writes(call: &Call) -> &'static [Errno] {
    if has_no_error(call) {
        &[]
    } else if is_connection(call) {
        &[ENOMEM, EPIPE]
    } else if call.on.ends_with("/log") {
        // Nobody reads the log.
        &[EAGAIN]
    } else if is_pipe(call) {
        &[EINTR, EPIPE]
    } else if call.on.starts_with("/sys/") || call.on.starts_with("/proc/") {
        &[ENOMEM, EBUSY, EINTR]
    } else {
        &[ENOSPC, EIO, EINTR]
    }
}

/// Whether the kernel has no error for the reads and writes of this descriptor.
fn has_no_error(call: &Call) -> bool {
    call.on == OWN || call.on.contains("[eventfd]")
}

/// Whether the descriptor is a connection.
pub(crate) fn is_connection(call: &Call) -> bool {
    [CALLER, CONTAINERD].contains(&call.on.as_str())
}

/// A pipe, or a stream of a process: a FIFO.
fn is_pipe(call: &Call) -> bool {
    call.on.starts_with("pipe:") || call.on.contains("/streams/") || call.on.ends_with("fifo")
}

/// Whether a failure of this call is a failure to allocate memory.
pub(crate) fn allocates(call: &Call) -> bool {
    matches!(
        by_name(call.name).map(|known| known.fate),
        Some(Fate::Fails([ENOMEM]))
    ) && ["mmap", "mprotect", "mremap"].contains(&call.name)
}
