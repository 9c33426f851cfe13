//! The bundles that this shim has written records into, by shim.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use rustix::process::Pid;

use crate::error::{IoError, Result};
use crate::kernel::process;
use crate::runtime::bundle::{self, ADDRESS, Record, SHIM_PID, SHIM_STARTED};
use crate::runtime::runc;
use crate::runtime::spec::{Role, Spec};

/// Where containerd keeps the bundles of tasks.
const TASKS: &str = "io.containerd.runtime.v2.task";
/// Where containerd 2.x keeps the bundles of sandboxes of the Sandbox API.
const SANDBOXES: &str = "io.containerd.sandbox.controller.v1.shim";

/// A bundle of this shim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Bundle {
    pub(super) id: String,
    pub(super) path: PathBuf,
    pub(super) kind: Kind,
}

/// What a bundle is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// A sandbox of the Sandbox API.
    Sandbox,
    /// A sandbox in podsandbox mode.
    SandboxTask,
    Container,
    /// A container that has been deleted; containerd removes the bundle in a moment.
    Deleted,
}

/// The bundles of one shim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Group {
    /// containerd's namespace.
    pub(super) namespace: String,
    /// The path of the shim's socket.
    pub(super) socket: PathBuf,
    pub(super) bundles: Vec<Bundle>,
    /// The shim's process, by pid and start time.
    pub(super) shim: Option<Pid>,
}

impl Group {
    pub(super) fn sandbox(&self) -> Option<&Bundle> {
        let is_sandbox = |one: &&Bundle| matches!(one.kind, Kind::Sandbox | Kind::SandboxTask);
        self.bundles.iter().find(is_sandbox)
    }

    pub(super) fn containers(&self) -> usize {
        let containers = self.bundles.iter();
        containers.filter(|one| one.kind == Kind::Container).count()
    }
}

/// Finds the shims below `state`, containerd's folder of state.
///
/// # Errors
/// `Io` where a folder is there and cannot be listed.
pub(super) fn groups(state: &Path) -> Result<Vec<Group>> {
    let mut groups: BTreeMap<(String, PathBuf), Group> = BTreeMap::new();
    for folder in [SANDBOXES, TASKS].map(|name| state.join(name)) {
        for namespace in list(&folder)? {
            for path in list(&namespace)? {
                let Some(socket) = socket(&path) else {
                    continue;
                };
                let Some(kind) = kind(&path) else { continue };
                let name = name_of(&namespace);
                let group = groups
                    .entry((name.clone(), socket.clone()))
                    .or_insert_with(|| Group {
                        namespace: name,
                        socket,
                        bundles: Vec::new(),
                        shim: None,
                    });
                group.shim = group.shim.or_else(|| shim(&path));
                group.bundles.push(Bundle {
                    id: name_of(&path),
                    path,
                    kind,
                });
            }
        }
    }
    // Nothing but deleted bundles: the shim is about to end.
    let lives = |group: &Group| group.bundles.iter().any(|one| one.kind != Kind::Deleted);
    Ok(groups.into_values().filter(lives).collect())
}

/// The folders in a folder, in the order of their names.
fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&error.kind()) => {
            return Ok(Vec::new());
        }
        Err(error) => return Err(IoError::at("list", folder)(error).into()),
    };
    let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
    found.sort_unstable();
    Ok(found)
}

fn name_of(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// The path of the socket that the shim has noted.
fn socket(bundle: &Path) -> Option<PathBuf> {
    let address = std::fs::read_to_string(bundle.join(ADDRESS)).ok()?;
    Some(address.trim().strip_prefix("unix://")?.into())
}

/// What a bundle is for; none for a bundle without a record of this shim. Other shims write an `address`, too.
fn kind(bundle: &Path) -> Option<Kind> {
    let record = || matches!(Record::load(bundle), Ok(Some(_)));
    if bundle::is_deleted(bundle) {
        return Some(Kind::Deleted);
    }
    if !bundle.join(SHIM_STARTED).exists() && !record() {
        return None;
    }
    Some(match Spec::load(bundle) {
        Ok(spec) if spec.role(&name_of(bundle)) == Role::Sandbox => Kind::SandboxTask,
        Ok(_) => Kind::Container,
        // A sandbox of the Sandbox API has no spec.
        Err(_) => Kind::Sandbox,
    })
}

/// The shim that was started in a bundle, if it still is that process.
fn shim(bundle: &Path) -> Option<Pid> {
    let pid = runc::read_pid(&bundle.join(SHIM_PID)).ok()?;
    let started = bundle::shim_started(bundle)?;
    // A process that has ended, and that nobody has waited for yet, has no program.
    let lives = std::fs::read_link(format!("/proc/{pid}/exe")).is_ok();
    (lives && process::start_time(pid) == Some(started)).then_some(pid)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const SPEC: &str = r#"{"annotations": {"io.kubernetes.cri.container-type": "sandbox",
        "io.kubernetes.cri.sandbox-id": "pod"}}"#;

    fn bundle(state: &Path, folder: &str, id: &str, files: &[(&str, &str)]) {
        let path = state.join(folder).join("k8s.io").join(id);
        std::fs::create_dir_all(&path).unwrap();
        for (name, text) in files {
            std::fs::write(path.join(name), text).unwrap();
        }
    }

    #[test]
    fn bundles_are_grouped_by_their_shim_and_others_are_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path();
        assert_eq!(groups(&state.join("none")).unwrap(), []);
        let record =
            r#"{"bundle": "/b", "runc": null, "systemd_cgroup": false, "cgroups_path": null}"#;
        let this = rustix::process::getpid();
        let pid = this.to_string();
        let started = process::start_time(this).unwrap().to_string();
        let pod = [
            ("address", "unix:///s/1"),
            ("config.json", SPEC),
            (SHIM_PID, &pid),
            (SHIM_STARTED, &started),
        ];
        bundle(state, TASKS, "pod", &pod);
        let member = [
            ("address", "unix:///s/1"),
            ("config.json", "{}"),
            ("pause.json", record),
        ];
        bundle(state, TASKS, "one", &member);
        let deleted = [
            ("address", "unix:///s/1"),
            ("config.json", "{}"),
            ("deleted", record),
        ];
        bundle(state, TASKS, "two", &deleted);
        // A sandbox of the Sandbox API, whose shim's pid is another process's now.
        let reused = [
            ("address", "unix:///s/2"),
            (SHIM_PID, &pid),
            (SHIM_STARTED, "1"),
        ];
        bundle(state, SANDBOXES, "api", &reused);
        // The stock shim's.
        bundle(
            state,
            TASKS,
            "stock",
            &[
                ("address", "unix:///s/3"),
                ("config.json", "{}"),
                (SHIM_PID, &pid),
            ],
        );
        bundle(
            state,
            TASKS,
            "gone",
            &[("address", "unix:///s/4"), ("deleted", record)],
        );
        bundle(
            state,
            TASKS,
            "garbage",
            &[("address", "\u{0}"), ("pause.json", "{")],
        );
        let found = groups(state).unwrap();
        assert_eq!(found.len(), 2, "{found:?}");
        assert_eq!(found[0].socket, Path::new("/s/1"));
        assert_eq!((found[0].shim, found[0].containers()), (Some(this), 1));
        assert_eq!(found[0].sandbox().unwrap().id, "pod");
        assert_eq!((found[1].shim, found[1].containers()), (None, 0));
        assert_eq!(found[1].sandbox().unwrap().kind, Kind::Sandbox);
    }
}
