//! `containerd-shim-pause-v2`: a containerd runtime-v2 shim with the pause container built in.
//!
//! ```text
//!                    ┌ start  ─▶ boot      makes or finds the pod's server, answers where it listens
//!  containerd ─exec──┼ delete ─▶ cleanup   takes down what a dead server has left
//!                    ├ -v, -info           says who it is
//!                    └ (none) ─▶ server ─▶ task, sandbox ─▶ pod ─┬▶ container ─▶ runc, io, cgroup, mounts, exits, events
//!                                                                └▶ holder ─▶ the crate `pause`, podfiles
//! ```
#![forbid(unsafe_code)]

mod args;
mod boot;
mod bundle;
mod callers;
mod cgroup;
mod cleanup;
mod container;
mod convert;
mod criu;
mod error;
mod events;
mod exits;
mod holder;
mod info;
mod io;
mod logging;
mod mailbox;
mod mounts;
mod options;
mod pod;
mod podconfig;
mod podfiles;
mod runc;
mod sandbox;
mod server;
mod spec;
mod state;
mod task;

use std::io::Write;
use std::process::ExitCode;

use log::LevelFilter;

use crate::args::{Action, Args};
use crate::boot::Start;
use crate::error::{IoError, Result};
use crate::server::Settings;

fn main() -> ExitCode {
    match Args::parse(std::env::args_os().skip(1)).and_then(run) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The one place where a person or containerd reads why.
            let _ = writeln!(std::io::stderr(), "containerd-shim-pause-v2: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<()> {
    match args.action {
        Action::Version => print(info::version().as_bytes()),
        Action::Info => print(&info::runtime_info(&boot::read_input()?)?),
        Action::Start => {
            let start = Start {
                bundle: args.bundle()?,
                namespace: args.namespace,
                id: args.id,
                address: args.address,
                debug: args.debug,
                knows_versions: std::env::var_os("MAX_SHIM_VERSION").is_some(),
                input: boot::read_input()?,
            };
            print(&boot::start(&start)?)
        }
        Action::Delete => {
            let bundle = args.bundle()?;
            print(&cleanup::delete(&args.id, &bundle)?)
        }
        Action::Serve => {
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
    }
}

fn print(answer: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout();
    let written = stdout.write_all(answer).and_then(|()| stdout.flush());
    Ok(written.map_err(IoError::at("write", "standard output"))?)
}
