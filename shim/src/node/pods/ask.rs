//! What a shim says of itself: its pid and version (`Connect`), and its sandbox (`SandboxStatus`).

use std::time::Duration;

use containerd_shim_protos::api::ConnectRequest;
use containerd_shim_protos::sandbox_api::SandboxStatusRequest;
use containerd_shim_protos::sandbox_async::SandboxClient;
use containerd_shim_protos::shim_async::{Client, TaskClient};
use containerd_shim_protos::ttrpc;
use rustix::process::Pid;
use serde_json::Value;

use super::find::{Group, Kind};

/// The longest wait for all answers of one shim. A shim that is well answers in a millisecond.
const PATIENCE: Duration = Duration::from_secs(2);

/// The answer of a shim.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Answer {
    pub(super) version: String,
    /// The shim's own pid.
    pub(super) shim: Option<Pid>,
    /// The pid of the sandbox.
    pub(super) sandbox: Option<Pid>,
    /// CRI's metadata of a pod of the Sandbox API: `name`, `namespace`.
    pub(super) metadata: Value,
}

/// Asks a shim; none when it does not answer.
pub(super) async fn ask(group: &Group) -> Option<Answer> {
    tokio::time::timeout(PATIENCE, answer(group))
        .await
        .ok()?
        .ok()
}

async fn answer(group: &Group) -> ttrpc::Result<Answer> {
    let client = Client::connect(&format!("unix://{}", group.socket.display())).await?;
    let context = || ttrpc::context::with_duration(PATIENCE);
    let sandbox = group.sandbox();
    let asked = sandbox.or(group.bundles.first());
    let request = ConnectRequest {
        id: asked.map(|bundle| bundle.id.clone()).unwrap_or_default(),
        ..ConnectRequest::default()
    };
    let connected = TaskClient::new(client.clone())
        .connect(context(), &request)
        .await?;
    let mut answer = Answer {
        version: connected.version,
        shim: pid(connected.shim_pid),
        ..Answer::default()
    };
    match sandbox.map(|bundle| (bundle.kind, &bundle.id)) {
        Some((Kind::SandboxTask, _)) => answer.sandbox = pid(connected.task_pid),
        Some((Kind::Sandbox, id)) => {
            let request = SandboxStatusRequest {
                sandbox_id: id.clone(),
                verbose: true,
                ..SandboxStatusRequest::default()
            };
            // A sandbox that is not made yet has no status.
            if let Ok(status) = SandboxClient::new(client)
                .sandbox_status(context(), &request)
                .await
            {
                answer.sandbox = pid(status.pid);
                let info = status
                    .info
                    .get("info")
                    .map(String::as_str)
                    .unwrap_or_default();
                let info: Value = serde_json::from_str(info).unwrap_or_default();
                answer.metadata = info["config"]["metadata"].clone();
            }
        }
        Some((Kind::Container | Kind::Deleted, _)) | None => {}
    }
    Ok(answer)
}

fn pid(wire: u32) -> Option<Pid> {
    Pid::from_raw(i32::try_from(wire).ok()?)
}
