//! A shim, and the sequences that it serves one after the other.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{
    CreateTaskRequest, CreateTaskResponse, Empty, KillRequest, ResizePtyRequest, Status,
    UpdateTaskRequest,
};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::ttrpc::Code;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::json;
use shim_tests::calls::{Refusal, Shim, Streams};
use shim_tests::direct::{Group, Tasks};
use shim_tests::proc::Process as OsProcess;
use shim_tests::slot::{Names, text};
use shim_tests::{Daemon, leaks, proc};

use crate::engine::{Answer, after, closure};
use crate::events::{self, Tally};
use crate::receiver::Receiver;
use crate::tasks::{CONTAINERS, Call, Container, Process, Sequence, Step};

/// How long a call may take, and how long it may take until nothing is left.
pub(crate) const BOUND: Duration = Duration::from_secs(10);
/// How many sequences one shim serves.
const PER_SHIM: usize = 25;

/// Serves sequences, each with ids of its own, by a shim that is new now and then.
pub(crate) struct Lane<'a> {
    daemon: &'a Daemon,
    receiver: Receiver,
    socket: PathBuf,
    shim: Option<Served<'a>>,
    number: usize,
    /// How often each call had each answer: what the sequences have really tried.
    pub(crate) answers: BTreeMap<String, usize>,
}

struct Served<'a> {
    group: Group<'a>,
    process: OsProcess,
    sequences: usize,
    /// The number of open descriptors before the first sequence.
    descriptors: usize,
}

impl<'a> Lane<'a> {
    pub(crate) fn new(daemon: &'a Daemon) -> Self {
        let socket = daemon.directory().join("e.sock");
        Self {
            daemon,
            receiver: Receiver::listen(socket.clone()),
            socket,
            shim: None,
            number: 0,
            answers: BTreeMap::new(),
        }
    }

    fn served(&mut self) -> Served<'a> {
        let old = self.shim.take();
        if let Some(old) = old {
            if old.sequences < PER_SHIM {
                return old;
            }
            old.group.end();
        }
        self.number += 1;
        let address = ("TTRPC_ADDRESS", text(&self.socket));
        let id = format!("shim{}", self.number);
        let group = Group::start_with(self.daemon, &id, vec![address]);
        let process = self.daemon.shim();
        // The first event opens the connection, and workers begin: not counted as leaks.
        Served {
            group,
            process,
            sequences: 0,
            descriptors: 0,
        }
    }

    /// Runs a sequence to its end, also after a failure.
    pub(crate) fn run(&mut self, sequence: &Sequence) -> Result<(), String> {
        self.receiver.back();
        let mut served = self.served();
        self.number += 1;
        let ids = [0, 1].map(|container| format!("m{}c{container}", self.number));
        let mut descriptors = served.descriptors;
        let run = Run::new(
            self.daemon.names.clone(),
            &served,
            &self.receiver,
            sequence,
            ids,
        );
        let result = run.to_the_end(sequence, &mut descriptors);
        for answer in run.answers.into_inner().unwrap() {
            *self.answers.entry(answer).or_default() += 1;
        }
        served.descriptors = descriptors;
        served.sequences += 1;
        if result.is_ok() {
            self.shim = Some(served);
        } else {
            Self::give_up(&served);
        }
        result
    }

    /// Ends a shim that has failed.
    fn give_up(served: &Served<'_>) {
        if served.process.alive() {
            proc::kill(served.process.pid, Signal::KILL);
        }
        served.group.run_delete();
    }

    pub(crate) fn end(mut self) {
        self.receiver.back();
        if let Some(served) = self.shim.take() {
            served.group.end();
        }
    }
}

/// A Wait that goes on.
struct Waiting<'scope> {
    container: usize,
    process: Process,
    /// There may be no such process.
    may_find_nothing: bool,
    answer: std::thread::ScopedJoinHandle<'scope, Result<u32, Refusal>>,
}

/// One sequence on one shim.
struct Run<'a> {
    names: Names,
    group: &'a Tasks,
    receiver: &'a Receiver,
    shim: Shim,
    process: OsProcess,
    ids: [String; CONTAINERS],
    bundles: [PathBuf; CONTAINERS],
    sequence: &'a Sequence,
    /// The processes of the containers, for kills from outside.
    pidfds: Mutex<HashMap<(usize, Process), OwnedFd>>,
    tallies: Mutex<[Tally; CONTAINERS]>,
    /// Each call with its answer.
    answers: Mutex<Vec<String>>,
    /// Containers that somebody has sent a signal to.
    disturbed: Mutex<BTreeSet<usize>>,
}

/// A call and its answer, without their details.
fn shown(call: Call, answer: &Answer) -> String {
    let call = format!("{call:?}");
    let call = call.split('(').next().unwrap_or_default();
    match answer {
        Answer::Done => format!("{call} OK"),
        Answer::Is(status) => format!("{call} {status:?}"),
        Answer::Refused(code, _) => format!("{call} {code:?}"),
        Answer::Silent(_) => format!("{call} silent"),
        Answer::Unasked => call.to_owned(),
    }
}

fn exec_id(process: Process) -> String {
    match process {
        Process::Init => String::new(),
        Process::Exec(at) => format!("x{at}"),
    }
}

pub(crate) fn answered<T>(answer: Result<T, Refusal>) -> Answer {
    match answer {
        Ok(_) => Answer::Done,
        Err(Refusal {
            code: Some(Code::DEADLINE_EXCEEDED) | None,
            message,
        }) => Answer::Silent(message),
        Err(Refusal {
            code: Some(code),
            message,
        }) => Answer::Refused(code, message),
    }
}

impl<'a> Run<'a> {
    fn new(
        names: Names,
        served: &'a Served<'_>,
        receiver: &'a Receiver,
        sequence: &'a Sequence,
        ids: [String; CONTAINERS],
    ) -> Self {
        let group: &Tasks = &served.group;
        let bundles = [0, 1].map(|container| {
            group.bundle(&ids[container], "", |spec| {
                spec["process"]["args"] = json!(sequence.programs[container].arguments());
                if !sequence.own_processes[container] {
                    let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
                    namespaces.retain(|namespace| namespace["type"] != "pid");
                }
            })
        });
        Self {
            names,
            group,
            receiver,
            shim: group.connect().with_patience(BOUND),
            process: served.process.clone(),
            ids,
            bundles,
            sequence,
            pidfds: Mutex::default(),
            tallies: Mutex::default(),
            answers: Mutex::default(),
            disturbed: Mutex::default(),
        }
    }

    fn to_the_end(&self, sequence: &Sequence, descriptors: &mut usize) -> Result<(), String> {
        let mut states = [0, 1].map(|at| closure([Container::absent(self.sequence.programs[at])]));
        let result = std::thread::scope(|scope| {
            let mut waiting = Vec::new();
            let mut result = Ok(());
            for (at, step) in sequence.steps.iter().enumerate() {
                result = self
                    .step(scope, step, &mut states, &mut waiting)
                    .map_err(|why| format!("step {at}: {why}"));
                if result.is_err() {
                    break;
                }
            }
            let cleared = self.clear();
            let waits = self.waits_are_over(waiting);
            result.and(cleared).and(waits)
        });
        result
            .and_then(|()| self.events_are_right())
            .and_then(|()| self.nothing_is_left(descriptors))
            .map_err(|why| format!("{why}\n{}", self.shims_log()))
    }

    /// The shim's log is on a FIFO that the harness holds: only its state is told.
    fn shims_log(&self) -> String {
        let state = if self.process.alive() {
            "lives"
        } else {
            "is dead"
        };
        format!("the shim {} {state}", self.process.pid)
    }

    fn step<'scope, 'env>(
        &'env self,
        scope: &'scope std::thread::Scope<'scope, 'env>,
        step: &Step,
        states: &mut [BTreeSet<Container>; CONTAINERS],
        waiting: &mut Vec<Waiting<'scope>>,
    ) -> Result<(), String> {
        let calls = match step {
            Step::EventsAway => {
                self.receiver.away();
                return Ok(());
            }
            Step::EventsBack => {
                self.receiver.back();
                return Ok(());
            }
            Step::Calls(calls) => calls,
        };
        let made: Vec<_> = calls
            .iter()
            .map(|(container, delay, call)| {
                let (container, delay, call) = (*container, *delay, *call);
                if let Call::Wait(process) = call {
                    let answer = scope.spawn(move || {
                        let (id, exec) = (&self.ids[container], exec_id(process));
                        self.shim.wait_for(id, &exec, BOUND * 6)
                    });
                    waiting.push(Waiting {
                        container,
                        process,
                        // Calls at the same time may remove the process.
                        may_find_nothing: calls.len() > 1
                            || states[container]
                                .iter()
                                .any(|state| state.wait_may_find_nothing(process)),
                        answer,
                    });
                    return None;
                }
                Some(scope.spawn(move || {
                    std::thread::sleep(Duration::from_millis(delay.into()));
                    let answer = self.make(container, call);
                    self.answers.lock().unwrap().push(shown(call, &answer));
                    answer
                }))
            })
            .collect();
        let answers: Vec<Answer> = made
            .into_iter()
            .map(|made| made.map_or(Answer::Unasked, |made| made.join().unwrap()))
            .collect();
        for (container, states) in states.iter_mut().enumerate() {
            // A runc is killed whichever container it works for.
            let concerned =
                |at: &usize| calls[*at].0 == container || calls[*at].2 == Call::KillRunc;
            let here: Vec<usize> = (0..calls.len()).filter(concerned).collect();
            let of_here: Vec<Call> = here.iter().map(|at| calls[*at].2).collect();
            let answers: Vec<Answer> = here.iter().map(|at| answers[*at].clone()).collect();
            *states = after(states, &of_here, &answers)
                .map_err(|why| format!("container {container}: {why}"))?;
        }
        Ok(())
    }

    fn make(&self, container: usize, call: Call) -> Answer {
        let id = &self.ids[container];
        let tally = |count: fn(&mut Tally)| count(&mut self.tallies.lock().unwrap()[container]);
        if let Call::Kill(..)
        | Call::KillAll(_)
        | Call::Delete(_)
        | Call::KillOutside(_)
        | Call::KillRunc = call
        {
            self.disturbed.lock().unwrap().insert(container);
        }
        let counted = |answer: Answer, count: fn(&mut Tally)| {
            if answer == Answer::Done {
                tally(count);
            }
            answer
        };
        match call {
            Call::Create => {
                let created = self.create(container);
                if let Ok(pid) = &created {
                    self.remember(container, Process::Init, *pid);
                }
                counted(answered(created), |tally| tally.created += 1)
            }
            Call::Start(process) => {
                let started = self.shim.start(id, &exec_id(process));
                if let (Ok(pid), Process::Exec(_)) = (&started, process) {
                    self.remember(container, process, *pid);
                }
                match process {
                    Process::Init => counted(answered(started), |tally| tally.started += 1),
                    Process::Exec(_) => {
                        counted(answered(started), |tally| tally.execs_started += 1)
                    }
                }
            }
            Call::Exec(at, program) => {
                let arguments = program.arguments();
                let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
                let exec = exec_id(Process::Exec(at));
                let added = self.shim.exec(id, &exec, &arguments, &Streams::default());
                counted(answered(added), |tally| tally.added += 1)
            }
            Call::Kill(process, signal) => answered(self.shim.kill(id, &exec_id(process), signal)),
            Call::KillAll(signal) => {
                let request = KillRequest {
                    id: id.clone(),
                    signal,
                    all: true,
                    ..KillRequest::default()
                };
                answered(self.shim.call::<Empty>("Kill", &request))
            }
            Call::Delete(process) => {
                let deleted = answered(self.shim.delete(id, &exec_id(process)));
                match process {
                    Process::Init => counted(deleted, |tally| tally.deleted += 1),
                    Process::Exec(_) => deleted,
                }
            }
            Call::Pause => counted(answered(self.shim.pause(id)), |tally| tally.paused += 1),
            Call::Resume => counted(answered(self.shim.resume(id)), |tally| tally.resumed += 1),
            Call::State(process) => self.state(container, process),
            Call::Pids => answered(self.shim.pids(id)),
            Call::Stats => answered(self.shim.stats(id)),
            Call::Update => self.update(id, br#"{"cpu": {"shares": 512}}"#),
            Call::UpdateGarbage => self.update(id, b"[1]"),
            Call::Resize(process) => {
                let request = ResizePtyRequest {
                    id: id.clone(),
                    exec_id: exec_id(process),
                    width: 80,
                    height: 25,
                    ..ResizePtyRequest::default()
                };
                answered(self.shim.call::<Empty>("ResizePty", &request))
            }
            Call::CloseIo(process) => answered(self.shim.close_stdin(id, &exec_id(process))),
            Call::Connect => answered(self.shim.pids_of(id)),
            Call::KillOutside(process) => {
                if let Some(pidfd) = self.pidfds.lock().unwrap().get(&(container, process)) {
                    // The process may have ended.
                    let _ = pidfd_send_signal(pidfd, Signal::KILL);
                }
                Answer::Unasked
            }
            Call::KillRunc => {
                self.kill_runc();
                Answer::Unasked
            }
            Call::Wait(_) => Answer::Unasked,
        }
    }

    fn create(&self, container: usize) -> Result<u32, Refusal> {
        let request = CreateTaskRequest {
            id: self.ids[container].clone(),
            bundle: text(&self.bundles[container]),
            ..CreateTaskRequest::default()
        };
        let created = self.shim.call::<CreateTaskResponse>("Create", &request);
        created.map(|created| created.pid)
    }

    fn state(&self, container: usize, process: Process) -> Answer {
        match self.shim.state(&self.ids[container], &exec_id(process)) {
            Ok(state) => Answer::Is(state.status.enum_value_or_default()),
            refused => answered(refused),
        }
    }

    fn update(&self, id: &str, resources: &[u8]) -> Answer {
        let request = UpdateTaskRequest {
            id: id.to_owned(),
            resources: Some(Any {
                value: resources.to_vec(),
                ..Any::default()
            })
            .into(),
            ..UpdateTaskRequest::default()
        };
        answered(self.shim.call::<Empty>("Update", &request))
    }

    /// Remembers a process, if it is really the container's: its pid may be somebody else's by now.
    fn remember(&self, container: usize, process: Process, pid: u32) {
        let known = Pid::from_raw(pid.cast_signed())
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        let ours = format!("{}/{}", self.names.cgroup_parent(), self.ids[container]);
        let cgroups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
        if let Some(pidfd) = known.filter(|_| cgroups.contains(&ours)) {
            self.pidfds
                .lock()
                .unwrap()
                .insert((container, process), pidfd);
        }
    }

    /// Kills a runc that the shim runs now or within 50 ms.
    fn kill_runc(&self) {
        let shim = self.process.pid;
        let end = Instant::now() + Duration::from_millis(50);
        while Instant::now() < end {
            let children = fs::read_to_string(format!("/proc/{shim}/task/{shim}/children"));
            for pid in children.unwrap_or_default().split_whitespace() {
                let Some(pid) = pid.parse().ok().and_then(Pid::from_raw) else {
                    continue;
                };
                let Ok(pidfd) = pidfd_open(pid, PidfdFlags::empty()) else {
                    continue;
                };
                let process = OsProcess::of(pid.as_raw_nonzero().get());
                if process.is_some_and(|found| found.parent == shim && found.name == "runc") {
                    let _ = pidfd_send_signal(pidfd, Signal::KILL);
                    return;
                }
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Ends and deletes what the sequence has left.
    fn clear(&self) -> Result<(), String> {
        self.receiver.back();
        for container in 0..CONTAINERS {
            self.clear_one(container)
                .map_err(|why| format!("clear container {container}: {why}"))?;
        }
        Ok(())
    }

    fn clear_one(&self, container: usize) -> Result<(), String> {
        let id = &self.ids[container];
        let end = Instant::now() + BOUND;
        let mut killed = false;
        loop {
            match self.state(container, Process::Init) {
                Answer::Refused(Code::NOT_FOUND, _) => return Ok(()),
                Answer::Is(Status::STOPPED) => break,
                Answer::Is(_) if Instant::now() < end => {
                    // A program that ends by itself may do so.
                    if !killed && self.make(container, Call::Kill(Process::Init, 9)) == Answer::Done
                    {
                        killed = true;
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                other => return Err(format!("{other:?} after SIGKILL")),
            }
        }
        match self.make(container, Call::Delete(Process::Init)) {
            Answer::Done | Answer::Refused(Code::NOT_FOUND, _) => Ok(()),
            other => Err(format!("Delete of {id}: {other:?}")),
        }
    }

    /// Every Wait has its answer now, and the answer is that of the exit event.
    fn waits_are_over(&self, waiting: Vec<Waiting<'_>>) -> Result<(), String> {
        let end = Instant::now() + BOUND;
        let mut result = Ok(());
        for wait in waiting {
            let Waiting {
                container, process, ..
            } = wait;
            while !wait.answer.is_finished() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(2));
            }
            if !wait.answer.is_finished() {
                result = result.and(Err(format!("a Wait for {container} {process:?} goes on")));
            }
            match answered(wait.answer.join().unwrap()) {
                Answer::Done => {}
                Answer::Refused(Code::NOT_FOUND, _) if wait.may_find_nothing => {}
                other => {
                    result =
                        result.and(Err(format!("Wait for {container} {process:?}: {other:?}")));
                }
            }
        }
        result
    }

    fn events_are_right(&self) -> Result<(), String> {
        let end = Instant::now() + BOUND;
        for container in 0..CONTAINERS {
            let id = &self.ids[container];
            let tally = self.tallies.lock().unwrap()[container].clone();
            let disturbed = self.disturbed.lock().unwrap().contains(&container);
            let program = Some(self.sequence.programs[container]).filter(|_| !disturbed);
            loop {
                match events::check(id, &self.receiver.of(id), &tally, program) {
                    Ok(()) => break,
                    Err(why) if Instant::now() >= end => return Err(why),
                    // Events may be on their way.
                    Err(_) => std::thread::sleep(Duration::from_millis(5)),
                }
            }
        }
        Ok(())
    }

    fn nothing_is_left(&self, descriptors: &mut usize) -> Result<(), String> {
        let end = Instant::now() + BOUND;
        loop {
            let left = self.left(*descriptors);
            if left.is_empty() {
                break;
            }
            if Instant::now() >= end {
                return Err(format!("left behind: {left:?}"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        if *descriptors == 0 {
            *descriptors = self.open_descriptors();
        }
        for id in &self.ids {
            self.group.remove_bundle(id);
        }
        Ok(())
    }

    fn open_descriptors(&self) -> usize {
        let open = fs::read_dir(format!("/proc/{}/fd", self.process.pid));
        open.map_or(0, Iterator::count)
    }

    fn left(&self, descriptors: usize) -> Vec<String> {
        let mut left = Vec::new();
        if !self.process.alive() {
            left.push("a dead shim".to_owned());
        }
        let children = proc::children(self.process.pid);
        left.extend(
            children
                .iter()
                .map(|child| format!("child {}", child.describe())),
        );
        // One for the connection to the receiver of events, which may have been away.
        let open = self.open_descriptors();
        if descriptors != 0 && open > descriptors + 1 {
            left.push(format!(
                "{open} descriptors, {descriptors} after the first sequence"
            ));
        }
        let mounts = leaks::mounts(&self.names);
        left.extend(
            mounts
                .iter()
                .map(|mount| format!("mount {}", mount.display())),
        );
        let cgroups = leaks::cgroups(&self.names);
        left.extend(
            cgroups
                .iter()
                .map(|cgroup| format!("cgroup {}", cgroup.display())),
        );
        for (id, bundle) in self.ids.iter().zip(&self.bundles) {
            let state = self.group.runc_states().join(id);
            if state.exists() {
                left.push(state.display().to_string());
            }
            let files = fs::read_dir(bundle).into_iter().flatten().flatten();
            // Plain files go with the bundle, which containerd removes.
            let special = files.filter(|file| file.file_type().is_ok_and(|kind| !kind.is_file()));
            left.extend(special.map(|file| file.path().display().to_string()));
        }
        left
    }
}
