//! Goes through the points of a call, and judges what the shim does at each.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use nix::errno::Errno;
use nix::sys::signal::Signal;
use nix::sys::wait::WaitStatus;
use shim_tests::leaks::MARK;
use shim_tests::{Daemon, Version, image, lab};

use crate::life::{ANSWER, BOUND, Ground, Kind, Level, Life, run, soon};
use crate::scenes::{Program, Scene};
use crate::syscalls;
use crate::tracer::{Call, Deed, Place, Target, Trace, Tracer};

/// How many points of each call and each deed the short run tries.
const SAMPLE: usize = 4;

/// Points that have found something once. Every run tries them.
const PINNED: &[&str] = &[
    // The socket was there, and no note of it.
    "start (cli):listen(caller)#1:ENOMEM",
    "start (cli):listen(caller)#1:SIGKILL",
    // The server was there, and no note of it.
    "start (cli):openat(shim.pid)#1:SIGKILL",
    // SIGKILL was sent, and the frozen container was not thawed.
    "Kill of a paused container, Wait:openat(freezer.state)#1:EMFILE",
    // `delete` found the deletion done, and left the dead shim's socket.
    "Delete of a sandbox:close(deleted)#1:SIGKILL",
    // runc waited for an init that the shim had released.
    "Start:unlink(exec.fifo)#1:EIO",
    // The init was released, and the shim had runc wait for it.
    "Start:epoll_ctl(anon_inode)#4:ENOSPC",
    // `delete` took an address that was half written for a path.
    "Create:write(address.new)#1:SIGKILL",
    // `delete` did not learn where the socket or the cgroup is, and succeeded.
    "delete (cli):read(address)#1:EIO",
    "delete (cli) of a sandbox:openat(cgroup)#1:EIO",
    "delete (cli) of a sandbox:read(cgroup)#1:EIO",
];

/// What is done to the calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Each call fails once.
    Fail,
    /// SIGKILL at each call.
    Kill,
}

/// What became of a point. A finding is an `Err` beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Class {
    /// The call of containerd was refused.
    Refused,
    /// The call of containerd succeeded all the same.
    Succeeded,
    /// Rust could not allocate and aborted, and `delete` cleaned up: documented.
    Aborted,
    /// The process was killed, and `delete` cleaned up.
    Killed,
    /// The process made no such call this time.
    NotReached,
}

/// A call of containerd to a shim, or a program.
#[derive(Clone, Copy)]
pub(crate) enum Subject {
    /// A call.
    Scene(&'static Scene),
    /// A program.
    Program(Program),
}

impl Subject {
    fn name(self) -> &'static str {
        match self {
            Self::Scene(scene) => scene.name,
            Self::Program(program) => program.name(),
        }
    }
}

/// The lines of a table, and the findings.
#[derive(Default)]
struct Tally {
    tried: usize,
    classes: BTreeMap<Class, usize>,
    findings: Vec<String>,
    once: Vec<String>,
}

/// What one run was like.
struct Run {
    trace: Trace,
    descriptors: usize,
    class: Class,
}

struct Network {
    holder: Child,
    path: PathBuf,
}

impl Network {
    fn make(daemon: &Daemon) -> Self {
        let path = daemon.directory().join("netns");
        fs::write(&path, "").unwrap();
        let holder = Command::new("unshare")
            .args(["--net", "sleep", "86400"])
            .env(MARK, daemon.directory())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let of = |pid: u32| fs::read_link(format!("/proc/{pid}/ns/net")).unwrap_or_default();
        soon(BOUND, || match of(holder.id()) == of(std::process::id()) {
            true => Err("no namespace yet".to_owned()),
            false => Ok(()),
        })
        .unwrap();
        rustix::mount::mount_bind(format!("/proc/{}/ns/net", holder.id()), &path).unwrap();
        Self { holder, path }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        let _ = rustix::mount::unmount(&self.path, rustix::mount::UnmountFlags::DETACH);
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

/// The one point that `FAULT` names: `Create:openat(config.json)#1:EMFILE`.
fn wanted() -> Option<String> {
    std::env::var("FAULT").ok()
}

/// `FAULTS=all`, or how many points of each call are tried.
fn points() -> Option<usize> {
    match std::env::var("FAULTS").as_deref() {
        Ok("all") => None,
        Ok(number) => Some(number.parse().expect("FAULTS is a number, or `all`")),
        Err(_) => Some(SAMPLE),
    }
}

/// Goes through the points of `subjects`. Panics if there is a finding.
pub(crate) fn go_through(name: &str, mode: Mode, subjects: &[Subject]) {
    let wanted = wanted();
    let subjects: Vec<Subject> = subjects
        .iter()
        .copied()
        .filter(|subject| {
            let name = format!("{}:", subject.name());
            wanted
                .as_ref()
                .is_none_or(|wanted| wanted.starts_with(&name))
        })
        .collect();
    if subjects.is_empty() {
        return;
    }
    let daemon = Daemon::start(Version::newest());
    let events = daemon.events();
    let network = Network::make(&daemon);
    let root = daemon.directory().join("root");
    image::unpack_busybox(&root);
    for folder in ["dev", "proc", "sys"] {
        fs::create_dir_all(root.join(folder)).unwrap();
    }
    let ground = Ground {
        daemon: &daemon,
        events: &events,
        root,
        network: network.path.clone(),
    };
    let folder = lab::target().join("faults");
    fs::create_dir_all(&folder).unwrap();
    let mut campaign = Campaign {
        ground: &ground,
        mode,
        wanted,
        number: 0,
        log: fs::File::create(folder.join(format!("{name}.log"))).unwrap(),
    };
    let begun = Instant::now();
    let mut table = String::new();
    let mut findings = Vec::new();
    for subject in subjects {
        let tally = campaign.subject(subject);
        let _ = writeln!(table, "{}", tally.line(mode, subject.name()));
        for line in &tally.once {
            let _ = writeln!(table, "  once, and not again: {line}");
        }
        for line in &tally.findings {
            let _ = writeln!(table, "  FINDING {line}");
        }
        findings.extend(tally.findings);
    }
    let _ = writeln!(
        table,
        "({name}: {} s, seed {})",
        begun.elapsed().as_secs(),
        seed()
    );
    eprint!("{table}");
    fs::write(folder.join(format!("{name}.txt")), &table).unwrap();
    drop(network);
    assert!(findings.is_empty(), "{}", findings.join("\n"));
    drop(events);
    daemon.end();
}

impl Tally {
    fn line(&self, mode: Mode, name: &str) -> String {
        let count = |class| self.classes.get(&class).copied().unwrap_or_default();
        let classes: Vec<String> = [
            (Class::Refused, "refused"),
            (Class::Succeeded, "succeeded"),
            (Class::Aborted, "aborted for lack of memory"),
            (Class::Killed, "killed"),
            (Class::NotReached, "not reached"),
        ]
        .into_iter()
        .filter(|(class, _)| count(*class) > 0)
        .map(|(class, word)| format!("{} {word}", count(class)))
        .collect();
        format!(
            "{mode:?} {name}: {} points: {}; {} findings",
            self.tried,
            classes.join(", "),
            self.findings.len()
        )
    }
}

struct Campaign<'a> {
    ground: &'a Ground<'a>,
    mode: Mode,
    wanted: Option<String>,
    number: usize,
    log: fs::File,
}

impl Campaign<'_> {
    fn subject(&mut self, subject: Subject) -> Tally {
        let mut tally = Tally::default();
        // Twice: what the first run of a program finds in the kernel's caches, the second finds, too.
        let recorded = [0; 2].map(|_| self.attempt(subject, &Deed::Watch, usize::MAX));
        let [Ok(first), Ok(second)] = recorded else {
            let why = recorded
                .into_iter()
                .find_map(Result::err)
                .unwrap_or_default();
            tally
                .findings
                .push(format!("{}: without any fault: {why}", subject.name()));
            return tally;
        };
        let unknown = &second.trace.unknown;
        if !unknown.is_empty() {
            let line = format!(
                "{}: system calls that the table does not know: {unknown:?}",
                subject.name()
            );
            tally.findings.push(line);
        }
        let most = first.descriptors.max(second.descriptors);
        let deeds = self.deeds(subject, &second.trace.calls);
        for (deed, call) in deeds {
            self.point(subject, &deed, &call, most, &mut tally);
        }
        tally
    }

    /// What is done, and the call as it was recorded.
    fn deeds(&mut self, subject: Subject, calls: &[Call]) -> Vec<(Deed, Call)> {
        let mut deeds = Vec::new();
        for call in calls {
            let place = call.place.clone();
            match self.mode {
                Mode::Kill => deeds.push((Deed::Kill(place), call.clone())),
                Mode::Fail => deeds.extend(
                    syscalls::errors(call)
                        .iter()
                        .map(|errno| (Deed::Fail(place.clone(), *errno), call.clone())),
                ),
            }
        }
        let (name, all, found) = (subject.name(), calls.len(), deeds.len());
        let _ = writeln!(self.log, "# {name}: {all} calls, {found} points");
        for call in calls {
            let why = syscalls::left_alone(call.name)
                .map_or(String::new(), |why| format!(": left alone, {why}"));
            let _ = writeln!(self.log, "#   {} {}{why}", call.place.0, call.on);
        }
        if let Some(wanted) = &self.wanted {
            deeds.retain(|(deed, _)| point_name(subject, deed) == *wanted);
        } else if let Some(points) = points() {
            deeds = sample(subject, deeds, points);
        }
        deeds
    }

    fn point(
        &mut self,
        subject: Subject,
        deed: &Deed,
        call: &Call,
        most: usize,
        tally: &mut Tally,
    ) {
        let name = point_name(subject, deed);
        let begun = Instant::now();
        let mut failures = Vec::new();
        tally.tried += 1;
        // A finding is what happens twice.
        for _ in 0..3 {
            match self.attempt(subject, deed, most) {
                Ok(run) => {
                    *tally.classes.entry(run.class).or_default() += 1;
                    let took = begun.elapsed().as_millis();
                    let _ = writeln!(self.log, "{name} {} {:?} {took} ms", call.on, run.class);
                    break;
                }
                Err(why) => {
                    let _ = writeln!(self.log, "{name} {}: {why}", call.on);
                    failures.push(why);
                }
            }
            if failures.len() == 2 {
                break;
            }
        }
        let _ = self.log.flush();
        match failures.as_slice() {
            [] => {}
            [once] => tally.once.push(format!("{name} {}: {once}", call.on)),
            [_, again, ..] => tally.findings.push(format!("{name} {}: {again}", call.on)),
        }
    }

    fn attempt(&mut self, subject: Subject, deed: &Deed, most: usize) -> Result<Run, String> {
        self.number += 1;
        let id = format!("f{}", self.number);
        let kind = match subject {
            Subject::Scene(scene) => scene.kind,
            Subject::Program(Program::DeleteSandbox) => Kind::Sandbox,
            Subject::Program(_) => Kind::Container,
        };
        let mut life = Life::new(self.ground, kind, &id);
        life.most_descriptors = most;
        let result = match subject {
            Subject::Scene(scene) => of_scene(&mut life, scene, deed),
            Subject::Program(Program::Start) => of_start(&mut life, Target::Program, deed),
            Subject::Program(Program::Boot) => of_start(&mut life, Target::ChildOfProgram, deed),
            Subject::Program(Program::Delete | Program::DeleteSandbox) => {
                of_delete(&mut life, deed)
            }
        };
        result.map_err(|why| {
            let log = life.log();
            life.clean_up();
            let lines: Vec<&str> = log.lines().collect();
            let last = lines[lines.len().saturating_sub(8)..].join("\n    ");
            format!("{why}\n    {last}")
        })
    }
}

fn words(deed: &Deed) -> (String, String) {
    let at = |place: &Place| place.0.clone();
    match deed {
        Deed::Watch => (String::new(), String::new()),
        Deed::Fail(place, errno) => (at(place), format!("{errno:?}")),
        Deed::Kill(place) => (at(place), "SIGKILL".to_owned()),
    }
}

/// Some of the points, the same in each run with the same `FAULTS_SEED`, and the pinned ones.
fn sample(subject: Subject, deeds: Vec<(Deed, Call)>, points: usize) -> Vec<(Deed, Call)> {
    let every = deeds.len().div_ceil(points).max(1);
    let first = seed().wrapping_mul(7919) % every;
    let chosen = |(number, (deed, _)): &(usize, (Deed, Call))| {
        number % every == first || PINNED.contains(&point_name(subject, deed).as_str())
    };
    let numbered = deeds.into_iter().enumerate();
    numbered.filter(chosen).map(|(_, deed)| deed).collect()
}

fn seed() -> usize {
    let seed = std::env::var("FAULTS_SEED").ok();
    seed.map_or(1, |seed| seed.parse().expect("FAULTS_SEED is a number"))
}

fn point_name(subject: Subject, deed: &Deed) -> String {
    let (place, what) = words(deed);
    format!("{}:{place}:{what}", subject.name())
}

/// Whether the server ended as it may: Rust aborts where it cannot allocate.
fn aborted(trace: &Trace, deed: &Deed) -> bool {
    let by_abort = matches!(
        trace.ended,
        Some(WaitStatus::Signaled(_, Signal::SIGABRT, _))
    );
    let allocating = trace.done.as_ref().is_some_and(syscalls::allocates);
    by_abort && allocating && matches!(deed, Deed::Fail(_, Errno::ENOMEM))
}

fn of_scene(life: &mut Life<'_>, scene: &Scene, deed: &Deed) -> Result<Run, String> {
    life.reach(scene.level)?;
    let waiter = life.another_connection()?;
    let has_init = scene.level >= Level::Created && scene.kind != Kind::SandboxApi;
    let id = life.id.clone();
    let waiting = has_init.then(|| {
        std::thread::spawn(move || {
            let _ = waiter.wait_for(&id, "", ANSWER * 6);
        })
    });
    let tracer = Tracer::attach(life.server().pid, Target::Running, deed.clone());
    let begun = Instant::now();
    let answer = (scene.act)(life);
    let took = begun.elapsed();
    tracer.settle();
    let allocates = tracer.done().as_ref().is_some_and(syscalls::allocates);
    if allocates || answer.as_ref().is_err_and(|refusal| refusal.code.is_none()) {
        tracer.wait_for_the_end();
    }
    let done = tracer.end();
    if took >= ANSWER {
        return Err(format!("answered after {took:?}: {answer:?}"));
    }
    let killed = matches!(deed, Deed::Kill(_)) && done.done.is_some();
    if killed || aborted(&done, deed) {
        after_the_servers_end(life)?;
        if let Some(waiting) = waiting {
            soon(BOUND, || match waiting.is_finished() {
                true => Ok(()),
                false => Err("somebody waits for ever".to_owned()),
            })?;
        }
        let class = if killed {
            Class::Killed
        } else {
            Class::Aborted
        };
        return Ok(Run {
            trace: done,
            descriptors: 0,
            class,
        });
    }
    let class = match (&answer, done.done.is_some(), deed) {
        (Err(refusal), _, Deed::Watch) => return Err(refusal.to_string()),
        (Ok(()), _, Deed::Watch) => Class::Succeeded,
        (Err(refusal), false, _) => return Err(format!("refused without a fault: {refusal}")),
        (Ok(()), false, _) => Class::NotReached,
        (Err(_), true, _) => Class::Refused,
        (Ok(()), true, _) => Class::Succeeded,
    };
    let said = format!("{answer:?}");
    // An event whose answer is lost is sent again.
    life.may_repeat_events = done
        .done
        .as_ref()
        .is_some_and(|call| call.on == syscalls::CONTAINERD);
    let descriptors = after_a_call(life, scene).map_err(|why| format!("{why} (answer: {said})"))?;
    Ok(Run {
        trace: done,
        descriptors,
        class,
    })
}

/// The shim lives, another container has a whole life, and everything goes. Gives the number of open descriptors.
fn after_a_call(life: &mut Life<'_>, scene: &Scene) -> Result<usize, String> {
    let is_end = matches!(scene.name, "Shutdown" | "ShutdownSandbox");
    if !is_end && let Ok(()) = life.server_is_gone() {
        return Err("the shim is gone".to_owned());
    }
    if is_end && soon(BOUND, || life.server_is_gone()).is_ok() {
        life.run_delete()?;
        life.nothing_left()?;
        life.events_are_whole()?;
        // The server is gone, and has no descriptors to count.
        return Ok(usize::MAX);
    }
    life.connect()?;
    let with_other = scene.name.contains("another") || scene.name.contains("beside");
    if with_other {
        life.take_down_other()?;
    }
    if !is_end {
        life.whole_life()?;
    }
    life.take_down()?;
    let descriptors = life.descriptors_at_rest()?;
    end_server(life)?;
    life.run_delete()?;
    life.nothing_left()?;
    life.events_are_whole()?;
    Ok(descriptors)
}

/// containerd runs `delete` when the connection closes.
fn after_the_servers_end(life: &mut Life<'_>) -> Result<(), String> {
    soon(BOUND, || life.server_is_gone())?;
    life.run_delete()?;
    life.nothing_left()
}

/// Shuts an empty shim down, and waits for the end of its server.
fn end_server(life: &mut Life<'_>) -> Result<(), String> {
    life.shut_down()
        .map_err(|refusal| format!("Shutdown: {refusal}"))?;
    life.hang_up();
    soon(BOUND, || life.server_is_gone())
}

/// What became of a program that has worked, or has not; none where nothing was done to the program and it did not work.
fn class_of_program(worked: bool, deed: &Deed, trace: &Trace) -> Option<Class> {
    match (worked, deed, trace.done.is_some()) {
        (false, Deed::Watch, _) | (false, _, false) => None,
        (true, Deed::Watch, _) => Some(Class::Succeeded),
        (_, Deed::Kill(_), true) => Some(Class::Killed),
        (false, Deed::Fail(..), true) => Some(Class::Refused),
        (true, Deed::Fail(..), true) => Some(Class::Succeeded),
        (true, _, false) => Some(Class::NotReached),
    }
}

fn of_start(life: &mut Life<'_>, target: Target, deed: &Deed) -> Result<Run, String> {
    let (ran, tracer) = life.start_shim(Some((target, deed.clone())))?;
    let tracer = tracer.ok_or("not traced")?;
    let serves = ran.status.success() && life.connect().and_then(|()| life.serves()).is_ok();
    tracer.settle();
    let trace = tracer.end();
    let class = class_of_program(serves, deed, &trace)
        .ok_or_else(|| format!("does not serve: {}", ran.text()))?;
    let whole = serves && !matches!(deed, Deed::Kill(_));
    let mut descriptors = 0;
    if whole {
        life.whole_life()?;
        descriptors = life.descriptors_at_rest()?;
        end_server(life)?;
    }
    life.run_delete()?;
    life.nothing_left()?;
    // Another start works.
    life.forget();
    life.reach(Level::Shim)?;
    life.whole_life()?;
    end_server(life)?;
    life.run_delete()?;
    life.nothing_left()?;
    Ok(Run {
        trace,
        descriptors,
        class,
    })
}

fn of_delete(life: &mut Life<'_>, deed: &Deed) -> Result<Run, String> {
    let level = match life.kind {
        Kind::Container => Level::ExecRunning,
        Kind::ShortContainer | Kind::Terminal | Kind::Sandbox | Kind::SandboxApi => Level::Running,
    };
    life.reach(level)?;
    if life.kind == Kind::Sandbox {
        life.run_other()?;
    }
    shim_tests::proc::kill(life.server().pid, rustix::process::Signal::KILL);
    let (ran, tracer) = run(
        life.command("delete"),
        Some((Target::Program, deed.clone())),
    )?;
    let trace = tracer.ok_or("not traced")?.end();
    let success = ran.status.success();
    let class =
        class_of_program(success, deed, &trace).ok_or_else(|| format!("delete: {}", ran.text()))?;
    if !success || class == Class::Killed {
        life.run_delete().map_err(|why| format!("a second {why}"))?;
    }
    life.nothing_left()?;
    Ok(Run {
        trace,
        descriptors: 0,
        class,
    })
}
