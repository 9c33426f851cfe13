//! What a person on the node runs, and what that person is told: containerd and its configuration, and the pods.
//!
//! ```text
//!  check ──┬─▶ containerd    which process answers, its program, its file
//!          ├─▶ config        what `containerd config dump` says of CRI
//!          ├─▶ check/…       one file for each part of the node
//!          └─▶ report        the findings, as lines or as JSON
//!  pods ─────▶ pods/…        the bundles of this shim, what each shim says of itself
//!  install ──▶ install/…     the binary and the handler onto this node, and off again
//! ```
//!
//! Nothing here changes the node but `install`.

pub mod check;
pub mod config;
pub mod containerd;
pub mod install;
pub(crate) mod kubelet;
pub mod pods;
mod programs;
mod report;

use std::path::PathBuf;

use rustix::process::geteuid;

pub use self::kubelet::CONFIG as KUBELET;
use crate::error::{Error, Result};

/// How the answer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Lines for a person.
    Text,
    /// One JSON object.
    Json,
}

/// What is asked about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// The socket of containerd.
    pub address: PathBuf,
    /// containerd's configuration file; none for the one on its command line, or the usual one.
    pub config: Option<PathBuf>,
    /// The kubelet's configuration file.
    pub kubelet: PathBuf,
    /// How the answer is written.
    pub form: Form,
}

/// What a command says, and the exit code of the program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Said {
    /// For standard output.
    pub text: String,
    /// 0 or 1.
    pub code: u8,
}

/// The kernel tells other users neither which program a process is nor what a bundle holds.
fn root_only(command: &str) -> Result<()> {
    if geteuid().is_root() {
        return Ok(());
    }
    Err(Error::FailedPrecondition(format!(
        "{command} reads what only root may: sudo containerd-shim-pause-v2 {command}"
    )))
}
