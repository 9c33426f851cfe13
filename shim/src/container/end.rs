//! The end of a process and of the container: publishes exits, and takes down what is deleted.
//!
//! ```text
//!  a process ends ──▶ publish an OOM kill ──▶ does something hold the exit back? ──no──▶ publish the exit
//!  Delete (init) ──▶ the exit is published ──▶ the teardown ──▶ the delete event ──▶ the mailbox closes ──▶ the answer
//! ```

use std::sync::Arc;

use log::{debug, info, log};
use rustix::process::Signal;
use tokio::sync::Notify;

use super::actor::{Actor, Done};
use super::event::Event;
use super::mailbox::{Deleted, ProcessId, Reply, answer, no_process};
use super::process::Exec;
use super::state::{Call, End, Life, Output, Status, Whose};
use crate::error::{Error, Result};
use crate::io::Io;
use crate::kernel::cgroup::OomKills;
use crate::kernel::exits::Exit;
use crate::runtime::teardown::{Why, take_down};

/// The exit status after SIGKILL.
const KILLED: u32 = 128 + 9;

impl Actor {
    /// Publishes all exits that may be published now, the init's last.
    pub(super) fn publish_exits(&mut self) {
        self.look_for_oom();
        let (id, events) = (&self.id, &self.shared.events);
        for (exec, Exec { process, .. }) in &mut self.execs {
            if let Some(exit) = process.publish_exit(id, exec, Whose::Exec, events) {
                log!(process.log_level(), container = id, exec, status = exit.status; "exec exited");
            }
        }
        let execs: Vec<&Life> = self
            .execs
            .values()
            .map(|exec| exec.process.life())
            .collect();
        let whose = Whose::Init(&execs, self.checkpointing);
        if let Some(exit) = self.init.publish_exit(id, id, whose, events) {
            info!(container = id, status = exit.status; "container exited");
            if let Some(kills) = self.oom_kills.take() {
                kills.end();
            }
            if !self.deleted.is_empty() {
                self.take_down();
            }
        }
    }

    /// Looks for an OOM kill, if a process has ended and its exit is not published. An OOM kill is published before the
    /// exit that it causes, and after the start of the init.
    fn look_for_oom(&mut self) {
        let execs = self.execs.values().map(|exec| exec.process.life());
        let ends: Vec<Exit> = execs
            .chain([self.init.life()])
            .filter_map(Life::unpublished)
            .collect();
        if ends.is_empty() || self.init.life().is_starting() {
            return;
        }
        let look = if ends.iter().any(|exit| exit.status == KILLED) {
            OomKills::look_after_a_kill
        } else {
            OomKills::look
        };
        if self.oom_kills.as_mut().is_some_and(look) {
            self.publish_oom();
        }
    }

    /// The output of the init, which has ended. Makes a job that waits for the reader, if somebody still reads and
    /// nobody waits for the deletion.
    pub(super) fn await_readers(&mut self) -> Output {
        let unread = self.init.io.unread().filter(|_| self.deleted.is_empty());
        let Some(read) = unread else {
            return Output::Delivered;
        };
        let enough = Arc::new(Notify::new());
        let given_up = enough.clone();
        self.jobs.spawn(async move {
            tokio::select! {
                () = read => {}
                () = given_up.notified() => {}
            }
            Done::Delivered
        });
        Output::BeingRead(enough)
    }

    pub(super) fn delete_exec(&mut self, exec: &str) -> Result<Deleted> {
        let id = ProcessId::Exec(exec.to_owned());
        let process = self.process(&id)?;
        process.status().check(Call::Delete)?;
        let deleted = Deleted {
            pid: process.pid(),
            exit: process.status().exit().unwrap_or(Exit::now(0)),
        };
        if let Some(exec) = self.execs.remove(exec) {
            exec.files.remove();
            self.ending.retain(|ending| !ending.is_finished());
            self.ending.extend(exec.process.io.end());
        }
        self.inbox.views.remove(&id);
        Ok(deleted)
    }

    pub(super) fn delete(&mut self, reply: Reply<Deleted>) {
        if !self.deleted.is_empty() {
            return self.deleted.push(reply);
        }
        let status = self.init.status();
        if let Err(error) = status.check(Call::Delete) {
            return answer(reply, Err(error));
        }
        match status {
            Status::Stopped(_) => {
                self.deleted.push(reply);
                self.take_down();
            }
            // The teardown begins when the exit is published.
            Status::Ending(_) | Status::Ended(_) => {
                self.deleted.push(reply);
                if let Life::Ended(End {
                    output: Output::BeingRead(reading),
                    ..
                }) = self.init.life()
                {
                    // Ends the wait for the reader: a client that deletes the container reads no more.
                    reading.notify_one();
                }
            }
            // A container that was never restored has no process.
            Status::Created if self.init.pid().is_none() => {
                self.deleted.push(reply);
                self.take_down();
            }
            // Only an exec fails. Running and Paused are refused above.
            Status::Created | Status::Running | Status::Paused | Status::Failed(_) => {
                // Never started: the init is killed first. The teardown begins after the exit.
                match self.signal(&ProcessId::Init, Signal::KILL) {
                    Ok(()) => {
                        self.deleted.push(reply);
                        self.thaw_to_die(None);
                    }
                    Err(Error::NotFound(_)) => self.deleted.push(reply),
                    Err(error) => answer(reply, Err(error)),
                }
            }
        }
    }

    fn take_down(&mut self) {
        let remains = self.remains.clone();
        let mut ending = std::mem::take(&mut self.ending);
        let execs = self.execs.values_mut().map(|exec| &mut exec.process);
        for process in execs.chain([&mut self.init]) {
            ending.extend(std::mem::replace(&mut process.io, Io::none()).end());
        }
        self.jobs.spawn(async move {
            let taken_down = take_down(remains, Why::Deleted).await;
            // Files and loggers get all output before the answer, because the shim may end after the answer.
            for ending in ending {
                // No error: the task does not panic, and nobody aborts the task.
                let _ = ending.await;
            }
            Done::TakenDown(taken_down)
        });
    }

    /// Takes in the result of the teardown and answers all callers. Returns true when the container is gone. After a
    /// failure the container stays, and the callers may try again.
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
        let deleted = Deleted {
            pid: self.init.pid(),
            exit: self.init.status().exit().unwrap_or(Exit::now(0)),
        };
        debug!(container = self.id; "container deleted");
        self.shared.events.send(Event::Delete {
            container: self.id.clone(),
            pid: deleted.pid,
            exit: deleted.exit,
        });
        // Closed before the answer, so that a Shutdown that follows the answer finds the container gone.
        self.inbox.requests.close();
        answer(reply, Ok(deleted));
        for other in replies {
            answer(other, Err(no_process(&ProcessId::Init)));
        }
        true
    }
}
