//! What can go wrong with a sandbox: every text names the operation and what it was done to.

use std::io;
use std::path::PathBuf;

use crate::Kind;

/// Why a sandbox could not be made, or a signal not be sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The path of a namespace to join cannot be opened.
    #[error("join {kind} namespace {path}: {source}", path = path.display())]
    OpenNamespace {
        /// The kind that was asked for.
        kind: Kind,
        /// The path that was asked for.
        path: PathBuf,
        /// What `open` said.
        source: io::Error,
    },
    /// The path of a namespace to join is something else.
    #[error("join {kind} namespace {path}: not a namespace file", path = path.display())]
    NotANamespace {
        /// The kind that was asked for.
        kind: Kind,
        /// The path that was asked for.
        path: PathBuf,
    },
    /// The path of a namespace to join is a namespace of another kind.
    #[error("join {kind} namespace {path}: it is a namespace of another kind", path = path.display())]
    WrongKind {
        /// The kind that was asked for.
        kind: Kind,
        /// The path that was asked for.
        path: PathBuf,
    },
    /// The kernel let us not enter a namespace.
    #[error("enter {kind} namespace: {source}")]
    Enter {
        /// The kind.
        kind: Kind,
        /// What `setns` said.
        source: io::Error,
    },
    /// The kernel made no new namespace.
    #[error("make {kind} namespace: {source}")]
    Make {
        /// The kind.
        kind: Kind,
        /// What `unshare` said.
        source: io::Error,
    },
    /// A namespace that was made or entered cannot be opened to keep it.
    #[error("keep {kind} namespace {path}: {source}", path = path.display())]
    Keep {
        /// The kind.
        kind: Kind,
        /// Its file in /proc.
        path: PathBuf,
        /// What `open` said.
        source: io::Error,
    },
    /// A thread cannot hold what was asked for.
    #[error("holder thread: a {kind} namespace needs holder process")]
    ThreadCannotHold {
        /// The kind that only a process holds.
        kind: Kind,
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
    /// The kernel has no such sysctl or did not take the value.
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
    /// A new user namespace without a mapping, or with one that the kernel refused.
    #[error("write {file} of the user namespace: {source}")]
    IdMap {
        /// `uid_map` or `gid_map`.
        file: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The pause program could not be prepared, started or talked to.
    #[error("pause program: {operation}: {source}")]
    Program {
        /// What was done.
        operation: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The pause program ended or said something else than its protocol before it was ready.
    #[error("pause program: ended before it was ready")]
    ProgramEnded,
    /// The setup thread could not be started or is gone.
    #[error("start the sandbox's thread: {0}")]
    Thread(#[source] io::Error),
    /// A signal could not be sent to the holder.
    #[error("send signal {signal} to the holder: {source}")]
    Signal {
        /// Its number.
        signal: i32,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Whose fault an [`Error`] is: what a caller needs to answer its own client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// The configuration asks for what cannot be.
    InvalidInput,
    /// A path of the configuration does not exist.
    NotFound,
    /// The kernel is too old, or was built without what is needed.
    Unsupported,
    /// Anything else: a limit, a permission, a defect.
    Internal,
}

impl Error {
    /// Whose fault it is.
    pub fn class(&self) -> Class {
        match self {
            Self::NotANamespace { .. }
            | Self::WrongKind { .. }
            | Self::ThreadCannotHold { .. }
            | Self::BadName { .. }
            | Self::BadSysctl { .. } => Class::InvalidInput,
            Self::OpenNamespace { source, .. } => match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Class::NotFound,
                _ => Class::Internal,
            },
            Self::IdMap { source, .. } | Self::SetName { source, .. } => match source.kind() {
                io::ErrorKind::InvalidInput => Class::InvalidInput,
                _ => Class::Internal,
            },
            // Only a key inside the pod's own namespaces comes this far; a missing file means a key that does not exist.
            Self::WriteSysctl { source, .. } => match source.kind() {
                io::ErrorKind::InvalidInput
                | io::ErrorKind::NotFound
                | io::ErrorKind::NotADirectory => Class::InvalidInput,
                _ => Class::Internal,
            },
            // EINVAL from unshare: the kernel does not know the kind.
            Self::Make { source, .. } => match source.kind() {
                io::ErrorKind::InvalidInput | io::ErrorKind::Unsupported => Class::Unsupported,
                _ => Class::Internal,
            },
            Self::Program { source, .. } => match source.kind() {
                io::ErrorKind::Unsupported => Class::Unsupported,
                _ => Class::Internal,
            },
            Self::Enter { .. }
            | Self::Keep { .. }
            | Self::Loopback(_)
            | Self::ProgramEnded
            | Self::Thread(_)
            | Self::Signal { .. } => Class::Internal,
        }
    }

    pub(crate) fn program(operation: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Program { operation, source }
    }
}
