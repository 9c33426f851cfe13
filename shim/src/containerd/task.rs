//! The Task service, version 2 and version 3: decodes a request, calls the pod, encodes the answer. No logic.

use std::path::PathBuf;
use std::sync::Arc;

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

use super::convert::{any, metrics, mount, timestamp, wire_pid};
use super::{checkpoint, options};
use crate::container::Create;
use crate::container::mailbox::{KillScope, Listed, ProcessId, Request};
use crate::container::state::Status as Seen;
use crate::error::Error;
use crate::io;
use crate::pod::Pod;
use crate::pod::lifecycle::Occasion;
use crate::runtime::spec::Spec;

/// The service.
#[derive(Debug, Clone)]
pub struct TaskService {
    /// The pod that the service calls.
    pub pod: Arc<Pod>,
}

#[async_trait]
impl Task for TaskService {
    async fn state(&self, _: &TtrpcContext, req: StateRequest) -> Rpc<StateResponse> {
        let task = self.pod.task(&req.id)?;
        let view = task.view(&ProcessId::from_wire(&req.exec_id))?;
        let (status, exit) = match view.status {
            // An exec whose start has failed can only be deleted. The stock shim calls such an exec created, too.
            Seen::Created | Seen::Failed(_) => (Status::CREATED, None),
            // Not yet stopped: for who is told of the stop, a Wait must resolve, and a Wait comes last of all exits.
            Seen::Running | Seen::Ending(_) => (Status::RUNNING, None),
            Seen::Paused => (Status::PAUSED, None),
            // Stopped also before the exit is published: only the reader of the output is waited for. A containerd that
            // comes back opens the output, asks for the state, and takes no exit event for a while after that.
            Seen::Ended(exit) | Seen::Stopped(exit) => (Status::STOPPED, Some(exit)),
        };
        Ok(StateResponse {
            id: req.id,
            exec_id: req.exec_id,
            bundle: task.bundle().display().to_string(),
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
            options: options::from_any(req.options.as_ref())?,
            id: req.id,
            bundle,
            rootfs: req.rootfs.into_iter().map(mount).collect(),
            // The field `parent_checkpoint` is not needed: criu finds the earlier checkpoint by a link beside the
            // images.
            checkpoint: (!req.checkpoint.is_empty()).then(|| req.checkpoint.into()),
            io: io::Request {
                stdin: req.stdin,
                stdout: req.stdout,
                stderr: req.stderr,
                terminal: req.terminal,
            },
        };
        let pid = self.pod.create(create).await?;
        Ok(CreateTaskResponse {
            pid: wire_pid(pid),
            ..CreateTaskResponse::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, req: StartRequest) -> Rpc<StartResponse> {
        let process = ProcessId::from_wire(&req.exec_id);
        let pid = self.pod.task(&req.id)?.start(process).await?;
        Ok(StartResponse {
            pid: wire_pid(Some(pid)),
            ..StartResponse::default()
        })
    }

    async fn delete(&self, _: &TtrpcContext, req: DeleteRequest) -> Rpc<DeleteResponse> {
        let process = ProcessId::from_wire(&req.exec_id);
        let deleted = self.pod.delete(req.id, process).await?;
        Ok(DeleteResponse {
            pid: wire_pid(deleted.pid),
            exit_status: deleted.exit.status,
            exited_at: timestamp(deleted.exit.at).into(),
            ..DeleteResponse::default()
        })
    }

    async fn pids(&self, _: &TtrpcContext, req: PidsRequest) -> Rpc<PidsResponse> {
        let listed = self.pod.task(&req.id)?.pids().await?;
        Ok(PidsResponse {
            processes: listed.into_iter().map(process_info).collect(),
            ..PidsResponse::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, req: PauseRequest) -> Rpc<Empty> {
        self.pod.container(&req.id)?.ask(Request::Pause).await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, req: ResumeRequest) -> Rpc<Empty> {
        self.pod.container(&req.id)?.ask(Request::Resume).await?;
        Ok(Empty::new())
    }

    async fn checkpoint(&self, _: &TtrpcContext, req: CheckpointTaskRequest) -> Rpc<Empty> {
        let checkpoint = checkpoint::from_request(&req.path, req.options.as_ref())?;
        self.pod
            .container(&req.id)?
            .ask(|reply| Request::Checkpoint(checkpoint, reply))
            .await?;
        Ok(Empty::new())
    }

    async fn kill(&self, _: &TtrpcContext, req: KillRequest) -> Rpc<Empty> {
        let process = ProcessId::from_wire(&req.exec_id);
        let scope = if req.all {
            KillScope::All
        } else {
            KillScope::Process
        };
        let task = self.pod.task(&req.id)?;
        task.kill(process, req.signal, scope).await?;
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
        self.pod
            .container(&req.id)?
            .ask(|reply| Request::Exec(req.exec_id, process, io, reply))
            .await?;
        Ok(Empty::new())
    }

    async fn resize_pty(&self, _: &TtrpcContext, req: ResizePtyRequest) -> Rpc<Empty> {
        let process = ProcessId::from_wire(&req.exec_id);
        let size = io::Size {
            width: u16::try_from(req.width).unwrap_or(u16::MAX),
            height: u16::try_from(req.height).unwrap_or(u16::MAX),
        };
        self.pod
            .container(&req.id)?
            .ask(|reply| Request::Resize(process, size, reply))
            .await?;
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, req: CloseIORequest) -> Rpc<Empty> {
        let process = ProcessId::from_wire(&req.exec_id);
        self.pod
            .container(&req.id)?
            .ask(|reply| Request::CloseIo(process, reply))
            .await?;
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, req: UpdateTaskRequest) -> Rpc<Empty> {
        let resources = req.resources.into_option().unwrap_or_default().value;
        self.pod
            .container(&req.id)?
            .ask(|reply| Request::Update(resources, reply))
            .await?;
        Ok(Empty::new())
    }

    async fn wait(&self, _: &TtrpcContext, req: WaitRequest) -> Rpc<WaitResponse> {
        let process = ProcessId::from_wire(&req.exec_id);
        let exit = self.pod.task(&req.id)?.wait(&process).await?;
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit.at).into(),
            ..WaitResponse::default()
        })
    }

    async fn stats(&self, _: &TtrpcContext, req: StatsRequest) -> Rpc<StatsResponse> {
        let stats = self.pod.task(&req.id)?.stats().await?;
        Ok(StatsResponse {
            stats: Some(metrics(&stats)).into(),
            ..StatsResponse::default()
        })
    }

    async fn connect(&self, _: &TtrpcContext, req: ConnectRequest) -> Rpc<ConnectResponse> {
        // Succeeds also without the task: a containerd that comes back connects first, and only after a success deletes
        // a task that was never made in the regular way.
        let task = self.pod.task(&req.id);
        let view = task.and_then(|task| task.view(&ProcessId::Init));
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid: wire_pid(view.ok().and_then(|view| view.pid)),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            ..ConnectResponse::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> Rpc<Empty> {
        self.pod.settle(Occasion::Shutdown);
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
