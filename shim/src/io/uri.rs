//! What the name of a stream means: a path, `fifo://`, `file://`, `binary://` or `binary-v2://`.
//!
//! The schemes are those of containerd's package `cio`. The query has a logger's arguments, as keys and values in turn:
//! `binary:///usr/bin/logger?--level=info` runs `/usr/bin/logger --level info`. See RFC 3986 for escapes such as `%41`.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Where a stream leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Destination {
    /// Nowhere: an empty name.
    Null,
    /// To an existing file, usually a FIFO.
    Path(PathBuf),
    /// To the end of a file. The file and its directory are made where missing.
    File(PathBuf),
    /// To a program.
    Program(Program),
}

/// A program that takes output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Program {
    /// The absolute path.
    pub(crate) path: PathBuf,
    /// The arguments.
    pub(crate) arguments: Vec<OsString>,
    /// How the program says that it is ready.
    pub(crate) readiness: Readiness,
}

/// How a logger says that it is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Readiness {
    /// By closing file descriptor 5 (`binary://`).
    Close,
    /// By writing a byte to file descriptor 5 (`binary-v2://`). A logger that dies closes the descriptor, but writes no
    /// byte.
    Byte,
}

/// What `name` means.
///
/// # Errors
/// `InvalidArgument` for an unknown scheme, a path that is not absolute, and a wrong escape.
pub(crate) fn parse(name: &str) -> Result<Destination> {
    let Some((scheme, rest)) = name.split_once("://") else {
        return Ok(if name.is_empty() {
            Destination::Null
        } else {
            Destination::Path(name.into())
        });
    };
    let program = |readiness| {
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        Ok(Destination::Program(Program {
            path: absolute(name, path)?,
            arguments: arguments(name, query)?,
            readiness,
        }))
    };
    match scheme {
        "fifo" => Ok(Destination::Path(rest.into())),
        "file" => {
            let path = rest.split_once('?').map_or(rest, |(path, _)| path);
            Ok(Destination::File(absolute(name, path)?))
        }
        "binary" => program(Readiness::Close),
        "binary-v2" => program(Readiness::Byte),
        _ => Err(Error::InvalidArgument(format!(
            "stream {name}: no scheme {scheme:?}; there are fifo, file, binary and binary-v2"
        ))),
    }
}

/// The FIFO or file that an input's name means; none for an empty name.
///
/// # Errors
/// `InvalidArgument` for a destination that no input can come from.
pub(crate) fn input(name: &str) -> Result<Option<PathBuf>> {
    match parse(name)? {
        Destination::Null => Ok(None),
        Destination::Path(path) => Ok(Some(path)),
        Destination::File(_) | Destination::Program(_) => Err(Error::InvalidArgument(format!(
            "stdin {name}: input comes from a FIFO only"
        ))),
    }
}

fn absolute(name: &str, path: &str) -> Result<PathBuf> {
    let path = PathBuf::from(unescaped(name, path, Plus::IsPlus)?);
    if path.is_absolute() && path != Path::new("/") {
        Ok(path)
    } else {
        Err(Error::InvalidArgument(format!(
            "stream {name}: an absolute path must follow the scheme, as in file:///var/log/x"
        )))
    }
}

/// The arguments in a query: each key once, followed by its first value, as in containerd's own shim.
fn arguments(name: &str, query: &str) -> Result<Vec<OsString>> {
    let mut arguments: Vec<OsString> = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let key = unescaped(name, key, Plus::IsSpace)?;
        let value = unescaped(name, value, Plus::IsSpace)?;
        let known = arguments.iter().step_by(2).any(|known| *known == key);
        if !known {
            arguments.extend([key, value]);
        }
    }
    Ok(arguments)
}

/// What `+` means: a plus in a path, a space in a query.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Plus {
    IsPlus,
    IsSpace,
}

fn unescaped(name: &str, text: &str, plus: Plus) -> Result<OsString> {
    let wrong = || {
        Error::InvalidArgument(format!(
            "stream {name}: after % two hexadecimal digits must follow, and not 00"
        ))
    };
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, others @ ..] = rest {
        rest = others;
        match first {
            b'%' => {
                let [high, low, others @ ..] = rest else {
                    return Err(wrong());
                };
                rest = others;
                match (digit(*high), digit(*low)) {
                    (Some(high), Some(low)) => bytes.push(16 * high + low),
                    _ => return Err(wrong()),
                }
            }
            b'+' if plus == Plus::IsSpace => bytes.push(b' '),
            byte => bytes.push(*byte),
        }
    }
    if bytes.contains(&0) {
        return Err(wrong());
    }
    Ok(OsString::from_vec(bytes))
}

fn digit(byte: u8) -> Option<u8> {
    char::from(byte)
        .to_digit(16)
        .and_then(|digit| u8::try_from(digit).ok())
}

impl Program {
    /// The path, for messages.
    pub(crate) fn name(&self) -> &OsStr {
        self.path.as_os_str()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::panic)]
    use super::*;

    fn program(name: &str) -> Program {
        let Destination::Program(program) = parse(name).unwrap() else {
            panic!("{name} is no program");
        };
        program
    }

    #[test]
    fn a_stream_is_a_path_or_has_a_scheme_that_there_is() {
        assert_eq!(parse("").unwrap(), Destination::Null);
        assert_eq!(parse("/run/f").unwrap(), Destination::Path("/run/f".into()));
        assert_eq!(
            parse("fifo:///run/f").unwrap(),
            Destination::Path("/run/f".into())
        );
        assert_eq!(
            parse("file:///var/log/x%20y+z").unwrap(),
            Destination::File("/var/log/x y+z".into())
        );
        assert_eq!(program("binary:///bin/l").readiness, Readiness::Close);
        assert_eq!(program("binary-v2:///bin/l").readiness, Readiness::Byte);
    }

    #[test]
    fn a_loggers_arguments_are_the_keys_and_values_of_the_query() {
        let logger = program("binary:///bin/sh?-c=cat+%3C%263&--flag&x=1&x=2");
        assert_eq!(logger.path, Path::new("/bin/sh"));
        assert_eq!(
            logger.arguments,
            ["-c", "cat <&3", "--flag", "", "x", "1"].map(OsString::from)
        );
    }

    #[test]
    fn what_makes_no_sense_is_refused_with_its_name() {
        for name in [
            "npipe:////./pipe/x",
            "file://relative/x",
            "file://",
            "binary:///",
            "binary:///bin/l%2",
            "binary:///bin/l?%zz=1",
            "file:///x%00y",
        ] {
            let error = parse(name).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
            assert!(error.to_string().contains(name), "{error}");
        }
        assert!(input("binary:///bin/l").is_err());
        assert_eq!(input("/run/f").unwrap(), Some("/run/f".into()));
    }
}
