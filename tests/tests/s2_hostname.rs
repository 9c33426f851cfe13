//! S2: the pod's hostname.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use shim_tests::{Daemon, PodSpec, in_every_mode};

in_every_mode! {
    fn s2_every_container_has_the_pods_hostname(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("demo").run(&daemon);
        for name in ["one", "two"] {
            let container = pod.sleeper(name);
            assert_eq!(container.output(&["hostname"]), "demo");
            assert_eq!(container.output(&["cat", "/etc/hostname"]), "demo");
            assert_eq!(container.output(&["cat", "/proc/sys/kernel/hostname"]), "demo");
        }
        daemon.end();
    }
}
