//! The actor, the task that owns a container: the state, the requests, and the results of the jobs.

use std::collections::HashMap;
use std::path::PathBuf;

use log::info;
use rustix::process::Pid;
use tokio::task::{JoinHandle, JoinSet};

use super::Shared;
use super::event::Event;
use super::mailbox::{Deleted, Inbox, ProcessId, Reply, Request, answer, no_process};
use super::process::{Exec, Process};
use super::state::{Call, Checkpointing, End, Life, Output};
use crate::error::{Error, Result};
use crate::io::{Io, StreamOwner, Writer};
use crate::kernel::cgroup::{Cgroup, OomKills};
use crate::kernel::exits::{Claim, Exit, Exited};
use crate::runtime::runc::Runc;
use crate::runtime::teardown::Remains;

/// The number of SIGKILL, as in a Kill.
const SIGKILL: u32 = 9;

/// The result of a job.
pub(super) enum Done {
    /// A process has ended.
    Exited(ProcessId, Exit),
    /// The output of the init has been read, or the wait for the reader is over.
    Delivered,
    /// `runc start` of the init is over.
    InitStarted(Result<()>, Reply<Pid>),
    /// `runc exec` is over.
    ExecStarted(String, Result<(Claim, Io)>, Reply<Pid>),
    /// `runc restore` is over.
    Restored(Result<(Claim, Io)>, Reply<Pid>),
    /// `runc checkpoint` is over.
    Saved(PathBuf, Result<()>, Reply<()>),
    /// The container is frozen or thawed.
    Frozen(Call, Result<()>, Reply<()>),
    /// The container is taken down.
    TakenDown(Result<()>),
    /// Nothing is left to do: the job has answered the caller itself, or there is no caller.
    Answered,
}

/// The state of the actor.
pub(super) struct Actor {
    pub(super) id: String,
    /// The container's name in Kubernetes, for the log; empty elsewhere.
    pub(super) name: Box<str>,
    /// What the deletion takes down. Has the path of the bundle, too.
    pub(super) remains: Remains,
    /// The owner of the processes' streams.
    pub(super) stream_owner: StreamOwner,
    /// Who writes the output FIFOs of the init.
    pub(super) writer: Writer,
    /// Processes of the container may outlive the init.
    pub(super) shares_processes: bool,
    pub(super) shared: Shared,
    pub(super) runc: Runc,
    pub(super) cgroup: Option<Cgroup>,
    /// The watch over OOM kills, until the exit of the init is published. None before a restore, and where the kernel
    /// does not count the memory.
    pub(super) oom_kills: Option<OomKills>,
    /// The checkpoint to restore the init from; none for an init that `runc create` has made.
    pub(super) image: Option<PathBuf>,
    pub(super) checkpointing: Checkpointing,
    pub(super) init: Process,
    pub(super) execs: HashMap<String, Exec>,
    /// The number of execs so far, deleted ones included.
    pub(super) exec_count: u64,
    /// The number of updates so far.
    pub(super) update_count: u64,
    pub(super) inbox: Inbox,
    pub(super) jobs: JoinSet<Done>,
    /// Tasks that deliver the last output of deleted execs to files and loggers.
    pub(super) ending: Vec<JoinHandle<()>>,
    /// The callers that wait for the deletion of the container. The first gets the exit, the others get `NotFound`.
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
                request = self.inbox.requests.recv() => match request {
                    Some(request) => self.request(request),
                    None => return,
                },
                // An OOM kill during the start is published after the start.
                () = oom_kill(&mut self.oom_kills), if !self.init.life().is_starting() => {
                    self.publish_oom();
                }
            }
        }
    }

    fn request(&mut self, request: Request) {
        let Some(request) = self.unless_starting(request) else {
            return;
        };
        match request {
            Request::Start(id, reply) => self.start(id, reply),
            Request::Exec(id, process, io, reply) => answer(reply, self.exec(id, &process, io)),
            Request::Kill(id, signal, scope, reply) => self.kill(&id, signal, scope, reply),
            Request::Delete(ProcessId::Init, reply) => self.delete(reply),
            Request::Delete(ProcessId::Exec(id), reply) => answer(reply, self.delete_exec(&id)),
            Request::Pause(reply) => self.freeze(Call::Pause, reply),
            Request::Resume(reply) => self.freeze(Call::Resume, reply),
            Request::Update(resources, reply) => self.update(resources, reply),
            Request::Checkpoint(checkpoint, reply) => self.checkpoint(checkpoint, reply),
            Request::Resize(id, size, reply) => {
                let resized = self
                    .process(&id)
                    .and_then(|process| process.io.resize(size));
                answer(reply, resized);
            }
            Request::CloseIo(id, reply) => {
                let closed = self.process(&id).map(|process| process.io.close_stdin());
                answer(reply, closed);
            }
            Request::Pids(reply) => self.pids(reply),
            Request::Stats(reply) => self.stats(reply),
        }
    }

    /// Returns the request, unless the request has to wait until the start of its process is over. A deletion waits for
    /// every start. A Kill, ResizePty or CloseIO waits for the start of a process without a pid: earlier, the call
    /// would find no process to signal and no stream to close, and the caller would take the call for done. A SIGKILL
    /// or a deletion of such a process hurries the start.
    fn unless_starting(&mut self, request: Request) -> Option<Request> {
        let (id, deletes, hurries) = match &request {
            Request::Kill(id, signal, ..) => (id, false, *signal == SIGKILL),
            Request::Resize(id, ..) | Request::CloseIo(id, _) => (id, false, false),
            Request::Delete(id, _) => (id, true, true),
            Request::Start(..)
            | Request::Exec(..)
            | Request::Pause(_)
            | Request::Resume(_)
            | Request::Update(..)
            | Request::Checkpoint(..)
            | Request::Pids(_)
            | Request::Stats(_) => return Some(request),
        };
        let Ok(process) = self.process(id) else {
            return Some(request);
        };
        let has_pid = process.child.is_some();
        match process.life_mut() {
            Life::Starting(start) if !has_pid || deletes => {
                start.waiting.push(request);
                if hurries && !has_pid {
                    start.hurry = None;
                }
                None
            }
            Life::Created
            | Life::Starting(_)
            | Life::Running
            | Life::Paused
            | Life::Ended(_)
            | Life::Failed(_)
            | Life::Stopped(_) => Some(request),
        }
    }

    /// Carries out the requests that waited for a start. The start is over and answered.
    pub(super) fn go_on(&mut self, waiting: Vec<Request>) {
        for request in waiting {
            self.request(request);
        }
    }

    /// Takes in the result of a job. Returns true when the container is deleted and the actor ends.
    fn done(&mut self, done: Done) -> bool {
        match done {
            Done::Exited(id, exit) => self.ended(&id, exit),
            Done::Delivered => {
                self.init.go_on(Life::delivered);
                self.publish_exits();
            }
            Done::InitStarted(result, reply) => {
                let pid = self.init.pid();
                let pid = pid.ok_or(Error::Internal("an init without a pid"));
                self.init_started(result.and(pid), reply);
            }
            Done::Restored(result, reply) => {
                let restored = result.map(|restored| self.restored(restored));
                self.init_started(restored, reply);
            }
            Done::Saved(image, result, reply) => {
                answer(reply, self.saved(image, result));
                self.publish_exits();
            }
            Done::ExecStarted(exec, result, reply) => self.exec_started(&exec, result, reply),
            Done::Frozen(call, result, reply) => answer(reply, self.frozen(call, result)),
            Done::TakenDown(result) => return self.taken_down(result),
            Done::Answered => {}
        }
        false
    }

    /// Takes in the end of a process.
    fn ended(&mut self, id: &ProcessId, exit: Exit) {
        let output = match id {
            ProcessId::Init => {
                self.end_the_rest();
                for exec in self.execs.values_mut() {
                    exec.process.life_mut().hurry();
                }
                self.await_readers()
            }
            // Nothing to wait for: the shim copies an exec's output, also after the exit.
            ProcessId::Exec(_) => Output::Delivered,
        };
        let held = false;
        if let Ok(process) = self.process(id) {
            process.go_on(|life| life.ended(End { exit, output, held }));
        }
        self.publish_exits();
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

    /// Takes in a process that runc has made, and awaits the exit in a job.
    pub(super) fn began(&mut self, id: &ProcessId, claim: Claim, io: Io) {
        let awaited = id.clone();
        if let Ok(process) = self.process(id) {
            process.has_begun(claim.child, io);
        }
        self.jobs.spawn(exited(awaited, claim.exit));
    }

    pub(super) fn publish_oom(&self) {
        info!(container = self.id; "out of memory, a process was killed");
        self.shared.events.send(Event::Oom {
            container: self.id.clone(),
        });
    }
}

/// Resolves when the kernel has killed a process for lack of memory. Never resolves without a watch.
async fn oom_kill(kills: &mut Option<OomKills>) {
    match kills {
        Some(kills) => kills.next().await,
        None => std::future::pending().await,
    }
}

async fn exited(id: ProcessId, exit: Exited) -> Done {
    match exit.await {
        Ok(exit) => Done::Exited(id, exit),
        Err(_) => Done::Answered,
    }
}
