//! What can go wrong with a sandbox. Every text names the operation and what the operation was done to.

use std::io::{self, ErrorKind};
use std::path::PathBuf;

use rustix::io::Errno;

use crate::NamespaceKind;

/// Why a sandbox could not be made, or a signal not be sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The path of a namespace to join cannot be opened.
    #[error("join {kind} namespace {path}: {source}", path = path.display())]
    OpenNamespace {
        /// The kind that was asked for.
        kind: NamespaceKind,
        /// The path that was asked for.
        path: PathBuf,
        /// What `open` said.
        source: io::Error,
    },
    /// The path of a namespace to join is something else.
    #[error("join {kind} namespace {path}: not a namespace file", path = path.display())]
    NotANamespace {
        /// The kind that was asked for.
        kind: NamespaceKind,
        /// The path that was asked for.
        path: PathBuf,
    },
    /// The path of a namespace to join is a namespace of another kind.
    #[error("join {kind} namespace {path}: it is a namespace of another kind", path = path.display())]
    WrongKind {
        /// The kind that was asked for.
        kind: NamespaceKind,
        /// The path that was asked for.
        path: PathBuf,
    },
    /// The kernel refused to move into a namespace.
    #[error("enter {kind} namespace: {source}")]
    Enter {
        /// The kind.
        kind: NamespaceKind,
        /// What `setns` said.
        source: io::Error,
    },
    /// The kernel refused to make a new namespace.
    #[error("make {kind} namespace: {source}")]
    Make {
        /// The kind.
        kind: NamespaceKind,
        /// What `unshare` said.
        source: io::Error,
    },
    /// A namespace that was made or entered cannot be opened to keep it.
    #[error("keep {kind} namespace {path}: {source}", path = path.display())]
    Keep {
        /// The kind.
        kind: NamespaceKind,
        /// The namespace's file in /proc.
        path: PathBuf,
        /// What `open` said.
        source: io::Error,
    },
    /// A thread cannot hold what was asked for.
    #[error("holder thread: a {kind} namespace needs holder process")]
    ThreadCannotHold {
        /// The kind that only a process holds.
        kind: NamespaceKind,
    },
    /// A hostname or domainname that cannot be given to the pod.
    #[error("set {field} {value:?}: {reason}")]
    BadName {
        /// `hostname` or `domainname`.
        field: &'static str,
        /// What was asked for.
        value: String,
        /// Why not.
        reason: &'static str,
    },
    /// The kernel did not take a hostname or domainname.
    #[error("set {field} {value:?}: {source}")]
    SetName {
        /// `hostname` or `domainname`.
        field: &'static str,
        /// What was asked for.
        value: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A sysctl that a pod may not set.
    #[error("sysctl {key:?}: {reason}")]
    BadSysctl {
        /// The key as it was given.
        key: String,
        /// Why not.
        reason: &'static str,
    },
    /// The kernel has no such sysctl, or did not take the value.
    #[error("write sysctl {key:?} = {value:?}: {source}")]
    WriteSysctl {
        /// The key as it was given.
        key: String,
        /// The value.
        value: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The loopback device of a new network namespace stays down.
    #[error("bring up loopback: {0}")]
    Loopback(#[source] io::Error),
    /// A new user namespace has no mapping for root, or a mapping that the kernel refused.
    #[error("write {file} of the user namespace: {source}")]
    IdMap {
        /// `uid_map` or `gid_map`.
        file: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The pause program could not be prepared, started or talked to, or one of its steps failed.
    #[error("pause program: {operation}: {source}")]
    Program {
        /// What was done, or the program's step that failed.
        operation: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Before it was ready, the pause program ended or broke its protocol.
    #[error("pause program: ended before it was ready")]
    ProgramEnded,
    /// The sandbox's thread could not be started, or is gone.
    #[error("start the sandbox's thread: {0}")]
    Thread(#[source] io::Error),
    /// A signal could not be sent to the holder.
    #[error("send signal {signal} to the holder: {source}")]
    Signal {
        /// The signal's number.
        signal: i32,
        /// What the kernel said.
        source: io::Error,
    },
}

const MISSING: [ErrorKind; 2] = [ErrorKind::NotFound, ErrorKind::NotADirectory];

/// Whose fault an [`Error`] is. A caller answers its own client by this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The configuration asks for what cannot be.
    InvalidInput,
    /// A path of the configuration does not exist, or the process that a signal is for.
    NotFound,
    /// The kernel is too old, or was built without what is needed.
    Unsupported,
    /// Anything else: a limit, a permission, a defect.
    Internal,
}

impl Error {
    /// Whose fault it is.
    pub fn class(&self) -> Class {
        // The error has `class` if its source is one of `kinds`.
        let (source, kinds, class): (_, &[ErrorKind], _) = match self {
            Self::NotANamespace { .. }
            | Self::WrongKind { .. }
            | Self::ThreadCannotHold { .. }
            | Self::BadName { .. }
            | Self::BadSysctl { .. } => return Class::InvalidInput,
            Self::Enter { .. }
            | Self::Keep { .. }
            | Self::Loopback(_)
            | Self::ProgramEnded
            | Self::Thread(_) => return Class::Internal,
            Self::Signal { source, .. } => {
                let gone = source.raw_os_error() == Some(Errno::SRCH.raw_os_error());
                return if gone {
                    Class::NotFound
                } else {
                    Class::Internal
                };
            }
            Self::OpenNamespace { source, .. } => (source, &MISSING, Class::NotFound),
            Self::IdMap { source, .. } | Self::SetName { source, .. } => {
                (source, &[ErrorKind::InvalidInput], Class::InvalidInput)
            }
            // Only keys of the pod's own namespaces are written. So a missing file is a key that does not exist.
            Self::WriteSysctl { source, .. } if MISSING.contains(&source.kind()) => {
                return Class::InvalidInput;
            }
            Self::WriteSysctl { source, .. } => {
                (source, &[ErrorKind::InvalidInput], Class::InvalidInput)
            }
            // EINVAL of unshare(2): the kernel does not know the kind.
            Self::Make { source, .. } => (
                source,
                &[ErrorKind::InvalidInput, ErrorKind::Unsupported],
                Class::Unsupported,
            ),
            Self::Program { source, .. } => (source, &[ErrorKind::Unsupported], Class::Unsupported),
        };
        if kinds.contains(&source.kind()) {
            class
        } else {
            Class::Internal
        }
    }

    pub(crate) fn program(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Program { operation, source }
    }
}
