//! Many containers and execs at once on one shim: every exit code is right, every event comes, and nothing grows.
//!
//! `STORM_CONTAINERS` and `STORM_EXECS` set the numbers (100 and 200 when they are not set). The measurements are
//! printed: `cargo nextest run -p shim-tests --test storm --no-capture`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_precision_loss,
    reason = "a test reports by failing, and this one by its measurements, too"
)]

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use containerd_shim_protos::api::Status;
use containerd_shim_protos::ttrpc::Code;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use shim_tests::calls::{Shim, Streams, code};
use shim_tests::daemon::{Event, Events};
use shim_tests::direct::{Group, Tasks};
use shim_tests::proc::{anonymous_kb, children};
use shim_tests::slot::text;
use shim_tests::until::ok_if;
use shim_tests::{Daemon, eventually, on_every_containerd};

/// How many at a time.
const CONTAINER_LANES: usize = 8;
const EXEC_LANES: usize = 16;
/// How much the shim's memory may grow after the storm's first part, in kB: an allocator keeps some.
const MEMORY_SLACK: u64 = 1024;

fn number_from_environment(variable: &str, otherwise: usize) -> usize {
    std::env::var(variable).map_or(otherwise, |text| text.parse().unwrap())
}

fn open_descriptors(pid: i32) -> usize {
    std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .count()
}

/// What happens to a container or an exec besides its own end.
#[derive(Clone, Copy, PartialEq)]
enum Fate {
    /// Nothing: the process exits by itself.
    Exits,
    /// The process exits by itself, and is killed at the same time.
    Raced,
    /// The process would run for ever, and is killed.
    Killed,
}

impl Fate {
    fn of(index: usize) -> Self {
        match index % 4 {
            0 | 1 => Self::Exits,
            2 => Self::Raced,
            _ => Self::Killed,
        }
    }

    fn script(self, exit: u32) -> String {
        match self {
            Self::Exits | Self::Raced => format!("exit {exit}"),
            Self::Killed => "exec sleep 3600".to_owned(),
        }
    }

    #[track_caller]
    fn check(self, name: &str, seen: u32, exit: u32) {
        let right = match self {
            Self::Exits => seen == exit,
            Self::Raced => seen == exit || seen == 137,
            Self::Killed => seen == 137,
        };
        assert!(right, "{name}: exit code {seen}, its own is {exit}");
    }
}

/// The ids of the containers and execs that live now, for the thread that calls State all the time.
#[derive(Default)]
struct Living(Mutex<BTreeSet<(String, String)>>);

impl Living {
    fn add(&self, id: &str, exec: &str) {
        self.0
            .lock()
            .unwrap()
            .insert((id.to_owned(), exec.to_owned()));
    }

    fn remove(&self, id: &str, exec: &str) {
        self.0
            .lock()
            .unwrap()
            .remove(&(id.to_owned(), exec.to_owned()));
    }

    /// One of the ids; a different one each turn.
    fn pick(&self, turn: usize) -> Option<(String, String)> {
        let living = self.0.lock().unwrap();
        living.iter().nth(turn % living.len().max(1)).cloned()
    }
}

/// Runs `each(index, lane)` for all indices, on so many lanes, while one thread calls State all the time. How long the
/// answers to State took.
fn run_on_lanes(
    tasks: &Tasks,
    living: &Living,
    indices: std::ops::Range<usize>,
    lanes: usize,
    each: impl Fn(usize, usize) + Sync,
) -> Vec<Duration> {
    let next = AtomicUsize::new(indices.start);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let looks = scope.spawn(|| {
            let mut took = Vec::new();
            let shim = tasks.connect();
            while !over.load(Ordering::Relaxed) {
                if let Some((id, exec)) = living.pick(took.len()) {
                    let begin = Instant::now();
                    let answer = shim.state(&id, &exec);
                    took.push(begin.elapsed());
                    assert!(
                        matches!(code(&answer), Code::OK | Code::NOT_FOUND),
                        "{answer:?}"
                    );
                }
                std::thread::sleep(Duration::from_millis(2));
            }
            took
        });
        let (next, each) = (&next, &each);
        let work: Vec<_> = (0..lanes)
            .map(|lane| {
                scope.spawn(move || {
                    loop {
                        let index = next.fetch_add(1, Ordering::Relaxed);
                        if index >= indices.end {
                            return;
                        }
                        each(index, lane);
                    }
                })
            })
            .collect();
        let ended: Vec<_> = work.into_iter().map(|lane| lane.join()).collect();
        over.store(true, Ordering::Relaxed);
        let took = looks.join().unwrap();
        assert!(ended.iter().all(Result::is_ok), "a lane has failed");
        took
    })
}

/// A container from Create to Delete, with everything that races on the way.
fn run_one_container(tasks: &Tasks, living: &Living, index: usize) {
    let (id, fate, exit) = (format!("c{index}"), Fate::of(index), (index % 120) as u32);
    let shim = &tasks.shim;
    tasks
        .create(&id, &fate.script(exit))
        .unwrap_or_else(|e| panic!("create {id}: {e:?}"));
    living.add(&id, "");
    let seen = std::thread::scope(|scope| {
        let waits: Vec<_> = (0..2)
            .map(|_| scope.spawn(|| shim.wait(&id, "").unwrap()))
            .collect();
        shim.start(&id, "")
            .unwrap_or_else(|e| panic!("start {id}: {e:?}"));
        if fate != Fate::Exits {
            let killed = shim.kill(&id, "", 9);
            assert!(
                matches!(code(&killed), Code::OK | Code::NOT_FOUND),
                "{id}: {killed:?}"
            );
        }
        let seen: Vec<u32> = waits.into_iter().map(|wait| wait.join().unwrap()).collect();
        assert_eq!(seen[0], seen[1], "{id}: two Waits");
        seen[0]
    });
    fate.check(&id, seen, exit);
    let state = shim.state(&id, "").unwrap();
    assert_eq!(
        (state.status.enum_value(), state.exit_status),
        (Ok(Status::STOPPED), seen),
        "{id}"
    );
    assert_eq!(
        code(&shim.kill(&id, "", 9)),
        Code::NOT_FOUND,
        "{id}: kill of the dead"
    );
    assert_eq!(shim.delete(&id, "").unwrap(), seen, "{id}: Delete");
    living.remove(&id, "");
    assert_eq!(code(&shim.state(&id, "")), Code::NOT_FOUND);
    tasks.remove_bundle(&id);
}

/// The FIFOs of an exec that writes. The FIFO for errors has a reader, because the stock shim waits for a reader of
/// each.
struct Fifos {
    output: PathBuf,
    errors: PathBuf,
    _reader_of_errors: File,
}

impl Fifos {
    fn make(folder: &Path, index: usize) -> Self {
        let output = folder.join(format!("out{index}"));
        let errors = folder.join(format!("err{index}"));
        for path in [&output, &errors] {
            mknodat(CWD, path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        }
        let reader = File::options()
            .read(true)
            .write(true)
            .open(&errors)
            .unwrap();
        Self {
            output,
            errors,
            _reader_of_errors: reader,
        }
    }

    fn streams(&self) -> Streams {
        Streams {
            stdout: text(&self.output),
            stderr: text(&self.errors),
            ..Streams::default()
        }
    }

    /// Reads the output to its end.
    fn read(&self) -> String {
        let mut output = String::new();
        File::open(&self.output)
            .unwrap()
            .read_to_string(&mut output)
            .unwrap();
        output
    }

    fn remove(self) {
        std::fs::remove_file(&self.output).unwrap();
        std::fs::remove_file(&self.errors).unwrap();
    }
}

/// An exec from Exec to Delete. The ids are those of the lanes, so each comes again and again.
fn run_one_exec(tasks: &Tasks, living: &Living, fifos: &Path, index: usize, lane: usize) {
    let (id, fate, exit) = (format!("lane{lane}"), Fate::of(index), (index % 120) as u32);
    let shim = &tasks.shim;
    // Every eighth exec writes.
    let fifos = index.is_multiple_of(8).then(|| Fifos::make(fifos, index));
    let script = match fifos {
        Some(_) => format!("echo {index}; {}", fate.script(exit)),
        None => fate.script(exit),
    };
    let streams = fifos.as_ref().map(Fifos::streams).unwrap_or_default();
    shim.exec("base", &id, &["sh", "-c", &script], &streams)
        .unwrap_or_else(|e| panic!("exec {index}: {e:?}"));
    living.add("base", &id);
    let seen = start_and_wait_for_exec(shim, &id, fate, fifos.as_ref(), index);
    fate.check(&format!("exec {index}"), seen, exit);
    assert_eq!(
        shim.state("base", &id).unwrap().exit_status,
        seen,
        "exec {index}"
    );
    assert_eq!(
        shim.delete("base", &id).unwrap(),
        seen,
        "exec {index}: Delete"
    );
    living.remove("base", &id);
    if let Some(fifos) = fifos {
        fifos.remove();
    }
}

/// Starts the exec `id`, with a Wait and a reader of its output under way, kills it if that is its fate, and gives its
/// exit code.
fn start_and_wait_for_exec(
    shim: &Shim,
    id: &str,
    fate: Fate,
    fifos: Option<&Fifos>,
    index: usize,
) -> u32 {
    std::thread::scope(|scope| {
        let wait = scope.spawn(|| shim.wait("base", id).unwrap());
        let read = fifos.map(|fifos| scope.spawn(|| fifos.read()));
        shim.start("base", id)
            .unwrap_or_else(|e| panic!("start of exec {index}: {e:?}"));
        if fate != Fate::Exits {
            let killed = shim.kill("base", id, 9);
            assert!(
                matches!(code(&killed), Code::OK | Code::NOT_FOUND),
                "exec {index}: {killed:?}"
            );
        }
        let seen = wait.join().unwrap();
        if let Some(output) = read.map(|read| read.join().unwrap()) {
            assert_eq!(output, format!("{index}\n"));
        }
        seen
    })
}

/// Checks the events of a container: in order, each once, with one exit code.
fn check_container_events(events: &[Event], index: usize) {
    let id = format!("c{index}");
    let topics: Vec<&str> = events.iter().map(|event| event.topic.as_str()).collect();
    assert_eq!(
        topics,
        [
            "/tasks/create",
            "/tasks/start",
            "/tasks/exit",
            "/tasks/delete"
        ],
        "{id}"
    );
    // JSON leaves a zero out.
    let code = |event: &Event| event.body["exit_status"].as_u64().unwrap_or(0);
    assert_eq!(code(&events[2]), code(&events[3]), "{id}: exit and delete");
    let seen = u32::try_from(code(&events[2])).unwrap();
    Fate::of(index).check(&id, seen, (index % 120) as u32);
}

/// Checks the events of all execs: in each lane, one exec after the other.
fn check_exec_events(events: &Events, execs: usize) {
    let seen = eventually(Duration::from_secs(60), || {
        let seen = events.of("base");
        ok_if(seen.len() >= 2 + 3 * execs, || {
            format!("{} events of {}", seen.len(), 2 + 3 * execs)
        })
        .map(|()| seen)
    });
    assert_eq!(seen.len(), 2 + 3 * execs);
    for lane in 0..EXEC_LANES {
        let steps =
            ["exec-added", "exec-started", "exit"].map(|topic| format!("{topic}:lane{lane}"));
        let of_lane: Vec<&String> = seen.iter().filter(|seen| steps.contains(seen)).collect();
        for (at, step) in of_lane.iter().enumerate() {
            assert_eq!(**step, steps[at % 3], "lane {lane}, event {at}");
        }
    }
}

fn report(what: &str, count: usize, time: Duration, mut took: Vec<Duration>) {
    took.sort_unstable();
    let at = |part: f64| {
        took.get((took.len() as f64 * part) as usize)
            .or(took.last())
            .copied()
            .unwrap_or_default()
    };
    eprintln!(
        "{what}: {count} in {:.1} s; State while they ran: {} calls, median {:?}, 99 % {:?}, 99.9 % {:?}, slowest {:?}",
        time.as_secs_f64(),
        took.len(),
        at(0.5),
        at(0.99),
        at(0.999),
        at(1.0),
    );
}

on_every_containerd! {
    fn a_storm_of_containers_and_execs(version) {
        let daemon = Daemon::start(version);
        let events = daemon.events();
        let group = Group::start(&daemon, "storm");
        group.run("base", "exec sleep 1000000");
        let (containers, execs) = (number_from_environment("STORM_CONTAINERS", 100), number_from_environment("STORM_EXECS", 200));
        let living = Living::default();
        let fifos = daemon.directory().join("fifo");
        living.add("base", "");
        let shim = daemon.shim().pid;
        let tasks: &Tasks = &group;

        let run = |containers: std::ops::Range<usize>, execs: std::ops::Range<usize>| {
            let (count, begin) = (containers.len(), Instant::now());
            let took = run_on_lanes(tasks, &living, containers, CONTAINER_LANES, |index, _| run_one_container(tasks, &living, index));
            report("containers", count, begin.elapsed(), took);
            let (count, begin) = (execs.len(), Instant::now());
            let took = run_on_lanes(tasks, &living, execs, EXEC_LANES, |index, lane| run_one_exec(tasks, &living, &fifos, index, lane));
            report("execs", count, begin.elapsed(), took);
        };
        // The first part makes everything that is made once. All parts have one size: the queue of events grows while
        // containerd is behind, and the allocator keeps the memory of the longest queue.
        let part = ((containers / 10).max(16), (execs / 10).max(32));
        let idle = open_descriptors(shim);
        let mut done = (0, 0);
        let mut memory = Vec::new();
        while done != (containers, execs) {
            let next = ((done.0 + part.0).min(containers), (done.1 + part.1).min(execs));
            run(done.0..next.0, done.1..next.1);
            done = next;
            eventually(Duration::from_secs(60), || {
                let (seen, all) = (events.count(), 2 + 4 * done.0 + 3 * done.1);
                ok_if(seen >= all, || format!("{seen} events of {all}"))
            });
            eventually(Duration::from_secs(20), || {
                let now = open_descriptors(shim);
                ok_if(now <= idle, || format!("{now} fds, {idle} before"))
            });
            memory.push(anonymous_kb(shim));
        }
        eprintln!("shim: {idle} fds before and after each part; memory after each, in kB: {memory:?}");

        let zombies: Vec<_> = children(shim).into_iter().filter(|child| child.state == 'Z').collect();
        assert!(zombies.is_empty(), "{zombies:?}");
        let (first, last) = (memory[0], memory[memory.len() - 1]);
        assert!(last <= first + MEMORY_SLACK, "{first} kB, then {last} kB");
        check_exec_events(&events, execs);
        let of_containers = eventually(Duration::from_secs(60), || {
            let seen = events.by_container();
            let deleted = |index| seen.get(&format!("c{index}")).is_some_and(|events: &Vec<Event>| events.len() >= 4);
            ok_if((0..containers).all(deleted), || "events are missing".to_owned()).map(|()| seen)
        });
        for index in 0..containers {
            check_container_events(&of_containers[&format!("c{index}")], index);
        }
        group.remove("base");
        group.end();
        daemon.end();
    }
}
