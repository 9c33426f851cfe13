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
    /// `install`: the binary and the handler onto this node.
    Install,
    /// `uninstall`: both off again.
    Uninstall,
    /// `repair`: undoes what a killed `install` or `uninstall` has left.
    Repair,
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
        let (flags, subcommand) = Flags::read(&mut arguments)?;
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
            Some(b"install") => Ok(Self::Install),
            Some(b"uninstall") => Ok(Self::Uninstall),
            Some(b"repair") => Ok(Self::Repair),
            Some(b"stay") => Ok(Self::Stay),
            Some(other) => Err(Error::InvalidArgument(format!(
                "unknown subcommand {:?}: containerd runs start and delete, a person install, uninstall and repair",
                String::from_utf8_lossy(other)
            ))),
        }
    }
}

fn needed<T: AsRef<OsStr>>(flag: &str, value: T) -> Result<T> {
    if value.as_ref().is_empty() {
        return Err(Error::InvalidArgument(format!(
            "-{flag} is missing: this program is run by containerd (runtime type io.containerd.pause.v2)"
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
#[derive(Debug, Default)]
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
}

/// Where the value of one flag goes.
enum Place<'a> {
    Switch(&'a mut bool),
    Text(&'a mut String),
    Path(&'a mut PathBuf),
}

impl Flags {
    /// Reads the flags, and the first argument after the flags.
    fn read(arguments: &mut impl Iterator<Item = OsString>) -> Result<(Self, Option<OsString>)> {
        let mut flags = Self::default();
        while let Some(argument) = arguments.next() {
            if argument == "--" {
                return Ok((flags, arguments.next()));
            }
            let Some((name, value)) = split(&argument) else {
                return Ok((flags, Some(argument)));
            };
            let place = flags.place(&name)?;
            let value = match (value, &place) {
                (None, Place::Text(_) | Place::Path(_)) => arguments.next(),
                (value, _) => value,
            };
            place
                .set(value)
                .map_err(|why| Error::InvalidArgument(format!("flag -{name} {why}")))?;
        }
        Ok((flags, None))
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
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    fn parse(line: &str) -> Result<Action> {
        Action::parse(line.split_whitespace().map(OsString::from))
    }

    fn refused(line: &[&[u8]]) -> String {
        let arguments = line.iter().map(|part| OsStr::from_bytes(part).to_owned());
        let error = Action::parse(arguments).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
        error.to_string()
    }

    fn a_delete() -> Action {
        Action::Delete {
            id: "a".into(),
            bundle: "/b".into(),
        }
    }

    #[test]
    fn flags_are_those_of_go() {
        let start = parse(
            "-namespace k8s.io --id=a -address /run/c.sock -publish-binary /bin/c -bundle /b -debug start",
        );
        let expected = Action::Start {
            namespace: "k8s.io".into(),
            id: "a".into(),
            address: "/run/c.sock".into(),
            bundle: "/b".into(),
            debug: true,
        };
        assert_eq!(start.unwrap(), expected);
        assert_eq!(parse("-v").unwrap(), Action::Version);
        assert_eq!(parse("--version").unwrap(), Action::Version);
        assert_eq!(parse("-info").unwrap(), Action::Info);
        assert_eq!(parse("install").unwrap(), Action::Install);
        assert_eq!(parse("uninstall").unwrap(), Action::Uninstall);
        assert_eq!(parse("repair").unwrap(), Action::Repair);
        assert_eq!(parse("stay").unwrap(), Action::Stay);
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

    #[test]
    fn a_value_stands_apart_or_behind_an_equals_sign() {
        for line in [
            "-id a -bundle /b delete",
            "-id=a -bundle=/b delete",
            "--id a --bundle /b delete",
            "--id=a --bundle=/b delete",
        ] {
            assert_eq!(parse(line).unwrap(), a_delete(), "{line}");
        }
        let serve = parse("-namespace n -id a=b= -socket /s -address -x").unwrap();
        let expected = Action::Serve {
            namespace: "n".into(),
            id: "a=b=".into(),
            address: "-x".into(),
            socket: "/s".into(),
            debug: false,
        };
        assert_eq!(serve, expected);
    }

    #[test]
    fn flags_end_at_the_first_positional_argument_and_at_two_dashes() {
        assert_eq!(
            parse("-id a -bundle /b delete -v -nonsense").unwrap(),
            a_delete()
        );
        assert_eq!(parse("-id a -bundle /b -- delete").unwrap(), a_delete());
        assert!(refused(&[b"-id", b"a", b"--", b"-v"]).contains("\"-v\""));
        assert!(refused(&[b"-"]).contains("\"-\""));
    }

    #[test]
    fn a_switch_takes_the_truth_values_of_go() {
        for (switch, expected) in [("-debug", true), ("-debug=1", true), ("--debug=F", false)] {
            let serve = parse(&format!("-namespace n -socket /s {switch}"));
            let Action::Serve { debug, .. } = serve.unwrap() else {
                panic!("{switch}: no server");
            };
            assert_eq!(debug, expected, "{switch}");
        }
        // A value that stands apart is a positional argument.
        assert!(refused(&[b"-debug", b"true"]).contains("subcommand \"true\""));
        assert!(refused(&[b"-debug=maybe"]).contains("-debug"));
        assert!(refused(&[b"-debug="]).contains("-debug"));
    }

    #[test]
    fn a_flag_that_cannot_be_read_is_named() {
        for (line, name) in [
            (&[b"-id".as_slice()] as &[&[u8]], "-id needs a value"),
            (&[b"-id", b"\xff", b"delete"], "-id is no UTF-8 text"),
            (&[b"-id=\xff", b"delete"], "-id is no UTF-8 text"),
            (&[b"-\xff"], "unknown flag -\u{fffd}"),
            (&[b"-=x"], "unknown flag -"),
            (&[b"---id=x"], "unknown flag --id"),
        ] {
            let error = refused(line);
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn a_path_need_not_be_text() {
        let arguments = [b"-id=a".as_slice(), b"-bundle", b"/\xff", b"delete"];
        let arguments = arguments.map(|part| OsStr::from_bytes(part).to_owned());
        let Action::Delete { bundle, .. } = Action::parse(arguments.into_iter()).unwrap() else {
            panic!("no delete");
        };
        assert_eq!(bundle.as_os_str().as_bytes(), b"/\xff");
    }
}
