//! The command line: what containerd executes.
//!
//! ```text
//!                    ┌ start  ─▶ start    makes or finds the pod's server, answers where it listens
//!  containerd ─exec──┼ delete ─▶ delete   takes down what a dead server has left
//!                    ├ -v, -info ▶ info   says who this is
//!                    └ (none) ──▶ serve   the server, see `containerd`
//! ```

pub mod args;
pub mod delete;
pub mod info;
pub mod start;

use std::ffi::OsString;
use std::io::Write;

use log::LevelFilter;

use self::args::{Action, Args};
use self::start::Start;
use crate::containerd::logging;
use crate::containerd::server::{self, Settings};
use crate::error::{IoError, Result};

/// Does what the arguments after the program's name ask for.
///
/// # Errors
/// `InvalidArgument` for a command line that cannot be understood, and what the command says.
pub fn run(arguments: impl Iterator<Item = OsString>) -> Result<()> {
    let args = Args::parse(arguments)?;
    match args.action {
        Action::Version => print(info::version().as_bytes()),
        Action::Info => print(&info::runtime_info(&start::read_input()?)?),
        Action::Start => {
            let start = Start {
                bundle: args.bundle()?,
                namespace: args.namespace,
                id: args.id,
                address: args.address,
                debug: args.debug,
                knows_versions: std::env::var_os("MAX_SHIM_VERSION").is_some(),
                input: start::read_input()?,
            };
            print(&start::start(&start)?)
        }
        Action::Delete => print(&delete::delete(&args.id, &args.bundle()?)?),
        Action::Serve => serve(args),
    }
}

fn serve(args: Args) -> Result<()> {
    let level = if args.debug {
        LevelFilter::Debug
    } else {
        LevelFilter::Info
    };
    logging::start(level, &args.id, &args.namespace);
    let settings = Settings {
        events: args.events_address(),
        namespace: args.namespace,
        socket: args.socket,
    };
    server::serve(settings).inspect_err(|error| log::error!("{error}"))
}

fn print(answer: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout();
    let written = stdout.write_all(answer).and_then(|()| stdout.flush());
    Ok(written.map_err(IoError::at("write", "standard output"))?)
}
