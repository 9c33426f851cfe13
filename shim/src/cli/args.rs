//! The command line, in the dialect of Go's flag package: `-id x`, `--id=x`.

use std::ffi::OsString;
use std::path::PathBuf;

use go_flag::{FlagError, FlagSet};

use crate::error::{Error, IoError, Result};

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// `-v`
    Version,
    /// `-info`
    Info,
    /// `start`
    Start,
    /// `delete`
    Delete,
    /// No subcommand.
    Serve,
}

/// The command line.
#[derive(Debug)]
pub struct Args {
    /// What is asked for.
    pub action: Action,
    /// containerd's namespace.
    pub namespace: String,
    /// The container's id.
    pub id: String,
    /// The path of containerd's gRPC socket.
    pub address: String,
    /// The server's own socket; from `start` only.
    pub socket: PathBuf,
    /// Log more.
    pub debug: bool,
    bundle: PathBuf,
}

impl Args {
    /// Reads the arguments after the program's name.
    ///
    /// # Errors
    /// `InvalidArgument` for a flag or subcommand that there is not, and for a flag that is needed and missing.
    pub fn parse(arguments: impl Iterator<Item = OsString>) -> Result<Self> {
        let arguments: Vec<OsString> = arguments.collect();
        let mut args = Self {
            action: Action::Serve,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            socket: PathBuf::new(),
            debug: false,
            bundle: PathBuf::new(),
        };
        let (mut version, mut long_version, mut info) = (false, false, false);
        let mut publish_binary = String::new();
        let rest: Vec<String> = {
            let mut flags = FlagSet::new();
            flags.add_flag("v", &mut version);
            flags.add_flag("version", &mut long_version);
            flags.add_flag("info", &mut info);
            flags.add_flag("debug", &mut args.debug);
            flags.add_flag("namespace", &mut args.namespace);
            flags.add_flag("id", &mut args.id);
            flags.add_flag("address", &mut args.address);
            flags.add_flag("bundle", &mut args.bundle);
            flags.add_flag("socket", &mut args.socket);
            // Events go over ttrpc; the binary that could publish them is not needed.
            flags.add_flag("publish-binary", &mut publish_binary);
            flags
                .parse(&arguments)
                .map_err(|error: FlagError| Error::InvalidArgument(error.to_string()))?
        };
        args.action = match rest.first().map(String::as_str) {
            _ if version || long_version => Action::Version,
            _ if info => Action::Info,
            None => Action::Serve,
            Some("start") => Action::Start,
            Some("delete") => Action::Delete,
            Some(other) => {
                return Err(Error::InvalidArgument(format!(
                    "unknown subcommand {other:?}: start and delete are known"
                )));
            }
        };
        args.check_complete()?;
        Ok(args)
    }

    fn check_complete(&self) -> Result<()> {
        let needed: &[(&str, bool)] = match self.action {
            Action::Version | Action::Info => &[],
            Action::Start => &[
                ("namespace", self.namespace.is_empty()),
                ("id", self.id.is_empty()),
                ("address", self.address.is_empty()),
            ],
            Action::Delete => &[("id", self.id.is_empty())],
            Action::Serve => &[
                ("namespace", self.namespace.is_empty()),
                ("socket", self.socket.as_os_str().is_empty()),
            ],
        };
        match needed.iter().find(|(_, missing)| *missing) {
            None => Ok(()),
            Some((flag, _)) => Err(Error::InvalidArgument(format!(
                "-{flag} is missing: this program is run by containerd (runtime type io.containerd.pause.v2)"
            ))),
        }
    }

    /// The bundle: containerd makes it the working directory, and for `delete` names it, too.
    ///
    /// # Errors
    /// `Io` when there is no working directory.
    pub fn bundle(&self) -> Result<PathBuf> {
        if self.bundle.as_os_str().is_empty() {
            let here = std::env::current_dir();
            Ok(here.map_err(IoError::at("read", "the working directory"))?)
        } else {
            Ok(self.bundle.clone())
        }
    }

    /// The path of containerd's ttrpc socket, for events.
    pub fn events_address(&self) -> String {
        std::env::var("TTRPC_ADDRESS")
            .ok()
            .filter(|address| !address.is_empty())
            .unwrap_or_else(|| format!("{}.ttrpc", self.address))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse(line: &str) -> Result<Args> {
        Args::parse(line.split_whitespace().map(OsString::from))
    }

    #[test]
    fn flags_are_those_of_go() {
        let args = parse(
            "-namespace k8s.io --id=a -address /run/c.sock -publish-binary /bin/c -debug start",
        )
        .unwrap();
        assert_eq!(args.action, Action::Start);
        assert_eq!((args.namespace.as_str(), args.id.as_str()), ("k8s.io", "a"));
        assert!(args.debug);
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("--version").unwrap().action, Action::Version);
        assert_eq!(parse("-info").unwrap().action, Action::Info);
    }

    #[test]
    fn what_is_not_known_or_missing_is_named() {
        for (line, name) in [
            ("-id a -frobnicate start", "frobnicate"),
            ("-id a -namespace n -address x restart", "restart"),
            ("-namespace n -address x start", "-id"),
            ("", "-namespace"),
        ] {
            let error = parse(line).unwrap_err().to_string();
            assert!(error.contains(name), "{line}: {error}");
        }
    }
}
