//! Containers of pods.

use std::path::PathBuf;
use std::time::Duration;

use k8s_cri::v1::{self as api, NamespaceMode};

use super::{Failure, Pod, call, pid, verbose};
use crate::image;
use crate::until::eventually;

/// A container to be.
pub struct ContainerSpec<'a> {
    pod: Pod<'a>,
    /// The CRI message, for changes without a method here.
    pub config: api::ContainerConfig,
}

impl<'a> ContainerSpec<'a> {
    pub(super) fn new(pod: Pod<'a>, name: &str) -> Self {
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

    /// How likely the kernel kills the container when memory runs out, as kubelet sets it: -1000 (never) to 1000.
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

/// The result of an exec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Executed {
    /// The exit code.
    pub code: i32,
    /// The standard output.
    pub stdout: String,
    /// The standard error.
    pub stderr: String,
}

/// A container that was created.
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
        let result = self.pod.daemon.cri().try_start(&self.id);
        self.pod.daemon.look();
        result
    }

    /// `ExecSync`.
    pub fn try_exec(&self, command: &[&str]) -> Result<Executed, Failure> {
        self.try_exec_for(command, 60)
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

    /// `ExecSync` that must succeed. Gives the standard output, trimmed.
    #[track_caller]
    pub fn output(&self, command: &[&str]) -> String {
        let executed = self.exec(command);
        assert_eq!(executed.code, 0, "{command:?}: {executed:?}");
        executed.stdout.trim().to_owned()
    }

    /// A shell script by `ExecSync` that must succeed. Gives the standard output, trimmed.
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
        pid(&self.status().1)
    }

    /// Waits for the container's end. Gives the exit code.
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

    /// Whether the container runs, according to CRI.
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

    /// The lines of one stream (`stdout` or `stderr`) in the container's log.
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
