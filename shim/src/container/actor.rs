//! The task itself: what it owns, what it is told, what comes back.

use std::collections::HashMap;
use std::path::PathBuf;

use containerd_shim_protos::events::task;
use log::{info, warn};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use tokio::sync::oneshot;
use tokio::task::{JoinHandle, JoinSet};

use super::process::{
    Exec, ExecFiles, Process, answer, exec_process, restore, start_exec, tell_exit,
};
use super::{Shared, known_cgroup, take_down, watched};
use crate::bundle;
use crate::cgroup::{Cgroup, OomKills};
use crate::convert::wire_pid;
use crate::error::{Error, IoError, Result};
use crate::events::Event;
use crate::exits::{Claim, Exit};
use crate::io::{self, Io};
use crate::mailbox::{Command, Deleted, Owner, ProcessId, Reply, View, no_process};
use crate::runc::{Runc, Started};
use crate::state::{Call, State};

/// The exit status after SIGKILL.
const KILLED: u32 = 128 + 9;

/// What a job brings back.
pub(super) enum Done {
    /// A process has ended.
    Exited(ProcessId, Exit),
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
                () = oom_kill(&mut self.oom_kills), if !self.init.starting => self.tell_oom(),
            }
        }
    }

    fn command(&mut self, command: Command) {
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

    /// Takes in what a job brought back. True when nothing is left to do.
    fn done(&mut self, done: Done) -> bool {
        match done {
            Done::Exited(id, exit) => {
                if let Ok(process) = self.process(&id) {
                    process.ended = Some(exit);
                }
                if id == ProcessId::Init {
                    self.init_ending = None;
                    self.end_the_rest();
                }
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
                answer(reply, self.exec_started(&id, result));
                if self.init.ended.is_some() {
                    // It slipped in after the others had been ended.
                    self.end_the_rest();
                }
                self.tell_exits();
            }
            Done::Frozen(call, result, reply) => answer(reply, self.frozen(call, result)),
            Done::TakenDown(result) => return self.taken_down(result),
            Done::Answered => {}
        }
        false
    }

    fn init_started(&mut self, started: Result<Pid>, reply: Reply<Pid>) {
        self.init.starting = false;
        if let Ok(pid) = &started {
            self.init.set_state(State::Running);
            info!("container {}: started", self.id);
            self.shared.events.send(&Event::started(&self.id, *pid));
        }
        answer(reply, started);
        self.tell_exits();
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
        // The waiter has not handed the pid over, or the claim holds its exit: the pidfd is of no other process, or of
        // none.
        let pidfd = match pidfd_open(started.pid, PidfdFlags::empty()) {
            Err(rustix::io::Errno::SRCH) => None,
            opened => Some(opened),
        };
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
        let over = self.init.ended.is_some() || self.init.state().exit().is_some();
        let checked = self.process(&id).and_then(|process| {
            process.state().check(Call::Start)?;
            if over {
                return Err(Error::FailedPrecondition("the container has ended".into()));
            }
            if process.starting || process.ended.is_some() {
                return Err(Error::FailedPrecondition(
                    "the process is being started, or has ended".into(),
                ));
            }
            process.io.start()?;
            process.starting = true;
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

    fn exec(&mut self, id: String, process: &[u8], io: io::Request) -> Result<()> {
        self.init.state().check(Call::Exec)?;
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
        self.process(&id)?.starting = false;
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

    /// Tells of the exits that may be told now: after the start of the process, and the init's after its execs'.
    fn tell_exits(&mut self) {
        let execs = self.execs.values().map(|exec| &exec.process);
        let ends: Vec<Exit> = execs
            .chain([&self.init])
            .filter_map(|process| process.ended)
            .collect();
        let look = if ends.iter().any(|exit| exit.status == KILLED) {
            OomKills::look_after_a_kill
        } else {
            OomKills::look
        };
        if !self.init.starting && !ends.is_empty() && self.oom_kills.as_mut().is_some_and(look) {
            // It may be what ended the process, and is told before its exit.
            self.tell_oom();
        }
        let (id, events) = (&self.id, &self.shared.events);
        for (exec, Exec { process, .. }) in &mut self.execs {
            if !process.starting {
                tell_exit(id, exec, process, events);
            }
        }
        let lives = |exec: &Exec| exec.process.lives();
        if self.init.starting || self.saving || self.execs.values().any(lives) {
            return;
        }
        if let Some(exit) = tell_exit(id, id, &mut self.init, events) {
            info!("container {id}: exited, status {}", exit.status);
            self.oom_kills = None;
            if !self.deleted.is_empty() {
                self.take_down();
            }
        }
    }

    fn tell_oom(&self) {
        info!("container {}: out of memory, a process was killed", self.id);
        self.shared.events.send(&Event::oom(&self.id));
    }

    fn delete_exec(&mut self, exec: &str) -> Result<Deleted> {
        let id = ProcessId::Exec(exec.to_owned());
        let process = self.process(&id)?;
        process.state().check(Call::Delete)?;
        if process.starting {
            return Err(Error::FailedPrecondition(
                "the process is being started".into(),
            ));
        }
        let deleted = Deleted {
            pid: process.pid(),
            exit: process.state().exit().unwrap_or(Exit::now(0)),
        };
        if let Some(exec) = self.execs.remove(exec) {
            exec.files.remove();
            self.ending.retain(|ending| !ending.is_finished());
            self.ending.extend(exec.process.io.end());
        }
        self.owner.views.remove(&id);
        Ok(deleted)
    }

    fn delete(&mut self, reply: Reply<Deleted>) {
        if !self.deleted.is_empty() {
            return self.deleted.push(reply);
        }
        let state = self.init.state();
        let checked = state.check(Call::Delete).and_then(|()| {
            if self.init.starting {
                return Err(Error::FailedPrecondition(
                    "the container is being started".into(),
                ));
            }
            Ok(())
        });
        match (checked, state) {
            (Err(error), _) => answer(reply, Err(error)),
            (Ok(()), State::Stopped(_)) => {
                self.deleted.push(reply);
                self.take_down();
            }
            // Not restored yet.
            (Ok(()), State::Created) if self.init.pid().is_none() => {
                self.deleted.push(reply);
                self.take_down();
            }
            (Ok(()), State::Created | State::Running | State::Paused) => {
                // Never started: ended first, and taken down when it has.
                match self.signal(&ProcessId::Init, Signal::KILL) {
                    Ok(()) | Err(Error::NotFound(_)) => self.deleted.push(reply),
                    Err(error) => answer(reply, Err(error)),
                }
            }
        }
    }

    fn take_down(&mut self) {
        let (bundle, runc) = (self.bundle.clone(), self.runc.clone());
        let mut ending = std::mem::take(&mut self.ending);
        let execs = self.execs.values_mut().map(|exec| &mut exec.process);
        for process in execs.chain([&mut self.init]) {
            ending.extend(std::mem::replace(&mut process.io, Io::none()).end());
        }
        self.jobs.spawn(async move {
            let taken_down = take_down(&bundle, runc.delete().await).await;
            // After the answer the shim may have to end, and files and loggers must have all by then.
            for ending in ending {
                // It does not panic, and is not aborted.
                let _ = ending.await;
            }
            Done::TakenDown(taken_down)
        });
    }

    /// True when the container is gone. If something is left, the caller is told, and may try again.
    fn taken_down(&mut self, result: Result<()>) -> bool {
        let mut replies = std::mem::take(&mut self.deleted).into_iter();
        let Some(reply) = replies.next() else {
            return false;
        };
        if let Err(error) = result {
            for other in replies {
                let left = format!("container {} is not deleted: {error}", self.id);
                answer(other, Err(Error::FailedPrecondition(left)));
            }
            answer(reply, Err(error));
            return false;
        }
        let noted = bundle::set_deleted(&self.bundle)
            .and_then(|()| bundle::forget(&self.shared.first_bundle, &self.id));
        if let Err(error) = noted {
            warn!("container {}: {error}", self.id);
        }
        let deleted = Deleted {
            pid: self.init.pid(),
            exit: self.init.state().exit().unwrap_or(Exit::now(0)),
        };
        info!("container {}: deleted", self.id);
        self.shared
            .events
            .send(&Event::deleted(&self.id, deleted.pid, deleted.exit));
        // Gone before the answer, so that a Shutdown that follows it finds the container gone.
        self.owner.calls.close();
        answer(reply, Ok(deleted));
        for other in replies {
            answer(other, Err(no_process(&ProcessId::Init)));
        }
        true
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
