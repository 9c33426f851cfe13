//! containerd's events, as `ctr events` prints them.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::Daemon;
use crate::until::{eventually, ok_if};

/// An event: its topic and its JSON.
#[derive(Clone, Debug)]
pub struct Event {
    /// The topic: `/tasks/create`, …
    pub topic: String,
    /// The event's fields.
    pub body: serde_json::Value,
}

/// All events since [`Daemon::events`].
pub struct Events {
    child: Child,
    seen: Arc<Mutex<Vec<Event>>>,
}

impl Events {
    pub(super) fn listen(daemon: &Daemon) -> Self {
        let mut child = daemon
            .ctr_command()
            .arg("events")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&seen);
        std::thread::spawn(move || {
            // 2026-01-01 00:00:00.0 +0000 UTC k8s.io /tasks/start {"container_id":"…","pid":7}
            for line in output.lines().map_while(Result::ok) {
                let Some(topic) = line.split_whitespace().find(|word| word.starts_with('/')) else {
                    continue;
                };
                let body = line.find('{').map(|at| &line[at..]).unwrap_or("null");
                let body = serde_json::from_str(body).unwrap_or_default();
                into.lock().unwrap().push(Event {
                    topic: topic.to_owned(),
                    body,
                });
            }
        });
        let events = Self { child, seen };
        // The first event that arrives shows that the subscription works: events are made until one arrives.
        let mut number = 0;
        eventually(Duration::from_secs(10), || {
            number += 1;
            let namespace = daemon.names.name();
            let label = format!("shim-tests={number}");
            if number == 1 {
                daemon.try_ctr(&["namespaces", "create", &namespace]);
            }
            daemon.ctr(&["namespaces", "label", &namespace, &label]);
            ok_if(!events.seen.lock().unwrap().is_empty(), || {
                "no events".to_owned()
            })
        });
        events
    }

    /// The topics (without `/tasks/`) of one container's events, in order of arrival. The id of an exec follows the
    /// topic after a colon.
    pub fn of(&self, container: &str) -> Vec<String> {
        let seen = self.seen.lock().unwrap();
        seen.iter()
            .filter(|event| {
                event.topic.starts_with("/tasks/") && event.body["container_id"] == container
            })
            .map(|event| {
                let topic = event.topic.trim_start_matches("/tasks/");
                let id = event.body["exec_id"]
                    .as_str()
                    .or_else(|| event.body["id"].as_str())
                    .unwrap_or_default();
                if id.is_empty() || id == container {
                    topic.to_owned()
                } else {
                    format!("{topic}:{id}")
                }
            })
            .collect()
    }

    /// The number of task events so far.
    pub fn count(&self) -> usize {
        let seen = self.seen.lock().unwrap();
        seen.iter()
            .filter(|event| event.topic.starts_with("/tasks/"))
            .count()
    }

    /// All task events, by container, with their bodies.
    pub fn by_container(&self) -> BTreeMap<String, Vec<Event>> {
        let mut all = BTreeMap::<String, Vec<Event>>::new();
        for event in self.seen.lock().unwrap().iter() {
            if let Some(id) = event.body["container_id"].as_str() {
                all.entry(id.to_owned()).or_default().push(event.clone());
            }
        }
        all
    }

    /// All task events of one container, with their bodies.
    pub fn bodies(&self, container: &str) -> Vec<Event> {
        let seen = self.seen.lock().unwrap();
        seen.iter()
            .filter(|event| {
                event.topic.starts_with("/tasks/") && event.body["container_id"] == container
            })
            .cloned()
            .collect()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
