//! What containerd, kubelet and other programs on the node find of a pod: its cgroups, its bundles, its annotations.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test reports by failing"
)]

use std::fs;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use serde_json::json;
use shim_tests::cgroups::{self, Hierarchy, hierarchy};
use shim_tests::direct::Group;
use shim_tests::lab::ShimUnderTest;
use shim_tests::slot::text;
use shim_tests::until::ok_if;
use shim_tests::{
    Daemon, Options, PodSpec, Terminal, eventually, in_every_mode, on_every_containerd, ours_only,
};

/// The fields of a line of logrus' text format; none for a line in another format. Values in quotes are left as they are.
fn fields(line: &str) -> Option<Vec<(&str, &str)>> {
    let mut rest = line;
    let mut found = Vec::new();
    while !rest.is_empty() {
        let (key, value) = rest.split_once('=')?;
        let quoted = value.starts_with('"');
        let mut escaped = false;
        let end = value
            .char_indices()
            .skip(usize::from(quoted))
            .find(|&(_, c)| {
                let ends = !escaped && c == if quoted { '"' } else { ' ' };
                escaped = quoted && c == '\\' && !escaped;
                ends
            });
        let end = match end {
            Some((end, _)) => end + usize::from(quoted),
            None if quoted => return None,
            None => value.len(),
        };
        found.push((key, &value[..end]));
        rest = value[end..].trim_start_matches(' ');
    }
    Some(found)
}

/// The lines of the log that have this field, without what is the same in all of them or another in each run: time, pids
/// and the place of the socket.
fn story(log: &str, key: &str, value: &str) -> Vec<String> {
    let ever = [
        "time",
        "pid",
        "socket",
        "version",
        "pod",
        "namespace",
        "runtime",
    ];
    let lines = log.lines().filter_map(fields);
    let of_ours = lines.filter(|line| line.contains(&("runtime", "io.containerd.pause.v2")));
    let of_pod = of_ours.filter(|line| line.contains(&(key, value)));
    of_pod
        // The first pod of a node has one more line, on the runtime that the shim has found.
        .filter(|line| line.iter().all(|(key, _)| *key != "program"))
        .map(|mut line| {
            line.retain(|(key, _)| !ever.contains(key));
            let words = line.iter().map(|(key, value)| match *key {
                "level" | "msg" => value.trim_matches('"').to_owned(),
                key => format!("{key}={value}"),
            });
            words.collect::<Vec<_>>().join(" ")
        })
        .collect()
}

in_every_mode! {
    fn the_log_tells_the_story_of_a_pod(version) {
        ours_only!("the stock shim logs no story");
        let daemon = Daemon::with(version, &Options { debug: false, ..Options::default() });
        let other = PodSpec::new("other").run(&daemon);
        let of_other = other.sleeper("one");
        let pod = PodSpec::new("web").run(&daemon);
        let (one, two) = (pod.sleeper("one"), pod.sleeper("two"));
        // A probe: no line at info.
        one.output(&["true"]);
        let mut look = daemon.ctr_command_in("k8s.io");
        look.args(["tasks", "exec", "--tty", "--exec-id", "look", "--fifo-dir"])
            .args([&text(&daemon.directory().join("fifo")), &one.id, "sh", "-c", "exit 3"]);
        Terminal::start(look).wait();
        other.stop();
        one.stop(0);
        two.stop(0);
        pod.stop();
        pod.remove();
        other.remove();
        let end = "info shim ends reason=\"shutdown: nothing is left\"";
        let ended = |id: &str| story(&daemon.log(), "pod", id).last().is_some_and(|last| last == end);
        eventually(Duration::from_secs(10), || {
            ok_if(ended(&pod.id) && ended(&other.id), || daemon.log_tail(30))
        });

        let expected = [
            "info shim serves".to_owned(),
            "info sandbox started name=default/web holder=thread".to_owned(),
            format!("info container started container={} name=one", one.id),
            format!("info container started container={} name=two", two.id),
            format!("info exec started container={} exec=look", one.id),
            format!("info exec exited container={} exec=look status=3", one.id),
            format!("info container exited container={} status=137", one.id),
            format!("info container exited container={} status=137", two.id),
            "info sandbox exited status=137".to_owned(),
            end.to_owned(),
        ];
        assert_eq!(story(&daemon.log(), "pod", &pod.id), expected);
        let of_one: Vec<_> = expected.into_iter().filter(|line| line.contains(&one.id)).collect();
        assert_eq!(story(&daemon.log(), "container", &one.id), of_one);
        assert_eq!(story(&daemon.log(), "container", &of_other.id).len(), 2, "started, exited");
        daemon.end();
    }

    fn the_cgroup_of_a_sandbox_has_the_least_cpu_weight(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("light").run(&daemon);
        let (_, info) = pod.status();
        let path = info["runtimeSpec"]["linux"]["cgroupsPath"].as_str().unwrap();
        let cgroup = cgroups::root("cpu").join(path.trim_start_matches('/'));
        let (file, least) = match hierarchy() {
            Hierarchy::V1 => ("cpu.shares", "2"),
            Hierarchy::V2 => ("cpu.weight", "1"),
        };
        assert_eq!(fs::read_to_string(cgroup.join(file)).unwrap().trim(), least);
        daemon.end();
    }

    fn the_bundle_of_each_container_has_the_shims_address(version) {
        // containerd 1.6 and 1.7 dial the address after a restart, also after a downgrade from 2.x.
        ours_only!("containerd 2.x writes the file for no container that joins a pod, and the stock shim does not either");
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("addressed").run(&daemon);
        for container in [pod.sleeper("one"), pod.sleeper("two")] {
            let bundles = daemon.directory().join("state/io.containerd.runtime.v2.task/k8s.io");
            let address = fs::read_to_string(bundles.join(&container.id).join("address")).unwrap();
            let socket = address.strip_prefix("unix://").unwrap();
            UnixStream::connect(socket).unwrap_or_else(|error| panic!("{socket}: {error}"));
        }
        daemon.end();
    }
}

on_every_containerd! {
    fn a_container_that_calls_itself_a_sandbox_runs_its_program(version) {
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "named");
        // As with `docker run --annotation`: only CRI knows the id of the sandbox.
        let bundle = group.bundle("c", "exit 7", |spec| {
            spec["annotations"]["io.kubernetes.cri.container-type"] = json!("sandbox");
        });
        group.create_from("c", &bundle).unwrap();
        group.shim.start("c", "").unwrap();
        assert_eq!(group.shim.wait("c", "").unwrap(), 7, "{:?}", ShimUnderTest::get());
        group.remove("c");
        group.end();
        daemon.end();
    }
}
