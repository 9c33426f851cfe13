//! The end of a process and of the container: exits are told, and what has been deleted is taken away.

use log::{info, warn};
use rustix::process::Signal;

use super::actor::{Actor, Done};
use super::process::{Exec, Process, answer, tell_exit};
use super::take_down;
use crate::container::mailbox::{Deleted, ProcessId, Reply, no_process};
use crate::container::state::{Call, State};
use crate::containerd::events::Event;
use crate::error::{Error, Result};
use crate::io::Io;
use crate::kernel::cgroup::OomKills;
use crate::kernel::exits::Exit;
use crate::runtime::bundle;

/// The exit status after SIGKILL.
const KILLED: u32 = 128 + 9;

impl Actor {
    /// Tells of the exits that may be told now: after the start of the process, and the init's after its execs' and when
    /// what it wrote has been read.
    pub(super) fn tell_exits(&mut self) {
        let execs = self.execs.values().map(|exec| &exec.process);
        let ends: Vec<Exit> = execs
            .chain([&self.init])
            .filter_map(Process::untold)
            .collect();
        let look = if ends.iter().any(|exit| exit.status == KILLED) {
            OomKills::look_after_a_kill
        } else {
            OomKills::look
        };
        if self.init.starting.is_none()
            && !ends.is_empty()
            && self.oom_kills.as_mut().is_some_and(look)
        {
            // It may be what ended the process, and is told before its exit.
            self.tell_oom();
        }
        let (id, events) = (&self.id, &self.shared.events);
        for (exec, Exec { process, .. }) in &mut self.execs {
            if process.starting.is_none() {
                tell_exit(id, exec, process, events);
            }
        }
        let lives = |exec: &Exec| exec.process.lives();
        if self.init.starting.is_some()
            || self.saving
            || self.reading.is_some()
            || self.execs.values().any(lives)
        {
            return;
        }
        if let Some(exit) = tell_exit(id, id, &mut self.init, events) {
            info!("container {id}: exited, status {}", exit.status);
            if let Some(kills) = self.oom_kills.take() {
                kills.end();
            }
            if !self.deleted.is_empty() {
                self.take_down();
            }
        }
    }

    pub(super) fn tell_oom(&self) {
        info!("container {}: out of memory, a process was killed", self.id);
        self.shared.events.send(&Event::oom(&self.id));
    }

    pub(super) fn delete_exec(&mut self, exec: &str) -> Result<Deleted> {
        let id = ProcessId::Exec(exec.to_owned());
        let process = self.process(&id)?;
        process.state().check(Call::Delete)?;
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

    pub(super) fn delete(&mut self, reply: Reply<Deleted>) {
        if !self.deleted.is_empty() {
            return self.deleted.push(reply);
        }
        let state = self.init.state();
        match (state.check(Call::Delete), state) {
            (Err(error), _) => answer(reply, Err(error)),
            (Ok(()), State::Stopped(_)) => {
                self.deleted.push(reply);
                self.take_down();
            }
            // Taken down when it has been told.
            (Ok(()), State::Ended(_)) => {
                self.deleted.push(reply);
                if let Some(reading) = &self.reading {
                    // Whoever deletes it reads no more.
                    reading.notify_one();
                }
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
    pub(super) fn taken_down(&mut self, result: Result<()>) -> bool {
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
