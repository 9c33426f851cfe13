//! The command line, in the dialect of Go's `flag` package, which containerd writes.
//!
//! ```text
//!  -id x   -id=x   --id x   --id=x     a flag with a value
//!  -debug  -debug=true                 a switch; its value never stands apart
//!  --                                  ends the flags, as the first positional argument does
//! ```

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::error::{Error, IoError, Result};
use crate::node::containerd::SOCKET;
use crate::node::{Asked, Form, KUBELET};

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// `-v`
    Version,
    /// `-info`
    Info,
    /// `start`
    Start {
        /// containerd's namespace.
        namespace: String,
        /// The container's id.
        id: String,
        /// The path of containerd's gRPC socket.
        address: String,
        /// The directory that containerd makes for the container.
        bundle: PathBuf,
        /// The server logs debug messages, too.
        debug: bool,
    },
    /// `delete`
    Delete {
        /// The container's id.
        id: String,
        /// The directory that containerd makes for the container.
        bundle: PathBuf,
    },
    /// `check`
    Check(Asked),
    /// `pods`
    Pods(Asked),
    /// `install`: the binary and the handler onto this node.
    Install,
    /// `uninstall`: both off again.
    Uninstall,
    /// `repair`: undoes what a killed `install` or `uninstall` has left.
    Repair,
    /// `repair-files`: the same before containerd starts.
    RepairFiles,
    /// `stay`: nothing, until a signal ends the program. A pod of a DaemonSet must have something that runs.
    Stay,
    /// No subcommand: `start` runs the server so.
    Serve {
        /// containerd's namespace.
        namespace: String,
        /// The pod's id, for the log.
        id: String,
        /// The path of containerd's gRPC socket.
        address: String,
        /// The path of the server's own socket.
        socket: PathBuf,
        /// Log debug messages, too.
        debug: bool,
    },
}

impl Action {
    /// Reads the arguments after the program's name.
    ///
    /// # Errors
    /// `InvalidArgument` for an unknown flag or subcommand, for a value that does not fit its flag, and for a missing
    /// flag; `Io` without a working directory.
    pub fn parse(mut arguments: impl Iterator<Item = OsString>) -> Result<Self> {
        let mut flags = Flags::default();
        let subcommand = flags.read(&mut arguments)?;
        if flags.version {
            return Ok(Self::Version);
        }
        if flags.info {
            return Ok(Self::Info);
        }
        match subcommand.as_deref().map(OsStr::as_bytes) {
            None => Ok(Self::Serve {
                namespace: needed("namespace", flags.namespace)?,
                id: flags.id,
                address: flags.address,
                socket: needed("socket", flags.socket.into_os_string())?.into(),
                debug: flags.debug,
            }),
            Some(b"start") => Ok(Self::Start {
                namespace: needed("namespace", flags.namespace)?,
                id: needed("id", flags.id)?,
                address: needed("address", flags.address)?,
                bundle: bundle(flags.bundle)?,
                debug: flags.debug,
            }),
            Some(b"delete") => Ok(Self::Delete {
                id: needed("id", flags.id)?,
                bundle: bundle(flags.bundle)?,
            }),
            Some(b"check") => Ok(Self::Check(flags.asked(&mut arguments)?)),
            Some(b"pods") => Ok(Self::Pods(flags.asked(&mut arguments)?)),
            Some(b"install") => flags.alone(Self::Install, arguments),
            Some(b"uninstall") => flags.alone(Self::Uninstall, arguments),
            Some(b"repair") => flags.alone(Self::Repair, arguments),
            Some(b"repair-files") => flags.alone(Self::RepairFiles, arguments),
            Some(b"stay") => flags.alone(Self::Stay, arguments),
            Some(other) => Err(Error::InvalidArgument(format!(
                "unknown subcommand {:?}: containerd runs start and delete, a person check, pods, install, uninstall and repair",
                String::from_utf8_lossy(other)
            ))),
        }
    }
}

fn needed<T: AsRef<OsStr>>(flag: &str, value: T) -> Result<T> {
    if value.as_ref().is_empty() {
        return Err(Error::InvalidArgument(format!(
            "-{flag} is missing: this program is run by containerd (runtime type io.containerd.pause.v2); a person runs \
             `check` or `pods`"
        )));
    }
    Ok(value)
}

/// containerd makes the bundle the working directory, and also names the bundle for `delete`.
fn bundle(named: PathBuf) -> Result<PathBuf> {
    if named.as_os_str().is_empty() {
        let here = std::env::current_dir();
        return Ok(here.map_err(IoError::at("read", "the working directory"))?);
    }
    Ok(named)
}

/// All flags, as far as given.
#[derive(Debug, Default, PartialEq, Eq)]
struct Flags {
    version: bool,
    info: bool,
    debug: bool,
    namespace: String,
    id: String,
    address: String,
    bundle: PathBuf,
    socket: PathBuf,
    /// Read for containerd's sake: events go over ttrpc, not through this program.
    publish_binary: PathBuf,
    json: bool,
    config: PathBuf,
    kubelet_config: PathBuf,
}

/// Where the value of one flag goes.
enum Place<'a> {
    Switch(&'a mut bool),
    Text(&'a mut String),
    Path(&'a mut PathBuf),
}

impl Flags {
    /// Reads the flags, and the first argument after the flags.
    fn read(&mut self, arguments: &mut impl Iterator<Item = OsString>) -> Result<Option<OsString>> {
        while let Some(argument) = arguments.next() {
            if argument == "--" {
                return Ok(arguments.next());
            }
            let Some((name, value)) = split(&argument) else {
                return Ok(Some(argument));
            };
            let place = self.place(&name)?;
            let value = match (value, &place) {
                (None, Place::Text(_) | Place::Path(_)) => arguments.next(),
                (value, _) => value,
            };
            place
                .set(value)
                .map_err(|why| Error::InvalidArgument(format!("flag -{name} {why}")))?;
        }
        Ok(None)
    }

    /// What a person asks about. A person writes flags after the subcommand, too.
    fn asked(mut self, arguments: &mut impl Iterator<Item = OsString>) -> Result<Asked> {
        if let Some(more) = self.read(arguments)? {
            return Err(Error::InvalidArgument(format!(
                "{more:?} is too much: flags are all that check and pods take"
            )));
        }
        let or = |given: PathBuf, usual: &str| match given.as_os_str().is_empty() {
            true => usual.into(),
            false => given,
        };
        Ok(Asked {
            address: or(self.address.into(), SOCKET),
            config: Some(self.config).filter(|file| !file.as_os_str().is_empty()),
            kubelet: or(self.kubelet_config, KUBELET),
            form: if self.json { Form::Json } else { Form::Text },
        })
    }

    /// A subcommand that takes nothing more. Who asks for its help, or for a dry run, must not get the change.
    fn alone(
        &self,
        action: Action,
        mut arguments: impl Iterator<Item = OsString>,
    ) -> Result<Action> {
        let more = arguments.next();
        if more.is_none() && *self == Self::default() {
            return Ok(action);
        }
        let more = more.map_or(String::new(), |more| format!("{more:?} is too much: "));
        Err(Error::InvalidArgument(format!(
            "{more}install, uninstall, repair and stay take neither flags nor arguments"
        )))
    }

    fn place(&mut self, name: &str) -> Result<Place<'_>> {
        Ok(match name {
            "v" | "version" => Place::Switch(&mut self.version),
            "info" => Place::Switch(&mut self.info),
            "debug" => Place::Switch(&mut self.debug),
            "namespace" => Place::Text(&mut self.namespace),
            "id" => Place::Text(&mut self.id),
            "address" => Place::Text(&mut self.address),
            "bundle" => Place::Path(&mut self.bundle),
            "socket" => Place::Path(&mut self.socket),
            "publish-binary" => Place::Path(&mut self.publish_binary),
            "json" => Place::Switch(&mut self.json),
            "config" => Place::Path(&mut self.config),
            "kubelet-config" => Place::Path(&mut self.kubelet_config),
            _ => {
                return Err(Error::InvalidArgument(format!("unknown flag -{name}")));
            }
        })
    }
}

impl Place<'_> {
    fn set(self, value: Option<OsString>) -> Result<(), &'static str> {
        match (self, value) {
            (Self::Switch(switch), None) => *switch = true,
            (Self::Switch(switch), Some(value)) => {
                *switch = switched(&value).ok_or("is neither true nor false")?;
            }
            (Self::Text(text), Some(value)) => {
                *text = value.into_string().map_err(|_| "is no UTF-8 text")?;
            }
            (Self::Path(path), Some(value)) => *path = value.into(),
            (Self::Text(_) | Self::Path(_), None) => return Err("needs a value"),
        }
        Ok(())
    }
}

/// The name and the value in `-name=value` or `--name=value`; none for a positional argument, which `-` is, too.
fn split(argument: &OsStr) -> Option<(String, Option<OsString>)> {
    let flag = argument.as_bytes().strip_prefix(b"-")?;
    let flag = flag.strip_prefix(b"-").unwrap_or(flag);
    if flag.is_empty() {
        return None;
    }
    let mut parts = flag.splitn(2, |byte| *byte == b'=');
    let name = parts.next().unwrap_or_default();
    let value = parts
        .next()
        .map(|value| OsStr::from_bytes(value).to_owned());
    Some((String::from_utf8_lossy(name).into_owned(), value))
}

/// A truth value, in the words of Go's `strconv.ParseBool`.
fn switched(value: &OsStr) -> Option<bool> {
    match value.as_bytes() {
        b"1" | b"t" | b"T" | b"true" | b"TRUE" | b"True" => Some(true),
        b"0" | b"f" | b"F" | b"false" | b"FALSE" | b"False" => Some(false),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
