//! What a pod sandbox is to the kernel: namespaces, what is set in them, and what holds them. It knows nothing of
//! containers, files or containerd.
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
//! A process is needed for a new process namespace (which lives and dies with its PID 1) and for a user namespace (which
//! no thread of a threaded process may enter). **Its exit goes to whoever waits for children here**: nothing in this
//! crate waits for the holder of a sandbox that was made. If this process dies, thread and pause program die with it.
//!
//! | I want to change | file |
//! |---|---|
//! | which namespaces there are, joining, keeping | `namespaces.rs` |
//! | hostname, loopback | `setup.rs` |
//! | which sysctls a pod may set | `sysctls.rs` |
//! | the order of things, the thread | `holder/thread.rs` |
//! | starting the pause program | `holder/process.rs`, `program.rs` |
//! | the pause program itself | `init/` |
#![deny(unsafe_code)]

mod error;
mod holder;
mod namespaces;
mod program;
mod setup;
#[allow(unsafe_code)]
mod sys;
mod sysctls;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use rustix::process::{Pid, Signal};

pub use error::{Class, Error};
pub use namespaces::{IdMap, Kind, Namespace, Namespaces, UserNamespace};
pub use program::{PROGRAM, program};
pub use sys::{die_with_parent, hand_over, limit_open_files, map_owners, own_cwd, signal};
pub use sysctls::check_sysctls;

use holder::process::Process;
use holder::thread::{Held, Parked, Plan};
use namespaces::{Fds, Joins};
use setup::{DOMAINNAME, HOSTNAME, Settings};

/// What shall hold the namespaces.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Holder {
    /// A thread where it can, else a process.
    #[default]
    Auto,
    /// A thread of this process; an error where it cannot.
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
    /// Its namespaces.
    pub namespaces: Namespaces,
    /// The kernel's hostname; needs a UTS namespace of the pod's own (or the name that the node has).
    pub hostname: Option<String>,
    /// The kernel's (NIS) domainname; as above.
    pub domainname: Option<String>,
    /// See [`check_sysctls`].
    pub sysctls: BTreeMap<String, String>,
    /// What shall hold it.
    pub holder: Holder,
}

/// What came of a signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signalled {
    /// A thread holds the sandbox: a pause process would have ended with this exit code, so end the sandbox with it.
    Ends(u32),
    /// A thread holds the sandbox: a pause process would not have cared.
    Nothing,
    /// A process holds the sandbox and has the signal; if it ends, it is waited for like any child.
    Delivered,
}

/// A pod sandbox. Dropping it ends it.
#[derive(Debug)]
pub struct Sandbox {
    pid: Pid,
    /// Dropped (and killed, see `Drop`) before the thread that it is tied to.
    process: Option<Process>,
    fds: Fds,
    parked: Parked,
    /// PID 1 of a process namespace that a thread's sandbox was given later.
    pid_1: Option<Process>,
}

impl Sandbox {
    /// Makes a sandbox: everything or nothing. What can be checked is checked before anything is made.
    pub fn create(config: &SandboxConfig) -> Result<Self, Error> {
        let mut namespaces = config.namespaces.clone();
        let Joins { mut fds, nodes } = namespaces::open_joins(&namespaces)?;
        if nodes.contains(&Kind::User) {
            // The kernel refuses to enter a user namespace twice.
            namespaces.user = UserNamespace::Node;
            fds.remove(&Kind::User);
        }
        let own = |kind| namespaces.wanted(kind) && !nodes.contains(&kind);

        let process = match config.holder {
            Holder::Process => true,
            Holder::Auto => needs_process(&namespaces).is_some(),
            Holder::Thread => match needs_process(&namespaces) {
                None => false,
                Some(kind) => return Err(Error::ThreadCannotHold { kind }),
            },
        };
        if let UserNamespace::New { uid_map, gid_map } = &namespaces.user {
            for (file, map) in [("uid_map", uid_map), ("gid_map", gid_map)] {
                if !map.iter().any(|m| m.container == 0 && m.size > 0) {
                    let source =
                        io::Error::new(io::ErrorKind::InvalidInput, "nobody is root in it");
                    return Err(Error::IdMap { file, source });
                }
            }
        }
        let own_uts = own(Kind::Uts);
        let set_name = |field, value: &Option<String>| {
            setup::check_name(field, value.as_deref(), own_uts)
                .map(|set| value.clone().filter(|_| set))
        };
        let hostname = set_name(HOSTNAME, &config.hostname)?;
        let domainname = set_name(DOMAINNAME, &config.domainname)?;
        sysctls::check(&config.sysctls, &own)?;

        let settings = Settings {
            loopback_up: namespaces.is_new(Kind::Net),
            hostname,
            domainname,
            sysctls: config.sysctls.clone(),
        };
        let program = match process {
            true => Some(program().map_err(Error::program("copy it into memory"))?),
            false => None,
        };
        let plan = Plan {
            namespaces,
            joins: fds,
            settings,
            program,
        };
        let (parked, Held { pid, process, fds }) = holder::thread::start(plan)?;
        Ok(Self {
            pid,
            process,
            fds,
            parked,
            pid_1: None,
        })
    }

    /// The id of what holds the sandbox, as this process sees it: of a thread of this process, or of the pause program.
    /// Either way `/proc/<pid>/ns` has the pod's namespaces.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// What holds the sandbox.
    pub fn kind(&self) -> HolderKind {
        match self.process {
            None => HolderKind::Thread,
            Some(_) => HolderKind::Process,
        }
    }

    /// Gives the pod a process namespace to share, if it has none: the pause program becomes its PID 1, standing in the
    /// sandbox's other namespaces. Returns PID 1 as this process sees it, and whether it is new; the pod then lives and
    /// dies with it, and its exit is for the caller to wait for. The holder stays what it was.
    ///
    /// A thread cannot hold a process namespace, and whoever made the sandbox may not know yet that one is wanted.
    ///
    /// # Errors
    /// What making the namespace or starting the program says.
    pub fn share_processes(&mut self) -> Result<(Pid, bool), Error> {
        if let Some(process) = self.process.as_ref().or(self.pid_1.as_ref()) {
            return Ok((process.pid(), false));
        }
        let process = self.parked.start_pid_1()?;
        let pid = process.pid();
        match namespaces::keep(Kind::Pid, &pid.to_string(), "pid") {
            Ok(fd) => self.fds.insert(Kind::Pid, fd),
            Err(error) => {
                process.kill_and_reap();
                return Err(error);
            }
        };
        self.pid_1 = Some(process);
        Ok((pid, true))
    }

    /// For each kind that the pod does not share with the node: a path that leads to its namespace while the sandbox is
    /// there.
    pub fn paths(&self) -> BTreeMap<Kind, PathBuf> {
        let path = |kind: Kind| {
            // A thread's own process namespace never changes, only the one that its children would be in.
            let file = match (kind, self.kind()) {
                (Kind::Pid, HolderKind::Thread) => "pid_for_children",
                _ => kind.file(),
            };
            PathBuf::from(format!("/proc/{}/ns/{file}", self.pid))
        };
        self.fds.keys().map(|kind| (*kind, path(*kind))).collect()
    }

    /// The namespace of that kind, unless it is the node's.
    pub fn namespace(&self, kind: Kind) -> Option<BorrowedFd<'_>> {
        self.fds.get(&kind).map(AsFd::as_fd)
    }

    /// Does what the signal would do to a pause process: to the process, or by telling what it would have done.
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

    /// Ends it, as dropping it does: the thread is gone when this returns; a pause program has been killed, and its exit
    /// is for the caller to wait for.
    pub fn end(self) {}
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        for process in self.process.iter().chain(&self.pid_1) {
            let _ = process.signal(Signal::KILL);
        }
    }
}

/// Makes a user namespace with these maps and nobody in it, for [`map_owners`]. Blocks for about a millisecond; the
/// process that it takes is gone when this returns.
///
/// # Errors
/// What starting the program says, and `IdMap` for maps that the kernel refuses.
pub fn user_namespace(uid_map: Vec<IdMap>, gid_map: Vec<IdMap>) -> Result<OwnedFd, Error> {
    let program = program().map_err(Error::program("copy it into memory"))?;
    holder::process::user_namespace(&program, &UserNamespace::New { uid_map, gid_map })
}

/// The first kind that no thread can hold.
fn needs_process(namespaces: &Namespaces) -> Option<Kind> {
    if namespaces.wanted(Kind::User) {
        Some(Kind::User)
    } else if namespaces.is_new(Kind::Pid) {
        Some(Kind::Pid)
    } else {
        None
    }
}
