//! Publishes events to containerd: one ordered queue, one publisher.
//!
//! ```text
//!  containers ──send──▶ queue (container::event) ──▶ publisher ──Forward──▶ containerd
//!                                                     ▲     │
//!                                                     └─────┘ no success: the same event again after a delay
//! ```
//!
//! Without its exit event a pod never ends for the kubelet. In a changed order a container seems to run after its end.
//! So the publisher sends one event at a time, and goes on to the next only when containerd has taken the event, or
//! keeps refusing it:
//!
//! | Forward | the same event is sent again |
//! |---|---|
//! | OK | – |
//! | no answer, or one that says "not now" | until there is another answer: containerd is away |
//! | a refusal that says that the event is wrong | – |
//! | any other refusal | for ten seconds of refusals |
//!
//! A refused event is lost, with a line in the log. Otherwise one such event would keep all later exits from containerd.

use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use containerd_shim_protos::events::task;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::shim_async::{Client, EventsClient};
use containerd_shim_protos::topics;
use containerd_shim_protos::ttrpc::{self, Code};
use log::{Level, info, log};
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
/// For how long an event is sent again that containerd refuses. A containerd that starts or ends refuses for less.
const REFUSED: Duration = Duration::from_secs(10);

struct Publisher {
    address: String,
    namespace: String,
    client: Option<EventsClient>,
}

impl Publisher {
    async fn run(mut self, mut queue: EventQueue) {
        while let Some((at, event)) = queue.next().await {
            let container = event.container().to_owned();
            let is_exit = matches!(event, Event::Exit { .. });
            let envelope = envelope(at, event, &self.namespace);
            let topic = envelope.topic.clone();
            match self.publish(envelope).await {
                Ok(()) => {}
                Err(refusal) => log!(
                    if is_exit { Level::Error } else { Level::Warn },
                    container, event = topic, error:% = refusal; "event lost, containerd refuses it"
                ),
            }
        }
    }

    /// Sends `envelope`, again if need be. Returns when containerd has taken the envelope.
    ///
    /// # Errors
    /// The last refusal of an envelope that containerd keeps refusing.
    async fn publish(&mut self, envelope: Envelope) -> ttrpc::Result<()> {
        let mut delay = RETRY.0;
        // Since when every answer has been a refusal.
        let mut refused: Option<Instant> = None;
        let topic = envelope.topic.clone();
        let request = ForwardRequest {
            envelope: Some(envelope).into(),
            ..ForwardRequest::default()
        };
        loop {
            let error = match self.forward(&request).await {
                Ok(()) if delay > RETRY.0 => {
                    info!(event = topic; "containerd is back, event sent");
                    return Ok(());
                }
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            match Refusal::of(&error) {
                Refusal::Away => refused = None,
                Refusal::Wrong => return Err(error),
                Refusal::Other => {
                    if refused.get_or_insert_with(Instant::now).elapsed() > REFUSED {
                        return Err(error);
                    }
                }
            }
            if delay == RETRY.0 {
                info!(event = topic, error:%; "event waits for containerd");
            }
            self.client = None;
            tokio::time::sleep(delay).await;
            delay = (delay * 2).min(RETRY.1);
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

/// What an error says about sending the event again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    /// containerd is not there, or not for now.
    Away,
    /// The event is wrong, and stays wrong.
    Wrong,
    /// containerd has an error of its own with the event.
    Other,
}

impl Refusal {
    fn of(error: &ttrpc::Error) -> Self {
        let ttrpc::Error::RpcStatus(status) = error else {
            return Self::Away;
        };
        match status.code() {
            Code::UNAVAILABLE | Code::DEADLINE_EXCEEDED | Code::CANCELLED => Self::Away,
            // containerd's word for an envelope with a wrong topic, namespace or time.
            Code::INVALID_ARGUMENT => Self::Wrong,
            Code::OK
            | Code::UNKNOWN
            | Code::NOT_FOUND
            | Code::ALREADY_EXISTS
            | Code::PERMISSION_DENIED
            | Code::UNAUTHENTICATED
            | Code::RESOURCE_EXHAUSTED
            | Code::FAILED_PRECONDITION
            | Code::ABORTED
            | Code::OUT_OF_RANGE
            | Code::UNIMPLEMENTED
            | Code::INTERNAL
            | Code::DATA_LOSS => Self::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_waits_for_a_containerd_that_is_away_and_for_no_refusal() {
        let status = |code| ttrpc::Error::RpcStatus(ttrpc::get_status(code, "x"));
        for (error, refusal) in [
            (ttrpc::Error::Eof, Refusal::Away),
            (ttrpc::Error::RemoteClosed, Refusal::Away),
            (ttrpc::Error::Socket("closed".into()), Refusal::Away),
            (ttrpc::Error::Others("timeout".into()), Refusal::Away),
            (status(Code::UNAVAILABLE), Refusal::Away),
            (status(Code::DEADLINE_EXCEEDED), Refusal::Away),
            (status(Code::INVALID_ARGUMENT), Refusal::Wrong),
            (status(Code::UNKNOWN), Refusal::Other),
            (status(Code::INTERNAL), Refusal::Other),
            (status(Code::NOT_FOUND), Refusal::Other),
            (status(Code::UNIMPLEMENTED), Refusal::Other),
        ] {
            assert_eq!(Refusal::of(&error), refusal, "{error}");
        }
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
