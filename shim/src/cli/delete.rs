//! `delete`: takes down what a shim that no longer answers has left.
//!
//! containerd runs it for each container whose shim it cannot reach, with the bundle as the working directory, and reads
//! a `DeleteResponse` from standard output. For the pod's first bundle that means the whole pod: containers that joined
//! the shim directly get no `delete` of their own.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use containerd_shim_protos::api::DeleteResponse;
use containerd_shim_protos::protobuf::Message;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::containerd::convert::{timestamp, wire_pid};
use crate::error::{IoError, Result, first_failure};
use crate::kernel::exits::Exits;
use crate::runtime::bundle::{self, Record};
use crate::runtime::runc::{self, Runc};
use crate::runtime::teardown::{self, Remains, Why};

/// How long a shim may take to die after SIGKILL.
const DYING: Timespec = Timespec {
    tv_sec: 5,
    tv_nsec: 0,
};

/// Takes down container `id` of `bundle`, and the pod that `bundle` is the first of. Returns the bytes for containerd.
///
/// containerd also runs this after an ordinary deletion, when it lets go of the connection. Then the shim has said so in
/// the bundle, and a shim that is there ends by itself, or serves others.
///
/// # Errors
/// The first failure; everything else is taken down all the same.
pub fn delete(id: &str, bundle: &Path) -> Result<Vec<u8>> {
    let shim = find_shim(bundle)?;
    if shim.is_none() || !bundle::is_deleted(bundle) {
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
        // A record is written before anything is made, so without a record there is nothing.
        if let Some(record) = Record::load(bundle).transpose() {
            steps.push(take_down_member(id, record, bundle, &exits).await);
        }
        first_failure(steps)
    });
    first_failure([ended, taken_down, remove_socket(bundle)])
}

/// Takes down one container or the sandbox. runc writes the log into the pod's `first` bundle: the container's own may be gone.
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

/// The shim that was started in a bundle, alive or dying.
struct Shim {
    pidfd: OwnedFd,
    dying: bool,
}

/// Finds the shim of `bundle`: only a process that is this program, in this bundle. The number may be another's by now.
fn find_shim(bundle: &Path) -> Result<Option<Shim>> {
    let Some(pid) = std::fs::read_to_string(bundle.join("shim.pid"))
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .and_then(Pid::from_raw)
    else {
        return Ok(None);
    };
    let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
        return Ok(None);
    };
    let proc = PathBuf::from(format!("/proc/{pid}"));
    // Read after the pidfd is open, so they are of the process that a signal would go to.
    let comm = std::fs::read_to_string(proc.join("comm")).unwrap_or_default();
    if !comm.starts_with("containerd-shim") {
        return Ok(None);
    }
    // The link has no symbolic links in it.
    let bundle = std::fs::canonicalize(bundle).map_err(IoError::at("find", bundle))?;
    Ok(match std::fs::read_link(proc.join("cwd")) {
        Ok(here) if here == bundle => Some(Shim {
            pidfd,
            dying: false,
        }),
        Ok(_) => None,
        // Its connections may be closed already, and its listening socket not yet.
        Err(_) => Some(Shim { pidfd, dying: true }),
    })
}

impl Shim {
    /// Ends a shim that does not answer, for its holder thread keeps the pod's namespaces; waits until it is gone.
    fn end(self, bundle: &Path) -> Result<()> {
        if !self.dying {
            match pidfd_send_signal(&self.pidfd, Signal::KILL) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(error) => return Err(IoError::at("end the shim of", bundle)(error).into()),
            }
        }
        // A pidfd is readable once the process has ended (pidfd_open(2)); what it held is free only then.
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

/// The socket that `start` made for this bundle. One that another shim answers at stays.
fn remove_socket(bundle: &Path) -> Result<()> {
    let Ok(address) = std::fs::read_to_string(bundle.join("address")) else {
        return Ok(());
    };
    let socket = Path::new(address.trim().trim_start_matches("unix://"));
    if std::os::unix::net::UnixStream::connect(socket).is_ok() {
        return Ok(());
    }
    match std::fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(IoError::at("remove", socket)(error).into())
        }
        _ => Ok(()),
    }
}
