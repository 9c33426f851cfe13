//! The model of a sandbox of the Sandbox API, also as the Task service sees it, and the sequences of calls to one.

use std::time::{Duration, Instant};

use containerd_shim_protos::api::Status;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, PingRequest, PingResponse, PlatformRequest,
    PlatformResponse, SandboxMetricsRequest, SandboxMetricsResponse, SandboxStatusRequest,
    SandboxStatusResponse, ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest,
    StartSandboxResponse, StopSandboxRequest, StopSandboxResponse, WaitSandboxRequest,
    WaitSandboxResponse,
};
use containerd_shim_protos::ttrpc::Code;
use proptest::prelude::*;
use prost::Message as _;
use serde::{Deserialize, Serialize};
use shim_tests::calls::Streams;
use shim_tests::driver::{CONFIG, Driver};
use shim_tests::proc::Process;
use shim_tests::slot::text;
use shim_tests::{Daemon, PodSpec, leaks};

use crate::engine::{Allowed, Answer, Model, after, closure};
use crate::lane::{BOUND, answered};

/// A call to the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Call {
    Create,
    Start,
    Stop,
    Status,
    Wait,
    Ping,
    Platform,
    Metrics,
    TaskStart,
    TaskState,
    TaskKill(u32),
    TaskDelete,
    TaskPids,
    TaskStats,
    TaskPause,
    TaskExec,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Life {
    Absent,
    Created,
    Running,
    Ended,
}

/// A state of the sandbox.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Sandbox {
    life: Life,
    dying: bool,
}

impl Sandbox {
    fn with(&self, life: Life) -> Self {
        let dying = self.dying && life != Life::Absent;
        Self { life, dying }
    }

    fn refused(&self, code: Code) -> Vec<(Allowed, Self)> {
        vec![(Allowed::Code(code), self.clone())]
    }

    fn same(&self, allowed: Allowed) -> Vec<(Allowed, Self)> {
        vec![(allowed, self.clone())]
    }
}

impl Model<Call> for Sandbox {
    fn outcomes(&self, calls: &[Call], at: usize) -> Vec<(Allowed, Self)> {
        let mut outcomes = self.outcomes_of(calls[at]);
        // A Delete of a created sandbox ends the sandbox first.
        let mut others = calls.iter().enumerate().filter(|(other, _)| *other != at);
        if self.life == Life::Created && others.any(|(_, call)| *call == Call::TaskDelete) {
            outcomes.extend(self.with(Life::Ended).outcomes_of(calls[at]));
        }
        outcomes
    }

    fn by_itself(&self) -> Vec<Self> {
        match self.life {
            Life::Created | Life::Running if self.dying => vec![self.with(Life::Ended)],
            _ => Vec::new(),
        }
    }
}

impl Sandbox {
    fn outcomes_of(&self, call: Call) -> Vec<(Allowed, Self)> {
        use Allowed::{Done, Is};
        match (call, self.life) {
            (Call::Wait, _) => self.same(Done),
            (Call::Create, Life::Absent) => vec![(Done, self.with(Life::Created))],
            (Call::Create, _) => self.refused(Code::ALREADY_EXISTS),
            (_, Life::Absent) => self.refused(Code::NOT_FOUND),
            (Call::Start | Call::TaskStart, Life::Created) => {
                vec![(Done, self.with(Life::Running))]
            }
            (Call::Start | Call::TaskStart, _) => self.refused(Code::FAILED_PRECONDITION),
            (Call::Stop, _) => vec![(Done, self.with(Life::Ended))],
            (Call::Status, Life::Running) => self.same(Is(Status::RUNNING)),
            (Call::Status, _) => self.same(Is(Status::STOPPED)),
            (Call::Ping | Call::Platform | Call::TaskPids, _) => self.same(Done),
            // The cgroup goes with the end of the sandbox.
            (Call::Metrics | Call::TaskStats, _) => {
                let mut outcomes = self.same(Done);
                if self.life == Life::Ended || self.dying {
                    outcomes.extend(self.refused(Code::NOT_FOUND));
                }
                outcomes
            }
            (Call::TaskState, Life::Created) => self.same(Is(Status::CREATED)),
            (Call::TaskState, Life::Running) => self.same(Is(Status::RUNNING)),
            (Call::TaskState, Life::Ended) => self.same(Is(Status::STOPPED)),
            (Call::TaskKill(_), Life::Ended) => self.refused(Code::NOT_FOUND),
            (Call::TaskKill(9 | 15), life) => {
                let dying = Self { life, dying: true };
                vec![(Done, dying)]
            }
            (Call::TaskKill(_), _) => self.same(Done),
            (Call::TaskDelete, Life::Running) => self.refused(Code::FAILED_PRECONDITION),
            (Call::TaskDelete, _) => vec![(Done, self.with(Life::Absent))],
            (Call::TaskPause | Call::TaskExec, _) => self.refused(Code::FAILED_PRECONDITION),
        }
    }
}

/// A sandbox from `start` to ShutdownSandbox. Calls of one step are made at once, each after so many milliseconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Sequence {
    nodes_network: bool,
    steps: Vec<Vec<(u8, Call)>>,
    /// Calls at the time of the ShutdownSandbox at the end.
    last: Vec<(u8, Call)>,
}

fn call() -> impl Strategy<Value = Call> {
    prop_oneof![
        6 => Just(Call::Create),
        6 => Just(Call::Start),
        3 => Just(Call::Stop),
        3 => Just(Call::Status),
        3 => Just(Call::Wait),
        1 => Just(Call::Ping),
        1 => Just(Call::Platform),
        2 => Just(Call::Metrics),
        2 => Just(Call::TaskStart),
        2 => Just(Call::TaskState),
        3 => prop_oneof![Just(9_u32), Just(15), Just(0), Just(65)].prop_map(Call::TaskKill),
        3 => Just(Call::TaskDelete),
        1 => Just(Call::TaskPids),
        1 => Just(Call::TaskStats),
        1 => Just(Call::TaskPause),
        1 => Just(Call::TaskExec),
    ]
}

/// Any sequence.
pub(crate) fn sequence() -> impl Strategy<Value = Sequence> {
    let calls = |range| proptest::collection::vec((0..10_u8, call()), range);
    let step = prop_oneof![3 => calls(1..=1), 2 => calls(2..=3)];
    let begins = proptest::bool::weighted(0.7);
    let steps = proptest::collection::vec(step, 0..12);
    (any::<bool>(), begins, steps, calls(0..=2)).prop_map(
        |(nodes_network, begins, mut steps, last)| {
            if begins {
                steps.insert(0, vec![(0, Call::Create)]);
            }
            Sequence {
                nodes_network,
                steps,
                last,
            }
        },
    )
}

/// Runs a sequence on a shim of its own, to the end, also after a failure.
pub(crate) fn run(daemon: &Daemon, id: &str, sequence: &Sequence) -> Result<(), String> {
    let driver = Driver::start(daemon, id).with_patience(BOUND);
    let mut config = PodSpec::new(id);
    if sequence.nodes_network {
        config = config.host_network();
    }
    let mut config = config.config;
    config.linux.as_mut().unwrap().cgroup_parent = daemon.names.cgroup_parent();
    let shim = Process::of(driver.shim()).unwrap();
    let caller = Caller {
        id,
        sandbox: &driver.sandbox,
        task: &driver.task,
        bundle: text(&driver.bundle.path),
        options: Any {
            type_url: CONFIG.to_owned(),
            value: config.encode_to_vec(),
            ..Any::default()
        },
    };
    let result = steps(&caller, sequence);
    if sequence.last.iter().any(|(_, call)| *call == Call::Create) {
        // A sandbox that was made at the time of the Shutdown keeps the shim.
        caller.shut_down();
    }
    let ended = gone_within(BOUND, &shim);
    let deleted = driver.bundle.delete();
    drop(driver);
    let end = Instant::now() + BOUND;
    let left = loop {
        let mounts = leaks::mounts(&daemon.names).into_iter();
        let cgroups = leaks::cgroups(&daemon.names).into_iter();
        let left: Vec<_> = mounts.chain(cgroups).collect();
        if left.is_empty() || Instant::now() >= end {
            break left;
        }
        std::thread::sleep(Duration::from_millis(10));
    };
    result?;
    ended?;
    if !deleted.status.success() || !left.is_empty() {
        return Err(format!("delete: {}, left: {left:?}", deleted.text()));
    }
    Ok(())
}

fn gone_within(bound: Duration, shim: &Process) -> Result<(), String> {
    let end = Instant::now() + bound;
    while shim.alive() {
        if Instant::now() >= end {
            return Err(format!("the shim lives on: {}", shim.describe()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

fn steps(caller: &Caller<'_>, sequence: &Sequence) -> Result<(), String> {
    let nothing = Sandbox {
        life: Life::Absent,
        dying: false,
    };
    let mut states = closure::<Call, _>([nothing]);
    std::thread::scope(|scope| {
        let mut waits = Vec::new();
        let mut result = Ok(());
        for (at, step) in sequence.steps.iter().enumerate() {
            let calls: Vec<Call> = step.iter().map(|(_, call)| *call).collect();
            let may_be_absent =
                calls.len() > 1 || states.iter().any(|state| state.life == Life::Absent);
            let made: Vec<_> = step
                .iter()
                .map(|&(delay, call)| {
                    if call == Call::Wait {
                        waits.push((may_be_absent, scope.spawn(|| caller.make(Call::Wait))));
                        return None;
                    }
                    Some(scope.spawn(move || {
                        std::thread::sleep(Duration::from_millis(delay.into()));
                        caller.make(call)
                    }))
                })
                .collect();
            let join = |made: std::thread::ScopedJoinHandle<'_, Answer>| made.join().unwrap();
            let answers: Vec<Answer> = made
                .into_iter()
                .map(|made| made.map_or(Answer::Unasked, join))
                .collect();
            match after(&states, &calls, &answers) {
                Ok(next) => states = next,
                Err(why) => {
                    result = Err(format!("step {at}: {why}"));
                    break;
                }
            }
        }
        for &(delay, call) in &sequence.last {
            // Whatever the answer is: the shim ends meanwhile.
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(delay.into()));
                caller.make(call)
            });
        }
        let shut = caller.shut_down();
        for (may_be_absent, wait) in waits {
            match wait.join().unwrap() {
                Answer::Done => {}
                Answer::Refused(Code::NOT_FOUND, _) if may_be_absent => {}
                other => result = result.and(Err(format!("a Wait: {other:?}"))),
            }
        }
        match shut {
            Answer::Done => result,
            other => result.and(Err(format!("ShutdownSandbox: {other:?}"))),
        }
    })
}

/// What the calls need; threads share it.
struct Caller<'a> {
    id: &'a str,
    sandbox: &'a shim_tests::calls::Shim,
    task: &'a shim_tests::calls::Shim,
    bundle: String,
    options: Any,
}

/// A request with only the sandbox's id.
macro_rules! of_sandbox {
    ($self:expr, $method:literal, $request:ident, $response:ident) => {{
        let request = $request {
            sandbox_id: $self.id.to_owned(),
            ..$request::default()
        };
        $self.sandbox.call::<$response>($method, &request)
    }};
}

impl Caller<'_> {
    fn make(&self, call: Call) -> Answer {
        match call {
            Call::Create => {
                let request = CreateSandboxRequest {
                    sandbox_id: self.id.to_owned(),
                    bundle_path: self.bundle.clone(),
                    options: Some(self.options.clone()).into(),
                    ..CreateSandboxRequest::default()
                };
                answered(
                    self.sandbox
                        .call::<CreateSandboxResponse>("CreateSandbox", &request),
                )
            }
            Call::Start => answered(of_sandbox!(
                self,
                "StartSandbox",
                StartSandboxRequest,
                StartSandboxResponse
            )),
            Call::Stop => answered(of_sandbox!(
                self,
                "StopSandbox",
                StopSandboxRequest,
                StopSandboxResponse
            )),
            Call::Status => {
                let status = of_sandbox!(
                    self,
                    "SandboxStatus",
                    SandboxStatusRequest,
                    SandboxStatusResponse
                );
                match status {
                    Ok(status) if status.state == "SANDBOX_READY" => Answer::Is(Status::RUNNING),
                    Ok(_) => Answer::Is(Status::STOPPED),
                    refused => answered(refused),
                }
            }
            Call::Wait => answered(of_sandbox!(
                self,
                "WaitSandbox",
                WaitSandboxRequest,
                WaitSandboxResponse
            )),
            Call::Ping => answered(of_sandbox!(self, "PingSandbox", PingRequest, PingResponse)),
            Call::Platform => answered(of_sandbox!(
                self,
                "Platform",
                PlatformRequest,
                PlatformResponse
            )),
            Call::Metrics => answered(of_sandbox!(
                self,
                "SandboxMetrics",
                SandboxMetricsRequest,
                SandboxMetricsResponse
            )),
            Call::TaskStart => answered(self.task.start(self.id, "")),
            Call::TaskState => match self.task.state(self.id, "") {
                Ok(state) => Answer::Is(state.status.enum_value_or_default()),
                refused => answered(refused),
            },
            Call::TaskKill(signal) => answered(self.task.kill(self.id, "", signal)),
            Call::TaskDelete => answered(self.task.delete(self.id, "")),
            Call::TaskPids => answered(self.task.pids(self.id)),
            Call::TaskStats => answered(self.task.stats(self.id)),
            Call::TaskPause => answered(self.task.pause(self.id)),
            Call::TaskExec => {
                answered(self.task.exec(self.id, "x", &["true"], &Streams::default()))
            }
        }
    }

    fn shut_down(&self) -> Answer {
        answered(of_sandbox!(
            self,
            "ShutdownSandbox",
            ShutdownSandboxRequest,
            ShutdownSandboxResponse
        ))
    }
}
