#![allow(clippy::unwrap_used)]

use std::path::Path;

use super::*;

/// A pod in these namespaces.
fn pod(network: Mode, pid: Mode, user: Option<Mode>) -> PodConfig {
    PodConfig {
        hostname: "web".into(),
        linux: Some(Linux {
            security_context: Some(Security {
                namespace_options: Some(NamespaceOptions {
                    network,
                    pid,
                    ipc: Mode::Pod,
                    userns_options: user.map(|mode| UserNamespace {
                        mode,
                        uids: vec![IdMapping {
                            host_id: 100_000,
                            container_id: 0,
                            length: 65_536,
                        }],
                        gids: Vec::new(),
                    }),
                }),
                privileged: false,
            }),
            ..Linux::default()
        }),
        ..PodConfig::default()
    }
}

fn in_cgroup(parent: &str) -> PodConfig {
    PodConfig {
        linux: Some(Linux {
            cgroup_parent: parent.into(),
            ..Linux::default()
        }),
        ..PodConfig::default()
    }
}

fn json(config: &PodConfig) -> String {
    serde_json::to_string(config).unwrap()
}

#[test]
fn json_leaves_default_values_out_but_not_messages_that_are_there() {
    assert_eq!(json(&PodConfig::default()), "{}");
    let config = PodConfig {
        metadata: Some(Metadata::default()),
        linux: Some(Linux {
            overhead: Some(Resources::default()),
            ..Linux::default()
        }),
        ..PodConfig::default()
    };
    assert_eq!(json(&config), r#"{"metadata":{},"linux":{"overhead":{}}}"#);
}

#[test]
fn a_mode_without_a_name_is_kept_and_counts_as_the_pods() {
    let config = pod(Mode::Other(7), Mode::from(-1), Some(Mode::Other(9)));
    let kept = r#"{"network":7,"pid":-1,"userns_options":{"mode":9,"#;
    assert!(json(&config).contains(kept), "{}", json(&config));
    let of = |config: PodConfig| config.sandbox(Path::new("/netns"), pause::HolderChoice::Auto);
    let named = of(pod(Mode::Pod, Mode::Pod, Some(Mode::Pod))).unwrap();
    assert_eq!(of(config).unwrap().namespaces, named.namespaces);
    for number in -1..5 {
        assert_eq!(i32::from(Mode::from(number)), number);
    }
}

#[test]
fn a_pod_in_the_nodes_network_keeps_its_name_and_has_no_sysctls_of_containerds() {
    let config = pod(Mode::Node, Mode::Container, None);
    let sandbox = config.sandbox(Path::new("/netns"), pause::HolderChoice::Auto);
    let sandbox = sandbox.unwrap();
    assert_eq!(sandbox.namespaces.net, pause::Namespace::Node);
    assert_eq!(sandbox.namespaces.uts, pause::Namespace::Node);
    assert_eq!(sandbox.namespaces.pid, pause::Namespace::Node);
    assert_eq!(sandbox.namespaces.ipc, pause::Namespace::New);
    // The crate `pause` refuses another name than the node's in the node's UTS namespace.
    assert_eq!(sandbox.hostname.as_deref(), Some("web"));
    assert!(sandbox.sysctls.is_empty());
}

#[test]
fn unprivileged_ping_is_allowed_but_in_a_user_namespace() {
    for (user, range) in [
        (None, Some("0 2147483647")),
        // What the kubelet sends for a pod without a user namespace.
        (Some(Mode::Node), Some("0 2147483647")),
        (Some(Mode::Pod), None),
    ] {
        let config = pod(Mode::Pod, Mode::Container, user);
        let sandbox = config.sandbox(Path::new("/netns"), pause::HolderChoice::Auto);
        let sysctls = sandbox.unwrap().sysctls;
        let set = sysctls.get("net.ipv4.ping_group_range");
        assert_eq!(set.map(String::as_str), range, "{user:?}");
    }
}

#[test]
fn a_user_namespace_of_a_mode_that_cri_has_not_is_refused() {
    for mode in [Mode::Container, Mode::Target] {
        let error = pod(Mode::Pod, Mode::Pod, Some(mode))
            .sandbox(Path::new(""), pause::HolderChoice::Auto)
            .unwrap_err();
        assert!(error.to_string().contains(&format!("{mode:?}")), "{error}");
    }
}

#[test]
fn the_cgroup_is_in_the_form_of_the_pods_driver() {
    for (parent, path) in [
        ("/kubepods/pod1/", Some("/kubepods/pod1/s1")),
        (
            "/kubepods.slice/kubepods-pod1.slice",
            Some("kubepods-pod1.slice:cri-containerd:s1"),
        ),
        ("", None),
    ] {
        let config = in_cgroup(parent);
        assert_eq!(config.cgroups_path("s1").as_deref(), path);
        assert_eq!(config.has_slice(), parent.ends_with(".slice"));
    }
}
