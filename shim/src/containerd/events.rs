//! Publishes events to containerd: one ordered queue, one publisher, no event dropped.
//!
//! ```text
//!  containers ──send──▶ queue (container::event) ──▶ publisher ──Forward──▶ containerd
//!                                                     ▲     │
//!                                                     └─────┘ containerd is away: the same event again after a delay
//! ```
//!
//! Without its exit event a pod never ends for the kubelet. In a changed order a container seems to run after its end.
//! So the publisher sends one event at a time, and goes on to the next only when containerd has taken the event or has
//! refused the event for good.

use std::path::Path;
use std::time::{Duration, SystemTime};

use containerd_shim_protos::events::task;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use containerd_shim_protos::ttrpc::{self, Code};
use log::{info, warn};
use rustix::process::Pid;
use tokio::task::JoinHandle;

use super::convert::{any, timestamp, wire_mount, wire_pid};
use crate::container::event::{Created, Event, EventQueue};
use crate::kernel::exits::Exit;

/// Starts the publisher: sends the events of `queue`, as events of containerd's `namespace`, to containerd's ttrpc
/// socket at `address` (a path without a scheme). The handle resolves when the queue is closed and empty.
pub fn publish(queue: EventQueue, address: String, namespace: String) -> JoinHandle<()> {
    let publisher = Publisher {
        address,
        namespace,
        client: None,
    };
    tokio::spawn(publisher.run(queue))
}

fn envelope(at: SystemTime, event: Event, namespace: &str) -> Envelope {
    let (topic, event) = wire(event);
    Envelope {
        timestamp: timestamp(at).into(),
        namespace: namespace.to_owned(),
        topic: topic.to_owned(),
        event: Some(event).into(),
        ..Envelope::default()
    }
}

/// The topic and the message of an event.
fn wire(event: Event) -> (&'static str, Any) {
    match event {
        Event::Create(created) => create(*created),
        Event::Start { container, pid } => start(container, pid),
        Event::ExecAdded { container, exec } => exec_added(container, exec),
        Event::ExecStarted {
            container,
            exec,
            pid,
        } => exec_started(container, exec, pid),
        Event::Oom { container } => oom(container),
        Event::Paused { container } => paused(container),
        Event::Resumed { container } => resumed(container),
        Event::Checkpointed { container, image } => checkpointed(container, &image),
        Event::Exit {
            container,
            id,
            pid,
            exit,
        } => exited(container, id, pid, exit),
        Event::Delete {
            container,
            pid,
            exit,
        } => deleted(container, pid, exit),
    }
}

fn create(created: Created) -> (&'static str, Any) {
    let io = task::TaskIO {
        stdin: created.io.stdin,
        stdout: created.io.stdout,
        stderr: created.io.stderr,
        terminal: created.io.terminal,
        ..task::TaskIO::default()
    };
    let checkpoint = created.checkpoint.as_deref().map(shown).unwrap_or_default();
    let event = task::TaskCreate {
        container_id: created.container,
        bundle: shown(&created.bundle),
        rootfs: created.rootfs.into_iter().map(wire_mount).collect(),
        io: Some(io).into(),
        checkpoint,
        pid: wire_pid(created.pid),
        ..task::TaskCreate::default()
    };
    (
        topics::TASK_CREATE_EVENT_TOPIC,
        any("containerd.events.TaskCreate", &event),
    )
}

fn start(container_id: String, pid: Pid) -> (&'static str, Any) {
    let event = task::TaskStart {
        container_id,
        pid: wire_pid(Some(pid)),
        ..task::TaskStart::default()
    };
    (
        topics::TASK_START_EVENT_TOPIC,
        any("containerd.events.TaskStart", &event),
    )
}

fn exec_added(container_id: String, exec_id: String) -> (&'static str, Any) {
    let event = task::TaskExecAdded {
        container_id,
        exec_id,
        ..task::TaskExecAdded::default()
    };
    (
        topics::TASK_EXEC_ADDED_EVENT_TOPIC,
        any("containerd.events.TaskExecAdded", &event),
    )
}

fn exec_started(container_id: String, exec_id: String, pid: Pid) -> (&'static str, Any) {
    let event = task::TaskExecStarted {
        container_id,
        exec_id,
        pid: wire_pid(Some(pid)),
        ..task::TaskExecStarted::default()
    };
    (
        topics::TASK_EXEC_STARTED_EVENT_TOPIC,
        any("containerd.events.TaskExecStarted", &event),
    )
}

fn oom(container_id: String) -> (&'static str, Any) {
    let event = task::TaskOOM {
        container_id,
        ..task::TaskOOM::default()
    };
    (
        topics::TASK_OOM_EVENT_TOPIC,
        any("containerd.events.TaskOOM", &event),
    )
}

fn paused(container_id: String) -> (&'static str, Any) {
    let event = task::TaskPaused {
        container_id,
        ..task::TaskPaused::default()
    };
    (
        topics::TASK_PAUSED_EVENT_TOPIC,
        any("containerd.events.TaskPaused", &event),
    )
}

fn resumed(container_id: String) -> (&'static str, Any) {
    let event = task::TaskResumed {
        container_id,
        ..task::TaskResumed::default()
    };
    (
        topics::TASK_RESUMED_EVENT_TOPIC,
        any("containerd.events.TaskResumed", &event),
    )
}

fn checkpointed(container_id: String, image: &Path) -> (&'static str, Any) {
    let event = task::TaskCheckpointed {
        container_id,
        checkpoint: shown(image),
        ..task::TaskCheckpointed::default()
    };
    (
        topics::TASK_CHECKPOINTED_EVENT_TOPIC,
        any("containerd.events.TaskCheckpointed", &event),
    )
}

fn exited(container_id: String, id: String, pid: Option<Pid>, exit: Exit) -> (&'static str, Any) {
    let event = task::TaskExit {
        container_id,
        id,
        pid: wire_pid(pid),
        exit_status: exit.status,
        exited_at: timestamp(exit.at).into(),
        ..task::TaskExit::default()
    };
    (
        topics::TASK_EXIT_EVENT_TOPIC,
        any("containerd.events.TaskExit", &event),
    )
}

fn deleted(container_id: String, pid: Option<Pid>, exit: Exit) -> (&'static str, Any) {
    let event = task::TaskDelete {
        container_id,
        pid: wire_pid(pid),
        exit_status: exit.status,
        exited_at: timestamp(exit.at).into(),
        ..task::TaskDelete::default()
    };
    (
        topics::TASK_DELETE_EVENT_TOPIC,
        any("containerd.events.TaskDelete", &event),
    )
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// The delay before an event is sent again: the first and the longest.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// How long containerd may take to answer one event.
const TIMEOUT: Duration = Duration::from_secs(5);

struct Publisher {
    address: String,
    namespace: String,
    client: Option<EventsClient>,
}

impl Publisher {
    async fn run(mut self, mut queue: EventQueue) {
        while let Some((at, event)) = queue.recv().await {
            let envelope = envelope(at, event, &self.namespace);
            self.publish(envelope).await;
        }
    }

    /// Sends `envelope`, again if need be. Returns when containerd has taken or finally refused the envelope.
    async fn publish(&mut self, envelope: Envelope) {
        let mut delay = RETRY.0;
        let topic = envelope.topic.clone();
        let request = ForwardRequest {
            envelope: Some(envelope).into(),
            ..ForwardRequest::default()
        };
        loop {
            match self.forward(&request).await {
                Ok(()) if delay > RETRY.0 => {
                    return info!("containerd is back, event {topic} sent");
                }
                Ok(()) => return,
                Err(error) if is_final(&error) => {
                    return warn!("containerd refuses event {topic}: {error}");
                }
                Err(error) => {
                    if delay == RETRY.0 {
                        info!("event {topic} waits for containerd: {error}");
                    }
                    self.client = None;
                    tokio::time::sleep(delay).await;
                    delay = (delay * 2).min(RETRY.1);
                }
            }
        }
    }

    async fn forward(&mut self, request: &ForwardRequest) -> ttrpc::Result<()> {
        let client = match self.client.take() {
            Some(client) => client,
            None => EventsClient::new(Client::connect(&format!("unix://{}", self.address)).await?),
        };
        let timeout = i64::try_from(TIMEOUT.as_nanos()).unwrap_or(i64::MAX);
        client
            .forward(ttrpc::context::with_timeout(timeout), request)
            .await?;
        self.client = Some(client);
        Ok(())
    }
}

/// Whether the error is a refusal that stays the same however often the event is sent.
fn is_final(error: &ttrpc::Error) -> bool {
    matches!(error, ttrpc::Error::RpcStatus(status) if matches!(
        status.code(),
        Code::INVALID_ARGUMENT | Code::UNIMPLEMENTED | Code::PERMISSION_DENIED | Code::UNAUTHENTICATED
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_refusal_is_final() {
        let status = |code| ttrpc::Error::RpcStatus(ttrpc::get_status(code, "x"));
        assert!(is_final(&status(Code::INVALID_ARGUMENT)));
        assert!(!is_final(&status(Code::UNAVAILABLE)));
        assert!(!is_final(&status(Code::DEADLINE_EXCEEDED)));
        assert!(!is_final(&ttrpc::Error::Eof));
        assert!(!is_final(&ttrpc::Error::Socket("closed".into())));
    }

    #[test]
    fn an_envelope_names_topic_namespace_and_type() {
        let exit = Event::Exit {
            container: "c".into(),
            id: "c".into(),
            pid: None,
            exit: Exit::now(0),
        };
        let envelope = envelope(SystemTime::now(), exit, "k8s.io");
        assert_eq!(envelope.topic, "/tasks/exit");
        assert_eq!(envelope.namespace, "k8s.io");
        assert_eq!(envelope.event.type_url, "containerd.events.TaskExit");
    }
}
