//! One containerd, private to a test.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use rustix::process::Signal;

use crate::cri::Cri;
use crate::image::{self, PauseImage};
use crate::lab::{self, ShimUnderTest, Version};
use crate::leaks::{self, MARK, Seen};
use crate::proc::{self, Process};
use crate::slot::{Names, Slot, text};
use crate::takedown::{Guard, take_down};
use crate::until::{eventually, so};

/// The name of the runtime handler that pods get when they name none.
pub const HANDLER: &str = "under-test";

/// A runtime handler of the CRI plugin.
#[derive(Clone, Debug)]
pub struct Handler {
    /// What `RunPodSandbox` calls it.
    pub name: String,
    /// `runtime_type`.
    pub runtime_type: String,
    /// `runtime_path`, where it is wanted.
    pub runtime_path: Option<PathBuf>,
    /// The options table's content, TOML. On 1.6 it goes to a file that `ConfigPath` names. `$CGROUP_PARENT` becomes
    /// the slot's.
    pub options: String,
    /// Pods are made through the Sandbox API, also where the version's name does not say so. Not with options.
    pub sandbox_api: bool,
}

/// What CNI gives a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// An address on the slot's bridge.
    Bridge,
    /// Nothing but loopback, for what measures the rest.
    Loopback,
}

/// Who makes the cgroups of the pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// runc.
    Cgroupfs,
    /// systemd, asked by runc.
    Systemd,
}

impl Driver {
    /// The runtime option that chooses it.
    fn option(self) -> &'static str {
        match self {
            Self::Cgroupfs => "",
            Self::Systemd => "SystemdCgroup = true",
        }
    }
}

/// What a test may want different.
#[derive(Clone, Debug)]
pub struct Options {
    /// The options table of the default handler, TOML lines such as `holder = "process"`.
    pub runtime_options: String,
    /// Handlers beside the default one.
    pub handlers: Vec<Handler>,
    /// What the pause image holds.
    pub pause_image: PauseImage,
    /// Import nginx, too.
    pub nginx: bool,
    /// More lines for the CRI plugin's own table.
    pub cri: String,
    /// `debug` level in containerd and shim.
    pub debug: bool,
    /// Whose cgroups the pods are in. [`Self::systemd`] also tells the runtime.
    pub driver: Driver,
    /// What CNI does.
    pub network: Network,
    /// More environment variables for containerd.
    pub environment: Vec<(String, String)>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            runtime_options: String::new(),
            handlers: Vec::new(),
            pause_image: match ShimUnderTest::get() {
                ShimUnderTest::Pause => PauseImage::Hollow,
                ShimUnderTest::Runc => PauseImage::Works,
            },
            nginx: false,
            cri: String::new(),
            debug: true,
            driver: Driver::Cgroupfs,
            network: Network::Bridge,
            environment: Vec::new(),
        }
    }
}

impl Options {
    /// With nginx.
    pub fn nginx() -> Self {
        Self {
            nginx: true,
            ..Self::default()
        }
    }

    /// With systemd's cgroup driver, as kubelet's `cgroupDriver: systemd` wants it.
    pub fn systemd() -> Self {
        Self {
            driver: Driver::Systemd,
            ..Self::runtime(Driver::Systemd.option())
        }
    }

    /// With these runtime options.
    pub fn runtime(options: &str) -> Self {
        Self {
            runtime_options: options.to_owned(),
            ..Self::default()
        }
    }
}

/// A running containerd.
pub struct Daemon {
    /// Which one.
    pub version: Version,
    /// The names of its slot.
    pub names: Names,
    environment: Vec<(String, String)>,
    guard: RefCell<Guard>,
    process: RefCell<Option<Child>>,
    seen: RefCell<Seen>,
    cri: Cri,
    driver: Driver,
    ended: Cell<bool>,
    _slot: Slot,
}

impl Daemon {
    /// Starts one with the usual options.
    pub fn start(version: Version) -> Self {
        Self::with(version, &Options::default())
    }

    /// Starts one with nginx at hand.
    pub fn with_nginx(version: Version) -> Self {
        Self::with(version, &Options::nginx())
    }

    /// Starts one.
    pub fn with(version: Version, options: &Options) -> Self {
        lab::prepare();
        let binary = ShimUnderTest::get().binary(version);
        let slot = Slot::take();
        let names = slot.names.clone();
        // The last user of this slot may have been killed together with its guard.
        let left = take_down(&names);
        assert!(
            left.is_empty(),
            "{} of an earlier run cannot be removed: {left:?}",
            names.name()
        );
        let guard = Guard::start(&slot);

        let directory = names.directory();
        for folder in ["bin", "net.d", "logs", "fifo"] {
            fs::create_dir_all(directory.join(folder)).unwrap();
        }
        std::os::unix::fs::symlink(
            &binary,
            directory
                .join("bin")
                .join(ShimUnderTest::get().binary_name()),
        )
        .unwrap();
        fs::write(
            directory.join("net.d/10-test.conflist"),
            cni_config(&names, options.network),
        )
        .unwrap();
        fs::write(
            directory.join("config.toml"),
            config(version, &names, options),
        )
        .unwrap();

        let daemon = Self {
            version,
            cri: Cri::new(&leaks::grpc_address(&names)),
            environment: options.environment.clone(),
            guard: RefCell::new(guard),
            process: RefCell::new(None),
            seen: RefCell::new(Seen::default()),
            driver: options.driver,
            ended: Cell::new(false),
            _slot: slot,
            names,
        };
        daemon.launch();
        let mut images = vec![(image::busybox(), image::BUSYBOX)];
        if let Some(name) = version.pause_image() {
            images.push((image::pause(name, options.pause_image), name));
        }
        if options.nginx {
            images.push((image::nginx(), image::NGINX));
        }
        for (archive, name) in images {
            daemon.import(&text(&archive), name);
        }
        daemon
    }

    fn import(&self, archive: &str, name: &str) {
        self.ctr_in("k8s.io", &["images", "import", archive]);
        // CRI learns of images through events.
        eventually(Duration::from_secs(10), || {
            so(self.cri.has_image(name), || {
                format!("CRI does not know the image {name}")
            })
        });
    }

    fn launch(&self) {
        let directory = self.directory();
        let log = fs::File::options()
            .append(true)
            .create(true)
            .open(self.log_path())
            .unwrap();
        let mut command = Command::new(self.version.binaries().join("containerd"));
        command
            .arg("--config")
            .arg(directory.join("config.toml"))
            .env("PATH", lab::path(&directory.join("bin")))
            .env(MARK, &directory)
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        *self.process.borrow_mut() = Some(command.spawn().unwrap());
        eventually(Duration::from_secs(20), || {
            if let Ok(Some(status)) = self.process.borrow_mut().as_mut().unwrap().try_wait() {
                panic!("containerd ended at once, {status}:\n{}", self.log_tail(30));
            }
            self.cri.ready()
        });
    }

    /// The slot's directory.
    pub fn directory(&self) -> PathBuf {
        self.names.directory()
    }

    /// containerd's pid.
    pub fn pid(&self) -> i32 {
        self.process.borrow().as_ref().map_or_else(
            || panic!("containerd is down"),
            |child| child.id().cast_signed(),
        )
    }

    /// The cgroup parent that pods are made with, in the form that the cgroup driver wants.
    pub fn cgroup_parent(&self) -> String {
        match self.driver {
            Driver::Cgroupfs => self.names.cgroup_parent(),
            Driver::Systemd => self.names.slice(),
        }
    }

    /// The CRI client.
    pub fn cri(&self) -> &Cri {
        &self.cri
    }

    /// SIGKILL to containerd, and only to it.
    pub fn kill(&self) {
        self.look();
        let mut child = self.process.borrow_mut().take().expect("containerd is up");
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// Starts it again after [`Self::kill`].
    pub fn start_again(&self) {
        assert!(self.process.borrow().is_none(), "containerd is up");
        self.launch();
    }

    /// Remembers the slot's processes and tasks, so that none of them can hide later.
    pub fn look(&self) {
        self.seen.borrow_mut().look(&self.names);
    }

    /// The slot's processes; those that the test itself started (containerd, `ctr`) left out.
    pub fn processes(&self) -> Vec<Process> {
        let all = leaks::processes(&self.names).into_iter();
        all.filter(|process| !leaks::is_our_own(process)).collect()
    }

    /// The shims of the slot.
    pub fn shims(&self) -> Vec<Process> {
        let name = ShimUnderTest::get().binary_name();
        self.processes()
            .into_iter()
            .filter(|process| {
                process
                    .command_line()
                    .split(' ')
                    .next()
                    .is_some_and(|program| program.ends_with(name))
            })
            .collect()
    }

    /// The only shim; panics when there is another number of them.
    #[track_caller]
    pub fn shim(&self) -> Process {
        let mut shims = self.shims();
        assert_eq!(
            shims.len(),
            1,
            "one shim expected: {:?}",
            shims.iter().map(Process::describe).collect::<Vec<_>>()
        );
        shims.remove(0)
    }

    /// `ctr` in the slot's own containerd namespace.
    pub fn ctr_command(&self) -> Command {
        self.ctr_command_in(&self.names.name())
    }

    fn ctr_command_in(&self, namespace: &str) -> Command {
        let mut command = Command::new(self.version.binaries().join("ctr"));
        command
            .args([
                "--address",
                &leaks::grpc_address(&self.names),
                "--namespace",
                namespace,
            ])
            .env("PATH", lab::path(&self.directory().join("bin")))
            .env(MARK, self.directory())
            .stdin(Stdio::null());
        command
    }

    /// Runs `ctr`; panics when it fails.
    #[track_caller]
    pub fn ctr(&self, arguments: &[&str]) -> String {
        checked(&self.names.name(), arguments, &self.try_ctr(arguments))
    }

    /// Runs `ctr` in another containerd namespace.
    #[track_caller]
    pub fn ctr_in(&self, namespace: &str, arguments: &[&str]) -> String {
        let output = self
            .ctr_command_in(namespace)
            .args(arguments)
            .output()
            .unwrap();
        checked(namespace, arguments, &output)
    }

    /// Runs `ctr`.
    pub fn try_ctr(&self, arguments: &[&str]) -> Output {
        self.ctr_command().args(arguments).output().unwrap()
    }

    /// Puts a task of the slot's own containerd namespace on the list of what must be gone at the end.
    pub fn expect_task(&self, id: &str) {
        self.seen.borrow_mut().task(&self.names.name(), id);
    }

    /// `ctr run` with the runtime under test; the container is on the list of [`Self::end`].
    pub fn ctr_run(&self, flags: &[&str], id: &str, command: &[&str]) -> Command {
        let mut run = self.ctr_command();
        run.args(["run", "--runtime", ShimUnderTest::get().runtime_type()]);
        run.args(["--fifo-dir", &text(&self.directory().join("fifo"))])
            .args(flags);
        // With --rootfs the first argument is a folder, and the id comes behind it.
        if !flags.contains(&"--rootfs") {
            self.expect_task(id);
            self.ctr_image();
            run.arg(image::BUSYBOX);
        }
        run.arg(id).args(command);
        run
    }

    /// busybox in the slot's own containerd namespace.
    pub fn ctr_image(&self) {
        if !self
            .ctr(&["images", "list", "--quiet"])
            .contains(image::BUSYBOX)
        {
            self.ctr(&["images", "import", &text(&image::busybox())]);
        }
    }

    /// Starts listening to containerd's events, of all namespaces.
    pub fn events(&self) -> Events {
        Events::listen(self)
    }

    /// The end of containerd's log.
    pub fn log_tail(&self, lines: usize) -> String {
        let log = fs::read_to_string(self.log_path()).unwrap_or_default();
        let all: Vec<&str> = log.lines().collect();
        // Debug lines of CRI hold whole specs.
        let short = |line: &&str| line.chars().take(400).collect::<String>();
        all[all.len().saturating_sub(lines)..]
            .iter()
            .map(short)
            .collect::<Vec<_>>()
            .join("\n")
    }

    fn log_path(&self) -> PathBuf {
        self.directory().join("containerd.log")
    }

    /// What is left of pods and containers now, one line each; containerd itself does not count.
    pub fn left(&self) -> Vec<String> {
        let process = self.process.borrow();
        let daemon: Vec<i32> = process
            .iter()
            .map(|child| child.id().cast_signed())
            .collect();
        self.seen.borrow().left(&self.names, &daemon)
    }

    /// Fails unless, within `deadline`, nothing is left of pods and containers. containerd stays.
    #[track_caller]
    pub fn nothing_left(&self, deadline: Duration) {
        eventually(deadline, || {
            let left = self.left();
            so(left.is_empty(), || {
                format!("left behind:\n  {}", left.join("\n  "))
            })
        });
    }

    /// Stops and removes all pods and containers, and fails if anything is left of them; then ends containerd.
    #[track_caller]
    pub fn end(self) {
        self.look();
        self.cri.remove_all_pods();
        let namespace = self.names.name();
        for id in self
            .ctr(&["containers", "list", "--quiet"])
            .split_whitespace()
        {
            self.try_ctr(&["tasks", "kill", "--signal", "SIGKILL", "--all", id]);
            self.try_ctr(&["tasks", "delete", "--force", id]);
            self.ctr(&["containers", "delete", id]);
            self.seen.borrow_mut().task(&namespace, id);
        }
        self.nothing_left(Duration::from_secs(5));
        self.seen.borrow().remove_traces(&self.names);
        self.stop();
        let left = take_down(&self.names);
        assert!(left.is_empty(), "cannot be removed: {left:?}");
        self.guard.borrow_mut().dismiss();
        self.ended.set(true);
    }

    fn stop(&self) {
        if let Some(mut child) = self.process.borrow_mut().take() {
            proc::kill(child.id().cast_signed(), Signal::TERM);
            let ended = crate::until::within(Duration::from_secs(10), || match child.try_wait() {
                Ok(Some(_)) => Ok(()),
                _ => Err("containerd does not end".to_owned()),
            });
            if ended.is_err() {
                let _ = child.kill();
                let _ = child.wait();
            }
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if self.ended.get() {
            return;
        }
        let test = std::thread::current()
            .name()
            .unwrap_or("test")
            .replace("::", ".");
        let failed = lab::lab().join("failed");
        let kept = failed.join(format!("{test}.log"));
        let _ = fs::create_dir_all(&failed);
        let _ = fs::copy(self.log_path(), &kept);
        eprintln!(
            "containerd's last lines (all of them in {}):\n{}",
            kept.display(),
            self.log_tail(40)
        );
        if let Some(mut child) = self.process.borrow_mut().take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        self.seen.borrow().remove_traces(&self.names);
        let left = take_down(&self.names);
        if !left.is_empty() {
            eprintln!("cannot be removed: {left:?}");
        }
        self.guard.borrow_mut().dismiss();
    }
}

#[track_caller]
fn checked(namespace: &str, arguments: &[&str], output: &Output) -> String {
    assert!(
        output.status.success(),
        "ctr -n {namespace} {} failed: {}{}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A task event: `/tasks/start` and the JSON that came with it.
#[derive(Clone, Debug)]
pub struct Event {
    /// `/tasks/create`, …
    pub topic: String,
    /// The event's fields.
    pub body: serde_json::Value,
}

/// The events since [`Daemon::events`].
pub struct Events {
    child: Child,
    seen: Arc<Mutex<Vec<Event>>>,
}

impl Events {
    fn listen(daemon: &Daemon) -> Self {
        let mut child = daemon
            .ctr_command()
            .arg("events")
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let seen = Arc::new(Mutex::new(Vec::new()));
        let into = Arc::clone(&seen);
        std::thread::spawn(move || {
            // 2026-01-01 00:00:00.0 +0000 UTC k8s.io /tasks/start {"container_id":"…","pid":7}
            for line in output.lines().map_while(Result::ok) {
                let Some(topic) = line.split_whitespace().find(|word| word.starts_with('/')) else {
                    continue;
                };
                let body = line.find('{').map(|at| &line[at..]).unwrap_or("null");
                let body = serde_json::from_str(body).unwrap_or_default();
                into.lock().unwrap().push(Event {
                    topic: topic.to_owned(),
                    body,
                });
            }
        });
        let events = Self { child, seen };
        // Subscribed only when a first event comes through: make some until one does.
        let mut number = 0;
        eventually(Duration::from_secs(10), || {
            number += 1;
            let namespace = daemon.names.name();
            let label = format!("shim-tests={number}");
            if number == 1 {
                daemon.try_ctr(&["namespaces", "create", &namespace]);
            }
            daemon.ctr(&["namespaces", "label", &namespace, &label]);
            so(!events.seen.lock().unwrap().is_empty(), || {
                "no events".to_owned()
            })
        });
        events
    }

    /// The topics (without `/tasks/`) of one container, in order of arrival; an exec's have its id behind a colon.
    pub fn of(&self, container: &str) -> Vec<String> {
        let seen = self.seen.lock().unwrap();
        seen.iter()
            .filter(|event| {
                event.topic.starts_with("/tasks/") && event.body["container_id"] == container
            })
            .map(|event| {
                let topic = event.topic.trim_start_matches("/tasks/");
                let id = event.body["exec_id"]
                    .as_str()
                    .or_else(|| event.body["id"].as_str())
                    .unwrap_or_default();
                if id.is_empty() || id == container {
                    topic.to_owned()
                } else {
                    format!("{topic}:{id}")
                }
            })
            .collect()
    }

    /// All task events, by container, with their bodies.
    pub fn by_container(&self) -> BTreeMap<String, Vec<Event>> {
        let mut all = BTreeMap::<String, Vec<Event>>::new();
        for event in self.seen.lock().unwrap().iter() {
            if let Some(id) = event.body["container_id"].as_str() {
                all.entry(id.to_owned()).or_default().push(event.clone());
            }
        }
        all
    }

    /// All of one container, with their bodies.
    pub fn bodies(&self, container: &str) -> Vec<Event> {
        let seen = self.seen.lock().unwrap();
        seen.iter()
            .filter(|event| {
                event.topic.starts_with("/tasks/") && event.body["container_id"] == container
            })
            .cloned()
            .collect()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn cni_config(names: &Names, network: Network) -> String {
    if network == Network::Loopback {
        // The plugin makes nothing; it answers the address that containerd wants to hear.
        let address = format!("{}.2/24", names.subnet());
        return serde_json::json!({
            "cniVersion": "0.4.0",
            "name": names.name(),
            "plugins": [{
                "type": "static",
                "ipam": { "type": "static", "addresses": [{ "address": address }] },
            }],
        })
        .to_string();
    }
    serde_json::json!({
        "cniVersion": "0.4.0",
        "name": names.name(),
        "plugins": [{
            "type": "bridge",
            "bridge": names.bridge(),
            "isGateway": true,
            "ipMasq": false,
            "ipam": {
                "type": "host-local",
                "dataDir": text(&names.directory().join("ipam")),
                "ranges": [[{ "subnet": format!("{}.0/24", names.subnet()) }]],
                "routes": [{ "dst": "0.0.0.0/0" }],
            },
        }],
    })
    .to_string()
}

fn config(version: Version, names: &Names, options: &Options) -> String {
    let directory = text(&names.directory());
    let plugins = text(&lab::cni_plugins());
    let pause_image = version.pause_image().unwrap_or("there-is.none/pause:0");
    let (file_version, cri, images) = match version {
        Version::V1_6 | Version::V1_7 => ("2", "io.containerd.grpc.v1.cri", String::new()),
        Version::V2_1 | Version::V2_1SandboxApi => (
            "3",
            "io.containerd.cri.v1.runtime",
            format!(
                "[plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = '{pause_image}'\n\
                 [plugins.'io.containerd.nri.v1.nri']\ndisable = true\n",
            ),
        ),
    };
    let sandbox_image = match version {
        Version::V1_6 | Version::V1_7 => format!("sandbox_image = '{pause_image}'\n"),
        Version::V2_1 | Version::V2_1SandboxApi => String::new(),
    };
    let bin_dir = match version {
        Version::V1_6 | Version::V1_7 => format!("bin_dir = '{plugins}'"),
        Version::V2_1 | Version::V2_1SandboxApi => format!("bin_dirs = ['{plugins}']"),
    };
    let mut handlers = vec![Handler {
        name: HANDLER.to_owned(),
        runtime_type: ShimUnderTest::get().runtime_type().to_owned(),
        runtime_path: None,
        options: options.runtime_options.clone(),
        sandbox_api: false,
    }];
    handlers.extend(options.handlers.iter().cloned());
    if !handlers.iter().any(|handler| handler.name == "runc") {
        // 1.6 and 1.7 want a handler of this name whenever a table is given.
        handlers.push(Handler {
            name: "runc".to_owned(),
            runtime_type: "io.containerd.runc.v2".to_owned(),
            runtime_path: None,
            options: String::new(),
            sandbox_api: false,
        });
    }
    let mut table = String::new();
    for handler in handlers {
        let section = format!("plugins.'{cri}'.containerd.runtimes.{}", handler.name);
        table += &format!("[{section}]\nruntime_type = '{}'\n", handler.runtime_type);
        let all_pods = version == Version::V2_1SandboxApi && handler.name != "runc";
        if all_pods || handler.sandbox_api {
            table += "sandboxer = 'shim'\n";
        }
        if let Some(path) = &handler.runtime_path {
            table += &format!("runtime_path = '{}'\n", text(path));
        }
        if !handler.options.is_empty() {
            let lines = handler
                .options
                .replace("$CGROUP_PARENT", &names.cgroup_parent());
            let inline =
                if version == Version::V1_6 && handler.runtime_type != "io.containerd.runc.v2" {
                    let path = names.directory().join(format!("{}.toml", handler.name));
                    fs::File::create(&path)
                        .unwrap()
                        .write_all(lines.as_bytes())
                        .unwrap();
                    format!("ConfigPath = '{}'", text(&path))
                } else {
                    lines
                };
            table += &format!("[{section}.options]\n{inline}\n");
        }
    }
    let level = if options.debug { "debug" } else { "info" };
    format!(
        "version = {file_version}
root = '{directory}/root'
state = '{directory}/state'
[debug]
level = '{level}'
address = '{directory}/debug.sock'
[grpc]
address = '{address}'
[plugins.'io.containerd.internal.v1.opt']
path = '{directory}/opt'
{images}
[plugins.'{cri}']
restrict_oom_score_adj = {restricted}
netns_mounts_under_state_dir = true
{sandbox_image}{more}
[plugins.'{cri}'.cni]
{bin_dir}
conf_dir = '{directory}/net.d'
[plugins.'{cri}'.containerd]
default_runtime_name = '{HANDLER}'
{table}
",
        address = leaks::grpc_address(names),
        // A machine whose root may not lower an oom_score_adj cannot start a CRI pod otherwise.
        restricted = !proc::may_lower_oom_scores(),
        more = options.cri,
    )
}
