//! Traces a process with ptrace(2): records its system calls, lets one of them fail, or kills the process at one.
//!
//! ```text
//!   a system call begins ──▶ is it the point? ── no ───────────▶ goes on
//!                               │ fail: the kernel is given no call (number -1), and the caller the error
//!                               └ kill: SIGKILL to the process
//! ```
//!
//! All threads of the process are traced, those to come, too, and its children until they execute another program. So
//! nothing of runc is traced. Tracing ends with the tracer's thread: the kernel then detaches whatever is traced.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::syscalls::{self, Argument};

/// `PTRACE_EVENT_STOP`, the first stop of a task that is traced, and a group stop.
const EVENT_STOP: i32 = 128;
/// `PTRACE_SYSCALL_INFO_ENTRY`, and the stop at the end of a system call.
const ENTRY: u8 = 1;
const EXIT: u8 = 2;
/// A process whose tasks make no system call for so long has done what it was asked for.
const QUIET: Duration = Duration::from_millis(60);

/// A system call that was made.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    /// The name: `openat`.
    pub(crate) name: &'static str,
    /// Which call this is.
    pub(crate) place: Place,
    /// The path, or what the descriptor leads to.
    pub(crate) on: String,
    /// The second argument: the command of a fcntl.
    pub(crate) command: u64,
    /// The third argument: the address of a new limit.
    pub(crate) limit: u64,
}

/// A system call of a process, named so that another run of the same process makes the same call.
///
/// Threads change the order of the calls from run to run. So a place is the name, what the call is about, and the number
/// of such calls before and with this one: `openat(config.json)#1`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place(pub(crate) String);

/// What happens at a place.
#[derive(Clone, Debug)]
pub(crate) enum Deed {
    /// Nothing: the calls are recorded.
    Watch,
    /// The call fails with this error, and is not made.
    Fail(Place, Errno),
    /// SIGKILL to the process before the call.
    Kill(Place),
}

/// Which process is traced.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Target {
    /// A process that runs.
    Running,
    /// The program that a stopped process is about to execute.
    Program,
    /// The first program that a child of that program executes.
    ChildOfProgram,
}

#[derive(Debug, Default)]
struct Seen {
    calls: Vec<Call>,
    counts: BTreeMap<String, usize>,
    unknown: BTreeSet<i64>,
    done: Option<Call>,
    ended: Option<WaitStatus>,
    last: Option<Instant>,
    /// The program is not traced any more, but its child.
    child_only: bool,
}

/// What a tracer has seen.
#[derive(Debug)]
pub(crate) struct Trace {
    /// The calls, in order.
    pub(crate) calls: Vec<Call>,
    /// The numbers of calls that the table does not know.
    pub(crate) unknown: BTreeSet<i64>,
    /// The call at which something was done.
    pub(crate) done: Option<Call>,
    /// How the process ended, if it did.
    pub(crate) ended: Option<WaitStatus>,
}

/// A thread that traces a process.
#[derive(Debug)]
pub(crate) struct Tracer {
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    pid: Pid,
    thread: JoinHandle<()>,
}

impl Tracer {
    /// Traces `pid` from now on.
    #[track_caller]
    pub(crate) fn attach(pid: i32, target: Target, deed: Deed) -> Self {
        let pid = Pid::from_raw(pid);
        let (seen, stop) = (Arc::default(), Arc::new(AtomicBool::new(false)));
        let (ready, attached) = mpsc::channel();
        let tracing = Tracing {
            pid,
            target,
            recording: target == Target::Running,
            deed,
            seen: Arc::clone(&seen),
            stop: Arc::clone(&stop),
            failing: BTreeMap::new(),
            children: BTreeSet::new(),
            waiting: BTreeSet::new(),
            leaving: None,
            ready: Some(ready),
        };
        let thread = std::thread::spawn(move || tracing.run());
        attached
            .recv_timeout(Duration::from_secs(10))
            .unwrap_or_else(|error| panic!("cannot trace {pid}: {error}"));
        Self {
            seen,
            stop,
            pid,
            thread,
        }
    }

    /// Returns when the deed is done, or when the process has made no system call for a while.
    pub(crate) fn settle(&self) {
        loop {
            let seen = self.seen.lock().unwrap();
            let still = seen.last.is_none_or(|last| last.elapsed() > QUIET);
            if seen.done.is_some() || seen.ended.is_some() || still {
                return;
            }
            drop(seen);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// How the traced program has ended; none while it runs.
    pub(crate) fn ended(&self) -> Option<WaitStatus> {
        self.seen.lock().unwrap().ended
    }

    /// The call at which something was done.
    pub(crate) fn done(&self) -> Option<Call> {
        self.seen.lock().unwrap().done.clone()
    }

    /// Whether the program itself is not traced any more, but its child.
    pub(crate) fn has_left_the_program(&self) -> bool {
        self.seen.lock().unwrap().child_only
    }

    /// Waits for the end of the process, for no longer than half a second.
    pub(crate) fn wait_for_the_end(&self) {
        for _ in 0..100 {
            if self.ended().is_some() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Stops tracing.
    pub(crate) fn end(self) -> Trace {
        self.stop.store(true, Ordering::SeqCst);
        // The tracer sees the signal, and the process does not.
        let pid = match self.seen.lock().unwrap().ended {
            Some(_) => None,
            None => Some(self.pid),
        };
        if let Some(pid) = pid {
            let _ = kill(pid, Signal::SIGCONT);
        }
        let _ = self.thread.join();
        let mut seen = self.seen.lock().unwrap();
        Trace {
            calls: std::mem::take(&mut seen.calls),
            unknown: std::mem::take(&mut seen.unknown),
            done: seen.done.take(),
            ended: seen.ended.take(),
        }
    }
}

struct Tracing {
    pid: Pid,
    target: Target,
    recording: bool,
    deed: Deed,
    seen: Arc<Mutex<Seen>>,
    stop: Arc<AtomicBool>,
    /// Tasks in a call that fails.
    failing: BTreeMap<Pid, Errno>,
    /// Children that have not executed their program.
    children: BTreeSet<Pid>,
    /// Tasks that have not stopped for the first time.
    waiting: BTreeSet<Pid>,
    /// The program that is let go at its next stop, because its child is traced from now on.
    leaving: Option<Pid>,
    ready: Option<mpsc::Sender<()>>,
}

impl Tracing {
    fn run(mut self) {
        let options = Options::PTRACE_O_TRACESYSGOOD
            | Options::PTRACE_O_TRACECLONE
            | Options::PTRACE_O_TRACEFORK
            | Options::PTRACE_O_TRACEVFORK
            | Options::PTRACE_O_TRACEEXEC;
        for task in tasks(self.pid) {
            // A task may end at any time.
            if ptrace::seize(task, options).is_ok() {
                self.waiting.insert(task);
                let _ = ptrace::interrupt(task);
            }
        }
        if self.target != Target::Running {
            let _ = kill(self.pid, Signal::SIGCONT);
        }
        let any = Pid::from_raw(-1);
        while !self.stop.load(Ordering::SeqCst) {
            match waitpid(any, Some(WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD)) {
                Ok(status) => self.take_in(status),
                Err(Errno::EINTR) => {}
                Err(_) => break,
            }
        }
    }

    fn take_in(&mut self, status: WaitStatus) {
        if self.leaving.is_some() && status.pid() == self.leaving {
            let signal = if let WaitStatus::Stopped(_, signal) = status {
                Some(signal)
            } else {
                None
            };
            let _ = ptrace::detach(self.leaving.take().unwrap(), signal);
            self.seen.lock().unwrap().child_only = true;
            return;
        }
        match status {
            WaitStatus::PtraceSyscall(task) => {
                self.at_call(task);
                let _ = ptrace::syscall(task, None);
            }
            WaitStatus::PtraceEvent(task, _, EVENT_STOP) => {
                self.waiting.remove(&task);
                let _ = ptrace::syscall(task, None);
            }
            WaitStatus::PtraceEvent(task, _, libc::PTRACE_EVENT_EXEC) => self.executed(task),
            WaitStatus::PtraceEvent(task, _, event) => {
                if event != libc::PTRACE_EVENT_CLONE
                    && let Ok(child) = ptrace::getevent(task)
                    && let Ok(child) = i32::try_from(child)
                {
                    self.children.insert(Pid::from_raw(child));
                }
                let _ = ptrace::syscall(task, None);
            }
            WaitStatus::Stopped(task, signal) => {
                // SIGCONT wakes the tracer, see `Tracer::end`.
                let signal = (signal != Signal::SIGCONT).then_some(signal);
                let _ = ptrace::syscall(task, signal);
            }
            WaitStatus::Exited(task, _) | WaitStatus::Signaled(task, _, _) => {
                self.waiting.remove(&task);
                if task == self.pid {
                    self.seen.lock().unwrap().ended = Some(status);
                }
            }
            WaitStatus::Continued(_) | WaitStatus::StillAlive => {}
        }
        if self.waiting.is_empty()
            && let Some(ready) = self.ready.take()
        {
            let _ = ready.send(());
        }
    }

    /// A task has executed a program.
    fn executed(&mut self, task: Pid) {
        if task == self.pid && self.target == Target::Program {
            self.recording = true;
            let _ = ptrace::syscall(task, None);
        } else if task == self.pid && !self.recording {
            let _ = ptrace::syscall(task, None);
        } else if self.target == Target::ChildOfProgram && !self.recording {
            self.children.remove(&task);
            self.recording = true;
            // The program waits for its child in vfork(2), and cannot be detached before its next stop.
            self.leaving = Some(self.pid);
            self.pid = task;
            let _ = ptrace::syscall(task, None);
        } else {
            self.children.remove(&task);
            let _ = ptrace::detach(task, None);
        }
    }

    /// Whether this task's calls count.
    fn counts(&self, task: Pid) -> bool {
        self.recording
            && (self.target != Target::ChildOfProgram
                || task == self.pid
                || self.children.contains(&task)
                || fs::exists(format!("/proc/{}/task/{task}", self.pid)).unwrap_or(false))
    }

    fn at_call(&mut self, task: Pid) {
        let Ok(info) = ptrace::syscall_info(task) else {
            return;
        };
        if info.op == EXIT {
            if let Some(errno) = self.failing.remove(&task)
                && let Ok(mut registers) = ptrace::getregs(task)
            {
                registers.rax = (-i64::from(errno as i32)).cast_unsigned();
                let _ = ptrace::setregs(task, registers);
            }
            return;
        }
        let Ok(mut registers) = ptrace::getregs(task) else {
            return;
        };
        if info.op != ENTRY || !self.counts(task) {
            return;
        }
        let number = registers.orig_rax.cast_signed();
        let arguments = [registers.rdi, registers.rsi, registers.rdx];
        let Some(call) = self.record(task, number, arguments) else {
            return;
        };
        match self.deed.clone() {
            Deed::Fail(place, errno) if call.is_at(&place) => {
                registers.orig_rax = u64::MAX;
                if ptrace::setregs(task, registers).is_ok() {
                    self.failing.insert(task, errno);
                    self.seen.lock().unwrap().done = Some(call);
                }
            }
            Deed::Kill(place) if call.is_at(&place) => {
                let _ = kill(self.pid, Signal::SIGKILL);
                self.seen.lock().unwrap().done = Some(call);
            }
            Deed::Watch | Deed::Fail(..) | Deed::Kill(_) => {}
        }
    }

    fn record(&self, task: Pid, number: i64, arguments: [u64; 3]) -> Option<Call> {
        let mut seen = self.seen.lock().unwrap();
        seen.last = Some(Instant::now());
        let Some(known) = syscalls::by_number(number) else {
            seen.unknown.insert(number);
            return None;
        };
        let on = shown(task, known.argument, arguments);
        let by_child = self.children.contains(&task);
        let what = format!("{}({})", known.name, short(&on, by_child));
        let count = seen.counts.entry(what.clone()).or_default();
        *count += 1;
        let call = Call {
            name: known.name,
            place: Place(format!("{what}#{count}")),
            on,
            command: arguments[1],
            limit: arguments[2],
        };
        seen.calls.push(call.clone());
        Some(call)
    }
}

impl Call {
    fn is_at(&self, place: &Place) -> bool {
        self.place == *place
    }
}

fn tasks(pid: Pid) -> Vec<Pid> {
    let entries = fs::read_dir(format!("/proc/{pid}/task"))
        .into_iter()
        .flatten();
    let names = entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok());
    names
        .filter_map(|name| name.parse().ok().map(Pid::from_raw))
        .collect()
}

/// The object of a call: a path in the caller's memory, or what a descriptor leads to.
fn shown(task: Pid, argument: Argument, arguments: [u64; 3]) -> String {
    match argument {
        Argument::None => String::new(),
        Argument::Path(at) => path(task, arguments[at]),
        Argument::Descriptor => {
            let number = arguments[0];
            let Ok(link) = fs::read_link(format!("/proc/{task}/fd/{number}")) else {
                return format!("descriptor {number}");
            };
            let link = link.display().to_string();
            match link.strip_prefix("socket:[") {
                Some(inode) => socket(inode.trim_end_matches(']'), arguments[2]).to_owned(),
                None => link,
            }
        }
    }
}

/// Whose socket that is. `length` is the length of a read or a write. Pairs of sockets inside the process are known by
/// it: tokio's for signals (128 bytes are read, one is written) and the standard library's for the outcome of an execve
/// (8 bytes are read).
fn socket(inode: &str, length: u64) -> &'static str {
    let table = fs::read_to_string("/proc/net/unix").unwrap_or_default();
    let row = table.lines().find_map(|line| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        (fields.get(6) == Some(&inode)).then_some(fields)
    });
    match row {
        // The path of the listening socket, which accepted sockets have, too.
        Some(row) if row.len() > 7 => syscalls::CALLER,
        _ if [1, 8, 128].contains(&length) => syscalls::OWN,
        _ => syscalls::CONTAINERD,
    }
}

/// The last name of a path, without the numbers that differ from run to run.
fn short(on: &str, by_child: bool) -> String {
    let name = on.rsplit('/').next().unwrap_or_default();
    let name = name.split_once(":[").map_or(name, |(kind, _)| kind);
    let name: String = name.chars().filter(|c| !c.is_ascii_digit()).collect();
    if by_child {
        format!("child {name}")
    } else {
        name
    }
}

fn path(task: Pid, address: u64) -> String {
    let mut bytes = vec![0; 256];
    let read = fs::File::open(format!("/proc/{task}/mem"))
        .and_then(|memory| memory.read_at(&mut bytes, address));
    bytes.truncate(read.unwrap_or(0));
    let end = bytes.iter().position(|byte| *byte == 0);
    String::from_utf8_lossy(&bytes[..end.unwrap_or(bytes.len())]).into_owned()
}
