//! The server's process: executes it, and gives it its place on the node.

use std::fs::OpenOptions;
use std::io::{PipeReader, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::process::Pid;
use rustix::thread::{CoreSchedulingScope, create_core_scheduling_cookie};

use super::start::Start;
use crate::error::{Error, IoError, Result};
use crate::kernel::cgroup::{Cgroup, Driver};
use crate::kernel::process;
use crate::runtime::bundle;
use crate::runtime::options::Options;

/// Executes the server, with `listener` as its standard input. No process is left behind after a failure: the server
/// serves when it is told through its standard output that `delete` can find it, and ends when this process ends before.
///
/// ```text
///  start ──▶ execute the server ──▶ note pid and start time ──▶ one byte ──▶ answer containerd
///                    └──▶ get ready ──────────────── wait ────────┴──▶ serve
/// ```
///
/// # Errors
/// `Io` when the kernel refuses.
pub(super) fn launch(
    start: &Start,
    pod: &str,
    socket: &Path,
    listener: UnixListener,
    options: &Options,
) -> Result<()> {
    isolate_cores()?;
    let (told, mut tell) = std::io::pipe().map_err(IoError::at("make a pipe to", program()))?;
    let mut server = spawn(start, pod, socket, listener, told)?;
    let placed = place(&server, &start.bundle, options).and_then(|()| {
        let told = tell.write_all(&[1]);
        Ok(told.map_err(IoError::at("tell the server of", &start.bundle))?)
    });
    if placed.is_err() {
        // The server may have ended by itself.
        let _ = server.kill();
        let _ = server.wait();
    }
    placed
}

fn spawn(
    start: &Start,
    pod: &str,
    socket: &Path,
    listener: UnixListener,
    told: PipeReader,
) -> Result<Child> {
    let program = program();
    let mut command = Command::new(&program);
    command
        .arg0("containerd-shim-pause-v2")
        .args(["-namespace", &start.namespace])
        .args(["-id", pod])
        .args(["-address", &start.address])
        .arg("-socket")
        .arg(socket)
        .stdin(OwnedFd::from(listener))
        .stdout(told)
        .stderr(log(&start.bundle))
        .current_dir(&start.bundle)
        // A signal to containerd's process group must not reach the server.
        .process_group(0);
    if start.debug {
        command.arg("-debug");
    }
    Ok(command
        .spawn()
        .map_err(IoError::at("execute the server from", &program))?)
}

/// This program. Its path comes first, because `ps` shows the path's last name; after an upgrade the path may be gone.
fn program() -> PathBuf {
    std::env::current_exe()
        .ok()
        .filter(|path| path.exists())
        .unwrap_or_else(|| "/proc/self/exe".into())
}

/// The bundle's log FIFO. Open for reading, too, so that the server outlives containerd's reader; non-blocking, so that
/// the server never waits for the reader.
fn log(bundle: &Path) -> Stdio {
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nonblocking)
        .open(bundle.join("log"))
        .map_or_else(|_| Stdio::null(), Stdio::from)
}

/// Notes the server's pid and start time for `delete`, and sets the server's cgroup and its OOM score.
fn place(server: &Child, first_bundle: &Path, options: &Options) -> Result<()> {
    let pid = server.id();
    // An earlier server's start time must not stand beside this pid.
    let _ = std::fs::remove_file(first_bundle.join(bundle::SHIM_STARTED));
    let file = first_bundle.join(bundle::SHIM_PID);
    std::fs::write(&file, pid.to_string()).map_err(IoError::at("write", &file))?;
    if let Some(started) = process::start_time(Pid::from_child(server)) {
        let file = first_bundle.join(bundle::SHIM_STARTED);
        std::fs::write(&file, started.to_string()).map_err(IoError::at("write", &file))?;
    }
    if let Some(path) = &options.shim_cgroup {
        let cgroup = Cgroup::at(&path.to_string_lossy(), Driver::Cgroupfs)?;
        cgroup.create()?;
        cgroup.add(Pid::from_child(server))?;
    }
    if let Err(error) = adjust_oom_score(pid) {
        // Without its own score the server is as killable as containerd, which is no reason to refuse a pod.
        log::warn!(error:%; "OOM score not set");
    }
    Ok(())
}

/// With `SCHED_CORE` in containerd's environment the server, and so the whole pod, gets a core-scheduling domain: the
/// hardware threads of a core never run the pod together with another pod (Documentation/admin-guide/hw-vuln/
/// core-scheduling.rst). Children inherit the domain.
fn isolate_cores() -> Result<()> {
    if std::env::var_os("SCHED_CORE").is_none_or(|value| value.is_empty()) {
        return Ok(());
    }
    let this = rustix::process::getpid();
    match create_core_scheduling_cookie(this, CoreSchedulingScope::ThreadGroup) {
        Ok(()) => Ok(()),
        Err(Errno::NODEV) => {
            log::info!("SCHED_CORE: no core of this node has two hardware threads, nothing to isolate");
            Ok(())
        }
        // The operator counts on the isolation: a pod without isolation must not run.
        Err(error) => Err(IoError::at(
            "make a core-scheduling domain, as SCHED_CORE in containerd's environment asks for (a kernel with \
             CONFIG_SCHED_CORE has it; without the variable there is none), in",
            "/proc/self",
        )(error)
        .into()),
    }
}

/// Sets the server's `oom_score_adj` one above containerd's: when memory runs out, a shim goes before containerd.
fn adjust_oom_score(pid: u32) -> Result<()> {
    let parent = rustix::process::getppid().map_or_else(|| "self".into(), |pid| pid.to_string());
    let of_parent = format!("/proc/{parent}/oom_score_adj");
    let score: i32 = std::fs::read_to_string(&of_parent)
        .map_err(IoError::at("read", &of_parent))?
        .trim()
        .parse()
        .map_err(|_| Error::Internal("oom_score_adj is no number"))?;
    let of_server = format!("/proc/{pid}/oom_score_adj");
    let score = score.saturating_add(1).min(1000);
    Ok(std::fs::write(&of_server, score.to_string()).map_err(IoError::at("write", &of_server))?)
}
