//! `containerd-shim-pause-v2 check` and `pods`: what an operator is told of a healthy node, of broken ones, and of the pods.
//! docs/checking.md has the sentences.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use rustix::process::Signal;
use serde_json::Value;
use shim_tests::daemon::{HANDLER, Handler};
use shim_tests::image::PauseImage;
use shim_tests::leaks::grpc_address;
use shim_tests::proc::{Process, kill, threads};
use shim_tests::slot::text;
use shim_tests::until::ok_if;
use shim_tests::{
    Daemon, Options, PodSpec, Version, eventually, in_every_mode, lab, left_out,
    on_every_containerd, on_the_newest_containerd, ours_only,
};

/// Root of a pod with a user namespace, as the node counts.
const ROOT: u32 = 300_000;

/// A node as `check` is told of it: the files that a test changes.
struct Node<'a> {
    daemon: &'a Daemon,
    address: String,
    config: PathBuf,
    kubelet: PathBuf,
    path: String,
}

impl<'a> Node<'a> {
    /// The node of a test's containerd, with the kubelet that fits.
    fn of(daemon: &'a Daemon) -> Self {
        let kubelet = daemon.directory().join("kubelet.yaml");
        fs::write(
            &kubelet,
            "kind: KubeletConfiguration\ncgroupDriver: cgroupfs\n",
        )
        .unwrap();
        Self {
            daemon,
            address: grpc_address(&daemon.names),
            config: daemon.directory().join("config.toml"),
            kubelet,
            path: std::env::var("PATH").unwrap(),
        }
    }

    /// Another configuration file, made from the node's own.
    fn with_config(daemon: &'a Daemon, change: impl FnOnce(String) -> String) -> Self {
        let node = Self::of(daemon);
        let text = change(fs::read_to_string(&node.config).unwrap());
        let config = daemon.directory().join("changed.toml");
        fs::write(&config, text).unwrap();
        Self { config, ..node }
    }

    /// Another configuration file, with these options in the file that `ConfigPath` names.
    fn with_options(daemon: &'a Daemon, options: &str) -> Self {
        let file = daemon.directory().join("options.toml");
        fs::write(&file, options).unwrap();
        Self::with_handler(
            daemon,
            &format!("options = {{ ConfigPath = '{}' }}\n", text(&file)),
        )
    }

    /// Another configuration file, with more lines for the handler under test.
    fn with_handler(daemon: &'a Daemon, lines: &str) -> Self {
        Self::with_config(daemon, |config| {
            let table = format!("containerd.runtimes.{HANDLER}]\n");
            assert!(config.contains(&table), "{config}");
            config.replace(&table, &format!("{table}{lines}"))
        })
    }

    fn run(&self, command: &str, more: &[&str]) -> Output {
        Command::new(self.daemon.directory().join("bin/containerd-shim-pause-v2"))
            .arg(command)
            .args(["--address", &self.address])
            .args(["--config", &text(&self.config)])
            .args(["--kubelet-config", &text(&self.kubelet)])
            .args(more)
            .env("PATH", &self.path)
            .output()
            .unwrap()
    }

    /// The lines and the exit code of `check`.
    #[track_caller]
    fn check(&self) -> (String, i32) {
        let ran = self.run("check", &[]);
        let lines = String::from_utf8(ran.stdout).unwrap();
        assert!(
            ran.stderr.is_empty(),
            "{}",
            String::from_utf8_lossy(&ran.stderr)
        );
        (lines, ran.status.code().unwrap())
    }

    /// `check` ends with 1, and has a line `todo` with these words.
    #[track_caller]
    fn assert_to_do(&self, words: &str) {
        let (lines, code) = self.check();
        let has = |line: &str| line.starts_with("todo ") && line.contains(words);
        assert!(lines.lines().any(has), "no todo with {words:?}:\n{lines}");
        assert_eq!(code, 1, "{lines}");
    }

    /// `check` ends with 0, and has a line of this kind with these words.
    #[track_caller]
    fn assert_line(&self, state: &str, subject: &str, words: &str) {
        let (lines, code) = self.check();
        let has = |line: &str| {
            let rest = line.strip_prefix(state).map(str::trim_start);
            rest.is_some_and(|rest| rest.starts_with(subject)) && line.contains(words)
        };
        assert!(
            lines.lines().any(has),
            "no {state} {subject} with {words:?}:\n{lines}"
        );
        assert_eq!(code, 0, "{lines}");
    }

    fn pods(&self) -> Vec<Value> {
        let ran = self.run("pods", &["--json"]);
        assert!(ran.status.success(), "{ran:?}");
        let said: Value = serde_json::from_slice(&ran.stdout).unwrap();
        said["pods"].as_array().unwrap().clone()
    }

    #[track_caller]
    fn pod(&self, id: &str) -> Value {
        let pods = self.pods();
        let found = pods.iter().find(|pod| pod["id"] == id);
        found
            .unwrap_or_else(|| panic!("no {id} in {pods:?}"))
            .clone()
    }
}

/// A program that is a script.
fn script(path: &Path, lines: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, format!("#!/bin/sh\n{lines}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// The machine's own options would be the node's.
macro_rules! without_options_of_the_machine {
    () => {
        ours_only!("a command of our own");
        if lab::has_options_of_the_machine() {
            left_out!("the machine has /etc/containerd-shim-pause-v2/config.toml");
        }
    };
}

in_every_mode! {
    fn a_healthy_node_is_all_right(version) {
        without_options_of_the_machine!();
        let daemon = Daemon::start(version);
        let node = Node::of(&daemon);
        let (lines, code) = node.check();
        // With the Sandbox API as the default, 2.0 to 2.2 are no healthy node.
        if version.sandbox_api() && version < Version::V2_3 {
            node.assert_to_do("a pod with hostNetwork: true crashes containerd 2.0 to 2.2, and this is the default handler");
            assert!(lines.contains("pause-image") && lines.contains("not needed"), "{lines}");
            daemon.end();
            return;
        }
        assert_eq!(code, 0, "{lines}");
        node.assert_line("ok", "containerd", &format!("answers at {}, pid {}", node.address, daemon.pid()));
        node.assert_line("ok", "config", "config.toml, version");
        node.assert_line("ok", &format!("handler {HANDLER}"), "the default handler");
        node.assert_line("ok", &format!("options {HANDLER}"), "holder = \"auto\"");
        node.assert_line("ok", &format!("cgroup-driver {HANDLER}"), "cgroupDriver: cgroupfs");
        node.assert_line("ok", &format!("runtime {HANDLER}"), "runc version");
        node.assert_line("ok", "pause-image", "is there");
        let said: Value = serde_json::from_slice(&node.run("check", &["--json"]).stdout).unwrap();
        assert_eq!(said["ok"], true, "{said}");
        assert_eq!(said["findings"].as_array().unwrap().len(), lines.lines().count(), "{said}");
        daemon.end();
    }
}

on_every_containerd! {
    fn each_broken_node_gets_the_sentence_that_mends_it(version) {
        without_options_of_the_machine!();
        let daemon = Daemon::start(version);
        let directory = daemon.directory();
        let sick = |options: &str| Node::with_options(&daemon, options);

        let nobody = Node { address: text(&directory.join("none.sock")), ..Node::of(&daemon) };
        nobody.assert_to_do("Start containerd (systemctl start containerd)");

        Node::with_config(&daemon, |config| config.replace("io.containerd.pause.v2", "io.containerd.runc.v2"))
            .assert_to_do("no handler leads to this shim: install config/containerd-");

        sick("Holdre = 'thread'").assert_to_do("no pod starts: runtime options in");
        sick("SystemdCgroup = 'yes'").assert_to_do("SystemdCgroup = 'yes'");

        let kubelet = Node::of(&daemon);
        fs::write(&kubelet.kubelet, "cgroupDriver: \"systemd\" # kubeadm's\n").unwrap();
        kubelet.assert_to_do("set SystemdCgroup = true in");

        sick("BinaryName = '/nowhere/runc'").assert_to_do("BinaryName names /nowhere/runc, where there is no program");
        sick("BinaryName = 'no-such-runc'").assert_to_do("install it (apt-get install no-such-runc)");

        // Nobody answers, and what is installed is too old.
        let old = directory.join("old");
        script(&old.join("containerd"), "[ $1 = --version ] && echo containerd containerd.io v1.5.18 abc");
        let path = format!("{}:{}", text(&old), nobody.path);
        Node { path, ..nobody }.assert_to_do("1.5.18 is installed. This is too old: install 1.6 or later");

        Node::with_config(&daemon, |config| config.replace("version = ", "version = = ")).assert_to_do("then restart containerd");
        Node::with_config(&daemon, |config| format!("disabled_plugins = ['io.containerd.grpc.v1.cri']\n{config}"))
            .assert_to_do("CRI is switched off");

        let drop_ins = directory.join("conf.d");
        fs::create_dir_all(&drop_ins).unwrap();
        let drop_in = drop_ins.join("pause.toml");
        fs::write(&drop_in, "version = 2\n[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.more]\nruntime_type = 'io.containerd.pause.v2'\n").unwrap();
        let without = |config: String| config.replace("io.containerd.pause.v2", "io.containerd.runc.v2");
        Node::with_config(&daemon, without).assert_to_do("pause.toml is not imported: put imports = [");
        let importing = |config: String| format!("imports = ['{}/*.toml']\n{config}", text(&drop_ins));
        if version >= Version::V2_0 && version < Version::V2_3 {
            Node::with_config(&daemon, importing).assert_to_do("lose the CRI settings of one of them");
        }
        if version == Version::V1_6 {
            fs::write(&drop_in, "version = 3\n").unwrap();
            Node::with_config(&daemon, importing).assert_to_do("ignores");
        }
        fs::remove_file(&drop_in).unwrap();

        let sandbox_api = Node::with_handler(&daemon, "sandboxer = 'shim'\n");
        if version < Version::V2_0 {
            sandbox_api.assert_to_do("unknown to containerd before 2.0");
        } else if version < Version::V2_3 {
            sandbox_api.assert_to_do("a pod with hostNetwork: true crashes containerd 2.0 to 2.2");
            Node::with_handler(&daemon, "sandboxer = 'shim'\noptions = { NoNewKeyring = true }\n").assert_to_do("start no container");
        }
        if version == Version::V1_6 {
            let stock = Node::with_config(&daemon, |config| {
                config.replace("'io.containerd.pause.v2'\n", "'io.containerd.runc.v2'\nruntime_path = '/x/containerd-shim-pause-v2'\n")
            });
            stock.assert_to_do("there is no program");
            let shim = directory.join("bin/containerd-shim-pause-v2");
            let stock = Node::with_config(&daemon, |config| {
                config.replace("'io.containerd.pause.v2'\n", &format!("'io.containerd.runc.v2'\nruntime_path = '{}'\n", text(&shim)))
            });
            stock.assert_to_do("ignores runtime_path and runs the stock shim");
        } else {
            let gone = directory.join("gone/containerd-shim-pause-v2");
            Node::with_handler(&daemon, &format!("runtime_path = '{}'\n", text(&gone))).assert_to_do("where there is no program: install the binary there");
            let earlier = directory.join("earlier/containerd-shim-pause-v2");
            script(&earlier, "echo containerd-shim-pause-v2 0.0.1");
            Node::with_handler(&daemon, &format!("runtime_path = '{}'\n", text(&earlier))).assert_to_do("of version 0.0.1, and this check is of version");
            script(&earlier, "echo hello");
            Node::with_handler(&daemon, &format!("runtime_path = '{}'\n", text(&earlier))).assert_to_do("is not this shim");
        }
        let (lines, code) = Node::of(&daemon).check();
        assert_eq!(code, 0, "the node itself is well: {lines}");
        daemon.end();
    }

    fn what_only_somebody_may_want_to_know_is_a_note(version) {
        without_options_of_the_machine!();
        let daemon = Daemon::start(version);
        let handler = format!("options {HANDLER}");
        let lost = Node::with_handler(&daemon, "options = { ConfigPath = '/dev/null', IoUid = 7 }\n");
        lost.assert_line("note", &handler, "does not pass IoUid on");
        let away = Node { kubelet: "/nowhere/config.yaml".into(), ..Node::of(&daemon) };
        away.assert_line("note", "cgroup-driver", "there is no /nowhere/config.yaml");
        let pause = version.pause_image().unwrap();
        let missing = Node::with_config(&daemon, |config| config.replace(pause, "there-is.none/pause:9"));
        missing.assert_line("note", "pause-image", "there-is.none/pause:9 is not there");
        // The file is changed, and containerd runs on.
        let node = Node::of(&daemon);
        let later = std::time::SystemTime::now() + Duration::from_secs(60);
        fs::File::options().append(true).open(&node.config).unwrap().set_modified(later).unwrap();
        node.assert_line("note", "config", "sudo systemctl restart containerd");
        daemon.end();
    }

    fn a_check_that_cannot_be_made_ends_with_2(version) {
        ours_only!("a command of our own");
        let shim = shim_tests::ShimUnderTest::get().binary(version);
        for arguments in [&["check", "--nonsense"][..], &["check", "now"], &["pods", "--address"], &["restart"], &["install", "--help"], &["uninstall", "--dry-run"]] {
            let ran = Command::new(&shim).args(arguments).output().unwrap();
            assert_eq!(ran.status.code(), Some(2), "{arguments:?}");
            assert!(ran.stdout.is_empty() && !ran.stderr.is_empty(), "{arguments:?}");
        }
    }

    fn each_holder_is_listed_and_a_replaced_program_is_seen(version) {
        without_options_of_the_machine!();
        let handler = |name: &str| Handler {
            name: name.to_owned(),
            runtime_type: "io.containerd.pause.v2".to_owned(),
            runtime_path: None,
            options: format!("holder = '{name}'"),
            sandbox_api: false,
        };
        let daemon = Daemon::with(version, &Options {
            handlers: vec![handler("process"), handler("image")],
            pause_image: PauseImage::Works,
            ..Options::default()
        });
        // A file of its own: the harness's is a link.
        daemon.replace_shim();
        let node = Node::of(&daemon);
        assert_eq!(node.pods(), [Value::Null; 0]);
        let thread = PodSpec::new("threaded").run(&daemon);
        let (_one, _two) = (thread.sleeper("one"), thread.sleeper("two"));
        let process = PodSpec::new("processed").handler("process").run(&daemon);
        let image = PodSpec::new("imaged").handler("image").run(&daemon);
        for (pod, kind, name, containers) in [(&thread, "thread", "threaded", 2), (&process, "process", "processed", 0), (&image, "image", "imaged", 0)] {
            let seen = node.pod(&pod.id);
            assert_eq!(seen["holder"]["kind"], kind, "{seen}");
            assert_eq!(seen["holder"]["pid"], pod.pid(), "{seen}");
            assert_eq!(seen["name"], name, "{seen}");
            assert!(seen["namespace"].is_string(), "{seen}");
            assert_eq!(seen["containers"], containers, "{seen}");
            assert_eq!(seen["containerd_namespace"], "k8s.io");
            assert_eq!(seen["shim"]["file"], "current", "{seen}");
            assert!(seen["shim"]["version"].is_string(), "{seen}");
            let shim = i32::try_from(seen["shim"]["pid"].as_i64().unwrap()).unwrap();
            assert!(daemon.shims().iter().any(|one| one.pid == shim), "{seen}");
            let private = seen["shim"]["private_kib"].as_u64().unwrap();
            assert!((50..20_000).contains(&private), "{seen}");
        }
        assert_eq!(node.pods().len(), 3);
        daemon.replace_shim();
        let seen = node.pod(&thread.id);
        assert_eq!(seen["shim"]["file"], "replaced", "{seen}");
        assert_eq!(seen["shim"]["file_version"], seen["shim"]["version"], "{seen}");
        let table = String::from_utf8(node.run("pods", &[]).stdout).unwrap();
        let line = table.lines().find(|line| line.starts_with(&thread.id[..13])).unwrap();
        assert!(line.contains("thread ") && line.contains("on disk: another build of"), "{table}");
        assert_eq!(table.lines().count(), 4, "{table}");
        daemon.end();
    }

    fn a_killed_shim_is_gone_and_a_silent_one_is_said(version) {
        without_options_of_the_machine!();
        let daemon = Daemon::start(version);
        let node = Node::of(&daemon);
        let pod = PodSpec::new("killed").run(&daemon);
        let _one = pod.sleeper("one");
        let shim = daemon.shim();
        kill(shim.pid, Signal::STOP);
        let silent = node.pod(&pod.id);
        kill(shim.pid, Signal::CONT);
        assert_eq!(silent["shim"]["pid"], shim.pid, "{silent}");
        assert_eq!(silent["shim"]["version"], Value::Null, "{silent}");
        assert_eq!(silent["name"], "killed", "{silent}");
        // While containerd is away, nobody takes down what the shim leaves.
        daemon.kill();
        kill(shim.pid, Signal::KILL);
        eventually(Duration::from_secs(5), || {
            let lives = Process::of(shim.pid).is_some_and(|now| now.start == shim.start && now.state != 'Z');
            ok_if(!lives, || "the shim lives".to_owned())
        });
        let config = Node { path: format!("{}:{}", text(&version.binaries()), node.path), ..Node::of(&daemon) };
        assert_eq!(config.pod(&pod.id)["shim"], Value::Null);
        daemon.start_again();
        eventually(Duration::from_secs(10), || {
            let pods = node.pods();
            ok_if(pods.is_empty(), || format!("{pods:?}"))
        });
        daemon.end();
    }
}

on_the_newest_containerd! {
    fn pods_of_the_sandbox_api_are_listed(version) {
        without_options_of_the_machine!();
        let daemon = Daemon::with(version.through_the_sandbox_api(), &Options::default());
        let node = Node::of(&daemon);
        let thread = PodSpec::new("threaded").run(&daemon);
        let _one = thread.sleeper("one");
        let process = PodSpec::new("mapped").user_namespace(ROOT).run(&daemon);
        for (pod, kind, name, containers) in [(&thread, "thread", "threaded", 1), (&process, "process", "mapped", 0)] {
            let seen = node.pod(&pod.id);
            assert_eq!(seen["holder"]["kind"], kind, "{seen}");
            assert_eq!(seen["holder"]["pid"], pod.pid(), "{seen}");
            assert_eq!(seen["name"], name, "{seen}");
            assert_eq!(seen["containers"], containers, "{seen}");
        }
        let shim = node.pod(&thread.id)["shim"]["pid"].as_i64().unwrap();
        assert!(threads(i32::try_from(shim).unwrap()) > 1);
        daemon.end();
    }
}
