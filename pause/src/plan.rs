//! What the sandbox's thread is to do: a configuration that has been checked before anything is made.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;

use crate::namespaces::{self, Joins, OpenNamespaces};
use crate::setup::Settings;
use crate::{
    Error, HolderChoice, HolderKind, IdMap, NamespaceKind, Namespaces, SandboxConfig,
    UserNamespace, program_memfd,
};

/// The work of the sandbox's thread. A user namespace to join that turned out to be the node's is not in the plan.
pub(crate) struct Plan {
    pub(crate) namespaces: Namespaces,
    /// The namespaces to join.
    pub(crate) joins: OpenNamespaces,
    pub(crate) settings: Settings,
    /// The pause program, if a process shall hold the namespaces.
    pub(crate) program: Option<OwnedFd>,
}

impl Plan {
    pub(crate) fn new(config: &SandboxConfig) -> Result<Self, Error> {
        let mut namespaces = config.namespaces.clone();
        let Joins {
            open: mut joins,
            of_node,
        } = namespaces::open_joins(&namespaces)?;
        if of_node.contains(&NamespaceKind::User) {
            // The kernel refuses to enter the user namespace that a process is in (setns(2), EINVAL).
            namespaces.user = UserNamespace::Node;
            joins.remove(&NamespaceKind::User);
        }
        let holder = holder_kind(config.holder, &namespaces)?;
        if let UserNamespace::New { uid_map, gid_map } = &namespaces.user {
            check_root_is_mapped("uid_map", uid_map)?;
            check_root_is_mapped("gid_map", gid_map)?;
        }
        let own: BTreeSet<_> = namespaces
            .new_or_joined_kinds()
            .filter(|kind| !of_node.contains(kind))
            .collect();
        let settings = Settings::new(config, &own)?;
        let program = match holder {
            HolderKind::Thread => None,
            HolderKind::Process => {
                Some(program_memfd().map_err(Error::program("copy it into memory"))?)
            }
        };
        Ok(Self {
            namespaces,
            joins,
            settings,
            program,
        })
    }
}

fn holder_kind(choice: HolderChoice, namespaces: &Namespaces) -> Result<HolderKind, Error> {
    match (choice, needs_process(namespaces)) {
        (HolderChoice::Thread, Some(kind)) => Err(Error::ThreadCannotHold { kind }),
        (HolderChoice::Thread | HolderChoice::Auto, None) => Ok(HolderKind::Thread),
        (HolderChoice::Auto, Some(_)) | (HolderChoice::Process, _) => Ok(HolderKind::Process),
    }
}

/// The first kind that no thread can hold.
fn needs_process(namespaces: &Namespaces) -> Option<NamespaceKind> {
    if namespaces.is_new_or_joined(NamespaceKind::User) {
        Some(NamespaceKind::User)
    } else if namespaces.is_new(NamespaceKind::Pid) {
        Some(NamespaceKind::Pid)
    } else {
        None
    }
}

/// The pause program becomes root of a new user namespace, so the map needs a root.
fn check_root_is_mapped(file: &'static str, map: &[IdMap]) -> Result<(), Error> {
    if map.iter().any(|line| line.container == 0 && line.size > 0) {
        return Ok(());
    }
    let source = io::Error::new(io::ErrorKind::InvalidInput, "nobody is root in it");
    Err(Error::IdMap { file, source })
}
