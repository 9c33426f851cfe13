//! CRI calls and nothing else, for measurements. The calls of [`crate::cri`] also look at all processes, which takes
//! time.

use std::fs;
use std::time::Duration;

use k8s_cri::v1 as api;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

use crate::PodSpec;
use crate::cri::Failure;
use crate::leaks;
use crate::slot::{Names, text};

/// The longest time for any call.
const DEADLINE: Duration = Duration::from_secs(100);

/// A client of the runtime service.
pub struct Calls {
    runtime: Runtime,
    channel: Channel,
}

/// Calls one method of the runtime service by name.
macro_rules! call {
    ($calls:expr, $method:ident, $request:expr) => {{
        let calls = $calls;
        let request = $request;
        let mut client = RuntimeServiceClient::new(calls.channel.clone());
        let what = stringify!($method);
        calls.runtime.block_on(async move {
            match tokio::time::timeout(DEADLINE, client.$method(request)).await {
                Ok(Ok(response)) => Ok(response.into_inner()),
                Ok(Err(status)) => Err(Failure(format!(
                    "{what}: {:?}: {}",
                    status.code(),
                    status.message()
                ))),
                Err(_) => Err(Failure(format!("{what}: no answer within {DEADLINE:?}"))),
            }
        })
    }};
}

/// The configuration of a pod in this slot, with a folder for its logs.
pub fn pod_config(names: &Names, spec: PodSpec) -> api::PodSandboxConfig {
    let mut pod = spec.config;
    let name = &pod.metadata.as_ref().unwrap().name;
    let logs = names.directory().join("logs").join(name);
    fs::create_dir_all(&logs).unwrap();
    pod.log_directory = text(&logs);
    pod.linux.as_mut().unwrap().cgroup_parent = names.cgroup_parent();
    pod
}

impl Calls {
    /// A client of the containerd of this slot.
    pub fn new(names: &Names) -> Self {
        Self::at(&leaks::grpc_address(names))
    }

    /// A client of the containerd that listens at this path.
    pub fn at(socket: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let address = format!("unix://{socket}");
        let channel = {
            let _inside = runtime.enter();
            Endpoint::from_shared(address).unwrap().connect_lazy()
        };
        Self { runtime, channel }
    }

    /// Connects. Without this, the first measured call would include the connection.
    ///
    /// # Errors
    /// As for every call here: CRI's error, or a missing answer.
    pub fn connect(&self) -> Result<(), Failure> {
        call!(self, version, api::VersionRequest::default()).map(drop)
    }

    /// `RunPodSandbox`: the pod's id.
    pub fn run_pod(&self, pod: &api::PodSandboxConfig, handler: &str) -> Result<String, Failure> {
        let request = api::RunPodSandboxRequest {
            config: Some(pod.clone()),
            runtime_handler: handler.to_owned(),
        };
        Ok(call!(self, run_pod_sandbox, request)?.pod_sandbox_id)
    }

    /// `CreateContainer` with an image and a command: the container's id. Each path of `mounts` is
    /// bound at the same path inside.
    pub fn create(
        &self,
        (pod, config): (&str, &api::PodSandboxConfig),
        name: &str,
        image: &str,
        command: &[&str],
        mounts: &[&str],
    ) -> Result<String, Failure> {
        let security = config.linux.as_ref().unwrap().security_context.as_ref();
        let mounts = mounts.iter().map(|&path| api::Mount {
            host_path: path.to_owned(),
            container_path: path.to_owned(),
            ..Default::default()
        });
        let container = api::ContainerConfig {
            metadata: Some(api::ContainerMetadata {
                name: name.to_owned(),
                attempt: 0,
            }),
            image: Some(api::ImageSpec {
                image: image.to_owned(),
                ..Default::default()
            }),
            command: command.iter().map(|&word| word.to_owned()).collect(),
            mounts: mounts.collect(),
            log_path: format!("{name}.log"),
            linux: Some(api::LinuxContainerConfig {
                security_context: Some(api::LinuxContainerSecurityContext {
                    namespace_options: security.unwrap().namespace_options.clone(),
                    ..Default::default()
                }),
                resources: Some(api::LinuxContainerResources::default()),
            }),
            ..Default::default()
        };
        let request = api::CreateContainerRequest {
            pod_sandbox_id: pod.to_owned(),
            config: Some(container),
            sandbox_config: Some(config.clone()),
        };
        Ok(call!(self, create_container, request)?.container_id)
    }

    /// `StartContainer`.
    pub fn start(&self, container: &str) -> Result<(), Failure> {
        let container_id = container.to_owned();
        let request = api::StartContainerRequest { container_id };
        call!(self, start_container, request).map(drop)
    }

    /// `ExecSync`: the exit code.
    pub fn exec(&self, container: &str, command: &[&str]) -> Result<i32, Failure> {
        let request = api::ExecSyncRequest {
            container_id: container.to_owned(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout: 10,
        };
        Ok(call!(self, exec_sync, request)?.exit_code)
    }

    /// `StopContainer`, with a grace period of ten seconds.
    pub fn stop(&self, container: &str) -> Result<(), Failure> {
        let container_id = container.to_owned();
        let request = api::StopContainerRequest {
            container_id,
            timeout: 10,
        };
        call!(self, stop_container, request).map(drop)
    }

    /// `RemoveContainer`.
    pub fn remove(&self, container: &str) -> Result<(), Failure> {
        let container_id = container.to_owned();
        let request = api::RemoveContainerRequest { container_id };
        call!(self, remove_container, request).map(drop)
    }

    /// `StopPodSandbox`.
    pub fn stop_pod(&self, pod: &str) -> Result<(), Failure> {
        let pod_sandbox_id = pod.to_owned();
        let request = api::StopPodSandboxRequest { pod_sandbox_id };
        call!(self, stop_pod_sandbox, request).map(drop)
    }

    /// `RemovePodSandbox`.
    pub fn remove_pod(&self, pod: &str) -> Result<(), Failure> {
        let pod_sandbox_id = pod.to_owned();
        let request = api::RemovePodSandboxRequest { pod_sandbox_id };
        call!(self, remove_pod_sandbox, request).map(drop)
    }

    /// What kubelet asks all the time: `ListPodSandbox` and `ListContainers`, and `ListPodSandboxStats`, if `statistics`.
    pub fn list(&self, statistics: bool) -> Result<(), Failure> {
        call!(
            self,
            list_pod_sandbox,
            api::ListPodSandboxRequest::default()
        )?;
        call!(self, list_containers, api::ListContainersRequest::default())?;
        if statistics {
            let request = api::ListPodSandboxStatsRequest::default();
            call!(self, list_pod_sandbox_stats, request)?;
        }
        Ok(())
    }

    /// The pid of a container's first process.
    pub fn pid(&self, container: &str) -> Result<i32, Failure> {
        let request = api::ContainerStatusRequest {
            container_id: container.to_owned(),
            verbose: true,
        };
        let status = call!(self, container_status, request)?;
        let info = status.info.get("info").cloned().unwrap_or_default();
        let info: serde_json::Value = serde_json::from_str(&info).unwrap_or_default();
        let pid = info["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
        pid.ok_or_else(|| Failure(format!("no pid in {info}")))
    }

    /// The exit code of a container that has ended.
    pub fn exit_code(&self, container: &str) -> Result<Option<i32>, Failure> {
        let request = api::ContainerStatusRequest {
            container_id: container.to_owned(),
            verbose: false,
        };
        let status = call!(self, container_status, request)?.status;
        Ok(status
            .filter(|status| status.state() == api::ContainerState::ContainerExited)
            .map(|status| status.exit_code))
    }
}
