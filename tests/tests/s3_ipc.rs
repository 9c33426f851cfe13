//! S3: IPC objects of one container are seen in the pod's other containers, and nowhere else.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use shim_tests::{Daemon, PodSpec, in_every_mode};

in_every_mode! {
    fn s3_ipc_objects_are_the_pods_and_nobody_elses(version) {
        let daemon = Daemon::start(version);
        let (pod, other) = (PodSpec::new("ipc").run(&daemon), PodSpec::new("other").run(&daemon));
        let sleep = ["sleep", "3600"];
        let one = pod.container("one").probe().command(&sleep).start();
        let two = pod.container("two").probe().command(&sleep).start();
        let stranger = other.container("stranger").probe().command(&sleep).start();

        one.output(&["/probe", "shm-create", "4711", "hello from one"]);
        one.output(&["/probe", "sem-create", "4712", "42"]);
        one.output(&["/probe", "mq-send", "/queue", "a message"]);

        assert_eq!(two.output(&["/probe", "shm-read", "4711"]), "hello from one");
        assert_eq!(two.output(&["/probe", "sem-read", "4712"]), "42");
        assert_eq!(two.output(&["/probe", "mq-receive", "/queue"]), "a message");

        assert_ne!(stranger.exec(&["/probe", "shm-read", "4711"]).code, 0);
        assert_ne!(stranger.exec(&["/probe", "sem-read", "4712"]).code, 0);
        assert_ne!(stranger.exec(&["/probe", "mq-receive", "/queue"]).code, 0);
        let node = std::fs::read_to_string("/proc/sysvipc/shm").unwrap();
        assert!(!node.lines().any(|line| line.split_whitespace().next() == Some("4711")), "{node}");
        daemon.end();
    }

    fn s3_dev_shm_is_the_pods(version) {
        let daemon = Daemon::start(version);
        let (pod, other) = (PodSpec::new("shm").run(&daemon), PodSpec::new("other").run(&daemon));
        let (one, two, stranger) = (pod.sleeper("one"), pod.sleeper("two"), other.sleeper("stranger"));
        let name = format!("shim-tests-{}", daemon.names.name());
        one.shell(&format!("echo hello > /dev/shm/{name}"));
        assert_eq!(two.shell(&format!("cat /dev/shm/{name}")), "hello");
        assert_eq!(one.shell("stat -f -c %T /dev/shm"), "tmpfs");
        assert_ne!(stranger.exec(&["cat", &format!("/dev/shm/{name}")]).code, 0);
        assert!(!std::path::Path::new("/dev/shm").join(name).exists());
        daemon.end();
    }
}
