//! The shim starts and deletes a container without running runc, and the difference cannot be seen: for each release of
//! runc, with hooks, and with the cases that are left to runc.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::fs;
use std::path::{Path, PathBuf};

use containerd_shim_protos::api::{CreateTaskRequest, CreateTaskResponse};
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use serde_json::{Value, json};
use shim_tests::direct::Group;
use shim_tests::slot::text;
use shim_tests::{Daemon, lab, on_every_containerd, ours_only};

/// Programs named `runc` in a folder of the test's own: the machine's, and a newer release.
fn copy_both_runcs(daemon: &Daemon) -> [PathBuf; 2] {
    [
        (lab::lab().join("host/runc"), "old"),
        (lab::newer_runtime("runc"), "new"),
    ]
    .map(|(program, name)| {
        let folder = daemon.directory().join(name);
        fs::create_dir_all(&folder).unwrap();
        fs::copy(program, folder.join("runc")).unwrap();
        folder.join("runc")
    })
}

/// Create of a container with options of ours.
#[track_caller]
fn create_with_options(group: &Group, id: &str, bundle: &Path, options: &str) {
    let request = CreateTaskRequest {
        id: id.to_owned(),
        bundle: text(bundle),
        options: Some(options_table(options)).into(),
        ..CreateTaskRequest::default()
    };
    let created = group.shim.call::<CreateTaskResponse>("Create", &request);
    created.unwrap_or_else(|refusal| panic!("create {id}: {refusal:?}"));
}

/// An options table as containerd sends it: `runtimeoptions.v1.Options`, the text in field 3.
fn options_table(options: &str) -> Any {
    let length = u8::try_from(options.len())
        .ok()
        .filter(|&length| length < 128)
        .expect("one byte of a varint");
    let mut value = vec![3 << 3 | 2, length];
    value.extend_from_slice(options.as_bytes());
    Any {
        type_url: "runtimeoptions.v1.Options".to_owned(),
        value,
        ..Any::default()
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

on_every_containerd! {
    fn hooks_run_as_they_do_under_runc(version) {
        ours_only!("it always runs runc");
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "hooks");
        for (turn, runc) in copy_both_runcs(&daemon).iter().enumerate() {
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
                create_with_options(&group, &id, &bundle, &format!("BinaryName = '{}'\nshortcuts = {shortcuts}", text(runc)));
                group.shim.start(&id, "").unwrap();
                assert_eq!(group.shim.wait(&id, "").unwrap(), 7);
                assert_eq!(group.shim.delete(&id, "").unwrap(), 7);
                group.remove_bundle(&id);
                fs::read_to_string(log).unwrap()
            });
            assert_eq!(short, long, "{}", runc.display());
            assert_eq!(short.lines().count(), 5, "{short}");
            let ends: Vec<&str> = short.lines().filter(|line| line.starts_with("poststop")).collect();
            assert_eq!(ends, ["poststop \"status\":\"stopped\""], "{short}");
        }
        group.end();
        // No state of runc's, no cgroup.
        daemon.end();
    }

    fn start_and_delete_need_no_runc(version) {
        ours_only!("it always runs runc");
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "short");
        for (turn, runc) in copy_both_runcs(&daemon).iter().enumerate() {
            let kept = runc.with_extension("kept");
            let options = format!("BinaryName = '{}'", text(runc));
            // A container that ends by itself, one that is killed, and one that was never started.
            for (fate, exit) in [("ends", 3), ("killed", 137), ("unstarted", 137)] {
                let id = format!("c{turn}-{fate}");
                let bundle = group.bundle(&id, if fate == "ends" { "exit 3" } else { "exec sleep 3600" }, |_| {});
                create_with_options(&group, &id, &bundle, &options);
                fs::rename(runc, &kept).unwrap();
                fs::copy("/bin/false", runc).unwrap();
                if fate != "unstarted" {
                    group.shim.start(&id, "").unwrap();
                    if fate == "killed" {
                        group.shim.kill(&id, "", 9).unwrap();
                    }
                    assert_eq!(group.shim.wait(&id, "").unwrap(), exit);
                }
                assert_eq!(group.shim.delete(&id, "").unwrap(), exit, "{fate}");
                group.remove_bundle(&id);
                fs::rename(&kept, runc).unwrap();
            }
        }
        group.end();
        daemon.end();
    }

    fn what_only_runc_can_do_is_left_to_it(version) {
        ours_only!("it always runs runc");
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "left");
        let [runc, _] = copy_both_runcs(&daemon);
        let log = daemon.directory().join("log");
        let bundle = group.bundle("c", "exit 3", |spec| spec["hooks"] = recording_hooks(&log, &["poststop"]));
        create_with_options(&group, "c", &bundle, &format!("BinaryName = '{}'", text(&runc)));
        group.shim.start("c", "").unwrap();
        assert_eq!(group.shim.wait("c", "").unwrap(), 3);
        let kept = runc.with_extension("kept");
        fs::rename(&runc, &kept).unwrap();
        fs::copy("/bin/false", &runc).unwrap();
        // The container is not deleted as long as its poststop hook cannot be run.
        group.shim.delete("c", "").unwrap_err();
        assert!(!log.exists());
        fs::rename(&kept, &runc).unwrap();
        assert_eq!(group.shim.delete("c", "").unwrap(), 3);
        assert!(log.exists());
        group.remove_bundle("c");
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
        create_with_options(&group, "c", &bundle, "");
        group.shim.start("c", "").unwrap();
        assert_eq!(group.shim.wait("c", "").unwrap(), 5);
        assert_eq!(group.shim.delete("c", "").unwrap(), 5);
        group.remove_bundle("c");
        group.end();
        daemon.end();
    }
}
