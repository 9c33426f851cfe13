//! Which containerd is asked, its release and its effective configuration.
//!
//! ```text
//!  a socket ──connect──▶ who listens (SO_PEERCRED) ──▶ /proc/PID/exe      the program: --version, config dump
//!                                                 ├──▶ /proc/PID/cmdline  its configuration file
//!                                                 └──▶ /proc/PID/environ  the PATH in which it finds shims
//!  nobody known ──▶ `containerd` in PATH, /etc/containerd/config.toml
//! ```
//!
//! The program of the process, and not the one in PATH: a node may have two (k3s brings its own), and a package that was
//! upgraded leaves the earlier one running until somebody restarts the service.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Pid;
use tokio::net::UnixStream;

use super::config::Config;
use crate::error::{Error, IoError, Result};

/// The socket that containerd listens at unless its configuration names another.
pub const SOCKET: &str = "/run/containerd/containerd.sock";
/// The file that containerd reads unless its command line names another.
pub const CONFIG: &str = "/etc/containerd/config.toml";

/// The longest wait for somebody who listens to take the connection.
const PATIENCE: Duration = Duration::from_secs(5);

/// A containerd.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Containerd {
    /// The process; none when no process is known.
    pub pid: Option<Pid>,
    /// The program that is run for answers.
    pub program: PathBuf,
    /// The configuration file.
    pub config: PathBuf,
    /// Where this containerd looks for a shim: its `PATH`, without what its configuration adds.
    pub search_path: OsString,
}

impl Containerd {
    /// The containerd that listens at `socket`. `config` is the configuration file, if a person names one; otherwise the
    /// one on the process's command line.
    ///
    /// # Errors
    /// `NotFound` when nobody listens there; `Io` for what the kernel refuses.
    pub fn at(socket: &Path, config: Option<&Path>) -> Result<Self> {
        let Some(pid) = listener(socket)? else {
            // The process is in no pid namespace that is seen from here.
            return Ok(Self::installed(config));
        };
        let command_line = of_process(pid, "cmdline")?;
        let environment = of_process(pid, "environ")?;
        let named = config.map(Path::to_owned);
        let here = || std::fs::read_link(format!("/proc/{pid}/cwd")).unwrap_or_default();
        Ok(Self {
            pid: Some(pid),
            program: format!("/proc/{pid}/exe").into(),
            config: named
                .or_else(|| config_of(&command_line).map(|file| here().join(file)))
                .unwrap_or_else(|| CONFIG.into()),
            search_path: variable(&environment, "PATH").unwrap_or_default(),
        })
    }

    /// The containerd in this program's own `PATH`, whether one runs or not.
    pub fn installed(config: Option<&Path>) -> Self {
        Self {
            pid: None,
            program: "containerd".into(),
            config: config.unwrap_or(Path::new(CONFIG)).to_owned(),
            search_path: std::env::var_os("PATH").unwrap_or_default(),
        }
    }

    /// Whether the process sees other files than this program does, as a containerd in a container does (kind): paths in
    /// its configuration are then not this program's.
    pub fn is_in_another_place(&self) -> bool {
        let mounts = |process: &str| std::fs::metadata(format!("/proc/{process}/ns/mnt")).ok();
        let theirs = self.pid.and_then(|pid| mounts(&pid.to_string()));
        match (theirs, mounts("self")) {
            (Some(theirs), Some(ours)) => (theirs.dev(), theirs.ino()) != (ours.dev(), ours.ino()),
            _ => false,
        }
    }

    /// The release, in the program's own words.
    ///
    /// # Errors
    /// `Io` when the program cannot be run, `FailedPrecondition` when it fails or says something else.
    pub fn version(&self) -> Result<Version> {
        let said = self.ask(&[OsStr::new("--version")])?;
        let said = String::from_utf8_lossy(&said);
        said.split_whitespace()
            .skip(1)
            .find_map(Version::parse)
            .ok_or_else(|| {
                Error::FailedPrecondition(format!(
                    "{} --version says no release: {:?}",
                    self.program.display(),
                    said.trim()
                ))
            })
    }

    /// The effective configuration: what containerd makes of its file, of the files that the file imports, and of its
    /// defaults. A running containerd may have read an earlier file.
    ///
    /// # Errors
    /// `Io` when the program cannot be run, `FailedPrecondition` with containerd's words when it refuses the file,
    /// `InvalidArgument` when the answer is no TOML.
    pub fn config(&self) -> Result<Config> {
        Config::parse(&self.dump()?)
    }

    /// The effective configuration as containerd prints it.
    ///
    /// # Errors
    /// As [`Self::config`].
    pub fn dump(&self) -> Result<String> {
        let dumped = if self.config.exists() {
            let [flag, config, dump] = ["--config", "config", "dump"].map(OsStr::new);
            self.ask(&[flag, self.config.as_os_str(), config, dump])?
        } else {
            // A containerd without the file takes its defaults. 1.x dumps nothing then.
            self.ask(&["config", "default"].map(OsStr::new))?
        };
        Ok(String::from_utf8_lossy(&dumped).into_owned())
    }

    /// Runs the program. Returns its standard output.
    fn ask(&self, arguments: &[&OsStr]) -> Result<Vec<u8>> {
        let answer = Command::new(&self.program)
            // A program of many names looks at this (k3s).
            .arg0("containerd")
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .map_err(IoError::at("run", &self.program))?;
        if !answer.status.success() {
            let words = String::from_utf8_lossy(&answer.stderr);
            return Err(Error::FailedPrecondition(format!(
                "`containerd {}` failed: {}",
                arguments.join(OsStr::new(" ")).to_string_lossy(),
                words.trim().lines().last().unwrap_or("no word of why")
            )));
        }
        Ok(answer.stdout)
    }
}

/// The process that listens at a socket; none when it has no pid here.
fn listener(socket: &Path) -> Result<Option<Pid>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(IoError::at("start the runtime of", "/proc/self"))?;
    let connected = runtime.block_on(async {
        let caller = tokio::time::timeout(PATIENCE, UnixStream::connect(socket)).await??;
        caller.peer_cred()
    });
    match connected {
        // 0 for a process of a pid namespace that is not below this one.
        Ok(peer) => Ok(peer.pid().and_then(Pid::from_raw)),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            Err(IoError::at("connect to", socket)(error).into())
        }
        Err(error) => Err(Error::NotFound(format!(
            "nobody listens at {}: {error}",
            socket.display()
        ))),
    }
}

fn of_process(pid: Pid, file: &str) -> Result<Vec<u8>> {
    let path = format!("/proc/{pid}/{file}");
    Ok(std::fs::read(&path).map_err(IoError::at("read", &path))?)
}

/// The strings of `/proc/PID/cmdline` or `/proc/PID/environ`, which end with a NUL.
fn strings(content: &[u8]) -> impl Iterator<Item = &[u8]> {
    content.split(|byte| *byte == 0)
}

/// The file that a command line of containerd names: `-c FILE`, `--config FILE`, `--config=FILE`.
fn config_of(command_line: &[u8]) -> Option<PathBuf> {
    let mut arguments = strings(command_line).skip(1);
    while let Some(argument) = arguments.next() {
        let name = argument.strip_prefix(b"-").unwrap_or_default();
        let name = name.strip_prefix(b"-").unwrap_or(name);
        let file = match name {
            b"c" | b"config" => arguments.next(),
            name => ["c=", "config="]
                .iter()
                .find_map(|flag| name.strip_prefix(flag.as_bytes())),
        };
        if let Some(file) = file.filter(|file| !file.is_empty()) {
            return Some(OsStr::from_bytes(file).into());
        }
    }
    None
}

fn variable(environment: &[u8], name: &str) -> Option<OsString> {
    let value = strings(environment)
        .find_map(|entry| entry.strip_prefix(name.as_bytes())?.strip_prefix(b"="))?;
    Some(OsString::from_vec(value.to_owned()))
}

/// A release of containerd, in the order of releases. What comes after the number (`-rc.1`, `~ds1`, `+unknown`) is not
/// compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 2 of 2.1.9.
    pub major: u32,
    /// 1 of 2.1.9.
    pub minor: u32,
    /// 9 of 2.1.9.
    pub patch: u32,
}

impl Version {
    /// The first release of a series: 2.1.0 for 2 and 1.
    pub const fn of(major: u32, minor: u32) -> Self {
        Self {
            major,
            minor,
            patch: 0,
        }
    }

    /// Reads `1.6.20~ds1`, `v1.7.24`, `2.1.9+unknown`, `2.4.0-beta.0-70-g301026e58`; none for another word.
    pub fn parse(word: &str) -> Option<Self> {
        let word = word.strip_prefix('v').unwrap_or(word);
        let end = word.find(|c: char| !c.is_ascii_digit() && c != '.');
        let (number, _) = word.split_at(end.unwrap_or(word.len()));
        let mut parts = number.split('.').map(str::parse);
        let mut next = || parts.next()?.ok();
        let (major, minor, patch) = (next()?, next()?, next()?);
        parts.next().is_none().then_some(Self {
            major,
            minor,
            patch,
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_version_is_read_in_all_spellings() {
        for (word, expected) in [
            ("1.6.20~ds1", Some((1, 6, 20))),
            ("v1.7.11-k3s2", Some((1, 7, 11))),
            ("2.1.9+unknown", Some((2, 1, 9))),
            ("2.4.0-beta.0-70-g301026e58", Some((2, 4, 0))),
            ("github.com/containerd/containerd/v2", None),
            ("2.1", None),
            ("2.1.9.4", None),
            ("2..9", None),
            ("", None),
            ("99999999999.0.0", None),
        ] {
            let read = Version::parse(word).map(|v| (v.major, v.minor, v.patch));
            assert_eq!(read, expected, "{word}");
        }
        assert!(Version::of(2, 0) > Version::parse("1.7.99").unwrap());
        assert_eq!(Version::parse("v2.1.9-1").unwrap().to_string(), "2.1.9");
    }

    #[test]
    fn the_command_line_names_the_file() {
        for (line, expected) in [
            ("containerd", None),
            ("containerd --config /x.toml", Some("/x.toml")),
            ("containerd -c /x.toml -l debug", Some("/x.toml")),
            ("containerd -l debug --config=/x.toml", Some("/x.toml")),
            ("containerd -config /x.toml", Some("/x.toml")),
            ("containerd --config", None),
            ("containerd --config=", None),
            ("-c /no.toml", None),
        ] {
            let mut bytes = line.replace(' ', "\0").into_bytes();
            bytes.push(0);
            assert_eq!(config_of(&bytes), expected.map(PathBuf::from), "{line}");
        }
        assert_eq!(config_of(b""), None);
    }

    #[test]
    fn a_variable_is_found_by_its_whole_name() {
        let environment = b"XPATH=/x\0PATHS=/y\0PATH=/a:/b\0";
        assert_eq!(variable(environment, "PATH").unwrap(), "/a:/b");
        assert_eq!(variable(b"", "PATH"), None);
    }

    #[test]
    fn whoever_listens_is_found_and_nobody_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let nobody = Containerd::at(&socket, None).unwrap_err();
        assert!(matches!(nobody, Error::NotFound(_)), "{nobody}");
        let listener = UnixListener::bind(&socket).unwrap();
        let found = Containerd::at(&socket, Some(Path::new("/x.toml"))).unwrap();
        assert_eq!(found.pid, Some(rustix::process::getpid()));
        assert_eq!(found.config, Path::new("/x.toml"));
        assert!(!found.is_in_another_place());
        drop(listener);
        let nobody = Containerd::at(&socket, None).unwrap_err();
        assert!(matches!(nobody, Error::NotFound(_)), "{nobody}");
    }

    #[test]
    fn what_a_program_says_is_its_answer() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().unwrap();
        let program = dir.path().join("containerd");
        let said = |script: &str| {
            std::fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
            let executable = std::fs::Permissions::from_mode(0o755);
            std::fs::set_permissions(&program, executable).unwrap();
            Containerd {
                program: program.clone(),
                ..Containerd::installed(None)
            }
        };
        let good = said("[ $1 = --version ] && echo containerd containerd.io 1.7.24 abc || cat $2");
        assert_eq!(good.version().unwrap().to_string(), "1.7.24");
        let refuses = said("echo time=x >&2; echo 'containerd: no such file' >&2; exit 1");
        for error in [
            refuses.version().unwrap_err(),
            refuses.config().unwrap_err(),
        ] {
            assert!(error.to_string().contains("no such file"), "{error}");
        }
        let odd = said("echo hello").version().unwrap_err();
        assert!(odd.to_string().contains("hello"), "{odd}");
        let gone = Containerd {
            program: dir.path().join("gone"),
            ..good
        };
        assert!(matches!(gone.version().unwrap_err(), Error::Io(_)));
    }
}
