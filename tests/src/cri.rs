//! Pods and containers through CRI, as kubelet makes them.

use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use k8s_cri::v1::image_service_client::ImageServiceClient;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use k8s_cri::v1::{self as api, NamespaceMode};
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint};

use crate::daemon::Daemon;
use crate::image;
use crate::until::{eventually, so};

/// No call may take longer: CRI's own limit for a container's start is in the minutes.
const DEADLINE: Duration = Duration::from_secs(30);

/// What a failed call said.
#[derive(Clone, Debug)]
pub struct Failure(pub String);

impl std::fmt::Display for Failure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// The client, with plain blocking calls.
pub struct Cri {
    runtime: Rc<Runtime>,
    channel: Channel,
    configs: RefCell<HashMap<String, api::PodSandboxConfig>>,
}

/// Calls one method of the runtime service by name.
macro_rules! call {
    ($cri:expr, $method:ident, $request:expr) => {{
        let cri = $cri;
        let mut client = RuntimeServiceClient::new(cri.channel.clone());
        let request = $request;
        cri.wait(
            stringify!($method),
            async move { client.$method(request).await },
        )
    }};
}

impl Cri {
    /// A client of the containerd that listens, now or later, at this address.
    pub fn new(address: &str) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let channel = {
            let _inside = runtime.enter();
            Endpoint::from_shared(format!("unix://{address}"))
                .unwrap()
                .connect_lazy()
        };
        Self {
            runtime: Rc::new(runtime),
            channel,
            configs: RefCell::default(),
        }
    }

    fn wait<T>(
        &self,
        what: &str,
        call: impl Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    ) -> Result<T, Failure> {
        self.runtime.block_on(async {
            match tokio::time::timeout(DEADLINE, call).await {
                Ok(Ok(response)) => Ok(response.into_inner()),
                Ok(Err(status)) => Err(Failure(format!(
                    "{what}: {:?}: {}",
                    status.code(),
                    status.message()
                ))),
                Err(_) => panic!("{what}: no answer within {DEADLINE:?}"),
            }
        })
    }

    /// `UpdateContainerResources` of any container.
    ///
    /// # Errors
    /// What CRI said, or that the connection is gone.
    pub fn try_update(
        &self,
        container: &str,
        resources: api::LinuxContainerResources,
    ) -> Result<(), Failure> {
        let request = api::UpdateContainerResourcesRequest {
            container_id: container.to_owned(),
            linux: Some(resources),
            ..Default::default()
        };
        call!(self, update_container_resources, request).map(|_| ())
    }

    /// `Ok` when containerd answers and has its network.
    pub fn ready(&self) -> Result<(), String> {
        let status = call!(self, status, api::StatusRequest { verbose: false })
            .map_err(|failure| failure.0)?;
        let not_ready: Vec<_> = status
            .status
            .unwrap_or_default()
            .conditions
            .into_iter()
            .filter(|condition| !condition.status)
            .collect();
        so(not_ready.is_empty(), || format!("{not_ready:?}"))
    }

    /// What CRI tells kubelet of a runtime handler: does it offer user namespaces?
    #[track_caller]
    pub fn offers_user_namespaces(&self, handler: &str) -> bool {
        let status = call!(self, status, api::StatusRequest { verbose: false })
            .unwrap_or_else(|failure| panic!("{failure}"));
        let mut handlers = status.runtime_handlers.into_iter();
        handlers
            .find(|one| one.name == handler)
            .and_then(|one| one.features)
            .is_some_and(|features| features.user_namespaces)
    }

    /// Whether CRI knows the image.
    pub fn has_image(&self, name: &str) -> bool {
        let mut client = ImageServiceClient::new(self.channel.clone());
        let image = api::ImageSpec {
            image: name.to_owned(),
            ..Default::default()
        };
        let request = api::ImageStatusRequest {
            image: Some(image),
            verbose: false,
        };
        self.wait(
            "image_status",
            async move { client.image_status(request).await },
        )
        .is_ok_and(|response| response.image.is_some())
    }

    /// The ids of all pods.
    pub fn pods(&self) -> Vec<String> {
        let response = call!(
            self,
            list_pod_sandbox,
            api::ListPodSandboxRequest::default()
        );
        response
            .map(|response| response.items.into_iter().map(|pod| pod.id).collect())
            .unwrap_or_default()
    }

    /// Stops and removes every pod. As kubelet does, it asks again while containerd still works on an exit.
    #[track_caller]
    pub fn remove_all_pods(&self) {
        for id in self.pods() {
            self.stop_pod(&id)
                .unwrap_or_else(|failure| panic!("{failure}"));
            eventually(Duration::from_secs(15), || {
                self.remove_pod(&id).map_err(|failure| failure.to_string())
            });
        }
    }

    fn stop_pod(&self, id: &str) -> Result<(), Failure> {
        call!(
            self,
            stop_pod_sandbox,
            api::StopPodSandboxRequest {
                pod_sandbox_id: id.to_owned()
            }
        )
        .map(drop)
    }

    fn remove_pod(&self, id: &str) -> Result<(), Failure> {
        call!(
            self,
            remove_pod_sandbox,
            api::RemovePodSandboxRequest {
                pod_sandbox_id: id.to_owned()
            }
        )
        .map(drop)
    }
}

/// A pod to be.
#[derive(Clone, Debug)]
pub struct PodSpec {
    /// The CRI message; change what has no method here.
    pub config: api::PodSandboxConfig,
    /// The runtime handler; the one under test when empty.
    pub handler: String,
}

impl PodSpec {
    /// An ordinary pod: own network, ipc and uts namespaces.
    pub fn new(name: &str) -> Self {
        let security = api::LinuxSandboxSecurityContext {
            namespace_options: Some(api::NamespaceOption {
                network: NamespaceMode::Pod.into(),
                pid: NamespaceMode::Container.into(),
                ipc: NamespaceMode::Pod.into(),
                ..Default::default()
            }),
            ..Default::default()
        };
        let config = api::PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("{name}-uid"),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            linux: Some(api::LinuxPodSandboxConfig {
                security_context: Some(security),
                ..Default::default()
            }),
            ..Default::default()
        };
        Self {
            config,
            handler: String::new(),
        }
    }

    fn linux(&mut self) -> &mut api::LinuxPodSandboxConfig {
        self.config.linux.as_mut().unwrap()
    }

    fn namespaces(&mut self) -> &mut api::NamespaceOption {
        self.linux()
            .security_context
            .as_mut()
            .unwrap()
            .namespace_options
            .as_mut()
            .unwrap()
    }

    /// Another runtime handler.
    #[must_use]
    pub fn handler(mut self, name: &str) -> Self {
        name.clone_into(&mut self.handler);
        self
    }

    /// `shareProcessNamespace: true`.
    #[must_use]
    pub fn shared_processes(mut self) -> Self {
        self.namespaces().pid = NamespaceMode::Pod.into();
        self
    }

    /// `hostNetwork: true`; kubelet gives such a pod the node's name.
    #[must_use]
    pub fn host_network(mut self) -> Self {
        self.namespaces().network = NamespaceMode::Node.into();
        self.config.hostname = String::new();
        self
    }

    /// `hostPID: true`.
    #[must_use]
    pub fn host_pid(mut self) -> Self {
        self.namespaces().pid = NamespaceMode::Node.into();
        self
    }

    /// `hostIPC: true`.
    #[must_use]
    pub fn host_ipc(mut self) -> Self {
        self.namespaces().ipc = NamespaceMode::Node.into();
        self
    }

    /// `hostUsers: false`: root in the pod is user `host` of the node, and so on for 65536 ids.
    #[must_use]
    pub fn user_namespace(mut self, host: u32) -> Self {
        let map = vec![api::IdMapping {
            host_id: host,
            container_id: 0,
            length: 65536,
        }];
        self.namespaces().userns_options = Some(api::UserNamespace {
            mode: NamespaceMode::Pod.into(),
            uids: map.clone(),
            gids: map,
        });
        self
    }

    /// A sysctl.
    #[must_use]
    pub fn sysctl(mut self, key: &str, value: &str) -> Self {
        self.linux()
            .sysctls
            .insert(key.to_owned(), value.to_owned());
        self
    }

    /// Name servers and search domains.
    #[must_use]
    pub fn dns(mut self, server: &str, search: &str) -> Self {
        self.config.dns_config = Some(api::DnsConfig {
            servers: vec![server.to_owned()],
            searches: vec![search.to_owned()],
            options: Vec::new(),
        });
        self
    }

    /// An annotation.
    #[must_use]
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.config
            .annotations
            .insert(key.to_owned(), value.to_owned());
        self
    }

    /// Runs it; panics when that fails.
    #[track_caller]
    pub fn run(self, daemon: &Daemon) -> Pod<'_> {
        self.try_run(daemon)
            .unwrap_or_else(|failure| panic!("{failure}"))
    }

    /// Runs it.
    pub fn try_run(mut self, daemon: &Daemon) -> Result<Pod<'_>, Failure> {
        let name = self.config.metadata.as_ref().unwrap().name.clone();
        self.linux().cgroup_parent = daemon.cgroup_parent();
        let logs = daemon.directory().join("logs").join(&name);
        std::fs::create_dir_all(&logs).unwrap();
        self.config.log_directory = crate::slot::text(&logs);
        let request = api::RunPodSandboxRequest {
            config: Some(self.config.clone()),
            runtime_handler: self.handler,
        };
        let result = call!(daemon.cri(), run_pod_sandbox, request);
        daemon.look();
        let id = result?.pod_sandbox_id;
        daemon
            .cri()
            .configs
            .borrow_mut()
            .insert(id.clone(), self.config);
        Ok(Pod { daemon, id })
    }
}

/// A pod that runs, or ran.
#[derive(Clone)]
pub struct Pod<'a> {
    daemon: &'a Daemon,
    /// The sandbox's id.
    pub id: String,
}

/// The JSON document in a verbose status.
fn verbose(info: &HashMap<String, String>) -> serde_json::Value {
    info.get("info")
        .map(|info| serde_json::from_str(info).unwrap())
        .unwrap_or_default()
}

impl<'a> Pod<'a> {
    /// The status with its verbose info.
    #[track_caller]
    pub fn status(&self) -> (api::PodSandboxStatus, serde_json::Value) {
        let request = api::PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: true,
        };
        let response = call!(self.daemon.cri(), pod_sandbox_status, request)
            .unwrap_or_else(|failure| panic!("{failure}"));
        (response.status.unwrap(), verbose(&response.info))
    }

    /// `true` while CRI calls it ready.
    #[track_caller]
    pub fn ready(&self) -> bool {
        self.status().0.state() == api::PodSandboxState::SandboxReady
    }

    /// The pid that containerd knows the sandbox by (may be a thread's id).
    #[track_caller]
    pub fn pid(&self) -> i32 {
        let (_, info) = self.status();
        info["pid"]
            .as_i64()
            .and_then(|pid| i32::try_from(pid).ok())
            .unwrap_or_else(|| panic!("no pid in {info}"))
    }

    /// The pod's address.
    #[track_caller]
    pub fn ip(&self) -> String {
        self.status().0.network.unwrap_or_default().ip
    }

    /// A container of busybox to be; see [`ContainerSpec`].
    pub fn container(&self, name: &str) -> ContainerSpec<'a> {
        ContainerSpec::new(self.clone(), name)
    }

    /// A busybox that sleeps, running.
    #[track_caller]
    pub fn sleeper(&self, name: &str) -> Container<'a> {
        self.container(name).command(&["sleep", "3600"]).start()
    }

    /// `StopPodSandbox`.
    #[track_caller]
    pub fn stop(&self) {
        self.daemon.look();
        self.daemon
            .cri()
            .stop_pod(&self.id)
            .unwrap_or_else(|failure| panic!("{failure}"));
    }

    /// `RemovePodSandbox`.
    #[track_caller]
    pub fn remove(&self) {
        self.daemon
            .cri()
            .remove_pod(&self.id)
            .unwrap_or_else(|failure| panic!("{failure}"));
    }
}

/// A container to be.
pub struct ContainerSpec<'a> {
    pod: Pod<'a>,
    /// The CRI message; change what has no method here.
    pub config: api::ContainerConfig,
}

impl<'a> ContainerSpec<'a> {
    fn new(pod: Pod<'a>, name: &str) -> Self {
        // kubelet repeats the pod's namespace options for each container.
        let namespaces = pod
            .daemon
            .cri()
            .configs
            .borrow()
            .get(&pod.id)
            .and_then(|config| {
                config
                    .linux
                    .as_ref()?
                    .security_context
                    .as_ref()?
                    .namespace_options
                    .clone()
            });
        let security = api::LinuxContainerSecurityContext {
            namespace_options: namespaces,
            ..Default::default()
        };
        let config = api::ContainerConfig {
            metadata: Some(api::ContainerMetadata {
                name: name.to_owned(),
                attempt: 0,
            }),
            image: Some(api::ImageSpec {
                image: image::BUSYBOX.to_owned(),
                ..Default::default()
            }),
            log_path: format!("{name}.0.log"),
            linux: Some(api::LinuxContainerConfig {
                security_context: Some(security),
                resources: Some(api::LinuxContainerResources::default()),
            }),
            ..Default::default()
        };
        Self { pod, config }
    }

    /// The security context.
    pub fn security(&mut self) -> &mut api::LinuxContainerSecurityContext {
        self.config
            .linux
            .as_mut()
            .unwrap()
            .security_context
            .as_mut()
            .unwrap()
    }

    /// Another image.
    #[must_use]
    pub fn image(mut self, name: &str) -> Self {
        name.clone_into(&mut self.config.image.as_mut().unwrap().image);
        self
    }

    /// The command and its arguments.
    #[must_use]
    pub fn command(mut self, words: &[&str]) -> Self {
        self.config.command = words.iter().map(|&word| word.to_owned()).collect();
        self
    }

    /// A shell script as the command.
    #[must_use]
    pub fn shell(self, script: &str) -> Self {
        self.command(&["sh", "-c", script])
    }

    /// The container's restart count, part of its name in CRI.
    #[must_use]
    pub fn attempt(mut self, attempt: u32) -> Self {
        let metadata = self.config.metadata.as_mut().unwrap();
        metadata.attempt = attempt;
        self.config.log_path = format!("{}.{attempt}.log", metadata.name);
        self
    }

    /// Adds the environment variable.
    #[must_use]
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.config.envs.push(api::KeyValue {
            key: key.to_owned(),
            value: value.into(),
        });
        self
    }

    /// Binds a path of the node.
    #[must_use]
    pub fn mount(mut self, host: &str, inside: &str) -> Self {
        self.config.mounts.push(api::Mount {
            host_path: host.to_owned(),
            container_path: inside.to_owned(),
            ..Default::default()
        });
        self
    }

    /// The tests' helper as `/probe`.
    #[must_use]
    pub fn probe(self) -> Self {
        self.mount(&crate::slot::text(&crate::lab::probe()), "/probe")
    }

    /// Adds capabilities.
    #[must_use]
    pub fn capabilities(mut self, names: &[&str]) -> Self {
        self.security().capabilities = Some(api::Capability {
            add_capabilities: names.iter().map(|&name| name.to_owned()).collect(),
            ..Default::default()
        });
        self
    }

    /// Joins the process namespace of another container, as a debug container does.
    #[must_use]
    pub fn target(mut self, container: &Container<'_>) -> Self {
        let namespaces = self.security().namespace_options.as_mut().unwrap();
        namespaces.pid = NamespaceMode::Target.into();
        namespaces.target_id.clone_from(&container.id);
        self
    }

    /// With a terminal.
    #[must_use]
    pub fn tty(mut self) -> Self {
        self.config.tty = true;
        self.config.stdin = true;
        self
    }

    /// A memory limit in bytes.
    #[must_use]
    pub fn memory_limit(mut self, bytes: i64) -> Self {
        self.config
            .linux
            .as_mut()
            .unwrap()
            .resources
            .as_mut()
            .unwrap()
            .memory_limit_in_bytes = bytes;
        self
    }

    /// How likely it is killed when memory runs out, as kubelet sets it.
    #[must_use]
    pub fn oom_score_adj(mut self, score: i64) -> Self {
        let linux = self.config.linux.as_mut().unwrap();
        linux.resources.as_mut().unwrap().oom_score_adj = score;
        self
    }

    /// `CreateContainer`.
    pub fn try_create(self) -> Result<Container<'a>, Failure> {
        let daemon = self.pod.daemon;
        let sandbox = daemon.cri().configs.borrow().get(&self.pod.id).cloned();
        let log =
            PathBuf::from(&sandbox.as_ref().unwrap().log_directory).join(&self.config.log_path);
        let request = api::CreateContainerRequest {
            pod_sandbox_id: self.pod.id.clone(),
            config: Some(self.config),
            sandbox_config: sandbox,
        };
        let id = call!(daemon.cri(), create_container, request)?.container_id;
        Ok(Container {
            pod: self.pod,
            id,
            log,
        })
    }

    /// `CreateContainer`; panics when it fails.
    #[track_caller]
    pub fn create(self) -> Container<'a> {
        self.try_create()
            .unwrap_or_else(|failure| panic!("{failure}"))
    }

    /// `CreateContainer` and `StartContainer`.
    pub fn try_start(self) -> Result<Container<'a>, Failure> {
        let container = self.try_create()?;
        container.try_start()?;
        Ok(container)
    }

    /// `CreateContainer` and `StartContainer`; panics when one fails.
    #[track_caller]
    pub fn start(self) -> Container<'a> {
        self.try_start()
            .unwrap_or_else(|failure| panic!("{failure}"))
    }
}

/// What an exec gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Executed {
    /// Its exit code.
    pub code: i32,
    /// Its output.
    pub stdout: String,
    /// Its error output.
    pub stderr: String,
}

/// A container that runs, or ran.
pub struct Container<'a> {
    /// Its pod.
    pub pod: Pod<'a>,
    /// Its id.
    pub id: String,
    /// Its log file.
    pub log: PathBuf,
}

impl Container<'_> {
    /// `StartContainer`.
    pub fn try_start(&self) -> Result<(), Failure> {
        let result = call!(
            self.pod.daemon.cri(),
            start_container,
            api::StartContainerRequest {
                container_id: self.id.clone()
            }
        );
        self.pod.daemon.look();
        result.map(drop)
    }

    /// `ExecSync`.
    pub fn try_exec(&self, command: &[&str]) -> Result<Executed, Failure> {
        self.try_exec_for(command, 10)
    }

    /// `ExecSync` with a timeout in seconds.
    pub fn try_exec_for(&self, command: &[&str], timeout: i64) -> Result<Executed, Failure> {
        let request = api::ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: command.iter().map(|&word| word.to_owned()).collect(),
            timeout,
        };
        let response = call!(self.pod.daemon.cri(), exec_sync, request)?;
        Ok(Executed {
            code: response.exit_code,
            stdout: String::from_utf8_lossy(&response.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&response.stderr).into_owned(),
        })
    }

    /// `ExecSync`, whatever the exit code.
    #[track_caller]
    pub fn exec(&self, command: &[&str]) -> Executed {
        self.try_exec(command)
            .unwrap_or_else(|failure| panic!("{command:?}: {failure}"))
    }

    /// `ExecSync` that must succeed; its output, trimmed.
    #[track_caller]
    pub fn output(&self, command: &[&str]) -> String {
        let executed = self.exec(command);
        assert_eq!(executed.code, 0, "{command:?}: {executed:?}");
        executed.stdout.trim().to_owned()
    }

    /// A shell script by `ExecSync` that must succeed; its output, trimmed.
    #[track_caller]
    pub fn shell(&self, script: &str) -> String {
        self.output(&["sh", "-c", script])
    }

    /// The status with its verbose info.
    #[track_caller]
    pub fn status(&self) -> (api::ContainerStatus, serde_json::Value) {
        let request = api::ContainerStatusRequest {
            container_id: self.id.clone(),
            verbose: true,
        };
        let response = call!(self.pod.daemon.cri(), container_status, request)
            .unwrap_or_else(|failure| panic!("{failure}"));
        (response.status.unwrap(), verbose(&response.info))
    }

    /// The init process's pid on the node.
    #[track_caller]
    pub fn pid(&self) -> i32 {
        let (_, info) = self.status();
        info["pid"]
            .as_i64()
            .and_then(|pid| i32::try_from(pid).ok())
            .unwrap_or_else(|| panic!("no pid in {info}"))
    }

    /// Waits for its end; the exit code.
    #[track_caller]
    pub fn wait(&self) -> i32 {
        eventually(Duration::from_secs(10), || {
            let (status, _) = self.status();
            if status.state() == api::ContainerState::ContainerExited {
                Ok(status.exit_code)
            } else {
                Err(format!("{} is {:?}", self.id, status.state()))
            }
        })
    }

    /// `true` while CRI calls it running.
    #[track_caller]
    pub fn running(&self) -> bool {
        self.status().0.state() == api::ContainerState::ContainerRunning
    }

    /// `StopContainer`: SIGTERM, and SIGKILL after `grace` seconds.
    #[track_caller]
    pub fn stop(&self, grace: i64) {
        let request = api::StopContainerRequest {
            container_id: self.id.clone(),
            timeout: grace,
        };
        call!(self.pod.daemon.cri(), stop_container, request)
            .unwrap_or_else(|failure| panic!("{failure}"));
    }

    /// `RemoveContainer`.
    #[track_caller]
    pub fn remove(&self) {
        let request = api::RemoveContainerRequest {
            container_id: self.id.clone(),
        };
        call!(self.pod.daemon.cri(), remove_container, request)
            .unwrap_or_else(|failure| panic!("{failure}"));
    }

    /// `UpdateContainerResources`.
    #[track_caller]
    pub fn update(&self, resources: api::LinuxContainerResources) {
        self.pod
            .daemon
            .cri()
            .try_update(&self.id, resources)
            .unwrap_or_else(|failure| panic!("{failure}"));
    }

    /// `ContainerStats`.
    #[track_caller]
    pub fn stats(&self) -> api::ContainerStats {
        let request = api::ContainerStatsRequest {
            container_id: self.id.clone(),
        };
        let response = call!(self.pod.daemon.cri(), container_stats, request)
            .unwrap_or_else(|failure| panic!("{failure}"));
        response.stats.unwrap()
    }

    /// The lines of one stream (`stdout` or `stderr`) in its log.
    pub fn log_lines(&self, stream: &str) -> Vec<String> {
        // 2026-01-01T00:00:00.0Z stdout F text
        let mut lines = Vec::new();
        let mut partial = String::new();
        for line in std::fs::read_to_string(&self.log)
            .unwrap_or_default()
            .lines()
        {
            let mut words = line.splitn(4, ' ');
            let (from, tag, text) = (words.nth(1), words.next(), words.next().unwrap_or_default());
            if from != Some(stream) {
                continue;
            }
            partial.push_str(text);
            if tag == Some("F") {
                lines.push(std::mem::take(&mut partial));
            }
        }
        lines
    }
}
