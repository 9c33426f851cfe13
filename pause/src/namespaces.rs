//! The kinds of namespace that a pod can have for itself: what to do for each kind, and how to open, enter, make and
//! keep a namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::thread::{LinkNameSpaceType, UnshareFlags, move_into_link_name_space};

use crate::Error;
use crate::sys::{self, NamespaceFile};

/// Where the pod's namespace of one kind comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Namespace {
    /// The pod gets a new namespace.
    New,
    /// The pod gets the namespace that this file leads to.
    Join(PathBuf),
    /// The pod is in the node's namespace, to be exact: in the namespace of the calling process.
    Node,
}

/// Where the pod's user namespace comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UserNamespace {
    /// The pod is in the node's user namespace.
    Node,
    /// The pod gets the user namespace that this file leads to. New namespaces of other kinds belong to it.
    Join(PathBuf),
    /// The pod gets the user namespace that owns the network namespace at this path (`NS_GET_USERNS` of ioctl_ns(2)).
    /// Otherwise as [`UserNamespace::Join`].
    OwnerOf(PathBuf),
    /// The pod gets a new user namespace. New namespaces of other kinds belong to it.
    New {
        /// The lines of `uid_map`.
        uid_map: Vec<IdMap>,
        /// The lines of `gid_map`.
        gid_map: Vec<IdMap>,
    },
}

/// One line of a `uid_map` or `gid_map` (user_namespaces(7)): a range of ids inside and outside of the namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IdMap {
    /// The first id inside the namespace.
    pub container: u32,
    /// The first id outside.
    pub host: u32,
    /// How many ids.
    pub size: u32,
}

/// Where the pod's namespace of each kind comes from.
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

/// A kind of namespace (namespaces(7)).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[expect(missing_docs, reason = "the names say it")]
pub enum NamespaceKind {
    Net,
    Ipc,
    Uts,
    Pid,
    User,
}

impl NamespaceKind {
    /// Every kind.
    pub const ALL: [Self; 5] = [Self::Net, Self::Ipc, Self::Uts, Self::Pid, Self::User];

    /// The file in `/proc/<pid>/ns`.
    pub fn file(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Ipc => "ipc",
            Self::Uts => "uts",
            Self::Pid => "pid",
            Self::User => "user",
        }
    }

    pub(crate) fn unshare_flag(self) -> UnshareFlags {
        match self {
            Self::Net => UnshareFlags::NEWNET,
            Self::Ipc => UnshareFlags::NEWIPC,
            Self::Uts => UnshareFlags::NEWUTS,
            Self::Pid => UnshareFlags::NEWPID,
            Self::User => UnshareFlags::NEWUSER,
        }
    }

    fn setns_type(self) -> LinkNameSpaceType {
        match self {
            Self::Net => LinkNameSpaceType::Network,
            Self::Ipc => LinkNameSpaceType::InterProcessCommunication,
            Self::Uts => LinkNameSpaceType::HostNameAndNISDomainName,
            Self::Pid => LinkNameSpaceType::ProcessID,
            Self::User => LinkNameSpaceType::User,
        }
    }
}

impl fmt::Display for NamespaceKind {
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
    /// `None` for the user namespace, which has its own type.
    fn non_user(&self, kind: NamespaceKind) -> Option<&Namespace> {
        match kind {
            NamespaceKind::Net => Some(&self.net),
            NamespaceKind::Ipc => Some(&self.ipc),
            NamespaceKind::Uts => Some(&self.uts),
            NamespaceKind::Pid => Some(&self.pid),
            NamespaceKind::User => None,
        }
    }

    pub(crate) fn is_new(&self, kind: NamespaceKind) -> bool {
        match self.non_user(kind) {
            Some(namespace) => *namespace == Namespace::New,
            None => matches!(self.user, UserNamespace::New { .. }),
        }
    }

    /// The file that leads to the namespace to join, or to a namespace that belongs to it.
    pub(crate) fn join_path(&self, kind: NamespaceKind) -> Option<&Path> {
        match (self.non_user(kind), &self.user) {
            (Some(Namespace::Join(path)), _)
            | (None, UserNamespace::Join(path) | UserNamespace::OwnerOf(path)) => Some(path),
            _ => None,
        }
    }

    pub(crate) fn is_new_or_joined(&self, kind: NamespaceKind) -> bool {
        self.is_new(kind) || self.join_path(kind).is_some()
    }

    pub(crate) fn new_or_joined_kinds(&self) -> impl Iterator<Item = NamespaceKind> {
        NamespaceKind::ALL
            .into_iter()
            .filter(|kind| self.is_new_or_joined(*kind))
    }
}

/// Open namespaces, one of each kind at most.
pub(crate) type OpenNamespaces = BTreeMap<NamespaceKind, OwnedFd>;

/// The namespaces to join, opened and checked.
pub(crate) struct Joins {
    pub(crate) open: OpenNamespaces,
    /// The kinds among them that turned out to be the node's.
    pub(crate) of_node: BTreeSet<NamespaceKind>,
}

pub(crate) fn open_joins(namespaces: &Namespaces) -> Result<Joins, Error> {
    let mut joins = Joins {
        open: OpenNamespaces::new(),
        of_node: BTreeSet::new(),
    };
    for kind in NamespaceKind::ALL {
        if let Some(path) = namespaces.join_path(kind) {
            let file = match (kind, &namespaces.user) {
                (NamespaceKind::User, UserNamespace::OwnerOf(network)) => open_owner(network)?,
                _ => open_checked(kind, path)?.into_file(),
            };
            if is_of_node(kind, &file) {
                joins.of_node.insert(kind);
            }
            joins.open.insert(kind, file.into());
        }
    }
    Ok(joins)
}

/// Opens a namespace of this kind.
fn open_checked(kind: NamespaceKind, path: &Path) -> Result<NamespaceFile, Error> {
    let failed = |source| Error::OpenNamespace {
        kind,
        path: path.to_owned(),
        source,
    };
    // The path may lead to anything: the flags avoid a wait for a FIFO's writer, and a controlling terminal.
    let harmless = OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(harmless.bits().cast_signed())
        .open(path)
        .map_err(failed)?;
    let Some(file) = NamespaceFile::new(file).map_err(failed)? else {
        return Err(Error::NotANamespace {
            kind,
            path: path.to_owned(),
        });
    };
    if file.unshare_flag().map_err(failed)? != kind.unshare_flag().bits() {
        return Err(Error::WrongKind {
            kind,
            path: path.to_owned(),
        });
    }
    Ok(file)
}

/// Opens the user namespace that owns the network namespace at `network`.
fn open_owner(network: &Path) -> Result<File, Error> {
    open_checked(NamespaceKind::Net, network)?
        .owner()
        .map(File::from)
        .map_err(|source| Error::OpenNamespace {
            kind: NamespaceKind::User,
            path: network.to_owned(),
            source,
        })
}

/// Whether `file` is the namespace that this process is in.
fn is_of_node(kind: NamespaceKind, file: &File) -> bool {
    let nodes = fs::metadata(Path::new("/proc/self/ns").join(kind.file()));
    match (nodes, file.metadata()) {
        (Ok(nodes), Ok(other)) => (nodes.dev(), nodes.ino()) == (other.dev(), other.ino()),
        _ => false,
    }
}

/// Moves the calling thread into a namespace. A process namespace takes the thread's future children instead.
pub(crate) fn enter(kind: NamespaceKind, fd: impl AsFd) -> Result<(), Error> {
    move_into_link_name_space(fd.as_fd(), Some(kind.setns_type())).map_err(|e| Error::Enter {
        kind,
        source: e.into(),
    })
}

/// Moves the calling thread into a new namespace. A process namespace takes the thread's future children instead.
pub(crate) fn make(kind: NamespaceKind) -> Result<(), Error> {
    sys::unshare(kind).map_err(|source| Error::Make { kind, source })
}

/// Opens a namespace to keep it: `/proc/<task>/ns/<file>`, where `task` is a process id, `self` or `thread-self`.
pub(crate) fn keep(kind: NamespaceKind, task: &str, file: &str) -> Result<OwnedFd, Error> {
    let path = Path::new("/proc").join(task).join("ns").join(file);
    match File::open(&path) {
        Ok(opened) => Ok(opened.into()),
        // The process whose namespace it is has ended.
        Err(error) if error.raw_os_error() == Some(Errno::SRCH.raw_os_error()) => {
            Err(Error::ProgramEnded)
        }
        Err(source) => Err(Error::Keep { kind, path, source }),
    }
}
