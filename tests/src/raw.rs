//! The shim binary alone, started and called as containerd does, for input that containerd would never send.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::types::mount::Mount;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::{Value, json};

use crate::calls::{Answer, Shim, Streams};
use crate::daemon::Daemon;
use crate::image;
use crate::lab::{self, ShimUnderTest, Version};
use crate::leaks::{MARK, TaskId, grpc_address, shim_socket};
use crate::slot::text;
use crate::until::within;

/// A bundle as containerd lays it out: `config.json`, `rootfs/`, `work/`, the FIFO `log`.
pub struct Bundle<'a> {
    daemon: &'a Daemon,
    /// The task's id.
    pub id: String,
    /// The bundle's folder.
    pub path: PathBuf,
    shim: ShimUnderTest,
    /// More variables for the shim's environment, as containerd's environment may have.
    pub environment: Vec<(&'static str, String)>,
    /// The shim's binary, where that is another file than usual (`runtime_path`).
    pub program: Option<PathBuf>,
    _log: File,
}

/// The result of `start` or `delete`.
#[derive(Debug)]
pub struct Ran {
    /// The exit status.
    pub status: ExitStatus,
    /// stdout and stderr together, as containerd reads them.
    pub output: Vec<u8>,
}

impl Ran {
    /// The output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.output).trim().to_owned()
    }

    /// The address in the answer.
    #[track_caller]
    pub fn address(&self) -> String {
        self.answer().1
    }

    /// The version of the Task service and the address in the answer of `start`: JSON, a `BootstrapResult` (the stock
    /// shim of containerd 2.3 and later knows nothing else), or the bare address of a shim of version 2.
    #[track_caller]
    pub fn answer(&self) -> (u64, String) {
        let text = self.text();
        if let Ok(answer) = serde_json::from_str::<Value>(&text) {
            let address = answer["address"].as_str();
            let address = address.unwrap_or_else(|| panic!("no address in {text}"));
            return (answer["version"].as_u64().unwrap_or(2), address.to_owned());
        }
        match BootstrapResult::parse_from_bytes(&self.output) {
            Ok(answer) => (u64::try_from(answer.version).unwrap(), answer.address),
            Err(_) => (2, text),
        }
    }
}

impl<'a> Bundle<'a> {
    /// A bundle with busybox as its root and no `config.json` yet.
    pub fn new(daemon: &'a Daemon, id: &str) -> Self {
        let bundle = Self::empty(daemon, id);
        image::unpack_busybox(&bundle.path.join("rootfs"));
        bundle
    }

    /// As [`Self::new`], with an empty root.
    pub fn empty(daemon: &'a Daemon, id: &str) -> Self {
        let namespace = daemon.names.name();
        let path = daemon.directory().join("raw").join(&namespace).join(id);
        fs::create_dir_all(path.join("rootfs")).unwrap();
        // In containerd's bundles `work` is a link to a folder that outlives a restart of the machine.
        fs::create_dir_all(path.join("work")).unwrap();
        mknodat(
            CWD,
            path.join("log"),
            FileType::Fifo,
            Mode::from_raw_mode(0o700),
            0,
        )
        .unwrap();
        // containerd reads the log all the time. A FIFO that is open for reading and writing lets neither side wait.
        let log = File::options()
            .read(true)
            .write(true)
            .open(path.join("log"))
            .unwrap();
        daemon.expect_task(id);
        // The socket of an earlier run with another shim may still be there. containerd would remove such a socket,
        // too.
        let stale = TaskId {
            namespace,
            id: id.to_owned(),
        };
        let _ = fs::remove_file(shim_socket(&grpc_address(&daemon.names), &stale));
        Self {
            daemon,
            id: id.to_owned(),
            path,
            shim: ShimUnderTest::get(),
            environment: Vec::new(),
            program: None,
            _log: log,
        }
    }

    /// Takes this shim instead of the shim under test, to compare the two.
    #[must_use]
    pub fn driven_by(mut self, shim: ShimUnderTest) -> Self {
        self.shim = shim;
        self
    }

    /// Writes `config.json`.
    #[must_use]
    pub fn write_spec(self, spec: &Value) -> Self {
        self.write_config(&serde_json::to_vec(spec).unwrap())
    }

    /// Writes any bytes as `config.json`.
    #[must_use]
    pub fn write_config(self, bytes: &[u8]) -> Self {
        fs::write(self.path.join("config.json"), bytes).unwrap();
        self
    }

    /// The spec of a plain container that runs `command`.
    pub fn plain_spec(&self, command: &[&str]) -> Value {
        json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0}, "args": command, "cwd": "/",
                "env": ["PATH=/bin"], "noNewPrivileges": true,
            },
            "root": {"path": "rootfs"},
            "hostname": "raw",
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {
                "cgroupsPath": format!("{}/{}", self.daemon.names.cgroup_parent(), self.id),
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}],
            },
            "annotations": {},
        })
    }

    /// As [`Self::plain_spec`], with the devices that a terminal needs; on a terminal if `terminal`.
    pub fn spec_with_dev(&self, command: &[&str], terminal: bool) -> Value {
        let mut spec = self.plain_spec(command);
        spec["process"]["terminal"] = json!(terminal);
        spec["mounts"].as_array_mut().unwrap().extend([
            json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]}),
            json!({
                "destination": "/dev/pts", "type": "devpts", "source": "devpts",
                "options": ["newinstance", "ptmxmode=0666"],
            }),
        ]);
        spec
    }

    /// The spec of a pod's sandbox with this network namespace.
    pub fn sandbox_spec(&self, netns: &str) -> Value {
        let mut spec = self.plain_spec(&["/pause"]);
        spec["annotations"] = json!({
            "io.kubernetes.cri.container-type": "sandbox",
            "io.kubernetes.cri.sandbox-id": self.id,
            "io.kubernetes.cri.sandbox-name": "raw",
            "io.kubernetes.cri.sandbox-namespace": "default",
        });
        spec["linux"]["namespaces"][4]["path"] = json!(netns);
        spec
    }

    /// The command line of `start` or `delete`, with the environment that containerd gives.
    pub fn command(&self, subcommand: &str) -> Command {
        let address = grpc_address(&self.daemon.names);
        let namespace = self.daemon.names.name();
        let usual = || self.shim.binary(self.daemon.version());
        let mut command = Command::new(self.program.clone().unwrap_or_else(usual));
        command
            .args([
                "-namespace",
                &namespace,
                "-id",
                &self.id,
                "-address",
                &address,
            ])
            .arg("-publish-binary")
            .arg(self.daemon.version().binaries().join("containerd"));
        if subcommand == "delete" {
            command.arg("-bundle").arg(&self.path);
        }
        command
            .arg(subcommand)
            .current_dir(&self.path)
            .env("PATH", lab::path(&self.daemon.directory().join("bin")))
            .env("TTRPC_ADDRESS", format!("{address}.ttrpc"))
            .env(MARK, self.daemon.directory())
            .envs(self.environment.iter().cloned());
        if self.daemon.version() != Version::V1_6 {
            command
                .env("GRPC_ADDRESS", &address)
                .env("NAMESPACE", &namespace)
                .env("MAX_SHIM_VERSION", "2");
        }
        command
    }

    /// containerd's namespace.
    pub fn namespace(&self) -> String {
        self.daemon.names.name()
    }

    /// Runs `start` with these bytes on stdin. The stock shim of containerd 2.3 and later gets `BootstrapParams` instead
    /// of no bytes: the one of 2.4 refuses to start without.
    #[track_caller]
    pub fn start(&self, stdin: &[u8]) -> Ran {
        let stock = self.shim == ShimUnderTest::Runc && self.daemon.version() >= Version::V2_3;
        if stock && stdin.is_empty() {
            let params = self.bootstrap_params().write_to_bytes().unwrap();
            return run(self.command("start"), &params);
        }
        run(self.command("start"), stdin)
    }

    /// What containerd 2.3 and later give `start` on stdin, without a directory for sockets and without options.
    pub fn bootstrap_params(&self) -> BootstrapParams {
        let grpc = grpc_address(&self.daemon.names);
        BootstrapParams {
            instance_id: self.id.clone(),
            namespace: self.namespace(),
            containerd_ttrpc_address: format!("{grpc}.ttrpc"),
            containerd_grpc_address: grpc,
            containerd_binary: text(&self.daemon.version().binaries().join("containerd")),
            containerd_version: "2.3.4".to_owned(),
            ..BootstrapParams::default()
        }
    }

    /// Runs `delete`.
    #[track_caller]
    pub fn delete(&self) -> Ran {
        run(self.command("delete"), b"")
    }

    /// Create on this shim: the pid, or the refusal.
    pub fn create(&self, shim: &Shim) -> Answer<u32> {
        shim.create(&self.id, &self.path, &Streams::default(), Vec::new())
    }

    /// As [`Self::create`], with these streams.
    pub fn create_with(&self, shim: &Shim, streams: &Streams) -> Answer<u32> {
        shim.create(&self.id, &self.path, streams, Vec::new())
    }

    /// As [`Self::create`], with these mounts as root filesystem.
    pub fn create_on(&self, shim: &Shim, rootfs: Vec<Mount>) -> Answer<u32> {
        shim.create(&self.id, &self.path, &Streams::default(), rootfs)
    }

    /// Starts the shim and creates the task. One of the two must fail; gives the text of the failure. Then asks the
    /// shim to shut down and runs `delete`, as containerd does after a failure.
    #[track_caller]
    pub fn start_or_create_must_fail(&self, stdin: &[u8]) -> String {
        let started = self.start(stdin);
        if !started.status.success() {
            return started.text();
        }
        let shim = Shim::connect(&started);
        let answer = self.create(&shim);
        if answer.is_ok() {
            let _ = shim.kill(&self.id, "", 9);
            let _ = shim.delete(&self.id, "");
        }
        self.shut_down(&shim);
        match answer {
            Err(refusal) => refusal.message,
            Ok(pid) => panic!("not refused: pid {pid}"),
        }
    }

    /// Shutdown, and `delete`, as containerd calls them when a task is gone.
    pub fn shut_down(&self, shim: &Shim) {
        shim.shutdown(&self.id);
        self.delete();
    }
}

impl Drop for Bundle<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.path);
    }
}

#[track_caller]
fn run(mut command: Command, stdin: &[u8]) -> Ran {
    let (mut from, into) = std::io::pipe().unwrap();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(into.try_clone().unwrap())
        .stderr(into)
        .spawn()
        .unwrap();
    let described = format!("{command:?}");
    // `command` holds copies of the pipe's writing end.
    drop(command);
    let _ = child.stdin.take().unwrap().write_all(stdin);
    let status = within(Duration::from_secs(10), || {
        child
            .try_wait()
            .unwrap()
            .ok_or_else(|| format!("still runs: {described}"))
    });
    let status = status.unwrap_or_else(|why| {
        let _ = child.kill();
        panic!("{why}")
    });
    // containerd reads to the end of the pipe: a shim that keeps the pipe open would hang containerd.
    let reader = std::thread::spawn(move || {
        let mut output = Vec::new();
        from.read_to_end(&mut output).map(|_| output)
    });
    let ended = within(Duration::from_secs(5), || {
        if reader.is_finished() {
            Ok(())
        } else {
            Err(format!("somebody keeps the output open: {described}"))
        }
    });
    ended.unwrap_or_else(|why| panic!("{why}"));
    Ran {
        status,
        output: reader.join().unwrap().unwrap(),
    }
}
