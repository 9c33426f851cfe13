//! Starts the init, a saved init, or an exec.
//!
//! ```text
//!  Start ──▶ allowed? ──▶ Starting ──▶ a job ──┬─ success ─▶ Running, the start event ──────────────┬─▶ the answer
//!                            │                 └─ failure ─▶ Created (an init), Stopped (an exec) ──┘       │
//!                            └── calls for the process wait here ───────────────────────────────────────────┴─▶ go on
//! ```
//!
//! The job is `runc start` for the init, `runc restore` for a saved init, and `runc exec` for an exec. If the process
//! ended during the start, the next state is Ended.

use log::info;
use rustix::process::Pid;
use tokio::sync::oneshot;

use super::actor::{Actor, Done};
use super::event::Event;
use super::mailbox::{ProcessId, Reply, View, answer, no_process};
use super::process::{Exec, ExecFiles, Process, exec_process, restore, start_exec};
use super::state::{Call, Life, Start, Status};
use super::{known_cgroup, watched};
use crate::error::{Error, Result};
use crate::io::{self, Io};
use crate::kernel::exits::{Claim, Exit};
use crate::runtime::bundle::write_private;

impl Actor {
    pub(super) fn start(&mut self, id: ProcessId, reply: Reply<Pid>) {
        match (self.begin_start(&id), id) {
            (Err(error), _) => answer(reply, Err(error)),
            (Ok(io), ProcessId::Init) => self.start_init(io, reply),
            (Ok(io), ProcessId::Exec(exec)) => self.start_exec(exec, io, reply),
        }
    }

    /// Begins the start of a process, if the start is allowed. Returns the streams as containerd named them.
    fn begin_start(&mut self, id: &ProcessId) -> Result<io::Request> {
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
        process.go_on(|_| Life::Starting(Start::default()));
        Ok(process.request())
    }

    fn start_init(&mut self, io: io::Request, reply: Reply<Pid>) {
        let runc = self.runc.clone();
        let Some(image) = self.image.clone() else {
            let (ending, ended) = oneshot::channel();
            if let Life::Starting(start) = self.init.life_mut() {
                start.ending = Some(ending);
            }
            self.jobs.spawn(async move {
                let ended = async { ended.await.unwrap_or_default() };
                Done::InitStarted(runc.start(ended).await, reply)
            });
            return;
        };
        let (id, bundle) = (self.id.clone(), self.remains.record.bundle.clone());
        let (owner, shared) = (self.stream_owner, self.shared.clone());
        self.jobs.spawn(async move {
            let restored = restore(&runc, &id, &bundle, &image, &io, owner, &shared).await;
            Done::Restored(restored, reply)
        });
    }

    fn start_exec(&mut self, exec: String, io: io::Request, reply: Reply<Pid>) {
        let Some(files) = self.execs.get(&exec).map(|exec| exec.files.clone()) else {
            return answer(reply, Err(no_process(&ProcessId::Exec(exec))));
        };
        let runc = self.runc.clone();
        let (owner, shared) = (self.stream_owner, self.shared.clone());
        self.jobs.spawn(async move {
            let result = start_exec(&runc, &exec, &files, &io, owner, &shared).await;
            Done::ExecStarted(exec, result, reply)
        });
    }

    /// An error when the container has ended or is being deleted: then nothing starts in the container.
    fn not_over(&self) -> Result<()> {
        let over = if self.init.status().exit().is_some() {
            "has ended"
        } else if !self.deleted.is_empty() {
            "is being deleted"
        } else {
            return Ok(());
        };
        Err(Error::FailedPrecondition(format!("{} {over}", self.id)))
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
            info!("container {}: started", self.id);
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
        self.not_over()?;
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
            Ok(pid) => self.shared.events.send(Event::ExecStarted {
                container: self.id.clone(),
                exec: exec.to_owned(),
                pid: *pid,
            }),
            Err(_) => {
                if let Ok(process) = self.process(&id) {
                    // The exec never ran and has no exit. Without this exit, pending waits would never resolve.
                    process.go_on(|_| Life::Stopped(Exit::now(255)));
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
