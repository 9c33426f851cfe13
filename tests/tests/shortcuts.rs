//! The shim starts and deletes a container without running runc, and the difference cannot be seen: for each release of
//! runc, with hooks, and with the cases that are left to runc.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::fs::inotify;
use rustix::io::Errno;
use serde_json::{Value, json};
use shim_tests::daemon::Driver;
use shim_tests::direct::Group;
use shim_tests::fake_runc::FakeRunc;
use shim_tests::slot::text;
use shim_tests::until::ok_if;
use shim_tests::{
    Daemon, Options, PodSpec, cgroups, eventually, lab, left_out, node, on_every_containerd,
    ours_only,
};

/// The runc of a test, which writes its calls down, and runc's root.
struct Runc {
    program: FakeRunc,
    root: PathBuf,
}

impl Runc {
    /// One for each release of the table in `shim/src/runtime/release.rs` that the lab has.
    fn each(daemon: &Daemon) -> [Self; 3] {
        [
            lab::runc(),
            lab::newer_runtime("runc-1.1.15"),
            lab::newer_runtime("runc"),
        ]
        .map(|real| Self::new(daemon, &real))
    }

    fn new(daemon: &Daemon, real: &Path) -> Self {
        // Two are named `runc`.
        let name = text(real).replace('/', "-");
        let folder = daemon.directory().join(format!("of{name}"));
        Self {
            program: FakeRunc::new(&folder, real),
            root: folder.join("root"),
        }
    }

    fn options(&self) -> String {
        format!(
            "BinaryName = '{}'\nRoot = '{}'\n",
            text(self.program.program()),
            text(&self.root)
        )
    }

    fn namespace_root(&self, daemon: &Daemon) -> PathBuf {
        self.root.join(daemon.names.name())
    }

    /// Runs a container, so that a shim asks for the release, and waits for the answer.
    #[track_caller]
    fn ask(&self, group: &Group, id: &str) {
        self.run(group, id, "exit 3", 3);
        self.program.wait_until_asked(&self.root);
        self.program.calls();
    }

    /// A container's whole life, which ends by itself. Gives the commands that were runs of runc.
    #[track_caller]
    fn run(&self, group: &Group, id: &str, script: &str, exit: u32) -> Vec<String> {
        self.program.calls();
        let bundle = group.bundle(id, script, |_| {});
        self.create(group, id, &bundle);
        group.shim.start(id, "").unwrap();
        assert_eq!(group.shim.wait(id, "").unwrap(), exit);
        assert_eq!(group.shim.delete(id, "").unwrap(), exit);
        group.remove_bundle(id);
        self.commands()
    }

    #[track_caller]
    fn create(&self, group: &Group, id: &str, bundle: &Path) {
        let created = group.create_with_options(id, bundle, &self.options());
        created.unwrap_or_else(|refusal| panic!("create {id}: {refusal:?}"));
    }

    /// The rest of the life of a created container, which "ends", is "killed", or stays "unstarted", with this exit code:
    /// without another run of runc, and nothing is left.
    #[track_caller]
    fn end(&self, daemon: &Daemon, group: &Group, id: &str, (fate, exit): (&str, u32)) {
        if fate != "unstarted" {
            group.shim.start(id, "").unwrap();
            if fate == "killed" {
                group.shim.kill(id, "", 9).unwrap();
            }
            assert_eq!(group.shim.wait(id, "").unwrap(), exit);
        }
        assert_eq!(group.shim.delete(id, "").unwrap(), exit, "{fate}");
        group.remove_bundle(id);
        assert_eq!(self.commands(), ["create"], "{fate}");
        assert!(!self.namespace_root(daemon).join(id).exists(), "{fate}");
    }

    /// The commands since the last look.
    fn commands(&self) -> Vec<String> {
        let known = ["create", "start", "delete", "exec", "--version"];
        let command = |call: &String| {
            let word = call.split(' ').find(|word| known.contains(word));
            word.unwrap_or_else(|| panic!("{call}")).to_owned()
        };
        self.program.calls().iter().map(command).collect()
    }
}

/// Writes to a file, by whomever.
struct Writes(OwnedFd);

impl Writes {
    fn to(path: &Path) -> Self {
        let inotify = inotify::init(inotify::CreateFlags::NONBLOCK).unwrap();
        inotify::add_watch(&inotify, path, inotify::WatchFlags::MODIFY).unwrap();
        Self(inotify)
    }

    fn seen(&self) -> bool {
        match rustix::io::read(&self.0, &mut [0; 4096]) {
            Ok(bytes) => bytes > 0,
            Err(error) => {
                assert_eq!(error, Errno::AGAIN);
                false
            }
        }
    }
}

/// Hooks that write into `log` their name and the state that the runtime tells.
fn recording_hooks(log: &Path, names: &[&str]) -> Value {
    let hook = |name: &&str| {
        let script = format!(
            "echo {name} $(grep -o '\"status\":\"[a-z]*\"') >>{}",
            text(log)
        );
        let hook = json!([{"path": "/bin/sh", "args": ["sh", "-c", script]}]);
        ((*name).to_owned(), hook)
    };
    Value::Object(names.iter().map(hook).collect())
}

/// The hooks that crun runs itself: when it starts a container, and when it deletes one.
#[track_caller]
fn assert_hooks_are_for_crun(daemon: &Daemon, group: &Group, crun: &Runc) {
    crun.ask(group, "crun");
    for (hook, expected) in [
        ("createRuntime", &["create"][..]),
        ("poststart", &["create", "start"]),
        ("poststop", &["create", "delete"]),
    ] {
        let id = format!("crun-{hook}");
        let log = daemon.directory().join(&id);
        let bundle = group.bundle(&id, "exit 7", |spec| {
            spec["hooks"] = recording_hooks(&log, &[hook]);
        });
        crun.create(group, &id, &bundle);
        group.shim.start(&id, "").unwrap();
        assert_eq!(group.shim.wait(&id, "").unwrap(), 7);
        assert_eq!(group.shim.delete(&id, "").unwrap(), 7);
        group.remove_bundle(&id);
        assert_eq!(crun.commands(), expected, "{hook}");
        let ran = fs::read_to_string(&log).unwrap();
        assert_eq!(ran.lines().count(), 1, "{hook}: {ran}");
    }
}

on_every_containerd! {
    fn hooks_run_as_they_do_under_runc(version) {
        ours_only!("it always runs runc");
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "hooks");
        for (turn, runc) in Runc::each(&daemon).iter().enumerate() {
            runc.ask(&group, &format!("c{turn}"));
            let [short, long] = [true, false].map(|shortcuts| {
                let id = format!("c{turn}-{shortcuts}");
                let log = daemon.directory().join(&id);
                let bundle = group.bundle(&id, "echo program >>/out; exit 7", |spec| {
                    fs::write(&log, "").unwrap();
                    spec["hooks"] = recording_hooks(&log, &["createRuntime", "poststart", "poststop"]);
                    // This hook runs in the container.
                    spec["hooks"]["startContainer"] = recording_hooks(Path::new("/out"), &["startContainer"])["startContainer"].clone();
                    let mount = json!({"destination": "/out", "type": "bind", "source": text(&log), "options": ["bind"]});
                    spec["mounts"].as_array_mut().unwrap().push(mount);
                });
                group.create_with_options(&id, &bundle, &format!("{}shortcuts = {shortcuts}", runc.options())).unwrap();
                group.shim.start(&id, "").unwrap();
                assert_eq!(runc.commands().contains(&"start".to_owned()), !shortcuts);
                assert_eq!(group.shim.wait(&id, "").unwrap(), 7);
                assert_eq!(group.shim.delete(&id, "").unwrap(), 7);
                group.remove_bundle(&id);
                fs::read_to_string(log).unwrap()
            });
            assert_eq!(short, long, "{turn}");
            assert_eq!(short.lines().count(), 5, "{short}");
            let ends: Vec<&str> = short.lines().filter(|line| line.starts_with("poststop")).collect();
            assert_eq!(ends, ["poststop \"status\":\"stopped\""], "{short}");
        }
        group.end();
        // No state of runc's, no cgroup.
        daemon.end();
    }

    fn with_systemd_start_and_delete_need_no_runc_either(version) {
        ours_only!("it always runs runc");
        let in_a_node = node::in_a_node("with_systemd_start_and_delete_need_no_runc_either", version, || {
            let daemon = Daemon::with(version, &Options { driver: Driver::Systemd, ..Options::default() });
            let group = Group::start(&daemon, "scopes");
            let crun = Runc::new(&daemon, &lab::crun());
            assert_hooks_are_for_crun(&daemon, &group, &crun);
            for (turn, runc) in Runc::each(&daemon).iter().chain([&crun]).enumerate() {
                runc.ask(&group, &format!("c{turn}"));
                for (fate, exit) in [("ends", 3), ("killed", 137), ("unstarted", 137)] {
                    let id = format!("c{turn}-{fate}");
                    let script = if fate == "ends" { "exit 3" } else { "exec sleep 3600" };
                    let bundle = group.bundle(&id, script, |spec| {
                        spec["linux"]["cgroupsPath"] = format!("{}:test:{id}", daemon.cgroup_parent()).into();
                    });
                    let options = format!("{}SystemdCgroup = true", runc.options());
                    let pid = group.create_with_options(&id, &bundle, &options).unwrap();
                    let scope = format!("test-{id}.scope");
                    let membership = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
                    assert!(membership.contains(&scope), "{membership}");
                    runc.end(&daemon, &group, &id, (fate, exit));
                    let state = Command::new("systemctl").args(["show", "--value", "--property=LoadState", &scope]).output().unwrap();
                    assert_eq!(state.stdout, b"not-found\n", "{fate}");
                }
            }
            group.end();
            daemon.end();
        });
        if let Err(why) = in_a_node {
            left_out!(&format!("no node with systemd can be made here: {why}"));
        }
    }

    fn start_and_delete_need_no_runc(version) {
        ours_only!("it always runs runc");
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "short");
        for (turn, runc) in Runc::each(&daemon).iter().enumerate() {
            runc.ask(&group, &format!("c{turn}"));
            // A container that ends by itself, one that is killed, and one that was never started.
            for (fate, exit) in [("ends", 3), ("killed", 137), ("unstarted", 137)] {
                let id = format!("c{turn}-{fate}");
                let bundle = group.bundle(&id, if fate == "ends" { "exit 3" } else { "exec sleep 3600" }, |_| {});
                runc.create(&group, &id, &bundle);
                runc.end(&daemon, &group, &id, (fate, exit));
            }
        }
        group.end();
        daemon.end();
    }

    fn an_unknown_release_does_all_itself(version) {
        ours_only!("it always runs runc");
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "unknown");
        let runc = Runc::new(&daemon, &lab::runc());
        for (turn, release) in ["1.9.0", "1.3.7-rc.1", "1.3.6-dev", "1.3.6+dev"].iter().enumerate() {
            runc.program.replace();
            runc.program.set_version(Some(release));
            for id in [format!("c{turn}"), format!("c{turn}-asked")] {
                let mut commands = runc.run(&group, &id, "exit 3", 3);
                commands.retain(|command| command != "--version");
                assert_eq!(commands, ["create", "start", "delete"], "{id}: {release}");
                runc.program.wait_until_asked(&runc.root);
            }
        }
        // And the same program with the name of a known release.
        runc.program.replace();
        runc.program.set_version(Some("1.3.6+ds1-1"));
        runc.ask(&group, "known");
        assert_eq!(runc.run(&group, "known-asked", "exit 3", 3), ["create"]);
        group.end();
        daemon.end();
    }

    fn an_upgrade_of_runc_is_noticed(version) {
        ours_only!("it always runs runc");
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "upgrade");
        let runc = Runc::new(&daemon, &lab::runc());
        runc.ask(&group, "c1");
        let bundle = group.bundle("c2", "exit 3", |_| {});
        runc.create(&group, "c2", &bundle);
        runc.program.replace();
        runc.program.set_version(Some("1.9.0"));
        group.shim.start("c2", "").unwrap();
        assert_eq!(group.shim.wait("c2", "").unwrap(), 3);
        assert_eq!(group.shim.delete("c2", "").unwrap(), 3);
        group.remove_bundle("c2");
        assert_eq!(runc.commands(), ["create", "start", "delete"]);
        runc.ask(&group, "c3");
        assert_eq!(runc.run(&group, "c4", "exit 3", 3), ["create", "start", "delete"]);
        group.end();
        daemon.end();
    }

    fn the_kernel_is_readied_for_releases_that_lose_nothing_by_that(version) {
        ours_only!("it always runs runc");
        for (real, readied) in [("runc-1.1.15", false), ("runc", true)] {
            let folder = tempfile::tempdir().unwrap();
            let runc = FakeRunc::new(folder.path(), &lab::newer_runtime(real));
            let root = folder.path().join("root");
            let options = format!(
                "ShimCgroup = '$CGROUP_PARENT/of-shims'\nBinaryName = '{}'\nRoot = '{}'\n", text(runc.program()), text(&root));
            let daemon = Daemon::with(version, &Options::runtime(&options));
            let pod = PodSpec::new("readied").run(&daemon);
            let shims = cgroups::directory(daemon.shim().pid, "pids").unwrap();
            let writes = Writes::to(&shims.join("cgroup.procs"));
            let first = pod.sleeper("one");
            assert!(readied || !writes.seen(), "{real}");
            runc.wait_until_asked(&root);
            let second = pod.sleeper("two");
            assert_eq!(first.exec(&["true"]).code, 0);
            assert_eq!(second.exec(&["true"]).code, 0);
            assert_eq!(writes.seen(), readied, "{real}");
            pod.stop();
            pod.remove();
            eventually(Duration::from_secs(10), || ok_if(daemon.shims().is_empty(), || "the shim is there".to_owned()));
            assert!(shim_tests::leaks::remove_cgroups_of_shims(&daemon.names) > 0);
            daemon.end();
        }
    }

    fn what_only_runc_can_do_is_left_to_it(version) {
        ours_only!("it always runs runc");
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "left");
        let runc = Runc::new(&daemon, &lab::runc());
        runc.ask(&group, "first");
        let log = daemon.directory().join("log");
        let bundle = group.bundle("c", "exit 3", |spec| spec["hooks"] = recording_hooks(&log, &["poststop"]));
        runc.create(&group, "c", &bundle);
        group.shim.start("c", "").unwrap();
        assert_eq!(group.shim.wait("c", "").unwrap(), 3);
        assert_eq!(runc.commands(), ["create"]);
        // The container is not deleted as long as its poststop hook cannot be run.
        runc.program.set_crash(Some("delete"));
        let refused = group.shim.delete("c", "").unwrap_err();
        assert!(refused.message.contains("panic: no delete today"), "{refused}");
        assert!(!log.exists());
        runc.program.set_crash(None);
        assert_eq!(group.shim.delete("c", "").unwrap(), 3);
        assert!(log.exists());
        group.remove_bundle("c");

        // A state of which the shim does not know everything, as of a release with something new in it.
        let bundle = group.bundle("new", "exit 3", |_| {});
        runc.create(&group, "new", &bundle);
        let state = runc.namespace_root(&daemon).join("new/state.json");
        let mut changed: Value = serde_json::from_slice(&fs::read(&state).unwrap()).unwrap();
        changed["config"]["of_the_next_release"] = json!(true);
        fs::write(&state, serde_json::to_vec(&changed).unwrap()).unwrap();
        group.shim.start("new", "").unwrap();
        assert_eq!(group.shim.wait("new", "").unwrap(), 3);
        assert_eq!(runc.commands(), ["delete", "delete", "delete", "create", "start"]);
        assert_eq!(group.shim.delete("new", "").unwrap(), 3);
        assert!(runc.commands().contains(&"delete".to_owned()));
        group.remove_bundle("new");
        group.end();
        daemon.end();
    }

    fn a_shared_process_namespace_leaves_nobody(version) {
        ours_only!("it always runs runc");
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "shared");
        // The container's other process does not end with the init.
        let bundle = group.bundle("c", "sleep 3600 & exit 5", |spec| {
            let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|namespace| namespace["type"] != "pid");
        });
        group.create_from("c", &bundle).unwrap();
        group.shim.start("c", "").unwrap();
        assert_eq!(group.shim.wait("c", "").unwrap(), 5);
        assert_eq!(group.shim.delete("c", "").unwrap(), 5);
        group.remove_bundle("c");
        group.end();
        daemon.end();
    }
}
