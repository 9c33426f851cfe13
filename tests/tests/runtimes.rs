//! Other OCI runtimes than the machine's runc, and the way of the runtime options to a runtime.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use serde_json::json;
use shim_tests::calls::Streams;
use shim_tests::daemon::Handler;
use shim_tests::direct::Group;
use shim_tests::fake_runc::FakeRunc;
use shim_tests::slot::text;
use shim_tests::{
    Daemon, Options, PodSpec, ShimUnderTest, Version, lab, left_out, on_every_containerd, ours_only,
};

/// A runtime that writes its arguments down, and then runs runc.
struct Recorder {
    directory: tempfile::TempDir,
}

impl Recorder {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let recorder = Self { directory };
        let script = format!(
            "#!/bin/sh\necho \"$*\" >>{}\nexec {} \"$@\"\n",
            text(&recorder.path("calls")),
            text(&lab::runc()),
        );
        fs::write(recorder.binary(), script).unwrap();
        fs::set_permissions(recorder.binary(), fs::Permissions::from_mode(0o755)).unwrap();
        recorder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn binary(&self) -> PathBuf {
        self.path("recorder")
    }

    /// As lines of an options table.
    fn options(&self) -> String {
        format!(
            "BinaryName = '{}'\nRoot = '{}'\nNoPivotRoot = true\nNoNewKeyring = true\n",
            text(&self.binary()),
            text(&self.path("root"))
        )
    }

    /// Every call named the root of [`Self::options`], and `create` had the flags. No state stays in the root.
    #[track_caller]
    fn assert_calls(&self, namespace: &str) {
        self.assert_calls_with_flags(namespace, &["--no-pivot", "--no-new-keyring"]);
    }

    #[track_caller]
    fn assert_calls_with_flags(&self, namespace: &str, flags: &[&str]) {
        let calls = fs::read_to_string(self.path("calls")).unwrap();
        let root = format!("--root {}", text(&self.path("root").join(namespace)));
        for call in calls
            .lines()
            .filter(|call| !call.contains("--version") && *call != "features")
        {
            assert!(call.contains(&root), "{call}");
            if ShimUnderTest::get() == ShimUnderTest::Pause {
                // An id that begins with a hyphen is no flag.
                let id = call.rsplit(' ').next().unwrap();
                assert!(call.ends_with(&format!(" -- {id}")), "{call}");
            }
        }
        let create = calls
            .lines()
            .find(|call| call.contains(" create "))
            .unwrap();
        for flag in flags {
            assert!(create.contains(flag), "{flag}: {create}");
        }
        for verb in [" start ", " exec ", " delete "] {
            assert!(calls.contains(verb), "{verb}: {calls}");
        }
        let left = fs::read_dir(self.path("root").join(namespace)).map_or(0, Iterator::count);
        assert_eq!(left, 0, "states in {root}");
    }
}

/// crun, without the sight of cgroup v2: crun refuses a machine with v1 and v2 side by side.
struct Crun {
    directory: tempfile::TempDir,
}

impl Crun {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let crun = Self { directory };
        let script = format!(
            "#!/bin/sh\nexec unshare --mount sh -c \
             'umount --lazy /sys/fs/cgroup/unified 2>/dev/null; exec \"$0\" \"$@\"' {} \"$@\"\n",
            text(&lab::crun())
        );
        fs::write(crun.binary(), script).unwrap();
        fs::set_permissions(crun.binary(), fs::Permissions::from_mode(0o755)).unwrap();
        crun
    }

    fn binary(&self) -> PathBuf {
        self.directory.path().join("crun")
    }
}

#[track_caller]
fn run_pod_and_exec(daemon: &Daemon, handler: &str) {
    let pod = PodSpec::new("optional").handler(handler).run(daemon);
    let container = pod.sleeper("one");
    assert_eq!(container.output(&["hostname"]), "optional");
}

/// The everyday calls for a pod and its containers, with this runtime.
fn assert_everyday_calls_work(version: Version, runtime: &Path) {
    let options = format!("BinaryName = '{}'", text(runtime));
    let daemon = Daemon::with(version, &Options::runtime(&options));
    for shared in [false, true] {
        let spec = PodSpec::new("other");
        let pod = if shared {
            spec.shared_processes()
        } else {
            spec
        }
        .run(&daemon);
        let one = pod.sleeper("one");
        let executed = one.exec(&["sh", "-c", "echo out; echo err >&2; exit 42"]);
        assert_eq!((executed.code, executed.stdout.as_str()), (42, "out\n"));
        assert!(one.stats().cpu.is_some());
        let absent = one.try_exec(&["/no/such/program"]).unwrap_err();
        assert!(absent.0.contains("/no/such/program"), "{absent}");
        let absent = pod
            .container("absent")
            .command(&["/no/such/program"])
            .try_start();
        let absent = absent.err().expect("nothing to run").0;
        assert!(absent.contains("/no/such/program"), "{absent}");
        let ended = pod.container("ended").shell("exit 3").start();
        assert_eq!(ended.wait(), 3);
        one.stop(0);
        assert_eq!(one.wait(), 137);
        pod.stop();
        pod.remove();
    }
    // And without a pod.
    let runtime = text(runtime);
    let options = if ShimUnderTest::get() == ShimUnderTest::Runc {
        vec!["--detach", "--runc-binary", &runtime]
    } else {
        vec!["--detach"]
    };
    let run = daemon
        .ctr_run(&options, "alone", &["sleep", "3600"])
        .output()
        .unwrap();
    assert!(run.status.success(), "{run:?}");
    daemon.end();
}

on_every_containerd! {
    fn options_of_a_table_reach_the_runtime(version) {
        let recorder = Recorder::new();
        let daemon = Daemon::with(version, &Options::runtime(&recorder.options()));
        run_pod_and_exec(&daemon, "");
        daemon.end();
        recorder.assert_calls("k8s.io");
    }

    fn options_of_ctr_reach_the_runtime(version) {
        let recorder = Recorder::new();
        let daemon = Daemon::start(version);
        let [file, binary, root] = ["options.toml", "recorder", "root"].map(|name| text(&recorder.path(name)));
        // ctr takes single options for the stock shim's type only. For other types ctr passes on the path of a file.
        let (flags, expected): (&[&str], &[&str]) = match ShimUnderTest::get() {
            ShimUnderTest::Pause => {
                fs::write(&file, recorder.options()).unwrap();
                (&["--detach", "--runtime-config-path", &file], &["--no-pivot", "--no-new-keyring"])
            }
            ShimUnderTest::Runc => (&["--detach", "--runc-binary", &binary, "--runc-root", &root], &[]),
        };
        let run = daemon.ctr_run(flags, "alone", &["sleep", "3600"]).output().unwrap();
        assert!(run.status.success(), "{run:?}");
        daemon.look();
        let fifos = text(&daemon.directory().join("fifo"));
        daemon.ctr(&["tasks", "exec", "--fifo-dir", &fifos, "--exec-id", "e", "alone", "true"]);
        let namespace = daemon.names.name();
        daemon.end();
        recorder.assert_calls_with_flags(&namespace, expected);
    }

    fn an_id_may_begin_with_a_hyphen(version) {
        ours_only!("containerd allows no such id, and the stock shim takes it for a flag");
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "hyphen");
        let crun = Crun::new();
        for (turn, runtime) in [lab::runc(), lab::newer_runtime("runc"), crun.binary()].iter().enumerate() {
            let id = format!("-force-{turn}");
            let options = format!("BinaryName = '{}'\nshortcuts = false\n", text(runtime));
            let bundle = group.bundle(&id, "exec sleep 3600", |_| {});
            group.create_with_options(&id, &bundle, &options).unwrap_or_else(|refusal| panic!("{}: {refusal}", runtime.display()));
            group.shim.start(&id, "").unwrap();
            group.shim.exec(&id, "e", &["true"], &Streams::default()).unwrap();
            group.shim.start(&id, "e").unwrap();
            assert_eq!(group.shim.wait(&id, "e").unwrap(), 0);
            group.shim.delete(&id, "e").unwrap();
            group.shim.kill(&id, "", 9).unwrap();
            assert_eq!(group.shim.wait(&id, "").unwrap(), 137);
            assert_eq!(group.shim.delete(&id, "").unwrap(), 137);
            group.remove_bundle(&id);
        }
        group.end();
        daemon.end();
    }

    fn ctr_runs_where_the_options_name_systemd(version) {
        let daemon = Daemon::start(version);
        let file = daemon.directory().join("options.toml");
        fs::write(&file, "SystemdCgroup = true\n").unwrap();
        let file = text(&file);
        // What the fixed file of a node with kubeadm says. ctr tells the stock shim nothing by itself.
        let flags: &[&str] = match ShimUnderTest::get() {
            ShimUnderTest::Pause => &["--rm", "--runtime-config-path", &file],
            ShimUnderTest::Runc => &["--rm"],
        };
        let run = daemon.ctr_run(flags, "plain", &["echo", "works"]).output().unwrap();
        assert!(run.status.success(), "{run:?}");
        assert_eq!(String::from_utf8_lossy(&run.stdout).trim(), "works");
        daemon.end();
    }

    fn a_crash_of_the_runtime_leaves_a_trace(version) {
        ours_only!("the options are ours");
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "crash");
        let runc = FakeRunc::new(&daemon.directory().join("crash-runc"), &lab::runc());
        let options = format!("BinaryName = '{}'\nshortcuts = false\n", text(runc.program()));
        let bundle = group.bundle("c", "exec sleep 3600", |_| {});
        runc.set_crash(Some("create"));
        let said = group.create_with_options("c", &bundle, &options).unwrap_err().message;
        assert!(said.contains("exit status 2") && said.contains("stderr"), "{said}");
        runc.set_crash(None);
        group.create_with_options("c", &bundle, &options).unwrap();
        for command in ["start", "update", "delete"] {
            runc.set_crash(Some(command));
            let said = match command {
                "start" => group.shim.start("c", "").map(drop),
                "update" => group.shim.update("c", &json!({"pids": {"limit": 77}})),
                _ => {
                    group.shim.kill("c", "", 9).unwrap();
                    group.shim.wait("c", "").unwrap();
                    group.shim.delete("c", "").map(drop)
                }
            };
            let said = said.unwrap_err().message;
            assert!(said.contains(&format!("panic: no {command} today")), "{said}");
            runc.set_crash(None);
            if command == "start" {
                group.shim.start("c", "").unwrap();
            }
        }
        assert_eq!(group.shim.delete("c", "").unwrap(), 137);
        group.remove_bundle("c");
        group.end();
        daemon.end();
    }

    fn a_newer_runc(version) {
        assert_everyday_calls_work(version, &lab::newer_runtime("runc"));
    }

    fn crun(version) {
        let crun = Crun::new();
        assert_everyday_calls_work(version, &crun.binary());
    }

    /// As `options_of_a_table_reach_the_runtime`, for a handler that says it is of the stock shim's type.
    fn options_of_a_handler_by_path_reach_the_runtime(version) {
        if version == Version::V1_6 {
            left_out!("1.6 reads runtime_path and does not use it");
        }
        let recorder = Recorder::new();
        let options = Options {
            handlers: vec![Handler::of_the_stock_type("typed", version, &recorder.options())],
            ..Options::default()
        };
        let daemon = Daemon::with(version, &options);
        run_pod_and_exec(&daemon, "typed");
        daemon.end();
        recorder.assert_calls("k8s.io");
    }
}
