//! Input that containerd would never send, and mistakes of users. Each is refused by a message that names the mistake,
//! and leaves nothing behind.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use shim_tests::raw::Bundle;
use shim_tests::{Daemon, Options, PodSpec, leaks, on_every_containerd, ours_only};

/// The message of a pod that must not run, with containerd's options table.
fn pod_refused(daemon: &Daemon, spec: PodSpec) -> String {
    match spec.try_run(daemon) {
        Ok(_) => panic!("the pod runs"),
        Err(failure) => failure.0,
    }
}

#[track_caller]
fn assert_names(message: &str, word: &str) {
    assert!(
        message.contains(word),
        "{word:?} is not named in: {message}"
    );
}

on_every_containerd! {
    fn a_bundle_without_config_json(version) {
        let daemon = Daemon::start(version);
        let bundle = Bundle::new(&daemon, "no-config");
        assert_names(&bundle.start_or_create_must_fail(b""), "config.json");
        drop(bundle);
        daemon.end();
    }

    fn broken_json(version) {
        let daemon = Daemon::start(version);
        let bundle = Bundle::new(&daemon, "broken").write_config(b"{\"ociVersion\": \"1.0.2\", ");
        let message = bundle.start_or_create_must_fail(b"");
        assert!(!message.is_empty());
        if shim_tests::ShimUnderTest::get() == shim_tests::ShimUnderTest::Pause {
            assert_names(&message, "config.json");
        }
        drop(bundle);
        daemon.end();
    }

    fn a_config_json_that_is_not_a_spec(version) {
        let daemon = Daemon::start(version);
        let bundle = Bundle::new(&daemon, "list").write_config(b"[1, 2, 3]");
        assert!(!bundle.start_or_create_must_fail(b"").is_empty());
        drop(bundle);
        daemon.end();
    }

    fn a_stdin_of_start_without_an_end_is_refused(version) {
        ours_only!("the stock shim reads all of it");
        let daemon = Daemon::start(version);
        let bundle = Bundle::new(&daemon, "endless");
        let spec = bundle.plain_spec(&["true"]);
        let bundle = bundle.write_spec(&spec);
        let ran = bundle.start(&vec![b'a'; 17 << 20]);
        assert!(!ran.status.success() && ran.text().contains("more than"), "{}", ran.text());
        bundle.delete();
        drop(bundle);
        daemon.end();
    }

    fn garbage_on_stdin_of_start(version) {
        let daemon = Daemon::start(version);
        for (id, garbage) in [("ff", &[0xff_u8; 64][..]), ("text", b"what is this?\n"), ("cut", b"\x0a\x7fshort")] {
            let bundle = Bundle::new(&daemon, id);
            let spec = bundle.plain_spec(&["true"]);
            let bundle = bundle.write_spec(&spec);
            let ran = bundle.start(garbage);
            assert!(!ran.status.success(), "{id}: accepted, answered {}", ran.text());
            assert!(!ran.output.is_empty(), "{id}: no message");
            bundle.delete();
            drop(bundle);
            daemon.assert_nothing_left();
        }
        daemon.end();
    }

    fn a_network_namespace_that_is_not_there(version) {
        let daemon = Daemon::start(version);
        let path = daemon.directory().join("no-such-netns");
        let bundle = Bundle::new(&daemon, "absent");
        let spec = bundle.sandbox_spec(path.to_str().unwrap());
        let bundle = bundle.write_spec(&spec);
        assert_names(&bundle.start_or_create_must_fail(b""), "no-such-netns");
        drop(bundle);
        daemon.end();
    }

    fn a_network_namespace_that_is_a_plain_file(version) {
        let daemon = Daemon::start(version);
        let path = daemon.directory().join("plain-file");
        std::fs::write(&path, "not a namespace").unwrap();
        let bundle = Bundle::new(&daemon, "plain");
        let spec = bundle.sandbox_spec(path.to_str().unwrap());
        let bundle = bundle.write_spec(&spec);
        let message = bundle.start_or_create_must_fail(b"");
        if shim_tests::ShimUnderTest::get() == shim_tests::ShimUnderTest::Pause {
            assert_names(&message, "plain-file");
        }
        drop(bundle);
        daemon.end();
    }

    fn a_sysctl_outside_the_namespaced_trees(version) {
        let daemon = Daemon::start(version);
        let before = std::fs::read_to_string("/proc/sys/vm/swappiness").unwrap();
        for key in ["vm.swappiness", "kernel.panic", "vm/swappiness", "net/../vm/swappiness"] {
            let message = pod_refused(&daemon, PodSpec::new("sysctl").sysctl(key, "7"));
            assert_names(&message, key.rsplit(['.', '/']).next().unwrap());
            daemon.cri().remove_all_pods();
            daemon.assert_nothing_left();
        }
        assert_eq!(std::fs::read_to_string("/proc/sys/vm/swappiness").unwrap(), before);
        daemon.end();
    }

    fn a_network_sysctl_with_the_nodes_network(version) {
        let daemon = Daemon::start(version);
        let path = "/proc/sys/net/ipv4/ip_unprivileged_port_start";
        let before = std::fs::read_to_string(path).unwrap();
        let spec = PodSpec::new("sysctl").host_network().sysctl("net.ipv4.ip_unprivileged_port_start", "7");
        assert_names(&pod_refused(&daemon, spec), "ip_unprivileged_port_start");
        assert_eq!(std::fs::read_to_string(path).unwrap(), before);
        daemon.end();
    }

    fn a_sysctl_that_smuggles_another(version) {
        ours_only!("the stock shim leaves separators in sysctls to the kernel");
        let daemon = Daemon::start(version);
        for (key, value) in [
            ("kernel.shm_rmid_forced", "1\nvm.swappiness=7"),
            ("kernel.shm_rmid_forced=1\nvm.swappiness", "7"),
            ("net.ipv4.ip_forward", "1+vm.swappiness=7"),
        ] {
            pod_refused(&daemon, PodSpec::new("sysctl").sysctl(key, value));
            daemon.cri().remove_all_pods();
            daemon.assert_nothing_left();
        }
        daemon.end();
    }

    fn an_unknown_option(version) {
        ours_only!("options of our own");
        let daemon = Daemon::with(version, &Options::runtime("hodler = 'thread'"));
        assert_names(&pod_refused(&daemon, PodSpec::new("typo")), "hodler");
        daemon.end();
    }

    fn an_unknown_holder(version) {
        ours_only!("options of our own");
        let daemon = Daemon::with(version, &Options::runtime("holder = 'bogus'"));
        assert_names(&pod_refused(&daemon, PodSpec::new("bogus")), "bogus");
        daemon.end();
    }

    fn runc_is_missing(version) {
        let daemon = Daemon::with(version, &Options::runtime("BinaryName = '/nonexistent/runc'"));
        let message = match PodSpec::new("no-runc").try_run(&daemon) {
            // A pod needs no runc; the pod's containers do.
            Ok(pod) => match pod.container("one").command(&["sleep", "3600"]).try_start() {
                Ok(_) => panic!("the container runs"),
                Err(failure) => failure.0,
            },
            Err(failure) => failure.0,
        };
        assert_names(&message, "/nonexistent/runc");
        daemon.end();
    }

    fn garbage_on_the_socket(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("garbage").run(&daemon);
        let container = pod.sleeper("one");
        let group = leaks::TaskId { namespace: "k8s.io".to_owned(), id: pod.id.clone() };
        let socket = leaks::shim_socket(&leaks::grpc_address(&daemon.names), &group);
        let shim = daemon.shim();
        for garbage in [
            b"GET / HTTP/1.1\r\n\r\n".as_slice(),
            &[0; 10],
            &[0xff; 4096],
            // A ttrpc header that announces 4 MiB without any data after it, and a request of rubbish.
            &[0, 0x40, 0, 0, 0, 0, 0, 1, 1, 0],
            &[0, 0, 0, 4, 0, 0, 0, 1, 1, 0, 0xde, 0xad, 0xbe, 0xef],
        ] {
            let mut stream = UnixStream::connect(&socket).unwrap();
            stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            let _ = stream.write_all(garbage);
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read(&mut [0; 512]);
        }
        assert!(shim.alive());
        assert_eq!(container.output(&["echo", "still here"]), "still here");
        daemon.end();
    }

    fn a_command_that_is_not_there(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("absent").run(&daemon);
        match pod.container("one").command(&["/no/such/program"]).try_start() {
            Ok(_) => panic!("it runs"),
            Err(failure) => assert_names(&failure.0, "/no/such/program"),
        }
        // The pod has not suffered.
        assert!(pod.ready());
        assert_eq!(pod.sleeper("two").output(&["hostname"]), "absent");
        daemon.end();
    }
}
