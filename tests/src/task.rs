//! One container on a shim of its own, by Task calls that neither CRI nor `ctr` can make.

use std::time::Duration;

use containerd_shim_protos::api::{Empty, KillRequest, Status};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use serde_json::Value;

use crate::calls::{Answer, Shim, Streams};
use crate::raw::Bundle;
use crate::until::eventually;

/// A container and its shim.
pub struct Task<'a> {
    bundle: Bundle<'a>,
    shim: Shim,
    /// The init's pid.
    pub pid: i32,
}

impl<'a> Task<'a> {
    /// Starts the shim with these bytes on its stdin, and creates and starts the container.
    #[track_caller]
    pub fn run(bundle: Bundle<'a>, stdin: &[u8]) -> Self {
        let task = Self::create(bundle, stdin);
        task.start("").unwrap();
        task
    }

    /// Starts the shim with these bytes on its stdin, and creates the container.
    #[track_caller]
    pub fn create(bundle: Bundle<'a>, stdin: &[u8]) -> Self {
        let started = bundle.start(stdin);
        assert!(started.status.success(), "start: {}", started.text());
        let shim = Shim::connect(&started);
        let pid = bundle
            .create(&shim)
            .unwrap_or_else(|said| panic!("create: {said}"));
        Self {
            bundle,
            shim,
            pid: pid.cast_signed(),
        }
    }

    /// Start of the init (`""`) or of an exec. Gives the pid of the process.
    pub fn start(&self, exec: &str) -> Answer<i32> {
        self.shim.start(&self.bundle.id, exec).map(u32::cast_signed)
    }

    /// Adds an exec that runs `command`.
    pub fn exec(&self, exec: &str, command: &[&str]) -> Answer<()> {
        self.shim
            .exec(&self.bundle.id, exec, command, &Streams::default())
    }

    /// The status of the init (`""`) or of an exec.
    pub fn state(&self, exec: &str) -> Answer<Status> {
        let state = self.shim.state(&self.bundle.id, exec)?;
        Ok(state.status.enum_value_or_default())
    }

    /// Waits for the end of the init (`""`) or of an exec. Gives the exit code.
    pub fn wait(&self, exec: &str) -> Answer<u32> {
        self.shim.wait(&self.bundle.id, exec)
    }

    /// Pause and SIGKILL at once. The pause may come too late.
    pub fn pause_and_kill(&self) -> Answer<()> {
        let (shim, id) = (&self.shim, &*self.bundle.id);
        std::thread::scope(|scope| {
            scope.spawn(|| shim.pause(id));
            shim.kill(id, "", 9)
        })
    }

    /// A signal to the init (`""`) or to an exec.
    pub fn kill(&self, exec: &str, signal: u32) -> Answer<()> {
        self.shim.kill(&self.bundle.id, exec, signal)
    }

    /// A signal to all processes.
    pub fn kill_all(&self, signal: u32) -> Answer<()> {
        let request = KillRequest {
            id: self.bundle.id.clone(),
            signal,
            all: true,
            ..KillRequest::default()
        };
        self.shim.call::<Empty>("Kill", &request).map(drop)
    }

    /// Pause: freezes the container.
    pub fn pause(&self) -> Answer<()> {
        self.shim.pause(&self.bundle.id)
    }

    /// Resume: thaws the container.
    pub fn resume(&self) -> Answer<()> {
        self.shim.resume(&self.bundle.id)
    }

    /// The cgroup's counters.
    pub fn stats(&self) -> Answer<Any> {
        self.shim.stats(&self.bundle.id)
    }

    /// The processes: pid and details of each.
    pub fn pids(&self) -> Answer<Vec<(i32, Option<Any>)>> {
        let listed = self.shim.pids(&self.bundle.id)?.into_iter();
        Ok(listed
            .map(|process| (process.pid.cast_signed(), process.info.into_option()))
            .collect())
    }

    /// Update: changes limits. `resources` are OCI resources.
    pub fn update(&self, resources: &Value) -> Answer<()> {
        self.shim.update(&self.bundle.id, resources)
    }

    /// Delete of the container (`""`) or of an exec. Gives the exit code.
    pub fn delete(&self, exec: &str) -> Answer<u32> {
        self.shim.delete(&self.bundle.id, exec)
    }

    /// SIGKILL, Delete, Shutdown and `delete`, in containerd's order. Gives the exit code.
    #[track_caller]
    pub fn end(self) -> u32 {
        // The container may have ended by itself.
        let _ = self.kill("", 9);
        let code = eventually(Duration::from_secs(20), || {
            self.delete("").map_err(|refusal| refusal.to_string())
        });
        self.shut_down();
        code
    }

    /// The rest of [`Self::end`] after a Delete.
    pub fn shut_down(self) {
        self.bundle.shut_down(&self.shim);
    }
}
