//! `pods`: the pods of this node that run under this shim, one line each.
//!
//! ```text
//!  STATE/io.containerd.runtime.v2.task/NAMESPACE/ID ──────────────┐  bundles with this shim's records,
//!  STATE/io.containerd.sandbox.controller.v1.shim/NAMESPACE/ID ───┴▶ by the address of their shim: a pod each
//!                                                                      │
//!   shim.pid and shim.started, /proc ◀── the process ──────────────────┤
//!   Connect, SandboxStatus ◀── its version, the sandbox's pid ─────────┘
//! ```
//!
//! The records prove which process a shim is: its pid and its start time, as for `delete`; where a pod's first bundle is
//! gone, the shim itself says its pid at the socket that the record names. No process is taken for a shim by its name.

mod ask;
mod find;
mod show;

use std::path::{Path, PathBuf};

use rustix::process::Pid;

use self::ask::Answer;
use self::find::{Bundle, Group};
use super::containerd::Containerd;
use super::{Asked, Said, programs, root_only};
use crate::error::{IoError, Result};
use crate::runtime::bundle::Record;
use crate::runtime::spec::{SANDBOX_ID, Spec};

/// The folder of containerd's state where no containerd says another.
const STATE: &str = "/run/containerd";
const NAME: &str = "io.kubernetes.cri.sandbox-name";
const NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";

/// A pod, or the containers of one shim that are no pod (`ctr`).
#[derive(Debug, Clone, PartialEq, Eq)]
struct Pod {
    id: String,
    containerd_namespace: String,
    /// Kubernetes' name and namespace.
    name: Option<String>,
    namespace: Option<String>,
    holder: Holder,
    containers: usize,
    /// None when the shim has ended, and containerd has not cleaned up yet.
    shim: Option<Shim>,
}

/// What holds the namespaces of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Holder {
    /// A thread of the shim.
    Thread(Pid),
    /// The built-in pause program.
    Process(Pid),
    /// The pause image, run by the OCI runtime.
    Image(Pid),
    /// There is no sandbox, the sandbox has ended, or the shim does not answer.
    None,
}

/// The process of a shim.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Shim {
    pid: Pid,
    /// Memory that nobody else uses, in KiB.
    private: Option<u64>,
    /// The version that runs; none when the shim does not answer.
    version: Option<String>,
    file: File,
}

/// What is on the disk where the shim's program was started from.
#[derive(Debug, Clone, PartialEq, Eq)]
enum File {
    /// The same file.
    Current,
    /// Another file, of this version of the shim if it says one.
    Replaced(Option<String>),
    /// Nothing.
    Removed,
}

/// Lists the pods.
///
/// # Errors
/// `FailedPrecondition` for anybody but root, `Io` where the bundles cannot be listed.
pub fn pods(asked: &Asked) -> Result<Said> {
    root_only("pods")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(IoError::at("start the runtime of", "/proc/self"))?;
    let mut pods = Vec::new();
    for group in find::groups(&state(asked))? {
        let answer = runtime.block_on(ask::ask(&group));
        pods.push(pod(&group, answer.as_ref()));
    }
    Ok(Said {
        text: show::pods(&pods, asked.form),
        code: 0,
    })
}

/// containerd's folder of state: containerd need not run.
fn state(asked: &Asked) -> PathBuf {
    let config = asked.config.as_deref();
    let containerd =
        Containerd::at(&asked.address, config).unwrap_or_else(|_| Containerd::installed(config));
    let config = containerd.config().ok();
    config
        .and_then(|config| config.state)
        .unwrap_or_else(|| STATE.into())
}

fn pod(group: &Group, answer: Option<&Answer>) -> Pod {
    let sandbox = group.sandbox();
    let specs = group
        .bundles
        .iter()
        .filter_map(|one| Spec::load(&one.path).ok());
    let specs: Vec<Spec> = specs.collect();
    let annotation = |key: &str| specs.iter().find_map(|spec| spec.annotation(key));
    let of_status = |key: &str| answer?.metadata.get(key)?.as_str();
    let text = |found: Option<&str>| found.filter(|text| !text.is_empty()).map(str::to_owned);
    let first = group.bundles.first();
    let id = sandbox.map(|bundle| bundle.id.as_str());
    let id = id
        .or_else(|| annotation(SANDBOX_ID))
        .or_else(|| first.map(|one| one.id.as_str()));
    let pid = group.shim.or_else(|| answer.and_then(|answer| answer.shim));
    Pod {
        id: id.unwrap_or_default().to_owned(),
        containerd_namespace: group.namespace.clone(),
        name: text(of_status("name").or_else(|| annotation(NAME))),
        namespace: text(of_status("namespace").or_else(|| annotation(NAMESPACE))),
        holder: match (pid, sandbox, answer.and_then(|answer| answer.sandbox)) {
            (Some(shim), Some(sandbox), Some(held)) => holder(shim, sandbox, held),
            _ => Holder::None,
        },
        containers: group.containers(),
        shim: pid.map(|pid| Shim {
            pid,
            private: private_memory(pid),
            version: answer.map(|answer| answer.version.clone()),
            file: file(pid),
        }),
    }
}

/// What `held`, the pid of a sandbox, is.
fn holder(shim: Pid, sandbox: &Bundle, held: Pid) -> Holder {
    if Path::new(&format!("/proc/{shim}/task/{held}")).exists() {
        return Holder::Thread(held);
    }
    if !Path::new(&format!("/proc/{held}")).exists() {
        return Holder::None;
    }
    // A runtime knows the sandbox.
    match Record::load(&sandbox.path) {
        Ok(Some(Record { runc: Some(_), .. })) => Holder::Image(held),
        _ => Holder::Process(held),
    }
}

fn private_memory(pid: Pid) -> Option<u64> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    private_in(&text)
}

/// The sum of `Private_Clean` and `Private_Dirty` (proc_pid_smaps(5)), in KiB.
fn private_in(rollup: &str) -> Option<u64> {
    let kib = |line: &str| {
        let (_, value) = line.strip_prefix("Private_")?.split_once(':')?;
        value.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    };
    let mut values = rollup
        .lines()
        .filter(|line| !line.starts_with("Private_Hugetlb"))
        .filter_map(kib);
    let first = values.next()?;
    Some(values.fold(first, u64::saturating_add))
}

/// Compares the running program with the file that has its name now. The process may see other files than this one.
fn file(pid: Pid) -> File {
    let running = PathBuf::from(format!("/proc/{pid}/exe"));
    let named = std::fs::read_link(&running).unwrap_or_default();
    let named = named.to_string_lossy();
    let named = named.strip_suffix(" (deleted)").unwrap_or(&named);
    let on_disk = PathBuf::from(format!("/proc/{pid}/root{named}"));
    match (programs::identity(&running), programs::identity(&on_disk)) {
        (Some(running), Some(on_disk)) if running == on_disk => File::Current,
        (_, Some(_)) => File::Replaced(programs::shim_version(&on_disk)),
        (_, None) => File::Removed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_memory_is_a_sum_without_huge_pages() {
        let text = "00400000-7ffd [rollup]\nRss:  900 kB\nPrivate_Clean:   12 kB\nPrivate_Dirty:  322 kB\n\
                    Private_Hugetlb:  2048 kB\nSwap: 0 kB\n";
        assert_eq!(private_in(text), Some(334));
        assert_eq!(private_in("Rss: 1 kB\n"), None);
        assert_eq!(private_in(""), None);
        assert!(private_memory(rustix::process::getpid()).is_some_and(|kib| kib > 0));
    }

    #[test]
    fn this_program_is_its_own_file() {
        assert_eq!(file(rustix::process::getpid()), File::Current);
    }
}
