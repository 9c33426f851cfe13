//! Starts the init, a saved init, or an exec.
//!
//! ```text
//!  Start ──▶ allowed? ──▶ Starting ──▶ a job ──┬─ success ─▶ Running, the start event ─────────────┬─▶ the answer
//!                            │                 └─ failure ─▶ Created (an init), Failed (an exec) ──┘       │
//!                            └── calls for the process wait here ──────────────────────────────────────────┴─▶ go on
//! ```
//!
//! The job is `runc start` for the init, `runc restore` for a saved init, and `runc exec` for an exec. If the process
//! ended during the start, the next state is Ended.
//!
//! A runc that hangs must not hold back what waits for the end of the start: the exit of the init, a SIGKILL, a Delete.
//! Each of them hurries the start, and a start that is then not over within [`PATIENCE`] is given up: runc is killed.

use std::time::Duration;

use log::{Level, info, log};
use rustix::process::Pid;
use tokio::sync::watch;

use super::actor::{Actor, Done};
use super::event::Event;
use super::mailbox::{ProcessId, Reply, View, answer, no_process};
use super::process::{Exec, ExecFiles, Process, exec_process, restore, start_exec};
use super::state::{Call, Life, Start, Status};
use super::{known_cgroup, watched};
use crate::error::{Error, Result};
use crate::io::{self, Io, Recipient, Writer};
use crate::kernel::exits::{Claim, Exit};
use crate::runtime::bundle::write_private;

/// How long a start may still take when something waits for its end. Longer than a runc that works takes on a busy
/// node; less than the ten seconds in which containerd wants an exit handled and a failed exec removed.
const PATIENCE: Duration = Duration::from_secs(5);

/// Resolves when a start is hurried.
#[derive(Debug, Clone)]
pub(super) struct Hurried(watch::Receiver<()>);

impl Hurried {
    fn channel() -> (watch::Sender<()>, Self) {
        let (hurry, hurried) = watch::channel(());
        (hurry, Self(hurried))
    }

    /// Resolves when somebody waits for the end of the start.
    async fn now(mut self) {
        // Nothing is ever sent; the end of the sender is what counts.
        let _ = self.0.changed().await;
    }

    /// The result of `start`, or None when the start takes too long after the hurry. The start is then dropped.
    pub(super) async fn bound<T>(self, start: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            result = start => Some(result),
            () = async {
                self.now().await;
                tokio::time::sleep(PATIENCE).await;
            } => None,
        }
    }
}

/// The error of a start that was given up.
pub(super) fn given_up(command: &str) -> Error {
    Error::FailedPrecondition(format!(
        "{command} still ran {PATIENCE:?} after the end of the container, a SIGKILL or a Delete, and was killed"
    ))
}

impl Actor {
    pub(super) fn start(&mut self, id: ProcessId, reply: Reply<Pid>) {
        match (self.begin_start(&id), id) {
            (Err(error), _) => answer(reply, Err(error)),
            (Ok((io, hurried)), ProcessId::Init) => self.start_init(io, hurried, reply),
            (Ok((io, hurried)), ProcessId::Exec(exec)) => self.start_exec(exec, io, hurried, reply),
        }
    }

    /// Begins the start of a process, if the start is allowed. Returns the streams as containerd named them.
    fn begin_start(&mut self, id: &ProcessId) -> Result<(io::Request, Hurried)> {
        let over = self.not_over();
        let process = self.process(id)?;
        process.status().check(Call::Start)?;
        over?;
        if process.life().is_starting() {
            return Err(Error::FailedPrecondition(
                "the process is being started".into(),
            ));
        }
        process.io.start()?;
        let (hurry, hurried) = Hurried::channel();
        let start = Start {
            hurry: Some(hurry),
            ..Start::default()
        };
        process.go_on(|_| Life::Starting(start));
        Ok((process.request(), hurried))
    }

    fn start_init(&mut self, io: io::Request, hurried: Hurried, reply: Reply<Pid>) {
        let runc = self.runc.clone();
        let Some(image) = self.image.clone() else {
            self.jobs.spawn(async move {
                let started = runc.start(hurried.clone().now());
                let started = hurried.bound(started).await;
                Done::InitStarted(
                    started.unwrap_or_else(|| Err(given_up("runc start"))),
                    reply,
                )
            });
            return;
        };
        let (id, bundle) = (self.id.clone(), self.remains.record.bundle.clone());
        let (writer, owner, shared) = (self.writer, self.stream_owner, self.shared.clone());
        self.jobs.spawn(async move {
            let recipient = Recipient {
                id: &id,
                namespace: &shared.namespace,
                console: (&bundle, "console"),
                writer,
                owner,
                exits: &shared.exits,
            };
            let restored = restore(&runc, &bundle, &image, &io, recipient, hurried).await;
            Done::Restored(restored, reply)
        });
    }

    fn start_exec(&mut self, exec: String, io: io::Request, hurried: Hurried, reply: Reply<Pid>) {
        let Some(files) = self.execs.get(&exec).map(|exec| exec.files.clone()) else {
            return answer(reply, Err(no_process(&ProcessId::Exec(exec))));
        };
        let runc = self.runc.clone();
        let (owner, shared) = (self.stream_owner, self.shared.clone());
        self.jobs.spawn(async move {
            let recipient = Recipient {
                id: &exec,
                namespace: &shared.namespace,
                console: (&files.bundle, &files.console),
                writer: Writer::Shim,
                owner,
                exits: &shared.exits,
            };
            let result = start_exec(&runc, &files, &io, recipient, hurried).await;
            Done::ExecStarted(exec, result, reply)
        });
    }

    /// An error when the container has ended or is being deleted: then nothing starts in the container.
    fn not_over(&self) -> Result<()> {
        if self.init.status().exit().is_some() {
            return Err(Error::FailedPrecondition(format!("{} has ended", self.id)));
        }
        self.not_being_deleted()
    }

    fn not_being_deleted(&self) -> Result<()> {
        if self.deleted.is_empty() {
            return Ok(());
        }
        Err(Error::FailedPrecondition(format!(
            "{} is being deleted",
            self.id
        )))
    }

    /// Takes in a restored init, finds the cgroup, and watches for OOM kills. Returns the pid.
    pub(super) fn restored(&mut self, (claim, io): (Claim, Io)) -> Pid {
        let pid = claim.child.pid();
        self.began(&ProcessId::Init, claim, io);
        self.cgroup = self.cgroup.take().or_else(|| known_cgroup(&self.id, pid));
        self.oom_kills = watched(&self.id, self.cgroup.as_ref());
        pid
    }

    pub(super) fn init_started(&mut self, started: Result<Pid>, reply: Reply<Pid>) {
        let waiting = self.init.end_start(&started);
        if let Ok(pid) = &started {
            info!(container = self.id, name = self.name, pid:%; "container started");
            self.shared.events.send(Event::Start {
                container: self.id.clone(),
                pid: *pid,
            });
        }
        answer(reply, started);
        self.publish_exits();
        self.go_on(waiting);
    }

    /// Adds an exec. The exec runs only after a Start.
    pub(super) fn exec(&mut self, id: String, process: &[u8], io: io::Request) -> Result<()> {
        self.init.status().check(Call::Exec)?;
        self.not_being_deleted()?;
        if self.init.pid().is_none() {
            return Err(Error::FailedPrecondition(format!(
                "{} has not been restored yet",
                self.id
            )));
        }
        let process = exec_process(process, io.terminal)?;
        if self.execs.contains_key(&id) {
            return Err(Error::AlreadyExists(format!("exec {id:?} already exists")));
        }
        self.exec_count += 1;
        let files = ExecFiles::new(&self.remains.record.bundle, self.exec_count);
        write_private(&files.process, &process)?;
        let view = View {
            pid: None,
            status: Status::Created,
            io,
        };
        let view = self.inbox.views.add(ProcessId::Exec(id.clone()), view);
        let process = Process::new(view);
        self.execs.insert(id.clone(), Exec { process, files });
        self.shared.events.send(Event::ExecAdded {
            container: self.id.clone(),
            exec: id,
        });
        Ok(())
    }

    pub(super) fn exec_started(
        &mut self,
        exec: &str,
        result: Result<(Claim, Io)>,
        reply: Reply<Pid>,
    ) {
        let id = ProcessId::Exec(exec.to_owned());
        let started = result.map(|(claim, io)| {
            let pid = claim.child.pid();
            self.began(&id, claim, io);
            pid
        });
        let waiting = match self.process(&id) {
            Ok(process) => process.end_start(&started),
            Err(_) => Vec::new(),
        };
        match &started {
            Ok(pid) => {
                let of_exec = self.execs.get(exec).map(|exec| exec.process.log_level());
                let level = of_exec.unwrap_or(Level::Debug);
                log!(level, container = self.id, exec, pid:%; "exec started");
                self.shared.events.send(Event::ExecStarted {
                    container: self.id.clone(),
                    exec: exec.to_owned(),
                    pid: *pid,
                });
            }
            Err(_) => {
                if let Ok(process) = self.process(&id) {
                    // The exec never ran and has no exit. Without this exit, pending waits would never resolve.
                    process.go_on(|_| Life::Failed(Exit::now(255)));
                }
            }
        }
        answer(reply, started);
        if self.init.status().exit().is_some() {
            // The init ended during the start of the exec, and `end_the_rest` has not seen the exec.
            self.end_the_rest();
        }
        self.publish_exits();
        self.go_on(waiting);
    }
}
