//! The command line: what containerd executes, and what a person does.
//!
//! ```text
//!                    ┌ start  ─▶ start    makes or finds the pod's server (`socket`, `launch`), answers its address
//!  containerd ─exec──┼ delete ─▶ delete   takes down what a dead server has left
//!                    ├ -v, -info ▶ info   names this program and its runc's features
//!                    └ (none) ──▶ serve   the server, see `containerd`
//!  a person ───exec──── check, pods ▶ node  what is on this node
//!  a person ─┬ install, uninstall, repair   see `node::install`
//!            └ stay                         nothing, for the pod of a DaemonSet
//! ```

pub mod args;
pub mod delete;
pub mod info;
mod launch;
mod socket;
pub mod start;

use std::ffi::OsString;
use std::io::{IsTerminal, Read, Write};
use std::process::ExitCode;

use log::LevelFilter;
use rustix::fs::Mode;
use rustix::process::umask;

use self::args::Action;
use self::start::Start;
use crate::containerd::logging;
use crate::containerd::server::{self, Settings};
use crate::error::{Error, IoError, Result};
use crate::node::{self, Said, install};

/// The exit code of a command that could not be carried out. 1 is an answer of `check`.
pub const FAILED: u8 = 2;

/// The most bytes of standard input. A message over containerd's own protocols has no more.
const MOST_INPUT: u64 = 16 << 20;

/// Does what the arguments after the program's name ask for. Returns the program's exit code.
///
/// # Errors
/// `InvalidArgument` for a command line that cannot be understood, and the errors of the command.
pub fn run(arguments: impl Iterator<Item = OsString>) -> Result<ExitCode> {
    deny_others_to_write();
    let done = match Action::parse(arguments)? {
        Action::Version => print(info::version().as_bytes()),
        Action::Info => print(&info::runtime_info(&read_input()?)?),
        Action::Start {
            namespace,
            id,
            address,
            bundle,
            debug,
        } => {
            let start = Start {
                namespace,
                id,
                address,
                debug,
                bundle,
                knows_versions: std::env::var_os("MAX_SHIM_VERSION").is_some(),
                input: read_input()?,
            };
            print(&start::start(&start)?)
        }
        Action::Delete { id, bundle } => print(&delete::delete(&id, &bundle)?),
        Action::Check(asked) => return tell(&node::check::check(&asked)?),
        Action::Pods(asked) => return tell(&node::pods::pods(&asked)?),
        Action::Install => install::install(&mut std::io::stdout()),
        Action::Uninstall => install::uninstall(&mut std::io::stdout()),
        Action::Repair => install::repair(&mut std::io::stdout()),
        Action::RepairFiles => install::repair_files(&mut std::io::stdout()),
        Action::Stay => loop {
            std::thread::park();
        },
        Action::Serve {
            namespace,
            id,
            address,
            socket,
            debug,
        } => {
            let level = if debug {
                LevelFilter::Debug
            } else {
                LevelFilter::Info
            };
            logging::start(level, &id, &namespace);
            let settings = Settings {
                events: events_address(&address),
                namespace,
                socket,
            };
            server::serve(settings).inspect_err(|error| log::error!(error:%; "shim fails"))
        }
    };
    done.map(|()| ExitCode::SUCCESS)
}

/// Tells a person or a script.
fn tell(said: &Said) -> Result<ExitCode> {
    print(said.text.as_bytes())?;
    Ok(ExitCode::from(said.code))
}

/// Nobody but root may write what this process makes, also where containerd has no umask. What containerd's umask denies
/// stays denied.
fn deny_others_to_write() {
    let of_containerd = umask(Mode::RWXG | Mode::RWXO);
    umask(of_containerd | Mode::from_raw_mode(0o022));
}

/// The path of containerd's ttrpc socket, for events.
fn events_address(address: &str) -> String {
    std::env::var("TTRPC_ADDRESS")
        .ok()
        .filter(|address| !address.is_empty())
        .unwrap_or_else(|| format!("{address}.ttrpc"))
}

/// Reads standard input to its end; a terminal counts as empty, so that a person need not end the input.
fn read_input() -> Result<Vec<u8>> {
    let mut input = Vec::new();
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        return Ok(input);
    }
    stdin
        .lock()
        .take(MOST_INPUT + 1)
        .read_to_end(&mut input)
        .map_err(IoError::at("read", "standard input"))?;
    if u64::try_from(input.len()).is_ok_and(|length| length > MOST_INPUT) {
        return Err(Error::InvalidArgument(format!(
            "standard input has more than {MOST_INPUT} bytes, and options have less"
        )));
    }
    Ok(input)
}

fn print(answer: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout();
    let written = stdout.write_all(answer).and_then(|()| stdout.flush());
    Ok(written.map_err(IoError::at("write", "standard output"))?)
}
