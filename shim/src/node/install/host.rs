//! The node around this program: its mounts, its systemd, its containerd.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::fs::FlockOperation;
use rustix::process::Pid;
use rustix::thread::LinkNameSpaceType;
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};

use super::super::containerd::{Containerd, SOCKET};
use crate::error::{Error, IoError, Result};
use crate::kernel::process;

const UNIT: &str = "containerd.service";
/// An image without a shell has no PATH either.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
const LOCK: &str = "/run/containerd-shim-pause-v2.lock";

/// The longest wait for a program that asks or restarts something; systemd itself gives up after 90 s.
const PATIENCE: Duration = Duration::from_secs(120);
/// The longest wait for a containerd that was restarted.
const COMES_UP: Duration = Duration::from_secs(60);
const STEP: Duration = Duration::from_millis(100);

/// Enters the mounts of the node's PID 1, where this program is in a container that sees the node's processes. To be called
/// while this program has one thread.
///
/// # Errors
/// `Io`: the container is not privileged.
pub(super) fn enter() -> Result<()> {
    const NODE: &str = "/proc/1/ns/mnt";
    let place = |path: &str| -> Result<(u64, u64)> {
        let metadata = fs::metadata(path).map_err(IoError::at("look at", path))?;
        Ok((metadata.dev(), metadata.ino()))
    };
    if place(NODE)? == place("/proc/self/ns/mnt")? {
        return Ok(());
    }
    let node = File::open(NODE).map_err(IoError::at("open", NODE))?;
    rustix::thread::move_into_link_name_space(node.as_fd(), Some(LinkNameSpaceType::Mount))
        .map_err(IoError::at(
            "enter (the container must be privileged)",
            NODE,
        ))?;
    Ok(std::env::set_current_dir("/").map_err(IoError::at("enter", "/"))?)
}

/// Whoever ends this program in the middle of a change ends the node's containerd with it, so that no signal but SIGKILL
/// does. The pod that is deleted has some minutes, and a person's terminal may go.
///
/// # Errors
/// `Io`.
pub(super) fn ignore_signals() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(IoError::at("start the runtime of", "/proc/self"))?;
    let _inside = runtime.enter();
    for kind in [
        SignalKind::terminate(),
        SignalKind::interrupt(),
        SignalKind::hangup(),
    ] {
        // The handler stays for as long as the process lives (tokio::signal::unix::Signal).
        drop(signal(kind).map_err(IoError::at("handle the signals of", "/proc/self"))?);
    }
    Ok(())
}

/// Waits until no other installer is at work on this node. The lock lasts as long as the file is open.
///
/// # Errors
/// `Io`.
pub(super) fn lock() -> Result<File> {
    let file = File::options()
        .write(true)
        .create(true)
        .truncate(false)
        .open(LOCK)
        .map_err(IoError::at("open", LOCK))?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive).map_err(IoError::at("lock", LOCK))?;
    Ok(file)
}

/// The containerd that the kubelet talks to, if systemd runs it as `containerd.service`.
///
/// # Errors
/// `FailedPrecondition` for another one, with its name where that is known; `NotFound` when nobody answers.
pub(super) fn containerd() -> Result<Containerd> {
    let found = Containerd::at(Path::new(SOCKET), None).map_err(|error| match (error, other()) {
        (Error::NotFound(why), Some(name)) => Error::FailedPrecondition(format!(
            "{why}. This node has {name}, which brings a containerd of its own and writes that one's configuration: \
             its way to add a runtime is described in its own manual"
        )),
        (error, _) => error,
    })?;
    let main = main_pid()?;
    if main.is_none() || main != found.pid {
        return Err(Error::FailedPrecondition(format!(
            "the containerd that answers at {SOCKET} is not the main process of {UNIT}, so it cannot be restarted from \
             here{}",
            other().map_or(String::new(), |name| format!(" (this node has {name})"))
        )));
    }
    Ok(found)
}

/// The main process of containerd's unit; none while the unit is down.
///
/// # Errors
/// `FailedPrecondition` with systemd's words.
pub(super) fn main_pid() -> Result<Option<Pid>> {
    let main = run(
        "systemctl",
        &["show", "--value", "--property=MainPID", UNIT],
    )?;
    Ok(main.trim().parse().ok().and_then(Pid::from_raw))
}

/// One start of containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Start {
    pid: i32,
    /// In clock ticks since the node's boot.
    ticks: u64,
}

impl Start {
    pub(super) fn of(pid: Pid) -> Option<Self> {
        let ticks = process::start_time(pid)?;
        let pid = pid.as_raw_nonzero().get();
        Some(Self { pid, ticks })
    }

    /// The containerd that runs; none while the unit is down, or where systemd does not answer.
    pub(super) fn now() -> Option<Self> {
        Self::of(main_pid().ok()??)
    }
}

/// Who else brings a containerd.
fn other() -> Option<&'static str> {
    let known = [
        ("/var/lib/rancher/k3s", "k3s"),
        ("/var/lib/rancher/rke2", "rke2"),
        ("/var/lib/k0s", "k0s"),
        ("/var/snap/microk8s", "MicroK8s"),
    ];
    known
        .into_iter()
        .find_map(|(folder, name)| Path::new(folder).exists().then_some(name))
}

/// Refuses when a restart would do more than take up our change: then a containerd that stays down would not be ours to
/// bring back.
///
/// # Errors
/// `FailedPrecondition`, with what to do.
pub(super) fn refuse_if_a_restart_is_due(containerd: &Containerd, files: &[PathBuf]) -> Result<()> {
    let due = |why: String| {
        Err(Error::FailedPrecondition(format!(
            "{why}: restart containerd yourself first (systemctl restart containerd), and see that it comes up"
        )))
    };
    let Some(pid) = containerd.pid else {
        return Ok(());
    };
    let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
    if program.to_string_lossy().ends_with(" (deleted)") {
        return due(format!(
            "containerd's program was replaced since containerd started ({})",
            program.display()
        ));
    }
    let Some(started) = start_of(pid) else {
        return Ok(());
    };
    for file in files {
        // The boot's time is known in whole seconds.
        let changed = fs::metadata(file).and_then(|metadata| metadata.modified());
        if changed.is_ok_and(|changed| changed > started + Duration::from_secs(2)) {
            return due(format!(
                "{} was changed since containerd started",
                file.display()
            ));
        }
    }
    Ok(())
}

fn start_of(pid: Pid) -> Option<SystemTime> {
    let ticks = process::start_time(pid)?;
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let boot = stat.lines().find_map(|line| line.strip_prefix("btime "))?;
    let boot = Duration::from_secs(boot.trim().parse().ok()?);
    let since_boot = Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second());
    Some(UNIX_EPOCH + boot + since_boot)
}

/// Restarts containerd.
///
/// # Errors
/// `FailedPrecondition` with systemd's words.
pub(super) fn restart() -> Result<()> {
    // A unit that has failed some times in a row would not be started again.
    let _ = run("systemctl", &["reset-failed", UNIT]);
    run("systemctl", &["restart", UNIT]).map(drop)
}

/// Waits until a containerd answers, and its CRI with it.
///
/// # Errors
/// `FailedPrecondition` after a minute, with what is missing.
pub(super) fn wait() -> Result<Containerd> {
    let end = Instant::now() + COMES_UP;
    loop {
        let why = match containerd().and_then(|found| has_cri(&found).map(|()| found)) {
            Ok(found) => return Ok(found),
            Err(why) => why,
        };
        if Instant::now() > end {
            return Err(Error::FailedPrecondition(format!(
                "containerd does not come up in {} s: {why}",
                COMES_UP.as_secs()
            )));
        }
        std::thread::sleep(STEP);
    }
}

/// Asks containerd for the state of its plugins, over its socket.
///
/// # Errors
/// `FailedPrecondition` with the state, and where `ctr` cannot be run.
pub(super) fn has_cri(containerd: &Containerd) -> Result<()> {
    let beside = fs::canonicalize(&containerd.program)
        .map(|program| program.with_file_name("ctr"))
        .ok()
        .filter(|ctr| ctr.exists());
    let ctr = beside.unwrap_or_else(|| "ctr".into());
    let plugins = run(
        &ctr.to_string_lossy(),
        &["--address", SOCKET, "plugins", "ls"],
    )?;
    match cri_status(&plugins) {
        Some("ok") => Ok(()),
        Some(status) => Err(Error::FailedPrecondition(format!(
            "containerd's plugin CRI is in state {status:?}"
        ))),
        None => Err(Error::FailedPrecondition(
            "containerd has no plugin CRI".to_owned(),
        )),
    }
}

/// The state of CRI's service in what `ctr plugins ls` prints: `TYPE ID PLATFORMS STATUS`.
fn cri_status(plugins: &str) -> Option<&str> {
    plugins.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let service = words.next() == Some("io.containerd.grpc.v1") && words.next() == Some("cri");
        words.next_back().filter(|_| service)
    })
}

/// The shims of this node that serve pods.
pub(super) fn shims() -> usize {
    let is_shim = |pid: &str| -> Option<bool> {
        let program = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
        let command = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let name = program.file_name()?.to_string_lossy().into_owned();
        // With " (deleted)" behind it after an upgrade.
        let ours = name.starts_with("containerd-shim-pause-v2");
        Some(
            ours && command
                .split(|byte| *byte == 0)
                .any(|word| word == b"-socket"),
        )
    };
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_str().and_then(is_shim) == Some(true))
        .count()
}

/// Runs a program of the node: its standard output.
///
/// # Errors
/// `FailedPrecondition`, with the program's words.
pub(super) fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let failed = |why: String| {
        Error::FailedPrecondition(format!("`{program} {}` {why}", arguments.join(" ")))
    };
    let mut child = Command::new(program)
        .args(arguments)
        .env_clear()
        .env("PATH", PATH)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(format!("cannot be run: {error}")))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let read = |stream: Option<&mut dyn Read>| {
        let mut text = Vec::new();
        let _ = stream.map(|stream| stream.read_to_end(&mut text));
        String::from_utf8_lossy(&text).into_owned()
    };
    let end = Instant::now() + PATIENCE;
    std::thread::scope(|scope| {
        let (mut stdout, mut stderr) = (stdout, stderr);
        let out = scope.spawn(move || read(stdout.as_mut().map(|stream| stream as &mut dyn Read)));
        let err = scope.spawn(move || read(stderr.as_mut().map(|stream| stream as &mut dyn Read)));
        let status = loop {
            match child.try_wait() {
                Ok(Some(status)) => break Ok(status),
                Ok(None) if Instant::now() > end => {
                    let _ = child.kill();
                    let _ = child.wait();
                    break Err(failed(format!("hangs for {} s", PATIENCE.as_secs())));
                }
                Ok(None) => std::thread::sleep(Duration::from_millis(10)),
                Err(error) => break Err(failed(format!("failed: {error}"))),
            }
        };
        let (out, err) = (
            out.join().unwrap_or_default(),
            err.join().unwrap_or_default(),
        );
        let status = status?;
        if !status.success() {
            let words: Vec<_> = err.split_whitespace().collect();
            return Err(failed(format!("failed: {}", words.join(" "))));
        }
        Ok(out)
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_state_of_cri_is_that_of_its_service() {
        let v1 = "TYPE  ID  PLATFORMS  STATUS    \nio.containerd.grpc.v1   cri   linux/amd64   error  \n";
        assert_eq!(cri_status(v1), Some("error"));
        let v2 = "io.containerd.cri.v1   runtime  linux/amd64  skip\nio.containerd.grpc.v1  cri  -  ok\n";
        assert_eq!(cri_status(v2), Some("ok"));
        assert_eq!(cri_status("io.containerd.grpc.v1  images - ok\n"), None);
    }

    #[test]
    fn a_program_is_run_and_its_failure_has_its_words() {
        assert_eq!(run("sh", &["-c", "echo $PATH"]).unwrap().trim(), PATH);
        let failed = run("sh", &["-c", "echo one >&2; echo two >&2; exit 3"]).unwrap_err();
        assert!(failed.to_string().ends_with("failed: one two"), "{failed}");
        let absent = run("no-such-program-here", &[]).unwrap_err().to_string();
        assert!(absent.contains("cannot be run"), "{absent}");
        // More than a pipe holds.
        assert_eq!(
            run("sh", &["-c", "seq 100000"]).unwrap().lines().count(),
            100_000
        );
    }

    #[test]
    fn a_process_has_started_before_now() {
        let started = start_of(rustix::process::getpid()).unwrap();
        // The boot's time is known in whole seconds.
        let now = SystemTime::now();
        assert!(started < now + Duration::from_secs(2), "{started:?}");
        assert!(started > now - Duration::from_secs(600), "{started:?}");
    }
}
