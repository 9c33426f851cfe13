//! One task per sandbox: it owns the [`pause::Sandbox`] and answers the calls that containerd makes on a pod's sandbox.
//!
//! ```text
//!  Create ──▶ namespaces stand (Created) ──Start──▶ Running ──Kill, or PID 1 ends──▶ Stopped ──Delete──▶ gone
//! ```
//!
//! To containerd it is a container like any other, with a pid whose `/proc/PID/ns` the pod's containers join. There is
//! no program in it, so there is nothing to execute into, to freeze or to limit.

use std::collections::BTreeMap;
use std::path::PathBuf;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use log::{info, warn};
use rustix::process::{Pid, Signal};
use tokio::sync::watch;

use crate::container::mailbox::{
    Command, Deleted, Handle, Listed, Owner, ProcessId, View, no_process,
};
use crate::container::state::{Call, State};
use crate::container::{Create, Shared, blocking};
use crate::containerd::events::Event;
use crate::error::{Error, Result, first_of};
use crate::io;
use crate::kernel::cgroup::{Cgroup, Driver};
use crate::kernel::exits::{Claim, Exit};
use crate::pod::files::PodFiles;
use crate::runtime::bundle::{self, Record};
use crate::runtime::options::{Holder, Options};

/// A sandbox to be made.
#[derive(Debug)]
pub struct Plan {
    /// Its id.
    pub id: String,
    /// Its bundle.
    pub bundle: PathBuf,
    /// What the kernel is asked for.
    pub config: pause::SandboxConfig,
    /// Where its cgroup is to be.
    pub cgroups_path: Option<String>,
    /// What form that has.
    pub driver: Driver,
    /// The pod's containers see the node's processes.
    pub node_processes: bool,
    /// The operator's settings.
    pub options: Options,
    /// Who asked for it.
    pub origin: Origin,
}

/// Who asked for a sandbox, and what follows from that.
#[derive(Debug)]
pub enum Origin {
    /// The Task API, in podsandbox mode: containerd expects the events of a task, and asks for its streams.
    Task(Box<Create>),
    /// The Sandbox API: it is no task, and the pod's files are ours to make.
    Sandbox(PodFiles),
}

/// A sandbox that stands.
#[derive(Debug)]
pub struct Made {
    /// To talk to it.
    pub handle: Handle,
    /// The pid whose `/proc/PID/ns` has the pod's namespaces.
    pub pid: Pid,
    /// What holds it.
    pub kind: pause::HolderKind,
    /// Where the namespaces are that are not the node's.
    pub paths: BTreeMap<pause::Kind, PathBuf>,
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
}

/// Makes a sandbox and gives it to a task of its own. A failure leaves nothing behind.
///
/// # Errors
/// `Sandbox` with the operation that failed, `Io` for its cgroup and its files.
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
    Record {
        bundle: plan.bundle.clone(),
        mounts_rootfs: false,
        runc: None,
        systemd_cgroup: plan.driver == Driver::Systemd,
        cgroups_path: plan.cgroups_path.clone(),
    }
    .save(&shared.first_bundle, &plan.id)?;
    let cgroup = plan
        .cgroups_path
        .as_deref()
        .map(|path| Cgroup::at(path, plan.driver))
        .transpose()?;
    let files = match &plan.origin {
        Origin::Task(_) => None,
        Origin::Sandbox(files) => Some(files.clone()),
    };
    // A process of the sandbox may end before its pid is known here.
    let expected = shared.exits.expect();
    let config = plan.config;
    let made = blocking(move || make(&config, cgroup, files.as_ref()));
    let (sandbox, cgroup) = made.await?;
    let kind = sandbox.kind();
    let process = match kind {
        pause::HolderKind::Thread => None,
        pause::HolderKind::Process => Some(shared.exits.claim(sandbox.pid())),
    };
    drop(expected);
    let (pid, paths) = (sandbox.pid(), sandbox.paths());
    let (handle, owner) = Handle::new(&plan.bundle);
    let io = match &plan.origin {
        Origin::Task(create) => create.io.clone(),
        Origin::Sandbox(_) => io::Request::default(),
    };
    let view = View {
        pid: Some(pid),
        state: State::Created,
        io,
    };
    let actor = Actor {
        view: owner.views.add(ProcessId::Init, view),
        id: plan.id,
        bundle: plan.bundle,
        shared: shared.clone(),
        held: Some(sandbox),
        thread_only: plan.options.holder == Holder::Thread,
        node_processes: plan.node_processes,
        process,
        cgroup,
        origin: plan.origin,
        owner,
    };
    info!("sandbox {}: namespaces made, held by {pid}", actor.id);
    if let Origin::Task(create) = &actor.origin {
        actor.shared.events.send(&create.event(Some(pid)));
    }
    tokio::spawn(actor.run());
    Ok(Made {
        handle,
        pid,
        kind,
        paths,
    })
}

/// The cgroup exists although nothing may be in it: cAdvisor finds a pod's network counters by its name.
fn make(
    config: &pause::SandboxConfig,
    cgroup: Option<Cgroup>,
    files: Option<&PodFiles>,
) -> Result<(pause::Sandbox, Option<Cgroup>)> {
    let made = files.map_or(Ok(()), PodFiles::make).and_then(|()| {
        let sandbox = pause::Sandbox::create(config)?;
        if let Some(cgroup) = &cgroup {
            let placed = cgroup.create().and_then(|()| match sandbox.kind() {
                pause::HolderKind::Thread => Ok(()),
                pause::HolderKind::Process => cgroup.add(sandbox.pid()),
            });
            if let Err(error) = placed {
                sandbox.end();
                for failure in cgroup.remove() {
                    warn!("after a failed create: {failure}");
                }
                return Err(error.into());
            }
        }
        Ok(sandbox)
    });
    match made {
        Ok(sandbox) => Ok((sandbox, cgroup)),
        Err(error) => {
            if let Some(Err(left)) = files.map(PodFiles::remove) {
                warn!("after a failed create: {left}");
            }
            Err(error)
        }
    }
}

struct Actor {
    id: String,
    bundle: PathBuf,
    shared: Shared,
    /// Until the sandbox has ended.
    held: Option<pause::Sandbox>,
    /// The operator wants no process: a pod that needs one is refused.
    thread_only: bool,
    /// The pod's containers see the node's processes.
    node_processes: bool,
    /// The exit of the process that the sandbox lives and dies with, if there is one.
    process: Option<Claim>,
    cgroup: Option<Cgroup>,
    origin: Origin,
    view: watch::Sender<View>,
    owner: Owner,
}

impl Actor {
    async fn run(mut self) {
        loop {
            tokio::select! {
                exit = ended(&mut self.process) => {
                    self.end(exit);
                    self.clear_up().await;
                }
                command = self.owner.calls.recv() => match command {
                    Some(command) => if self.command(command).await { return },
                    None => return,
                },
            }
        }
    }

    /// Carries out one call. True when nothing is left to do.
    async fn command(&mut self, command: Command) -> bool {
        // The caller may have given up: nobody minds an answer that is not heard.
        match command {
            Command::Start(ProcessId::Init, reply) => {
                let _ = reply.send(self.start());
            }
            Command::Kill(ProcessId::Init, signal, _, reply) => {
                let _ = reply.send(self.kill(signal));
                self.clear_up().await;
            }
            Command::Delete(ProcessId::Init, reply) => {
                let deleted = self.delete().await;
                let gone = deleted.is_ok();
                if gone {
                    // Before the answer, so that a Shutdown that follows it finds the sandbox gone.
                    self.owner.calls.close();
                }
                let _ = reply.send(deleted);
                return gone;
            }
            Command::Pids(reply) => {
                let pid = self.view.borrow().pid;
                let listed = pid.map(|pid| Listed { pid, exec_id: None });
                let _ = reply.send(Ok(listed.into_iter().collect()));
            }
            Command::Stats(reply) => {
                let _ = reply.send(self.stats());
            }
            Command::SharedProcesses(reply) => {
                let _ = reply.send(self.shared_processes().await);
            }
            Command::Exec(_, _, _, reply)
            | Command::Pause(reply)
            | Command::Resume(reply)
            | Command::Update(_, reply)
            | Command::Checkpoint(_, reply)
            | Command::Resize(_, _, reply)
            | Command::CloseIo(_, reply) => {
                let _ = reply.send(Err(Error::FailedPrecondition(format!(
                    "{}: a sandbox has no root filesystem and runs no program",
                    self.id
                ))));
            }
            Command::Start(id, reply) => {
                let _ = reply.send(Err(no_process(&id)));
            }
            Command::Kill(id, _, _, reply) => {
                let _ = reply.send(Err(no_process(&id)));
            }
            Command::Delete(id, reply) => {
                let _ = reply.send(Err(no_process(&id)));
            }
        }
        false
    }

    fn state(&self) -> State {
        self.view.borrow().state
    }

    fn pid(&self) -> Option<Pid> {
        self.view.borrow().pid
    }

    /// Tells containerd what happened to a task; a sandbox of the Sandbox API is none.
    fn tell(&self, event: &Event) {
        match self.origin {
            Origin::Task(_) => self.shared.events.send(event),
            Origin::Sandbox(_) => {}
        }
    }

    /// Of the task: its own cgroup. Through the Sandbox API: the pod's, which that one is in.
    fn stats(&self) -> Result<Any> {
        Ok(match (&self.origin, &self.cgroup) {
            (Origin::Task(_), Some(own)) => own.stats(),
            (Origin::Task(_), None) => {
                return Err(Error::NotFound(format!(
                    "sandbox {} has no cgroup",
                    self.id
                )));
            }
            (Origin::Sandbox(_), Some(own)) => own.parent().stats(),
            // A pod without a cgroup: all that is known to be its own is the shim.
            (Origin::Sandbox(_), None) => Cgroup::of_pid(rustix::process::getpid())?.stats(),
        }?)
    }

    fn start(&mut self) -> Result<Pid> {
        self.state().check(Call::Start)?;
        let pid = self
            .pid()
            .ok_or(Error::Internal("a sandbox without a pid"))?;
        self.view.send_modify(|view| view.state = State::Running);
        info!("sandbox {}: started", self.id);
        self.tell(&Event::started(&self.id, pid));
        Ok(pid)
    }

    fn kill(&mut self, signal: u32) -> Result<()> {
        self.state().check(Call::Kill)?;
        let number = i32::try_from(signal).unwrap_or_default();
        let Some(signal) = Signal::from_named_raw(number) else {
            // As the pause program: what it does not act on changes nothing.
            return Ok(());
        };
        let Some(sandbox) = &self.held else {
            return State::Stopped(Exit::now(0)).check(Call::Kill);
        };
        match sandbox.signal(signal)? {
            pause::Signalled::Ends(status) => self.end(Exit::now(status)),
            pause::Signalled::Delivered | pause::Signalled::Nothing => {}
        }
        Ok(())
    }

    /// The sandbox is over: lets go of the namespaces and tells, once.
    fn end(&mut self, exit: Exit) {
        self.process = None;
        let Some(sandbox) = self.held.take() else {
            return;
        };
        sandbox.end();
        info!("sandbox {}: ended, status {}", self.id, exit.status);
        let pid = self.pid();
        self.view
            .send_modify(|view| view.state = State::Stopped(exit));
        self.tell(&Event::exited(&self.id, &self.id, pid, exit));
    }

    /// What nobody need wait for, once the sandbox is over.
    async fn clear_up(&self) {
        if self.held.is_none() {
            // A process of it may still be dying; the deletion tries again, and says so if it cannot.
            let _ = self.remove_cgroup().await;
        }
    }

    async fn delete(&mut self) -> Result<Deleted> {
        self.state().check(Call::Delete)?;
        if self.held.is_some() {
            self.end(Exit::now(137));
        }
        self.remove_cgroup()
            .await
            .unwrap_or_else(|e| warn!("sandbox {}: {e}", self.id));
        if let Origin::Sandbox(files) = &self.origin {
            let files = files.clone();
            blocking(move || files.remove()).await?;
        }
        bundle::set_deleted(&self.bundle)?;
        bundle::forget(&self.shared.first_bundle, &self.id)?;
        let deleted = Deleted {
            pid: self.pid(),
            exit: self.state().exit().unwrap_or(Exit::now(137)),
        };
        info!("sandbox {}: deleted", self.id);
        self.tell(&Event::deleted(&self.id, deleted.pid, deleted.exit));
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
        let made = blocking(move || {
            let made = sandbox.share_processes();
            Ok((sandbox, made))
        });
        let (sandbox, made) = made.await?;
        self.held = Some(sandbox);
        let (pid, made) = made?;
        if made {
            self.process = Some(self.shared.exits.claim(pid));
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

    /// Away from the reactor: it waits a little for processes that are dying.
    async fn remove_cgroup(&self) -> Result<()> {
        let Some(cgroup) = self.cgroup.clone() else {
            return Ok(());
        };
        blocking(move || first_of(cgroup.remove())).await
    }
}

/// Where containerd finds the process namespace of a sandbox with this pid.
pub fn pid_namespace(pid: Pid) -> PathBuf {
    format!("/proc/{pid}/ns/pid").into()
}

/// Resolves with the exit of the process; never, if there is none.
async fn ended(process: &mut Option<Claim>) -> Exit {
    match process {
        Some(claim) => claim.await.unwrap_or(Exit::now(255)),
        None => std::future::pending().await,
    }
}
