//! What is left of a test: processes, mounts, cgroups, sockets, FIFOs, network namespaces, links, directories.
//!
//! Tests run in parallel. So only things count that carry one of this test's names: the slot's directory, the slot's
//! cgroup parent, the slot's bridge, the ids of the test's containers. Every process that the test's containerd starts
//! has the slot's directory in its environment, arguments or working directory. A process that was once seen below such
//! a process stays on the list, wherever the process moves.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use sha2::{Digest, Sha256};

use crate::proc::{self, Process};
use crate::slot::{Names, text};
use crate::until::eventually;

/// The variable with the slot's directory, in the environment of every process that a test starts.
pub const MARK: &str = "SHIM_TESTS_SLOT";

/// The folder of the shims' sockets, shared by all containerds of a machine.
pub const SHIM_SOCKETS: &str = "/run/containerd/s";

/// A container or sandbox that was once there, by containerd's namespace and id.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct TaskId {
    /// `k8s.io` for CRI.
    pub namespace: String,
    /// The container's id.
    pub id: String,
}

/// The processes of a slot: all that carry the slot's mark, and their descendants.
pub fn processes(names: &Names) -> Vec<Process> {
    let directory = text(&names.directory());
    let [cgroup, cgroup_below, slice] = [
        format!(":{}\n", names.cgroup_parent()),
        format!(":{}/", names.cgroup_parent()),
        format!(":/{}/", names.slice()),
    ];
    let listing = proc::all();
    let ourselves = rustix::process::getpid().as_raw_nonzero().get();
    let carries = |process: &Process| {
        let read =
            |file: &str| fs::read(format!("/proc/{}/{file}", process.pid)).unwrap_or_default();
        let contains = |haystack: &[u8], needle: &str| {
            haystack
                .windows(needle.len())
                .any(|window| window == needle.as_bytes())
        };
        let variable = format!("{MARK}={directory}\0");
        let path_below = format!("{directory}/");
        let membership = read("cgroup");
        contains(&read("environ"), &variable)
            || contains(&read("cmdline"), &path_below)
            || fs::read_link(format!("/proc/{}/cwd", process.pid))
                .is_ok_and(|cwd| cwd.starts_with(&directory))
            || contains(&membership, &cgroup)
            || contains(&membership, &cgroup_below)
            || contains(&membership, &slice)
    };
    let roots: BTreeSet<i32> = listing
        .iter()
        .filter(|process| process.pid != ourselves && carries(process))
        .map(|p| p.pid)
        .collect();
    proc::with_descendants(&roots, &listing)
}

/// A child of the test itself: containerd, or a `ctr` that listens.
pub fn is_our_own(process: &Process) -> bool {
    process.parent == rustix::process::getpid().as_raw_nonzero().get()
}

/// Mount points below the slot's directory, in the order of mounting.
pub fn mounts(names: &Names) -> Vec<PathBuf> {
    let directory = names.directory();
    fs::read_to_string("/proc/self/mountinfo")
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split_whitespace().nth(4))
        .map(|point| PathBuf::from(point.replace("\\040", " ")))
        .filter(|point| point.starts_with(&directory))
        .collect()
}

/// The slot's cgroup parents in every hierarchy: the plain driver's and systemd's.
pub fn cgroup_parents(names: &Names) -> Vec<PathBuf> {
    let mounted = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let mut found: Vec<PathBuf> = mounted
        .lines()
        .filter_map(|line| {
            let (left, right) = line.split_once(" - ")?;
            right
                .starts_with("cgroup")
                .then(|| PathBuf::from(left.split_whitespace().nth(4).unwrap_or_default()))
        })
        .flat_map(|hierarchy| [names.name(), names.slice()].map(|parent| hierarchy.join(parent)))
        .filter(|parent| parent.is_dir())
        .collect();
    found.sort();
    found.dedup();
    found
}

/// Cgroups below the slot's parent.
pub fn cgroups(names: &Names) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for parent in cgroup_parents(names) {
        below(&parent, &mut |path, kind| {
            if kind.is_dir() {
                found.push(path.to_path_buf());
            }
        });
    }
    found
}

/// Removes the cgroups with the name `of-shims`, which the option `ShimCgroup` of a test names: such a cgroup is the
/// operator's, and stays. Gives how many there were.
#[track_caller]
pub fn remove_cgroups_of_shims(names: &Names) -> usize {
    let mut found = cgroups(names);
    found.retain(|path| path.ends_with("of-shims"));
    for path in &found {
        // An ending process leaves its cgroup a moment after its name is gone.
        eventually(Duration::from_secs(10), || {
            fs::remove_dir(path).map_err(|error| error.to_string())
        });
    }
    found.len()
}

/// systemd's units of a task. A failed or forgotten scope stays in this folder when its cgroup is gone.
fn units(task: &TaskId) -> Vec<PathBuf> {
    let scope = format!("-{}.scope", task.id);
    let entries = fs::read_dir("/run/systemd/transient").into_iter().flatten();
    let files = entries.flatten().map(|entry| entry.path());
    files
        .filter(|file| file.to_string_lossy().ends_with(&scope))
        .collect()
}

/// The socket that a shim of this group listens on, as containerd computes it.
pub fn shim_socket(grpc_address: &str, group: &TaskId) -> PathBuf {
    let name = format!("{grpc_address}/{}/{}", group.namespace, group.id);
    let digest: String = Sha256::digest(name)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    Path::new(SHIM_SOCKETS).join(digest)
}

/// The address of the slot's containerd.
pub fn grpc_address(names: &Names) -> String {
    text(&names.directory().join("c.sock"))
}

/// The tasks with a bundle in the slot: containerd's, and those of [`crate::raw`].
pub fn bundles(names: &Names) -> Vec<TaskId> {
    let list = |path: &Path| -> Vec<String> {
        let Ok(entries) = fs::read_dir(path) else {
            return Vec::new();
        };
        entries
            .flatten()
            .filter_map(|entry| entry.file_name().into_string().ok())
            .collect()
    };
    let mut found = Vec::new();
    for root in [
        "state/io.containerd.runtime.v2.task",
        "state/io.containerd.sandbox.controller.v1.shim",
        "raw",
    ] {
        let root = names.directory().join(root);
        for namespace in list(&root) {
            let ids = list(&root.join(&namespace)).into_iter();
            found.extend(ids.map(|id| TaskId {
                namespace: namespace.clone(),
                id,
            }));
        }
    }
    found
}

/// The slot's links: the bridge, and the links attached to the bridge.
pub fn links(names: &Names) -> Vec<String> {
    let bridge = names.bridge();
    fs::read_dir("/sys/class/net")
        .map(|entries| {
            entries
                .flatten()
                .filter(|entry| {
                    entry.file_name().to_str() == Some(&bridge)
                        || fs::read_link(entry.path().join("master"))
                            .is_ok_and(|master| master.ends_with(&bridge))
                })
                .filter_map(|entry| entry.file_name().into_string().ok())
                .collect()
        })
        .unwrap_or_default()
}

fn below(folder: &Path, visit: &mut dyn FnMut(&Path, fs::FileType)) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    for entry in entries.flatten() {
        let Ok(kind) = entry.file_type() else {
            continue;
        };
        visit(&entry.path(), kind);
        if kind.is_dir() {
            below(&entry.path(), visit);
        }
    }
}

/// FIFOs and sockets below `folder`.
fn special_files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    below(folder, &mut |path, kind| {
        if kind.is_fifo() || kind.is_socket() {
            found.push(path.to_path_buf());
        }
    });
    found
}

/// The processes and tasks that a test has had, to be looked for afterwards.
#[derive(Debug, Default)]
pub struct Seen {
    processes: BTreeSet<Process>,
    tasks: BTreeSet<TaskId>,
}

impl Seen {
    /// Adds the slot's present processes and bundles.
    pub fn look(&mut self, names: &Names) {
        // State, parent and threads change: only the first sight of a process is kept.
        for process in processes(names) {
            if !self
                .processes
                .iter()
                .any(|seen| seen.pid == process.pid && seen.start == process.start)
            {
                self.processes.insert(process);
            }
        }
        self.tasks.extend(bundles(names));
    }

    /// Adds a task by name.
    pub fn task(&mut self, namespace: &str, id: &str) {
        self.tasks.insert(TaskId {
            namespace: namespace.to_owned(),
            id: id.to_owned(),
        });
    }

    /// Removes what would stay on the machine for ever: CNI's note about each pod's loopback, which containerd never
    /// removes, and the sockets that a shim left behind. A test has reported such sockets by now.
    pub fn remove_traces(&self, names: &Names) {
        for task in &self.tasks {
            let _ = fs::remove_file(format!("/var/lib/cni/results/cni-loopback-{}-lo", task.id));
            let _ = fs::remove_file(shim_socket(&grpc_address(names), task));
        }
    }

    /// What is left of pods and containers now: one line each. The processes of `except` may
    /// stay (containerd).
    pub fn left(&self, names: &Names, except: &[i32]) -> Vec<String> {
        let mut left = self.left_processes(names, except);
        let points = mounts(names);
        left.extend(
            points
                .iter()
                .map(|point| format!("mount {}", point.display())),
        );
        let groups = cgroups(names);
        left.extend(
            groups
                .iter()
                .map(|group| format!("cgroup {}", group.display())),
        );
        let mut links = links(names);
        links.retain(|link| *link != names.bridge());
        left.extend(links.iter().map(|link| format!("link {link}")));
        let bundles = bundles(names);
        left.extend(
            bundles
                .iter()
                .map(|task| format!("bundle {}/{}", task.namespace, task.id)),
        );
        left.extend(left_special_files(names));
        left.extend(self.tasks.iter().flat_map(|task| left_of_task(names, task)));
        left.extend(self.left_node_files());
        left
    }

    fn left_processes(&self, names: &Names, except: &[i32]) -> Vec<String> {
        let seen = self.processes.iter().filter(|process| process.alive());
        let now: BTreeSet<Process> = processes(names)
            .into_iter()
            .chain(seen.filter_map(|process| Process::of(process.pid)))
            .collect();
        // A zombie whose parent is the node's init has ended; the test has no say in when init reaps.
        let ours: BTreeSet<i32> = now.iter().map(|process| process.pid).collect();
        let reaped_here = |parent| ours.contains(&parent) || except.contains(&parent);
        now.iter()
            .filter(|process| process.state != 'Z' || reaped_here(process.parent))
            .filter(|process| !is_our_own(process))
            .filter(|process| !except.contains(&process.pid))
            .map(|process| format!("process {}", process.describe()))
            .collect()
    }

    /// Files of the tasks in the folders that all containerds of a machine share.
    fn left_node_files(&self) -> Vec<String> {
        let mut left = Vec::new();
        for folder in ["/run/netns", "/run/containerd/fifo"] {
            below(Path::new(folder), &mut |path, _| {
                let name = path.to_string_lossy();
                if self
                    .tasks
                    .iter()
                    .any(|task| task.id.len() > 3 && name.contains(&format!("/{}-", task.id)))
                {
                    left.push(format!("file {name}"));
                }
            });
        }
        left
    }
}

/// Sockets and FIFOs below the slot's directory, those of containerd itself left out.
fn left_special_files(names: &Names) -> Vec<String> {
    let daemons_own = [
        grpc_address(names),
        format!("{}.ttrpc", grpc_address(names)),
    ];
    special_files(&names.directory())
        .iter()
        .filter(|path| !daemons_own.contains(&text(path)) && !path.ends_with("debug.sock"))
        .map(|path| format!("socket or FIFO {}", path.display()))
        .collect()
}

/// The units, the socket of the shim and the state of runc of one task.
fn left_of_task(names: &Names, task: &TaskId) -> Vec<String> {
    let units = units(task);
    let mut left: Vec<String> = units
        .iter()
        .map(|unit| format!("unit {}", unit.display()))
        .collect();
    let state = Path::new("/run/containerd/runc")
        .join(&task.namespace)
        .join(&task.id);
    for path in [shim_socket(&grpc_address(names), task), state] {
        if path.exists() {
            left.push(format!("{} (of {})", path.display(), task.id));
        }
    }
    left
}
