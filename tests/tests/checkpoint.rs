//! Checkpoint and restore, through criu. Where `criu check` fails, tests that need criu are left out and counted. Clear
//! messages about a failing criu are tested everywhere.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::time::Duration;

use containerd_shim_protos::api::{
    CheckpointTaskRequest, CreateTaskRequest, CreateTaskResponse, Empty, ExecProcessRequest,
    StateResponse, StatsRequest, StatsResponse, Status,
};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::oci::CheckpointOptions;
use containerd_shim_protos::ttrpc::Code;
use rustix::fs::{CWD, FileType, Mode, OFlags, mknodat};
use serde_json::{Value, json};
use shim_tests::calls::{Answer, Shim, refusal};
use shim_tests::raw::Bundle;
use shim_tests::until::ok_if;
use shim_tests::{
    Daemon, ShimUnderTest, eventually, lab, left_out, on_every_containerd, ours_only,
};

/// Prints a random word for ever. A restored container that prints the same word has its memory back.
const SAY: &str =
    "word=$(cat /proc/sys/kernel/random/uuid); while :; do echo $word; sleep 0.1; done";

fn is_our_shim() -> bool {
    ShimUnderTest::get() == ShimUnderTest::Pause
}

/// A containerd with a working criu in its PATH; or the reason why no criu works.
fn daemon_with_criu(version: shim_tests::Version) -> Result<Daemon, String> {
    let criu = lab::criu()?;
    let daemon = Daemon::start(version);
    symlink(criu, daemon.directory().join("bin/criu")).unwrap();
    Ok(daemon)
}

/// A containerd whose criu is this script.
fn daemon_with_criu_script(version: shim_tests::Version, script: &str) -> Daemon {
    let daemon = Daemon::start(version);
    let criu = daemon.directory().join("bin/criu");
    fs::write(&criu, script).unwrap();
    fs::set_permissions(&criu, fs::Permissions::from_mode(0o755)).unwrap();
    daemon
}

/// A container with a FIFO as its output.
struct Task<'a> {
    bundle: Bundle<'a>,
    shim: Shim,
    output: File,
    _errors: File,
    pid: u32,
}

fn open_reader(fifo: &str) -> File {
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let mut options = File::options();
    options.read(true).write(true).custom_flags(nonblocking);
    options.open(fifo).unwrap()
}

/// A container with devices of its own. A restored container gets them from the checkpoint.
fn spec_with_devices(bundle: &Bundle<'_>) -> Value {
    let mut spec = bundle.plain_spec(&["sh", "-c", SAY]);
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({
        "destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"],
    }));
    mounts.push(json!({
        "destination": "/dev/pts", "type": "devpts", "source": "devpts",
        "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620"],
    }));
    spec
}

impl<'a> Task<'a> {
    /// Makes a container: a new one, or one to be restored from the folder `from`.
    #[track_caller]
    fn create(daemon: &'a Daemon, id: &str, from: Option<&Path>) -> Self {
        let bundle = Bundle::new(daemon, id);
        let spec = spec_with_devices(&bundle);
        Self::from_bundle(bundle.write_spec(&spec), false, from)
    }

    /// As [`Self::create`], of this bundle; on a terminal if `terminal`.
    #[track_caller]
    fn from_bundle(bundle: Bundle<'a>, terminal: bool, from: Option<&Path>) -> Self {
        let fifo = |name: &str| {
            let fifo = bundle.path.join(name);
            mknodat(CWD, &fifo, FileType::Fifo, Mode::from_raw_mode(0o700), 0).unwrap();
            fifo.display().to_string()
        };
        let (stdout, stderr) = (fifo("stdout"), fifo("stderr"));
        // The stock shim waits for a reader of each.
        let (output, errors) = (open_reader(&stdout), open_reader(&stderr));
        let shim = Shim::connect(&bundle.start(b""));
        let request = CreateTaskRequest {
            id: bundle.id.clone(),
            bundle: bundle.path.display().to_string(),
            stdout,
            stderr: if terminal { String::new() } else { stderr },
            terminal,
            checkpoint: from
                .map(|path| path.display().to_string())
                .unwrap_or_default(),
            ..CreateTaskRequest::default()
        };
        let created: CreateTaskResponse = shim.call("Create", &request).unwrap();
        Self {
            bundle,
            shim,
            output,
            _errors: errors,
            pid: created.pid,
        }
    }

    fn id(&self) -> String {
        self.bundle.id.clone()
    }

    fn start(&self) -> Answer<u32> {
        self.shim.start(&self.bundle.id, "")
    }

    #[track_caller]
    fn state(&self) -> StateResponse {
        self.shim.state(&self.bundle.id, "").unwrap()
    }

    /// The next word that the container prints.
    #[track_caller]
    fn next_word(&mut self) -> String {
        let mut said = String::new();
        eventually(Duration::from_secs(20), || {
            let mut bytes = [0; 4096];
            while let Ok(length @ 1..) = self.output.read(&mut bytes) {
                said.push_str(&String::from_utf8_lossy(&bytes[..length]));
            }
            // A line may have come in two.
            let word = said
                .lines()
                .find(|line| line.len() == 36)
                .map(str::to_owned);
            word.ok_or_else(|| format!("{said:?}"))
        })
    }

    fn checkpoint_request(&self, image: &Path, exit: bool) -> CheckpointTaskRequest {
        let options = CheckpointOptions {
            exit,
            ..CheckpointOptions::default()
        };
        let options = Any {
            type_url: "containerd.runc.v1.CheckpointOptions".to_owned(),
            value: options.write_to_bytes().unwrap(),
            ..Any::default()
        };
        CheckpointTaskRequest {
            id: self.id(),
            path: image.display().to_string(),
            options: Some(options).into(),
            ..CheckpointTaskRequest::default()
        }
    }

    #[track_caller]
    fn save(&self, image: &Path, exit: bool) {
        let request = self.checkpoint_request(image, exit);
        let _: Empty = self.shim.call("Checkpoint", &request).unwrap();
    }

    #[track_caller]
    fn wait(&self) -> u32 {
        self.shim.wait(&self.bundle.id, "").unwrap()
    }

    fn kill(&self) -> Answer<()> {
        self.shim.kill(&self.bundle.id, "", 9)
    }

    /// Kills the container, if it runs, and deletes the container as containerd does.
    #[track_caller]
    fn end(self) {
        let state = self.state();
        if state.pid != 0 && state.status.unwrap() != Status::STOPPED {
            self.kill().unwrap();
            assert_eq!(self.wait(), 137);
        }
        self.shim.delete(&self.bundle.id, "").unwrap();
        self.shim.shutdown(&self.bundle.id);
        let ran = self.bundle.delete();
        assert!(ran.status.success(), "{}", ran.text());
    }
}

on_every_containerd! {
    fn a_container_is_saved_and_goes_on(version) {
        let daemon = match daemon_with_criu(version) {
            Ok(daemon) => daemon,
            Err(why) => left_out!(&why),
        };
        let events = daemon.events();
        let image = daemon.directory().join("image");
        let mut task = Task::create(&daemon, "goes-on", None);
        assert_eq!(task.start().unwrap(), task.pid);
        let word = task.next_word();
        task.save(&image, false);
        let state = task.state();
        assert_eq!((state.pid, state.status.unwrap()), (task.pid, Status::RUNNING));
        assert_eq!(task.next_word(), word);
        assert!(image.join("inventory.img").exists());
        assert!(!task.bundle.path.join("criu-work").exists());
        // Once more, into the same folder, and with its end.
        task.save(&image, true);
        assert_eq!(task.wait(), 137);
        assert_eq!(task.state().status.unwrap(), Status::STOPPED);
        task.end();
        if is_our_shim() {
            // The stock shim does not send this event.
            let order = ["create", "start", "checkpointed", "checkpointed", "exit", "delete"];
            eventually(Duration::from_secs(20), || {
                ok_if(events.of("goes-on") == order, || format!("{:?}", events.of("goes-on")))
            });
            assert_eq!(events.bodies("goes-on")[2].body["checkpoint"], json!(image.display().to_string()));
        }
        daemon.end();
    }

    fn a_saved_container_runs_again(version) {
        let daemon = match daemon_with_criu(version) {
            Ok(daemon) => daemon,
            Err(why) => left_out!(&why),
        };
        let events = daemon.events();
        let image = daemon.directory().join("image");
        let mut first = Task::create(&daemon, "first", None);
        first.start().unwrap();
        let word = first.next_word();
        first.save(&image, true);
        assert_eq!(first.wait(), 137);
        first.end();

        let mut second = Task::create(&daemon, "second", Some(&image));
        let state = second.state();
        assert_eq!((second.pid, state.pid, state.status.unwrap()), (0, 0, Status::CREATED));
        let (code, why) = refusal(second.kill());
        assert_eq!(code, Code::NOT_FOUND, "{why}");
        let exec = ExecProcessRequest { id: second.id(), exec_id: "e".to_owned(), ..ExecProcessRequest::default() };
        let (code, why) = second.shim.must_refuse("Exec", &exec);
        assert!(code == Code::FAILED_PRECONDITION || !is_our_shim(), "{code:?} {why}");
        let pid = second.start().unwrap();
        let state = second.state();
        assert_eq!((state.pid, state.status.unwrap()), (pid, Status::RUNNING));
        assert_eq!(second.next_word(), word, "it remembers");
        if is_our_shim() {
            // The stock shim does not know the cgroup of a restored container.
            let request = StatsRequest { id: second.id(), ..StatsRequest::default() };
            let stats: StatsResponse = second.shim.call("Stats", &request).unwrap();
            assert!(stats.stats.type_url.starts_with("io.containerd.cgroups."));
        }
        // And can be saved again.
        second.save(&image, false);
        assert_eq!(second.next_word(), word);
        second.end();
        let order: &[&str] = if is_our_shim() {
            &["create", "start", "checkpointed", "exit", "delete"]
        } else {
            &["create", "start", "exit", "delete"]
        };
        eventually(Duration::from_secs(20), || {
            ok_if(events.of("second") == order, || format!("{:?}", events.of("second")))
        });
        assert_eq!(events.bodies("second")[0].body["checkpoint"], json!(image.display().to_string()));
        daemon.end();
    }

    fn ctr_checkpoints_and_restores(version) {
        let daemon = match daemon_with_criu(version) {
            Ok(daemon) => daemon,
            Err(why) => left_out!(&why),
        };
        let script = "word=$(cat /proc/sys/kernel/random/uuid); echo $word > /word; \
                      while :; do echo $word > /now; sleep 0.1; done";
        let output = daemon.ctr_run(&["--detach", "--null-io"], "c", &["sh", "-c", script]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let cat = |exec: &str, file: &str| {
            let output = daemon.try_ctr(&["tasks", "exec", "--exec-id", exec, "c", "cat", file]);
            String::from_utf8_lossy(&output.stdout).trim().to_owned()
        };
        let word = eventually(Duration::from_secs(20), || {
            let word = cat("a", "/now");
            if word.len() == 36 { Ok(word) } else { Err(word) }
        });
        daemon.ctr(&["containers", "checkpoint", "--rw", "--image", "--task", "c", "saved:1"]);
        let list = daemon.ctr(&["tasks", "list"]);
        assert!(list.contains("RUNNING"), "{list}");
        daemon.ctr(&["tasks", "kill", "--signal", "SIGKILL", "c"]);
        eventually(Duration::from_secs(20), || {
            let list = daemon.ctr(&["tasks", "list"]);
            ok_if(list.contains("STOPPED"), || list)
        });
        daemon.try_ctr(&["tasks", "delete", "c"]);
        daemon.ctr(&["containers", "delete", "c"]);

        daemon.ctr(&["containers", "restore", "--rw", "--live", "c", "saved:1"]);
        daemon.look();
        assert_eq!(cat("b", "/word"), word, "its files are there");
        daemon.ctr(&["tasks", "exec", "--exec-id", "d", "c", "rm", "/now"]);
        eventually(Duration::from_secs(20), || {
            let now = cat("e", "/now");
            ok_if(now == word, || now)
        });
        daemon.end();
    }

    fn a_container_on_a_terminal_runs_again(version) {
        let daemon = match daemon_with_criu(version) {
            Ok(daemon) => daemon,
            Err(why) => left_out!(&why),
        };
        let image = daemon.directory().join("image");
        let terminal = |id: &str, from: Option<&Path>| {
            let bundle = Bundle::new(&daemon, id);
            let mut spec = spec_with_devices(&bundle);
            spec["process"]["terminal"] = json!(true);
            Task::from_bundle(bundle.write_spec(&spec), true, from)
        };
        let mut first = terminal("first", None);
        first.start().unwrap();
        let word = first.next_word();
        first.save(&image, true);
        assert_eq!(first.wait(), 137);
        first.end();
        let mut second = terminal("second", Some(&image));
        second.start().unwrap();
        assert_eq!(second.next_word(), word);
        second.end();
        daemon.end();
    }

    fn a_criu_that_does_not_work_is_told(version) {
        let script = "#!/bin/sh\necho 'Error (criu/kerndat.c:7): the kernel is too new for me' >&2\nexit 1\n";
        let daemon = daemon_with_criu_script(version, script);
        let mut task = Task::create(&daemon, "broken", None);
        task.start().unwrap();
        let word = task.next_word();
        for exit in [false, true] {
            let request = task.checkpoint_request(&daemon.directory().join("image"), exit);
            let (code, why) = task.shim.must_refuse("Checkpoint", &request);
            if is_our_shim() {
                assert_eq!(code, Code::FAILED_PRECONDITION, "{why}");
                assert!(why.contains("the kernel is too new for me") && why.contains("newer criu"), "{why}");
            }
            assert_eq!(task.state().status.unwrap(), Status::RUNNING);
        }
        assert_eq!(task.next_word(), word, "it has not suffered");
        task.end();

        // A restore finds out when the container starts; it can still be deleted.
        let image = daemon.directory().join("image");
        fs::create_dir_all(&image).unwrap();
        let task = Task::create(&daemon, "restored", Some(&image));
        let (code, why) = refusal(task.start());
        if is_our_shim() {
            assert_eq!(code, Code::FAILED_PRECONDITION, "{why}");
            assert!(why.contains("the kernel is too new for me"), "{why}");
        }
        assert_eq!(task.state().status.unwrap(), Status::CREATED);
        task.end();
        daemon.end();
    }

    fn a_criu_that_is_not_there_is_told(version) {
        ours_only!("the stock shim hands on what runc says");
        let daemon = Daemon::start(version);
        let mut bundle = Bundle::new(&daemon, "absent");
        let path = format!("{}:/usr/bin:/bin", lab::lab().join("host").display());
        bundle.environment.push(("PATH", path));
        let spec = spec_with_devices(&bundle);
        let task = Task::from_bundle(bundle.write_spec(&spec), false, None);
        task.start().unwrap();
        let request = task.checkpoint_request(&daemon.directory().join("image"), false);
        let (code, why) = task.shim.must_refuse("Checkpoint", &request);
        assert_eq!(code, Code::FAILED_PRECONDITION, "{why}");
        assert!(why.contains("install the package criu"), "{why}");
        task.end();
        daemon.end();
    }

    fn a_checkpoint_that_cannot_be(version) {
        ours_only!("the stock shim has UNKNOWN for all of these, and finds out late about a folder");
        let daemon = Daemon::start(version);
        let task = Task::create(&daemon, "bad", None);
        let image = daemon.directory().join("image");
        let (code, why) = task.shim.must_refuse("Checkpoint", &task.checkpoint_request(&image, false));
        assert_eq!(code, Code::FAILED_PRECONDITION, "{why}");
        let (code, why) = task.shim.must_refuse("Checkpoint", &task.checkpoint_request(Path::new(""), false));
        assert_eq!(code, Code::INVALID_ARGUMENT, "{why}");
        let mut wrong = task.checkpoint_request(&image, false);
        wrong.options.as_mut().unwrap().type_url = "containerd.runc.v1.Options".to_owned();
        let (code, why) = task.shim.must_refuse("Checkpoint", &wrong);
        assert_eq!(code, Code::INVALID_ARGUMENT, "{why}");
        // Never UNIMPLEMENTED, which containerd 2.x takes for an old protocol.
        let restore = CreateTaskRequest {
            id: "other".to_owned(),
            bundle: task.bundle.path.display().to_string(),
            checkpoint: "/no/such/folder".to_owned(),
            ..CreateTaskRequest::default()
        };
        let (code, why) = task.shim.must_refuse("Create", &restore);
        assert_eq!(code, Code::FAILED_PRECONDITION, "{why}");
        assert!(why.contains("/no/such/folder"), "{why}");
        task.end();
        daemon.end();
    }

    fn a_container_that_was_never_restored_is_deleted(version) {
        let daemon = Daemon::start(version);
        let image = daemon.directory().join("image");
        fs::create_dir_all(&image).unwrap();
        let task = Task::create(&daemon, "never", Some(&image));
        assert_eq!(task.pid, 0);
        task.end();
        daemon.end();
    }
}
