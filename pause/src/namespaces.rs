//! The kinds of namespace a pod can have for itself: what to do for each, opening, entering, making and keeping them.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{OFlags, fstatfs};
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::{Error, sys};

/// What to do for one kind of namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Namespace {
    /// The pod gets a new one.
    New,
    /// The pod gets the one that this file leads to.
    Join(PathBuf),
    /// The pod is in the node's (to be exact: in the one of the calling process).
    Node,
}

/// What to do for the user namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UserNamespace {
    /// The pod is in the node's.
    Node,
    /// The pod gets the one that this file leads to; new namespaces of other kinds belong to it.
    Join(PathBuf),
    /// The pod gets the one that owns the network namespace at this path, as [`UserNamespace::Join`] otherwise.
    OwnerOf(PathBuf),
    /// The pod gets a new one; new namespaces of other kinds belong to it.
    New {
        /// The lines of `uid_map`.
        uid_map: Vec<IdMap>,
        /// The lines of `gid_map`.
        gid_map: Vec<IdMap>,
    },
}

/// One line of a `uid_map` or `gid_map`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdMap {
    /// The first id inside.
    pub container: u32,
    /// The first id outside.
    pub host: u32,
    /// How many.
    pub size: u32,
}

/// What to do for each kind.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespaces {
    /// Network: devices, addresses, routes, abstract sockets.
    pub net: Namespace,
    /// System V IPC and POSIX message queues.
    pub ipc: Namespace,
    /// Hostname and domainname.
    pub uts: Namespace,
    /// Processes.
    pub pid: Namespace,
    /// User and group ids.
    pub user: UserNamespace,
}

/// A kind of namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names say it")]
pub enum Kind {
    Net,
    Ipc,
    Uts,
    Pid,
    User,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 5] = [Self::Net, Self::Ipc, Self::Uts, Self::Pid, Self::User];

    /// Its file in `/proc/<pid>/ns`.
    pub fn file(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::Pid => "pid",
            Self::User => "user",
        }
    }

    fn flag(self) -> UnshareFlags {
        match self {
            Self::Net => UnshareFlags::NEWNET,
            Self::Ipc => UnshareFlags::NEWIPC,
            Self::Uts => UnshareFlags::NEWUTS,
            Self::Pid => UnshareFlags::NEWPID,
            Self::User => UnshareFlags::NEWUSER,
        }
    }

    fn link(self) -> LinkNameSpaceType {
        match self {
            Self::Net => LinkNameSpaceType::Network,
            Self::Ipc => LinkNameSpaceType::InterProcessCommunication,
            Self::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
            Self::Pid => LinkNameSpaceType::ProcessID,
            Self::User => LinkNameSpaceType::User,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Net => "network",
            Self::Ipc => "IPC",
            Self::Uts => "UTS",
            Self::Pid => "process",
            Self::User => "user",
        })
    }
}

impl Namespaces {
    fn plain(&self, kind: Kind) -> Option<&Namespace> {
        match kind {
            Kind::Net => Some(&self.net),
            Kind::Ipc => Some(&self.ipc),
            Kind::Uts => Some(&self.uts),
            Kind::Pid => Some(&self.pid),
            Kind::User => None,
        }
    }

    pub(crate) fn is_new(&self, kind: Kind) -> bool {
        match self.plain(kind) {
            Some(namespace) => *namespace == Namespace::New,
            None => matches!(self.user, UserNamespace::New { .. }),
        }
    }

    pub(crate) fn joined(&self, kind: Kind) -> Option<&Path> {
        match (self.plain(kind), &self.user) {
            (Some(Namespace::Join(path)), _)
            | (None, UserNamespace::Join(path) | UserNamespace::OwnerOf(path)) => Some(path),
            _ => None,
        }
    }

    /// New or joined.
    pub(crate) fn wanted(&self, kind: Kind) -> bool {
        self.is_new(kind) || self.joined(kind).is_some()
    }
}

/// Open namespaces, one of each kind at most.
pub(crate) type Fds = BTreeMap<Kind, OwnedFd>;

/// The namespaces to join, opened and checked, and those among them that are the node's after all.
pub(crate) struct Joins {
    pub(crate) fds: Fds,
    pub(crate) nodes: BTreeSet<Kind>,
}

pub(crate) fn open_joins(namespaces: &Namespaces) -> Result<Joins, Error> {
    let mut joins = Joins {
        fds: Fds::new(),
        nodes: BTreeSet::new(),
    };
    for kind in Kind::ALL {
        if let Some(path) = namespaces.joined(kind) {
            let file = match (kind, &namespaces.user) {
                (Kind::User, UserNamespace::OwnerOf(network)) => open_owner(network)?,
                _ => open_checked(kind, path)?,
            };
            if is_own(kind, &file) {
                joins.nodes.insert(kind);
            }
            joins.fds.insert(kind, file.into());
        }
    }
    Ok(joins)
}

fn open_checked(kind: Kind, path: &Path) -> Result<File, Error> {
    let failed = |source| Error::OpenNamespace {
        kind,
        path: path.to_owned(),
        source,
    };
    // The path may be anything: do not wait for a FIFO's writer, do not take a terminal.
    let harmless = OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(harmless.bits().cast_signed())
        .open(path)
        .map_err(failed)?;

    const NSFS_MAGIC: u32 = 0x6e73_6673;
    let magic = fstatfs(&file).map_err(|e| failed(e.into()))?.f_type;
    if u32::try_from(magic) != Ok(NSFS_MAGIC) {
        return Err(Error::NotANamespace {
            kind,
            path: path.to_owned(),
        });
    }
    if sys::namespace_type(file.as_fd()).map_err(failed)? != kind.flag().bits() {
        return Err(Error::WrongKind {
            kind,
            path: path.to_owned(),
        });
    }
    Ok(file)
}

/// The user namespace that owns the network namespace at `network`.
fn open_owner(network: &Path) -> Result<File, Error> {
    let file = open_checked(Kind::Net, network)?;
    sys::owner(file.as_fd())
        .map(File::from)
        .map_err(|source| Error::OpenNamespace {
            kind: Kind::User,
            path: network.to_owned(),
            source,
        })
}

/// Whether that is the namespace which this process is in.
fn is_own(kind: Kind, file: &File) -> bool {
    let own = fs::metadata(Path::new("/proc/self/ns").join(kind.file()));
    match (own, file.metadata()) {
        (Ok(own), Ok(other)) => (own.dev(), own.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

/// Moves the calling thread (for a process namespace: its future children) into a namespace.
pub(crate) fn enter(kind: Kind, fd: impl AsFd) -> Result<(), Error> {
    move_into_link_name_space(fd.as_fd(), Some(kind.link())).map_err(|e| Error::Enter {
        kind,
        source: e.into(),
    })
}

/// Moves the calling thread (for a process namespace: its future children) into a new namespace.
pub(crate) fn make(kind: Kind) -> Result<(), Error> {
    sys::unshare(kind.flag()).map_err(|source| Error::Make { kind, source })
}

/// Opens a namespace to keep it: `/proc/<of>/ns/<file>`.
pub(crate) fn keep(kind: Kind, of: &str, file: &str) -> Result<OwnedFd, Error> {
    let path = Path::new("/proc").join(of).join("ns").join(file);
    match File::open(&path) {
        Ok(opened) => Ok(opened.into()),
        // The process whose namespace it is has ended.
        Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => {
            Err(Error::ProgramEnded)
        }
        Err(source) => Err(Error::Keep { kind, path, source }),
    }
}
