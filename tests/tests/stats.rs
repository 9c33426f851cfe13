//! The statistics of a container, compared with the kernel's numbers and with the stock shim's.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::collections::BTreeMap;
use std::time::Duration;

use containerd_shim_protos::cgroups::metrics::Metrics as MetricsV1;
use containerd_shim_protos::cgroups_v2::metrics::Metrics as MetricsV2;
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::ttrpc::Code;
use serde_json::json;
use shim_tests::calls::code;
use shim_tests::cgroups::{Hierarchy, hierarchy, parameter};
use shim_tests::raw::Bundle;
use shim_tests::task::Task;
use shim_tests::until::ok_if;
use shim_tests::{Daemon, PodSpec, ShimUnderTest, eventually, on_every_containerd, ours_only};

const MIB: u64 = 1024 * 1024;
const V1: &str = "io.containerd.cgroups.v1.Metrics";
const V2: &str = "io.containerd.cgroups.v2.Metrics";

/// A container with limits, 8 MiB of memory in a file, and a second of work behind it.
fn run_worker<'a>(daemon: &'a Daemon, id: &str, shim: ShimUnderTest) -> Task<'a> {
    let bundle = Bundle::new(daemon, id).driven_by(shim);
    let script = "dd if=/dev/zero of=/work/file bs=1M count=8 2>/dev/null
        i=0; while [ $i -lt 100000 ]; do i=$((i + 1)); done
        : > /work/ready; exec sleep 3600";
    let mut spec = bundle.plain_spec(&["sh", "-c", script]);
    spec["mounts"]
        .as_array_mut()
        .unwrap()
        .push(json!({"destination": "/work", "type": "tmpfs", "source": "tmpfs"}));
    spec["linux"]["resources"] = json!({
        "memory": {"limit": 64 * MIB, "swap": 64 * MIB},
        "pids": {"limit": 50},
        "cpu": {"quota": 80_000, "period": 100_000},
    });
    let task = Task::run(bundle.write_spec(&spec), b"");
    let ready = format!("/proc/{}/root/work/ready", task.pid);
    eventually(Duration::from_secs(60), || {
        ok_if(std::fs::exists(&ready).unwrap_or(false), || {
            "still works".to_owned()
        })
    });
    task
}

/// The fields of a message by their path, as its debug form has them.
fn fields_by_path(stats: &Any) -> BTreeMap<String, String> {
    let text = match &*stats.type_url {
        V1 => format!("{:#?}", MetricsV1::parse_from_bytes(&stats.value).unwrap()),
        V2 => format!("{:#?}", MetricsV2::parse_from_bytes(&stats.value).unwrap()),
        other => panic!("{other:?} are no metrics"),
    };
    let mut found = BTreeMap::new();
    let mut path: Vec<(String, usize)> = Vec::new();
    for line in text.lines().map(str::trim) {
        if line.starts_with(['}', ']', ')']) {
            path.pop();
            continue;
        }
        let number = path.last_mut().map_or(0, |(_, count)| {
            *count += 1;
            *count
        });
        let (name, value) = line
            .split_once(": ")
            .map_or((number.to_string(), line), |(name, value)| {
                (name.to_owned(), value)
            });
        if value.ends_with(['{', '[', '(']) {
            path.push((name, 0));
        } else {
            let prefix: Vec<_> = path
                .iter()
                .map(|(name, _)| name.as_str())
                .filter(|name| *name != "1")
                .collect();
            found.insert(
                format!("{}.{name}", prefix.join(".")),
                value.trim_end_matches(',').to_owned(),
            );
        }
    }
    found.retain(|path, _| !path.contains("special_fields"));
    found
}

/// Fields that are no limit and no count of the test's own work: zero in one container, perhaps not in the other.
const MAY_BE_ZERO: [&str; 24] = [
    "dirty",
    "writeback",
    "fault",
    "pg_",
    "pgs",
    "pga",
    "pgd",
    "pgr",
    "pgl",
    "inactive",
    "active",
    "huge",
    "thp",
    "mapped",
    "failcnt",
    "thrott",
    "periods",
    "workingset",
    "slab",
    "per_cpu",
    "psi",
    "low",
    "high",
    "sock",
];

#[track_caller]
fn assert_alike(ours: &BTreeMap<String, String>, stock: &BTreeMap<String, String>) {
    let may_be_zero = |path: &str| MAY_BE_ZERO.iter().any(|word| path.contains(word));
    let mut wrong = Vec::new();
    for path in ours.keys().chain(stock.keys()) {
        // Reads and writes of devices differ, and so do the lists of devices.
        if path.contains("blkio") || path.contains("io.") {
            continue;
        }
        let (Some(one), Some(other)) = (ours.get(path), stock.get(path)) else {
            if !may_be_zero(path) {
                wrong.push(format!(
                    "{path}: {:?} and {:?}",
                    ours.get(path),
                    stock.get(path)
                ));
            }
            continue;
        };
        let (Ok(one), Ok(other)) = (one.parse::<u64>(), other.parse::<u64>()) else {
            if one != other {
                wrong.push(format!("{path}: {one} and {other}"));
            }
            continue;
        };
        let both = |what: &str| path.contains(what);
        // The kernel schedules each container differently, and counts whole ticks.
        let split = [
            "per_cpu",
            "thrott",
            "usage.kernel",
            "usage.user",
            "user_usec",
            "system_usec",
        ];
        let fine = if split.iter().any(|what| both(what)) {
            true
        } else if both("limit") || both("pids") || both("oom") {
            one == other
        } else {
            let apart = one.abs_diff(other);
            (may_be_zero(path) || (one == 0) == (other == 0))
                && (apart <= 4 * MIB || apart < one.max(other))
        };
        if !fine {
            wrong.push(format!("{path}: {one} and {other}"));
        }
    }
    // Both messages are long, or the reading of them is wrong.
    assert!(ours.len() > 40 && stock.len() > 40, "{ours:#?} {stock:#?}");
    wrong.sort();
    wrong.dedup();
    assert!(
        wrong.is_empty(),
        "ours and the stock shim's differ:\n  {}",
        wrong.join("\n  ")
    );
}

#[track_caller]
fn number(fields: &BTreeMap<String, String>, end: &str) -> u64 {
    let found = fields.iter().find(|(path, _)| path.ends_with(end));
    let (_, value) = found.unwrap_or_else(|| panic!("no {end} in {fields:#?}"));
    value.parse().unwrap()
}

on_every_containerd! {
    fn stats_are_those_of_the_files(version) {
        let daemon = Daemon::start(version);
        let task = run_worker(&daemon, "files", ShimUnderTest::get());
        let get = |v1: &str, v2: &str| parameter(task.pid, v1, v2);
        let found = fields_by_path(&task.stats().unwrap());
        let (expected, cpu) = match hierarchy() {
            Hierarchy::V1 => {
                let memory = get("memory.stat", "");
                let stat = |key: &str| {
                    let line = memory.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(' '));
                    line.unwrap().to_owned()
                };
                let fixed = vec![
                    ("memory.MessageField.usage.limit", get("memory.limit_in_bytes", "")),
                    ("swap.limit", get("memory.memsw.limit_in_bytes", "")),
                    ("hierarchical_memory_limit", stat("hierarchical_memory_limit")),
                    ("hierarchical_swap_limit", stat("hierarchical_memsw_limit")),
                ];
                assert!(number(&found, "usage.total") <= get("cpuacct.usage", "").parse().unwrap());
                (fixed, (number(&found, "usage.total"), 1_000_000))
            }
            Hierarchy::V2 => {
                let fixed = vec![
                    ("usage_limit", get("", "memory.max")),
                    ("swap_limit", get("", "memory.swap.max")),
                ];
                let line = get("", "cpu.stat");
                let now: u64 = line.lines().next().unwrap().trim_start_matches("usage_usec ").parse().unwrap();
                assert!(number(&found, "usage_usec") <= now);
                (fixed, (number(&found, "usage_usec"), 1_000))
            }
        };
        for (path, value) in expected {
            let end = path.rsplit("MessageField.").next().unwrap();
            assert_eq!(number(&found, end).to_string(), value, "{path}");
        }
        // The container has worked for more than 20 ms, and for less than the minute of the deadline.
        let (used, millisecond) = cpu;
        assert!(used > 20 * millisecond && used < 60_000 * millisecond, "{used}");
        assert_eq!(get("pids.max", "pids.max"), "50");
        eventually(Duration::from_secs(10), || {
            // The kernel adds memory up every other second.
            let found = fields_by_path(&task.stats().unwrap());
            let of_files = match hierarchy() {
                Hierarchy::V1 => number(&found, ".total_cache"),
                Hierarchy::V2 => number(&found, ".shmem"),
            };
            ok_if((8 * MIB..12 * MIB).contains(&of_files), || format!("{of_files} bytes in files"))
        });
        task.end();
        daemon.end();
    }

    fn stats_are_the_stock_shims(version) {
        ours_only!("it compares ours with the stock shim");
        let daemon = Daemon::start(version);
        let ours = run_worker(&daemon, "ours", ShimUnderTest::Pause);
        let stock = run_worker(&daemon, "stock", ShimUnderTest::Runc);
        // The kernel adds memory up every other second.
        eventually(Duration::from_secs(10), || {
            let shown = [&ours, &stock].map(|task| fields_by_path(&task.stats().unwrap()));
            let memory = shown.each_ref().map(|found| match hierarchy() {
                Hierarchy::V1 => number(found, ".total_cache"),
                Hierarchy::V2 => number(found, ".shmem"),
            });
            ok_if(memory.iter().all(|bytes| *bytes >= 8 * MIB), || format!("{memory:?}"))
        });
        let (ours_said, stocks) = (ours.stats().unwrap(), stock.stats().unwrap());
        assert_eq!(ours_said.type_url, stocks.type_url);
        assert_alike(&fields_by_path(&ours_said), &fields_by_path(&stocks));
        ours.end();
        stock.end();
        daemon.end();
    }

    fn stats_at_each_time_of_a_life(version) {
        let daemon = Daemon::start(version);
        let bundle = Bundle::new(&daemon, "life");
        let spec = bundle.plain_spec(&["sleep", "3600"]);
        let task = Task::create(bundle.write_spec(&spec), b"");
        let is_metrics = |stats: Any| assert!([V1, V2].contains(&&*stats.type_url) && !stats.value.is_empty());
        is_metrics(task.stats().unwrap());
        task.start("").unwrap();
        is_metrics(task.stats().unwrap());
        task.pause().unwrap();
        is_metrics(task.stats().unwrap());
        task.resume().unwrap();
        task.kill("", 9).unwrap();
        task.wait("").unwrap();
        // The cgroup has not been removed yet.
        is_metrics(task.stats().unwrap());
        eventually(Duration::from_secs(10), || task.delete("").map_err(|refusal| refusal.to_string()));
        assert_eq!(code(&task.stats()), Code::NOT_FOUND);
        task.shut_down();
        daemon.end();
    }

    fn stats_of_a_sandbox(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("stats").run(&daemon);
        let _container = pod.sleeper("one");
        let shown = daemon.ctr_in("k8s.io", &["tasks", "metrics", "--format", "json", &pod.id]);
        let shown: serde_json::Value = serde_json::from_str(&shown).unwrap();
        assert!(shown.is_object(), "{shown}");
        daemon.end();
    }
}
