//! Each call of the Task service by itself, driven directly: the answers, the refusals and their codes, the events. The
//! stock shim must fulfil the same expectations; where the stock shim does not, the test says so.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use containerd_shim_protos::api::{
    CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse,
    DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest,
    StateRequest, StateResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::ttrpc::Code;
use serde_json::{Value, json};
use shim_tests::calls::{Answer, Shim};
use shim_tests::cgroups::{self, Hierarchy};
use shim_tests::raw::Bundle;
use shim_tests::until::ok_if;
use shim_tests::{Daemon, ShimUnderTest, eventually, on_every_containerd};

const SLEEP: &[&str] = &["sleep", "3600"];

fn is_our_shim() -> bool {
    ShimUnderTest::get() == ShimUnderTest::Pause
}

/// A shim and a container.
struct Task<'a> {
    bundle: Bundle<'a>,
    shim: Shim,
    pid: u32,
}

impl<'a> Task<'a> {
    #[track_caller]
    fn create(daemon: &'a Daemon, id: &str, command: &[&str]) -> Self {
        Self::from_bundle(Bundle::new(daemon, id), command)
    }

    #[track_caller]
    fn from_bundle(bundle: Bundle<'a>, command: &[&str]) -> Self {
        let spec = bundle.plain_spec(command);
        let bundle = bundle.write_spec(&spec);
        let shim = Shim::connect(&bundle.start(b""));
        let pid = bundle.create(&shim).unwrap();
        Self { bundle, shim, pid }
    }

    #[track_caller]
    fn run(daemon: &'a Daemon, id: &str, command: &[&str]) -> Self {
        let task = Self::create(daemon, id, command);
        assert_eq!(task.start("").unwrap(), task.pid);
        task
    }

    fn id(&self) -> String {
        self.bundle.id.clone()
    }

    fn start(&self, exec: &str) -> Answer<u32> {
        self.shim.start(&self.bundle.id, exec)
    }

    fn start_request(&self, exec: &str) -> StartRequest {
        StartRequest {
            id: self.id(),
            exec_id: exec.to_owned(),
            ..StartRequest::default()
        }
    }

    #[track_caller]
    fn state(&self, exec: &str) -> StateResponse {
        self.shim.call("State", &self.state_request(exec)).unwrap()
    }

    fn state_request(&self, exec: &str) -> StateRequest {
        StateRequest {
            id: self.id(),
            exec_id: exec.to_owned(),
            ..StateRequest::default()
        }
    }

    #[track_caller]
    fn status(&self, exec: &str) -> Status {
        self.state(exec).status.unwrap()
    }

    fn kill_request(&self, exec: &str, signal: u32, all: bool) -> KillRequest {
        KillRequest {
            id: self.id(),
            exec_id: exec.to_owned(),
            signal,
            all,
            ..KillRequest::default()
        }
    }

    #[track_caller]
    fn kill(&self, exec: &str, signal: u32) {
        let _: Empty = self
            .shim
            .call("Kill", &self.kill_request(exec, signal, false))
            .unwrap();
    }

    #[track_caller]
    fn wait(&self, exec: &str) -> WaitResponse {
        self.shim.call("Wait", &self.wait_request(exec)).unwrap()
    }

    fn wait_request(&self, exec: &str) -> WaitRequest {
        WaitRequest {
            id: self.id(),
            exec_id: exec.to_owned(),
            ..WaitRequest::default()
        }
    }

    fn delete_request(&self, exec: &str) -> DeleteRequest {
        DeleteRequest {
            id: self.id(),
            exec_id: exec.to_owned(),
            ..DeleteRequest::default()
        }
    }

    fn delete(&self, exec: &str) -> Answer<DeleteResponse> {
        self.shim.call("Delete", &self.delete_request(exec))
    }

    fn exec_request(&self, exec: &str, process: &[u8]) -> ExecProcessRequest {
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned(),
            value: process.to_owned(),
            ..Any::default()
        };
        ExecProcessRequest {
            id: self.id(),
            exec_id: exec.to_owned(),
            spec: Some(spec).into(),
            ..ExecProcessRequest::default()
        }
    }

    #[track_caller]
    fn exec(&self, exec: &str, command: &[&str]) {
        let request = self.exec_request(exec, &process_json(command));
        let _: Empty = self.shim.call("Exec", &request).unwrap();
    }

    fn update_request(&self, resources: &[u8]) -> UpdateTaskRequest {
        let resources = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned(),
            value: resources.to_owned(),
            ..Any::default()
        };
        UpdateTaskRequest {
            id: self.id(),
            resources: Some(resources).into(),
            ..UpdateTaskRequest::default()
        }
    }

    fn close_request(&self, exec: &str) -> CloseIORequest {
        CloseIORequest {
            id: self.id(),
            exec_id: exec.to_owned(),
            stdin: true,
            ..CloseIORequest::default()
        }
    }

    fn resize_request(&self, exec: &str) -> ResizePtyRequest {
        ResizePtyRequest {
            id: self.id(),
            exec_id: exec.to_owned(),
            width: 100,
            height: 30,
            ..ResizePtyRequest::default()
        }
    }

    fn connect(&self) -> ConnectResponse {
        let request = ConnectRequest {
            id: self.id(),
            ..ConnectRequest::default()
        };
        self.shim.call("Connect", &request).unwrap()
    }

    fn shutdown(&self, now: bool) {
        let request = ShutdownRequest {
            id: self.id(),
            now,
            ..ShutdownRequest::default()
        };
        let _ = self.shim.call::<Empty>("Shutdown", &request);
    }

    /// Kills the container, if it still runs, and takes everything down in containerd's order.
    #[track_caller]
    fn end(self) {
        let _ = self
            .shim
            .call::<Empty>("Kill", &self.kill_request("", 9, true));
        if self.status("") != Status::STOPPED {
            self.wait("");
        }
        self.delete("").unwrap();
        self.shut_down();
    }

    /// After the container has been deleted.
    #[track_caller]
    fn shut_down(self) {
        self.shutdown(false);
        let ran = self.bundle.delete();
        assert!(ran.status.success(), "{}", ran.text());
    }
}

fn process_json(command: &[&str]) -> Vec<u8> {
    let process = json!({
        "user": {"uid": 0, "gid": 0}, "args": command, "cwd": "/", "env": ["PATH=/bin"], "noNewPrivileges": true,
    });
    serde_json::to_vec(&process).unwrap()
}

/// Asserts that a time, in seconds since 1970, is within the last minute.
#[track_caller]
fn assert_recent(seconds: i64) {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap()
        .as_secs()
        .cast_signed();
    assert!(
        (now - 60..=now + 1).contains(&seconds),
        "{seconds}, now {now}"
    );
}

/// Asserts a refusal: with this code by our shim, with this code or UNKNOWN by the stock shim.
#[track_caller]
fn assert_refused(shim: &Shim, method: &str, request: &impl Message, code: Code) {
    let (got, text) = shim.must_refuse(method, request);
    assert!(
        got == code || (!is_our_shim() && got == Code::UNKNOWN),
        "{method}: {got:?} {text}"
    );
    assert!(!text.is_empty());
}

/// Asserts a refusal with this code by both shims: containerd or its clients branch on the code.
#[track_caller]
fn assert_refused_alike(shim: &Shim, method: &str, request: &impl Message, code: Code) {
    let (got, text) = shim.must_refuse(method, request);
    assert_eq!(got, code, "{method}: {text}");
}

on_every_containerd! {
    fn state_tells_all_of_a_process(version) {
        let daemon = Daemon::start(version);
        let task = Task::create(&daemon, "state", &["sh", "-c", "while :; do sleep 0.1; done; exit 1"]);
        let state = task.state("");
        assert_eq!((state.id.as_str(), state.pid, state.status.unwrap()), ("state", task.pid, Status::CREATED));
        assert_eq!(state.bundle, task.bundle.path.display().to_string());
        assert_eq!((state.exit_status, state.terminal), (0, false));
        task.start("").unwrap();
        assert_eq!(task.status(""), Status::RUNNING);
        assert_refused_alike(&task.shim, "Start", &task.start_request("nobody"), Code::NOT_FOUND);
        task.exec("e", SLEEP);
        let state = task.state("e");
        assert_eq!((state.pid, state.status.unwrap()), (0, Status::CREATED));
        let pid = task.start("e").unwrap();
        let state = task.state("e");
        assert_eq!((state.pid, state.status.unwrap()), (pid, Status::RUNNING));
        assert_refused_alike(&task.shim, "State", &task.state_request("nobody"), Code::NOT_FOUND);
        task.kill("e", 9);
        assert_eq!(task.wait("e").exit_status, 137);
        let state = task.state("e");
        assert_eq!((state.pid, state.status.unwrap(), state.exit_status), (pid, Status::STOPPED, 137));
        task.kill("", 9);
        let waited = task.wait("");
        assert_eq!(waited.exit_status, 137);
        assert_recent(waited.exited_at.seconds);
        let state = task.state("");
        assert_eq!((state.pid, state.status.unwrap(), state.exit_status), (task.pid, Status::STOPPED, 137));
        assert_eq!(state.exited_at, waited.exited_at);
        task.end();
        daemon.end();
    }

    fn connect_answers_before_the_container_is_there(version) {
        let daemon = Daemon::start(version);
        let bundle = Bundle::new(&daemon, "connect");
        let spec = bundle.plain_spec(SLEEP);
        let bundle = bundle.write_spec(&spec);
        let shim = Shim::connect(&bundle.start(b""));
        let mut task = Task { bundle, shim, pid: 0 };
        let connected = task.connect();
        assert_eq!((connected.shim_pid.cast_signed(), connected.task_pid), (daemon.shim().pid, 0));
        assert_refused_alike(&task.shim, "State", &task.state_request(""), Code::NOT_FOUND);
        task.pid = task.bundle.create(&task.shim).unwrap();
        assert_eq!(task.connect().task_pid, task.pid);
        task.start("").unwrap();
        task.end();
        daemon.end();
    }

    fn an_id_is_used_once(version) {
        let daemon = Daemon::start(version);
        let task = Task::run(&daemon, "twice", SLEEP);
        let again = CreateTaskRequest {
            id: task.id(),
            bundle: task.bundle.path.display().to_string(),
            ..CreateTaskRequest::default()
        };
        assert_refused(&task.shim, "Create", &again, Code::ALREADY_EXISTS);
        assert_eq!(task.status(""), Status::RUNNING, "the first one has not suffered");
        task.end();
        daemon.end();
    }

    fn a_process_starts_once(version) {
        let daemon = Daemon::start(version);
        let task = Task::run(&daemon, "once", &["sh", "-c", "exit 3"]);
        let waited = task.wait("");
        assert_eq!(waited.exit_status, 3);
        assert_refused(&task.shim, "Start", &task.start_request(""), Code::FAILED_PRECONDITION);
        assert_eq!(task.wait(""), waited, "a second Wait gets the same");
        assert_refused_alike(&task.shim, "Wait", &task.wait_request("nobody"), Code::NOT_FOUND);
        task.end();
        daemon.end();
    }

    fn signals_of_every_number(version) {
        let daemon = Daemon::start(version);
        let script = "trap 'exit 21' 40; touch /ready; while :; do sleep 0.1; done";
        let task = Task::run(&daemon, "signals", &["sh", "-c", script]);
        eventually(Duration::from_secs(20), || {
            ok_if(task.bundle.path.join("rootfs/ready").exists(), || "no trap yet".to_owned())
        });
        task.exec("real-time", SLEEP);
        assert_refused_alike(&task.shim, "Kill", &task.kill_request("real-time", 9, false), Code::FAILED_PRECONDITION);
        task.start("real-time").unwrap();
        for process in ["", "real-time"] {
            // Signal 0 asks whether the process is there.
            task.kill(process, 0);
            assert_refused(&task.shim, "Kill", &task.kill_request(process, 65, false), Code::INVALID_ARGUMENT);
            assert_refused(&task.shim, "Kill", &task.kill_request(process, 12345, false), Code::INVALID_ARGUMENT);
        }
        task.kill("real-time", 40);
        assert_eq!(task.wait("real-time").exit_status, 128 + 40);
        task.kill("", 40);
        assert_eq!(task.wait("").exit_status, 21);
        for (process, signal) in [("", 9), ("", 0), ("real-time", 9)] {
            assert_refused_alike(&task.shim, "Kill", &task.kill_request(process, signal, false), Code::NOT_FOUND);
        }
        assert_refused_alike(&task.shim, "Kill", &task.kill_request("nobody", 9, false), Code::NOT_FOUND);
        task.end();
        daemon.end();
    }

    fn all_of_an_exec_is_the_exec(version) {
        let daemon = Daemon::start(version);
        let task = Task::run(&daemon, "all", SLEEP);
        for exec in ["one", "two"] {
            task.exec(exec, SLEEP);
            task.start(exec).unwrap();
        }
        let _: Empty = task.shim.call("Kill", &task.kill_request("one", 9, true)).unwrap();
        assert_eq!(task.wait("one").exit_status, 137);
        assert_eq!((task.status(""), task.status("two")), (Status::RUNNING, Status::RUNNING));
        let _: Empty = task.shim.call("Kill", &task.kill_request("", 9, true)).unwrap();
        assert_eq!((task.wait("two").exit_status, task.wait("").exit_status), (137, 137));
        task.end();
        daemon.end();
    }

    fn a_created_container_can_be_killed(version) {
        let daemon = Daemon::start(version);
        let task = Task::create(&daemon, "created", SLEEP);
        task.kill("", 9);
        assert_eq!(task.wait("").exit_status, 137);
        let deleted = task.delete("").unwrap();
        assert_eq!((deleted.pid, deleted.exit_status), (task.pid, 137));
        task.shut_down();
        daemon.end();
    }

    fn a_created_container_can_be_deleted(version) {
        let daemon = Daemon::start(version);
        let task = Task::create(&daemon, "created", SLEEP);
        assert_eq!(task.delete("").unwrap().pid, task.pid);
        assert_refused_alike(&task.shim, "Delete", &task.delete_request(""), Code::NOT_FOUND);
        assert_refused_alike(&task.shim, "State", &task.state_request(""), Code::NOT_FOUND);
        task.shut_down();
        daemon.end();
    }

    fn only_what_has_ended_is_deleted(version) {
        let daemon = Daemon::start(version);
        let task = Task::run(&daemon, "delete", SLEEP);
        task.exec("e", &["sleep", "3600"]);
        task.exec("never", SLEEP);
        let pid = task.start("e").unwrap();
        for process in ["", "e"] {
            assert_refused(&task.shim, "Delete", &task.delete_request(process), Code::FAILED_PRECONDITION);
        }
        assert_eq!(task.delete("never").unwrap().pid, 0);
        task.kill("e", 15);
        let waited = task.wait("e");
        let deleted = task.delete("e").unwrap();
        assert_eq!((deleted.pid, deleted.exit_status), (pid, 143));
        assert_eq!(deleted.exited_at, waited.exited_at);
        for process in ["e", "never"] {
            assert_refused_alike(&task.shim, "Delete", &task.delete_request(process), Code::NOT_FOUND);
        }
        task.exec("e", &["true"]);
        task.start("e").unwrap();
        assert_eq!(task.wait("e").exit_status, 0, "the id is free again");
        task.end();
        daemon.end();
    }

    fn an_exec_that_cannot_be(version) {
        let daemon = Daemon::start(version);
        let task = Task::run(&daemon, "exec", SLEEP);
        for broken in [&b"{\"args\": ["[..], b"[]", b"no json"] {
            let request = task.exec_request("broken", broken);
            assert_refused(&task.shim, "Exec", &request, Code::INVALID_ARGUMENT);
            assert_refused_alike(&task.shim, "State", &task.state_request("broken"), Code::NOT_FOUND);
        }
        task.exec("same", SLEEP);
        let same = task.exec_request("same", &process_json(SLEEP));
        assert_refused_alike(&task.shim, "Exec", &same, Code::ALREADY_EXISTS);
        task.exec("absent", &["/no/such/program"]);
        let why = task.start("absent").unwrap_err();
        assert!(why.message.contains("/no/such/program"), "{why}");
        task.delete("absent").unwrap();
        // A container that has ended runs nothing more.
        task.kill("", 9);
        task.wait("");
        let late = task.exec_request("late", &process_json(SLEEP));
        assert_refused(&task.shim, "Exec", &late, Code::FAILED_PRECONDITION);
        assert_refused(&task.shim, "Start", &task.start_request("same"), Code::FAILED_PRECONDITION);
        task.end();
        daemon.end();
    }

    fn an_exec_whose_start_has_failed_is_still_created(version) {
        let daemon = Daemon::start(version);
        let task = Task::run(&daemon, "exec", SLEEP);
        task.exec("absent", &["/no/such/program"]);
        let (shim, request) = (&task.shim, task.wait_request("absent"));
        let waited: WaitResponse = std::thread::scope(|scope| {
            let wait = scope.spawn(|| shim.call("Wait", &request).unwrap());
            task.start("absent").unwrap_err();
            wait.join().unwrap()
        });
        // A Wait ends: the stock shim's says 0, as if the exec had run well.
        assert_eq!(waited.exit_status, if is_our_shim() { 255 } else { 0 });
        assert_eq!(task.wait("absent"), waited);
        let state = task.state("absent");
        assert_eq!((state.pid, state.status.unwrap(), state.exit_status), (0, Status::CREATED, 0));
        assert_refused_alike(&task.shim, "Kill", &task.kill_request("absent", 9, false), Code::FAILED_PRECONDITION);
        if is_our_shim() {
            // The stock shim ends with a panic here.
            assert_refused(&task.shim, "Start", &task.start_request("absent"), Code::FAILED_PRECONDITION);
        }
        let deleted = task.delete("absent").unwrap();
        assert_eq!((deleted.pid, deleted.exit_status), (0, 0));
        assert_refused_alike(&task.shim, "State", &task.state_request("absent"), Code::NOT_FOUND);
        task.exec("absent", &["true"]);
        task.start("absent").unwrap();
        assert_eq!(task.wait("absent").exit_status, 0, "the id is free again");
        task.end();
        daemon.end();
    }

    fn sigkill_ends_what_somebody_else_has_frozen(version) {
        let daemon = Daemon::start(version);
        for (id, all) in [("one", false), ("all", true)] {
            let task = Task::run(&daemon, id, SLEEP);
            // The kernel does not freeze a process in the middle of an execve (v1).
            eventually(Duration::from_secs(5), || {
                let program = std::fs::read_to_string(format!("/proc/{}/comm", task.pid)).unwrap();
                ok_if(program.trim() == "sleep", || program)
            });
            let cgroup = cgroups::directory(task.pid.cast_signed(), "freezer").unwrap();
            let (file, frozen, thawed) = match cgroups::hierarchy() {
                Hierarchy::V1 => ("freezer.state", "FROZEN", "THAWED"),
                Hierarchy::V2 => ("cgroup.freeze", "1", "0"),
            };
            let file = cgroup.join(file);
            std::fs::write(&file, frozen).unwrap();
            eventually(Duration::from_secs(5), || {
                let now = std::fs::read_to_string(&file).unwrap();
                ok_if(now.trim() == frozen, || now)
            });
            let _: Empty = task.shim.call("Kill", &task.kill_request("", 9, all)).unwrap();
            let waited = task.shim.wait_for(&task.id(), "", Duration::from_secs(15));
            // For the clean-up of a failure.
            let _ = std::fs::write(&file, thawed);
            assert_eq!(waited.unwrap(), 137);
            task.end();
        }
        daemon.end();
    }

    /// The field `terminal` of the request decides, not the one of the process in the request.
    fn an_exec_whose_process_wants_a_terminal(version) {
        let daemon = Daemon::start(version);
        let task = Task::run(&daemon, "terminal", SLEEP);
        let mut wants: Value = serde_json::from_slice(&process_json(&["sh", "-c", "test ! -t 0"])).unwrap();
        wants["terminal"] = json!(true);
        let request = task.exec_request("e", &serde_json::to_vec(&wants).unwrap());
        let _: Empty = task.shim.call("Exec", &request).unwrap();
        task.start("e").unwrap();
        assert_eq!(task.wait("e").exit_status, 0);
        task.end();
        daemon.end();
    }

    fn an_exec_in_a_container_that_has_not_started(version) {
        let daemon = Daemon::start(version);
        let task = Task::create(&daemon, "early", SLEEP);
        task.exec("e", &["sh", "-c", "exit 5"]);
        task.start("e").unwrap();
        assert_eq!(task.wait("e").exit_status, 5);
        task.start("").unwrap();
        assert_eq!(task.status(""), Status::RUNNING);
        task.end();
        daemon.end();
    }

    fn streams_that_are_not_there(version) {
        let daemon = Daemon::start(version);
        let task = Task::run(&daemon, "streams", SLEEP);
        task.exec("e", SLEEP);
        for process in ["", "e"] {
            for _ in 0..2 {
                let _: Empty = task.shim.call("CloseIO", &task.close_request(process)).unwrap();
                let _: Empty = task.shim.call("ResizePty", &task.resize_request(process)).unwrap();
            }
        }
        assert_refused_alike(&task.shim, "ResizePty", &task.resize_request("nobody"), Code::NOT_FOUND);
        assert_refused(&task.shim, "CloseIO", &task.close_request("nobody"), Code::NOT_FOUND);
        task.end();
        daemon.end();
    }

    fn an_update_that_says_nothing(version) {
        let daemon = Daemon::start(version);
        let task = Task::run(&daemon, "update", SLEEP);
        let _: Empty = task.shim.call("Update", &task.update_request(b"{}")).unwrap();
        for broken in [&b"{\"memory\": "[..], b"7", b""] {
            assert_refused(&task.shim, "Update", &task.update_request(broken), Code::INVALID_ARGUMENT);
        }
        if is_our_shim() {
            // The stock shim dies of this call.
            let none = UpdateTaskRequest { id: task.id(), ..UpdateTaskRequest::default() };
            assert_refused(&task.shim, "Update", &none, Code::INVALID_ARGUMENT);
        }
        task.kill("", 9);
        task.wait("");
        assert_refused(&task.shim, "Update", &task.update_request(b"{}"), Code::FAILED_PRECONDITION);
        task.end();
        daemon.end();
    }

    fn a_container_is_paused_with_all_that_is_in_it(version) {
        let daemon = Daemon::start(version);
        let task = Task::create(&daemon, "pause", SLEEP);
        let pause = PauseRequest { id: task.id(), ..PauseRequest::default() };
        let resume = ResumeRequest { id: task.id(), ..ResumeRequest::default() };
        assert_refused(&task.shim, "Pause", &pause, Code::FAILED_PRECONDITION);
        task.start("").unwrap();
        assert_refused(&task.shim, "Resume", &resume, Code::FAILED_PRECONDITION);
        task.exec("e", SLEEP);
        task.start("e").unwrap();
        let _: Empty = task.shim.call("Pause", &pause).unwrap();
        assert_eq!((task.status(""), task.status("e")), (Status::PAUSED, Status::PAUSED));
        assert_refused(&task.shim, "Pause", &pause, Code::FAILED_PRECONDITION);
        let late = task.exec_request("late", &process_json(SLEEP));
        assert_refused(&task.shim, "Exec", &late, Code::FAILED_PRECONDITION);
        let _: Empty = task.shim.call("Resume", &resume).unwrap();
        assert_eq!((task.status(""), task.status("e")), (Status::RUNNING, Status::RUNNING));
        task.end();
        daemon.end();
    }

    fn pids_names_the_execs(version) {
        let daemon = Daemon::start(version);
        let task = Task::run(&daemon, "pids", SLEEP);
        task.exec("e", SLEEP);
        let pid = task.start("e").unwrap();
        let request = PidsRequest { id: task.id(), ..PidsRequest::default() };
        let listed: PidsResponse = task.shim.call("Pids", &request).unwrap();
        let mut pids: Vec<u32> = listed.processes.iter().map(|process| process.pid).collect();
        pids.sort_unstable();
        let mut expected = [task.pid, pid];
        expected.sort_unstable();
        assert_eq!(pids, expected);
        for process in listed.processes {
            if process.pid == pid {
                assert_eq!(process.info.type_url, "containerd.runc.v1.ProcessDetails");
                let details = ProcessDetails::parse_from_bytes(&process.info.value).unwrap();
                assert_eq!(details.exec_id, "e");
            } else {
                assert!(process.info.is_none());
            }
        }
        task.end();
        daemon.end();
    }

    fn a_shutdown_does_not_end_a_shim_that_has_a_container(version) {
        let daemon = Daemon::start(version);
        let task = Task::run(&daemon, "shutdown", SLEEP);
        for now in [false, true] {
            task.shutdown(now);
            assert_eq!(task.status(""), Status::RUNNING);
        }
        task.end();
        eventually(Duration::from_secs(10), || {
            ok_if(daemon.shims().is_empty(), || "the shim is still there".to_owned())
        });
        daemon.end();
    }

    fn events_tell_all_of_it(version) {
        let daemon = Daemon::start(version);
        let events = daemon.events();
        let task = Task::run(&daemon, "events", SLEEP);
        task.exec("e", SLEEP);
        let exec = task.start("e").unwrap();
        task.kill("e", 9);
        task.wait("e");
        task.kill("", 15);
        task.kill("", 9);
        task.wait("");
        let (pid, bundle) = (task.pid, task.bundle.path.display().to_string());
        task.delete("").unwrap();
        task.shut_down();
        let order = ["create", "start", "exec-added:e", "exec-started:e", "exit:e", "exit", "delete"];
        eventually(Duration::from_secs(20), || {
            ok_if(events.of("events") == order, || format!("{:?}", events.of("events")))
        });
        let bodies = events.bodies("events");
        let body = |at: usize| &bodies[at].body;
        assert_eq!((&body(0)["bundle"], &body(0)["pid"]), (&json!(bundle), &json!(pid)));
        assert!(body(0)["checkpoint"].as_str().unwrap_or_default().is_empty());
        assert_eq!(body(1)["pid"], json!(pid));
        assert_eq!(body(3)["pid"], json!(exec));
        for (at, pid, id) in [(4, exec, "e"), (5, pid, "events")] {
            assert_eq!((&body(at)["pid"], &body(at)["id"]), (&json!(pid), &json!(id)));
            assert_eq!(body(at)["exit_status"], json!(137));
            assert!(body(at)["exited_at"].is_string() || body(at)["exited_at"].is_object(), "{}", body(at));
        }
        assert_eq!((&body(6)["pid"], &body(6)["exit_status"]), (&json!(pid), &json!(137)));
        daemon.end();
    }

    /// The answer of `delete` for a container whose shim was killed.
    fn delete_of_a_dead_shim_tells_the_pid(version) {
        let daemon = Daemon::start(version);
        let task = Task::run(&daemon, "dead", SLEEP);
        shim_tests::proc::kill(daemon.shim().pid, rustix::process::Signal::KILL);
        eventually(Duration::from_secs(10), || {
            ok_if(daemon.shims().is_empty(), || "the shim is still there".to_owned())
        });
        let ran = task.bundle.delete();
        assert!(ran.status.success(), "{}", ran.text());
        // 1.6's own shim has warnings among its answer.
        if is_our_shim() || version != shim_tests::Version::V1_6 {
            let deleted = DeleteResponse::parse_from_bytes(&ran.output).unwrap();
            assert_eq!((deleted.pid, deleted.exit_status), (task.pid, 137));
            assert_recent(deleted.exited_at.seconds);
        }
        drop(task);
        if !is_our_shim() {
            // The stock shim's socket stays.
            return;
        }
        daemon.end();
    }

    /// The files that `start` and the shim leave in the bundle, by which a restarted containerd finds the shim.
    fn the_bundle_leads_back_to_the_shim(version) {
        let daemon = Daemon::start(version);
        let task = Task::run(&daemon, "files", SLEEP);
        let file = |name: &str| std::fs::read_to_string(task.bundle.path.join(name)).unwrap();
        assert_eq!(file("init.pid").trim(), task.pid.to_string());
        // From 2.x on containerd keeps the answer itself, in bootstrap.json.
        if is_our_shim() || version == shim_tests::Version::V1_6 {
            let socket = file("address");
            let socket = socket.trim().strip_prefix("unix://").unwrap();
            assert!(std::os::unix::net::UnixStream::connect(socket).is_ok());
        }
        task.end();
        daemon.end();
    }

    fn the_shim_goes_before_containerd_when_memory_runs_out(version) {
        let daemon = Daemon::start(version);
        let task = Task::run(&daemon, "oom", SLEEP);
        let score = |pid: i32| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/oom_score_adj")).unwrap();
            text.trim().parse::<i32>().unwrap()
        };
        // This process plays containerd.
        let own = score(std::process::id().cast_signed());
        assert_eq!(score(daemon.shim().pid), (own + 1).min(1000));
        task.end();
        daemon.end();
    }

    /// A containerd that systemd runs has systemd's socket in its environment, which runc would give to the container.
    fn the_service_managers_socket_is_not_the_containers(version) {
        let daemon = Daemon::start(version);
        let mut bundle = Bundle::new(&daemon, "notify");
        let socket = daemon.directory().join("notify").display().to_string();
        bundle.environment.push(("NOTIFY_SOCKET", socket));
        let task = Task::from_bundle(bundle, &["sh", "-c", "env > /environment; sleep 3600"]);
        task.start("").unwrap();
        let file = task.bundle.path.join("rootfs/environment");
        eventually(Duration::from_secs(20), || {
            let environment = std::fs::read_to_string(&file).unwrap_or_default();
            ok_if(environment.contains("PATH="), || environment)
        });
        let environment = std::fs::read_to_string(&file).unwrap();
        assert!(!environment.contains("NOTIFY_SOCKET"), "{environment}");
        task.end();
        daemon.end();
    }

    fn a_create_that_fails_leaves_the_id_free(version) {
        let daemon = Daemon::start(version);
        let bundle = Bundle::new(&daemon, "again");
        let spec = bundle.plain_spec(&["/no/such/program"]);
        let bundle = bundle.write_spec(&spec);
        let shim = Shim::connect(&bundle.start(b""));
        let why = bundle.create(&shim).unwrap_err();
        assert!(why.message.contains("/no/such/program"), "{why}");
        let spec = bundle.plain_spec(SLEEP);
        let bundle = bundle.write_spec(&spec);
        let request = CreateTaskRequest {
            id: bundle.id.clone(),
            bundle: bundle.path.display().to_string(),
            ..CreateTaskRequest::default()
        };
        let created: CreateTaskResponse = shim.call("Create", &request).unwrap();
        let task = Task { bundle, shim, pid: created.pid };
        task.start("").unwrap();
        task.end();
        daemon.end();
    }
}
