//! A Docker daemon on the containerd of a [`Daemon`], private to a test, too.
//!
//! Docker's containers are in the slot's containerd namespace and below the slot's cgroup, and Docker's files are in the
//! slot's directory. So what is left of Docker is found, and taken down, as what is left of containerd.

use std::cell::RefCell;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, SystemTime};

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::Signal;
use serde_json::{Value, json};

use crate::daemon::Daemon;
use crate::image;
use crate::lab::{self, ShimUnderTest, Version};
use crate::leaks::{self, MARK};
use crate::proc;
use crate::slot::text;
use crate::until::{eventually, ok_if};

/// A running dockerd.
pub struct Docker {
    // The first field: dropped before containerd's takedown.
    dockerd: Dockerd,
    /// Docker's containerd.
    pub containerd: Daemon,
    binaries: PathBuf,
    /// A folder that takes the place of `/etc` for dockerd.
    etc: Option<PathBuf>,
}

/// The first of the ids that [`Docker::remapped`] gives to the root of containers.
pub const SUBORDINATE: u32 = 200_000;

/// What `docker` answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The exit code.
    pub code: i32,
    /// The standard output.
    pub stdout: String,
    /// The standard error.
    pub stderr: String,
}

impl Docker {
    /// Starts a dockerd that belongs to this containerd.
    ///
    /// # Errors
    /// dockerd's last words, where dockerd cannot run on this machine.
    pub fn start(version: Version) -> Result<Self, String> {
        Self::with(version, &json!({}))
    }

    /// As [`Self::start`], with more of `daemon.json`.
    ///
    /// # Errors
    /// As those of [`Self::start`].
    pub fn with(version: Version, more: &Value) -> Result<Self, String> {
        Self::in_etc(version, more, None)
    }

    /// As [`Self::with`], with root remapped to the first of the ids that are subordinate to a user, [`SUBORDINATE`].
    ///
    /// # Errors
    /// As those of [`Self::start`].
    pub fn remapped(version: Version) -> Result<Self, String> {
        let more = json!({"userns-remap": "remapped", "storage-driver": "vfs"});
        Self::in_etc(version, &more, Some(etc_with_subordinates))
    }

    fn in_etc(version: Version, more: &Value, make_etc: Option<fn(&Path)>) -> Result<Self, String> {
        let binaries = lab::docker(version);
        let containerd = Daemon::start(version);
        let directory = containerd.directory();
        put_into_path(&containerd, &binaries);
        let etc = make_etc.map(|make| {
            let etc = directory.join("etc");
            make(&etc);
            etc
        });
        let mut docker = Self {
            dockerd: Dockerd {
                process: RefCell::new(None),
                log: directory.join("dockerd.log"),
            },
            containerd,
            binaries,
            etc,
        };
        docker.write_config(more);
        if let Err(why) = docker.launch() {
            // The machine's fault, unless dockerd starts without the settings of the test.
            docker.etc = None;
            docker.write_config(&json!({}));
            assert!(docker.launch().is_err(), "{why}");
            return Err(why);
        }
        docker.run(&["load", "--input", &text(&image::busybox())]);
        Ok(docker)
    }

    fn write_config(&self, more: &Value) {
        let directory = self.containerd.directory();
        let path = |name: &str| text(&directory.join(name));
        let names = &self.containerd.names;
        let mut config = json!({
            "data-root": path("docker"),
            "exec-root": path("docker-exec"),
            "pidfile": path("docker.pid"),
            "hosts": [self.address()],
            "containerd": leaks::grpc_address(names),
            "containerd-namespace": names.name(),
            "containerd-plugins-namespace": format!("{}-plugins", names.name()),
            "cgroup-parent": names.cgroup_parent(),
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "live-restore": true,
            // The machine's network is not the test's.
            "bridge": "none",
            "iptables": false,
            "ip6tables": false,
            "ip-forward": false,
        });
        let more = more.as_object().unwrap().clone();
        config.as_object_mut().unwrap().extend(more);
        fs::write(self.config_path(), config.to_string()).unwrap();
    }

    fn config_path(&self) -> PathBuf {
        self.containerd.directory().join("daemon.json")
    }

    fn address(&self) -> String {
        let socket = self.containerd.directory().join("docker.sock");
        format!("unix://{}", text(&socket))
    }

    fn launch(&self) -> Result<(), String> {
        let directory = self.containerd.directory();
        let mut log = fs::File::options();
        let log = log
            .append(true)
            .create(true)
            .open(&self.dockerd.log)
            .unwrap();
        let mut command = self.dockerd_command();
        command
            .arg("--config-file")
            .arg(self.config_path())
            .env("PATH", lab::path(&directory.join("bin")))
            .env(MARK, &directory)
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        *self.dockerd.process.borrow_mut() = Some(command.spawn().unwrap());
        eventually(Duration::from_secs(20), || {
            let ended = self
                .dockerd
                .process
                .borrow_mut()
                .as_mut()
                .unwrap()
                .try_wait();
            if let Ok(Some(status)) = ended {
                let words = self.dockerd.last_words(1);
                return Ok(Err(format!("dockerd ended, {status}: {words}")));
            }
            let answer = self.answer(&["version"]);
            ok_if(answer.code == 0, || answer.stderr).map(Ok)
        })
    }

    /// dockerd, which sees [`Self::etc`] as `/etc`.
    fn dockerd_command(&self) -> Command {
        let program = self.binaries.join("dockerd");
        let Some(etc) = &self.etc else {
            return Command::new(program);
        };
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--", "sh", "-euc"])
            .arg("mount --bind \"$0\" /etc; exec \"$@\"")
            .arg(etc)
            .arg(program);
        command
    }

    /// Asks dockerd about a file for `/etc/docker/daemon.json`: dockerd must take the file.
    #[track_caller]
    pub fn validate(&self, file: &Path) {
        let bin = self.containerd.directory().join("bin");
        let mut command = Command::new(self.binaries.join("dockerd"));
        command
            .env("PATH", lab::path(&bin))
            .arg("--validate")
            .arg("--config-file")
            .arg(file);
        let answer = Answer::of(&command.output().unwrap());
        assert_eq!(answer.code, 0, "{}: {answer:?}", file.display());
    }

    /// `docker` with these arguments.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let directory = self.containerd.directory();
        let mut command = Command::new(self.binaries.join("docker"));
        command
            .args(["--host", &self.address()])
            .args(arguments)
            .env("PATH", lab::path(&directory.join("bin")))
            .env("DOCKER_CONFIG", directory.join("docker-client"))
            .env(MARK, &directory)
            .stdin(Stdio::null());
        command
    }

    /// Runs `docker`.
    pub fn answer(&self, arguments: &[&str]) -> Answer {
        Answer::of(&self.command(arguments).output().unwrap())
    }

    /// Runs `docker`, which must succeed: the standard output, trimmed.
    #[track_caller]
    pub fn run(&self, arguments: &[&str]) -> String {
        let answer = self.answer(arguments);
        assert_eq!(answer.code, 0, "docker {arguments:?}: {answer:?}");
        answer.stdout.trim().to_owned()
    }

    /// What `docker inspect` says of a container's state. Of times and pids only whether there are any.
    #[track_caller]
    pub fn state(&self, container: &str) -> Value {
        let text = self.run(&["inspect", "--format", "{{json .State}}", container]);
        let mut state: Value = serde_json::from_str(&text).unwrap();
        state["Pid"] = json!(state["Pid"] != 0);
        for time in ["StartedAt", "FinishedAt"] {
            let set = !state[time].as_str().unwrap().starts_with("0001-");
            state[time] = json!(set);
        }
        state
    }

    /// Waits until a container's state has this value.
    #[track_caller]
    pub fn wait_for(&self, container: &str, field: &str, value: &Value) {
        eventually(Duration::from_secs(20), || {
            let state = self.state(container);
            ok_if(state[field] == *value, || format!("{state}"))
        });
    }

    /// Waits until the log of a container has this text.
    #[track_caller]
    pub fn wait_for_log(&self, container: &str, what: &str) {
        eventually(Duration::from_secs(20), || {
            let log = self.answer(&["logs", container]);
            ok_if(log.stdout.contains(what), || format!("{log:?}"))
        });
    }

    /// Runs the scenario with the shim under test and with the stock shim: the name of the runtime is given. What the
    /// scenario has seen, and the containers' events, must be the same. Every container must be removed in the end.
    #[track_caller]
    pub fn on_both<T>(&self, scenario: impl Fn(&str) -> T) -> (T, Vec<String>)
    where
        T: PartialEq + std::fmt::Debug,
    {
        let [(seen, events), stocks] = [ShimUnderTest::get(), ShimUnderTest::Runc].map(|shim| {
            let begin = SystemTime::now();
            let seen = scenario(shim.runtime_type());
            (seen, self.events_since(begin))
        });
        // The stock shim tells of a kill for lack of memory before the end, after the end, or twice. Docker's client hands
        // on each SIGWINCH (28) that it gets.
        let compared = |events: &[String]| -> Vec<String> {
            let left_out = ["oom", "kill 28"];
            let others = events
                .iter()
                .filter(|event| !left_out.contains(&event.as_str()));
            others.cloned().collect()
        };
        assert_eq!(seen, stocks.0, "our shim, the stock shim");
        assert_eq!(
            compared(&events),
            compared(&stocks.1),
            "our shim, the stock shim"
        );
        (seen, events)
    }

    /// The events of the containers, when all containers are removed.
    #[track_caller]
    fn events_since(&self, begin: SystemTime) -> Vec<String> {
        const FORMAT: &str = "{{.Action}} {{index .Actor.Attributes \"exitCode\"}} \
                              {{index .Actor.Attributes \"signal\"}}";
        // The event of a removal comes after the answer to the removal.
        eventually(Duration::from_secs(5), || {
            let events = self.run(&[
                "events",
                "--since",
                &seconds(begin),
                "--until",
                &seconds(SystemTime::now()),
                "--filter",
                "type=container",
                "--format",
                FORMAT,
            ]);
            let words = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
            let mut events: Vec<String> = events.lines().map(words).collect();
            let count = |name| events.iter().filter(|event| *event == name).count();
            // A dockerd that was started anew has no event of a creation before that.
            ok_if(count("create") <= count("destroy"), || {
                format!("{events:?}")
            })?;
            // No events of the shim: `stop` comes before or after the end, `resize` as often as the client likes.
            events.retain(|event| event != "stop" && event != "resize");
            Ok(events)
        })
    }

    /// SIGKILL to dockerd, and to no other process.
    pub fn kill(&self) {
        self.containerd.look();
        let mut child = self
            .dockerd
            .process
            .borrow_mut()
            .take()
            .expect("dockerd is up");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Starts dockerd again after [`Self::kill`].
    #[track_caller]
    pub fn start_again(&self) {
        assert!(self.dockerd.process.borrow().is_none(), "dockerd is up");
        self.launch().unwrap();
    }

    /// Removes what dockerd leaves behind, with any shim: the name of the node's own network namespace, and, when dockerd was
    /// killed, its sockets and the mount of its folder on itself.
    fn remove_traces_of_dockerd(&self) {
        let directory = self.containerd.directory();
        for point in ["docker-exec/netns/default", "docker"] {
            let _ = unmount(directory.join(point), UnmountFlags::DETACH);
        }
        let _ = fs::remove_dir_all(directory.join("docker-exec/libnetwork"));
    }

    /// Ends dockerd and its containerd. Fails if a container or anything of a container is left.
    #[track_caller]
    pub fn end(self) {
        self.containerd.look();
        assert_eq!(self.run(&["ps", "--all", "--quiet"]), "", "containers");
        let left = self.containerd.ctr(&["containers", "list", "--quiet"]);
        assert_eq!(left, "", "containers of containerd");
        let mut child = self
            .dockerd
            .process
            .borrow_mut()
            .take()
            .expect("dockerd is up");
        proc::kill(child.id().cast_signed(), Signal::TERM);
        eventually(Duration::from_secs(10), || {
            let ended = child.try_wait().unwrap();
            ended.ok_or_else(|| "dockerd does not end".to_owned())
        });
        self.remove_traces_of_dockerd();
        self.containerd.end();
    }
}

impl Answer {
    fn of(output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Self {
            code: output.status.code().unwrap_or(-1),
            stdout: text(&output.stdout),
            stderr: text(&output.stderr),
        }
    }
}

/// The process of dockerd, and its log.
struct Dockerd {
    process: RefCell<Option<Child>>,
    log: PathBuf,
}

impl Dockerd {
    fn last_words(&self, lines: usize) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let last: Vec<&str> = log.lines().rev().take(lines).collect();
        last.into_iter().rev().collect::<Vec<_>>().join("\n")
    }
}

impl Drop for Dockerd {
    fn drop(&mut self) {
        if let Some(mut child) = self.process.borrow_mut().take() {
            let _ = child.kill();
            let _ = child.wait();
            eprintln!("dockerd's last lines:\n{}", self.last_words(30));
        }
    }
}

/// Puts into containerd's and dockerd's PATH what they execute: both shims, and Docker's helpers.
fn put_into_path(containerd: &Daemon, binaries: &Path) {
    let bin = containerd.directory().join("bin");
    for shim in [ShimUnderTest::Pause, ShimUnderTest::Runc] {
        let link = bin.join(shim.binary_name());
        if !link.exists() {
            symlink(shim.binary(containerd.version()), link).unwrap();
        }
    }
    for helper in ["docker-init", "docker-proxy"] {
        symlink(binaries.join(helper), bin.join(helper)).unwrap();
    }
}

/// As much of `/etc` as dockerd reads, and ids that are subordinate to a user.
fn etc_with_subordinates(etc: &Path) {
    fs::create_dir_all(etc).unwrap();
    let user =
        format!("root:x:0:0::/:/bin/sh\nremapped:x:{SUBORDINATE}:{SUBORDINATE}::/:/bin/false\n");
    fs::write(etc.join("passwd"), user).unwrap();
    let group = format!("root:x:0:\nremapped:x:{SUBORDINATE}:\n");
    fs::write(etc.join("group"), group).unwrap();
    for file in ["subuid", "subgid"] {
        fs::write(etc.join(file), format!("remapped:{SUBORDINATE}:65536\n")).unwrap();
    }
}

/// A time as `docker events` takes one.
fn seconds(time: SystemTime) -> String {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap();
    format!("{}.{:09}", since.as_secs(), since.subsec_nanos())
}
