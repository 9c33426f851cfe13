//! One shim and its containers, brought to the state in which a call is made, and brought down again with every promise
//! of the shim checked.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use containerd_shim_protos::api::{DeleteResponse, Empty};
use containerd_shim_protos::api::{ResizePtyRequest, UpdateTaskRequest};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::sandbox_api::{
    CreateSandboxRequest, CreateSandboxResponse, SandboxStatusRequest, SandboxStatusResponse,
    ShutdownSandboxRequest, ShutdownSandboxResponse, StartSandboxRequest, StartSandboxResponse,
    StopSandboxRequest, StopSandboxResponse,
};
use containerd_shim_protos::ttrpc::Code;
use containerd_shim_protos::types::mount::Mount;
use nix::sys::wait::WaitStatus;
use prost::Message as _;
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use serde_json::{Value, json};
use shim_tests::calls::{Answer, Refusal, Shim, Streams};
use shim_tests::daemon::Events;
use shim_tests::driver::CONFIG;
use shim_tests::proc::Process;
use shim_tests::raw::{Bundle, Ran};
use shim_tests::slot::text;
use shim_tests::{Daemon, PodSpec};

use crate::tracer::{Deed, Target, Tracer};

/// How long anything may take on a machine that is not starved.
pub(crate) const BOUND: Duration = Duration::from_secs(5);
/// How long a call may take.
pub(crate) const ANSWER: Duration = Duration::from_secs(10);

const TASK: &str = "containerd.task.v2.Task";
const SANDBOX: &str = "containerd.runtime.sandbox.v1.Sandbox";

/// What runs in a shim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A container with an overlay as its root, and FIFOs.
    Container,
    /// The same, with a program that ends at once.
    ShortContainer,
    /// The same, on a terminal.
    Terminal,
    /// A pod's sandbox in podsandbox mode, held by a thread.
    Sandbox,
    /// A pod's sandbox through the Sandbox API.
    SandboxApi,
}

/// How far a life has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Level {
    /// `start` has run.
    Shim,
    /// Create, or `CreateSandbox`.
    Created,
    /// Start, or `StartSandbox`.
    Running,
    /// Exec.
    ExecAdded,
    /// Start of the exec.
    ExecRunning,
    /// Kill and Wait of the exec.
    ExecEnded,
    /// Pause.
    Paused,
    /// Kill and Wait, or `StopSandbox`.
    Ended,
    /// Delete.
    Deleted,
}

/// The ground on which lives run.
pub(crate) struct Ground<'a> {
    /// The containerd that takes the events.
    pub(crate) daemon: &'a Daemon,
    /// The events.
    pub(crate) events: &'a Events,
    /// A root filesystem for everybody.
    pub(crate) root: PathBuf,
    /// The path of a network namespace.
    pub(crate) network: PathBuf,
}

/// One shim and its containers.
pub(crate) struct Life<'a> {
    ground: &'a Ground<'a>,
    /// What runs.
    pub(crate) kind: Kind,
    /// The id of the container or the sandbox.
    pub(crate) id: String,
    bundle: Bundle<'a>,
    /// The bundle of another container.
    other: PathBuf,
    /// The bundle of a container that has a whole life afterwards.
    later: PathBuf,
    address: String,
    shim: Option<Shim>,
    sandbox: Option<Shim>,
    server: Option<Process>,
    streams: Streams,
    /// How many descriptors the server has open without a fault when nothing happens any more.
    pub(crate) most_descriptors: usize,
    /// Whether containerd may get an event twice.
    pub(crate) may_repeat_events: bool,
    _reader: Reader,
}

/// Reads FIFOs until dropped, as containerd does.
struct Reader {
    stop: Arc<AtomicBool>,
}

impl Reader {
    fn of(fifos: Vec<File>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while !stopped.load(Ordering::Relaxed) {
                for mut fifo in &fifos {
                    while fifo.read(&mut bytes).is_ok_and(|read| read > 0) {}
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        Self { stop }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Asks until the answer is `Ok`, for no longer than `bound`.
pub(crate) fn soon<T>(
    bound: Duration,
    mut what: impl FnMut() -> Result<T, String>,
) -> Result<T, String> {
    let end = Instant::now() + bound;
    loop {
        match what() {
            Err(why) if Instant::now() >= end => {
                return Err(format!("not within {bound:?}: {why}"));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
            Ok(value) => return Ok(value),
        }
    }
}

/// `Ok` also for what is not there, or is in another state.
fn or_gone<T>(what: &str, answer: Answer<T>) -> Result<(), String> {
    match answer {
        Ok(_) => Ok(()),
        Err(Refusal {
            code: Some(Code::NOT_FOUND | Code::FAILED_PRECONDITION),
            ..
        }) => Ok(()),
        Err(refusal) => Err(format!("{what}: {refusal}")),
    }
}

fn must<T>(what: &str, answer: Answer<T>) -> Result<T, String> {
    answer.map_err(|refusal| format!("{what}: {refusal}"))
}

/// Runs `start` or `delete`, traced if `tracing` is there.
pub(crate) fn run(
    command: Command,
    tracing: Option<(Target, Deed)>,
) -> Result<(Ran, Option<Tracer>), String> {
    let mut command = match &tracing {
        Some(_) => stopped(&command),
        None => command,
    };
    let (mut from, into) = std::io::pipe().map_err(|error| error.to_string())?;
    let mut child = command
        .stdin(Stdio::null())
        .stdout(into.try_clone().map_err(|error| error.to_string())?)
        .stderr(into)
        .spawn()
        .map_err(|error| error.to_string())?;
    drop(command);
    let pid = child.id().cast_signed();
    let tracer = match tracing {
        Some((target, deed)) => {
            soon(BOUND, || match Process::of(pid) {
                Some(process) if process.state == 'T' => Ok(()),
                other => Err(format!("not stopped: {other:?}")),
            })?;
            Some(Tracer::attach(pid, target, deed))
        }
        None => None,
    };
    // Only the tracer may wait for a process that it traces.
    let status = soon(ANSWER, || match &tracer {
        Some(tracer) if !tracer.has_left_the_program() => match tracer.ended() {
            Some(status) => Ok(exit_status(status)),
            None => Err(format!("still runs: {:?}", Process::of(pid))),
        },
        _ => match child.try_wait() {
            Ok(Some(status)) => Ok(status),
            // The tracer has waited for it: killed before it could go on.
            Err(error) if error.raw_os_error() == Some(libc::ECHILD) => {
                Ok(ExitStatus::from_raw(1 << 8))
            }
            other => Err(format!("still runs: {other:?}")),
        },
    })?;
    let reader = std::thread::spawn(move || {
        let mut output = Vec::new();
        from.read_to_end(&mut output).map(|_| output)
    });
    soon(BOUND, || match reader.is_finished() {
        true => Ok(()),
        false => Err("somebody keeps the output open".to_owned()),
    })?;
    let output = reader.join().ok().and_then(Result::ok).unwrap_or_default();
    Ok((Ran { status, output }, tracer))
}

/// The same command, stopped before the program is executed.
fn stopped(command: &Command) -> Command {
    let mut shell = Command::new("/bin/sh");
    shell
        .args(["-c", "kill -STOP $$; exec \"$@\"", "sh"])
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => shell.env(name, value),
            None => shell.env_remove(name),
        };
    }
    if let Some(directory) = command.get_current_dir() {
        shell.current_dir(directory);
    }
    shell
}

fn exit_status(status: WaitStatus) -> ExitStatus {
    match status {
        WaitStatus::Exited(_, code) => ExitStatus::from_raw(code << 8),
        WaitStatus::Signaled(_, signal, _) => ExitStatus::from_raw(signal as i32),
        WaitStatus::Stopped(..)
        | WaitStatus::PtraceEvent(..)
        | WaitStatus::PtraceSyscall(_)
        | WaitStatus::Continued(_)
        | WaitStatus::StillAlive => ExitStatus::from_raw(0),
    }
}

impl<'a> Life<'a> {
    /// A life in which nothing has happened.
    pub(crate) fn new(ground: &'a Ground<'a>, kind: Kind, id: &str) -> Self {
        let bundle = Bundle::empty(ground.daemon, id);
        let folder = bundle.path.join("streams");
        fs::create_dir_all(&folder).unwrap();
        let open = |name: &str| {
            let path = folder.join(name);
            mknodat(CWD, &path, FileType::Fifo, Mode::from_raw_mode(0o600), 0).unwrap();
            File::options()
                .read(true)
                .write(true)
                .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
                .open(&path)
                .unwrap()
        };
        let reader = Reader::of(
            ["stdin", "stdout", "stderr"]
                .map(open)
                .into_iter()
                .skip(1)
                .collect(),
        );
        let terminal = kind == Kind::Terminal;
        let name = |name| match (terminal, name) {
            (true, "stderr") => String::new(),
            _ => text(&folder.join(name)),
        };
        let streams = Streams {
            stdin: name("stdin"),
            stdout: name("stdout"),
            stderr: name("stderr"),
            terminal,
        };
        let [other, later] = ["other", "later"].map(|name| bundle.path.join(name));
        let life = Self {
            ground,
            kind,
            id: id.to_owned(),
            other,
            later,
            address: String::new(),
            shim: None,
            sandbox: None,
            server: None,
            streams,
            most_descriptors: usize::MAX,
            may_repeat_events: false,
            _reader: reader,
            bundle,
        };
        life.write_specs();
        life
    }

    fn write_specs(&self) {
        let spec = match self.kind {
            Kind::SandboxApi => None,
            Kind::Sandbox => {
                let mut spec = self.bundle.sandbox_spec(&text(&self.ground.network));
                // No pid namespace for the sandbox: a thread holds the rest.
                let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
                namespaces.retain(|namespace| namespace["type"] != "pid");
                Some(spec)
            }
            Kind::ShortContainer => Some(self.spec(&["sh", "-c", "echo out; exit 3"])),
            Kind::Container | Kind::Terminal => Some(self.spec(&["sleep", "3600"])),
        };
        if let Some(spec) = spec {
            let file = self.bundle.path.join("config.json");
            fs::write(file, spec.to_string()).unwrap();
        }
        for (bundle, id) in [
            (&self.other, self.other_id()),
            (&self.later, self.later_id()),
        ] {
            fs::create_dir_all(bundle.join("rootfs")).unwrap();
            let mut spec = self.spec(&["sleep", "3600"]);
            spec["process"]["terminal"] = json!(false);
            let group = format!("{}/{id}", self.ground.daemon.names.cgroup_parent());
            spec["linux"]["cgroupsPath"] = json!(group);
            fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
            self.ground.daemon.expect_task(&id);
        }
    }

    fn spec(&self, command: &[&str]) -> Value {
        let mut spec = self
            .bundle
            .spec_with_dev(command, self.kind == Kind::Terminal);
        // The kernel spends most of a container's time on its network namespace.
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.retain(|namespace| namespace["type"] != "network");
        spec
    }

    fn other_id(&self) -> String {
        format!("{}o", self.id)
    }

    fn later_id(&self) -> String {
        format!("{}l", self.id)
    }

    /// The command line of `start` or `delete`.
    pub(crate) fn command(&self, subcommand: &str) -> Command {
        self.bundle.command(subcommand)
    }

    /// Runs `start`.
    pub(crate) fn start_shim(
        &mut self,
        tracing: Option<(Target, Deed)>,
    ) -> Result<(Ran, Option<Tracer>), String> {
        let (ran, tracer) = run(self.command("start"), tracing)?;
        if ran.status.success() {
            self.address = ran.address();
        }
        Ok((ran, tracer))
    }

    /// Connects to the shim.
    pub(crate) fn connect(&mut self) -> Result<(), String> {
        self.shim = Some(Shim::try_dial(&self.address, TASK, ANSWER)?);
        self.sandbox = Some(Shim::try_dial(&self.address, SANDBOX, ANSWER)?);
        if self.server.is_none() {
            let pid = fs::read_to_string(self.bundle.path.join("shim.pid"))
                .map_err(|error| format!("shim.pid: {error}"))?;
            self.server = pid.trim().parse().ok().and_then(Process::of);
        }
        Ok(())
    }

    /// A connection of its own, for another thread.
    pub(crate) fn another_connection(&self) -> Result<Shim, String> {
        Shim::try_dial(&self.address, TASK, ANSWER)
    }

    /// The connection to the Task service.
    pub(crate) fn shim(&self) -> &Shim {
        self.shim.as_ref().unwrap()
    }

    fn sandbox(&self) -> &Shim {
        self.sandbox.as_ref().unwrap()
    }

    /// The server's process.
    pub(crate) fn server(&self) -> &Process {
        self.server.as_ref().unwrap()
    }

    /// Brings the life to a level.
    pub(crate) fn reach(&mut self, level: Level) -> Result<(), String> {
        if level >= Level::Shim {
            let (ran, _) = self.start_shim(None)?;
            if !ran.status.success() {
                return Err(format!("start: {}", ran.text()));
            }
            self.connect()?;
        }
        if level >= Level::Created {
            must("Create", self.create())?;
        }
        if level >= Level::Running {
            must("Start", self.start())?;
        }
        if (Level::ExecAdded..=Level::ExecEnded).contains(&level) {
            must("Exec", self.exec())?;
        }
        if [Level::ExecRunning, Level::ExecEnded].contains(&level) {
            must("Start of the exec", self.shim().start(&self.id, "x"))?;
        }
        if level == Level::ExecEnded {
            must("Kill of the exec", self.end_of("x"))?;
        }
        if level == Level::Paused {
            must("Pause", self.shim().pause(&self.id))?;
        }
        if level >= Level::Ended {
            must("Kill", self.stop())?;
        }
        if level >= Level::Deleted {
            must("Delete", self.delete())?;
        }
        Ok(())
    }

    /// Create, or `CreateSandbox`.
    pub(crate) fn create(&self) -> Answer<()> {
        if self.kind == Kind::SandboxApi {
            return self.create_sandbox();
        }
        let sandbox = self.kind == Kind::Sandbox;
        let streams = if sandbox {
            Streams::default()
        } else {
            self.streams.clone()
        };
        let rootfs = if sandbox {
            Vec::new()
        } else {
            vec![self.overlay(&self.bundle.path)]
        };
        self.shim()
            .create(&self.id, &self.bundle.path, &streams, rootfs)
            .map(drop)
    }

    /// An overlay as containerd's snapshotter makes one.
    fn overlay(&self, bundle: &Path) -> Mount {
        let [upper, work] = ["upper", "overlay-work"].map(|name| bundle.join(name));
        for folder in [&upper, &work] {
            fs::create_dir_all(folder).unwrap();
        }
        Mount {
            type_: "overlay".to_owned(),
            source: "overlay".to_owned(),
            options: vec![
                format!("lowerdir={}", text(&self.ground.root)),
                format!("upperdir={}", text(&upper)),
                format!("workdir={}", text(&work)),
            ],
            ..Mount::default()
        }
    }

    fn create_sandbox(&self) -> Answer<()> {
        let mut config = PodSpec::new(&self.id).config;
        let parent = self.ground.daemon.names.cgroup_parent();
        config.linux.as_mut().unwrap().cgroup_parent = parent;
        let request = CreateSandboxRequest {
            sandbox_id: self.id.clone(),
            bundle_path: text(&self.bundle.path),
            options: Some(Any {
                type_url: CONFIG.to_owned(),
                value: config.encode_to_vec(),
                ..Any::default()
            })
            .into(),
            netns_path: text(&self.ground.network),
            ..CreateSandboxRequest::default()
        };
        self.sandbox()
            .call::<CreateSandboxResponse>("CreateSandbox", &request)
            .map(drop)
    }

    /// Start, or `StartSandbox`.
    pub(crate) fn start(&self) -> Answer<()> {
        if self.kind != Kind::SandboxApi {
            return self.shim().start(&self.id, "").map(drop);
        }
        let request = StartSandboxRequest {
            sandbox_id: self.id.clone(),
            ..StartSandboxRequest::default()
        };
        self.sandbox()
            .call::<StartSandboxResponse>("StartSandbox", &request)
            .map(drop)
    }

    /// `SandboxStatus`.
    pub(crate) fn sandbox_status(&self) -> Answer<()> {
        let request = SandboxStatusRequest {
            sandbox_id: self.id.clone(),
            verbose: true,
            ..SandboxStatusRequest::default()
        };
        self.sandbox()
            .call::<SandboxStatusResponse>("SandboxStatus", &request)
            .map(drop)
    }

    /// Exec `x`, on the container's kind of streams. Its program prints and goes on.
    pub(crate) fn exec(&self) -> Answer<()> {
        self.shim().exec(
            &self.id,
            "x",
            &["sh", "-c", "echo out; sleep 3600"],
            &self.streams,
        )
    }

    /// Exec `y`, whose program ends at once, started and waited for.
    pub(crate) fn short_exec(&self) -> Answer<()> {
        self.shim().exec(
            &self.id,
            "y",
            &["sh", "-c", "echo out; exit 3"],
            &self.streams,
        )?;
        self.shim().start(&self.id, "y")?;
        self.shim().wait(&self.id, "y")?;
        self.shim().delete(&self.id, "y").map(drop)
    }

    /// SIGKILL and Wait of the init (`""`) or an exec.
    pub(crate) fn end_of(&self, exec: &str) -> Answer<()> {
        self.shim().kill(&self.id, exec, 9)?;
        self.shim().wait(&self.id, exec).map(drop)
    }

    /// Kill and Wait, or `StopSandbox`.
    pub(crate) fn stop(&self) -> Answer<()> {
        if self.kind != Kind::SandboxApi {
            return self.end_of("");
        }
        let request = StopSandboxRequest {
            sandbox_id: self.id.clone(),
            ..StopSandboxRequest::default()
        };
        self.sandbox()
            .call::<StopSandboxResponse>("StopSandbox", &request)
            .map(drop)
    }

    /// Delete, or `ShutdownSandbox`.
    pub(crate) fn delete(&self) -> Answer<()> {
        if self.kind != Kind::SandboxApi {
            return self.shim().delete(&self.id, "").map(drop);
        }
        self.shut_down()
    }

    /// Shutdown, or `ShutdownSandbox`.
    pub(crate) fn shut_down(&self) -> Answer<()> {
        if self.kind == Kind::SandboxApi {
            let request = ShutdownSandboxRequest {
                sandbox_id: self.id.clone(),
                ..ShutdownSandboxRequest::default()
            };
            return self
                .sandbox()
                .call::<ShutdownSandboxResponse>("ShutdownSandbox", &request)
                .map(drop);
        }
        self.shim().shutdown(&self.id);
        Ok(())
    }

    /// Update of the memory's limit.
    pub(crate) fn update(&self) -> Answer<()> {
        let limit = json!({"memory": {"limit": 64 << 20}});
        let request = UpdateTaskRequest {
            id: self.id.clone(),
            resources: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources"
                    .to_owned(),
                value: limit.to_string().into_bytes(),
                ..Any::default()
            })
            .into(),
            ..UpdateTaskRequest::default()
        };
        self.shim().call::<Empty>("Update", &request).map(drop)
    }

    /// ResizePty.
    pub(crate) fn resize(&self) -> Answer<()> {
        let request = ResizePtyRequest {
            id: self.id.clone(),
            width: 80,
            height: 25,
            ..ResizePtyRequest::default()
        };
        self.shim().call::<Empty>("ResizePty", &request).map(drop)
    }

    /// Create of the other container.
    pub(crate) fn create_other(&self) -> Answer<()> {
        let rootfs = vec![self.overlay(&self.other)];
        self.shim()
            .create(&self.other_id(), &self.other, &Streams::default(), rootfs)
            .map(drop)
    }

    /// A whole life of a later container in the same shim.
    pub(crate) fn whole_life(&self) -> Result<(), String> {
        let (shim, id) = (self.shim(), self.later_id());
        let (root, no) = (vec![self.overlay(&self.later)], Streams::default());
        must("a later Create", shim.create(&id, &self.later, &no, root))?;
        must("a later Start", shim.start(&id, ""))?;
        must("a later Exec", shim.exec(&id, "y", &["true"], &no))?;
        must("a later Start of an exec", shim.start(&id, "y"))?;
        must("a later Wait for an exec", shim.wait(&id, "y"))?;
        must("a later Delete of an exec", shim.delete(&id, "y"))?;
        must("a later Kill", shim.kill(&id, "", 9))?;
        must("a later Wait", shim.wait(&id, ""))?;
        must("a later Delete", shim.delete(&id, "")).map(drop)
    }

    /// Makes and starts the other container.
    pub(crate) fn run_other(&self) -> Result<(), String> {
        must("Create of another", self.create_other())?;
        must("Start of another", self.shim().start(&self.other_id(), "")).map(drop)
    }

    /// Ends and deletes the other container, if it is there.
    pub(crate) fn take_down_other(&self) -> Result<(), String> {
        let (shim, id) = (self.shim(), self.other_id());
        or_gone("Kill of another", shim.kill(&id, "", 9))?;
        or_gone("Wait for another", shim.wait(&id, ""))?;
        or_gone("Delete of another", shim.delete(&id, ""))
    }

    /// The server answers.
    pub(crate) fn serves(&self) -> Result<(), String> {
        or_gone("State", self.shim().state("nobody", ""))
    }

    /// Closes the connections, as containerd does after Shutdown.
    pub(crate) fn hang_up(&mut self) {
        self.shim = None;
        self.sandbox = None;
    }

    /// As if nothing had happened yet.
    pub(crate) fn forget(&mut self) {
        self.hang_up();
        self.server = None;
        // containerd removes the bundle after `delete`, and makes another.
        for file in [
            "address",
            "shim.pid",
            "shim.started",
            "deleted",
            "pause.json",
            "options.json",
        ] {
            let _ = fs::remove_file(self.bundle.path.join(file));
        }
    }

    /// Ends and deletes everything, as containerd does, after a call that may have failed.
    pub(crate) fn take_down(&self) -> Result<(), String> {
        let (shim, id) = (self.shim(), &self.id);
        if self.kind == Kind::SandboxApi {
            or_gone("SandboxStatus", self.sandbox_status())?;
            return or_gone("StopSandbox", self.stop());
        }
        or_gone("State", shim.state(id, ""))?;
        or_gone("Resume", shim.resume(id))?;
        for exec in ["x", "y"] {
            or_gone("Kill of an exec", shim.kill(id, exec, 9))?;
            if shim.state(id, exec).is_ok_and(|state| state.pid > 0) {
                or_gone("Wait for an exec", shim.wait(id, exec))?;
            }
            or_gone("Delete of an exec", shim.delete(id, exec))?;
        }
        for id in [id, &self.other_id()] {
            or_gone("Kill", shim.kill(id, "", 9))?;
            or_gone("Wait", shim.wait(id, ""))?;
            or_gone("Delete", shim.delete(id, ""))?;
        }
        match shim.state(id, "") {
            Err(Refusal {
                code: Some(Code::NOT_FOUND),
                ..
            }) => Ok(()),
            other => Err(format!("State after Delete: {other:?}")),
        }
    }

    /// The number of descriptors that the server has open when nothing happens any more. An error if they stay more
    /// than they are without a fault.
    pub(crate) fn descriptors_at_rest(&self) -> Result<usize, String> {
        let folder = format!("/proc/{}/fd", self.server().pid);
        let count = || fs::read_dir(&folder).map_or(0, Iterator::count);
        if self.most_descriptors == usize::MAX {
            std::thread::sleep(Duration::from_millis(30));
            return Ok(count());
        }
        soon(BOUND, || {
            let (now, most) = (count(), self.most_descriptors);
            match now <= most {
                true => Ok(now),
                false => {
                    let open = fs::read_dir(&folder).into_iter().flatten().flatten();
                    let links = open.filter_map(|entry| fs::read_link(entry.path()).ok());
                    let links: Vec<_> = links.map(|link| link.display().to_string()).collect();
                    Err(format!(
                        "{now} descriptors, and {most} without the fault: {links:?}"
                    ))
                }
            }
        })
    }

    /// Whether the server runs.
    pub(crate) fn server_is_gone(&self) -> Result<(), String> {
        match Process::of(self.server().pid) {
            Some(now) if now.start == self.server().start && now.state != 'Z' => {
                Err(format!("the server is there: {}", now.describe()))
            }
            _ => Ok(()),
        }
    }

    /// `delete`, as containerd runs it for a shim that is out of reach.
    pub(crate) fn run_delete(&self) -> Result<(), String> {
        let begun = Instant::now();
        let (ran, _) = run(self.command("delete"), None)?;
        if !ran.status.success() {
            return Err(format!("delete: {}", ran.text()));
        }
        let response = DeleteResponse::parse_from_bytes(&ran.output)
            .map_err(|error| format!("delete's answer: {error}: {}", ran.text()))?;
        if response.exit_status != 137 {
            return Err(format!("delete's answer: {response:?}"));
        }
        let took = begun.elapsed();
        if took > BOUND {
            return Err(format!("delete took {took:?}"));
        }
        Ok(())
    }

    /// Nothing is left but the bundle, which containerd removes.
    pub(crate) fn nothing_left(&self) -> Result<(), String> {
        soon(BOUND, || {
            let mut left = self.ground.daemon.left();
            left.retain(|line| {
                // containerd removes the bundle, with the FIFOs and sockets there.
                let inside = format!("socket or FIFO {}/", self.bundle.path.display());
                !line.starts_with("bundle ")
                    && !line.starts_with(&inside)
                    && *line != format!("mount {}", self.ground.network.display())
            });
            match left.is_empty() {
                true => Ok(()),
                false => Err(format!("left: {}", left.join("; "))),
            }
        })
    }

    /// Every start has its exit, and nothing ends or is deleted twice.
    pub(crate) fn events_are_whole(&self) -> Result<(), String> {
        if self.kind == Kind::SandboxApi {
            return Ok(());
        }
        soon(BOUND, || {
            for id in [self.id.clone(), self.other_id(), self.later_id()] {
                let mut topics = self.ground.events.of(&id);
                if self.may_repeat_events {
                    topics.dedup();
                }
                let count = |topic: &str| topics.iter().filter(|seen| *seen == topic).count();
                let started = count("start");
                let wrong = count("exit") > 1
                    || count("exit") < started
                    || count("create") != count("delete")
                    || ["x", "y"].iter().any(|exec| {
                        let ended = count(&format!("exit:{exec}"));
                        ended > 1 || ended < count(&format!("exec-started:{exec}"))
                    });
                if wrong {
                    return Err(format!("events of {id}: {topics:?}"));
                }
            }
            Ok(())
        })
    }

    /// What the shim has logged.
    pub(crate) fn log(&self) -> String {
        let mut bytes = [0; 65536];
        let read = File::options()
            .read(true)
            .custom_flags(OFlags::NONBLOCK.bits().cast_signed())
            .open(self.bundle.path.join("log"))
            .and_then(|mut log| log.read(&mut bytes))
            .unwrap_or(0);
        String::from_utf8_lossy(&bytes[..read]).into_owned()
    }

    /// Ends what a finding has left, for the next life.
    pub(crate) fn clean_up(&self) {
        if let Some(server) = &self.server
            && server.alive()
        {
            shim_tests::proc::kill(server.pid, rustix::process::Signal::KILL);
        }
        let _ = run(self.command("delete"), None);
        let _ = run(self.command("delete"), None);
        for process in self.ground.daemon.processes() {
            if process.alive() {
                shim_tests::proc::kill(process.pid, rustix::process::Signal::KILL);
            }
        }
        let _ = run(self.command("delete"), None);
        let names = &self.ground.daemon.names;
        for mount in shim_tests::leaks::mounts(names).iter().rev() {
            if *mount != self.ground.network {
                let _ = rustix::mount::unmount(mount, rustix::mount::UnmountFlags::DETACH);
            }
        }
        for group in shim_tests::leaks::cgroups(names).iter().rev() {
            let _ = fs::remove_dir(group);
        }
        for id in [self.id.clone(), self.other_id(), self.later_id()] {
            let state = Path::new("/run/containerd/runc").join(names.name());
            let _ = fs::remove_dir_all(state.join(id));
        }
        let task = shim_tests::leaks::TaskId {
            namespace: names.name(),
            id: self.id.clone(),
        };
        let address = shim_tests::leaks::grpc_address(names);
        let _ = fs::remove_file(shim_tests::leaks::shim_socket(&address, &task));
    }
}
