//! One container on a shim of its own, by Task calls: for what neither CRI nor `ctr` can ask for.

use std::time::Duration;

use containerd_shim_protos::api::{
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ResumeRequest, ShutdownRequest, StartRequest, StartResponse,
    StateRequest, StateResponse, StatsRequest, StatsResponse, Status, UpdateTaskRequest,
    WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use serde_json::{Value, json};

use crate::raw::{Bundle, Shim};
use crate::until::eventually;

/// A container whose init runs.
pub struct Task<'a> {
    bundle: Bundle<'a>,
    shim: Shim,
    /// The init.
    pub pid: i32,
}

type Answer<T> = Result<T, String>;

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

    fn id(&self) -> String {
        self.bundle.id.clone()
    }

    /// Start of the init (`""`) or of an exec; its pid.
    pub fn start(&self, exec: &str) -> Answer<i32> {
        let request = StartRequest {
            id: self.id(),
            exec_id: exec.to_owned(),
            ..StartRequest::default()
        };
        let response: StartResponse = self.shim.call("Start", &request)?;
        Ok(response.pid.cast_signed())
    }

    /// Adds an exec that runs `command`.
    pub fn exec(&self, exec: &str, command: &[&str]) -> Answer<()> {
        let process = json!({
            "user": {"uid": 0, "gid": 0}, "args": command, "cwd": "/", "env": ["PATH=/bin"],
        });
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
            value: serde_json::to_vec(&process).unwrap(),
            ..Any::default()
        };
        let request = ExecProcessRequest {
            id: self.id(),
            exec_id: exec.to_owned(),
            spec: Some(spec).into(),
            ..ExecProcessRequest::default()
        };
        self.shim.call::<Empty>("Exec", &request).map(drop)
    }

    /// Where the init (`""`) or an exec is in its life.
    pub fn state(&self, exec: &str) -> Answer<Status> {
        let request = StateRequest {
            id: self.id(),
            exec_id: exec.to_owned(),
            ..StateRequest::default()
        };
        let response: StateResponse = self.shim.call("State", &request)?;
        Ok(response.status.enum_value_or_default())
    }

    /// The end of the init (`""`) or of an exec: its exit code.
    pub fn wait(&self, exec: &str) -> Answer<u32> {
        let request = WaitRequest {
            id: self.id(),
            exec_id: exec.to_owned(),
            ..WaitRequest::default()
        };
        let response: WaitResponse = self.shim.call("Wait", &request)?;
        Ok(response.exit_status)
    }

    /// A signal to the init (`""`) or to an exec.
    pub fn kill(&self, exec: &str, signal: u32) -> Answer<()> {
        let request = KillRequest {
            id: self.id(),
            exec_id: exec.to_owned(),
            signal,
            ..KillRequest::default()
        };
        self.shim.call::<Empty>("Kill", &request).map(drop)
    }

    /// A signal to all processes.
    pub fn kill_all(&self, signal: u32) -> Answer<()> {
        let request = KillRequest {
            id: self.id(),
            signal,
            all: true,
            ..KillRequest::default()
        };
        self.shim.call::<Empty>("Kill", &request).map(drop)
    }

    /// Freezes.
    pub fn pause(&self) -> Answer<()> {
        let request = PauseRequest {
            id: self.id(),
            ..PauseRequest::default()
        };
        self.shim.call::<Empty>("Pause", &request).map(drop)
    }

    /// Thaws.
    pub fn resume(&self) -> Answer<()> {
        let request = ResumeRequest {
            id: self.id(),
            ..ResumeRequest::default()
        };
        self.shim.call::<Empty>("Resume", &request).map(drop)
    }

    /// The cgroup's counters.
    pub fn stats(&self) -> Answer<Any> {
        let request = StatsRequest {
            id: self.id(),
            ..StatsRequest::default()
        };
        let response: StatsResponse = self.shim.call("Stats", &request)?;
        Ok(response.stats.into_option().unwrap_or_default())
    }

    /// The processes: pid, and what is said of it.
    pub fn pids(&self) -> Answer<Vec<(i32, Option<Any>)>> {
        let request = PidsRequest {
            id: self.id(),
            ..PidsRequest::default()
        };
        let response: PidsResponse = self.shim.call("Pids", &request)?;
        let listed = response.processes.into_iter();
        Ok(listed
            .map(|process| (process.pid.cast_signed(), process.info.into_option()))
            .collect())
    }

    /// Changes limits: OCI resources.
    pub fn update(&self, resources: &Value) -> Answer<()> {
        let resources = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
            value: serde_json::to_vec(resources).unwrap(),
            ..Any::default()
        };
        let request = UpdateTaskRequest {
            id: self.id(),
            resources: Some(resources).into(),
            ..UpdateTaskRequest::default()
        };
        self.shim.call::<Empty>("Update", &request).map(drop)
    }

    /// Removes the init (`""`), and with it the container, or an exec; the exit code.
    pub fn delete(&self, exec: &str) -> Answer<u32> {
        let request = DeleteRequest {
            id: self.id(),
            exec_id: exec.to_owned(),
            ..DeleteRequest::default()
        };
        let response: DeleteResponse = self.shim.call("Delete", &request)?;
        Ok(response.exit_status)
    }

    /// SIGKILL, Delete, Shutdown and `delete`, as containerd does it; the exit code.
    #[track_caller]
    pub fn end(self) -> u32 {
        // It may have ended.
        let _ = self.kill("", 9);
        let code = eventually(Duration::from_secs(20), || self.delete(""));
        self.shut_down();
        code
    }

    /// The rest of [`Self::end`] after a Delete.
    pub fn shut_down(self) {
        let request = ShutdownRequest {
            id: self.id(),
            ..ShutdownRequest::default()
        };
        let _ = self.shim.call::<Empty>("Shutdown", &request);
        self.bundle.delete();
    }
}
