//! What the tests of sandboxes share. These tests need root.
#![allow(dead_code, reason = "each test file uses some of it")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use pause::{
    HolderChoice, HolderKind, Namespace, NamespaceKind, Namespaces, Sandbox, SandboxConfig,
    UserNamespace,
};
use rustix::process::{Pid, WaitOptions, WaitStatus, waitpid};

/// An ordinary pod.
pub(crate) fn config() -> SandboxConfig {
    SandboxConfig {
        namespaces: Namespaces {
            net: Namespace::New,
            ipc: Namespace::New,
            uts: Namespace::New,
            pid: Namespace::Node,
            user: UserNamespace::Node,
        },
        hostname: None,
        domainname: None,
        sysctls: BTreeMap::new(),
        holder: HolderChoice::Auto,
    }
}

pub(crate) fn inode(path: impl AsRef<Path>) -> u64 {
    fs::metadata(path).unwrap().ino()
}

pub(crate) fn nodes_inode(kind: NamespaceKind) -> u64 {
    inode(Path::new("/proc/self/ns").join(kind.file()))
}

/// Runs a shell line in the pod's namespaces, entered by their paths as runc does. In a pod's process namespace the
/// shell has a mount namespace with a fitting /proc.
pub(crate) fn inside(sandbox: &Sandbox, line: &str) -> Output {
    let paths = sandbox.paths();
    let mut command = Command::new("nsenter");
    for (kind, path) in &paths {
        command.arg(format!("--{}={}", kind.file(), path.display()));
    }
    if paths.contains_key(&NamespaceKind::User) {
        command.args(["--setuid", "0", "--setgid", "0"]);
    }
    if paths.contains_key(&NamespaceKind::Pid) {
        command.args(["unshare", "--mount", "--mount-proc"]);
    }
    command.args(["sh", "-c", line]).output().unwrap()
}

pub(crate) fn run_inside(sandbox: &Sandbox, line: &str) -> String {
    let output = inside(sandbox, line);
    assert!(output.status.success(), "{line}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// As [`run_inside`], for a line that only reads.
pub(crate) fn read_inside(sandbox: &Sandbox, line: &str) -> String {
    run_inside(sandbox, line)
}

/// Ends a sandbox, and waits for its process as the shim would.
pub(crate) fn end(sandbox: Sandbox) {
    let (pid, kind) = (sandbox.pid(), sandbox.holder_kind());
    sandbox.end();
    if kind == HolderKind::Process {
        wait(pid);
    }
}

pub(crate) fn wait(pid: Pid) -> WaitStatus {
    waitpid(Some(pid), WaitOptions::empty()).unwrap().unwrap().1
}

/// Threads, open files and children of this process.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Traces {
    pub(crate) threads: BTreeSet<String>,
    pub(crate) files: BTreeSet<String>,
    pub(crate) children: BTreeSet<String>,
}

pub(crate) fn traces() -> Traces {
    let listing = fs::File::open("/proc/self/fd").unwrap();
    let own = listing.as_raw_fd();
    let files = fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| {
            let entry = entry.unwrap();
            let target = fs::read_link(entry.path()).ok()?;
            let name = entry.file_name().into_string().unwrap();
            // Leaves out the two descriptors of this listing.
            let of_listing = target.to_string_lossy().ends_with("/fd");
            (name != own.to_string() && !of_listing).then(|| format!("{name} {}", target.display()))
        })
        .collect();
    let threads: BTreeSet<String> = fs::read_dir("/proc/self/task")
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let children = threads
        .iter()
        .filter_map(|thread| fs::read_to_string(format!("/proc/self/task/{thread}/children")).ok())
        .flat_map(|list| {
            list.split_whitespace()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        })
        .collect();
    Traces {
        threads,
        files,
        children,
    }
}

/// Checks nothing unless each test is a process of its own (nextest): other tests of the same process leave traces too.
pub(crate) fn assert_no_new_traces(before: &Traces) {
    if std::env::var_os("NEXTEST").is_none() {
        return;
    }
    // The kernel may still list a joined thread for a moment.
    let start = Instant::now();
    let mut after = traces();
    while *before != after && start.elapsed() < Duration::from_secs(10) {
        std::thread::sleep(Duration::from_millis(1));
        after = traces();
    }
    assert_eq!(before.files, after.files);
    assert_eq!(before.threads, after.threads);
    assert_eq!(before.children, after.children);
}

pub(crate) fn private_kb(pid: i32) -> u32 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    rollup
        .lines()
        .filter(|line| line.starts_with("Private_"))
        .map(|line| {
            line.split_whitespace()
                .nth(1)
                .unwrap()
                .parse::<u32>()
                .unwrap()
        })
        .sum()
}

/// Asks until there is an answer, for a minute at most: a machine may be emulated.
pub(crate) fn soon<T>(mut ask: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(
            start.elapsed() < Duration::from_secs(60),
            "it did not happen"
        );
        std::thread::sleep(Duration::from_millis(1));
    }
}
