//! `make bench` measures: one pod of each shim.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::fs;
use std::process::Command;

use serde_json::Value;
use shim_tests::{Version, left_out, ours_only};

#[test]
fn the_bench_runs_on_a_node_with_systemd() {
    ours_only!("it runs both shims side by side");
    let out = tempfile::tempdir().unwrap();
    let ran = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args([
            "latency",
            "execs",
            "calls",
            "--rounds",
            "1",
            "--containerd",
            "2.1",
        ])
        .args(["--execs", "10", "--calls", "10", "--network", "host"])
        .args(["--place", "systemd,busy", "--shims", "this,this-crun,stock"])
        .arg("--out")
        .arg(out.path())
        .output()
        .unwrap();
    assert!(ran.status.success(), "{ran:?}");
    let said = String::from_utf8(ran.stdout).unwrap();
    if let Some(why) = said.lines().find(|line| line.contains("Not measured")) {
        left_out!(why);
    }
    let json = fs::read(out.path().join("bench.json")).unwrap();
    let json: Value = serde_json::from_slice(&json).unwrap();
    for (run, shims) in json["runs"].as_array().unwrap().iter().zip([3, 2]) {
        let columns = run["columns"].as_array().unwrap();
        assert_eq!(columns.len(), shims, "{run}");
        for column in columns {
            assert_eq!(column["notes"], serde_json::json!([]), "{column}");
            let figure = &column["figures"]["latency host: StartContainer"];
            assert!(
                figure["median"].as_f64().is_some_and(|ms| ms > 0.0),
                "{column}"
            );
        }
    }
    let figures = &json["runs"][0]["columns"][0]["figures"];
    for figure in [
        "execs, 10 at a time: CPU of one",
        "calls: wall time of one Stats",
        "cpu host: of a pod's life",
    ] {
        assert!(
            figures[figure]["median"].as_f64().is_some(),
            "{figure}: {figures}"
        );
    }
}

#[test]
fn one_round_has_every_figure_of_every_shim() {
    ours_only!("it runs both shims side by side");
    let out = tempfile::tempdir().unwrap();
    let ran = Command::new(env!("CARGO_BIN_EXE_bench"))
        .args([
            "latency",
            "--rounds",
            "1",
            "--containerd",
            &Version::newest().line(),
        ])
        .args(["--place", "machine"])
        .args(["--shims", "this,api,stock", "--network", "loopback"])
        .arg("--out")
        .arg(out.path())
        .output()
        .unwrap();
    assert!(ran.status.success(), "{ran:?}");
    for file in ["bench.md", "bench.svg"] {
        assert!(out.path().join(file).is_file(), "{file}");
    }
    let json = fs::read(out.path().join("bench.json")).unwrap();
    let json: Value = serde_json::from_slice(&json).unwrap();
    let columns = json["runs"][0]["columns"].as_array().unwrap();
    let shims: Vec<_> = columns.iter().map(|column| &column["shim"]).collect();
    assert_eq!(shims, ["this", "api", "stock"]);
    for column in columns {
        assert_eq!(column["notes"], serde_json::json!([]), "{column}");
        for call in [
            "RunPodSandbox",
            "CreateContainer",
            "StartContainer",
            "pod ready",
            "ExecSync",
            "StopContainer",
            "StopPodSandbox",
            "RemovePodSandbox",
        ] {
            let figure = &column["figures"][format!("latency loopback: {call}")];
            for value in ["median", "p90", "p99"] {
                // JSON has no infinity: a value that is not finite is null.
                let value = figure[value].as_f64();
                assert!(value.is_some_and(|ms| ms > 0.0), "{call}: {figure}");
            }
            assert_eq!(figure["count"], 1, "{call}: {figure}");
        }
        let cpu = column["figures"]["cpu loopback: of a pod's life"]["median"].as_f64();
        assert!(cpu.is_some_and(|ms| ms > 0.0), "{column}");
    }
}
