//! The one error type of the shim, and the one table from errors to ttrpc codes.
//!
//! containerd branches on the codes, not on the texts. A kill of a process that is gone must be `NOT_FOUND`, an id that
//! is taken `ALREADY_EXISTS`, and a call that does not fit the state `FAILED_PRECONDITION`.

use std::path::{Path, PathBuf};

use containerd_shim_protos::ttrpc;
use containerd_shim_protos::ttrpc::Code;

/// An operation on the kernel or the file system that failed.
#[derive(Debug, thiserror::Error)]
#[error("{operation} {}: {source}", path.display())]
pub struct IoError {
    /// The operation, as a verb and its object: `open FIFO`.
    pub operation: &'static str,
    /// The path that the operation was for.
    pub path: PathBuf,
    /// The kernel's error.
    pub source: std::io::Error,
}

impl IoError {
    /// For `map_err`: names the operation and the path of a failed call.
    pub fn at<E: Into<std::io::Error>>(
        operation: &'static str,
        path: impl AsRef<Path>,
    ) -> impl FnOnce(E) -> Self {
        move |source| Self {
            operation,
            path: path.as_ref().to_owned(),
            source: source.into(),
        }
    }
}

/// Why a call was refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such container, exec or process (any more).
    #[error("{0}")]
    NotFound(String),
    /// The id is taken.
    #[error("{0}")]
    AlreadyExists(String),
    /// The call does not fit the state that the process is in.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The request, the bundle or an option cannot be understood.
    #[error("{0}")]
    InvalidArgument(String),
    /// An operation on the kernel or the file system failed.
    #[error(transparent)]
    Io(#[from] IoError),
    /// runc could not be run, or failed.
    #[error("OCI runtime {command} failed: {message} (container {id})")]
    Runc {
        /// runc's subcommand.
        command: &'static str,
        /// The container.
        id: String,
        /// What runc wrote into its log, or how runc ended.
        message: String,
    },
    /// The sandbox could not be made or changed.
    #[error("sandbox: {0}")]
    Sandbox(#[from] pause::Error),
    /// The node has no thread left for the work.
    #[error("{0}")]
    ResourceExhausted(String),
    /// A part of the shim that must be there is not: a bug.
    #[error("internal: {0}")]
    Internal(&'static str),
}

/// What the shim's functions return.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// The one table from errors to ttrpc codes.
    pub fn code(&self) -> Code {
        match self {
            Self::NotFound(_) => Code::NOT_FOUND,
            Self::AlreadyExists(_) => Code::ALREADY_EXISTS,
            Self::FailedPrecondition(_) => Code::FAILED_PRECONDITION,
            Self::InvalidArgument(_) => Code::INVALID_ARGUMENT,
            Self::Sandbox(error) => match error.class() {
                pause::Class::InvalidInput => Code::INVALID_ARGUMENT,
                pause::Class::NotFound => Code::NOT_FOUND,
                // Not UNIMPLEMENTED: containerd 2.x takes that answer to Create for an old protocol, and tries again.
                pause::Class::Unsupported => Code::FAILED_PRECONDITION,
                pause::Class::Internal => Code::INTERNAL,
            },
            Self::Io(_) | Self::Runc { .. } => Code::UNKNOWN,
            Self::ResourceExhausted(_) => Code::RESOURCE_EXHAUSTED,
            Self::Internal(_) => Code::INTERNAL,
        }
    }
}

/// The result of steps that go on after a failure. The first failure is returned, and the log has the others.
///
/// # Errors
/// The first failure.
pub fn first_failure<E: Into<Error>>(steps: impl IntoIterator<Item = Result<(), E>>) -> Result<()> {
    let mut failures = steps.into_iter().filter_map(Result::err).map(E::into);
    let Some(first) = failures.next() else {
        return Ok(());
    };
    for other in failures {
        log::warn!(error:% = other; "another step failed, too");
    }
    Err(first)
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_has_the_code_that_containerd_branches_on() {
        let text = || String::from("x");
        let io = || IoError::at("open", "/x")(std::io::Error::from_raw_os_error(2));
        for (error, code) in [
            (Error::NotFound(text()), Code::NOT_FOUND),
            (Error::AlreadyExists(text()), Code::ALREADY_EXISTS),
            (Error::FailedPrecondition(text()), Code::FAILED_PRECONDITION),
            (Error::InvalidArgument(text()), Code::INVALID_ARGUMENT),
            (Error::Io(io()), Code::UNKNOWN),
            (Error::ResourceExhausted(text()), Code::RESOURCE_EXHAUSTED),
            (Error::Internal("x"), Code::INTERNAL),
            (
                Error::Runc {
                    command: "create",
                    id: text(),
                    message: text(),
                },
                Code::UNKNOWN,
            ),
        ] {
            assert_eq!(error.code(), code, "{error}");
        }
    }

    #[test]
    fn an_io_error_names_the_operation_and_the_path() {
        let error = IoError::at("open FIFO", "/run/x")(std::io::Error::from_raw_os_error(2));
        assert_eq!(
            error.to_string(),
            "open FIFO /run/x: No such file or directory (os error 2)"
        );
    }
}
