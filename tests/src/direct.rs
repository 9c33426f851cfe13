//! The Task service of one shim, called from many threads at once, each answer with its ttrpc code: for races and storms.
//!
//! One shim is started as [`crate::raw`] does; its containers share a root filesystem and are told apart by their ids, as
//! the containers of a pod are. Its events go to the test's real containerd.

use std::collections::BTreeSet;
use std::fs;
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use containerd_shim_protos::Client;
use containerd_shim_protos::api::{
    ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteRequest,
    DeleteResponse, Empty, ExecProcessRequest, KillRequest, PidsRequest, PidsResponse,
    ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, WaitRequest,
    WaitResponse,
};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::ttrpc::{self, Code};
use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::raw::{Bundle, Ran};
use crate::slot::text;
use crate::until::eventually;

/// How long an answer may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a shim refused.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// The code that containerd branches on; none when the connection failed.
    pub code: Option<Code>,
    /// The words.
    pub message: String,
}

/// What a call gives.
pub type Answer<T> = Result<T, Refusal>;

/// The code of an answer: `OK`, or that of the refusal.
#[track_caller]
pub fn code<T>(answer: &Answer<T>) -> Code {
    match answer {
        Ok(_) => Code::OK,
        Err(refusal) => refusal
            .code
            .unwrap_or_else(|| panic!("no answer: {}", refusal.message)),
    }
}

/// Streams of a process: paths of FIFOs, or nothing.
#[derive(Clone, Debug, Default)]
pub struct Streams {
    /// Path of the FIFO.
    pub stdin: String,
    /// Path of the FIFO.
    pub stdout: String,
    /// Path of the FIFO.
    pub stderr: String,
    /// On a terminal.
    pub terminal: bool,
}

/// A connection to a shim.
pub struct Connection {
    client: Client,
    service: &'static str,
}

impl Connection {
    /// Connects to the shim that answered so to `start`.
    #[track_caller]
    pub fn new(started: &Ran) -> Self {
        let address = started.address();
        let client = Client::connect(&address).unwrap_or_else(|error| panic!("{address}: {error}"));
        let service = if started.text().contains("\"version\":3") {
            "containerd.task.v3.Task"
        } else {
            "containerd.task.v2.Task"
        };
        Self { client, service }
    }

    /// Calls a method.
    pub fn call<T: Message>(&self, method: &str, request: &impl Message) -> Answer<T> {
        self.call_for(method, request, PATIENCE)
    }

    /// Calls a method, and gives up after this time.
    pub fn call_for<T: Message>(
        &self,
        method: &str,
        request: &impl Message,
        timeout: Duration,
    ) -> Answer<T> {
        let request = ttrpc::Request {
            service: self.service.to_owned(),
            method: method.to_owned(),
            timeout_nano: i64::try_from(timeout.as_nanos()).unwrap(),
            payload: request.write_to_bytes().unwrap(),
            ..ttrpc::Request::default()
        };
        let refused = |error: &ttrpc::Error| Refusal {
            code: if let ttrpc::Error::RpcStatus(status) = error {
                Some(status.code())
            } else {
                None
            },
            message: error.to_string(),
        };
        let response = self.client.request(request).map_err(|e| refused(&e))?;
        Ok(T::parse_from_bytes(&response.payload).unwrap())
    }

    /// Start of the init, or of an exec.
    pub fn start(&self, id: &str, exec: &str) -> Answer<u32> {
        let request = StartRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..StartRequest::default()
        };
        self.call::<StartResponse>("Start", &request)
            .map(|response| response.pid)
    }

    /// Exec of `sh -c SCRIPT`.
    pub fn exec(&self, id: &str, exec: &str, script: &str, streams: &Streams) -> Answer<()> {
        self.exec_command(id, exec, &["sh", "-c", script], streams)
    }

    /// Exec.
    pub fn exec_command(
        &self,
        id: &str,
        exec: &str,
        command: &[&str],
        streams: &Streams,
    ) -> Answer<()> {
        let process = json!({
            "user": {"uid": 0, "gid": 0}, "args": command, "cwd": "/", "env": ["PATH=/bin"],
            "terminal": streams.terminal,
        });
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
            value: serde_json::to_vec(&process).unwrap(),
            ..Any::default()
        };
        let request = ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            terminal: streams.terminal,
            stdin: streams.stdin.clone(),
            stdout: streams.stdout.clone(),
            stderr: streams.stderr.clone(),
            spec: Some(spec).into(),
            ..ExecProcessRequest::default()
        };
        self.call::<Empty>("Exec", &request).map(|_| ())
    }

    /// State.
    pub fn state(&self, id: &str, exec: &str) -> Answer<StateResponse> {
        let request = StateRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..StateRequest::default()
        };
        self.call("State", &request)
    }

    /// Wait: the exit code.
    pub fn wait(&self, id: &str, exec: &str) -> Answer<u32> {
        self.wait_for(id, exec, PATIENCE)
    }

    /// Wait, given up after this time.
    pub fn wait_for(&self, id: &str, exec: &str, timeout: Duration) -> Answer<u32> {
        let request = WaitRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..WaitRequest::default()
        };
        self.call_for::<WaitResponse>("Wait", &request, timeout)
            .map(|response| response.exit_status)
    }

    /// Kill.
    pub fn kill(&self, id: &str, exec: &str, signal: u32) -> Answer<()> {
        let request = KillRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            signal,
            ..KillRequest::default()
        };
        self.call::<Empty>("Kill", &request).map(|_| ())
    }

    /// Delete: the exit code.
    pub fn delete(&self, id: &str, exec: &str) -> Answer<u32> {
        let request = DeleteRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..DeleteRequest::default()
        };
        self.call::<DeleteResponse>("Delete", &request)
            .map(|response| response.exit_status)
    }

    /// Pids.
    pub fn pids(&self, id: &str) -> Answer<Vec<u32>> {
        let request = PidsRequest {
            id: id.to_owned(),
            ..PidsRequest::default()
        };
        self.call::<PidsResponse>("Pids", &request)
            .map(|response| response.processes.iter().map(|one| one.pid).collect())
    }

    /// Connect: the pid of the task.
    pub fn connect(&self, id: &str) -> Answer<u32> {
        let request = ConnectRequest {
            id: id.to_owned(),
            ..ConnectRequest::default()
        };
        self.call::<ConnectResponse>("Connect", &request)
            .map(|response| response.task_pid)
    }

    /// Shutdown; that the shim ends before it has answered is no failure.
    pub fn shutdown(&self, id: &str) {
        let request = ShutdownRequest {
            id: id.to_owned(),
            ..ShutdownRequest::default()
        };
        let _ = self.call_for::<Empty>("Shutdown", &request, Duration::from_secs(10));
    }
}

/// One shim and its containers.
pub struct Group<'a> {
    daemon: &'a Daemon,
    first: Bundle<'a>,
    tasks: Tasks,
}

/// The part of a [`Group`] that threads may share.
pub struct Tasks {
    id: String,
    bundle: PathBuf,
    spec: Value,
    namespace: String,
    cgroup_parent: String,
    started: Ran,
    ids: Mutex<BTreeSet<String>>,
    /// A connection.
    pub shim: Connection,
}

impl Deref for Group<'_> {
    type Target = Tasks;

    fn deref(&self) -> &Tasks {
        &self.tasks
    }
}

impl<'a> Group<'a> {
    /// Starts the shim, without a container.
    #[track_caller]
    pub fn start(daemon: &'a Daemon, id: &str) -> Self {
        let first = Bundle::new(daemon, id);
        let mut spec = first.plain(&[]);
        spec["root"]["path"] = json!(text(&first.path.join("rootfs")));
        // A network namespace costs the kernel most of the time that a container takes.
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "network");
        // The root is shared, and runc makes a link in /dev.
        let mounts = spec["mounts"].as_array_mut().unwrap();
        mounts.push(json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs"}));
        let first = first.spec(&spec);
        let started = first.start(b"");
        assert!(started.status.success(), "{}", started.text());
        daemon.look();
        let tasks = Tasks {
            id: id.to_owned(),
            bundle: first.path.clone(),
            spec,
            namespace: daemon.names.name(),
            cgroup_parent: daemon.names.cgroup_parent(),
            shim: Connection::new(&started),
            started,
            ids: Mutex::default(),
        };
        Self {
            daemon,
            first,
            tasks,
        }
    }

    /// Runs `delete` for the shim's first bundle.
    #[track_caller]
    pub fn run_delete(&self) -> Ran {
        self.first.delete()
    }

    /// Shutdown; waits until the shim is gone.
    #[track_caller]
    pub fn end(self) {
        let shim = self.daemon.shim();
        self.shim.shutdown(&self.id);
        eventually(Duration::from_secs(20), || {
            if shim.alive() {
                Err("the shim lives on after Shutdown".to_owned())
            } else {
                Ok(())
            }
        });
    }
}

impl Drop for Group<'_> {
    fn drop(&mut self) {
        for id in self.ids.lock().unwrap().iter() {
            self.daemon.expect_task(id);
            if std::thread::panicking() {
                let state = Path::new("/run/containerd/runc").join(&self.namespace);
                let _ = fs::remove_dir_all(state.join(id));
            }
        }
    }
}

impl Tasks {
    /// Another connection.
    #[track_caller]
    pub fn connect(&self) -> Connection {
        Connection::new(&self.started)
    }

    /// A bundle for container `id` that runs `sh -c SCRIPT`, changed by `change`.
    pub fn bundle(&self, id: &str, script: &str, change: impl FnOnce(&mut Value)) -> PathBuf {
        self.ids.lock().unwrap().insert(id.to_owned());
        let path = if id == self.id {
            self.bundle.clone()
        } else {
            self.bundle.join("members").join(id)
        };
        fs::create_dir_all(&path).unwrap();
        let mut spec = self.spec.clone();
        spec["process"]["args"] = json!(["sh", "-c", script]);
        spec["linux"]["cgroupsPath"] = json!(format!("{}/{id}", self.cgroup_parent));
        change(&mut spec);
        fs::write(path.join("config.json"), serde_json::to_vec(&spec).unwrap()).unwrap();
        path
    }

    /// Create of a container that runs `sh -c SCRIPT`.
    pub fn create(&self, id: &str, script: &str) -> Answer<u32> {
        let bundle = self.bundle(id, script, |_| {});
        self.create_from(id, &bundle)
    }

    /// Create of a container whose spec is changed first.
    pub fn create_with(
        &self,
        id: &str,
        script: &str,
        change: impl FnOnce(&mut Value),
    ) -> Answer<u32> {
        let bundle = self.bundle(id, script, change);
        self.create_from(id, &bundle)
    }

    /// Create from a bundle.
    pub fn create_from(&self, id: &str, bundle: &Path) -> Answer<u32> {
        let request = CreateTaskRequest {
            id: id.to_owned(),
            bundle: text(bundle),
            ..CreateTaskRequest::default()
        };
        self.shim
            .call::<CreateTaskResponse>("Create", &request)
            .map(|response| response.pid)
    }

    /// Removes the bundle of a deleted container.
    pub fn forget(&self, id: &str) {
        if id != self.id {
            fs::remove_dir_all(self.bundle.join("members").join(id)).unwrap();
        }
    }

    /// Create and Start of a container that must succeed; its pid.
    #[track_caller]
    pub fn run(&self, id: &str, script: &str) -> u32 {
        let pid = self
            .create(id, script)
            .unwrap_or_else(|refusal| panic!("create {id}: {refusal:?}"));
        self.shim
            .start(id, "")
            .unwrap_or_else(|refusal| panic!("start {id}: {refusal:?}"));
        pid
    }

    /// Kills a container and deletes it.
    #[track_caller]
    pub fn remove(&self, id: &str) {
        // It may have ended.
        let _ = self.shim.kill(id, "", 9);
        self.shim
            .wait(id, "")
            .unwrap_or_else(|refusal| panic!("wait for {id}: {refusal:?}"));
        self.shim
            .delete(id, "")
            .unwrap_or_else(|refusal| panic!("delete {id}: {refusal:?}"));
        self.forget(id);
    }
}
