//! The task itself: what it owns, what it is told, what comes back.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use containerd_shim_protos::events::task;
use log::info;
use rustix::process::Pid;
use tokio::sync::{Notify, oneshot};
use tokio::task::{JoinHandle, JoinSet};

use super::process::{Exec, ExecFiles, Process, answer, exec_process, restore, start_exec};
use super::{Shared, known_cgroup, watched};
use crate::container::mailbox::{Command, Deleted, Owner, ProcessId, Reply, View, no_process};
use crate::container::state::{Call, State};
use crate::containerd::convert::wire_pid;
use crate::containerd::events::Event;
use crate::error::{Error, IoError, Result};
use crate::io::{self, Io};
use crate::kernel::cgroup::{Cgroup, OomKills};
use crate::kernel::exits::{Claim, Exit};
use crate::runtime::runc::{Runc, Started};

/// What a job brings back.
pub(super) enum Done {
    /// A process has ended.
    Exited(ProcessId, Exit),
    /// What the init wrote has been read, or has waited long enough: its exit may be told.
    Read,
    /// `runc start` of the init is over.
    InitStarted(Result<()>, Reply<Pid>),
    /// `runc exec` is over.
    ExecStarted(String, Result<(Started, Io)>, Reply<Pid>),
    /// `runc restore` is over.
    Restored(Result<(Started, Io)>, Reply<Pid>),
    /// `runc checkpoint` is over.
    Saved(PathBuf, Result<()>, Reply<()>),
    /// The container is frozen or thawed.
    Frozen(Call, Result<()>, Reply<()>),
    /// The container is taken down.
    TakenDown(Result<()>),
    /// Somebody else has got the answer.
    Answered,
}

/// Owns a container.
pub(super) struct Actor {
    pub(super) id: String,
    pub(super) bundle: PathBuf,
    /// Of the streams of its processes.
    pub(super) streams_owner: io::Owner,
    /// Processes of the container may outlive its init.
    pub(super) shares_processes: bool,
    pub(super) shared: Shared,
    pub(super) runc: Runc,
    pub(super) cgroup: Option<Cgroup>,
    /// Until the end of the init is told. None where the kernel counts no memory.
    pub(super) oom_kills: Option<OomKills>,
    /// What the init is to be restored from, instead of being made by `runc create`.
    pub(super) image: Option<PathBuf>,
    /// A checkpoint is being made.
    pub(super) saving: bool,
    pub(super) init: Process,
    /// The init has been sent SIGKILL.
    pub(super) dying: bool,
    /// The init has ended, and what it wrote is being read; until it is told that this is enough.
    pub(super) reading: Option<Arc<Notify>>,
    /// Dropped when the init ends, for who starts it.
    pub(super) init_ending: Option<oneshot::Sender<()>>,
    pub(super) execs: HashMap<String, Exec>,
    /// How many execs there have been.
    pub(super) exec_count: u64,
    /// How many updates there have been.
    pub(super) update_count: u64,
    pub(super) owner: Owner,
    pub(super) jobs: JoinSet<Done>,
    /// The last output of deleted execs, on its way into files and through loggers.
    pub(super) ending: Vec<JoinHandle<()>>,
    /// Who waits for the container to be deleted. The first is answered with its exit, the others that it is gone.
    pub(super) deleted: Vec<Reply<Deleted>>,
}

impl Actor {
    pub(super) async fn run(mut self) {
        loop {
            tokio::select! {
                Some(done) = self.jobs.join_next() => {
                    if let Ok(done) = done && self.done(done) {
                        return;
                    }
                }
                command = self.owner.calls.recv() => match command {
                    Some(command) => self.command(command),
                    None => return,
                },
                // Told after the start.
                () = oom_kill(&mut self.oom_kills), if self.init.starting.is_none() => self.tell_oom(),
            }
        }
    }

    fn command(&mut self, command: Command) {
        let Some(command) = self.unless_starting(command) else {
            return;
        };
        match command {
            Command::Start(id, reply) => self.start(id, reply),
            Command::Exec(id, process, io, reply) => answer(reply, self.exec(id, &process, io)),
            Command::Kill(id, signal, target, reply) => self.kill(&id, signal, target, reply),
            Command::Delete(ProcessId::Init, reply) => self.delete(reply),
            Command::Delete(ProcessId::Exec(id), reply) => answer(reply, self.delete_exec(&id)),
            Command::Pause(reply) => self.freeze(Call::Pause, reply),
            Command::Resume(reply) => self.freeze(Call::Resume, reply),
            Command::Update(resources, reply) => self.update(resources, reply),
            Command::Checkpoint(checkpoint, reply) => self.checkpoint(checkpoint, reply),
            Command::Resize(id, size, reply) => {
                let resized = self
                    .process(&id)
                    .and_then(|process| process.io.resize(size));
                answer(reply, resized);
            }
            Command::CloseIo(id, reply) => {
                let closed = self.process(&id).map(|process| process.io.close_stdin());
                answer(reply, closed);
            }
            Command::Pids(reply) => self.pids(reply),
            Command::Stats(reply) => self.stats(reply),
            Command::SharedProcesses(reply) => answer(
                reply,
                Err(Error::FailedPrecondition(format!(
                    "{} is not a sandbox",
                    self.id
                ))),
            ),
        }
    }

    /// Keeps a call to a process that is being started, and cannot be reached yet, until the start is over. It would find
    /// no process to signal and no stream to close, and the caller would take it for done.
    fn unless_starting(&mut self, command: Command) -> Option<Command> {
        let (id, deletes) = match &command {
            Command::Kill(id, ..) | Command::Resize(id, ..) | Command::CloseIo(id, _) => {
                (id, false)
            }
            Command::Delete(id, _) => (id, true),
            Command::Start(..)
            | Command::Exec(..)
            | Command::Pause(_)
            | Command::Resume(_)
            | Command::Update(..)
            | Command::Checkpoint(..)
            | Command::Pids(_)
            | Command::Stats(_)
            | Command::SharedProcesses(_) => return Some(command),
        };
        match self.process(id) {
            Ok(Process {
                starting: Some(waiting),
                pidfd,
                ..
            }) if deletes || pidfd.is_none() => {
                waiting.push(command);
                None
            }
            _ => Some(command),
        }
    }

    /// The start of a process is over, and has been answered: so is what waited for it.
    fn go_on(&mut self, waiting: Option<Vec<Command>>) {
        for command in waiting.into_iter().flatten() {
            self.command(command);
        }
    }

    /// Takes in what a job brought back. True when nothing is left to do.
    fn done(&mut self, done: Done) -> bool {
        match done {
            Done::Exited(id, exit) => {
                if let Ok(process) = self.process(&id) {
                    process.set_state(State::Ended(exit));
                }
                if id == ProcessId::Init {
                    self.init_ending = None;
                    self.end_the_rest();
                    let unread = self.init.io.unread().filter(|_| self.deleted.is_empty());
                    self.reading = unread.map(|read| {
                        let enough = Arc::new(Notify::new());
                        let reading = enough.clone();
                        self.jobs.spawn(async move {
                            tokio::select! {
                                () = read => {}
                                () = enough.notified() => {}
                            }
                            Done::Read
                        });
                        reading
                    });
                }
                self.tell_exits();
            }
            Done::Read => {
                self.reading = None;
                self.tell_exits();
            }
            Done::InitStarted(result, reply) => {
                let pid = self.init.pid();
                let pid = pid.ok_or(Error::Internal("an init without a pid"));
                self.init_started(result.and(pid), reply);
            }
            Done::Restored(result, reply) => {
                let restored = result.map(|(started, io)| {
                    let pid = started.pid;
                    self.began(&ProcessId::Init, started, io);
                    self.cgroup = self.cgroup.take().or_else(|| known_cgroup(&self.id, pid));
                    self.oom_kills = watched(&self.id, self.cgroup.as_ref());
                    pid
                });
                self.init_started(restored, reply);
            }
            Done::Saved(image, result, reply) => {
                answer(reply, self.saved(&image, result));
                self.tell_exits();
            }
            Done::ExecStarted(id, result, reply) => {
                let waiting = self
                    .process(&ProcessId::Exec(id.clone()))
                    .ok()
                    .and_then(|process| process.starting.take());
                answer(reply, self.exec_started(&id, result));
                if self.init.state().exit().is_some() {
                    // It slipped in after the others had been ended.
                    self.end_the_rest();
                }
                self.tell_exits();
                self.go_on(waiting);
            }
            Done::Frozen(call, result, reply) => answer(reply, self.frozen(call, result)),
            Done::TakenDown(result) => return self.taken_down(result),
            Done::Answered => {}
        }
        false
    }

    fn init_started(&mut self, started: Result<Pid>, reply: Reply<Pid>) {
        let waiting = self.init.starting.take();
        if let Ok(pid) = &started {
            // It may have ended already.
            if self.init.untold().is_none() {
                self.init.set_state(State::Running);
            }
            info!("container {}: started", self.id);
            self.shared.events.send(&Event::started(&self.id, *pid));
        }
        answer(reply, started);
        self.tell_exits();
        self.go_on(waiting);
    }

    pub(super) fn process(&mut self, id: &ProcessId) -> Result<&mut Process> {
        match id {
            ProcessId::Init => Ok(&mut self.init),
            ProcessId::Exec(exec) => self
                .execs
                .get_mut(exec)
                .map(|exec| &mut exec.process)
                .ok_or_else(|| no_process(id)),
        }
    }

    /// A process is there: opens its pidfd and waits for its exit.
    pub(super) fn began(&mut self, id: &ProcessId, started: Started, io: Io) {
        let pidfd = started.pidfd();
        let awaited = id.clone();
        if let Ok(process) = self.process(id) {
            process.pidfd = pidfd;
            process.io = io;
            process
                .view
                .send_modify(|view| view.pid = Some(started.pid));
        }
        self.jobs.spawn(exited(awaited, started.exit));
    }

    fn start(&mut self, id: ProcessId, reply: Reply<Pid>) {
        let over = self.not_over();
        let checked = self.process(&id).and_then(|process| {
            process.state().check(Call::Start)?;
            over?;
            if process.starting.is_some() {
                return Err(Error::FailedPrecondition(
                    "the process is being started".into(),
                ));
            }
            process.io.start()?;
            process.starting = Some(Vec::new());
            Ok(process.view.borrow().io.clone())
        });
        let runc = self.runc.clone();
        match (checked, id) {
            (Err(error), _) => answer(reply, Err(error)),
            (Ok(io), ProcessId::Init) => match self.image.clone() {
                None => {
                    let (ending, ended) = oneshot::channel();
                    self.init_ending = Some(ending);
                    self.jobs.spawn(async move {
                        let ended = async { ended.await.unwrap_or_default() };
                        Done::InitStarted(runc.start(ended).await, reply)
                    });
                }
                Some(image) => {
                    let (id, bundle) = (self.id.clone(), self.bundle.clone());
                    let (owner, shared) = (self.streams_owner, self.shared.clone());
                    self.jobs.spawn(async move {
                        let restored =
                            restore(&runc, &id, &bundle, &image, &io, owner, &shared).await;
                        Done::Restored(restored, reply)
                    });
                }
            },
            (Ok(io), ProcessId::Exec(exec)) => {
                let Some(files) = self.execs.get(&exec).map(|exec| exec.files.clone()) else {
                    return answer(reply, Err(no_process(&ProcessId::Exec(exec))));
                };
                let (owner, shared) = (self.streams_owner, self.shared.clone());
                self.jobs.spawn(async move {
                    let result = start_exec(&runc, &exec, &files, &io, owner, &shared).await;
                    Done::ExecStarted(exec, result, reply)
                });
            }
        }
    }

    /// Nothing starts in a container that has ended, or is being deleted.
    fn not_over(&self) -> Result<()> {
        let over = if self.init.state().exit().is_some() {
            "has ended"
        } else if !self.deleted.is_empty() {
            "is being deleted"
        } else {
            return Ok(());
        };
        Err(Error::FailedPrecondition(format!("{} {over}", self.id)))
    }

    fn exec(&mut self, id: String, process: &[u8], io: io::Request) -> Result<()> {
        self.init.state().check(Call::Exec)?;
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
        let files = ExecFiles::new(&self.bundle, self.exec_count);
        std::fs::write(&files.process, process).map_err(IoError::at("write", &files.process))?;
        let view = View {
            pid: None,
            state: State::Created,
            io,
        };
        let view = self.owner.views.add(ProcessId::Exec(id.clone()), view);
        let process = Process::new(view);
        self.execs.insert(id.clone(), Exec { process, files });
        self.shared
            .events
            .send(&Event::ExecAdded(task::TaskExecAdded {
                container_id: self.id.clone(),
                exec_id: id,
                ..task::TaskExecAdded::default()
            }));
        Ok(())
    }

    fn exec_started(&mut self, exec: &str, result: Result<(Started, Io)>) -> Result<Pid> {
        let id = ProcessId::Exec(exec.to_owned());
        let (started, io) = match result {
            Ok(started) => started,
            Err(error) => {
                // It never ran: who waits for it must not wait for ever.
                self.process(&id)?.set_state(State::Stopped(Exit::now(255)));
                return Err(error);
            }
        };
        let pid = started.pid;
        self.began(&id, started, io);
        self.process(&id)?.set_state(State::Running);
        self.shared
            .events
            .send(&Event::ExecStarted(task::TaskExecStarted {
                container_id: self.id.clone(),
                exec_id: exec.to_owned(),
                pid: wire_pid(Some(pid)),
                ..task::TaskExecStarted::default()
            }));
        Ok(pid)
    }
}

/// Resolves when a process was killed for lack of memory; never, where that is not watched.
async fn oom_kill(kills: &mut Option<OomKills>) {
    match kills {
        Some(kills) => kills.next().await,
        None => std::future::pending().await,
    }
}

async fn exited(id: ProcessId, exit: Claim) -> Done {
    match exit.await {
        Ok(exit) => Done::Exited(id, exit),
        Err(_) => Done::Answered,
    }
}
