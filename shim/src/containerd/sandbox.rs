//! The Sandbox service: decodes a request, calls the pod, encodes the answer. No logic.
//!
//! ```text
//!  containerd (sandboxer = "shim"):
//!   the pod's life       start ─▶ CreateSandbox ─▶ StartSandbox ─▶ WaitSandbox … StopSandbox ─▶ ShutdownSandbox
//!   for each container   Platform, SandboxStatus
//!   at any time          SandboxMetrics, PingSandbox
//! ```

use std::os::linux::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use containerd_shim_protos::sandbox_async::Sandbox;
use containerd_shim_protos::ttrpc::Result as Rpc;
use containerd_shim_protos::ttrpc::r#async::TtrpcContext;
use serde_json::{Value, json};

use super::convert::{metrics, timestamp, wire_pid};
use super::podconfig;
use crate::container::mailbox::View;
use crate::container::state::Status;
use crate::pod::sandbox::Request;
use crate::pod::{CreateSandbox, Described, Pod};

/// The type URL of an OCI spec, whose bytes are JSON.
const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";

/// The service.
#[derive(Debug, Clone)]
pub struct SandboxService {
    /// The pod that the service calls.
    pub pod: Arc<Pod>,
}

#[async_trait]
impl Sandbox for SandboxService {
    async fn create_sandbox(
        &self,
        _: &TtrpcContext,
        req: CreateSandboxRequest,
    ) -> Rpc<CreateSandboxResponse> {
        let create = CreateSandbox {
            config: podconfig::from_any(req.options.as_ref())?,
            id: req.sandbox_id,
            bundle: PathBuf::from(req.bundle_path),
            network: PathBuf::from(req.netns_path),
            annotations: req.annotations.into_iter().collect(),
        };
        self.pod.create_sandbox(create).await?;
        Ok(CreateSandboxResponse::default())
    }

    async fn start_sandbox(
        &self,
        _: &TtrpcContext,
        req: StartSandboxRequest,
    ) -> Rpc<StartSandboxResponse> {
        let (handle, described) = self.pod.sandbox(&req.sandbox_id)?;
        let pid = handle.ask(Request::Start).await?;
        let spec = Any {
            type_url: SPEC.to_owned(),
            value: described.spec.to_string().into_bytes(),
            ..Any::default()
        };
        Ok(StartSandboxResponse {
            pid: wire_pid(Some(pid)),
            created_at: timestamp(described.created_at).into(),
            spec: Some(spec).into(),
            ..StartSandboxResponse::default()
        })
    }

    async fn platform(&self, _: &TtrpcContext, req: PlatformRequest) -> Rpc<PlatformResponse> {
        self.pod.sandbox(&req.sandbox_id)?;
        let mut response = PlatformResponse::default();
        let platform = response.platform.mut_or_insert_default();
        platform.os = "linux".to_owned();
        platform.architecture = go_architecture(std::env::consts::ARCH).to_owned();
        Ok(response)
    }

    async fn stop_sandbox(
        &self,
        _: &TtrpcContext,
        req: StopSandboxRequest,
    ) -> Rpc<StopSandboxResponse> {
        self.pod.stop_sandbox(&req.sandbox_id).await?;
        Ok(StopSandboxResponse::default())
    }

    async fn wait_sandbox(
        &self,
        _: &TtrpcContext,
        req: WaitSandboxRequest,
    ) -> Rpc<WaitSandboxResponse> {
        let (handle, _) = self.pod.sandbox(&req.sandbox_id)?;
        let exit = handle.wait().await?;
        Ok(WaitSandboxResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit.at).into(),
            ..WaitSandboxResponse::default()
        })
    }

    async fn sandbox_status(
        &self,
        _: &TtrpcContext,
        req: SandboxStatusRequest,
    ) -> Rpc<SandboxStatusResponse> {
        let (handle, described) = self.pod.sandbox(&req.sandbox_id)?;
        let view = handle.view();
        let state = match view.status {
            Status::Running => "SANDBOX_READY",
            Status::Created
            | Status::Paused
            | Status::Ending(_)
            | Status::Ended(_)
            | Status::Failed(_)
            | Status::Stopped(_) => "SANDBOX_NOTREADY",
        };
        let mut response = SandboxStatusResponse {
            pid: wire_pid(view.pid),
            state: state.to_owned(),
            created_at: timestamp(described.created_at).into(),
            exited_at: view
                .status
                .exit()
                .and_then(|exit| timestamp(exit.at))
                .into(),
            ..SandboxStatusResponse::default()
        };
        if req.verbose {
            let mut add = |key: &str, value: Value| {
                response.info.insert(key.to_owned(), value.to_string());
            };
            add("info", info(&req.sandbox_id, &view, &described));
            add("pause", own_info(&described));
        }
        response.sandbox_id = req.sandbox_id;
        Ok(response)
    }

    async fn ping_sandbox(&self, _: &TtrpcContext, req: PingRequest) -> Rpc<PingResponse> {
        self.pod.sandbox(&req.sandbox_id)?;
        Ok(PingResponse::default())
    }

    async fn shutdown_sandbox(
        &self,
        _: &TtrpcContext,
        req: ShutdownSandboxRequest,
    ) -> Rpc<ShutdownSandboxResponse> {
        self.pod.shut_down_sandbox(req.sandbox_id).await?;
        Ok(ShutdownSandboxResponse::default())
    }

    async fn sandbox_metrics(
        &self,
        _: &TtrpcContext,
        req: SandboxMetricsRequest,
    ) -> Rpc<SandboxMetricsResponse> {
        let (handle, _) = self.pod.sandbox(&req.sandbox_id)?;
        let stats = handle.ask(Request::Stats).await?;
        let mut response = SandboxMetricsResponse::default();
        let metric = response.metrics.mut_or_insert_default();
        metric.timestamp = timestamp(SystemTime::now()).into();
        metric.data = Some(metrics(&stats)).into();
        metric.id = req.sandbox_id;
        Ok(response)
    }
}

/// Go's name of an architecture, which is also the name in an image's platform.
fn go_architecture(name: &str) -> &str {
    match name {
        "x86_64" => "amd64",
        "x86" => "386",
        "aarch64" => "arm64",
        "powerpc64" => "ppc64le",
        "loongarch64" => "loong64",
        same => same,
    }
}

/// What `crictl inspectp` shows of a pod in podsandbox mode. containerd from 2.3 on decodes the value as its own
/// `SandboxInfo` (internal/cri/server/podsandbox/types), and writes the value anew: a key that containerd does not know
/// is lost, and metadata without a version is an error. What only containerd knows (the names, the CNI result) is
/// missing.
fn info(id: &str, view: &View, described: &Described) -> Value {
    let metadata = json!({
        "ID": id,
        "Config": described.config,
        "NetNSPath": described.network,
    });
    json!({
        "pid": wire_pid(view.pid),
        "processStatus": view.status.name(),
        "netNamespaceClosed": !described.network.as_os_str().is_empty() && !described.network.exists(),
        "image": "",
        "snapshotKey": "",
        "snapshotter": "",
        "runtimeType": "io.containerd.pause.v2",
        "runtimeOptions": described.options,
        "config": described.config,
        "runtimeSpec": described.spec,
        "sandboxMetadata": { "Version": "v1", "Metadata": metadata },
    })
}

/// What only this shim knows of the sandbox. containerd passes an entry of the map on that it has no use for.
fn own_info(described: &Described) -> Value {
    let holder = match described.holder {
        pause::HolderKind::Thread => "thread",
        pause::HolderKind::Process => "process",
    };
    let namespaces = described.paths.iter().map(|(kind, path)| {
        // The path works only while the sandbox is there; then the inode is null.
        let inode = std::fs::metadata(path).ok().map(|file| file.st_ino());
        let namespace = json!({ "path": path, "inode": inode });
        (kind.file().to_owned(), namespace)
    });
    json!({
        "holder": holder,
        "namespaces": namespaces.collect::<serde_json::Map<_, _>>(),
    })
}
