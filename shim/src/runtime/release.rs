//! Which release of runc or crun a program is, and what the shim knows of that release.
//!
//! ```text
//!  the program that BinaryName means ──▶ Program: path, file, time of the last change
//!     │                                      │
//!     │ `runc --version`, beside the         ▼
//!     │  first create on the node     ROOT/.release-DEVICE-INODE ──▶ TESTED ──▶ what the shim may do
//!     └──────────▶ "1.3.6+ds1" ──────────────▲                          └────▶ nothing: runc does all
//! ```
//!
//! A run of `runc --version` takes 10 ms, and nobody waits for the answer: until the answer is there, runc does all. The
//! answer is kept beside runc's state, in a file that only root can write, so a node is asked once after its boot and
//! once after each upgrade of runc. Whoever replaces or changes the program changes the file's number or its time.
//!
//! The shim knows the releases of [`TESTED`] and no other: another release may do more in its start and its delete. The
//! one after 1.5 runs poststart hooks in `runc start`.

use std::ffi::OsStr;
use std::fs::{DirBuilder, File};
use std::io::Read;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use log::{debug, info};
use serde::{Deserialize, Serialize};

use super::bundle::replace_file;
use super::call::{Captured, Running};
use super::options::RUNC;
use crate::error::{IoError, Result};
use crate::kernel::blocking;
use crate::kernel::exits::{Claim, Exits};

/// The longest wait for the answer of `runc --version`.
const PATIENCE: Duration = Duration::from_secs(30);

type Number = [u32; 3];

/// An OCI runtime, by the name of its program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Runtime {
    Runc,
    Crun,
}

impl Runtime {
    const ALL: [Self; 2] = [Self::Runc, Self::Crun];

    fn name(self) -> &'static str {
        match self {
            Self::Runc => RUNC,
            Self::Crun => "crun",
        }
    }
}

/// For which runs the kernel is readied ([`crate::kernel::cgroup::MoveInPlace`]): those that gain and lose nothing. See
/// [`TESTED`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Readies {
    None,
    Create,
    CreateAndExec,
}

/// Releases of one series from a tested one to another, and what was learnt of them.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Tested {
    pub(super) runtime: Runtime,
    first: Number,
    last: Number,
    readies: Readies,
}

impl Tested {
    /// Whether the kernel is readied for this command, which moves a process into a cgroup.
    pub(super) fn readies(&self, command: &str) -> bool {
        match self.readies {
            Readies::None => false,
            Readies::Create => command != "exec",
            Readies::CreateAndExec => true,
        }
    }
}

/// The releases that the shim knows: `start` and `delete` do no more than [`super::shortcuts`] does, and the keys of their
/// state are known. A row belongs here after `tests/tests/shortcuts.rs` and `tests/tests/small_limits.rs` have passed with
/// its first and its last release; Debian's runc 1.1.5, 1.1.15 and 1.3.6 and crun 1.28 stay in the lab.
///
/// The kernel is not readied for the later runc 1.1: 1.1.15 copies its program into memory in the very process that runc
/// moves into the container's cgroup, and a quick move charges the copy, 11 MB, to the container. (1.1.5 mounts the
/// program instead, and from 1.2 on runc copies before there is that process. So does crun.) From 1.4 on an exec is born in
/// its cgroup, and so is crun's.
#[rustfmt::skip]
const TESTED: [Tested; 7] = [
    runc([1, 1, 5], [1, 1, 5], Readies::CreateAndExec),
    runc([1, 1, 6], [1, 1, 15], Readies::None),
    runc([1, 2, 0], [1, 2, 9], Readies::CreateAndExec),
    runc([1, 3, 0], [1, 3, 6], Readies::CreateAndExec),
    runc([1, 4, 0], [1, 4, 3], Readies::None),
    runc([1, 5, 1], [1, 5, 1], Readies::None),
    Tested { runtime: Runtime::Crun, first: [1, 28, 0], last: [1, 28, 0], readies: Readies::Create },
];

const fn runc(first: Number, last: Number, readies: Readies) -> Tested {
    Tested {
        runtime: Runtime::Runc,
        first,
        last,
        readies,
    }
}

/// What is known of a release, from the words of `--version`: `1.1.5`, `1.3.6+ds1`, `1.1.12-0ubuntu3`; crun's `1.28` is
/// 1.28.0. Nothing is known of `1.2.0-rc.1`, `1.4.0-dev` and `1.1.0+dev`.
fn tested(runtime: Runtime, version: &str) -> Option<&'static Tested> {
    let end = version.find(['+', '-', '~']).unwrap_or(version.len());
    let (number, rest) = version.split_at(end);
    let of_a_distribution = rest.starts_with('+') || rest.starts_with("-0ubuntu");
    if !(rest.is_empty() || of_a_distribution) || rest.contains("dev") || rest.contains("rc") {
        return None;
    }
    let mut parts: Vec<u32> = number
        .split('.')
        .map(|part| part.parse().ok())
        .collect::<Option<_>>()?;
    if runtime == Runtime::Crun && parts.len() == 2 {
        parts.push(0);
    }
    let number = Number::try_from(parts).ok()?;
    TESTED
        .iter()
        .find(|tested| tested.runtime == runtime && (tested.first..=tested.last).contains(&number))
}

/// The release in the answer to `--version`.
fn version_in(runtime: Runtime, said: &str) -> Option<&str> {
    let words = said.lines().next()?.strip_prefix(runtime.name())?;
    words.strip_prefix(" version ").map(str::trim)
}

/// What the shim does instead of the program at `path`, which has `said` this to `--version`; none for nothing.
pub fn done_instead(path: &Path, said: &str) -> Option<&'static str> {
    let Program { runtime, .. } = Program::find(path)?;
    Some(match tested(runtime, version_in(runtime, said)?)?.readies {
        Readies::None => "the shim starts and deletes containers itself",
        Readies::Create => "the shim starts and deletes itself, and readies creates",
        Readies::CreateAndExec => {
            "the shim starts and deletes itself, and readies creates and execs"
        }
    })
}

/// A program that passes for runc or crun, as the file was at some time: the file has that name, and is no script. Another
/// program, or a script around one of them, may do more in its start and its delete.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Program {
    runtime: Runtime,
    path: PathBuf,
    file: FileId,
}

/// A file as it was at some time, by whichever path it is found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct FileId {
    device: u64,
    inode: u64,
    size: u64,
    /// The last change of the file, of its content or its owner (`st_ctime`).
    changed: (i64, i64),
}

impl Program {
    /// The file that is run as `binary` now.
    pub(super) fn find(binary: &Path) -> Option<Self> {
        let named = |runtime: &Runtime| binary.file_name() == Some(OsStr::new(runtime.name()));
        let runtime = Runtime::ALL.into_iter().find(named)?;
        if binary != Path::new(runtime.name()) {
            return Self::at(runtime, binary.to_owned());
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        // The first file in PATH is the one that is run.
        let found = std::env::split_paths(&path)
            .map(|dir| dir.join(binary))
            .find(|path| path.is_file())?;
        Self::at(runtime, found)
    }

    fn at(runtime: Runtime, path: PathBuf) -> Option<Self> {
        let mut magic = [0; 4];
        let mut file = File::open(&path).ok()?;
        file.read_exact(&mut magic).ok()?;
        let file = file.metadata().ok()?;
        (magic == *b"\x7fELF").then(|| Self {
            runtime,
            path,
            file: FileId {
                device: file.dev(),
                inode: file.ino(),
                size: file.size(),
                changed: (file.ctime(), file.ctime_nsec()),
            },
        })
    }

    /// What is known of this program's release; nothing when nobody has asked the program yet.
    pub(super) fn tested(&self, root: &Path) -> Option<&'static Tested> {
        tested(self.runtime, &self.recall(root)?)
    }

    fn recall(&self, root: &Path) -> Option<String> {
        let text = std::fs::read(self.answer(root)).ok()?;
        let answer: Answer = serde_json::from_slice(&text).ok()?;
        (answer.file == self.file).then_some(answer.version)
    }

    /// The file of the answer. No containerd namespace has a name that begins with a dot.
    fn answer(&self, root: &Path) -> PathBuf {
        root.join(format!(".release-{}-{}", self.file.device, self.file.inode))
    }

    /// Asks the program for its release, and keeps the answer in `root`, unless that is known.
    pub(super) async fn learn(self, root: PathBuf, exits: Arc<Exits>) {
        if self.recall(&root).is_some() {
            return;
        }
        let Some(version) = self.ask(&exits).await else {
            return debug!(program:% = self.path.display(); "program tells no version");
        };
        info!(
            program:% = self.path.display(), release = version;
            "{}: {}",
            self.runtime.name(),
            match tested(self.runtime, &version) {
                Some(_) => "containers are started and deleted without it",
                None => "unknown to this shim, so it starts and deletes the containers itself",
            }
        );
        let kept = blocking::run_anyway(move || self.keep(&root, version)).await;
        kept.unwrap_or_else(|error| debug!(error:%; "release not kept"));
    }

    async fn ask(&self, exits: &Arc<Exits>) -> Option<String> {
        let answer = Captured::new()?;
        let mut command = Command::new(&self.path);
        command
            .arg("--version")
            .stdin(Stdio::null())
            .stdout(answer.stdio()?)
            .stderr(Stdio::null());
        pause::die_with_parent(&mut command);
        let Claim { child, exit } = exits.spawn(&mut command).ok()?;
        let _running = Running::Alone(child);
        let exit = tokio::time::timeout(PATIENCE, exit).await.ok()?.ok()?;
        let text = answer.text();
        let version = version_in(self.runtime, &text)?;
        (exit.status == 0).then(|| version.to_owned())
    }

    fn keep(self, root: &Path, version: String) -> Result<()> {
        // The answer may be that of a program that has been replaced since.
        if Self::at(self.runtime, self.path.clone()).as_ref() != Some(&self) {
            return Ok(());
        }
        let path = self.answer(root);
        let answer = Answer {
            file: self.file,
            version,
        };
        let text = serde_json::to_vec(&answer).map_err(|e| IoError::at("encode", &path)(e))?;
        let made = DirBuilder::new().recursive(true).mode(0o700).create(root);
        made.map_err(IoError::at("create", root))?;
        replace_file(&path, &text)
    }
}

/// What a program has answered.
#[derive(Serialize, Deserialize)]
struct Answer {
    file: FileId,
    version: String,
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::disallowed_methods)]
    use std::fs;

    use super::*;

    #[test]
    fn only_a_tested_release_is_known() {
        for known in [
            "1.1.5",
            "1.1.5+ds1",
            "1.1.12-0ubuntu3~22.04.1",
            "1.3.6+ds1-1",
            "1.5.1",
        ] {
            assert!(tested(Runtime::Runc, known).is_some(), "{known}");
        }
        for (version, known) in [("1.28", true), ("1.28.1", false), ("1.9", false)] {
            let found = tested(Runtime::Crun, version);
            assert_eq!(found.is_some(), known, "{version}");
        }
        for unknown in [
            "",
            "1",
            "1.3",
            "1.3.x",
            "1.3.6.1",
            "1.9.0",
            "2.3.6",
            "1.3.99",
            "1.3.6-rc.1",
            "1.3.6-dev",
            "1.3.6+dev",
            "1.3.6-1-gabcdef0",
            "1.3.6~rc1",
            "v1.3.6",
            "1.3.6 ",
            "unknown",
        ] {
            assert!(tested(Runtime::Runc, unknown).is_none(), "{unknown}");
        }
    }

    #[test]
    fn a_row_is_of_one_series() {
        for Tested { first, last, .. } in &TESTED {
            assert!(first <= last && first[..2] == last[..2], "{first:?}");
        }
    }

    #[test]
    fn a_script_is_not_runc_and_another_name_is_another_program() {
        let dir = tempfile::tempdir().unwrap();
        let [runc, crun, other] = ["runc", "crun", "youki"].map(|name| dir.path().join(name));
        assert_eq!(Program::find(&runc), None);
        for path in [&runc, &crun, &other] {
            fs::copy("/proc/self/exe", path).unwrap();
        }
        let runtime = |path| Program::find(path).map(|program| program.runtime);
        assert_eq!(runtime(&runc), Some(Runtime::Runc));
        assert_eq!(runtime(&crun), Some(Runtime::Crun));
        assert_eq!(runtime(&other), None);
        fs::write(&runc, "#!/bin/sh\nexec runc.real \"$@\"\n").unwrap();
        assert_eq!(Program::find(&runc), None);
    }

    #[test]
    fn an_answer_is_that_of_one_file() {
        let dir = tempfile::tempdir().unwrap();
        let (runc, root) = (dir.path().join("runc"), dir.path().join("root"));
        fs::copy("/bin/true", &runc).unwrap();
        let program = Program::find(&runc).unwrap();
        assert_eq!(program.tested(&root), None);
        program.clone().keep(&root, "1.3.6".into()).unwrap();
        assert!(program.tested(&root).is_some());
        // The same file by another path: neither takes the other's answer away.
        let link = dir.path().join("bin");
        std::os::unix::fs::symlink(dir.path(), &link).unwrap();
        let linked = Program::find(&link.join("runc")).unwrap();
        assert!(linked != program && linked.tested(&root).is_some());
        // A copy in another place, and an upgrade in this place.
        let new = dir.path().join("new");
        fs::copy("/bin/true", &new).unwrap();
        fs::rename(&new, &runc).unwrap();
        let replaced = Program::find(&runc).unwrap();
        assert_ne!(replaced, program);
        assert_eq!(replaced.tested(&root), None);
        // An answer that comes too late is not kept.
        program.keep(&root, "1.1.5".into()).unwrap();
        assert_eq!(replaced.tested(&root), None);
        // A known file says nothing of an unknown release.
        replaced.clone().keep(&root, "1.9.0".into()).unwrap();
        assert_eq!(replaced.recall(&root).as_deref(), Some("1.9.0"));
        assert_eq!(replaced.tested(&root), None);
    }

    #[tokio::test]
    async fn a_program_that_is_not_runc_tells_no_release() {
        let dir = tempfile::tempdir().unwrap();
        let runc = dir.path().join("runc");
        fs::copy("/bin/true", &runc).unwrap();
        let exits = Exits::watch().unwrap();
        let program = Program::find(&runc).unwrap();
        assert_eq!(program.ask(&exits).await, None);
        program.learn(dir.path().to_owned(), exits).await;
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
