//! The ttrpc calls that containerd makes to a shim, made without containerd. Every answer comes with its code.

use std::fmt;
use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::Client;
use containerd_shim_protos::api::{
    CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ResumeRequest, ShutdownRequest, StartRequest, StartResponse,
    StateRequest, StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest,
    WaitResponse,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{CodedOutputStream, Message};
use containerd_shim_protos::ttrpc::{self, Code};
use containerd_shim_protos::types::mount::Mount;
use containerd_shim_protos::types::task::ProcessInfo;
use serde_json::{Value, json};

use crate::raw::Ran;
use crate::slot::text;

/// How long an answer may take on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// The refusal of a call.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    /// The code that containerd branches on; `None` when the connection failed.
    pub code: Option<Code>,
    /// The text of the refusal.
    pub message: String,
}

impl fmt::Display for Refusal {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.code {
            Some(code) => write!(to, "{code:?}: {}", self.message),
            None => to.write_str(&self.message),
        }
    }
}

impl From<ttrpc::Error> for Refusal {
    fn from(error: ttrpc::Error) -> Self {
        if let ttrpc::Error::RpcStatus(status) = error {
            return Self {
                code: Some(status.code()),
                message: status.message,
            };
        }
        Self {
            code: None,
            message: error.to_string(),
        }
    }
}

/// The answer to a call.
pub type Answer<T> = Result<T, Refusal>;

/// The code of an answer: `OK`, or the refusal's code.
#[track_caller]
pub fn code<T>(answer: &Answer<T>) -> Code {
    match answer {
        Ok(_) => Code::OK,
        Err(refusal) => refusal
            .code
            .unwrap_or_else(|| panic!("no answer: {}", refusal.message)),
    }
}

/// The code and the text of an answer that must be a refusal.
#[track_caller]
pub fn refusal<T>(answer: Answer<T>) -> (Code, String) {
    let code = code(&answer);
    match answer {
        Ok(_) => panic!("not refused"),
        Err(refusal) => (code, refusal.message),
    }
}

/// The streams of a process, as containerd names them: paths of FIFOs, URIs, or nothing.
#[derive(Clone, Debug, Default)]
pub struct Streams {
    /// Input.
    pub stdin: String,
    /// Output.
    pub stdout: String,
    /// Errors.
    pub stderr: String,
    /// A terminal.
    pub terminal: bool,
}

impl Streams {
    /// Both outputs under this name.
    pub fn both(name: &str) -> Self {
        Self {
            stdout: name.to_owned(),
            stderr: name.to_owned(),
            ..Self::default()
        }
    }

    /// A terminal with this output.
    pub fn terminal(name: &str) -> Self {
        Self {
            stdout: name.to_owned(),
            terminal: true,
            ..Self::default()
        }
    }
}

/// A connection to a service of a shim. Methods named after a call (`start`, `exec`, …) make that call of the Task
/// service.
pub struct Shim {
    client: Client,
    service: &'static str,
    patience: Duration,
}

impl Shim {
    /// Connects to the shim that gave this answer to `start`, for the version of the Task service in the answer.
    #[track_caller]
    pub fn connect(started: &Ran) -> Self {
        Self::connect_at(started, &started.address())
    }

    /// As [`Self::connect`], where the socket has another address outside of the shim's mount namespace.
    #[track_caller]
    pub fn connect_at(started: &Ran, address: &str) -> Self {
        let service = if started.answer().0 >= 3 {
            "containerd.task.v3.Task"
        } else {
            "containerd.task.v2.Task"
        };
        Self::dial(address, service)
    }

    /// Connects to a service at this address.
    #[track_caller]
    pub fn dial(address: &str, service: &'static str) -> Self {
        Self::try_dial(address, service, PATIENCE).unwrap_or_else(|error| panic!("{error}"))
    }

    /// As [`Self::dial`], with the refusal, and with the time that an answer may take.
    pub fn try_dial(
        address: &str,
        service: &'static str,
        patience: Duration,
    ) -> Result<Self, String> {
        let client = Client::connect(address).map_err(|error| format!("{address}: {error}"))?;
        Ok(Self {
            client,
            service,
            patience,
        })
    }

    /// Gives up each call after this time.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// Calls a method.
    pub fn call<T: Message>(&self, method: &str, request: &impl Message) -> Answer<T> {
        self.call_for(method, request, self.patience)
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
        let response = self.client.request(request)?;
        Ok(T::parse_from_bytes(&response.payload).unwrap())
    }

    /// Calls a method that must fail. Gives the code and the text of the refusal.
    #[track_caller]
    pub fn must_refuse(&self, method: &str, request: &impl Message) -> (Code, String) {
        refusal(self.call::<Empty>(method, request))
    }

    /// Connect: the shim's own pid, and the task's pid.
    pub fn pids_of(&self, id: &str) -> Answer<ConnectResponse> {
        let request = ConnectRequest {
            id: id.to_owned(),
            ..ConnectRequest::default()
        };
        self.call("Connect", &request)
    }

    /// Create from a bundle, with these mounts as root filesystem; without any, the bundle's own. Gives the pid of the
    /// init.
    pub fn create(
        &self,
        id: &str,
        bundle: &Path,
        streams: &Streams,
        rootfs: Vec<Mount>,
    ) -> Answer<u32> {
        let request = CreateTaskRequest {
            id: id.to_owned(),
            bundle: text(bundle),
            rootfs,
            stdin: streams.stdin.clone(),
            stdout: streams.stdout.clone(),
            stderr: streams.stderr.clone(),
            terminal: streams.terminal,
            ..CreateTaskRequest::default()
        };
        self.call::<CreateTaskResponse>("Create", &request)
            .map(|response| response.pid)
    }

    /// Start of the init (an empty `exec`) or of an exec. Gives the pid of the process.
    pub fn start(&self, id: &str, exec: &str) -> Answer<u32> {
        let request = StartRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            ..StartRequest::default()
        };
        self.call::<StartResponse>("Start", &request)
            .map(|response| response.pid)
    }

    /// Exec: adds a process, and does not start the process.
    pub fn exec(&self, id: &str, exec: &str, command: &[&str], streams: &Streams) -> Answer<()> {
        let process = json!({
            "user": {"uid": 0, "gid": 0}, "args": command, "cwd": "/", "env": ["PATH=/bin"],
            "noNewPrivileges": true, "terminal": streams.terminal,
        });
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
            value: serde_json::to_vec(&process).unwrap(),
            ..Any::default()
        };
        let request = ExecProcessRequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            stdin: streams.stdin.clone(),
            stdout: streams.stdout.clone(),
            stderr: streams.stderr.clone(),
            terminal: streams.terminal,
            spec: Some(spec).into(),
            ..ExecProcessRequest::default()
        };
        self.call::<Empty>("Exec", &request).map(drop)
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
        self.wait_for(id, exec, self.patience)
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
        self.call::<Empty>("Kill", &request).map(drop)
    }

    /// Update: changes limits. `resources` are OCI resources.
    pub fn update(&self, id: &str, resources: &Value) -> Answer<()> {
        let resources = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
            value: serde_json::to_vec(resources).unwrap(),
            ..Any::default()
        };
        let request = UpdateTaskRequest {
            id: id.to_owned(),
            resources: Some(resources).into(),
            ..UpdateTaskRequest::default()
        };
        self.call::<Empty>("Update", &request).map(drop)
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

    /// CloseIO of the input.
    pub fn close_stdin(&self, id: &str, exec: &str) -> Answer<()> {
        let request = CloseIORequest {
            id: id.to_owned(),
            exec_id: exec.to_owned(),
            stdin: true,
            ..CloseIORequest::default()
        };
        self.call::<Empty>("CloseIO", &request).map(drop)
    }

    /// Pause.
    pub fn pause(&self, id: &str) -> Answer<()> {
        let request = PauseRequest {
            id: id.to_owned(),
            ..PauseRequest::default()
        };
        self.call::<Empty>("Pause", &request).map(drop)
    }

    /// Resume.
    pub fn resume(&self, id: &str) -> Answer<()> {
        let request = ResumeRequest {
            id: id.to_owned(),
            ..ResumeRequest::default()
        };
        self.call::<Empty>("Resume", &request).map(drop)
    }

    /// Stats.
    pub fn stats(&self, id: &str) -> Answer<Any> {
        let request = StatsRequest {
            id: id.to_owned(),
            ..StatsRequest::default()
        };
        self.call::<StatsResponse>("Stats", &request)
            .map(|response| response.stats.into_option().unwrap_or_default())
    }

    /// Pids.
    pub fn pids(&self, id: &str) -> Answer<Vec<ProcessInfo>> {
        let request = PidsRequest {
            id: id.to_owned(),
            ..PidsRequest::default()
        };
        self.call::<PidsResponse>("Pids", &request)
            .map(|response| response.processes)
    }

    /// Shutdown. A shim that ends before its answer is no failure.
    pub fn shutdown(&self, id: &str) {
        let request = ShutdownRequest {
            id: id.to_owned(),
            ..ShutdownRequest::default()
        };
        let _ = self.call_for::<Empty>("Shutdown", &request, Duration::from_secs(10));
    }
}

/// An options table as containerd sends it: `runtimeoptions.v1.Options` with these lines as `config_body`.
pub fn runtime_options(lines: &str) -> Any {
    let mut value = Vec::new();
    let mut output = CodedOutputStream::vec(&mut value);
    output.write_string(3, lines).unwrap();
    output.flush().unwrap();
    drop(output);
    Any {
        type_url: "runtimeoptions.v1.Options".to_owned(),
        value,
        ..Any::default()
    }
}
