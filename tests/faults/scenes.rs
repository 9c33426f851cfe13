//! The calls of the campaign: how each is made, and in which state of its container.

use shim_tests::calls::Answer;

use crate::life::{Kind, Level, Life};

/// A call.
pub(crate) struct Scene {
    /// The name in tables and in `FAULT`.
    pub(crate) name: &'static str,
    /// What runs.
    pub(crate) kind: Kind,
    /// What has been done before.
    pub(crate) level: Level,
    /// The call.
    pub(crate) act: fn(&Life<'_>) -> Answer<()>,
}

/// Which process is traced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Program {
    /// `start`.
    Start,
    /// The server, from its first system call until it serves.
    Boot,
    /// `delete` of a container whose shim was killed.
    Delete,
    /// `delete` of a sandbox whose shim was killed.
    DeleteSandbox,
}

impl Program {
    /// The name in tables and in `FAULT`.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Start => "start (cli)",
            Self::Boot => "boot of the server",
            Self::Delete => "delete (cli)",
            Self::DeleteSandbox => "delete (cli) of a sandbox",
        }
    }
}

/// All programs.
pub(crate) const PROGRAMS: [Program; 4] = [
    Program::Start,
    Program::Boot,
    Program::Delete,
    Program::DeleteSandbox,
];

const fn scene(
    name: &'static str,
    kind: Kind,
    level: Level,
    act: fn(&Life<'_>) -> Answer<()>,
) -> Scene {
    Scene {
        name,
        kind,
        level,
        act,
    }
}

use Kind::{Container, Sandbox, SandboxApi, ShortContainer, Terminal};
use Level::{Created, Deleted, Ended, ExecAdded, ExecEnded, ExecRunning, Paused, Running, Shim};

/// Making and starting.
#[rustfmt::skip]
pub(crate) static MAKING: &[Scene] = &[
    scene("Create", Container, Shim, |life| life.create()),
    scene("Create, terminal", Terminal, Shim, |life| life.create()),
    scene("Create in a shim with another", Container, Created, |life| life.create_other()),
    scene("Start", Container, Created, |life| life.start()),
];

/// What processes do.
#[rustfmt::skip]
pub(crate) static RUNNING: &[Scene] = &[
    scene("Start of a program that ends, Wait", ShortContainer, Created, |life| {
        life.start()?;
        life.shim().wait(&life.id, "").map(drop)
    }),
    scene("Exec", Container, Running, |life| life.exec()),
    scene("Start of an exec", Container, ExecAdded, |life| life.shim().start(&life.id, "x").map(drop)),
    scene("Start of an exec, terminal", Terminal, ExecAdded, |life| life.shim().start(&life.id, "x").map(drop)),
    scene("an exec's whole life", Container, Running, |life| life.short_exec()),
    scene("Kill of an exec, Wait", Container, ExecRunning, |life| life.end_of("x")),
    scene("Delete of an exec", Container, ExecEnded, |life| life.shim().delete(&life.id, "x").map(drop)),
];

/// What is asked of a container.
#[rustfmt::skip]
pub(crate) static CONTROL: &[Scene] = &[
    scene("connection, State", Container, Running, |life| {
        let shim = life.another_connection().map_err(|message| shim_tests::calls::Refusal { code: None, message })?;
        shim.state(&life.id, "").map(drop)
    }),
    scene("Pids", Container, ExecRunning, |life| life.shim().pids(&life.id).map(drop)),
    scene("Stats", Container, Running, |life| life.shim().stats(&life.id).map(drop)),
    scene("Update", Container, Running, |life| life.update()),
    scene("Pause", Container, Running, |life| life.shim().pause(&life.id)),
    scene("Resume", Container, Paused, |life| life.shim().resume(&life.id)),
    scene("Kill of a paused container, Wait", Container, Paused, |life| life.stop()),
    scene("CloseIO", Container, Running, |life| life.shim().close_stdin(&life.id, "")),
    scene("ResizePty", Terminal, Running, |life| life.resize()),
];

/// The end.
#[rustfmt::skip]
pub(crate) static ENDING: &[Scene] = &[
    scene("Kill, Wait", Container, Running, |life| life.stop()),
    scene("Kill with an exec, Wait", Container, ExecRunning, |life| life.stop()),
    scene("Delete", Container, Ended, |life| life.delete()),
    scene("Delete, terminal", Terminal, Ended, |life| life.delete()),
    scene("Shutdown", Container, Deleted, |life| life.shut_down()),
];

/// Sandboxes.
#[rustfmt::skip]
pub(crate) static SANDBOX: &[Scene] = &[
    scene("Create of a sandbox", Sandbox, Shim, |life| life.create()),
    scene("Start of a sandbox", Sandbox, Created, |life| life.start()),
    scene("Create beside a sandbox", Sandbox, Running, |life| life.create_other()),
    scene("Kill of a sandbox, Wait", Sandbox, Running, |life| life.stop()),
    scene("Delete of a sandbox", Sandbox, Ended, |life| life.delete()),
    scene("CreateSandbox", SandboxApi, Shim, |life| life.create()),
    scene("StartSandbox", SandboxApi, Created, |life| life.start()),
    scene("SandboxStatus", SandboxApi, Running, |life| life.sandbox_status()),
    scene("StopSandbox", SandboxApi, Running, |life| life.stop()),
    scene("ShutdownSandbox", SandboxApi, Ended, |life| life.shut_down()),
];
