//! What a pod sandbox is to the kernel: namespaces, the settings in them, and what holds them. The crate knows nothing
//! of containers, files or containerd.
//!
//! ```text
//!   SandboxConfig                        Sandbox
//!   ┌────────────────────┐   create      ┌──────────────────────────────────────────────────────┐
//!   │ net ipc uts pid    │  (blocking,   │ one parked thread, "pause"                           │
//!   │ user: new / join / │   about 1 ms, │   Thread:  it stands in net, ipc, uts; its id is pid │
//!   │       node's       │   all or      │   Process: it started the pause program from a       │
//!   │ hostname, sysctls  │   nothing)    │            sealed memfd, which is PID 1 of the pod   │
//!   │ holder             │ ────────────> │ every namespace open: /proc/<pid>/ns/*, fds          │
//!   └────────────────────┘               └──────────────────────────────────────────────────────┘
//!                                           dropped: the thread ends, the process is killed
//! ```
//! Two namespaces need a process. A new process namespace lives and dies with its PID 1. A user namespace can be
//! entered by no thread of a process with several threads.
//!
//! **The exit of the pause program goes to whoever waits for the children of this process**: nothing in this crate
//! waits for the holder of a sandbox that was made. If this process dies, the sandbox's thread and the pause program
//! die too.
//!
//! | I want to change | file |
//! |---|---|
//! | which namespaces there are, joining, keeping | `namespaces.rs` |
//! | what is checked before anything is made | `plan.rs` |
//! | hostname, loopback | `setup.rs` |
//! | which sysctls a pod may set | `sysctls.rs` |
//! | the order of the steps, the sandbox's thread | `holder/thread.rs` |
//! | starting the pause program | `holder/process.rs`, `program.rs` |
//! | the pause program itself | `init/` |
#![deny(unsafe_code)]

mod error;
mod holder;
mod namespaces;
mod plan;
mod program;
mod setup;
#[allow(unsafe_code)]
mod sys;
mod sysctls;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::process::{Pid, Signal};

pub use error::{Class, Error};
pub use namespaces::{IdMap, Namespace, NamespaceKind, Namespaces, UserNamespace};
pub use program::{PROGRAM, program_memfd};
pub use sys::{
    die_with_parent, hand_over, limit_open_files, map_owners, own_cwd, signal_from_number,
};
pub use sysctls::check_sysctls;

use holder::process::PauseProcess;
use holder::thread::{HeldNamespaces, ParkedThread};
use plan::Plan;

/// What a caller asks for to hold the namespaces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HolderChoice {
    /// A thread if a thread can hold them, else a process.
    #[default]
    Auto,
    /// A thread of this process, or an error if a thread cannot hold them.
    Thread,
    /// The pause program, always.
    Process,
}

/// What holds the namespaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HolderKind {
    /// A thread of this process.
    Thread,
    /// The pause program, a child of this process.
    Process,
}

/// What a sandbox shall be.
#[derive(Clone, Debug)]
pub struct SandboxConfig {
    /// The sandbox's namespaces.
    pub namespaces: Namespaces,
    /// The kernel's hostname. Needs a UTS namespace of the pod's own, unless the node has this name already.
    pub hostname: Option<String>,
    /// The kernel's (NIS) domainname. Needs what the hostname needs.
    pub domainname: Option<String>,
    /// Sysctls and their values, see [`check_sysctls`].
    pub sysctls: BTreeMap<String, String>,
    /// What shall hold the namespaces.
    pub holder: HolderChoice,
}

/// What came of a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signalled {
    /// A thread holds the sandbox. A pause process would have ended with this exit code: end the sandbox with this
    /// code.
    Ends(u32),
    /// A thread holds the sandbox. A pause process would have ignored the signal.
    Nothing,
    /// A process holds the sandbox and has the signal. If the process ends, wait for its exit as for any child's.
    Delivered,
}

/// A pod sandbox. Dropping the sandbox ends it.
#[derive(Debug)]
pub struct Sandbox {
    pid: Pid,
    /// The holder, if a process is. `Drop` kills the process before the thread ends, which would kill it too.
    process: Option<PauseProcess>,
    open: BTreeMap<NamespaceKind, Arc<OwnedFd>>,
    thread: ParkedThread,
    /// PID 1 of a process namespace that a thread's sandbox was given later.
    pid_1: Option<PauseProcess>,
}

impl Sandbox {
    /// Makes a sandbox: everything or nothing. Blocks for about a millisecond. What can be checked is checked before
    /// anything is made.
    ///
    /// # Errors
    /// What is wrong with the configuration, or what the kernel or the pause program says.
    pub fn create(config: &SandboxConfig) -> Result<Self, Error> {
        let (thread, held) = holder::thread::start(Plan::new(config)?)?;
        let HeldNamespaces { pid, process, open } = held;
        Ok(Self {
            pid,
            process,
            open: open
                .into_iter()
                .map(|(kind, fd)| (kind, fd.into()))
                .collect(),
            thread,
            pid_1: None,
        })
    }

    /// The id of the holder as this process sees the holder: the id of a thread of this process, or of the pause
    /// program. In both cases `/proc/<pid>/ns` has the pod's namespaces.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// What holds the sandbox.
    pub fn holder_kind(&self) -> HolderKind {
        match self.process {
            None => HolderKind::Thread,
            Some(_) => HolderKind::Process,
        }
    }

    /// Gives the pod a process namespace to share, if the pod has none. The pause program becomes PID 1 of that
    /// namespace and stands in the sandbox's other namespaces. The holder stays what it was.
    ///
    /// Returns PID 1 as this process sees it, and whether PID 1 is new. From then on the pod lives and dies with PID 1,
    /// whose exit the caller waits for.
    ///
    /// A thread cannot hold a process namespace, and the maker of the sandbox may not know yet that one is wanted.
    ///
    /// # Errors
    /// What making the namespace or starting the program says.
    pub fn share_processes(&mut self) -> Result<(Pid, bool), Error> {
        if let Some(process) = self.process.as_ref().or(self.pid_1.as_ref()) {
            return Ok((process.pid(), false));
        }
        let process = self.thread.start_pid_1()?;
        let pid = process.pid();
        match namespaces::keep(NamespaceKind::Pid, &pid.to_string(), "pid") {
            Ok(fd) => self.open.insert(NamespaceKind::Pid, fd.into()),
            Err(error) => {
                process.kill_and_reap();
                return Err(error);
            }
        };
        self.pid_1 = Some(process);
        Ok((pid, true))
    }

    /// The pod's own namespaces: for each kind that the pod does not share with the node, a path to the namespace. The
    /// path works while the sandbox is there.
    pub fn paths(&self) -> BTreeMap<NamespaceKind, PathBuf> {
        let path = |kind: NamespaceKind| {
            // A thread's process namespace never changes. What changes is the namespace of its future children.
            let file = match (kind, self.holder_kind()) {
                (NamespaceKind::Pid, HolderKind::Thread) => "pid_for_children",
                _ => kind.file(),
            };
            PathBuf::from(format!("/proc/{}/ns/{file}", self.pid))
        };
        self.open.keys().map(|kind| (*kind, path(*kind))).collect()
    }

    /// The namespace of that kind; `None` if it is the node's. The descriptor has its number as long as the sandbox is
    /// there, and longer while the caller keeps it.
    pub fn namespace(&self, kind: NamespaceKind) -> Option<Arc<OwnedFd>> {
        self.open.get(&kind).cloned()
    }

    /// Sends a signal to the process that holds the sandbox. If a thread holds the sandbox, tells what the signal would
    /// have done to a pause process.
    ///
    /// # Errors
    /// `Signal` with what pidfd_send_signal(2) says.
    pub fn signal(&self, signal: Signal) -> Result<Signalled, Error> {
        let Some(process) = &self.process else {
            return Ok(match signal {
                Signal::TERM | Signal::INT => Signalled::Ends(0),
                Signal::KILL => Signalled::Ends(128 + 9),
                _ => Signalled::Nothing,
            });
        };
        process
            .signal(signal)
            .map(|()| Signalled::Delivered)
            .map_err(|source| Error::Signal {
                signal: signal.as_raw(),
                source,
            })
    }

    /// Ends the sandbox, as dropping it does. When this returns, the thread is gone and a pause program has been
    /// killed. The exit of the program is for the caller to wait for.
    pub fn end(self) {}
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        for process in self.process.iter().chain(&self.pid_1) {
            let _ = process.signal(Signal::KILL);
        }
    }
}

/// Makes a user namespace with these maps and nobody in it, for [`map_owners`]. Blocks for about a millisecond. The
/// process that makes the namespace is gone when this returns.
///
/// # Errors
/// What starting the program says, and `IdMap` for maps that the kernel refuses.
pub fn user_namespace(uid_map: Vec<IdMap>, gid_map: Vec<IdMap>) -> Result<OwnedFd, Error> {
    let program = program_memfd().map_err(Error::program("copy it into memory"))?;
    holder::process::user_namespace(&program, &UserNamespace::New { uid_map, gid_map })
}
