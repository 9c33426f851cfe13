//! Events to containerd: one ordered queue, one publisher, nothing dropped.
//!
//! ```text
//!  containers ──send──▶ queue ──▶ publisher ──Forward──▶ containerd
//!                                    └── the same event again after a pause, while containerd is away
//! ```
//!
//! A lost exit event is a pod that never ends for kubelet, and a changed order is a container that ran after it ended.
//! So the publisher sends one event at a time and goes on to the next only when containerd has taken it, or has said
//! that it never will.

use std::time::{Duration, SystemTime};

use containerd_shim_protos::events::task;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use containerd_shim_protos::ttrpc::{self, Code};
use log::{debug, info, warn};
use rustix::process::Pid;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::containerd::convert::{any, timestamp, wire_pid};
use crate::kernel::exits::Exit;

/// What happened to a container.
#[derive(Debug)]
pub enum Event {
    /// runc has made the container, or the sandbox stands.
    Create(task::TaskCreate),
    /// It runs.
    Start(task::TaskStart),
    /// An exec is known.
    ExecAdded(task::TaskExecAdded),
    /// An exec runs.
    ExecStarted(task::TaskExecStarted),
    /// The kernel has killed a process of it for lack of memory.
    Oom(task::TaskOOM),
    /// All processes are frozen.
    Paused(task::TaskPaused),
    /// They run again.
    Resumed(task::TaskResumed),
    /// The container was saved.
    Checkpointed(task::TaskCheckpointed),
    /// A process ended.
    Exit(task::TaskExit),
    /// Nothing is left of the container.
    Delete(task::TaskDelete),
}

impl Event {
    /// The init of `container` runs.
    pub fn started(container: &str, pid: Pid) -> Self {
        Self::Start(task::TaskStart {
            container_id: container.to_owned(),
            pid: wire_pid(Some(pid)),
            ..task::TaskStart::default()
        })
    }

    /// The kernel has killed a process of `container` for lack of memory.
    pub fn oom(container: &str) -> Self {
        Self::Oom(task::TaskOOM {
            container_id: container.to_owned(),
            ..task::TaskOOM::default()
        })
    }

    /// Process `id` of `container` has ended; an init has its container's id.
    pub fn exited(container: &str, id: &str, pid: Option<Pid>, exit: Exit) -> Self {
        Self::Exit(task::TaskExit {
            container_id: container.to_owned(),
            id: id.to_owned(),
            pid: wire_pid(pid),
            exit_status: exit.status,
            exited_at: timestamp(exit.at).into(),
            ..task::TaskExit::default()
        })
    }

    /// Nothing is left of `container`.
    pub fn deleted(container: &str, pid: Option<Pid>, exit: Exit) -> Self {
        Self::Delete(task::TaskDelete {
            container_id: container.to_owned(),
            pid: wire_pid(pid),
            exit_status: exit.status,
            exited_at: timestamp(exit.at).into(),
            ..task::TaskDelete::default()
        })
    }

    fn envelope(&self, namespace: &str) -> Envelope {
        let (topic, event) = match self {
            Self::Create(e) => (
                topics::TASK_CREATE_EVENT_TOPIC,
                any("containerd.events.TaskCreate", e),
            ),
            Self::Start(e) => (
                topics::TASK_START_EVENT_TOPIC,
                any("containerd.events.TaskStart", e),
            ),
            Self::ExecAdded(e) => (
                topics::TASK_EXEC_ADDED_EVENT_TOPIC,
                any("containerd.events.TaskExecAdded", e),
            ),
            Self::ExecStarted(e) => (
                topics::TASK_EXEC_STARTED_EVENT_TOPIC,
                any("containerd.events.TaskExecStarted", e),
            ),
            Self::Oom(e) => (
                topics::TASK_OOM_EVENT_TOPIC,
                any("containerd.events.TaskOOM", e),
            ),
            Self::Paused(e) => (
                topics::TASK_PAUSED_EVENT_TOPIC,
                any("containerd.events.TaskPaused", e),
            ),
            Self::Resumed(e) => (
                topics::TASK_RESUMED_EVENT_TOPIC,
                any("containerd.events.TaskResumed", e),
            ),
            Self::Checkpointed(e) => (
                topics::TASK_CHECKPOINTED_EVENT_TOPIC,
                any("containerd.events.TaskCheckpointed", e),
            ),
            Self::Exit(e) => (
                topics::TASK_EXIT_EVENT_TOPIC,
                any("containerd.events.TaskExit", e),
            ),
            Self::Delete(e) => (
                topics::TASK_DELETE_EVENT_TOPIC,
                any("containerd.events.TaskDelete", e),
            ),
        };
        Envelope {
            timestamp: timestamp(SystemTime::now()).into(),
            namespace: namespace.to_owned(),
            topic: topic.to_owned(),
            event: Some(event).into(),
            ..Envelope::default()
        }
    }
}

/// The queue's end that containers write to.
#[derive(Debug, Clone)]
pub struct Events {
    namespace: String,
    queue: mpsc::UnboundedSender<Envelope>,
}

impl Events {
    /// Starts the publisher for events of `namespace` to containerd's ttrpc socket at `address` (without a scheme).
    /// The handle resolves when every [`Events`] is gone and the queue is empty.
    pub fn publish_to(address: String, namespace: String) -> (Self, JoinHandle<()>) {
        let (queue, events) = mpsc::unbounded_channel();
        let publisher = Publisher {
            address,
            client: None,
        };
        (
            Self { namespace, queue },
            tokio::spawn(publisher.run(events)),
        )
    }

    /// Puts `event` at the end of the queue.
    pub fn send(&self, event: &Event) {
        debug!("event {event:?}");
        if self.queue.send(event.envelope(&self.namespace)).is_err() {
            warn!("event after the end of the publisher: {event:?}");
        }
    }
}

/// The pause before an event is tried again, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// How long containerd may take for one event.
const TIMEOUT: Duration = Duration::from_secs(5);

struct Publisher {
    address: String,
    client: Option<EventsClient>,
}

impl Publisher {
    async fn run(mut self, mut events: mpsc::UnboundedReceiver<Envelope>) {
        while let Some(envelope) = events.recv().await {
            self.publish(envelope).await;
        }
    }

    /// Returns when containerd has `envelope`, or refuses it for good.
    async fn publish(&mut self, envelope: Envelope) {
        let mut pause = RETRY.0;
        let topic = envelope.topic.clone();
        let request = ForwardRequest {
            envelope: Some(envelope).into(),
            ..ForwardRequest::default()
        };
        loop {
            match self.forward(&request).await {
                Ok(()) if pause > RETRY.0 => {
                    return info!("containerd is back, event {topic} sent");
                }
                Ok(()) => return,
                Err(error) if is_final(&error) => {
                    return warn!("containerd refuses event {topic}: {error}");
                }
                Err(error) => {
                    if pause == RETRY.0 {
                        info!("event {topic} waits for containerd: {error}");
                    }
                    self.client = None;
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(RETRY.1);
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

/// Whether sending the same event again can never help.
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
        let envelope = Event::Exit(task::TaskExit::default()).envelope("k8s.io");
        assert_eq!(envelope.topic, "/tasks/exit");
        assert_eq!(envelope.namespace, "k8s.io");
        assert_eq!(envelope.event.type_url, "containerd.events.TaskExit");
    }
}
