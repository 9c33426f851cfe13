//! S1: what the containers of a pod share, seen from the node, from containerd and from inside.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test reports by failing"
)]

use std::time::Duration;

use shim_tests::proc::{namespace, namespaces};
use shim_tests::{Container, Daemon, Pod, PodSpec, eventually, image, in_every_mode};

/// The pod of `config/pod.yaml`: a web server and a client.
fn start_web_and_client<'a>(pod: &Pod<'a>) -> (Container<'a>, Container<'a>) {
    let web = pod.container("myweb2-nginx").image(image::NGINX).start();
    let client = pod
        .container("myweb2-netshoot")
        .probe()
        .command(&["sleep", "3600"])
        .start();
    (web, client)
}

in_every_mode! {
    fn s1_a_pod_shares_what_it_should(version) {
        let daemon = Daemon::with_nginx(version);
        let pod = PodSpec::new("myweb2").run(&daemon);
        let (web, client) = start_web_and_client(&pod);
        let (in_web, in_client) = (namespaces(web.pid()), namespaces(client.pid()));
        let node = namespaces(std::process::id().cast_signed());
        let sandbox = pod.pid();

        for shared in ["net", "ipc", "uts"] {
            assert_eq!(in_web[shared], in_client[shared], "{shared} is not shared");
            assert_eq!(in_web[shared], namespace(sandbox, shared), "{shared} is not the sandbox's");
            assert_ne!(in_web[shared], node[shared], "{shared} is the node's");
        }
        // On cgroup v1 both containers are in the node's cgroup namespace: runc makes none unless asked.
        for own in ["mnt", "pid"] {
            assert_ne!(in_web[own], in_client[own], "{own} is shared");
            assert_ne!(in_web[own], node[own], "{own} is the node's");
            assert_ne!(in_client[own], node[own], "{own} is the node's");
        }
        if std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
            assert_ne!(in_web["cgroup"], in_client["cgroup"], "cgroup is shared");
        }
        for nodes in ["time", "user"] {
            assert_eq!(in_web[nodes], node[nodes], "{nodes} is not the node's");
            assert_eq!(in_client[nodes], node[nodes], "{nodes} is not the node's");
        }
        daemon.end();
    }

    fn s1_inspect_names_the_sandboxs_namespaces(version) {
        let daemon = Daemon::start(version);
        let pod = PodSpec::new("inspected").run(&daemon);
        let container = pod.sleeper("app");
        let (_, info) = container.status();
        let sandbox = pod.pid();
        let listed = info["runtimeSpec"]["linux"]["namespaces"].as_array().cloned().unwrap_or_default();
        let path = |kind: &str| {
            let found = listed.iter().find(|namespace| namespace["type"] == kind);
            found.unwrap_or_else(|| panic!("no {kind} in {listed:?}"))["path"].as_str().unwrap_or_default().to_owned()
        };
        for kind in ["ipc", "uts", "network"] {
            let file = if kind == "network" { "net" } else { kind };
            let path = path(kind);
            assert!(path.contains(&format!("/{sandbox}/")) || path.contains("netns"), "{kind}: {path}");
            let link = std::fs::read_link(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
            assert_eq!(link.to_string_lossy(), format!("{file}:[{}]", namespace(sandbox, file)));
        }
        assert_eq!(path("mount"), "");
        assert_eq!(path("pid"), "");
        daemon.end();
    }

    fn s1_same_address_and_localhost_reaches_the_neighbour(version) {
        let daemon = Daemon::with_nginx(version);
        let pod = PodSpec::new("myweb2").run(&daemon);
        let (web, client) = start_web_and_client(&pod);
        let ip = pod.ip();
        assert!(ip.starts_with(&daemon.names.subnet()), "{ip}");
        for what in ["ip -o -4 addr show dev eth0", "cat /sys/class/net/eth0/address", "ip route", "cat /proc/net/dev | wc -l"] {
            assert_eq!(web.shell(what), client.shell(what), "{what}");
        }
        assert!(client.shell("ip -o -4 addr show dev eth0").contains(&ip));
        assert!(client.shell("ip -o addr show dev lo").contains("127.0.0.1"), "loopback is down");
        for address in ["localhost", "127.0.0.1", ip.as_str()] {
            let page = eventually(Duration::from_secs(5), || {
                let got = client.exec(&["/probe", "fetch", address]);
                if got.code == 0 { Ok(got.stdout) } else { Err(format!("{got:?}")) }
            });
            assert!(page.contains("Welcome to nginx!"), "{address}: {page}");
        }
        daemon.end();
    }

    fn s1_each_container_sees_only_its_own_processes(version) {
        let daemon = Daemon::with_nginx(version);
        let pod = PodSpec::new("myweb2").run(&daemon);
        let (web, client) = start_web_and_client(&pod);
        let names = |container: &Container<'_>| container.shell("cat /proc/[0-9]*/comm");
        assert!(names(&web).contains("nginx"));
        assert!(!names(&web).contains("sleep"), "{}", names(&web));
        assert!(names(&client).contains("sleep"));
        assert!(!names(&client).contains("nginx"), "{}", names(&client));
        assert_eq!(web.shell("cat /proc/1/comm"), "nginx");
        assert_eq!(client.shell("cat /proc/1/comm"), "sleep");
        daemon.end();
    }
}
