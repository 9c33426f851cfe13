//! Pods.

use std::time::Duration;

use k8s_cri::v1::{self as api, NamespaceMode};

use super::{Container, ContainerSpec, Failure, call, pid, verbose};
use crate::daemon::Daemon;
use crate::until::eventually;

/// A pod to be.
#[derive(Clone, Debug)]
pub struct PodSpec {
    /// The CRI message, for changes without a method here.
    pub config: api::PodSandboxConfig,
    /// The runtime handler; when empty, the handler under test.
    pub handler: String,
}

impl PodSpec {
    /// An ordinary pod with network, ipc and uts namespaces of its own.
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

    /// `RunPodSandbox`; panics when the call fails.
    #[track_caller]
    pub fn run(self, daemon: &Daemon) -> Pod<'_> {
        self.try_run(daemon)
            .unwrap_or_else(|failure| panic!("{failure}"))
    }

    /// `RunPodSandbox`.
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

/// A pod that was run.
#[derive(Clone)]
pub struct Pod<'a> {
    pub(super) daemon: &'a Daemon,
    /// The sandbox's id.
    pub id: String,
}

impl<'a> Pod<'a> {
    /// The status with its verbose info.
    #[track_caller]
    pub fn status(&self) -> (api::PodSandboxStatus, serde_json::Value) {
        self.try_status()
            .unwrap_or_else(|failure| panic!("{failure}"))
    }

    fn try_status(&self) -> Result<(api::PodSandboxStatus, serde_json::Value), Failure> {
        let request = api::PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: true,
        };
        let response = call!(self.daemon.cri(), pod_sandbox_status, request)?;
        Ok((response.status.unwrap(), verbose(&response.info)))
    }

    /// Whether the pod is ready, according to CRI.
    #[track_caller]
    pub fn ready(&self) -> bool {
        self.status().0.state() == api::PodSandboxState::SandboxReady
    }

    /// Waits until the pod is no longer ready, according to CRI. With the Sandbox API, containerd asks even a killed
    /// shim, and answers with an error until containerd has noticed the shim's end.
    #[track_caller]
    pub fn wait_until_not_ready(&self) {
        eventually(Duration::from_secs(5), || match self.try_status() {
            Ok((status, _)) if status.state() != api::PodSandboxState::SandboxReady => Ok(()),
            Ok(_) => Err("CRI still calls the pod ready".to_owned()),
            Err(failure) => Err(failure.to_string()),
        });
    }

    /// `PodSandboxStats`.
    #[track_caller]
    pub fn stats(&self) -> api::LinuxPodSandboxStats {
        let request = api::PodSandboxStatsRequest {
            pod_sandbox_id: self.id.clone(),
        };
        let response = call!(self.daemon.cri(), pod_sandbox_stats, request)
            .unwrap_or_else(|failure| panic!("{failure}"));
        response.stats.unwrap().linux.unwrap()
    }

    /// The pid that containerd has for the sandbox; with our shim, this may be the id of a thread.
    #[track_caller]
    pub fn pid(&self) -> i32 {
        pid(&self.status().1)
    }

    /// The pod's address.
    #[track_caller]
    pub fn ip(&self) -> String {
        self.status().0.network.unwrap_or_default().ip
    }

    /// A container of busybox, not created yet; see [`ContainerSpec`].
    pub fn container(&self, name: &str) -> ContainerSpec<'a> {
        ContainerSpec::new(self.clone(), name)
    }

    /// A running busybox that sleeps.
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
