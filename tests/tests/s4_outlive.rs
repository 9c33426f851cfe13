//! S4: the namespaces outlive the containers.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::time::Duration;

use rustix::process::Signal;
use shim_tests::proc::{kill, namespace};
use shim_tests::{Daemon, PodSpec, eventually, image, in_every_mode};

in_every_mode! {
    fn s4_the_pod_survives_its_web_server(version) {
        let daemon = Daemon::with_nginx(version);
        let pod = PodSpec::new("myweb2").run(&daemon);
        let client = pod.container("client").probe().command(&["sleep", "3600"]).start();
        let web = pod.container("web").image(image::NGINX).start();
        client.output(&["/probe", "shm-create", "4711", "still here"]);
        let look = || {
            let inside = "cat /sys/class/net/eth0/address; ip -o addr; ip route; hostname; cat /proc/sysvipc/shm | wc -l";
            let kinds = ["net", "ipc", "uts"].map(|kind| namespace(pod.pid(), kind));
            (client.shell(inside), pod.ip(), pod.pid(), kinds)
        };
        let before = look();

        kill(web.pid(), Signal::KILL);
        assert_eq!(web.wait(), 137);
        assert_eq!(look(), before);
        assert!(pod.ready() && client.running());

        let again = pod.container("web").image(image::NGINX).attempt(1).start();
        assert_eq!(look(), before);
        for kind in ["net", "ipc", "uts"] {
            assert_eq!(namespace(again.pid(), kind), namespace(client.pid(), kind), "{kind}");
        }
        assert_eq!(client.output(&["/probe", "shm-read", "4711"]), "still here");
        eventually(Duration::from_secs(5), || {
            let page = client.exec(&["/probe", "fetch", "localhost"]);
            if page.stdout.contains("Welcome") { Ok(()) } else { Err(format!("{page:?}")) }
        });
        daemon.end();
    }

    fn s4_the_namespaces_outlive_the_last_container(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("empty").run(&daemon);
        let first = pod.sleeper("app");
        let before = ["net", "ipc", "uts"].map(|kind| namespace(first.pid(), kind));
        let address = first.shell("ip -o addr");
        first.stop(0);
        first.wait();
        first.remove();
        assert!(pod.ready());
        assert_eq!(daemon.shims().len(), 1, "the shim must stay for its sandbox");

        let second = pod.container("app").attempt(1).command(&["sleep", "3600"]).start();
        assert_eq!(["net", "ipc", "uts"].map(|kind| namespace(second.pid(), kind)), before);
        assert_eq!(second.shell("ip -o addr"), address);
        daemon.end();
    }
}
