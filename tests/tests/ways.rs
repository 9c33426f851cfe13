//! What each way to name the shim costs: the rows of the table in config/README.md.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test reports by failing"
)]

use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::Duration;

use shim_tests::daemon::Handler;
use shim_tests::proc::Process;
use shim_tests::until::ok_if;
use shim_tests::{
    Daemon, Options, Pod, PodSpec, Version, eventually, lab, left_out, on_every_containerd,
    on_the_newest_containerd, ours_only,
};

/// Root of the pods, as the node counts.
const ROOT: u32 = 300_000;
/// An options table.
const TABLE: &str = "NoNewKeyring = true";

/// A handler `tested` of the type `io.containerd.pause.v2`.
fn by_type(options: &str, sandbox_api: bool) -> Handler {
    Handler {
        name: "tested".to_owned(),
        runtime_type: "io.containerd.pause.v2".to_owned(),
        runtime_path: None,
        options: options.to_owned(),
        sandbox_api,
    }
}

/// A containerd with this handler, and with a runc that knows user namespaces.
fn daemon(version: Version, handler: Handler) -> Daemon {
    let options = Options {
        handlers: vec![handler],
        ..Options::default()
    };
    let daemon = Daemon::with(version, &options);
    symlink(
        lab::newer_runtime("runc"),
        daemon.directory().join("bin/runc"),
    )
    .unwrap();
    // containerd asks a handler for its features once, when it starts.
    daemon.kill();
    daemon.start_again();
    daemon
}

fn pod(name: &str) -> PodSpec {
    PodSpec::new(name).handler("tested")
}

/// The container does not start. Its pod goes.
fn assert_no_container_starts(pod: &Pod<'_>) {
    let refused = pod.container("one").command(&["sleep", "3600"]).try_start();
    assert!(
        refused.is_err(),
        "containerd can do it now: mend the table in config/README.md"
    );
    pod.stop();
    pod.remove();
}

#[track_caller]
fn assert_users_are_mapped(pod: &Pod<'_>) {
    let container = pod.sleeper("one");
    assert!(
        container
            .shell("cat /proc/self/uid_map")
            .contains(&ROOT.to_string())
    );
}

/// The options that `containerd config default` prints for the handler `runc`.
fn default_options(version: Version) -> String {
    let containerd = version.binaries().join("containerd");
    let printed = Command::new(containerd)
        .args(["config", "default"])
        .output()
        .unwrap();
    let config: toml::Table = toml::from_str(&String::from_utf8(printed.stdout).unwrap()).unwrap();
    let plugins = config["plugins"].as_table().unwrap();
    let cri = ["io.containerd.grpc.v1.cri", "io.containerd.cri.v1.runtime"];
    let options = cri.iter().find_map(|cri| {
        let runtimes = plugins.get(*cri)?.get("containerd")?.get("runtimes")?;
        runtimes.get("runc")?.get("options")
    });
    let options = options.unwrap().as_table().unwrap();
    assert!(options.contains_key("ShimCgroup"), "{options}");
    options.to_string()
}

/// Ends a test of what 2.3 has mended.
macro_rules! until_2_2 {
    ($version:expr) => {
        if $version >= Version::V2_3 {
            left_out!("2.0 to 2.2 have this fault");
        }
    };
}

on_every_containerd! {
    fn the_options_that_containerd_prints_start_a_pod(version) {
        let daemon = Daemon::with(version, &Options::runtime(&default_options(version)));
        assert!(PodSpec::new("default").run(&daemon).sleeper("one").running());
        daemon.end();
    }
}

on_the_newest_containerd! {
    fn by_path_with_a_table_nothing_is_lost(version) {
        let daemon = daemon(version, Handler::of_the_stock_type("tested", version, TABLE));
        let features = daemon.cri().features("tested");
        assert!(features.user_namespaces && features.recursive_read_only_mounts);
        assert_users_are_mapped(&pod("mapped").user_namespace(ROOT).run(&daemon));
        daemon.end();
    }

    fn by_type_no_feature_is_offered_and_all_work(version) {
        ours_only!("containerd asks the stock shim's type");
        until_2_2!(version);
        let daemon = daemon(version, by_type("", false));
        let features = daemon.cri().features("tested");
        // A kubelet therefore refuses such pods; another client gets them.
        assert!(!features.user_namespaces && !features.recursive_read_only_mounts);
        assert_users_are_mapped(&pod("mapped").user_namespace(ROOT).run(&daemon));
        daemon.end();
    }

    fn by_type_with_a_table_no_container_starts_in_a_user_namespace(version) {
        ours_only!("it is of another type");
        let daemon = daemon(version, by_type(TABLE, false));
        assert!(pod("plain").run(&daemon).sleeper("one").running());
        assert_no_container_starts(&pod("mapped").user_namespace(ROOT).run(&daemon));
        daemon.end();
    }

    fn by_the_sandbox_api_with_a_table_no_container_starts(version) {
        ours_only!("it has no Sandbox API");
        until_2_2!(version);
        let daemon = daemon(version, by_type(TABLE, true));
        match pod("plain").try_run(&daemon) {
            Ok(pod) => assert_no_container_starts(&pod),
            Err(failure) => eprintln!("{failure}"),
        }
        daemon.end();
    }

    fn by_the_sandbox_api_the_path_is_not_looked_at(version) {
        ours_only!("it has no Sandbox API");
        until_2_2!(version);
        let handler = Handler {
            sandbox_api: true,
            ..Handler::of_the_stock_type("tested", version, "")
        };
        let daemon = daemon(version, handler);
        // The stock shim runs, and has no Sandbox API.
        let refused = pod("plain").try_run(&daemon).err().expect("refused");
        eprintln!("{refused}");
        daemon.end();
    }

    fn by_the_sandbox_api_a_pod_in_the_nodes_network_crashes_containerd(version) {
        ours_only!("it has no Sandbox API");
        until_2_2!(version);
        let daemon = daemon(version, by_type("", true));
        let pid = daemon.pid();
        assert!(pod("hostnet").host_network().try_run(&daemon).is_err());
        eventually(Duration::from_secs(10), || {
            let now = Process::of(pid);
            ok_if(now.is_none_or(|now| now.state == 'Z'), || "containerd lives: mend the table".to_owned())
        });
        daemon.kill();
        daemon.start_again();
        assert!(pod("plain").run(&daemon).sleeper("one").running());
        daemon.end();
    }
}
