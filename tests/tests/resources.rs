//! The kernel's counters, limits and freezer of a container, by Task calls on the shim itself.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use containerd_shim_protos::api::Status;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::shim::oci::ProcessDetails;
use containerd_shim_protos::ttrpc::Code;
use rustix::process::Pid;
use rustix::thread::{CoreSchedulingScope, core_scheduling_cookie};
use serde_json::json;
use shim_tests::calls::code;
use shim_tests::cgroups::{self, Hierarchy, hierarchy, parameter};
use shim_tests::lab;
use shim_tests::proc::namespace;
use shim_tests::raw::Bundle;
use shim_tests::task::Task;
use shim_tests::until::ok_if;
use shim_tests::{
    Daemon, Options, PodSpec, ShimUnderTest, eventually, left_out, on_every_containerd, ours_only,
};

const MIB: i64 = 1024 * 1024;

/// A running task: `sh -c SCRIPT`.
fn run_script<'a>(daemon: &'a Daemon, id: &str, script: &str) -> Task<'a> {
    let bundle = Bundle::new(daemon, id);
    let spec = bundle.plain_spec(&["sh", "-c", script]);
    Task::run(bundle.write_spec(&spec), b"")
}

/// The processes in the cgroup of `pid`.
fn pids_in_cgroup(pid: i32) -> Vec<i32> {
    let directory = cgroups::directory(pid, "pids").unwrap();
    let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap();
    text.lines().map(|line| line.parse().unwrap()).collect()
}

/// The CPU time of a process, in user mode and in the kernel, in clock ticks.
fn cpu_ticks(pid: i32) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<_> = stat
        .rsplit_once(')')
        .unwrap()
        .1
        .split_whitespace()
        .collect();
    fields[11].parse::<u64>().unwrap() + fields[12].parse::<u64>().unwrap()
}

/// 512 shares, and a quota of half the period.
#[track_caller]
fn assert_half_the_shares_and_half_a_processor(pid: i32) {
    let get = |v1: &str, v2: &str| parameter(pid, v1, v2);
    match hierarchy() {
        Hierarchy::V1 => {
            assert_eq!(get("cpu.shares", ""), "512");
            assert_eq!(get("cpu.cfs_quota_us", ""), "50000");
            assert_eq!(get("cpu.cfs_period_us", ""), "100000");
        }
        Hierarchy::V2 => {
            // The formula from shares to weights has changed between runc's versions.
            let weight: u32 = get("", "cpu.weight").parse().unwrap();
            assert!((15..100).contains(&weight), "{weight}");
            assert_eq!(get("", "cpu.max"), "50000 100000");
        }
    }
}

on_every_containerd! {
    fn update_changes_the_files_of_the_cgroup(version) {
        let daemon = Daemon::start(version);
        let task = run_script(&daemon, "update", "sleep 3600");
        let update = |resources| task.update(&resources).unwrap();
        let get = |v1: &str, v2: &str| parameter(task.pid, v1, v2);

        update(json!({"cpu": {"shares": 512, "quota": 50_000, "period": 100_000}}));
        assert_half_the_shares_and_half_a_processor(task.pid);
        update(json!({"memory": {"limit": 64 * MIB, "swap": 96 * MIB}}));
        assert_eq!(get("memory.limit_in_bytes", "memory.max"), (64 * MIB).to_string());
        // v1 counts memory and swap together.
        let swap = match hierarchy() {
            Hierarchy::V1 => 96 * MIB,
            Hierarchy::V2 => 32 * MIB,
        };
        let file = get("memory.memsw.limit_in_bytes", "memory.swap.max");
        assert_eq!(file, swap.to_string());
        update(json!({"memory": {"limit": 128 * MIB, "swap": 128 * MIB}}));
        assert_eq!(get("memory.limit_in_bytes", "memory.max"), (128 * MIB).to_string());
        update(json!({"pids": {"limit": 77}}));
        assert_eq!(get("pids.max", "pids.max"), "77");
        update(json!({"cpu": {"cpus": "0"}}));
        assert_eq!(get("cpuset.cpus", "cpuset.cpus"), "0");
        // The limit of an earlier update stays.
        assert_eq!(get("pids.max", "pids.max"), "77");
        if hierarchy() == Hierarchy::V2 {
            update(json!({"unified": {"memory.high": (48 * MIB).to_string()}}));
            assert_eq!(get("", "memory.high"), (48 * MIB).to_string());
        }
        if cgroups::directory(task.pid, "hugetlb").is_some_and(|path| path.join("hugetlb.2MB.current").exists()) {
            // `runc update` takes this and does nothing of it, also when it is called by hand; the rest is done.
            let file = || get("hugetlb.2MB.limit_in_bytes", "hugetlb.2MB.max");
            let created = file();
            update(json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 4 * MIB}], "pids": {"limit": 76}}));
            assert_eq!((get("pids.max", "pids.max"), file()), ("76".to_owned(), created));
        } else {
            lab::left_out(module_path!(), "the limit of huge pages: this machine has none");
        }
        task.pause().unwrap();
        update(json!({"pids": {"limit": 78}}));
        assert_eq!(get("pids.max", "pids.max"), "78");
        // runc freezes a container while some limits change: the thaw afterwards must not end the pause.
        assert_eq!(task.state("").unwrap(), Status::PAUSED);
        let frozen = get("freezer.state", "cgroup.freeze");
        assert!(["FROZEN", "1"].contains(&&*frozen), "{frozen}");
        task.resume().unwrap();
        task.end();
        daemon.end();
    }

    fn update_that_cannot_be_changes_nothing(version) {
        let daemon = Daemon::start(version);
        let task = run_script(&daemon, "update", "sleep 3600");
        task.update(&json!({"pids": {"limit": 77}, "memory": {"limit": 64 * MIB, "swap": 64 * MIB}})).unwrap();
        let before = || {
            (parameter(task.pid, "pids.max", "pids.max"), parameter(task.pid, "memory.limit_in_bytes", "memory.max"),
             parameter(task.pid, "cpuset.cpus", "cpuset.cpus"))
        };
        let then = before();
        for (wrong, word) in [
            (json!({"cpu": {"cpus": "4000"}, "pids": {"limit": 99}}), "cpuset"),
            (json!({"cpu": {"cpus": "none"}, "pids": {"limit": 99}}), "cpus"),
            (json!({"pids": "many"}), "pids"),
            (json!({"memory": {"limit": 96 * MIB, "swap": 32 * MIB}}), "memory"),
        ] {
            let said = task.update(&wrong).unwrap_err();
            assert!(said.message.contains(word), "{wrong}: {said}");
            assert_eq!(before(), then, "{wrong}");
        }
        assert_eq!(task.state("").unwrap(), Status::RUNNING);
        task.kill("", 9).unwrap();
        assert_eq!(task.wait("").unwrap(), 137);
        task.update(&json!({"pids": {"limit": 99}})).unwrap_err();
        task.end();
        daemon.end();
    }

    fn paused_is_paused_for_every_call(version) {
        let daemon = Daemon::start(version);
        let events = daemon.events();
        let task = run_script(&daemon, "paused", "while :; do :; done");
        task.resume().unwrap_err();
        task.pause().unwrap();
        assert_eq!(task.state("").unwrap(), Status::PAUSED);
        let stopped_at = cpu_ticks(task.pid);
        // Long enough for a busy process to be seen working.
        std::thread::sleep(Duration::from_millis(500));
        assert_eq!(cpu_ticks(task.pid), stopped_at);
        task.pause().unwrap_err();
        task.exec("e", &["true"]).unwrap_err();
        assert!(!task.stats().unwrap().value.is_empty());
        assert!(task.pids().unwrap().iter().any(|(pid, _)| *pid == task.pid));
        task.delete("").unwrap_err();
        task.resume().unwrap();
        assert_eq!(task.state("").unwrap(), Status::RUNNING);
        task.resume().unwrap_err();
        eventually(Duration::from_secs(10), || ok_if(cpu_ticks(task.pid) > stopped_at, || "it does not go on".to_owned()));
        task.exec("e", &["true"]).unwrap();
        task.start("e").unwrap();
        assert_eq!(task.wait("e").unwrap(), 0);
        task.delete("e").unwrap();
        eventually(Duration::from_secs(5), || {
            let seen = events.of("paused");
            let expected = ["create", "start", "paused", "resumed", "exec-added:e", "exec-started:e", "exit:e"];
            ok_if(seen == expected, || format!("{seen:?}"))
        });
        task.end();
        daemon.end();
    }

    fn paused_and_killed_is_dead(version) {
        let daemon = Daemon::start(version);
        let task = run_script(&daemon, "paused", "sleep 3600 & sleep 3600");
        task.pause().unwrap();
        let begin = Instant::now();
        task.kill("", 9).unwrap();
        assert_eq!(task.wait("").unwrap(), 137);
        assert!(begin.elapsed() < Duration::from_secs(8), "{:?}", begin.elapsed());
        assert_eq!(task.state("").unwrap(), Status::STOPPED);
        assert_eq!(code(&task.kill("", 9)), Code::NOT_FOUND);
        task.pause().unwrap_err();
        assert_eq!(task.end(), 137);
        daemon.end();
    }

    fn killed_while_it_is_being_paused_is_dead(version) {
        let daemon = Daemon::start(version);
        for round in 0..8 {
            // Many processes take long to freeze.
            let task = run_script(&daemon, &format!("paused-{round}"), "for n in $(seq 50); do sleep 3600 & done; sleep 3600");
            task.pause_and_kill().unwrap();
            assert_eq!(task.wait("").unwrap(), 137);
            assert_eq!(task.end(), 137);
        }
        daemon.end();
    }

    fn pids_name_the_execs(version) {
        let daemon = Daemon::start(version);
        let task = run_script(&daemon, "pids", "sleep 3600 & wait");
        task.exec("first exec", &["sleep", "3600"]).unwrap();
        let exec = task.start("first exec").unwrap();
        eventually(Duration::from_secs(5), || {
            let listed = task.pids().unwrap();
            let mut pids: Vec<_> = listed.iter().map(|(pid, _)| *pid).collect();
            let mut expected = pids_in_cgroup(task.pid);
            pids.sort_unstable();
            expected.sort_unstable();
            ok_if(pids.len() == 3 && pids == expected, || format!("{pids:?}, in the cgroup {expected:?}"))
        });
        for (pid, info) in task.pids().unwrap() {
            if pid == exec {
                let info = info.unwrap();
                assert_eq!(info.type_url, "containerd.runc.v1.ProcessDetails");
                assert_eq!(ProcessDetails::parse_from_bytes(&info.value).unwrap().exec_id, "first exec");
            } else {
                assert!(info.is_none(), "{pid}: {info:?}");
            }
        }
        task.kill("first exec", 9).unwrap();
        assert_eq!(task.wait("first exec").unwrap(), 137);
        task.delete("first exec").unwrap();
        assert_eq!(task.pids().unwrap().len(), 2);
        task.end();
        daemon.end();
    }

    fn kill_all_reaches_every_process(version) {
        let daemon = Daemon::start(version);
        let bundle = Bundle::new(&daemon, "all");
        // The node's processes: nothing ends with the init.
        let mut spec = bundle.plain_spec(&["sh", "-c", "sleep 3601 & sleep 3602 & wait"]);
        spec["linux"]["namespaces"].as_array_mut().unwrap().retain(|namespace| namespace["type"] != "pid");
        let task = Task::run(bundle.write_spec(&spec), b"");
        task.exec("e", &["sleep", "3603"]).unwrap();
        task.start("e").unwrap();
        let pids = eventually(Duration::from_secs(5), || {
            let pids = pids_in_cgroup(task.pid);
            if pids.len() == 4 { Ok(pids) } else { Err(format!("{pids:?}")) }
        });
        task.kill_all(9).unwrap();
        assert_eq!(task.wait("e").unwrap(), 137);
        assert_eq!(task.wait("").unwrap(), 137);
        eventually(Duration::from_secs(5), || {
            let left: Vec<_> = pids.iter().filter(|pid| fs::exists(format!("/proc/{pid}")).unwrap()).collect();
            ok_if(left.is_empty(), || format!("{left:?}"))
        });
        task.end();
        daemon.end();
    }

    fn the_end_of_an_init_is_the_end_of_its_processes(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("all").shared_processes().run(&daemon);
        let container = pod.container("one").shell("sleep 3601 & sleep 3602 & wait").start();
        let neighbour = pod.sleeper("two");
        let pids = eventually(Duration::from_secs(5), || {
            let pids = pids_in_cgroup(container.pid());
            if pids.len() == 3 { Ok(pids) } else { Err(format!("{pids:?}")) }
        });
        assert_eq!(namespace(container.pid(), "pid"), namespace(neighbour.pid(), "pid"));
        shim_tests::proc::kill(container.pid(), rustix::process::Signal::KILL);
        assert_eq!(container.wait(), 137);
        eventually(Duration::from_secs(5), || {
            let left: Vec<_> = pids.iter().filter(|pid| fs::exists(format!("/proc/{pid}")).unwrap()).collect();
            ok_if(left.is_empty(), || format!("{left:?}"))
        });
        assert!(neighbour.running());
        daemon.end();
    }

    fn a_shim_goes_where_shim_cgroup_says_and_containers_do_not(version) {
        ours_only!("it makes the cgroup itself; the stock shim wants it to be there");
        let daemon = Daemon::with(version, &Options::runtime("ShimCgroup = '$CGROUP_PARENT/of-shims'"));
        let pod = PodSpec::new("placed").run(&daemon);
        let container = pod.sleeper("one");
        let (shim, init) = (daemon.shim().pid, container.pid());
        let expected = format!("{}/of-shims", daemon.names.cgroup_parent());
        let of_shim = fs::read_to_string(format!("/proc/{shim}/cgroup")).unwrap();
        let controlled = |line: &&str| hierarchy() == Hierarchy::V2 || !line.contains("::");
        assert!(of_shim.lines().filter(controlled).all(|line| line.ends_with(&expected)), "{of_shim}");
        let of_container = fs::read_to_string(format!("/proc/{init}/cgroup")).unwrap();
        assert!(!of_container.lines().filter(controlled).any(|line| line.contains("of-shims")), "{of_container}");
        pod.stop();
        pod.remove();
        eventually(Duration::from_secs(10), || ok_if(daemon.shims().is_empty(), || "the shim is there".to_owned()));
        assert!(shim_tests::leaks::remove_cgroups_of_shims(&daemon.names) > 0);
        daemon.end();
    }

    fn a_path_for_systemd_is_left_to_systemd(version) {
        ours_only!("the stock shim makes a cgroup of that name, unless SystemdCgroup is set");
        if !Path::new("/run/systemd/system").is_dir() {
            left_out!("systemd does not run this machine");
        }
        let daemon = Daemon::start(version);
        let bundle = Bundle::new(&daemon, "unit");
        let mut spec = bundle.plain_spec(&["sh", "-c", "sleep 3600 & wait"]);
        let name = daemon.names.name();
        spec["linux"]["cgroupsPath"] = json!(format!("system.slice:{name}:unit"));
        spec["linux"]["resources"] = json!({"pids": {"limit": 50}});
        let task = Task::run(bundle.write_spec(&spec), b"");
        let directory = cgroups::directory(task.pid, "pids").unwrap();
        assert!(directory.ends_with(format!("system.slice/{name}-unit.scope")), "{}", directory.display());
        assert_eq!(parameter(task.pid, "pids.max", "pids.max"), "50");
        task.update(&json!({"pids": {"limit": 60}})).unwrap();
        assert_eq!(parameter(task.pid, "pids.max", "pids.max"), "60");
        assert!(!task.stats().unwrap().value.is_empty());
        eventually(Duration::from_secs(5), || {
            let listed = task.pids().unwrap().len();
            ok_if(listed == 2, || format!("{listed} processes"))
        });
        task.pause().unwrap();
        assert_eq!(task.state("").unwrap(), Status::PAUSED);
        task.resume().unwrap();
        task.end();
        eventually(Duration::from_secs(10), || ok_if(!directory.exists(), || format!("{} stays", directory.display())));
        daemon.end();
    }

    fn sched_core_is_done_or_refused(version) {
        let options = Options {
            environment: vec![("SCHED_CORE".to_owned(), "1".to_owned())],
            ..Options::default()
        };
        let daemon = Daemon::with(version, &options);
        let cookie = |pid: i32| core_scheduling_cookie(Pid::from_raw(pid).unwrap(), CoreSchedulingScope::Thread);
        let kernel = cookie(std::process::id().cast_signed());
        let pod = PodSpec::new("cores").try_run(&daemon);
        match kernel {
            Ok(_) => {
                let pod = pod.unwrap();
                let container = pod.sleeper("one");
                let of_pod = cookie(daemon.shim().pid).unwrap();
                assert_ne!(of_pod, 0);
                assert_eq!(cookie(container.pid()).unwrap(), of_pod);
            }
            Err(rustix::io::Errno::NODEV) if ShimUnderTest::get() == ShimUnderTest::Pause => drop(pod.unwrap()),
            Err(error) => {
                lab::left_out(module_path!(), &format!("the domain itself: this kernel has none: {error}"));
                let Err(failure) = pod else { panic!("a pod runs without the isolation that was asked for") };
                let said = failure.0.to_lowercase();
                assert!(said.contains("sched_core") || said.contains("sched core"), "{said}");
            }
        }
        daemon.end();
    }
}
