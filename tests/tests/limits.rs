//! A node at its limits: lives of containers while pids, memory, descriptors, or the room in /run are used up.
//!
//! Each call gets an answer, the shim lives, and all is well when the limit is lifted. `LIMITS_LIVES` sets how many
//! containers each limit meets: 50 in `make faults`, a few otherwise. What each limit refused is printed
//! (`--no-capture`): a limit that refuses nothing is a test's fault.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test reports by failing, and this one by what was refused, too"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use containerd_shim_protos::ttrpc::Code;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_remount, unmount};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use serde_json::json;
use shim_tests::calls::{Answer, Refusal, Shim, Streams};
use shim_tests::cgroups::{self, Hierarchy};
use shim_tests::direct::{Group, Tasks};
use shim_tests::lab::ShimUnderTest;
use shim_tests::proc::{self, Process};
use shim_tests::raw::{Bundle, Ran};
use shim_tests::slot::text;
use shim_tests::until::ok_if;
use shim_tests::{Daemon, eventually, leaks, on_the_newest_containerd};

/// How many lives go on at once.
const LANES: usize = 4;

/// The descriptors that a shim may have under `ulimit -n 64`.
const DESCRIPTORS: u64 = 64;

/// What the shim and its runcs may have in memory. Most of a runc is the file of its program, which does not count.
const MEMORY: u64 = 5 << 20;

/// The pages or inodes that are left in a full `/run`. A container takes some ten, so each meets the end elsewhere.
const ROOM: usize = 12;

fn lives() -> usize {
    let number = std::env::var("LIMITS_LIVES");
    number.map_or(8, |number| number.parse().unwrap())
}

/// A `/run` of the shim's own: a small tmpfs with the bundles, the shim's sockets and runc's state. The tmpfs is mounted
/// below the slot's directory, and bound over the folders of `/run` in the shim's mount namespace.
struct Run {
    folder: PathBuf,
    raw: PathBuf,
}

impl Run {
    fn make(daemon: &Daemon) -> Self {
        let (folder, raw) = (
            daemon.directory().join("run"),
            daemon.directory().join("raw"),
        );
        for folder in [&folder, &raw] {
            fs::create_dir_all(folder).unwrap();
        }
        let size = c"size=16m,nr_inodes=2000,mode=755";
        mount("tmpfs", &folder, "tmpfs", MountFlags::empty(), size).unwrap();
        for inner in ["raw", "s", "runc"] {
            fs::create_dir(folder.join(inner)).unwrap();
        }
        mount_bind(folder.join("raw"), &raw).unwrap();
        let run = Self { folder, raw };
        // runc's state is there when the first runc of this machine has run.
        let script = format!(
            "#!/bin/sh\nexec unshare --mount sh -euc '
             mkdir -p /run/containerd/s /run/containerd/runc
             mount --bind {folder}/s /run/containerd/s
             mount --bind {folder}/runc /run/containerd/runc
             exec {shim} \"$@\"' sh \"$@\"\n",
            folder = run.folder.display(),
            shim = ShimUnderTest::get().binary(daemon.version()).display(),
        );
        let program = daemon.directory().join("shim-in-run");
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        run
    }

    fn bundle<'a>(&self, daemon: &'a Daemon, id: &str) -> Bundle<'a> {
        let mut bundle = Bundle::new(daemon, id);
        bundle.program = Some(self.folder.with_file_name("shim-in-run"));
        bundle
    }

    /// What a shim and its runcs have left, one line each.
    fn left(&self, daemon: &Daemon) -> Vec<String> {
        let namespace = daemon.names.name();
        let folders = [
            self.folder.join("s"),
            self.folder.join("runc").join(namespace),
        ];
        let entries = folders
            .iter()
            .filter_map(|folder| fs::read_dir(folder).ok());
        entries
            .flatten()
            .flatten()
            .map(|entry| text(&entry.path()))
            .collect()
    }

    fn unmount(self) {
        for point in [&self.raw, &self.folder] {
            eventually(Duration::from_secs(5), || {
                unmount(point, UnmountFlags::empty())
                    .map_err(|error| format!("{}: {error}", point.display()))
            });
        }
    }
}

/// What a node may lack.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Limit {
    /// `ulimit -n 64` for the shim.
    Descriptors,
    /// pids.max of the shim's cgroup: some threads more than the shim has.
    Pids,
    /// pids.max above the shim and its containers. A full table of pids gives the same error.
    NoFreePid,
    /// The memory of the shim's cgroup.
    Memory,
    /// `/run` has no room.
    FullRun,
    /// `/run` has no inode.
    NoInode,
    /// `/run` is read-only.
    ReadOnlyRun,
}

impl Limit {
    /// Imposes the limit on a shim that is there. The result lifts the limit again.
    fn impose(self, daemon: &Daemon, shim: i32, run: &Run) -> Box<dyn FnOnce() + Send> {
        match self {
            Self::Descriptors => {
                let pid = Pid::from_raw(shim);
                // Only the soft limit: to raise a hard one again takes CAP_SYS_RESOURCE.
                let was = open_files(shim);
                let limit = Rlimit {
                    current: Some(DESCRIPTORS),
                    ..was
                };
                prlimit(pid, Resource::Nofile, limit).unwrap();
                Box::new(move || {
                    prlimit(pid, Resource::Nofile, was).unwrap();
                })
            }
            Self::Pids => {
                let cgroup = cgroup_of_its_own(daemon, shim, "pids");
                let most = proc::threads(shim) + 14;
                write_and_lift(cgroup.join("pids.max"), &most.to_string(), "max")
            }
            Self::NoFreePid => {
                let cgroup = cgroup_of_its_own(daemon, shim, "pids");
                let parent = cgroup.parent().unwrap().to_owned();
                let now: usize = read(&parent.join("pids.current")).parse().unwrap();
                write_and_lift(parent.join("pids.max"), &(now + 14).to_string(), "max")
            }
            Self::Memory => {
                let cgroup = cgroup_of_its_own(daemon, shim, "memory");
                match cgroups::hierarchy() {
                    Hierarchy::V1 => write_and_lift(
                        cgroup.join("memory.limit_in_bytes"),
                        &MEMORY.to_string(),
                        "-1",
                    ),
                    Hierarchy::V2 => {
                        write_and_lift(cgroup.join("memory.max"), &MEMORY.to_string(), "max")
                    }
                }
            }
            Self::FullRun => {
                let filler = run.folder.join("filler");
                let mut file = File::create(&filler).unwrap();
                while file.write_all(&[0; 4096]).is_ok() {}
                let room = (ROOM * 4096) as u64;
                file.set_len(file.metadata().unwrap().len() - room).unwrap();
                Box::new(move || fs::remove_file(filler).unwrap())
            }
            Self::NoInode => {
                let folder = run.folder.join("filler");
                fs::create_dir(&folder).unwrap();
                let file = |number: usize| folder.join(number.to_string());
                let made = (0..)
                    .take_while(|number| File::create(file(*number)).is_ok())
                    .count();
                for number in made - ROOM..made {
                    fs::remove_file(file(number)).unwrap();
                }
                Box::new(move || fs::remove_dir_all(folder).unwrap())
            }
            Self::ReadOnlyRun => {
                let folder = run.folder.clone();
                mount_remount(&folder, MountFlags::RDONLY, c"").unwrap();
                Box::new(move || mount_remount(&folder, MountFlags::empty(), c"").unwrap())
            }
        }
    }
}

/// The limit of open files of a process.
fn open_files(pid: i32) -> Rlimit {
    let limits = read(Path::new(&format!("/proc/{pid}/limits")));
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"))
        .unwrap();
    let mut numbers = line
        .split_whitespace()
        .skip(3)
        .map(|number| number.parse().ok());
    Rlimit {
        current: numbers.next().unwrap(),
        maximum: numbers.next().unwrap(),
    }
}

fn read(file: &Path) -> String {
    let text =
        fs::read_to_string(file).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    text.trim().to_owned()
}

fn write_and_lift(file: PathBuf, limit: &str, none: &'static str) -> Box<dyn FnOnce() + Send> {
    fs::write(&file, limit).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
    Box::new(move || fs::write(file, none).unwrap())
}

/// Moves the shim into a cgroup of its own below the slot's parent.
fn cgroup_of_its_own(daemon: &Daemon, shim: i32, controller: &str) -> PathBuf {
    let root = cgroups::root(controller);
    let parent = root.join(daemon.names.name());
    let cgroup = parent.join("limited");
    fs::create_dir_all(&cgroup).unwrap();
    if cgroups::hierarchy() == Hierarchy::V2 {
        for folder in [&root, &parent] {
            fs::write(
                folder.join("cgroup.subtree_control"),
                format!("+{controller}"),
            )
            .unwrap();
        }
    }
    fs::write(cgroup.join("cgroup.procs"), shim.to_string()).unwrap();
    cgroup
}

/// What was answered, for the report.
#[derive(Default)]
struct Answers(Mutex<BTreeMap<&'static str, Counted>>);

/// The answers to one call.
#[derive(Default)]
struct Counted {
    good: usize,
    refused: usize,
    /// The texts of the refusals, without the ids in them.
    texts: BTreeSet<String>,
}

impl Answers {
    /// Counts an answer, which must be one: no broken connection, and nothing that comes too late.
    #[track_caller]
    fn of<T>(&self, call: &'static str, answer: Answer<T>) -> Answer<T> {
        if let Err(refusal) = &answer {
            let late = refusal
                .code
                .is_none_or(|code| code == Code::DEADLINE_EXCEEDED);
            assert!(!late, "{call}: {refusal}");
        }
        let mut all = self.0.lock().unwrap();
        let counted = all.entry(call).or_default();
        match &answer {
            Ok(_) => counted.good += 1,
            Err(refusal) => {
                counted.refused += 1;
                let text = refusal.message.replace(|c: char| c.is_ascii_digit(), "");
                counted.texts.insert(text);
            }
        }
        answer
    }

    fn refused(&self) -> usize {
        let all = self.0.lock().unwrap();
        all.values().map(|counted| counted.refused).sum()
    }

    fn report(&self) -> String {
        let all = self.0.lock().unwrap();
        let each = all.iter().map(|(call, counted)| {
            let texts: String = counted
                .texts
                .iter()
                .map(|text| format!("\n    {text}"))
                .collect();
            format!(
                "\n  {call}: {} good, {} refused{texts}",
                counted.good, counted.refused
            )
        });
        each.collect()
    }
}

/// A container to be, with its bundle and the FIFOs of its streams. containerd has made all that before it asks a shim.
struct Life {
    id: String,
    bundle: PathBuf,
    streams: Streams,
    _open: Vec<File>,
}

impl Life {
    fn prepare(daemon: &Daemon, tasks: &Tasks, id: &str) -> Self {
        let bundle = tasks.bundle(id, "exec sleep 3600", |spec| {
            spec["annotations"] = json!({
                "io.kubernetes.cri.container-type": "container",
                "io.kubernetes.cri.sandbox-id": "pod",
            });
        });
        let mut open = Vec::new();
        let mut fifo = |name: &str| {
            let path = daemon.directory().join("fifo").join(format!("{id}-{name}"));
            mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
            open.push(File::options().read(true).write(true).open(&path).unwrap());
            text(&path)
        };
        let streams = Streams {
            stdin: fifo("in"),
            stdout: fifo("out"),
            stderr: fifo("err"),
            terminal: false,
        };
        Self {
            id: id.to_owned(),
            bundle,
            streams,
            _open: open,
        }
    }

    /// Create, Start, an exec, State, Stats: whether the container is there afterwards.
    fn begin(&self, tasks: &Tasks, answers: &Answers) -> bool {
        let (shim, id) = (&tasks.shim, self.id.as_str());
        if answers
            .of(
                "create",
                tasks.create_with_streams(id, &self.bundle, &self.streams),
            )
            .is_err()
        {
            let state = answers.of("state", shim.state(id, ""));
            assert!(state.is_err(), "{id} was not made, and is there: {state:?}");
            return false;
        }
        if answers.of("start", shim.start(id, "")).is_ok() {
            let _ = answers.of("stats", shim.stats(id));
            self.exec(tasks, answers);
        }
        let _ = answers.of("state", shim.state(id, ""));
        true
    }

    fn exec(&self, tasks: &Tasks, answers: &Answers) {
        let (shim, id) = (&tasks.shim, self.id.as_str());
        if answers
            .of("exec", shim.exec(id, "e", &["true"], &Streams::default()))
            .is_err()
        {
            return;
        }
        if answers.of("exec start", shim.start(id, "e")).is_ok() {
            assert_eq!(answers.of("exec wait", shim.wait(id, "e")), Ok(0));
        }
        let _ = answers.of("exec delete", shim.delete(id, "e"));
    }

    /// Kill, Wait and Delete: whether the container is gone.
    fn end(&self, tasks: &Tasks, answers: &Answers) -> bool {
        let (shim, id) = (&tasks.shim, self.id.as_str());
        if answers.of("kill", shim.kill(id, "", 9)).is_ok() {
            let _ = answers.of("wait", shim.wait(id, ""));
        }
        answers.of("delete", shim.delete(id, "")).is_ok()
    }

    /// As [`Self::end`], without a limit.
    #[track_caller]
    fn end_surely(&self, tasks: &Tasks) {
        let (shim, id) = (&tasks.shim, self.id.as_str());
        // The container may have ended, or may be gone.
        let _ = shim.kill(id, "", 9);
        if let Ok(code) = shim.wait(id, "") {
            assert_eq!(code, 137, "{id}");
        }
        if let Err(refusal) = shim.delete(id, "") {
            assert_eq!(refusal.code, Some(Code::NOT_FOUND), "{id}: {refusal}");
        }
    }

    fn remove(self, tasks: &Tasks) {
        tasks.remove_bundle(&self.id);
        for fifo in [
            &self.streams.stdin,
            &self.streams.stdout,
            &self.streams.stderr,
        ] {
            fs::remove_file(fifo).unwrap();
        }
    }
}

/// Does `each` with all lives, on some lanes at once, and gives back those for which the answer was yes.
fn with_all<'l>(lives: &[&'l Life], each: impl Fn(&Life) -> bool + Sync) -> Vec<&'l Life> {
    let (next, yes) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    thread::scope(|scope| {
        for _ in 0..LANES {
            scope.spawn(|| {
                while let Some(life) = lives.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if each(life) {
                        yes.lock().unwrap().push(*life);
                    }
                }
            });
        }
    });
    yes.into_inner().unwrap()
}

/// `start` and `delete` for another pod: both end, whatever they say.
fn start_another(daemon: &Daemon, run: &Run, another: &Bundle<'_>, answers: &Answers) {
    let answer = |ran: &Ran| {
        let refusal = Refusal {
            code: Some(Code::UNKNOWN),
            message: ran.text(),
        };
        if ran.status.success() {
            Ok(())
        } else {
            Err(refusal)
        }
    };
    let started = another.start(b"");
    if answers.of("another start", answer(&started)).is_ok() {
        let shim = started_shim(&started, run);
        shim.shutdown(&another.id);
    }
    let _ = answers.of("another delete", answer(&another.delete()));
    daemon.look();
}

fn started_shim(started: &Ran, run: &Run) -> Shim {
    let address = started.address();
    let name = Path::new(&address).file_name().unwrap();
    let address = format!("unix://{}", text(&run.folder.join("s").join(name)));
    Shim::connect_at(started, &address)
}

/// The sandbox of the pod: a task for which our shim runs no process.
fn sandbox(group: &Group<'_>) {
    group
        .create_with("pod", "exec sleep 100000", |spec| {
            spec["annotations"] = json!({
                "io.kubernetes.cri.container-type": "sandbox",
                "io.kubernetes.cri.sandbox-id": "pod",
                "io.kubernetes.cri.sandbox-name": "limits",
                "io.kubernetes.cri.sandbox-namespace": "default",
            });
        })
        .unwrap();
    group.shim.start("pod", "").unwrap();
}

/// Does `end_all`, which frees descriptors, while a caller waits for whose connection there is no descriptor. The wait
/// costs the shim nothing, and ends with an answer.
fn with_a_caller_who_waits<T>(tasks: &Tasks, shim: i32, end_all: impl FnOnce() -> T) -> T {
    let before = proc::cpu_time(shim);
    thread::scope(|scope| {
        let caller = scope.spawn(|| tasks.connect().state("pod", ""));
        thread::sleep(Duration::from_secs(1));
        let spent = proc::cpu_time(shim) - before;
        assert!(
            spent < Duration::from_millis(300),
            "{spent:?} of processor time in a second"
        );
        let ended = end_all();
        caller.join().unwrap().unwrap();
        ended
    })
}

fn try_limit(daemon: Daemon, limit: Limit) {
    let run = Run::make(&daemon);
    let group = Group::start_of(
        &daemon,
        run.bundle(&daemon, "pod"),
        Some(run.folder.join("s")),
    );
    let another = run.bundle(&daemon, "another");
    let another = {
        let spec = another.plain_spec(&["true"]);
        another.write_spec(&spec)
    };
    sandbox(&group);
    let tasks: &Tasks = &group;
    let shim = Process::of(group.shim.pids_of("pod").unwrap().shim_pid.cast_signed()).unwrap();
    let fds = || {
        fs::read_dir(format!("/proc/{}/fd", shim.pid))
            .unwrap()
            .count()
    };
    let prepare = |name: &str, count: usize| -> Vec<Life> {
        let each =
            (0..count).map(|number| Life::prepare(&daemon, tasks, &format!("{name}{number}")));
        each.collect()
    };
    // One life makes what is made once.
    let first = prepare("first", 1);
    assert!(first[0].begin(tasks, &Answers::default()));
    first[0].end_surely(tasks);
    let idle = fds();
    let (old, new, later) = (
        prepare("old", 2),
        prepare("new", lives()),
        prepare("later", 2),
    );
    for life in &old {
        assert!(life.begin(tasks, &Answers::default()));
    }

    let answers = Answers::default();
    let lift = limit.impose(&daemon, shim.pid, &run);
    let all: Vec<&Life> = new.iter().collect();
    let begun = with_all(&all, |life| life.begin(tasks, &answers));
    if matches!(limit, Limit::FullRun | Limit::NoInode | Limit::ReadOnlyRun) {
        start_another(&daemon, &run, &another, &answers);
    }
    // One that was there before the limit is ended under the limit.
    let all_begun = [&begun[..], &[&old[0]]].concat();
    let end_all = || with_all(&all_begun, |life| life.end(tasks, &answers));
    let ended = if limit == Limit::Descriptors {
        with_a_caller_who_waits(tasks, shim.pid, end_all)
    } else {
        end_all()
    };
    assert!(shim.alive(), "the shim has ended");
    lift();
    eprintln!(
        "{limit:?}: {} lives, {} begun, {} ended{}",
        new.len(),
        begun.len(),
        ended.len(),
        answers.report()
    );
    assert!(answers.refused() > 0, "{limit:?} refuses nothing");

    // Without the limit all that is left can be ended, and new ones live.
    assert!(tasks.connect().state("pod", "").is_ok());
    for life in all.into_iter().chain(&old) {
        life.end_surely(tasks);
    }
    let whole = Answers::default();
    for life in &later {
        assert!(life.begin(tasks, &whole) && life.end(tasks, &whole));
    }
    assert_eq!(whole.refused(), 0, "{}", whole.report());
    eventually(Duration::from_secs(5), || {
        ok_if(fds() <= idle, || {
            format!("{} descriptors, {idle} before", fds())
        })
    });
    for life in [first, old, new, later].into_iter().flatten() {
        life.remove(tasks);
    }
    group.shim.kill("pod", "", 9).unwrap();
    group.shim.wait("pod", "").unwrap();
    group.shim.delete("pod", "").unwrap();
    assert!(shim.alive());
    // A failed create under a limit may leave something to the end of the pod: what has to be undone by a runc.
    group.end_and_delete();
    eventually(Duration::from_secs(5), || {
        ok_if(run.left(&daemon).is_empty(), || {
            format!("{:?}", run.left(&daemon))
        })
    });
    drop(another);
    run.unmount();
    for cgroup in leaks::cgroups(&daemon.names) {
        if cgroup.ends_with("limited") {
            fs::remove_dir(cgroup).unwrap();
        }
    }
    daemon.end();
}

on_the_newest_containerd! {
    fn descriptors(version) {
        try_limit(Daemon::start(version), Limit::Descriptors);
    }

    fn pids(version) {
        try_limit(Daemon::start(version), Limit::Pids);
    }

    fn no_free_pid(version) {
        try_limit(Daemon::start(version), Limit::NoFreePid);
    }

    fn memory(version) {
        try_limit(Daemon::start(version), Limit::Memory);
    }

    fn a_full_run(version) {
        try_limit(Daemon::start(version), Limit::FullRun);
    }

    fn a_run_without_inodes(version) {
        try_limit(Daemon::start(version), Limit::NoInode);
    }

    fn a_read_only_run(version) {
        try_limit(Daemon::start(version), Limit::ReadOnlyRun);
    }
}
