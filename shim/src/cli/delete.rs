//! `delete`: takes down what a shim that no longer answers has left.
//!
//! containerd runs `delete` for each container whose shim is out of reach, with the bundle as the working directory, and
//! reads a `DeleteResponse` from standard output. `delete` of the pod's first bundle takes down the whole pod: containers
//! that joined the shim directly get no `delete` of their own.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::Message;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::socket;
use crate::containerd::convert::{timestamp, wire_pid};
use crate::error::{IoError, Result, first_failure};
use crate::kernel::exits::Exits;
use crate::kernel::process;
use crate::runtime::bundle::{self, Record};
use crate::runtime::runc::{self, Runc};
use crate::runtime::teardown::{self, Remains, Why};

/// How long a shim may take to die after SIGKILL.
const DYING: Timespec = Timespec {
    tv_sec: 5,
    tv_nsec: 0,
};

/// Takes down container `id` of `bundle`, and the pod whose first bundle is `bundle`. Returns the bytes for containerd.
///
/// containerd also runs `delete` after an ordinary deletion, when containerd closes the connection. Then the shim has
/// noted the deletion in the bundle, and a living shim ends by itself, or serves other containers. A shim that is dying
/// may have been killed, and takes nothing down.
///
/// # Errors
/// The first failure; the teardown goes on after a failure.
pub fn delete(id: &str, bundle: &Path) -> Result<Vec<u8>> {
    let shim = find_shim(bundle)?;
    let lives = shim.as_ref().is_some_and(|shim| !shim.dying);
    if !lives || !bundle::is_deleted(bundle) {
        take_down_pod(id, bundle, shim)?;
    }
    let response = DeleteResponse {
        pid: wire_pid(runc::init_pid(bundle)),
        exit_status: 137,
        exited_at: timestamp(SystemTime::now()).into(),
        ..DeleteResponse::default()
    };
    Ok(response
        .write_to_bytes()
        .map_err(|e| IoError::at("encode the answer for", bundle)(std::io::Error::other(e)))?)
}

fn take_down_pod(id: &str, bundle: &Path, shim: Option<Shim>) -> Result<()> {
    let ended = shim.map_or(Ok(()), |shim| shim.end(bundle));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(IoError::at("start the runtime of", "/proc/self"))?;
    let taken_down = runtime.block_on(async {
        let exits = Exits::watch()?;
        let mut steps = Vec::new();
        match bundle::members(bundle) {
            Ok(members) => {
                for (member, record) in members {
                    steps.push(take_down_member(&member, record, bundle, &exits).await);
                }
            }
            Err(error) => steps.push(Err(error)),
        }
        // The shim writes the record before it makes anything: without a record nothing has been made.
        if let Some(record) = Record::load(bundle).transpose() {
            steps.push(take_down_member(id, record, bundle, &exits).await);
        }
        first_failure(steps)
    });
    first_failure([ended, taken_down, remove_socket(bundle)])
}

/// Takes down one container or the sandbox. runc's log goes into the pod's `first` bundle: the container's own bundle may
/// be gone.
async fn take_down_member(
    id: &str,
    record: Result<Record>,
    first: &Path,
    exits: &Arc<Exits>,
) -> Result<()> {
    let record = record?;
    let runc = record
        .runc
        .as_ref()
        .map(|runc| Runc::recorded(id, first, runc, exits));
    let remains = Remains {
        id: id.to_owned(),
        record,
        runc,
        first_bundle: first.to_owned(),
        mount_points: Vec::new(),
        directories: Vec::new(),
    };
    teardown::take_down(remains, Why::ShimDied).await
}

/// The shim that `start` made in a bundle.
struct Shim {
    pidfd: OwnedFd,
    /// The process is exiting already: its working directory is gone.
    dying: bool,
}

/// Finds the shim of `bundle`. Checks the start time and the working directory: another process may have the pid by now.
/// The name is the operator's to choose (`runtime_path`).
fn find_shim(bundle: &Path) -> Result<Option<Shim>> {
    let Ok(pid) = runc::read_pid(&bundle.join(bundle::SHIM_PID)) else {
        return Ok(None);
    };
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
        return Ok(None);
    };
    let proc = PathBuf::from(format!("/proc/{pid}"));
    // Race-free: the pidfd is open, so /proc/PID now describes the process that the pidfd signals.
    let is_shim = match bundle::shim_started(bundle) {
        Some(started) => process::start_time(pid) == Some(started),
        // `start` was killed before the second note, or an earlier version made the bundle.
        None => std::fs::read_to_string(proc.join("comm"))
            .is_ok_and(|name| name.starts_with("containerd-shim")),
    };
    if !is_shim {
        return Ok(None);
    }
    // The kernel's link `cwd` is free of symbolic links.
    let bundle = std::fs::canonicalize(bundle).map_err(IoError::at("find", bundle))?;
    Ok(match std::fs::read_link(proc.join("cwd")) {
        Ok(here) if here == bundle => Some(Shim {
            pidfd,
            dying: false,
        }),
        Ok(_) => None,
        // The kernel has taken the working directory of a dying process, but its listening socket may still be open.
        Err(_) => Some(Shim { pidfd, dying: true }),
    })
}

impl Shim {
    /// Kills a shim that does not answer, because its holder thread keeps the pod's namespaces. Waits for the exit.
    fn end(self, bundle: &Path) -> Result<()> {
        if !self.dying {
            match pidfd_send_signal(&self.pidfd, Signal::KILL) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(error) => return Err(IoError::at("end the shim of", bundle)(error).into()),
            }
        }
        // A pidfd becomes readable when the process has ended (pidfd_open(2)); its resources are free only then.
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        match poll(&mut fds, Some(&DYING)) {
            Ok(0) => {
                Err(IoError::at("end the shim of", bundle)(rustix::io::Errno::TIMEDOUT).into())
            }
            Ok(_) => Ok(()),
            Err(error) => Err(IoError::at("wait for the end of the shim of", bundle)(error).into()),
        }
    }
}

/// Removes the socket that `start` noted in `bundle`. A socket that another shim listens at stays.
fn remove_socket(bundle: &Path) -> Result<()> {
    let file = bundle.join(bundle::ADDRESS);
    let address = match std::fs::read_to_string(&file) {
        Ok(address) => address,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(IoError::at("read", &file)(error).into()),
    };
    socket::remove_stale(Path::new(address.trim().trim_start_matches("unix://")))
}
