//! The calls of containerd 2.3 and later, made without that containerd: starts the shim with `BootstrapParams`, reads
//! `BootstrapResult`, dials, and calls the Sandbox and Task services in containerd's order.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use containerd_shim_protos::api::DeleteRequest;
use containerd_shim_protos::bootstrap_api::{BootstrapResult, Extension};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, SandboxStatusRequest, SandboxStatusResponse,
    ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest, StartSandboxResponse,
    StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest, WaitSandboxResponse,
};
use containerd_shim_protos::ttrpc::Code;
use k8s_cri::v1 as api;
use prost::Message as _;

use crate::calls::{Answer, Shim, runtime_options};
use crate::daemon::Daemon;
use crate::frames::Connection;
use crate::leaks::{TaskId, grpc_address, shim_socket};
use crate::raw::Bundle;
use crate::slot::text;
use crate::until::within;

const SANDBOX: &str = "containerd.runtime.sandbox.v1.Sandbox";
const TASK: &str = "containerd.task.v3.Task";

/// The type URL of the options of `CreateSandbox`.
pub const CONFIG: &str = "runtime.v1.PodSandboxConfig";

/// A shim that was started for a sandbox, and the connections to its services.
pub struct Driver<'a> {
    /// The sandbox's bundle. The bundle's id is the sandbox's id.
    pub bundle: Bundle<'a>,
    /// The answer of `start`, every byte.
    pub answer: Vec<u8>,
    /// The answer that containerd 2.3 expects of `start`.
    pub expected: Vec<u8>,
    /// The socket that the shim listens on.
    pub socket: PathBuf,
    /// The shim's Sandbox service.
    pub sandbox: Shim,
    /// The shim's Task service, version 3.
    pub task: Shim,
}

impl<'a> Driver<'a> {
    /// Starts the shim for the sandbox `id`, with a socket directory of the test's own.
    #[track_caller]
    pub fn start(daemon: &'a Daemon, id: &str) -> Self {
        Self::start_with(daemon, id, "")
    }

    /// As [`Self::start`], with these lines of an options table.
    #[track_caller]
    pub fn start_with(daemon: &'a Daemon, id: &str, options: &str) -> Self {
        let bundle = Bundle::new(daemon, id);
        let sockets = daemon.directory().join("s");
        let grpc = grpc_address(&daemon.names);
        let mut params = bundle.bootstrap_params();
        params.set_socket_dir(text(&sockets));
        if !options.is_empty() {
            params.extensions.push(Extension {
                value: Some(runtime_options(options)).into(),
                ..Extension::default()
            });
        }
        let ran = bundle.start(&params.write_to_bytes().unwrap());
        assert!(ran.status.success(), "start: {}", ran.text());
        // The socket's name as containerd computes it, in the directory of `BootstrapParams`.
        let group = TaskId {
            namespace: daemon.names.name(),
            id: id.to_owned(),
        };
        let socket = sockets.join(shim_socket(&grpc, &group).file_name().unwrap());
        let expected = BootstrapResult {
            version: 3,
            address: format!("unix://{}", text(&socket)),
            protocol: "ttrpc".to_owned(),
            ..BootstrapResult::default()
        };
        Self {
            bundle,
            answer: ran.output,
            sandbox: Shim::dial(&expected.address, SANDBOX),
            task: Shim::dial(&expected.address, TASK),
            expected: expected.write_to_bytes().unwrap(),
            socket,
        }
    }

    /// Gives up each call after this time.
    #[must_use]
    pub fn with_patience(mut self, patience: Duration) -> Self {
        self.sandbox = self.sandbox.with_patience(patience);
        self.task = self.task.with_patience(patience);
        self
    }

    fn id(&self) -> String {
        self.bundle.id.clone()
    }

    /// `CreateSandbox` with these options.
    pub fn create_with(&self, type_url: &str, value: Vec<u8>, network: &str) -> Answer<()> {
        let request = CreateSandboxRequest {
            sandbox_id: self.id(),
            bundle_path: text(&self.bundle.path),
            options: Some(Any {
                type_url: type_url.to_owned(),
                value,
                ..Any::default()
            })
            .into(),
            netns_path: network.to_owned(),
            ..CreateSandboxRequest::default()
        };
        self.sandbox
            .call::<CreateSandboxResponse>("CreateSandbox", &request)
            .map(drop)
    }

    /// `CreateSandbox` of a pod.
    pub fn create(&self, config: &api::PodSandboxConfig, network: &str) -> Answer<()> {
        self.create_with(CONFIG, config.encode_to_vec(), network)
    }

    /// `StartSandbox`: the answer, and the OCI spec in it.
    #[track_caller]
    pub fn start_sandbox(&self) -> (StartSandboxResponse, serde_json::Value) {
        let request = StartSandboxRequest {
            sandbox_id: self.id(),
            ..StartSandboxRequest::default()
        };
        let started: StartSandboxResponse = self.sandbox.call("StartSandbox", &request).unwrap();
        let spec = serde_json::from_slice(&started.spec.value).unwrap();
        (started, spec)
    }

    /// `SandboxStatus`, verbose: the answer, and the JSON in it, with what only this shim knows as `pause`.
    pub fn status(&self) -> Answer<(SandboxStatusResponse, serde_json::Value)> {
        let request = SandboxStatusRequest {
            sandbox_id: self.id(),
            verbose: true,
            ..SandboxStatusRequest::default()
        };
        let status: SandboxStatusResponse = self.sandbox.call("SandboxStatus", &request)?;
        let mut info: serde_json::Value = serde_json::from_str(&status.info["info"]).unwrap();
        info["pause"] = serde_json::from_str(&status.info["pause"]).unwrap();
        Ok((status, info))
    }

    /// `WaitSandbox`.
    pub fn wait(&self) -> Answer<WaitSandboxResponse> {
        let request = WaitSandboxRequest {
            sandbox_id: self.id(),
            ..WaitSandboxRequest::default()
        };
        self.sandbox.call("WaitSandbox", &request)
    }

    /// `StopSandbox`.
    pub fn stop(&self) -> Answer<()> {
        let request = StopSandboxRequest {
            sandbox_id: self.id(),
            ..StopSandboxRequest::default()
        };
        self.sandbox
            .call::<StopSandboxResponse>("StopSandbox", &request)
            .map(drop)
    }

    fn shutdown(&self) -> ShutdownSandboxRequest {
        ShutdownSandboxRequest {
            sandbox_id: self.id(),
            ..ShutdownSandboxRequest::default()
        }
    }

    /// `ShutdownSandbox`, and what [`Driver::ends`] sees.
    #[track_caller]
    pub fn shut_down(self) {
        let pid = self.shim();
        self.sandbox
            .call::<ShutdownSandboxResponse>("ShutdownSandbox", &self.shutdown())
            .unwrap();
        self.ends(pid);
    }

    /// `ShutdownSandbox`, and in the same moment, behind it on the wire, a Delete of the sandbox by the Task API. The
    /// shutdown must succeed; what [`Driver::ends`] sees follows.
    #[track_caller]
    pub fn shut_down_with_a_delete(self) {
        let pid = self.shim();
        let delete = DeleteRequest {
            id: self.id(),
            ..DeleteRequest::default()
        };
        let mut connection = Connection::to(&text(&self.socket))
            .with(1, SANDBOX, "ShutdownSandbox", &self.shutdown())
            .with(3, TASK, "Delete", &delete)
            .send();
        let answers = BTreeMap::from([connection.answer(), connection.answer()]);
        assert_eq!(answers[&1], Code::OK, "{answers:?}");
        drop(connection);
        self.ends(pid);
    }

    /// Waits until the shim is gone, and runs `delete` as containerd does when the connection closes.
    #[track_caller]
    fn ends(self, pid: i32) {
        assert!(!self.socket.exists(), "the socket is still there");
        wait_until_gone(pid);
        let deleted = self.bundle.delete();
        assert!(deleted.status.success(), "delete: {}", deleted.text());
    }

    /// The shim's pid.
    #[track_caller]
    pub fn shim(&self) -> i32 {
        let text = fs::read_to_string(self.bundle.path.join("shim.pid")).unwrap();
        text.trim().parse().unwrap()
    }
}

/// Waits until the process is gone.
#[track_caller]
pub fn wait_until_gone(pid: i32) {
    within(Duration::from_secs(10), || {
        match crate::proc::Process::of(pid) {
            Some(process) if process.alive() => Err(format!("still there: {}", process.describe())),
            _ => Ok(()),
        }
    })
    .unwrap_or_else(|why| panic!("{why}"));
}
