//! The model of containers and their execs, as the Task service promises them: see `shim/src/container/state.rs` for the
//! shim's own table.

use containerd_shim_protos::api::Status;
use containerd_shim_protos::ttrpc::Code;
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

use crate::engine::{Allowed, Model};

/// How many execs a container may have.
pub(crate) const EXECS: usize = 2;
/// How many containers a sequence has.
pub(crate) const CONTAINERS: usize = 2;

/// What a process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Program {
    /// Runs until somebody kills it.
    Sleeps,
    /// The same, with children.
    Forks,
    /// Ends at once with this code.
    Exits(u8),
    /// Ends after some milliseconds with this code.
    Soon(u8),
    /// Is not there.
    Missing,
}

impl Program {
    /// The arguments of the process.
    pub(crate) fn arguments(self) -> Vec<String> {
        let script = match self {
            Self::Sleeps => "exec sleep 3600".to_owned(),
            Self::Forks => "sleep 3600 & sleep 3600 & wait".to_owned(),
            Self::Exits(code) => format!("exit {code}"),
            Self::Soon(code) => format!("usleep 20000; exit {code}"),
            Self::Missing => return vec!["/no/such/program".to_owned()],
        };
        ["sh".to_owned(), "-c".to_owned(), script].into()
    }

    /// The exit code of a process that ends by itself.
    pub(crate) fn exit_code(self) -> Option<u8> {
        match self {
            Self::Exits(code) | Self::Soon(code) => Some(code),
            Self::Sleeps | Self::Forks | Self::Missing => None,
        }
    }
}

/// A process of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub(crate) enum Process {
    Init,
    Exec(usize),
}

/// A call about one container, or something that happens to the container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Call {
    Create,
    Start(Process),
    Exec(usize, Program),
    Kill(Process, u32),
    KillAll(u32),
    Delete(Process),
    Pause,
    Resume,
    State(Process),
    Wait(Process),
    Pids,
    Stats,
    Update,
    UpdateGarbage,
    Resize(Process),
    CloseIo(Process),
    Connect,
    /// SIGKILL from somebody else than the shim.
    KillOutside(Process),
    /// SIGKILL to a runc that the shim runs, for whatever container.
    KillRunc,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Life {
    Absent,
    Created,
    Running,
    Paused,
    Ended,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Member {
    life: Life,
    program: Program,
    /// Ends sooner or later, if it runs or is an init that waits for its start.
    dying: bool,
}

impl Member {
    fn absent(program: Program) -> Self {
        Self {
            life: Life::Absent,
            program,
            dying: false,
        }
    }
}

/// A state of a container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Container {
    init: Member,
    execs: [Member; EXECS],
}

use Allowed::Done;

fn refused(code: Code) -> Allowed {
    Allowed::Code(code)
}

impl Container {
    /// A container that is not there yet, and will run `program`.
    pub(crate) fn absent(program: Program) -> Self {
        Self {
            init: Member::absent(program),
            execs: [Member::absent(Program::Missing); EXECS],
        }
    }

    /// Whether the container is there.
    pub(crate) fn is_there(&self) -> bool {
        self.init.life != Life::Absent
    }

    /// Whether a Wait for this process, if it begins now, may be told that there is no such process: now, or when an
    /// exec is deleted that never ran.
    pub(crate) fn wait_may_find_nothing(&self, process: Process) -> bool {
        self.member(process).life == Life::Absent || matches!(process, Process::Exec(_))
    }

    fn member(&self, process: Process) -> Member {
        match process {
            Process::Init => self.init,
            Process::Exec(at) => self.execs[at],
        }
    }

    /// This state with another state of one process.
    fn with(&self, process: Process, change: impl FnOnce(&mut Member)) -> Self {
        let mut next = self.clone();
        change(match process {
            Process::Init => &mut next.init,
            Process::Exec(at) => &mut next.execs[at],
        });
        next
    }

    fn gone(&self) -> Self {
        Self::absent(self.init.program)
    }

    fn dying(&self, process: Process) -> Self {
        self.with(process, |member| member.dying = true)
    }

    fn status(&self, process: Process) -> Option<Status> {
        Some(match (self.member(process).life, process) {
            (Life::Absent, _) => return None,
            (Life::Created, _) => Status::CREATED,
            (Life::Running, Process::Exec(_)) if self.init.life == Life::Paused => Status::PAUSED,
            (Life::Running, _) => Status::RUNNING,
            (Life::Paused, _) => Status::PAUSED,
            (Life::Ended, _) => Status::STOPPED,
        })
    }

    /// Whether the container is there, has not ended, and may do so at any time.
    fn is_ending(&self) -> bool {
        self.init.dying && !matches!(self.init.life, Life::Absent | Life::Ended)
    }

    fn same(&self, codes: &[Code]) -> Vec<(Allowed, Self)> {
        let same = |code: &Code| (refused(*code), self.clone());
        codes.iter().map(same).collect()
    }

    /// The refusals of a call that a dying container may give.
    fn may_fail(&self) -> Vec<(Allowed, Self)> {
        if self.is_ending() {
            self.same(&[Code::FAILED_PRECONDITION, Code::UNKNOWN, Code::NOT_FOUND])
        } else {
            Vec::new()
        }
    }

    fn create(&self, around: Around<'_>) -> Vec<(Allowed, Self)> {
        let mut outcomes = Vec::new();
        if self.is_there() {
            return self.same(&[Code::ALREADY_EXISTS]);
        }
        if self.init.program == Program::Missing {
            outcomes.extend(self.same(&[Code::UNKNOWN]));
        } else {
            outcomes.push((
                Done,
                self.with(Process::Init, |init| init.life = Life::Created),
            ));
        }
        // A Delete gives up a container that is being made.
        if around.runc_is_killed() || around.others(|call| call == Call::Delete(Process::Init)) {
            outcomes.extend(self.same(&[Code::UNKNOWN, Code::FAILED_PRECONDITION]));
        }
        // The other one may fail afterwards.
        if around.others(|call| call == Call::Create) {
            outcomes.extend(self.same(&[Code::ALREADY_EXISTS]));
        }
        outcomes
    }

    fn start_init(&self, around: Around<'_>) -> Vec<(Allowed, Self)> {
        match self.init.life {
            Life::Absent => self.same(&[Code::NOT_FOUND]),
            Life::Created => {
                let mut outcomes = self.may_fail();
                outcomes.push((
                    Done,
                    self.with(Process::Init, |init| {
                        init.life = Life::Running;
                        init.dying |= init.program.exit_code().is_some();
                    }),
                ));
                if around.others(|call| {
                    matches!(
                        call,
                        Call::Delete(Process::Init) | Call::Start(Process::Init)
                    )
                }) {
                    outcomes.extend(self.same(&[Code::FAILED_PRECONDITION]));
                }
                outcomes
            }
            Life::Running | Life::Paused | Life::Ended => self.same(&[Code::FAILED_PRECONDITION]),
        }
    }

    fn start_exec(&self, at: usize, around: Around<'_>) -> Vec<(Allowed, Self)> {
        let exec = self.execs[at];
        let process = Process::Exec(at);
        match (exec.life, self.init.life) {
            (_, Life::Absent) | (Life::Absent, _) => return self.same(&[Code::NOT_FOUND]),
            (Life::Running | Life::Paused | Life::Ended, _) | (_, Life::Ended) => {
                return self.same(&[Code::FAILED_PRECONDITION]);
            }
            (Life::Created, Life::Created | Life::Running | Life::Paused) => {}
        }
        let mut outcomes = Vec::new();
        let fails = exec.program == Program::Missing || self.init.life == Life::Paused;
        if !fails {
            outcomes.push((
                Done,
                self.with(process, |exec| {
                    exec.life = Life::Running;
                    exec.dying |= exec.program.exit_code().is_some();
                }),
            ));
        }
        let pausing = around.others(|call| matches!(call, Call::Pause | Call::Resume));
        if fails || pausing || around.runc_is_killed() || self.is_ending() {
            // The exec may be tried again, or is over.
            outcomes.extend(self.same(&[Code::UNKNOWN]));
            let over = self.with(process, |exec| exec.life = Life::Ended);
            outcomes.push((refused(Code::UNKNOWN), over));
        }
        if self.is_ending() || around.others(|call| call == Call::Start(process)) {
            outcomes.extend(self.same(&[Code::FAILED_PRECONDITION]));
        }
        outcomes
    }

    fn exec(&self, at: usize, program: Program, around: Around<'_>) -> Vec<(Allowed, Self)> {
        let mut outcomes = match (self.init.life, self.execs[at].life) {
            (Life::Absent, _) => self.same(&[Code::NOT_FOUND]),
            (Life::Paused | Life::Ended, _) => self.same(&[Code::FAILED_PRECONDITION]),
            (Life::Created | Life::Running, Life::Absent) => {
                let added = Member {
                    life: Life::Created,
                    program,
                    dying: false,
                };
                vec![(Done, self.with(Process::Exec(at), |exec| *exec = added))]
            }
            (Life::Created | Life::Running, _) => self.same(&[Code::ALREADY_EXISTS]),
        };
        if around.others(|call| call == Call::Delete(Process::Init)) {
            outcomes.extend(self.same(&[Code::FAILED_PRECONDITION]));
        }
        outcomes
    }

    fn kill(&self, process: Process, signal: u32, all: bool) -> Vec<(Allowed, Self)> {
        let member = self.member(process);
        match member.life {
            Life::Absent | Life::Ended => return self.same(&[Code::NOT_FOUND]),
            Life::Created | Life::Running | Life::Paused => {}
        }
        match signal {
            0 => return vec![(Done, self.clone())],
            65.. => return self.same(&[Code::INVALID_ARGUMENT]),
            _ => {}
        }
        if member.life == Life::Created && process != Process::Init {
            return self.same(&[Code::FAILED_PRECONDITION]);
        }
        let mut next = self.dying(process);
        if all {
            next.execs
                .iter_mut()
                .for_each(|exec| exec.dying |= exec.life == Life::Running);
        }
        let mut outcomes = vec![(Done, next)];
        if member.dying || self.is_ending() {
            outcomes.extend(self.same(&[Code::NOT_FOUND]));
        }
        outcomes
    }

    fn delete(&self, process: Process) -> Vec<(Allowed, Self)> {
        match (self.member(process).life, process) {
            (Life::Absent, _) => self.same(&[Code::NOT_FOUND]),
            (Life::Running | Life::Paused, _) => self.same(&[Code::FAILED_PRECONDITION]),
            (Life::Created | Life::Ended, Process::Init) => vec![(Done, self.gone())],
            (Life::Created | Life::Ended, Process::Exec(_)) => {
                let gone = Member::absent(Program::Missing);
                vec![(Done, self.with(process, |exec| *exec = gone))]
            }
        }
    }

    fn freeze(&self, from: Life, to: Life) -> Vec<(Allowed, Self)> {
        let mut outcomes = match self.init.life {
            Life::Absent => self.same(&[Code::NOT_FOUND]),
            life if life == from => vec![(Done, self.with(Process::Init, |init| init.life = to))],
            _ => self.same(&[Code::FAILED_PRECONDITION]),
        };
        outcomes.extend(self.may_fail());
        outcomes
    }

    /// A call that changes nothing, and works on what is there and has not ended.
    fn on_the_living(&self, ended: Allowed, around: Around<'_>) -> Vec<(Allowed, Self)> {
        let mut outcomes = match self.init.life {
            Life::Absent => self.same(&[Code::NOT_FOUND]),
            Life::Ended => vec![(ended, self.clone())],
            Life::Created | Life::Running | Life::Paused => vec![(Done, self.clone())],
        };
        outcomes.extend(self.may_fail());
        if around.runc_is_killed() {
            outcomes.extend(self.same(&[Code::UNKNOWN]));
        }
        outcomes
    }

    fn outcomes_of(&self, call: Call, around: Around<'_>) -> Vec<(Allowed, Self)> {
        match call {
            Call::Create => self.create(around),
            Call::Start(Process::Init) => self.start_init(around),
            Call::Start(Process::Exec(exec)) => self.start_exec(exec, around),
            Call::Exec(exec, program) => self.exec(exec, program, around),
            Call::Kill(process, signal) => self.kill(process, signal, false),
            Call::KillAll(signal) => self.kill(Process::Init, signal, true),
            Call::Delete(process) => self.delete(process),
            Call::Pause => self.freeze(Life::Running, Life::Paused),
            Call::Resume => self.freeze(Life::Paused, Life::Running),
            Call::State(process) => match self.status(process) {
                Some(status) => {
                    let mut outcomes = vec![(Allowed::Is(status), self.clone())];
                    // A created init that is being deleted is killed first.
                    if around.others(|call| call == Call::Delete(Process::Init))
                        && self.init.life == Life::Created
                    {
                        outcomes.push((Allowed::Is(Status::STOPPED), self.clone()));
                    }
                    outcomes
                }
                None => self.same(&[Code::NOT_FOUND]),
            },
            Call::Pids => match self.init.life {
                Life::Absent => self.same(&[Code::NOT_FOUND]),
                _ => vec![(Done, self.clone())],
            },
            Call::Stats => {
                let mut outcomes = self.on_the_living(Done, around);
                if self.init.life == Life::Ended {
                    outcomes.extend(self.same(&[Code::NOT_FOUND]));
                }
                outcomes
            }
            Call::Update => self.on_the_living(refused(Code::FAILED_PRECONDITION), around),
            Call::UpdateGarbage => match self.init.life {
                Life::Absent => self.same(&[Code::NOT_FOUND]),
                Life::Ended => self.same(&[Code::FAILED_PRECONDITION]),
                Life::Created | Life::Running | Life::Paused => {
                    self.same(&[Code::INVALID_ARGUMENT])
                }
            },
            Call::Resize(process) | Call::CloseIo(process) => self.if_there(process),
            Call::KillOutside(process) => {
                let alive = match self.member(process).life {
                    Life::Absent | Life::Ended => false,
                    Life::Created => process == Process::Init,
                    Life::Running | Life::Paused => true,
                };
                let next = if alive {
                    self.dying(process)
                } else {
                    self.clone()
                };
                vec![(Done, next), (Done, self.clone())]
            }
            Call::Wait(_) | Call::Connect | Call::KillRunc => vec![(Done, self.clone())],
        }
    }

    fn if_there(&self, process: Process) -> Vec<(Allowed, Self)> {
        match self.member(process).life {
            Life::Absent => self.same(&[Code::NOT_FOUND]),
            _ => vec![(Done, self.clone())],
        }
    }
}

/// A call among those that are made at the same time.
#[derive(Clone, Copy)]
struct Around<'a> {
    calls: &'a [Call],
    at: usize,
}

impl Around<'_> {
    fn others(self, like: impl Fn(Call) -> bool) -> bool {
        let mut others = self
            .calls
            .iter()
            .enumerate()
            .filter(|(at, _)| *at != self.at);
        others.any(|(_, call)| like(*call))
    }

    fn runc_is_killed(self) -> bool {
        self.others(|call| call == Call::KillRunc)
    }
}

impl Model<Call> for Container {
    fn outcomes(&self, calls: &[Call], at: usize) -> Vec<(Allowed, Self)> {
        let around = Around { calls, at };
        let mut outcomes = self.outcomes_of(calls[at], around);
        // A Delete of a created container kills the init first.
        let deleted = around.others(|call| call == Call::Delete(Process::Init));
        if deleted && self.init.life == Life::Created && !self.init.dying {
            outcomes.extend(self.dying(Process::Init).outcomes_of(calls[at], around));
        }
        outcomes
    }

    fn by_itself(&self) -> Vec<Self> {
        let mut next = Vec::new();
        if self.is_ending() {
            let mut ended = self.with(Process::Init, |init| init.life = Life::Ended);
            ended
                .execs
                .iter_mut()
                .for_each(|exec| exec.dying |= exec.life == Life::Running);
            next.push(ended);
        }
        for (at, exec) in self.execs.iter().enumerate() {
            if exec.dying && exec.life == Life::Running {
                next.push(self.with(Process::Exec(at), |exec| exec.life = Life::Ended));
            }
        }
        next
    }
}

/// Calls that are made at once: each with its container, and how many milliseconds it waits.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Step {
    Calls(Vec<(usize, u8, Call)>),
    /// Nobody takes events.
    EventsAway,
    /// Somebody takes events again.
    EventsBack,
}

/// A sequence, from nothing to nothing.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Sequence {
    /// What the containers run.
    pub(crate) programs: [Program; CONTAINERS],
    /// Which containers have a process namespace of their own.
    pub(crate) own_processes: [bool; CONTAINERS],
    pub(crate) steps: Vec<Step>,
}

fn program() -> impl Strategy<Value = Program> {
    prop_oneof![
        6 => Just(Program::Sleeps),
        2 => Just(Program::Forks),
        3 => (0..4_u8).prop_map(Program::Exits),
        3 => (0..4_u8).prop_map(Program::Soon),
        1 => Just(Program::Missing),
    ]
}

fn process() -> impl Strategy<Value = Process> {
    prop_oneof![2 => Just(Process::Init), 3 => (0..EXECS).prop_map(Process::Exec)]
}

fn signal() -> impl Strategy<Value = u32> {
    prop_oneof![6 => Just(9_u32), 3 => Just(15), 1 => Just(0), 1 => Just(65), 1 => Just(u32::MAX)]
}

fn call() -> impl Strategy<Value = Call> {
    prop_oneof![
        8 => Just(Call::Create),
        10 => Just(Call::Start(Process::Init)),
        8 => (0..EXECS).prop_map(|at| Call::Start(Process::Exec(at))),
        8 => ((0..EXECS), program()).prop_map(|(at, program)| Call::Exec(at, program)),
        5 => (process(), signal()).prop_map(|(process, signal)| Call::Kill(process, signal)),
        1 => signal().prop_map(Call::KillAll),
        8 => process().prop_map(Call::Delete),
        3 => Just(Call::Pause),
        3 => Just(Call::Resume),
        3 => process().prop_map(Call::State),
        4 => process().prop_map(Call::Wait),
        1 => Just(Call::Pids),
        1 => Just(Call::Stats),
        1 => Just(Call::Update),
        1 => Just(Call::UpdateGarbage),
        1 => process().prop_map(Call::Resize),
        1 => process().prop_map(Call::CloseIo),
        1 => Just(Call::Connect),
        2 => process().prop_map(Call::KillOutside),
        1 => Just(Call::KillRunc),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let one = (0..CONTAINERS, Just(0_u8), call()).prop_map(|call| vec![call]);
    let delay = prop_oneof![2 => Just(0_u8), 1 => 0..40_u8];
    let several = proptest::collection::vec((0..CONTAINERS, delay.clone(), call()), 2..=3);
    // Calls for one container meet more often.
    let together = (
        0..CONTAINERS,
        proptest::collection::vec((delay, call()), 2..=3),
    )
        .prop_map(|(container, calls)| {
            let of = |(delay, call)| (container, delay, call);
            calls.into_iter().map(of).collect::<Vec<_>>()
        });
    prop_oneof![
        10 => one.prop_map(Step::Calls),
        2 => several.prop_map(Step::Calls),
        5 => together.prop_map(Step::Calls),
        1 => Just(Step::EventsAway),
        1 => Just(Step::EventsBack),
    ]
}

/// Any sequence. Most begin with containers that run, as random calls would seldom get that far.
pub(crate) fn sequence() -> impl Strategy<Value = Sequence> {
    let begin = prop_oneof![
        3 => Just(vec![Call::Create, Call::Start(Process::Init)]),
        1 => Just(vec![Call::Create]),
        1 => Just(vec![]),
    ];
    (
        proptest::array::uniform2(program()),
        proptest::array::uniform2(proptest::bool::weighted(0.7)),
        begin,
        proptest::collection::vec(step(), 1..14),
    )
        .prop_map(|(programs, own_processes, begin, steps)| Sequence {
            programs,
            own_processes,
            steps: begin
                .into_iter()
                .map(|call| Step::Calls(vec![(0, 0, call), (1, 0, call)]))
                .chain(steps)
                .collect(),
        })
}
