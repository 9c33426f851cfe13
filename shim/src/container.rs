//! One task per container: it owns the init and the execs, and nobody else changes them.
//!
//! ```text
//!            ┌──────────────────────────── Actor ────────────────────────────┐
//!  commands ─▶ init: Process    execs: Process, Process, …                   ├─▶ events, in order
//!            │   ▲                ▲                                          ├─▶ views (State, Wait)
//!            │   └── jobs: a start that runs, an exit that is awaited ◀──────┼── runc, the waiter
//!            └───────────────────────────────────────────────────────────────┘
//! ```
//!
//! What takes time is a job, so a hanging `runc exec` does not keep a kill from its process. The order of events is kept
//! here and needs no locks: an exit that comes while a start is under way waits for it; the init's exit waits for its
//! execs' exits.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use containerd_shim_protos::events::task;
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::types::mount::Mount as WireMount;
use log::{info, warn};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use crate::bundle::{self, Record};
use crate::cgroup::Cgroup;
use crate::convert::{timestamp, wire_pid};
use crate::error::{Error, IoError, Result};
use crate::events::{Event, Events};
use crate::exits::{Claim, Exit, Exits};
use crate::io::{self, Io};
use crate::mailbox::{
    Command, Deleted, Handle, Listed, Owner, ProcessId, Reply, Target, View, no_process,
};
use crate::mounts::{self, Mount};
use crate::options::Options;
use crate::runc::{Runc, Started};
use crate::spec::Spec;
use crate::state::{Call, State};

/// What all containers of a shim have in common.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    /// containerd's namespace.
    pub(crate) namespace: Arc<str>,
    /// The bundle that the shim was started for.
    pub(crate) first_bundle: Arc<Path>,
    /// The waiter.
    pub(crate) exits: Arc<Exits>,
    /// The publisher.
    pub(crate) events: Events,
}

/// A container to be made.
#[derive(Debug)]
pub(crate) struct Create {
    /// Its id.
    pub(crate) id: String,
    /// Its bundle.
    pub(crate) bundle: PathBuf,
    /// What its root filesystem is mounted from.
    pub(crate) rootfs: Vec<WireMount>,
    /// Its streams.
    pub(crate) io: io::Request,
    /// Its spec.
    pub(crate) spec: Spec,
    /// The operator's settings.
    pub(crate) options: Options,
}

impl Create {
    /// The event that says that it is made.
    pub(crate) fn event(&self, pid: Pid) -> Event {
        Event::Create(task::TaskCreate {
            container_id: self.id.clone(),
            bundle: self.bundle.display().to_string(),
            rootfs: self.rootfs.clone(),
            io: MessageField::some(task::TaskIO {
                stdin: self.io.stdin.clone(),
                stdout: self.io.stdout.clone(),
                stderr: self.io.stderr.clone(),
                terminal: self.io.terminal,
                ..task::TaskIO::default()
            }),
            pid: wire_pid(Some(pid)),
            ..task::TaskCreate::default()
        })
    }
}

/// Makes a container and gives it to a task of its own. A failure leaves nothing behind.
///
/// # Errors
/// What mounting, the streams or runc say.
pub(crate) async fn create(shared: &Shared, create: Create) -> Result<(Handle, Pid)> {
    let runc = Runc::new(
        &create.id,
        &create.bundle,
        &shared.namespace,
        &create.options,
        &shared.exits,
    );
    let made = make(shared, &create, &runc).await;
    let (started, io) = match made {
        Ok(made) => made,
        Err(error) => {
            take_down(&create.bundle, &runc).await.unwrap_or_else(|e| {
                warn!("take down {} after a failed create: {e}", create.id);
            });
            return Err(error);
        }
    };
    let cgroup = Cgroup::of_pid(started.pid)
        .inspect_err(|e| warn!("container {}: {e}", create.id))
        .ok();
    let (handle, owner) = Handle::new(&create.bundle);
    let pid = started.pid;
    let event = create.event(pid);
    let view = owner.views.add(
        ProcessId::Init,
        View {
            pid: Some(pid),
            state: State::Created,
            io: create.io,
        },
    );
    let mut actor = Actor {
        id: create.id,
        bundle: create.bundle,
        shares_processes: create.spec.shares_process_namespace(),
        shared: shared.clone(),
        runc,
        cgroup,
        init: Process::new(view),
        execs: HashMap::new(),
        exec_count: 0,
        owner,
        jobs: JoinSet::new(),
        deleted: None,
    };
    info!("container {}: created, pid {pid}", actor.id);
    shared.events.send(&event);
    actor.began(&ProcessId::Init, started, io);
    tokio::spawn(actor.run());
    Ok((handle, pid))
}

async fn make(shared: &Shared, create: &Create, runc: &Runc) -> Result<(Started, Io)> {
    Record {
        bundle: create.bundle.clone(),
        runc: Some(runc.record().clone()),
        cgroups_path: create.spec.cgroups_path().map(str::to_owned),
    }
    .save(&shared.first_bundle, &create.id)?;
    mount_rootfs(create).await?;
    let (prepared, streams) = create.io.prepare(&create.bundle, "console")?;
    let started = runc.create(streams).await?;
    let io = prepared.attach().await?;
    Ok((started, io))
}

async fn mount_rootfs(create: &Create) -> Result<()> {
    if create.rootfs.is_empty() {
        return Ok(());
    }
    let rootfs = create.bundle.join("rootfs");
    let mounts: Vec<Mount> = create.rootfs.iter().map(mount).collect();
    blocking(move || {
        std::fs::create_dir_all(&rootfs).map_err(IoError::at("create", &rootfs))?;
        // Whatever is mounted there goes when the container is taken down.
        let _ = mounts::mount_all(&mounts, &rootfs)?;
        Ok(())
    })
    .await
}

fn mount(wire: &WireMount) -> Mount {
    Mount {
        kind: wire.type_.clone(),
        source: wire.source.clone(),
        target: wire.target.clone(),
        options: wire.options.clone(),
    }
}

/// Removes what runc and the kernel know of a container. Goes on after a failure, and returns the first.
async fn take_down(bundle: &Path, runc: &Runc) -> Result<()> {
    let deleted = runc.delete().await;
    let rootfs = bundle.join("rootfs");
    let unmounted = blocking(move || Ok(mounts::unmount(&rootfs)?)).await;
    deleted.and(unmounted)
}

/// Runs what may block away from the reactor.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Error::Internal("a blocking task was cancelled"))?
}

/// A process of the container.
#[derive(Debug)]
struct Process {
    view: watch::Sender<View>,
    pidfd: Option<OwnedFd>,
    io: Io,
    /// A start is under way.
    starting: bool,
    /// It has ended, and nobody has been told yet.
    ended: Option<Exit>,
}

impl Process {
    fn new(view: watch::Sender<View>) -> Self {
        Self {
            view,
            pidfd: None,
            io: Io::Closed,
            starting: false,
            ended: None,
        }
    }

    fn state(&self) -> State {
        self.view.borrow().state
    }

    fn pid(&self) -> Option<Pid> {
        self.view.borrow().pid
    }

    fn set_state(&self, state: State) {
        self.view.send_modify(|view| view.state = state);
    }

    /// Whether it runs, or is about to.
    fn lives(&self) -> bool {
        self.starting || matches!(self.state(), State::Running | State::Paused)
    }
}

/// A process that was added.
#[derive(Debug)]
struct Exec {
    process: Process,
    files: ExecFiles,
}

/// What a job brings back.
enum Done {
    /// A process has ended.
    Exited(ProcessId, Exit),
    /// `runc start` of the init is over.
    InitStarted(Result<()>, Reply<Pid>),
    /// `runc exec` is over.
    ExecStarted(String, Result<(Started, Io)>, Reply<Pid>),
    /// The container is frozen or thawed.
    Frozen(Call, Result<()>, Reply<()>),
    /// The container is taken down.
    TakenDown(Result<()>),
    /// Somebody else has got the answer.
    Answered,
}

struct Actor {
    id: String,
    bundle: PathBuf,
    /// Processes of the container may outlive its init.
    shares_processes: bool,
    shared: Shared,
    runc: Runc,
    cgroup: Option<Cgroup>,
    init: Process,
    execs: HashMap<String, Exec>,
    /// How many execs there have been.
    exec_count: u64,
    owner: Owner,
    jobs: JoinSet<Done>,
    /// Who waits for the container to be deleted.
    deleted: Option<Reply<Deleted>>,
}

impl Actor {
    async fn run(mut self) {
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
            Command::Pids(reply) => answer(reply, self.pids()),
            Command::Stats(reply) => answer(reply, self.stats()),
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
                    self.end_the_rest();
                }
                self.tell_exits();
            }
            Done::InitStarted(result, reply) => {
                self.init.starting = false;
                let started = result.and_then(|()| {
                    self.init.set_state(State::Running);
                    self.init.pid().ok_or(Error::Internal("an init without a pid"))
                });
                if let Ok(pid) = &started {
                    info!("container {}: started", self.id);
                    self.shared.events.send(&Event::Start(task::TaskStart {
                        container_id: self.id.clone(),
                        pid: wire_pid(Some(*pid)),
                        ..task::TaskStart::default()
                    }));
                }
                answer(reply, started);
                self.tell_exits();
            }
            Done::ExecStarted(id, result, reply) => {
                answer(reply, self.exec_started(&id, result));
                self.tell_exits();
            }
            Done::Frozen(call, result, reply) => answer(reply, self.frozen(call, result)),
            Done::TakenDown(result) => return self.taken_down(result),
            Done::Answered => {}
        }
        false
    }

    fn process(&mut self, id: &ProcessId) -> Result<&mut Process> {
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
    fn began(&mut self, id: &ProcessId, started: Started, io: Io) {
        // The waiter has not handed the pid over, or the claim holds its exit: the pidfd is of no other process, or of
        // none.
        let pidfd = pidfd_open(started.pid, PidfdFlags::empty()).ok();
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
        let checked = self.process(&id).and_then(|process| {
            process.state().check(Call::Start)?;
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
            (Ok(_), ProcessId::Init) => {
                self.jobs
                    .spawn(async move { Done::InitStarted(runc.start().await, reply) });
            }
            (Ok(io), ProcessId::Exec(exec)) => {
                let Some(files) = self.execs.get(&exec).map(|exec| exec.files.clone()) else {
                    return answer(reply, Err(no_process(&ProcessId::Exec(exec))));
                };
                self.jobs.spawn(async move {
                    let result = start_exec(&runc, &files, &io).await;
                    Done::ExecStarted(exec, result, reply)
                });
            }
        }
    }

    fn exec(&mut self, id: String, process: &[u8], io: io::Request) -> Result<()> {
        self.init.state().check(Call::Exec)?;
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

    fn kill(&mut self, id: &ProcessId, signal: u32, target: Target, reply: Reply<()>) {
        let number = i32::try_from(signal).unwrap_or_default();
        match (Signal::from_named_raw(number), target) {
            (Some(signal), Target::All) => self.kill_all(signal, reply),
            (Some(signal), Target::Process) => answer(reply, self.signal(id, signal)),
            // Real-time signals have no name that our library knows.
            (None, _) if *id == ProcessId::Init && self.init.ended.is_none() => {
                let runc = self.runc.clone();
                self.jobs.spawn(async move {
                    answer(reply, runc.kill(signal).await);
                    Done::Answered
                });
            }
            (None, _) => answer(
                reply,
                Err(Error::InvalidArgument(format!("no signal {signal}"))),
            ),
        }
    }

    fn signal(&mut self, id: &ProcessId, signal: Signal) -> Result<()> {
        let process = self.process(id)?;
        process.state().check(Call::Kill)?;
        if process.ended.is_some() {
            return State::Stopped(Exit::now(0)).check(Call::Kill);
        }
        let paused = process.state() == State::Paused;
        let Some(pidfd) = &process.pidfd else {
            return match process.pid() {
                None => Err(Error::FailedPrecondition(
                    "the process has not been started".into(),
                )),
                Some(_) => Err(Error::NotFound("process already finished".into())),
            };
        };
        match pidfd_send_signal(pidfd, signal) {
            Ok(()) => {}
            Err(rustix::io::Errno::SRCH) => {
                return Err(Error::NotFound("process already finished".into()));
            }
            Err(error) => return Err(IoError::at("send a signal to", "pidfd")(error).into()),
        }
        if paused && signal == Signal::KILL {
            // On cgroup v1 a frozen process does not even die.
            self.cgroup()?.thaw()?;
        }
        Ok(())
    }

    fn kill_all(&mut self, signal: Signal, reply: Reply<()>) {
        let checked = self.init.state().check(Call::Kill);
        let cgroup = match checked.and_then(|()| self.cgroup().cloned()) {
            Ok(cgroup) => cgroup,
            Err(error) => return answer(reply, Err(error)),
        };
        self.jobs.spawn(async move {
            let killed = blocking(move || signal_all(&cgroup, signal)).await;
            answer(reply, killed);
            Done::Answered
        });
    }

    /// The init has ended: where the kernel does not end the container's other processes with it, this does.
    fn end_the_rest(&mut self) {
        if !self.shares_processes {
            return;
        }
        let Some(cgroup) = self.cgroup.clone() else {
            return;
        };
        let id = self.id.clone();
        self.jobs.spawn(async move {
            let killed = blocking(move || Ok(cgroup.kill_all()?)).await;
            killed.unwrap_or_else(|e| warn!("container {id}: end the remaining processes: {e}"));
            Done::Answered
        });
    }

    /// Tells of the exits that may be told now: after the start of the process, and the init's after its execs'.
    fn tell_exits(&mut self) {
        let (id, events) = (&self.id, &self.shared.events);
        for (exec, Exec { process, .. }) in &mut self.execs {
            if !process.starting {
                tell_exit(id, exec, process, events);
            }
        }
        let lives = |exec: &Exec| exec.process.lives();
        if self.init.starting || self.execs.values().any(lives) {
            return;
        }
        if let Some(exit) = tell_exit(id, id, &mut self.init, events) {
            info!("container {id}: exited, status {}", exit.status);
            if self.deleted.is_some() {
                self.take_down();
            }
        }
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
        }
        self.owner.views.remove(&id);
        Ok(deleted)
    }

    fn delete(&mut self, reply: Reply<Deleted>) {
        let busy = self.init.starting || self.deleted.is_some();
        let checked = self.init.state().check(Call::Delete).and_then(|()| {
            if busy {
                return Err(Error::FailedPrecondition(
                    "the container is being started or deleted".into(),
                ));
            }
            Ok(self.init.state())
        });
        match checked {
            Err(error) => answer(reply, Err(error)),
            Ok(State::Stopped(_)) => {
                self.deleted = Some(reply);
                self.take_down();
            }
            Ok(State::Created | State::Running | State::Paused) => {
                // Never started: ended first, and taken down when it has.
                match self.signal(&ProcessId::Init, Signal::KILL) {
                    Ok(()) | Err(Error::NotFound(_)) => self.deleted = Some(reply),
                    Err(error) => answer(reply, Err(error)),
                }
            }
        }
    }

    fn take_down(&mut self) {
        let (bundle, runc) = (self.bundle.clone(), self.runc.clone());
        self.jobs
            .spawn(async move { Done::TakenDown(take_down(&bundle, &runc).await) });
    }

    /// True when the container is gone. If something is left, the caller is told, and may try again.
    fn taken_down(&mut self, result: Result<()>) -> bool {
        let Some(reply) = self.deleted.take() else {
            return false;
        };
        if let Err(error) = result {
            answer(reply, Err(error));
            return false;
        }
        if let Err(error) = bundle::forget(&self.shared.first_bundle, &self.id) {
            warn!("container {}: {error}", self.id);
        }
        let deleted = Deleted {
            pid: self.init.pid(),
            exit: self.init.state().exit().unwrap_or(Exit::now(0)),
        };
        info!("container {}: deleted", self.id);
        self.shared.events.send(&Event::Delete(task::TaskDelete {
            container_id: self.id.clone(),
            pid: wire_pid(deleted.pid),
            exit_status: deleted.exit.status,
            exited_at: timestamp(deleted.exit.at).into(),
            ..task::TaskDelete::default()
        }));
        // Gone before the answer, so that a Shutdown that follows it finds the container gone.
        self.owner.calls.close();
        answer(reply, Ok(deleted));
        true
    }

    fn freeze(&mut self, call: Call, reply: Reply<()>) {
        let checked = self.init.state().check(call).and_then(|()| self.cgroup().cloned());
        let cgroup = match checked {
            Ok(cgroup) => cgroup,
            Err(error) => return answer(reply, Err(error)),
        };
        // The kernel takes its time until every process stands still.
        self.jobs.spawn(async move {
            let pausing = call == Call::Pause;
            let frozen = blocking(move || {
                Ok(if pausing { cgroup.freeze()? } else { cgroup.thaw()? })
            });
            Done::Frozen(call, frozen.await, reply)
        });
    }

    fn frozen(&mut self, call: Call, result: Result<()>) -> Result<()> {
        result?;
        // It may have ended meanwhile.
        self.init.state().check(call)?;
        let container_id = self.id.clone();
        let (state, event) = if call == Call::Pause {
            let event = task::TaskPaused {
                container_id,
                ..task::TaskPaused::default()
            };
            (State::Paused, Event::Paused(event))
        } else {
            let event = task::TaskResumed {
                container_id,
                ..task::TaskResumed::default()
            };
            (State::Running, Event::Resumed(event))
        };
        self.init.set_state(state);
        self.shared.events.send(&event);
        Ok(())
    }

    fn update(&mut self, resources: Vec<u8>, reply: Reply<()>) {
        if let Err(error) = self.init.state().check(Call::Update) {
            return answer(reply, Err(error));
        }
        let (runc, file) = (self.runc.clone(), self.bundle.join("resources.json"));
        self.jobs.spawn(async move {
            let updated = match std::fs::write(&file, resources) {
                Ok(()) => runc.update(&file).await,
                Err(error) => Err(IoError::at("write", &file)(error).into()),
            };
            answer(reply, updated);
            Done::Answered
        });
    }

    /// The processes of the container. Of one that has ended its init is still listed until it is deleted: containerd
    /// asks after a restart, takes a container without processes for a leak, and loses its exit code.
    fn pids(&self) -> Result<Vec<Listed>> {
        let mut pids = match &self.cgroup {
            Some(cgroup) if self.init.state().exit().is_none() => cgroup.pids()?,
            _ => Vec::new(),
        };
        if let Some(init) = self.init.pid().filter(|init| !pids.contains(init)) {
            pids.insert(0, init);
        }
        let exec_id = |pid| {
            let of = |(_, exec): &(&String, &Exec)| exec.process.pid() == Some(pid);
            self.execs.iter().find(of).map(|(id, _)| id.clone())
        };
        Ok(pids
            .into_iter()
            .map(|pid| Listed {
                pid,
                exec_id: exec_id(pid),
            })
            .collect())
    }

    fn stats(&self) -> Result<containerd_shim_protos::protobuf::well_known_types::any::Any> {
        if self.init.state().exit().is_some() {
            return Err(Error::NotFound(format!("{} has ended", self.id)));
        }
        Ok(self.cgroup()?.stats()?)
    }

    fn cgroup(&self) -> Result<&Cgroup> {
        self.cgroup
            .as_ref()
            .ok_or_else(|| Error::NotFound(format!("cgroup of {} not found", self.id)))
    }
}

fn signal_all(cgroup: &Cgroup, signal: Signal) -> Result<()> {
    if signal == Signal::KILL {
        return Ok(cgroup.kill_all()?);
    }
    for pid in cgroup.pids()? {
        // One that has ended in between needs no signal.
        if let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) {
            let _ = pidfd_send_signal(pidfd, signal);
        }
    }
    Ok(())
}

async fn exited(id: ProcessId, exit: Claim) -> Done {
    match exit.await {
        Ok(exit) => Done::Exited(id, exit),
        Err(_) => Done::Answered,
    }
}

/// Tells of the exit of `process`, once.
fn tell_exit(container: &str, id: &str, process: &mut Process, events: &Events) -> Option<Exit> {
    let exit = process.ended.take()?;
    process.io.close();
    process.pidfd = None;
    let pid = process.pid();
    process.set_state(State::Stopped(exit));
    events.send(&Event::Exit(task::TaskExit {
        container_id: container.to_owned(),
        id: id.to_owned(),
        pid: wire_pid(pid),
        exit_status: exit.status,
        exited_at: timestamp(exit.at).into(),
        ..task::TaskExit::default()
    }));
    Some(exit)
}

/// The files of an exec in the bundle.
#[derive(Debug, Clone)]
struct ExecFiles {
    bundle: PathBuf,
    console: String,
    process: PathBuf,
    pid: PathBuf,
}

impl ExecFiles {
    /// The files of the exec with this number: an id may be what no file name can be, and may come again.
    fn new(bundle: &Path, number: u64) -> Self {
        Self {
            bundle: bundle.to_owned(),
            console: format!("console-{number}"),
            process: bundle.join(format!("exec-{number}.json")),
            pid: bundle.join(format!("exec-{number}.pid")),
        }
    }

    /// What stays goes with the bundle.
    fn remove(&self) {
        let _ = std::fs::remove_file(&self.process);
        let _ = std::fs::remove_file(&self.pid);
    }
}

async fn start_exec(runc: &Runc, files: &ExecFiles, io: &io::Request) -> Result<(Started, Io)> {
    let (prepared, streams) = io.prepare(&files.bundle, &files.console)?;
    let started = runc.exec(&files.process, &files.pid, streams).await?;
    let attached = prepared.attach().await.and_then(|mut io| {
        io.start()?;
        Ok(io)
    });
    match attached {
        Ok(io) => Ok((started, io)),
        Err(error) => {
            // Without its streams it must not run on unseen.
            if let Ok(pidfd) = pidfd_open(started.pid, PidfdFlags::empty()) {
                let _ = pidfd_send_signal(pidfd, Signal::KILL);
            }
            Err(error)
        }
    }
}

fn answer<T>(reply: oneshot::Sender<Result<T>>, result: Result<T>) {
    // The caller may have given up; the work is done all the same.
    let _ = reply.send(result);
}
