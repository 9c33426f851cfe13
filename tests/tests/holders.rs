//! The option `holder`: what keeps the namespaces of a sandbox. (All other suites run with the default.)
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use shim_tests::daemon::Options;
use shim_tests::image::PauseImage;
use shim_tests::proc::{children, namespace};
use shim_tests::{Daemon, Pod, PodSpec, on_every_containerd, ours_only};

/// The pod has namespaces of its own, and the pod's containers share the sandbox's namespaces.
fn assert_containers_share_net_ipc_and_uts(pod: &Pod<'_>) {
    let (one, two) = (pod.sleeper("one"), pod.sleeper("two"));
    let node = std::process::id().cast_signed();
    for kind in ["net", "ipc", "uts"] {
        let of_pod = namespace(pod.pid(), kind);
        assert_ne!(of_pod, namespace(node, kind), "{kind}");
        assert_eq!(of_pod, namespace(one.pid(), kind), "{kind}");
        assert_eq!(of_pod, namespace(two.pid(), kind), "{kind}");
    }
    assert_eq!(one.output(&["hostname"]), "held");
}

fn command_name(pid: i32) -> String {
    let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
    comm.trim().to_owned()
}

on_every_containerd! {
    fn a_process_holds_where_the_operator_wants_one(version) {
        ours_only!("options of our own");
        let daemon = Daemon::with(version, &Options::runtime("holder = 'process'"));
        let pod = PodSpec::new("held").run(&daemon);
        assert_containers_share_net_ipc_and_uts(&pod);
        assert_eq!(command_name(pod.pid()), "pause");
        assert!(children(daemon.shim().pid).iter().any(|child| child.pid == pod.pid()));
        daemon.end();
    }

    fn a_process_is_pid_1_of_a_shared_process_namespace(version) {
        ours_only!("options of our own");
        let daemon = Daemon::with(version, &Options::runtime("holder = 'process'"));
        let pod = PodSpec::new("held").shared_processes().run(&daemon);
        let one = pod.sleeper("one");
        assert_eq!(one.shell("cat /proc/1/comm"), "pause");
        assert_eq!(namespace(one.pid(), "pid"), namespace(pod.pid(), "pid"));
        daemon.end();
    }

    fn the_end_of_a_holding_process_is_the_end_of_the_sandbox(version) {
        ours_only!("options of our own");
        let daemon = Daemon::with(version, &Options::runtime("holder = 'process'"));
        let pod = PodSpec::new("held").run(&daemon);
        let one = pod.sleeper("one");
        assert!(pod.ready());
        shim_tests::proc::kill(pod.pid(), rustix::process::Signal::KILL);
        pod.wait_until_not_ready();
        // The containers run until kubelet stops them with their grace period, as with the stock shim.
        assert_eq!(one.output(&["echo", "still here"]), "still here");
        daemon.end();
    }

    fn a_thread_holds_and_no_process_is_made_for_it(version) {
        ours_only!("options of our own");
        let daemon = Daemon::with(version, &Options::runtime("holder = 'thread'"));
        let pod = PodSpec::new("held").run(&daemon);
        assert_containers_share_net_ipc_and_uts(&pod);
        let shim = daemon.shim().pid;
        assert!(std::fs::exists(format!("/proc/{shim}/task/{}", pod.pid())).unwrap());
        let shared = PodSpec::new("shared").shared_processes().run(&daemon);
        let refused = shared.container("one").command(&["sleep", "3600"]).try_start();
        let message = refused.err().expect("no process, no shared process namespace").0;
        assert!(message.contains("thread"), "{message}");
        daemon.end();
    }

    fn the_pause_image_holds_as_with_the_stock_shim(version) {
        ours_only!("options of our own");
        let options = Options { pause_image: PauseImage::Works, ..Options::runtime("holder = 'image'") };
        let daemon = Daemon::with(version, &options);
        let pod = PodSpec::new("held").run(&daemon);
        assert_containers_share_net_ipc_and_uts(&pod);
        let program = std::fs::read(format!("/proc/{}/cmdline", pod.pid())).unwrap();
        assert!(program.starts_with(b"/pause"), "{}", String::from_utf8_lossy(&program));
        daemon.end();
    }
}
