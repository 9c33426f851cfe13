//! The owner of the sandbox: one task that has the [`pause::Sandbox`] and answers what containerd asks of a pod's sandbox.
//!
//! ```text
//!  Create ──▶ namespaces stand (Created) ──Start──▶ Running ──Kill, Stop, or PID 1 ends──▶ Stopped ──Delete──▶ gone
//! ```
//!
//! In podsandbox mode containerd takes the sandbox for a container like any other, with a pid whose `/proc/PID/ns` the pod's
//! containers join. No program runs in the sandbox, so there is nothing to execute into, to freeze or to limit.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use log::{info, warn};
use rustix::process::{Pid, Signal};
use tokio::sync::{mpsc, watch};

use super::files::PodFiles;
use crate::container::event::Event;
use crate::container::mailbox::{Deleted, Mailbox, ProcessId, Reply, View, answer, no_process};
use crate::container::state::{Call, Status};
use crate::container::{Create, Shared};
use crate::error::{Error, Result, first_failure};
use crate::io;
use crate::kernel::blocking;
use crate::kernel::cgroup::{Cgroup, Driver, Metrics};
use crate::kernel::exits::{Exit, Exited};
use crate::runtime::bundle::Record;
use crate::runtime::options::{Holder, Options};
use crate::runtime::teardown::{Remains, Why, take_down};

/// The exit status of a sandbox that is stopped: that after SIGKILL, as of a pause container.
const STOPPED: u32 = 128 + 9;

/// A sandbox to be made.
#[derive(Debug)]
pub struct Plan {
    /// The id.
    pub id: String,
    /// The bundle.
    pub bundle: PathBuf,
    /// What the kernel is asked for.
    pub config: pause::SandboxConfig,
    /// Where the cgroup is to be.
    pub cgroups_path: Option<String>,
    /// The form of that path.
    pub driver: Driver,
    /// The pod's containers see the node's processes.
    pub node_processes: bool,
    /// The operator's settings.
    pub options: Options,
    /// Who asked for the sandbox.
    pub origin: Origin,
}

/// Who asked for a sandbox, and what follows from that.
#[derive(Debug)]
pub enum Origin {
    /// The Task API, in podsandbox mode: containerd expects the events of a task, and asks for the streams.
    Task(Box<Create>),
    /// The Sandbox API: the sandbox is no task, and the shim makes the pod's files.
    Sandbox(PodFiles),
}

/// A sandbox that stands.
#[derive(Debug)]
pub struct Made {
    /// To talk to the sandbox.
    pub handle: Handle,
    /// The pid whose `/proc/PID/ns` has the pod's namespaces.
    pub pid: Pid,
    /// What holds the namespaces.
    pub kind: pause::HolderKind,
    /// Where the namespaces are that are not the node's.
    pub paths: BTreeMap<pause::Kind, PathBuf>,
}

/// A call to the owner of a sandbox.
#[derive(Debug)]
pub enum Request {
    /// Start: nothing changes but the state. The answer is the pid.
    Start(Reply<Pid>),
    /// Send a signal, as to a pause container.
    Kill(u32, Reply<()>),
    /// End the sandbox, unless the sandbox has ended.
    Stop(Reply<()>),
    /// End the sandbox, and take everything down.
    Delete(Reply<Deleted>),
    /// Read the cgroup's counters.
    Stats(Reply<Metrics>),
    /// Path of the process namespace that the pod shares; made with the first such call.
    SharedProcesses(Reply<PathBuf>),
}

/// The sandbox, seen from the rest of the shim.
#[derive(Debug, Clone)]
pub struct Handle {
    bundle: Arc<Path>,
    requests: Mailbox<Request>,
    view: watch::Receiver<View>,
}

impl Handle {
    /// The sandbox's bundle.
    pub fn bundle(&self) -> &Path {
        &self.bundle
    }

    /// Whether the sandbox is deleted.
    pub fn is_gone(&self) -> bool {
        self.requests.is_closed()
    }

    /// As [`Mailbox::ask`].
    ///
    /// # Errors
    /// As [`Mailbox::ask`].
    pub async fn ask<T>(&self, make: impl FnOnce(Reply<T>) -> Request) -> Result<T> {
        self.requests.ask(make).await
    }

    /// The latest view.
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// Waits for the end of the sandbox.
    ///
    /// # Errors
    /// `NotFound` when the sandbox is deleted before it ended.
    pub async fn wait(&self) -> Result<Exit> {
        let exit = View::published_exit(self.view.clone()).await;
        exit.ok_or_else(|| no_process(&ProcessId::Init))
    }

    /// Ends the sandbox, and waits for the end.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn stop(&self) -> Result<()> {
        self.ask(Request::Stop).await?;
        self.wait().await?;
        Ok(())
    }
}

impl Plan {
    /// The sandbox that an OCI spec describes.
    pub fn of_task(create: Create) -> Self {
        Self {
            id: create.id.clone(),
            bundle: create.bundle.clone(),
            config: create.spec.sandbox(create.options.pause_holder()),
            cgroups_path: create.spec.cgroups_path().map(str::to_owned),
            driver: Driver::of(create.options.systemd_cgroup),
            node_processes: !create.spec.has_pid_namespace(),
            options: create.options.clone(),
            origin: Origin::Task(Box::new(create)),
        }
    }

    fn files(&self) -> Option<&PodFiles> {
        match &self.origin {
            Origin::Task(_) => None,
            Origin::Sandbox(files) => Some(files),
        }
    }

    fn remains(&self, first_bundle: &Path) -> Remains {
        let files = self.files();
        Remains {
            id: self.id.clone(),
            record: Record {
                bundle: self.bundle.clone(),
                mounts_rootfs: false,
                runc: None,
                systemd_cgroup: self.driver == Driver::Systemd,
                cgroups_path: self.cgroups_path.clone(),
            },
            runc: None,
            first_bundle: first_bundle.to_owned(),
            mount_points: files.and_then(PodFiles::mount_point).into_iter().collect(),
            directories: files.map(PodFiles::directory).into_iter().collect(),
        }
    }

    /// The streams that containerd is told when it asks.
    fn streams(&self) -> io::Request {
        match &self.origin {
            Origin::Task(create) => create.io.clone(),
            Origin::Sandbox(_) => io::Request::default(),
        }
    }
}

/// Makes a sandbox and gives the sandbox to a task of its own. A failure leaves nothing behind.
///
/// # Errors
/// `Sandbox` with the operation that failed, `Io` for the cgroup and the files, `FailedPrecondition` for a sandbox from a
/// checkpoint.
pub async fn create(shared: &Shared, plan: Plan) -> Result<Made> {
    if let Origin::Task(create) = &plan.origin
        && let Some(image) = &create.checkpoint
    {
        return Err(Error::FailedPrecondition(format!(
            "create {} from checkpoint {}: a sandbox runs no program",
            create.id,
            image.display()
        )));
    }
    let remains = plan.remains(&shared.first_bundle);
    // The record is written before anything is made.
    let made = match remains.record.save(&shared.first_bundle, &plan.id) {
        Ok(()) => make(shared, &plan).await,
        Err(error) => Err(error),
    };
    match made {
        Ok((sandbox, cgroup, process)) => {
            Ok(hand_over(shared, plan, remains, sandbox, cgroup, process))
        }
        Err(error) => {
            let taken_down = take_down(remains, Why::NotMade).await;
            taken_down.unwrap_or_else(|left| warn!("after a failed create: {left}"));
            Err(error)
        }
    }
}

/// Gives a sandbox that stands to a task of its own.
fn hand_over(
    shared: &Shared,
    plan: Plan,
    remains: Remains,
    sandbox: pause::Sandbox,
    cgroup: Option<Cgroup>,
    process: Option<Exited>,
) -> Made {
    let (pid, kind, paths) = (sandbox.pid(), sandbox.kind(), sandbox.paths());
    let (mailbox, requests) = Mailbox::new();
    let (view, seen) = watch::channel(View {
        pid: Some(pid),
        status: Status::Created,
        io: plan.streams(),
    });
    info!("sandbox {}: namespaces made, held by {pid}", plan.id);
    let handle = Handle {
        bundle: plan.bundle.into(),
        requests: mailbox,
        view: seen,
    };
    let actor = Actor {
        id: plan.id,
        remains,
        shared: shared.clone(),
        held: Some(sandbox),
        thread_only: plan.options.holder == Holder::Thread,
        node_processes: plan.node_processes,
        process,
        cgroup,
        origin: plan.origin,
        view,
        requests,
    };
    if let Origin::Task(create) = &actor.origin {
        actor.shared.events.send(create.event(Some(pid)));
    }
    tokio::spawn(actor.run());
    Made {
        handle,
        pid,
        kind,
        paths,
    }
}

/// The namespaces, the cgroup, and the exit of the process that the sandbox lives and dies with.
async fn make(
    shared: &Shared,
    plan: &Plan,
) -> Result<(pause::Sandbox, Option<Cgroup>, Option<Exited>)> {
    let cgroup = plan
        .cgroups_path
        .as_deref()
        .map(|path| Cgroup::at(path, plan.driver))
        .transpose()?;
    let (config, files) = (plan.config.clone(), plan.files().cloned());
    // A process of the sandbox may end before the pid is known here.
    let _expected = shared.exits.expect();
    let made = blocking::run(move || {
        if let Some(files) = &files {
            files.make()?;
        }
        let sandbox = pause::Sandbox::create(&config)?;
        match place(&sandbox, cgroup.as_ref()) {
            Ok(()) => Ok((sandbox, cgroup)),
            Err(error) => {
                sandbox.end();
                Err(error)
            }
        }
    });
    let (sandbox, cgroup) = made.await?;
    let process = match sandbox.kind() {
        pause::HolderKind::Thread => None,
        pause::HolderKind::Process => Some(shared.exits.claim(sandbox.pid()).exit),
    };
    Ok((sandbox, cgroup, process))
}

/// The cgroup exists although nothing may be in there: cAdvisor finds a pod's network counters by the cgroup's name.
fn place(sandbox: &pause::Sandbox, cgroup: Option<&Cgroup>) -> Result<()> {
    let Some(cgroup) = cgroup else {
        return Ok(());
    };
    cgroup.create()?;
    match sandbox.kind() {
        pause::HolderKind::Thread => Ok(()),
        pause::HolderKind::Process => Ok(cgroup.add(sandbox.pid())?),
    }
}

struct Actor {
    id: String,
    remains: Remains,
    shared: Shared,
    /// Until the sandbox has ended.
    held: Option<pause::Sandbox>,
    /// The operator wants no process: a pod that needs one is refused.
    thread_only: bool,
    /// The pod's containers see the node's processes.
    node_processes: bool,
    /// The exit of the process that the sandbox lives and dies with, if there is one.
    process: Option<Exited>,
    cgroup: Option<Cgroup>,
    origin: Origin,
    view: watch::Sender<View>,
    requests: mpsc::UnboundedReceiver<Request>,
}

impl Actor {
    async fn run(mut self) {
        loop {
            tokio::select! {
                exit = ended(&mut self.process) => {
                    self.end(exit);
                    self.clear_up().await;
                }
                request = self.requests.recv() => match request {
                    Some(request) => if self.request(request).await { return },
                    None => return,
                },
            }
        }
    }

    /// Carries out one call. True when nothing is left to do.
    async fn request(&mut self, request: Request) -> bool {
        match request {
            Request::Start(reply) => answer(reply, self.start()),
            Request::Kill(signal, reply) => {
                answer(reply, self.kill(signal));
                self.clear_up().await;
            }
            Request::Stop(reply) => {
                answer(reply, self.stop());
                self.clear_up().await;
            }
            Request::Delete(reply) => {
                let deleted = self.delete().await;
                let gone = deleted.is_ok();
                if gone {
                    // Before the answer, so that a Shutdown that follows it finds the sandbox gone.
                    self.requests.close();
                }
                answer(reply, deleted);
                return gone;
            }
            Request::Stats(reply) => answer(reply, self.stats()),
            Request::SharedProcesses(reply) => answer(reply, self.shared_processes().await),
        }
        false
    }

    fn status(&self) -> Status {
        self.view.borrow().status
    }

    fn pid(&self) -> Option<Pid> {
        self.view.borrow().pid
    }

    /// Publishes what happened to a task; a sandbox of the Sandbox API is none.
    fn publish(&self, event: Event) {
        match self.origin {
            Origin::Task(_) => self.shared.events.send(event),
            Origin::Sandbox(_) => {}
        }
    }

    /// Of the task: the sandbox's own cgroup. Through the Sandbox API: the pod's, which has the sandbox's own inside.
    fn stats(&self) -> Result<Metrics> {
        Ok(match (&self.origin, &self.cgroup) {
            (Origin::Task(_), Some(own)) => own.stats(),
            (Origin::Task(_), None) => {
                return Err(Error::NotFound(format!(
                    "sandbox {} has no cgroup",
                    self.id
                )));
            }
            (Origin::Sandbox(_), Some(own)) => own.parent().stats(),
            // A pod without a cgroup: the shim is all that is known to be the pod's own.
            (Origin::Sandbox(_), None) => Cgroup::of_pid(rustix::process::getpid())?.stats(),
        }?)
    }

    fn start(&mut self) -> Result<Pid> {
        self.status().check(Call::Start)?;
        let pid = self
            .pid()
            .ok_or(Error::Internal("a sandbox without a pid"))?;
        self.view.send_modify(|view| view.status = Status::Running);
        info!("sandbox {}: started", self.id);
        self.publish(Event::Start {
            container: self.id.clone(),
            pid,
        });
        Ok(pid)
    }

    fn kill(&mut self, signal: u32) -> Result<()> {
        self.status().check(Call::Kill)?;
        let number = i32::try_from(signal).unwrap_or_default();
        match Signal::from_named_raw(number) {
            Some(signal) => self.signal(signal),
            // As the pause program: a signal that has no effect there has none here.
            None => Ok(()),
        }
    }

    fn stop(&mut self) -> Result<()> {
        match self.status().exit() {
            Some(_) => Ok(()),
            None => self.signal(Signal::KILL),
        }
    }

    fn signal(&mut self, signal: Signal) -> Result<()> {
        let Some(sandbox) = &self.held else {
            return Err(Error::NotFound(format!("sandbox {} has ended", self.id)));
        };
        match sandbox.signal(signal)? {
            pause::Signalled::Ends(status) => self.end(Exit::now(status)),
            pause::Signalled::Delivered | pause::Signalled::Nothing => {}
        }
        Ok(())
    }

    /// The sandbox is over: lets go of the namespaces and publishes the exit, once.
    fn end(&mut self, exit: Exit) {
        self.process = None;
        let Some(sandbox) = self.held.take() else {
            return;
        };
        sandbox.end();
        info!("sandbox {}: ended, status {}", self.id, exit.status);
        self.view
            .send_modify(|view| view.status = Status::Stopped(exit));
        self.publish(Event::Exit {
            container: self.id.clone(),
            id: self.id.clone(),
            pid: self.pid(),
            exit,
        });
    }

    /// Removes the cgroup of a sandbox that is over. Nobody waits for this.
    async fn clear_up(&self) {
        if let (None, Some(cgroup)) = (&self.held, self.cgroup.clone()) {
            // A process of the sandbox may still be dying; the deletion tries again, and says so if that fails.
            let removed = blocking::run_anyway(move || {
                let failures = cgroup.remove().into_iter();
                first_failure(failures.map(|error| Err(error.into())))
            });
            let _ = removed.await;
        }
    }

    async fn delete(&mut self) -> Result<Deleted> {
        self.status().check(Call::Delete)?;
        if self.held.is_some() {
            self.end(Exit::now(STOPPED));
        }
        take_down(self.remains.clone(), Why::Deleted).await?;
        let deleted = Deleted {
            pid: self.pid(),
            exit: self.status().exit().unwrap_or(Exit::now(STOPPED)),
        };
        info!("sandbox {}: deleted", self.id);
        self.publish(Event::Delete {
            container: self.id.clone(),
            pid: deleted.pid,
            exit: deleted.exit,
        });
        Ok(deleted)
    }

    /// In podsandbox mode nothing tells a sandbox that its containers will share a process namespace. The first that
    /// asks for it makes PID 1 here, and the pod then lives and dies with that.
    async fn shared_processes(&mut self) -> Result<PathBuf> {
        if self.node_processes {
            let pid = self
                .pid()
                .ok_or(Error::Internal("a sandbox without a pid"))?;
            return Ok(pid_namespace(pid));
        }
        if self.thread_only {
            return Err(pause::Error::ThreadCannotHold {
                kind: pause::Kind::Pid,
            }
            .into());
        }
        // PID 1 may end before its pid is known here.
        let expected = self.shared.exits.expect();
        let Some(mut sandbox) = self.held.take() else {
            return Err(Error::FailedPrecondition(format!(
                "sandbox {} has ended",
                self.id
            )));
        };
        // In place rather than not at all: the sandbox is in there.
        let made = blocking::run_anyway(move || {
            let made = sandbox.share_processes();
            Ok((sandbox, made))
        });
        let (sandbox, made) = made.await?;
        self.held = Some(sandbox);
        let (pid, made) = made?;
        if made {
            self.process = Some(self.shared.exits.claim(pid).exit);
            if let Some(cgroup) = &self.cgroup
                && let Err(error) = cgroup.add(pid)
            {
                // It works all the same; only its own few kilobytes are counted elsewhere.
                warn!("sandbox {}: {error}", self.id);
            }
            info!(
                "sandbox {}: shared process namespace, PID 1 is {pid}",
                self.id
            );
        }
        drop(expected);
        Ok(pid_namespace(pid))
    }
}

/// Where containerd finds the process namespace of a sandbox with this pid.
pub fn pid_namespace(pid: Pid) -> PathBuf {
    format!("/proc/{pid}/ns/pid").into()
}

/// Resolves with the exit of the process; never, if there is none.
async fn ended(process: &mut Option<Exited>) -> Exit {
    match process {
        Some(claim) => claim.await.unwrap_or(Exit::now(255)),
        None => std::future::pending().await,
    }
}
