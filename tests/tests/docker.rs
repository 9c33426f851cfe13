//! Containers of the Docker Engine: Debian 13's on containerd 1.7, and unstable's on 2.1. Each scenario runs with the shim
//! under test and with the stock shim, and what a user of Docker sees must be the same.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use shim_tests::docker::{Docker, SUBORDINATE};
use shim_tests::slot::text;
use shim_tests::until::ok_if;
use shim_tests::{
    ShimUnderTest, Terminal, eventually, image, lab, left_out, on_the_two_newest_containerds,
    ours_only,
};

/// A Docker daemon, or the end of the test where none can run.
macro_rules! docker {
    ($docker:expr) => {
        match $docker {
            Ok(docker) => docker,
            Err(why) => left_out!(&format!("Docker does not run here: {why}")),
        }
    };
}

/// `docker run` of a shell command.
fn run<'a>(runtime: &'a str, flags: &[&'a str], script: &'a str) -> Vec<&'a str> {
    let program = ["--runtime", runtime, image::BUSYBOX, "sh", "-c", script];
    [&["run"], flags, &program].concat()
}

on_the_two_newest_containerds! {
    fn run_gives_the_programs_output_and_exit_code(version) {
        let docker = docker!(Docker::start(version));
        let (answers, events) = docker.on_both(|runtime| {
            let answer = |script| docker.answer(&run(runtime, &["--rm"], script));
            [
                answer("echo out; echo err >&2"),
                answer("exit 3"),
                // A signal ends a child, and no PID 1 that has no handler.
                answer("sh -c 'kill -SEGV $$'; exit $?"),
                docker.answer(&run(runtime, &["--rm", "--init"], "tr '\\0' ' ' </proc/1/cmdline; exit 4")),
            ]
        });
        let [plain, code, signal, init] = answers;
        docker.on_both(|runtime| {
            let unknown = ["run", "--name", "unknown", "--runtime", runtime, image::BUSYBOX, "no-such-program"];
            assert_eq!(docker.answer(&unknown).code, 127);
            let mut state = docker.state("unknown");
            assert!(state["Error"].take().as_str().unwrap().contains("no-such-program"), "{state}");
            docker.run(&["rm", "unknown"]);
            state
        });
        assert_eq!((plain.code, plain.stdout.as_str(), plain.stderr.as_str()), (0, "out\n", "err\n"));
        assert_eq!((code.code, signal.code, init.code), (3, 139, 4));
        assert!(init.stdout.starts_with("/sbin/docker-init -- sh -c"), "{init:?}");
        assert_eq!(events[..5], ["create", "attach", "start", "die 0", "destroy"]);
        docker.end();
    }

    fn a_detached_container_has_a_log_and_takes_execs(version) {
        let docker = docker!(Docker::start(version));
        docker.on_both(|runtime| {
            docker.run(&run(runtime, &["--detach", "--name", "app"], "echo out; echo err >&2; exec sleep 1000"));
            docker.wait_for_log("app", "out");
            let logs = docker.answer(&["logs", "app"]);
            assert_eq!((logs.stdout.as_str(), logs.stderr.as_str()), ("out\n", "err\n"));

            assert_eq!(docker.answer(&["exec", "app", "sh", "-c", "exit 5"]).code, 5);
            assert_eq!(docker.answer(&["exec", "app", "sh", "-c", "kill -TERM $$"]).code, 143);
            let mut cat = docker.command(&["exec", "--interactive", "app", "cat"]);
            let mut cat = cat.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
            cat.stdin.take().unwrap().write_all(b"hello\n").unwrap();
            assert_eq!(cat.wait_with_output().unwrap().stdout, b"hello\n");
            // Docker has the reason from the shim. runc's own words are no output of the exec.
            let unknown = docker.answer(&["exec", "app", "no-such-program"]);
            assert_eq!(unknown.stderr, "", "{unknown:?}");

            let top = docker.run(&["top", "app", "-eo", "pid,comm"]);
            assert_eq!(top.split_whitespace().skip(3).collect::<Vec<_>>(), ["sleep"], "{top}");
            let stats = docker.run(&["stats", "--no-stream", "--format", "{{.PIDs}} {{.MemUsage}}", "app"]);
            assert!(stats.starts_with("1 ") && !stats.contains(" 0B /"), "{stats}");
            let running = docker.state("app");
            docker.run(&["rm", "--force", "app"]);
            (running, unknown.code)
        });
        docker.end();
    }

    fn a_terminal_is_a_terminal(version) {
        let docker = docker!(Docker::start(version));
        docker.on_both(|runtime| {
            let tty = ["--rm", "--interactive", "--tty"];
            let mut terminal = Terminal::start(docker.command(&run(runtime, &tty, "tty; exec sh")));
            terminal.expect("/dev/pts/0");
            terminal.enter("until [ \"$(stty size)\" = '40 100' ]; do sleep 0.1; done; echo si'ze'\n");
            // Docker's client misses a size that comes while it begins to watch.
            eventually(Duration::from_secs(10), || {
                terminal.resize(40, 100);
                ok_if(terminal.printed().contains("size\r\n"), || terminal.printed())
            });
            terminal.enter("exit 6\n");
            assert_eq!(terminal.wait().code(), Some(6));

            docker.run(&run(runtime, &["--detach", "--name", "app"], "exec sleep 1000"));
            let exec = ["exec", "--interactive", "--tty", "app", "sh"];
            let mut terminal = Terminal::start(docker.command(&exec));
            terminal.enter("test -t 0 && echo termi'nal'\n");
            terminal.expect("terminal\r\n");
            terminal.enter("exit 7\n");
            assert_eq!(terminal.wait().code(), Some(7));
            docker.run(&["rm", "--force", "app"]);
        });
        docker.end();
    }

    fn stop_waits_for_the_program_and_then_kills(version) {
        let docker = docker!(Docker::start(version));
        let ((honoured, ignored), events) = docker.on_both(|runtime| {
            let heeds = "trap 'exit 7' TERM; echo ready; while :; do sleep 0.1; done";
            docker.run(&run(runtime, &["--detach", "--name", "heeds"], heeds));
            docker.wait_for_log("heeds", "ready");
            docker.run(&["stop", "heeds"]);
            let honoured = docker.state("heeds");
            docker.run(&["rm", "heeds"]);

            docker.run(&run(runtime, &["--detach", "--name", "ignores"], "exec sleep 1000"));
            docker.run(&["stop", "--time", "1", "ignores"]);
            let ignored = docker.state("ignores");
            docker.run(&["start", "ignores"]);
            docker.run(&["kill", "ignores"]);
            assert_eq!(docker.run(&["wait", "ignores"]), "137");
            docker.run(&["rm", "ignores"]);
            (honoured, ignored)
        });
        assert_eq!((&honoured["ExitCode"], &honoured["Status"]), (&json!(7), &json!("exited")));
        assert_eq!(ignored["ExitCode"], 137);
        assert_eq!(events, [
            "create", "start", "kill 15", "die 7", "destroy",
            "create", "start", "kill 15", "kill 9", "die 137",
            "start", "kill 9", "die 137", "destroy",
        ]);
        docker.end();
    }

    fn restart_policies_count(version) {
        let docker = docker!(Docker::start(version));
        let (count, events) = docker.on_both(|runtime| {
            let flags = ["--detach", "--name", "app", "--restart", "on-failure:2"];
            docker.run(&run(runtime, &flags, "exit 9"));
            docker.wait_for("app", "Status", &json!("exited"));
            let count = docker.run(&["inspect", "--format", "{{.RestartCount}}", "app"]);
            assert_eq!(docker.state("app")["ExitCode"], 9);
            docker.run(&["rm", "app"]);
            count
        });
        assert_eq!(count, "2");
        assert_eq!(events.iter().filter(|event| *event == "die 9").count(), 3);
        docker.end();
    }

    fn containers_outlive_dockerd(version) {
        let docker = docker!(Docker::start(version));
        let (ended, _) = docker.on_both(|runtime| {
            let file = docker.containerd.directory().join("go");
            let volume = format!("{}:/go", file.display());
            fs::create_dir_all(&file).unwrap();
            let lives = "i=0; while :; do i=$((i + 1)); echo $i; sleep 0.1; done";
            let ends = "until [ -e /go/now ]; do sleep 0.1; done; echo last; exit 11";
            docker.run(&run(runtime, &["--detach", "--name", "lives"], lives));
            docker.run(&run(runtime, &["--detach", "--name", "ends", "--volume", &volume], ends));
            docker.wait_for_log("lives", "1\n");
            let pid = docker.run(&["inspect", "--format", "{{.State.Pid}}", "lives"]);
            let mortal = docker.run(&["inspect", "--format", "{{.State.Pid}}", "ends"]);

            docker.kill();
            fs::write(file.join("now"), "").unwrap();
            eventually(Duration::from_secs(10), || {
                let gone = shim_tests::proc::Process::of(mortal.parse().unwrap()).is_none();
                ok_if(gone, || "the container has not ended".to_owned())
            });
            docker.start_again();

            assert_eq!(docker.run(&["inspect", "--format", "{{.State.Pid}}", "lives"]), pid);
            let before = docker.answer(&["logs", "lives"]).stdout.lines().count();
            docker.wait_for_log("lives", &format!("\n{}\n", before + 3));
            docker.wait_for("ends", "Running", &json!(false));
            let ended = docker.state("ends");
            assert_eq!(docker.answer(&["exec", "lives", "true"]).code, 0);
            docker.run(&["rm", "ends"]);
            docker.run(&["rm", "--force", "lives"]);
            fs::remove_dir_all(&file).unwrap();
            ended
        });
        assert_eq!(ended["ExitCode"], 11);
        docker.end();
    }

    fn a_kill_for_lack_of_memory_is_told(version) {
        let docker = docker!(Docker::start(version));
        let (state, events) = docker.on_both(|runtime| {
            let flags = ["--name", "eats", "--memory", "16m", "--memory-swap", "16m"];
            docker.answer(&run(runtime, &flags, "exec tail /dev/zero"));
            let state = docker.state("eats");
            docker.run(&["rm", "eats"]);
            state
        });
        assert_eq!((&state["OOMKilled"], &state["ExitCode"]), (&json!(true), &json!(137)));
        assert!(events.iter().any(|event| event == "oom"), "{events:?}");
        docker.end();
    }

    fn pause_and_update(version) {
        let docker = docker!(Docker::start(version));
        let ((paused, limits), _) = docker.on_both(|runtime| {
            docker.run(&run(runtime, &["--detach", "--name", "app"], "exec sleep 1000"));
            docker.run(&["pause", "app"]);
            let paused = docker.state("app");
            docker.run(&["unpause", "app"]);
            docker.run(&["update", "--memory", "64m", "--memory-swap", "64m", "app"]);
            let find = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes || cat /sys/fs/cgroup/memory.max";
            let limit = docker.run(&["exec", "app", "sh", "-c", find]);
            let usage = docker.run(&["stats", "--no-stream", "--format", "{{.MemUsage}}", "app"]);
            docker.run(&["rm", "--force", "app"]);
            (paused, [limit, usage.split("/ ").last().unwrap().to_owned()])
        });
        assert_eq!((&paused["Paused"], &paused["Running"]), (&json!(true), &json!(true)));
        assert_eq!(limits, ["67108864", "64MiB"]);
        docker.end();
    }

    fn the_hosts_network_is_the_hosts(version) {
        let docker = docker!(Docker::start(version));
        let (networks, _) = docker.on_both(|runtime| {
            let flags = ["--detach", "--name", "app", "--network", "host"];
            docker.run(&run(runtime, &flags, "readlink /proc/self/ns/net; hostname; exec sleep 1000"));
            docker.wait_for_log("app", "\n");
            let network = docker.run(&["exec", "app", "readlink", "/proc/self/ns/net"]);
            let logs = docker.answer(&["logs", "app"]).stdout;
            docker.run(&["rm", "--force", "app"]);
            [network, logs]
        });
        let host = text(&fs::read_link("/proc/self/ns/net").unwrap());
        assert_eq!(networks[0], host);
        assert!(networks[1].starts_with(&host), "{networks:?}");
        docker.end();
    }

    fn a_checkpoint_is_started_again(version) {
        let criu = match lab::criu() {
            Ok(criu) => criu,
            Err(why) => left_out!(&why),
        };
        let docker = docker!(Docker::with(version, &json!({"experimental": true})));
        symlink(criu, docker.containerd.directory().join("bin/criu")).unwrap();
        docker.on_both(|runtime| {
            let say = "word=$(cat /proc/sys/kernel/random/uuid); while :; do echo $word; sleep 0.1; done";
            // criu cannot open a seccomp filter that another program has set, and nobody reads standard input.
            let flags = ["--detach", "--name", "app", "--security-opt", "seccomp=unconfined"];
            docker.run(&run(runtime, &flags, say));
            docker.wait_for_log("app", "-");
            docker.run(&["checkpoint", "create", "--leave-running", "app", "one"]);
            assert_eq!(docker.state("app")["Running"], true);
            docker.run(&["kill", "app"]);
            docker.wait_for("app", "Running", &json!(false));
            let lines = docker.answer(&["logs", "app"]).stdout.lines().count();
            docker.run(&["start", "--checkpoint", "one", "app"]);
            let logs = eventually(Duration::from_secs(10), || {
                let logs = docker.answer(&["logs", "app"]).stdout;
                ok_if(logs.lines().count() > lines + 3, || logs.clone()).map(|()| logs)
            });
            let mut words: Vec<_> = logs.lines().collect();
            words.dedup();
            assert_eq!(words.len(), 1, "a restored program has its memory: {words:?}");
            assert_eq!(docker.answer(&["exec", "app", "true"]).code, 0);
            docker.run(&["rm", "--force", "app"]);
        });
        docker.end();
    }

    fn a_checkpoint_leaves_the_container_running(version) {
        ours_only!("Docker tells the stock shim to end the container, and no other");
        let criu = match lab::criu() {
            Ok(criu) => criu,
            Err(why) => left_out!(&why),
        };
        let docker = docker!(Docker::with(version, &json!({"experimental": true})));
        symlink(criu, docker.containerd.directory().join("bin/criu")).unwrap();
        let runtime = ShimUnderTest::get().runtime_type();
        let flags = ["--detach", "--name", "app", "--security-opt", "seccomp=unconfined"];
        docker.run(&run(runtime, &flags, "exec sleep 1000"));
        docker.run(&["checkpoint", "create", "app", "one"]);
        assert_eq!(docker.state("app")["Running"], true);
        assert_eq!(docker.answer(&["exec", "app", "true"]).code, 0);
        docker.run(&["rm", "--force", "app"]);
        docker.end();
    }

    fn the_annotation_of_a_sandbox_makes_no_sandbox(version) {
        let docker = docker!(Docker::start(version));
        let (answer, _) = docker.on_both(|runtime| {
            let annotation = "io.kubernetes.cri.container-type=sandbox";
            docker.answer(&run(runtime, &["--rm", "--annotation", annotation], "echo hello"))
        });
        assert_eq!((answer.code, answer.stdout.as_str()), (0, "hello\n"));
        docker.end();
    }

    fn a_remapped_root_opens_its_output(version) {
        let docker = docker!(Docker::remapped(version));
        let (answer, _) = docker.on_both(|runtime| {
            let script = "echo out >/dev/stdout; echo err >/dev/stderr; cat /proc/self/uid_map";
            docker.answer(&run(runtime, &["--rm"], script))
        });
        assert_eq!(answer.stderr, "err\n");
        assert!(answer.stdout.starts_with("out\n"), "{answer:?}");
        assert!(answer.stdout.contains(&format!("{SUBORDINATE}")), "{answer:?}");
        docker.end();
    }

    fn options_come_from_the_file_that_daemon_json_names(version) {
        ours_only!("the file has this shim's options");
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| text(&folder.path().join(name));
        let file = lab::repository().join("config/docker/daemon.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
        let pause = config["runtimes"]["pause"].take();
        let with_options = |options: Value| {
            let mut runtime = pause.clone();
            runtime["options"] = options;
            runtime
        };
        fs::write(path("good.toml"), format!("Root = '{}'\n", path("root"))).unwrap();
        fs::write(path("bad.toml"), "NoSuchOption = true\n").unwrap();
        let docker = docker!(Docker::with(version, &json!({
            "default-runtime": "pause",
            "runtimes": {
                "pause": with_options(json!({"ConfigPath": path("good.toml")})),
                "wrong": with_options(json!({"ConfigPath": path("bad.toml")})),
                "inline": with_options(json!({"Root": path("inline"), "NoSuchOption": true})),
            },
        })));
        docker.validate(&file);

        // The default runtime: its state is where the file says.
        let id = docker.run(&["run", "--detach", image::BUSYBOX, "sleep", "1000"]);
        let states = Path::new(&path("root")).join(docker.containerd.names.name());
        assert!(states.join(&id).join("state.json").exists(), "{}", states.display());
        docker.run(&["rm", "--force", &id]);
        assert!(!states.join(&id).exists(), "{}", states.display());

        let wrong = docker.answer(&run("wrong", &["--rm"], "true"));
        assert_ne!(wrong.code, 0, "{wrong:?}");
        assert!(wrong.stderr.contains("NoSuchOption"), "{wrong:?}");

        // Docker drops, without a word, every option but the name of the file.
        let inline = docker.answer(&run("inline", &["--rm"], "true"));
        assert_eq!((inline.code, inline.stderr.as_str()), (0, ""));
        assert!(!Path::new(&path("inline")).exists());
        docker.end();
    }
}
