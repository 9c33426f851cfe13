//! The owner, the task that owns a sandbox: carries out one call after the other, and ends the sandbox.

use log::{debug, info, warn};
use pause::Signalled;
use rustix::process::{Pid, Signal};
use tokio::sync::{mpsc, watch};

use super::{Origin, ProcessNamespace, Request};
use crate::container::Shared;
use crate::container::event::Event;
use crate::container::mailbox::{Deleted, Reply, View, answer};
use crate::container::state::{Call, Status};
use crate::error::{Error, Result, first_failure};
use crate::kernel::blocking;
use crate::kernel::cgroup::{Cgroup, Metrics};
use crate::kernel::exits::{Exit, Exited};
use crate::runtime::teardown::{Remains, Why, take_down};

/// The exit status of a sandbox that Delete ends: as of a pause container after SIGKILL.
const STOPPED: u32 = 128 + 9;

/// The state of the owner.
pub(super) struct Owner {
    pub(super) id: String,
    /// The pod's name in Kubernetes, for the log; empty elsewhere.
    pub(super) name: String,
    pub(super) remains: Remains,
    pub(super) shared: Shared,
    /// The namespaces; none after the end of the sandbox.
    pub(super) held: Option<pause::Sandbox>,
    /// The option `holder = "thread"`: no process holds namespaces. A container that joins a shared process namespace
    /// is refused.
    pub(super) thread_only: bool,
    /// The pod's containers see the node's processes.
    pub(super) node_processes: bool,
    /// The exit to come of the pause program, if the pod has one. The sandbox lives and dies with that process.
    pub(super) process: Option<Exited>,
    pub(super) cgroup: Option<Cgroup>,
    pub(super) origin: Origin,
    pub(super) view: watch::Sender<View>,
    /// True from the start on, also after the end.
    pub(super) started: watch::Sender<bool>,
    pub(super) requests: mpsc::UnboundedReceiver<Request>,
}

impl Owner {
    pub(super) async fn run(mut self) {
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

    /// Carries out one call. Returns true when the sandbox is deleted and the owner ends.
    async fn request(&mut self, request: Request) -> bool {
        match request {
            Request::Start(reply) => answer(reply, self.start()),
            Request::Kill(signal, reply) => {
                let signalled = self.kill(signal);
                self.answer_and_end(reply, signalled).await;
            }
            Request::Stop(reply) => {
                let signalled = self.stop();
                self.answer_and_end(reply, signalled).await;
            }
            Request::Delete(reply) => {
                let deleted = self.delete().await;
                let gone = deleted.is_ok();
                if gone {
                    // Closed before the answer, so that a Shutdown that follows the answer finds the sandbox gone.
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

    /// Answers the caller, and then ends the sandbox if the signal does. The answer is on its way before the exit, also to
    /// whoever waits: containerd deletes a sandbox whose exit it hears of, and closes the connection, on which the caller
    /// may still be waiting.
    async fn answer_and_end(&mut self, reply: Reply<()>, signalled: Result<Signalled>) {
        let end = match signalled {
            Ok(Signalled::Ends(status)) => Some(Exit::now(status)),
            Ok(Signalled::Delivered | Signalled::Nothing) | Err(_) => None,
        };
        answer(reply, signalled.map(drop));
        if let Some(exit) = end {
            self.end(exit);
        }
        self.clear_up().await;
    }

    fn status(&self) -> Status {
        self.view.borrow().status
    }

    fn pid(&self) -> Option<Pid> {
        self.view.borrow().pid
    }

    /// Publishes an event, unless the sandbox is of the Sandbox API, which has no task events.
    fn publish(&self, event: Event) {
        match self.origin {
            Origin::Task(_) => self.shared.events.send(event),
            Origin::Sandbox(_) => {}
        }
    }

    /// Reads the counters. For the Task API, of the sandbox's own cgroup. For the Sandbox API, of the pod's cgroup, the
    /// parent of the sandbox's own.
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
            // A pod without a cgroup: the shim's own cgroup is all that is known of the pod.
            (Origin::Sandbox(_), None) => Cgroup::of_pid(rustix::process::getpid())?.stats(),
        }?)
    }

    fn start(&mut self) -> Result<Pid> {
        self.status().check(Call::Start)?;
        let pid = self
            .pid()
            .ok_or(Error::Internal("a sandbox without a pid"))?;
        self.view.send_modify(|view| view.status = Status::Running);
        self.started.send_replace(true);
        let holder = match self.held.as_ref().map(pause::Sandbox::holder_kind) {
            Some(pause::HolderKind::Process) => "process",
            Some(pause::HolderKind::Thread) | None => "thread",
        };
        info!(name = self.name, pid:%, holder; "sandbox started");
        self.publish(Event::Start {
            container: self.id.clone(),
            pid,
        });
        Ok(pid)
    }

    fn kill(&self, signal: u32) -> Result<Signalled> {
        self.status().check(Call::Kill)?;
        let number = i32::try_from(signal).unwrap_or_default();
        match Signal::from_named_raw(number) {
            Some(signal) => self.signal(signal),
            // No error, as for a pause program: a real-time signal, or a number that is no signal, has no effect.
            None => Ok(Signalled::Nothing),
        }
    }

    fn stop(&self) -> Result<Signalled> {
        match self.status().exit() {
            Some(_) => Ok(Signalled::Nothing),
            None => self.signal(Signal::KILL),
        }
    }

    fn signal(&self, signal: Signal) -> Result<Signalled> {
        let Some(sandbox) = &self.held else {
            return Err(Error::NotFound(format!("sandbox {} has ended", self.id)));
        };
        Ok(sandbox.signal(signal)?)
    }

    /// Ends the sandbox: releases the namespaces and publishes the exit. A second end changes nothing.
    fn end(&mut self, exit: Exit) {
        self.process = None;
        let Some(sandbox) = self.held.take() else {
            return;
        };
        sandbox.end();
        info!(status = exit.status; "sandbox exited");
        self.view
            .send_modify(|view| view.status = Status::Stopped(exit));
        self.publish(Event::Exit {
            container: self.id.clone(),
            id: self.id.clone(),
            pid: self.pid(),
            exit,
        });
    }

    /// Removes the cgroup of a sandbox that has ended. The caller already has the answer; only the next call waits.
    async fn clear_up(&self) {
        if let (None, Some(cgroup)) = (&self.held, self.cgroup.clone()) {
            // A failure is ignored, for a process of the sandbox may still be dying. The deletion tries again, and logs
            // a failure.
            let removed =
                blocking::run_anyway(move || first_failure(cgroup.remove().into_iter().map(Err)));
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
        debug!("sandbox deleted");
        self.publish(Event::Delete {
            container: self.id.clone(),
            pid: deleted.pid,
            exit: deleted.exit,
        });
        Ok(deleted)
    }

    /// Returns the process namespace that the pod's containers share. In podsandbox mode the sandbox's spec
    /// does not say whether the containers will share one. So the first container that joins makes PID 1 here, and the
    /// pod then lives and dies with PID 1.
    async fn shared_processes(&mut self) -> Result<ProcessNamespace> {
        if self.node_processes {
            return Ok(ProcessNamespace::of_node());
        }
        if self.thread_only {
            return Err(pause::Error::ThreadCannotHold {
                kind: pause::NamespaceKind::Pid,
            }
            .into());
        }
        // Keeps the exit of a PID 1 that ends before its pid is known here.
        let expected = self.shared.exits.expect();
        let Some(mut sandbox) = self.held.take() else {
            return Err(Error::FailedPrecondition(format!(
                "sandbox {} has ended",
                self.id
            )));
        };
        // `run_anyway`, because the closure owns the sandbox: where no thread can be made, `run` would drop the
        // sandbox.
        let made = blocking::run_anyway(move || {
            let made = sandbox.share_processes();
            Ok((sandbox, made))
        });
        let (sandbox, made) = made.await?;
        let open = sandbox.namespace(pause::NamespaceKind::Pid);
        self.held = Some(sandbox);
        let (pid, made) = made?;
        if made {
            self.process = Some(self.shared.exits.claim(pid).exit);
            if let Some(cgroup) = &self.cgroup
                && let Err(error) = cgroup.add(pid)
            {
                // No error: PID 1 works in any cgroup. The few kilobytes of PID 1 are then counted elsewhere.
                warn!(error:%; "PID 1 is in another cgroup");
            }
            info!(pid:%; "PID 1 of the shared process namespace started");
        }
        drop(expected);
        open.map(ProcessNamespace::of_pod).ok_or(Error::Internal(
            "a shared process namespace that is not open",
        ))
    }
}

/// Resolves with the exit of the process. Never resolves without a process.
async fn ended(process: &mut Option<Exited>) -> Exit {
    match process {
        Some(claim) => claim.await.unwrap_or(Exit::now(255)),
        None => std::future::pending().await,
    }
}
