//! Events while containerd is away: when containerd is back, every event comes, once, in order. And what is told first.
//!
//! containerd is killed. At its ttrpc address nobody listens, or a listener of the test: the listener takes an event,
//! closes the connection without an answer, or answers with an error. See ttrpc's frames:
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
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{KillRequest, WaitRequest};
use containerd_shim_protos::events::task::{TaskDelete, TaskExit};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::event::Envelope;
use containerd_shim_protos::shim::events::ForwardRequest;
use containerd_shim_protos::ttrpc::{self, Code};
use serde_json::json;
use shim_tests::calls::Shim;
use shim_tests::cgroups::{self, Hierarchy, hierarchy};
use shim_tests::direct::Group;
use shim_tests::frames::Connection;
use shim_tests::leaks::grpc_address;
use shim_tests::raw::Bundle;
use shim_tests::until::ok_if;
use shim_tests::{Daemon, Version, eventually, on_every_containerd, ours_only};

const TASK: &str = "containerd.task.v2.Task";

/// The listener's reaction to an event.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Reply {
    /// Takes the event.
    Taken,
    /// Closes the connection instead of an answer.
    Silence,
    /// Answers with this code.
    Refused(Code),
}

/// A listener in containerd's place, at containerd's ttrpc address.
struct Listener {
    path: PathBuf,
    events: mpsc::Receiver<(Envelope, Reply)>,
}

impl Listener {
    /// Listens, and gives `reply(n, event)` to the n-th event.
    fn start(path: &Path, reply: impl Fn(usize, &Envelope) -> Reply + Send + 'static) -> Self {
        let _ = std::fs::remove_file(path);
        let socket = UnixListener::bind(path).unwrap();
        let (sender, events) = mpsc::channel();
        std::thread::spawn(move || {
            let mut number = 0;
            for connection in socket.incoming().map_while(Result::ok) {
                serve(connection, |envelope| {
                    let reply = reply(number, &envelope);
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
            Reply::Refused(code) => response.set_status(ttrpc::get_status(code, "no")),
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

/// containerd deletes a sandbox whose Wait is answered, and closes the connection: a Kill that is answered later has failed
/// for its caller. On a starved machine, one of some thousand StopPodSandbox failed so, with "ttrpc: closed".
#[test]
fn the_kill_of_a_sandbox_is_answered_before_its_exit_is_told() {
    ours_only!("the stock shim's pause process ends some time after its Kill");
    let daemon = Daemon::start(Version::V2_1);
    for round in 0..10 {
        let id = format!("pod{round}");
        let bundle = Bundle::new(&daemon, &id);
        let mut spec = bundle.sandbox_spec("");
        spec["linux"]["namespaces"][4] = serde_json::json!({"type": "network"});
        let bundle = bundle.write_spec(&spec);
        let started = bundle.start(b"");
        let shim = Shim::connect(&started);
        bundle.create(&shim).unwrap();
        shim.start(&id, "").unwrap();

        let mut wait = WaitRequest::new();
        wait.id.clone_from(&id);
        let mut kill = KillRequest::new();
        (kill.id, kill.signal) = (id.clone(), 9);
        let mut connection = Connection::to(&started.address())
            .with(1, TASK, "Wait", &wait)
            .send()
            .with(3, TASK, "Kill", &kill)
            .send();
        let first = [connection.answer().0, connection.answer().0];
        assert_eq!(first, [3, 1], "round {round}");

        shim.delete(&id, "").unwrap();
        bundle.shut_down(&shim);
    }
    daemon.end();
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
        let listener = Listener::start(&address, |number, _| match number {
            n if n % 3 == 2 => Reply::Silence,
            n if n % 5 == 4 => Reply::Refused(Code::UNAVAILABLE),
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

    fn an_event_that_containerd_refuses_keeps_no_later_one_back(version) {
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "refused");
        let address = PathBuf::from(format!("{}.ttrpc", grpc_address(&daemon.names)));
        // Keeps the shim, which would end without a container while containerd is away.
        let events = daemon.events();
        group.run("keeps", "exec sleep 3600");
        eventually(Duration::from_secs(20), || {
            let seen = events.of("keeps");
            ok_if(seen == ["create", "start"], || format!("{seen:?}"))
        });
        daemon.kill();
        let expected = five_containers(&group, 1);
        // The first is retried for a while, the second is refused for good.
        let listener = Listener::start(&address, |_, envelope| match &*topic_id_and_code(envelope) {
            "exit c11 11" => Reply::Refused(Code::UNKNOWN),
            "exit c12 12" => Reply::Refused(Code::INVALID_ARGUMENT),
            _ => Reply::Taken,
        });
        let begin = Instant::now();
        let (mut taken, mut refused) = (Vec::new(), Vec::new());
        while taken.len() < expected.len() - 2 {
            assert!(begin.elapsed() < Duration::from_secs(40), "taken {taken:?}, refused {refused:?}");
            let (envelope, reply) = listener.next_event();
            let list = if reply == Reply::Taken { &mut taken } else { &mut refused };
            list.push(topic_id_and_code(&envelope));
        }
        let wrong = ["exit c11 11", "exit c12 12"];
        let others: Vec<_> = expected.into_iter().filter(|event| !wrong.contains(&&**event)).collect();
        assert_eq!(taken, others);
        assert!(refused.iter().filter(|event| *event == wrong[0]).count() > 3, "{refused:?}");
        assert_eq!(refused.iter().filter(|event| *event == wrong[1]).count(), 1, "{refused:?}");
        drop(listener);
        daemon.start_again();
        group.remove("keeps");
        group.end();
        daemon.end();
    }

    fn a_loop_of_oom_kills_while_containerd_is_away_leaves_few_events(version) {
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "flood");
        let address = PathBuf::from(format!("{}.ttrpc", grpc_address(&daemon.names)));
        daemon.kill();
        let script = "while :; do dd if=/dev/zero of=/dev/null bs=256M count=1; sleep 0.1; done";
        let pid = group
            .create_with("c", script, |spec| spec["linux"]["resources"]["memory"]["limit"] = json!(16 << 20))
            .unwrap();
        let memory = cgroups::directory(pid.cast_signed(), "memory").unwrap();
        group.shim.start("c", "").unwrap();
        let file = memory.join(match hierarchy() {
            Hierarchy::V1 => "memory.oom_control",
            Hierarchy::V2 => "memory.events",
        });
        eventually(Duration::from_secs(60), || {
            let text = std::fs::read_to_string(&file).unwrap();
            let kills = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
            let kills: u32 = kills.unwrap().trim().parse().unwrap();
            ok_if(kills >= 20, || format!("{kills} kills"))
        });
        group.remove("c");
        let listener = Listener::start(&address, |_, _| Reply::Taken);
        let mut taken = Vec::new();
        while taken.last().is_none_or(|event| event != "delete c 137") {
            taken.push(topic_id_and_code(&listener.next_event().0));
        }
        let ooms = taken.iter().filter(|event| *event == "oom").count();
        assert!((1..=2).contains(&ooms), "{ooms} of {taken:?}");
        let place = |event: &str| taken.iter().position(|other| other == event);
        assert!(place("oom") < place("exit c 137") && place("oom") > place("start"), "{taken:?}");
        drop(listener);
        daemon.start_again();
        group.end();
        daemon.end();
    }
}
