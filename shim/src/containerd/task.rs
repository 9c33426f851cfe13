//! The Task service, v2 and v3: decodes a request, calls the pod, encodes the answer. No logic.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use containerd_shim_protos::api::{
    CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
    PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
    ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
    StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::shim_async::Task;
use containerd_shim_protos::ttrpc::Result as Rpc;
use containerd_shim_protos::ttrpc::r#async::TtrpcContext;
use log::info;

use crate::container::Create;
use crate::container::mailbox::{Command, Handle, Listed, ProcessId, Target};
use crate::container::state::State;
use crate::containerd::convert::{any, timestamp, wire_pid};
use crate::error::{Error, Result};
use crate::io;
use crate::pod::{Pod, Stop, to_the_end};
use crate::runtime::criu::Checkpoint;
use crate::runtime::options::Options;
use crate::runtime::spec::Spec;

/// The service.
#[derive(Debug, Clone)]
pub struct TaskService {
    /// What is served.
    pub pod: Arc<Pod>,
    /// Ends the server.
    pub stop: Arc<Stop>,
}

/// How long a shim without a container stays for a Create or a Shutdown, which containerd sends at once.
const FORGOTTEN: Duration = Duration::from_secs(30);

impl TaskService {
    /// Ends the server if it has nothing to serve, and is given nothing: a containerd that died between `start` and
    /// Create, or while it deleted, does not ask for Shutdown when it is back.
    pub fn end_if_forgotten(&self) {
        let Some(mut made) = self.pod.unused() else {
            return;
        };
        // Weak: a server that ends before waits until nobody can publish events any more.
        let (pod, stop) = (Arc::downgrade(&self.pod), Arc::downgrade(&self.stop));
        tokio::spawn(async move {
            // With the first member the timer goes: a pod at rest wakes nobody.
            let forgotten = tokio::time::timeout(FORGOTTEN, made.changed()).await;
            if forgotten.is_err()
                && let (Some(pod), Some(stop)) = (pod.upgrade(), stop.upgrade())
                && pod.unused().is_some()
            {
                info!("no container, and no Shutdown for {FORGOTTEN:?}: ending");
                stop.stop();
            }
        });
    }

    fn container(&self, id: &str) -> Result<Handle> {
        self.pod.get(id)
    }

    async fn ask<T>(
        &self,
        id: &str,
        make: impl FnOnce(crate::container::mailbox::Reply<T>) -> Command,
    ) -> Rpc<T> {
        Ok(self.container(id)?.ask(make).await?)
    }
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, req: StateRequest) -> Rpc<StateResponse> {
        let container = self.container(&req.id)?;
        let mut view = container.view(&ProcessId::from_wire(&req.exec_id))?;
        // The whole container is frozen, or nothing of it.
        if view.state == State::Running && container.view(&ProcessId::Init)?.state == State::Paused
        {
            view.state = State::Paused;
        }
        let exit = view.state.exit();
        let status = match view.state {
            State::Created => Status::CREATED,
            State::Running => Status::RUNNING,
            State::Paused => Status::PAUSED,
            // At once: containerd that comes back asks for the state first, and takes no exit for a while after it.
            State::Ended(_) | State::Stopped(_) => Status::STOPPED,
        };
        Ok(StateResponse {
            id: req.id,
            exec_id: req.exec_id,
            bundle: container.bundle().display().to_string(),
            pid: wire_pid(view.pid),
            status: status.into(),
            stdin: view.io.stdin,
            stdout: view.io.stdout,
            stderr: view.io.stderr,
            terminal: view.io.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.and_then(|exit| timestamp(exit.at)).into(),
            ..StateResponse::default()
        })
    }

    async fn create(&self, _: &TtrpcContext, req: CreateTaskRequest) -> Rpc<CreateTaskResponse> {
        let bundle = PathBuf::from(&req.bundle);
        let create = Create {
            spec: Spec::load(&bundle)?,
            options: Options::from_any(req.options.as_ref())?,
            id: req.id,
            bundle,
            rootfs: req.rootfs,
            // criu finds the checkpoint that this one builds on (`parent_checkpoint`) by a link beside its images.
            checkpoint: (!req.checkpoint.is_empty()).then(|| req.checkpoint.into()),
            io: io::Request {
                stdin: req.stdin,
                stdout: req.stdout,
                stderr: req.stderr,
                terminal: req.terminal,
            },
        };
        let service = self.clone();
        let pid = to_the_end(async move {
            let made = service.pod.create(create).await;
            if made.is_err() {
                service.end_if_forgotten();
            }
            made
        })
        .await?;
        Ok(CreateTaskResponse {
            pid: wire_pid(pid),
            ..CreateTaskResponse::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, req: StartRequest) -> Rpc<StartResponse> {
        let process = ProcessId::from_wire(&req.exec_id);
        let pid = self
            .ask(&req.id, |reply| Command::Start(process, reply))
            .await?;
        Ok(StartResponse {
            pid: wire_pid(Some(pid)),
            ..StartResponse::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, req: DeleteRequest) -> Rpc<DeleteResponse> {
        let process = ProcessId::from_wire(&req.exec_id);
        let service = self.clone();
        let deleted = to_the_end(async move {
            let deleted = service.pod.delete(&req.id, process).await;
            if service.pod.is_over() {
                info!("the last container of an ended pod is deleted, ending");
                service.stop.stop();
            }
            service.end_if_forgotten();
            deleted
        })
        .await?;
        Ok(DeleteResponse {
            pid: wire_pid(deleted.pid),
            exit_status: deleted.exit.status,
            exited_at: timestamp(deleted.exit.at).into(),
            ..DeleteResponse::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, req: PidsRequest) -> Rpc<PidsResponse> {
        let listed = self.ask(&req.id, Command::Pids).await?;
        Ok(PidsResponse {
            processes: listed.into_iter().map(process_info).collect(),
            ..PidsResponse::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, req: PauseRequest) -> Rpc<Empty> {
        self.ask(&req.id, Command::Pause).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, req: ResumeRequest) -> Rpc<Empty> {
        self.ask(&req.id, Command::Resume).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, req: CheckpointTaskRequest) -> Rpc<Empty> {
        let checkpoint = Checkpoint::new(&req.path, req.options.as_ref())?;
        self.ask(&req.id, |reply| Command::Checkpoint(checkpoint, reply))
            .await?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, req: KillRequest) -> Rpc<Empty> {
        let process = ProcessId::from_wire(&req.exec_id);
        let target = if req.all {
            Target::All
        } else {
            Target::Process
        };
        self.ask(&req.id, |reply| {
            Command::Kill(process, req.signal, target, reply)
        })
        .await?;
        Ok(Empty::new())
    }

    async fn exec(&self, _: &TtrpcContext, req: ExecProcessRequest) -> Rpc<Empty> {
        if req.exec_id.is_empty() {
            return Err(Error::InvalidArgument("exec without an id".into()).into());
        }
        let io = io::Request {
            stdin: req.stdin,
            stdout: req.stdout,
            stderr: req.stderr,
            terminal: req.terminal,
        };
        let process = req.spec.into_option().unwrap_or_default().value;
        self.ask(&req.id, |reply| {
            Command::Exec(req.exec_id, process, io, reply)
        })
        .await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, req: ResizePtyRequest) -> Rpc<Empty> {
        let process = ProcessId::from_wire(&req.exec_id);
        let size = io::Size {
            width: u16::try_from(req.width).unwrap_or(u16::MAX),
            height: u16::try_from(req.height).unwrap_or(u16::MAX),
        };
        self.ask(&req.id, |reply| Command::Resize(process, size, reply))
            .await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, req: CloseIORequest) -> Rpc<Empty> {
        let process = ProcessId::from_wire(&req.exec_id);
        self.ask(&req.id, |reply| Command::CloseIo(process, reply))
            .await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, req: UpdateTaskRequest) -> Rpc<Empty> {
        let resources = req.resources.into_option().unwrap_or_default().value;
        self.ask(&req.id, |reply| Command::Update(resources, reply))
            .await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, req: WaitRequest) -> Rpc<WaitResponse> {
        let process = ProcessId::from_wire(&req.exec_id);
        let exit = self.container(&req.id)?.wait(&process).await?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit.at).into(),
            ..WaitResponse::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, req: StatsRequest) -> Rpc<StatsResponse> {
        let stats = self.ask(&req.id, Command::Stats).await?;
        Ok(StatsResponse {
            stats: Some(stats).into(),
            ..StatsResponse::default()
        })
    }

    async fn connect(&self, _: &TtrpcContext, req: ConnectRequest) -> Rpc<ConnectResponse> {
        // Of a task that is not there (yet) the shim is told all the same: a containerd that comes back connects first,
        // and deletes in order what was never made only if this succeeds.
        let view = self
            .container(&req.id)
            .and_then(|container| container.view(&ProcessId::Init));
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: wire_pid(view.ok().and_then(|view| view.pid)),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..ConnectResponse::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Rpc<Empty> {
        // containerd calls this after every delete; only the last one ends a pod's shim.
        if self.pod.shut_down() {
            info!("shutdown: nothing is left, ending");
            self.stop.stop();
        }
        Ok(Empty::new())
    }
}

fn process_info(listed: Listed) -> ProcessInfo {
    let details = listed.exec_id.map(|exec_id| {
        let details = ProcessDetails {
            exec_id,
            ..ProcessDetails::default()
        };
        any("containerd.runc.v1.ProcessDetails", &details)
    });
    ProcessInfo {
        pid: wire_pid(Some(listed.pid)),
        info: details.into(),
        ..ProcessInfo::default()
    }
}
