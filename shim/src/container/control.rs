//! Kill, Pause, Resume, Checkpoint, Update, Pids and Stats of a container.

use std::collections::HashMap;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::time::Duration;

use log::{info, warn};
use rustix::process::{Pid, Signal};

use super::actor::{Actor, Done};
use super::event::Event;
use super::mailbox::{KillScope, Listed, ProcessId, Reply, answer};
use super::process::Process;
use super::state::{Call, Checkpointing, Life};
use crate::error::{Error, IoError, Result};
use crate::io::{self, Writer};
use crate::kernel::blocking;
use crate::kernel::cgroup::{Cgroup, Metrics};
use crate::kernel::exits::Child;
use crate::runtime::bundle::write_private;
use crate::runtime::criu::Checkpoint;

/// How long a checkpoint may still take when the container has ended. criu kills the processes only when all is saved,
/// so that little is left to do.
const PATIENCE: Duration = Duration::from_secs(10);

impl Actor {
    pub(super) fn kill(&mut self, id: &ProcessId, number: u32, scope: KillScope, reply: Reply<()>) {
        if let Err(error) = self.living(id) {
            return answer(reply, Err(error));
        }
        match (pause::signal_from_number(number), scope) {
            // For an exec, `All` means only its process: the container's other processes are not the exec's.
            (Some(signal), KillScope::All) if *id == ProcessId::Init => {
                self.kill_all(signal, reply);
            }
            (Some(signal), KillScope::All | KillScope::Process) => match self.signal(id, signal) {
                // The answer comes after the thaw: without the thaw the kill has no effect, and must be tried again.
                Ok(()) if signal == Signal::KILL && *id == ProcessId::Init => {
                    self.thaw_to_die(Some(reply));
                }
                sent => answer(reply, sent),
            },
            // Signal 0 sends nothing, and only asks whether the process is there (kill(2)).
            (None, _) if number == 0 => answer(reply, Ok(())),
            (None, _) => answer(
                reply,
                Err(Error::InvalidArgument(format!(
                    "there is no signal {number}"
                ))),
            ),
        }
    }

    /// A process that has not ended, as far as the actor knows.
    fn living(&mut self, id: &ProcessId) -> Result<&mut Process> {
        let process = self.process(id)?;
        process.status().check(Call::Kill)?;
        Ok(process)
    }

    pub(super) fn signal(&mut self, id: &ProcessId, signal: Signal) -> Result<()> {
        let process = self.living(id)?;
        let finished = || Error::NotFound("process already finished".into());
        let Some(child) = &process.child else {
            // No child: an init that has not been restored, or an exec that has not been started.
            return Err(match id {
                ProcessId::Init => finished(),
                ProcessId::Exec(_) => {
                    Error::FailedPrecondition("the process has not been started".into())
                }
            });
        };
        match child.signal(signal) {
            Ok(()) => {}
            Err(rustix::io::Errno::SRCH) => return Err(finished()),
            Err(error) => {
                return Err(IoError::at("send a signal to", format!("{id:?}"))(error).into());
            }
        }
        Ok(())
    }

    /// Thaws the container after a SIGKILL, whoever has frozen the container: on cgroup v1 a frozen process does not
    /// die before the thaw. Whoever sent the signal is answered.
    pub(super) fn thaw_to_die(&mut self, reply: Option<Reply<()>>) {
        let Some(cgroup) = self.cgroup.clone() else {
            return reply.map_or((), |reply| answer(reply, Ok(())));
        };
        let id = self.id.clone();
        self.jobs.spawn(async move {
            let thawed = blocking::run_anyway(move || Ok(cgroup.thaw_if_frozen()?)).await;
            if let Err(error) = &thawed {
                warn!(container = id, error:%; "not thawed for its end");
            }
            if let Some(reply) = reply {
                answer(reply, thawed);
            }
            Done::Answered
        });
    }

    fn kill_all(&mut self, signal: Signal, reply: Reply<()>) {
        let cgroup = match self.cgroup().cloned() {
            Ok(cgroup) => cgroup,
            Err(error) => return answer(reply, Err(error)),
        };
        self.jobs.spawn(async move {
            let killed = blocking::run_anyway(move || signal_all(&cgroup, signal)).await;
            answer(reply, killed);
            Done::Answered
        });
    }

    /// Kills the other processes of a container whose init has ended. In a process namespace of its own the kernel
    /// kills the others; in a shared one this function does.
    pub(super) fn end_the_rest(&mut self) {
        if !self.shares_processes {
            return;
        }
        let Some(cgroup) = self.cgroup.clone() else {
            return;
        };
        let id = self.id.clone();
        self.jobs.spawn(async move {
            let killed = blocking::run_anyway(move || Ok(cgroup.kill_all()?)).await;
            killed.unwrap_or_else(
                |e| warn!(container = id, error:% = e; "remaining processes not killed"),
            );
            Done::Answered
        });
    }

    pub(super) fn freeze(&mut self, call: Call, reply: Reply<()>) {
        let checked = self
            .init
            .status()
            .check(call)
            .and_then(|()| self.not_while_saving())
            .and_then(|()| self.cgroup().cloned());
        let cgroup = match checked {
            Ok(cgroup) => cgroup,
            Err(error) => return answer(reply, Err(error)),
        };
        // A job, because the kernel may take seconds until every process is frozen.
        self.jobs.spawn(async move {
            let pausing = call == Call::Pause;
            let frozen = blocking::run(move || {
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
        // The init may have ended during the job.
        self.init.status().check(call)?;
        let container = self.id.clone();
        if call == Call::Pause {
            self.init.go_on(|_| Life::Paused);
            info!(container; "container paused");
            self.shared.events.send(Event::Paused { container });
            if self
                .init
                .child
                .as_ref()
                .is_some_and(Child::has_kill_pending)
            {
                // A SIGKILL that came during the freeze found the status Running, and did not thaw.
                self.thaw_to_die(None);
            }
        } else {
            self.init.go_on(|_| Life::Running);
            info!(container; "container resumed");
            self.shared.events.send(Event::Resumed { container });
        }
        Ok(())
    }

    /// Saves the container. If the checkpoint ends the container, the exit waits for the end of the checkpoint, up to
    /// [`PATIENCE`].
    pub(super) fn checkpoint(&mut self, checkpoint: Checkpoint, reply: Reply<()>) {
        let checked = self
            .init
            .status()
            .check(Call::Checkpoint)
            .and_then(|()| self.not_while_saving());
        if let Err(error) = checked {
            return answer(reply, Err(error));
        }
        self.checkpointing = Checkpointing::UnderWay;
        let (id, runc) = (self.id.clone(), self.runc.clone());
        // Where the shim copies, the process has pipes: runc tells criu of those.
        let io = match self.writer {
            Writer::Process => self.init.request(),
            Writer::Shim => io::Request::default(),
        };
        let ended = self.init.ended();
        self.jobs.spawn(async move {
            let saved = tokio::select! {
                saved = runc.checkpoint(&checkpoint, &io.stdout, &io.stderr) => saved,
                () = async {
                    ended.await;
                    tokio::time::sleep(PATIENCE).await;
                } => Err(Error::FailedPrecondition(format!(
                    "runc checkpoint still ran {PATIENCE:?} after the end of {id}, and was killed"
                ))),
            };
            Done::Saved(checkpoint.image, saved, reply)
        });
    }

    pub(super) fn saved(&mut self, image: PathBuf, result: Result<()>) -> Result<()> {
        self.checkpointing = Checkpointing::No;
        result?;
        info!(container = self.id, image:% = image.display(); "container checkpointed");
        self.shared.events.send(Event::Checkpointed {
            container: self.id.clone(),
            image,
        });
        Ok(())
    }

    /// An error during a checkpoint: criu itself freezes and thaws the container's processes.
    fn not_while_saving(&self) -> Result<()> {
        match self.checkpointing {
            Checkpointing::No => Ok(()),
            Checkpointing::UnderWay => Err(Error::FailedPrecondition(format!(
                "{} is being checkpointed",
                self.id
            ))),
        }
    }

    pub(super) fn update(&mut self, resources: Vec<u8>, reply: Reply<()>) {
        let checked = self.init.status().check(Call::Update).and_then(|()| {
            serde_json::from_slice::<serde_json::Map<String, serde_json::Value>>(&resources)
                .map_err(|e| Error::InvalidArgument(format!("update {}: resources: {e}", self.id)))
        });
        if let Err(error) = checked {
            return answer(reply, Err(error));
        }
        self.update_count += 1;
        let file = self
            .remains
            .record
            .bundle
            .join(format!("resources-{}.json", self.update_count));
        let runc = self.runc.clone();
        self.jobs.spawn(async move {
            let updated = match write_private(&file, &resources) {
                Ok(()) => runc.update(&file).await,
                Err(error) => Err(error),
            };
            // A file that cannot be removed goes with the bundle.
            let _ = std::fs::remove_file(&file);
            answer(reply, updated);
            Done::Answered
        });
    }

    /// Lists the processes of the container. The init is in the list until the container is deleted, also after the
    /// init has ended. Otherwise a containerd that comes back would take the container without processes for a leak,
    /// and lose the exit code.
    pub(super) fn pids(&mut self, reply: Reply<Vec<Listed>>) {
        let over = self.init.status().published_exit().is_some();
        let cgroup = self.cgroup.clone().filter(|_| !over);
        let init = self.init.pid();
        let execs: HashMap<Pid, String> = self
            .execs
            .iter()
            .filter_map(|(id, exec)| Some((exec.process.pid()?, id.clone())))
            .collect();
        self.jobs.spawn(async move {
            let pids = match cgroup {
                Some(cgroup) => blocking::run_anyway(move || Ok(cgroup.remaining()?)).await,
                None => Ok(Vec::new()),
            };
            let listed = pids.map(|mut pids| {
                if let Some(init) = init.filter(|init| !pids.contains(init)) {
                    pids.insert(0, init);
                }
                let listed = |pid| Listed {
                    pid,
                    exec_id: execs.get(&pid).cloned(),
                };
                pids.into_iter().map(listed).collect()
            });
            answer(reply, listed);
            Done::Answered
        });
    }

    /// Reads the cgroup's counters, which last as long as the cgroup, also after the end of the container.
    pub(super) fn stats(&mut self, reply: Reply<Metrics>) {
        let cgroup = match self.cgroup().cloned() {
            Ok(cgroup) => cgroup,
            Err(error) => return answer(reply, Err(error)),
        };
        self.jobs.spawn(async move {
            let stats = blocking::run_anyway(move || cgroup.stats().map_err(gone)).await;
            answer(reply, stats);
            Done::Answered
        });
    }

    fn cgroup(&self) -> Result<&Cgroup> {
        self.cgroup.as_ref().ok_or_else(|| {
            Error::FailedPrecondition(format!("the cgroup of {} is not known", self.id))
        })
    }
}

/// The error of an operation on a cgroup that may be gone with its last process.
fn gone(error: IoError) -> Error {
    if error.source.kind() == ErrorKind::NotFound {
        Error::NotFound(format!("all processes have finished: {error}"))
    } else {
        error.into()
    }
}

fn signal_all(cgroup: &Cgroup, signal: Signal) -> Result<()> {
    if signal == Signal::KILL {
        return cgroup.kill_all().map_err(gone);
    }
    cgroup.signal_each(signal).map_err(gone)
}
