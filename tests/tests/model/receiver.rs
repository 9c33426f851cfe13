//! The place of containerd that takes a shim's events, and that can be away.
//!
//! The protocol is ttrpc: a header of ten bytes (length, stream, type, flags), and a message.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use containerd_shim_protos::events::task;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::ttrpc::{Request, Response};

/// What a shim said of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Create,
    Start(u32),
    ExecAdded(String),
    ExecStarted(String, u32),
    /// The id of the process, which for an init is the container's, the pid and the status.
    Exit(String, u32, u32),
    Paused,
    Resumed,
    Delete(u32),
    Other(String),
}

#[derive(Default)]
struct State {
    /// By container.
    events: BTreeMap<String, Vec<Event>>,
    /// The last message: a shim sends the same message again when the connection broke before the answer.
    last: Vec<u8>,
    connections: Vec<UnixStream>,
    /// Grows each time that the receiver goes away.
    absences: u64,
}

/// Takes events at a socket.
pub(crate) struct Receiver {
    path: PathBuf,
    state: Arc<Mutex<State>>,
    listener: Mutex<Option<UnixListener>>,
}

impl Receiver {
    pub(crate) fn listen(path: PathBuf) -> Self {
        let receiver = Self {
            path,
            state: Arc::default(),
            listener: Mutex::default(),
        };
        receiver.back();
        receiver
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Breaks all connections, and takes no other.
    pub(crate) fn away(&self) {
        let Some(listener) = self.listener.lock().unwrap().take() else {
            return;
        };
        fs::remove_file(&self.path).unwrap();
        rustix::net::shutdown(&listener, rustix::net::Shutdown::Both).unwrap();
        let mut state = self.state();
        state.absences += 1;
        for connection in state.connections.drain(..) {
            let _ = connection.shutdown(Shutdown::Both);
        }
    }

    /// Takes events (again).
    pub(crate) fn back(&self) {
        let mut listener = self.listener.lock().unwrap();
        if listener.is_some() {
            return;
        }
        let new = UnixListener::bind(&self.path).unwrap();
        *listener = Some(new.try_clone().unwrap());
        let state = self.state.clone();
        let absences = self.state().absences;
        std::thread::spawn(move || {
            while let Ok((connection, _)) = new.accept() {
                let state = state.clone();
                {
                    let mut state = state.lock().unwrap();
                    if state.absences != absences {
                        return;
                    }
                    state.connections.push(connection.try_clone().unwrap());
                }
                std::thread::spawn(move || serve(connection, &state, absences));
            }
        });
    }

    /// The events of a container, in order.
    pub(crate) fn of(&self, container: &str) -> Vec<Event> {
        self.state()
            .events
            .get(container)
            .cloned()
            .unwrap_or_default()
    }
}

fn serve(mut connection: UnixStream, state: &Mutex<State>, absences: u64) -> Option<()> {
    loop {
        let mut header = [0; 10];
        connection.read_exact(&mut header).ok()?;
        let number = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().unwrap());
        let mut body = vec![0; number(0).try_into().unwrap()];
        connection.read_exact(&mut body).ok()?;
        let request = Request::parse_from_bytes(&body).unwrap();
        assert_eq!(request.method, "Forward");
        let answer = Response::default().write_to_bytes().unwrap();
        let mut message = u32::try_from(answer.len()).unwrap().to_be_bytes().to_vec();
        message.extend(number(4).to_be_bytes());
        message.extend([2, 0]);
        message.extend(answer);
        let mut state = state.lock().unwrap();
        if state.absences != absences {
            return None;
        }
        if state.last != request.payload {
            let forwarded = ForwardRequest::parse_from_bytes(&request.payload).unwrap();
            let (container, event) = read(&forwarded.envelope);
            state.events.entry(container).or_default().push(event);
            state.last = request.payload;
        }
        connection.write_all(&message).ok()?;
    }
}

fn read(envelope: &Envelope) -> (String, Event) {
    let bytes = &envelope.event.value;
    match envelope.topic.as_str() {
        "/tasks/create" => {
            let event = task::TaskCreate::parse_from_bytes(bytes).unwrap();
            (event.container_id, Event::Create)
        }
        "/tasks/start" => {
            let event = task::TaskStart::parse_from_bytes(bytes).unwrap();
            (event.container_id, Event::Start(event.pid))
        }
        "/tasks/exec-added" => {
            let event = task::TaskExecAdded::parse_from_bytes(bytes).unwrap();
            (event.container_id, Event::ExecAdded(event.exec_id))
        }
        "/tasks/exec-started" => {
            let event = task::TaskExecStarted::parse_from_bytes(bytes).unwrap();
            (
                event.container_id,
                Event::ExecStarted(event.exec_id, event.pid),
            )
        }
        "/tasks/exit" => {
            let event = task::TaskExit::parse_from_bytes(bytes).unwrap();
            (
                event.container_id,
                Event::Exit(event.id, event.pid, event.exit_status),
            )
        }
        "/tasks/paused" => {
            let event = task::TaskPaused::parse_from_bytes(bytes).unwrap();
            (event.container_id, Event::Paused)
        }
        "/tasks/resumed" => {
            let event = task::TaskResumed::parse_from_bytes(bytes).unwrap();
            (event.container_id, Event::Resumed)
        }
        "/tasks/delete" => {
            let event = task::TaskDelete::parse_from_bytes(bytes).unwrap();
            (event.container_id, Event::Delete(event.exit_status))
        }
        other => (String::new(), Event::Other(other.to_owned())),
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.away();
    }
}
