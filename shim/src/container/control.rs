//! Signals, freezing, limits, and what can be asked of a container.

use containerd_shim_protos::events::task;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use log::warn;
use rustix::process::{PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::actor::{Actor, Done};
use super::blocking;
use super::process::{Exec, answer};
use crate::cgroup::Cgroup;
use crate::error::{Error, IoError, Result};
use crate::events::Event;
use crate::exits::Exit;
use crate::mailbox::{Listed, ProcessId, Reply, Target};
use crate::state::{Call, State};

impl Actor {
    pub(super) fn kill(&mut self, id: &ProcessId, signal: u32, target: Target, reply: Reply<()>) {
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

    pub(super) fn signal(&mut self, id: &ProcessId, signal: Signal) -> Result<()> {
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
    pub(super) fn end_the_rest(&mut self) {
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

    pub(super) fn freeze(&mut self, call: Call, reply: Reply<()>) {
        let checked = self
            .init
            .state()
            .check(call)
            .and_then(|()| self.cgroup().cloned());
        let cgroup = match checked {
            Ok(cgroup) => cgroup,
            Err(error) => return answer(reply, Err(error)),
        };
        // The kernel takes its time until every process stands still.
        self.jobs.spawn(async move {
            let pausing = call == Call::Pause;
            let frozen = blocking(move || {
                let result = if pausing {
                    cgroup.freeze()
                } else {
                    cgroup.thaw()
                };
                Ok(result?)
            });
            Done::Frozen(call, frozen.await, reply)
        });
    }

    pub(super) fn frozen(&mut self, call: Call, result: Result<()>) -> Result<()> {
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

    pub(super) fn update(&mut self, resources: Vec<u8>, reply: Reply<()>) {
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
    pub(super) fn pids(&self) -> Result<Vec<Listed>> {
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

    pub(super) fn stats(&self) -> Result<Any> {
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
