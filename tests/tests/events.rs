//! Events while containerd is away: when containerd is back, every event comes, once, in order.
//!
//! containerd is killed. At its ttrpc address nobody listens, or a listener of the test: the listener takes an event,
//! closes the connection without an answer, or answers UNAVAILABLE. See ttrpc's frames:
//! <https://github.com/containerd/ttrpc/blob/main/PROTOCOL.md>.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::Duration;

use containerd_shim_protos::events::task::{TaskDelete, TaskExit};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::ttrpc::{self, Code};
use shim_tests::direct::Group;
use shim_tests::leaks::grpc_address;
use shim_tests::{Daemon, on_every_containerd};

/// The listener's reaction to an event.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Reply {
    /// Takes the event.
    Taken,
    /// Closes the connection instead of an answer.
    Silence,
    /// Answers UNAVAILABLE.
    Unavailable,
}

/// A listener in containerd's place, at containerd's ttrpc address.
struct Listener {
    path: PathBuf,
    events: mpsc::Receiver<(Envelope, Reply)>,
}

impl Listener {
    /// Listens, and gives `reply(n)` to the n-th event.
    fn start(path: &Path, reply: impl Fn(usize) -> Reply + Send + 'static) -> Self {
        let _ = std::fs::remove_file(path);
        let socket = UnixListener::bind(path).unwrap();
        let (sender, events) = mpsc::channel();
        std::thread::spawn(move || {
            let mut number = 0;
            for connection in socket.incoming().map_while(Result::ok) {
                serve(connection, |envelope| {
                    let reply = reply(number);
                    number += 1;
                    sender
                        .send((envelope, reply))
                        .map_or(Reply::Silence, |()| reply)
                });
            }
        });
        Self {
            path: path.to_owned(),
            events,
        }
    }

    #[track_caller]
    fn next_event(&self) -> (Envelope, Reply) {
        self.events
            .recv_timeout(Duration::from_secs(30))
            .expect("an event")
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Answers the requests of one connection, until the connection ends or an event is met with silence.
fn serve(mut connection: UnixStream, mut event: impl FnMut(Envelope) -> Reply) {
    let mut header = [0; 10];
    while connection.read_exact(&mut header).is_ok() {
        let length = u32::from_be_bytes(header[..4].try_into().unwrap());
        let mut body = vec![0; length as usize];
        if connection.read_exact(&mut body).is_err() {
            return;
        }
        let request = ttrpc::Request::parse_from_bytes(&body).unwrap();
        let forward = ForwardRequest::parse_from_bytes(&request.payload).unwrap();
        let mut response = ttrpc::Response::new();
        match event(forward.envelope.unwrap()) {
            Reply::Taken => {}
            Reply::Silence => return,
            Reply::Unavailable => {
                response.set_status(ttrpc::get_status(Code::UNAVAILABLE, "later"));
            }
        }
        let body = response.write_to_bytes().unwrap();
        // The same stream, and the type of a response.
        header[..4].copy_from_slice(&u32::try_from(body.len()).unwrap().to_be_bytes());
        (header[8], header[9]) = (2, 0);
        if connection
            .write_all(&[&header[..], &body].concat())
            .is_err()
        {
            return;
        }
    }
}

/// `topic id code`.
fn topic_id_and_code(envelope: &Envelope) -> String {
    let bytes = &envelope.event.value;
    let topic = envelope.topic.trim_start_matches("/tasks/");
    match topic {
        "exit" => {
            let event = TaskExit::parse_from_bytes(bytes).unwrap();
            format!("exit {} {}", event.id, event.exit_status)
        }
        "delete" => {
            let event = TaskDelete::parse_from_bytes(bytes).unwrap();
            format!("delete {} {}", event.container_id, event.exit_status)
        }
        other => other.to_owned(),
    }
}

/// Runs five containers, one after the other. Gives the events that must come.
fn five_containers(group: &Group<'_>, round: u32) -> Vec<String> {
    let mut expected = Vec::new();
    for number in 0..5 {
        let (id, code) = (format!("c{round}{number}"), round * 10 + number);
        group.run(&id, &format!("exit {code}"));
        assert_eq!(group.shim.wait(&id, "").unwrap(), code);
        group.remove(&id);
        expected.extend(["create".to_owned(), "start".to_owned()]);
        expected.push(format!("exit {id} {code}"));
        expected.push(format!("delete {id} {code}"));
    }
    expected
}

on_every_containerd! {
    fn events_wait_for_containerd_and_keep_their_order(version) {
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "events");
        let address = PathBuf::from(format!("{}.ttrpc", grpc_address(&daemon.names)));
        daemon.kill();
        let _ = std::fs::remove_file(&address);
        // Nobody listens.
        let mut expected = five_containers(&group, 1);
        // Then an unreliable listener: every third event is met with silence, every fifth with UNAVAILABLE.
        let listener = Listener::start(&address, |number| match number {
            n if n % 3 == 2 => Reply::Silence,
            n if n % 5 == 4 => Reply::Unavailable,
            _ => Reply::Taken,
        });
        expected.extend(five_containers(&group, 2));
        let mut taken = Vec::new();
        while taken.len() < expected.len() {
            let (envelope, reply) = listener.next_event();
            let line = topic_id_and_code(&envelope);
            // An event that was not taken is sent again before any later event.
            assert_eq!(line, expected[taken.len()], "after {taken:?}");
            if reply == Reply::Taken {
                taken.push(line);
            }
        }
        drop(listener);
        // The restarted containerd hears of the container's end.
        daemon.start_again();
        let events = daemon.events();
        five_containers(&group, 3);
        for number in 0..5 {
            let id = format!("c3{number}");
            shim_tests::eventually(Duration::from_secs(20), || {
                let seen = events.of(&id);
                shim_tests::until::ok_if(seen == ["create", "start", "exit", "delete"], || format!("{seen:?}"))
            });
        }
        group.end();
        daemon.end();
    }
}
