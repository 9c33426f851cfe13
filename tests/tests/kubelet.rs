//! Pods as the kubelets of Kubernetes 1.28 to 1.36 describe them: what a container sees and what CRI tells is the same
//! under the stock shim, and under ours in both modes.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test reports by failing"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;

use k8s_cri::v1::{self as api, NamespaceMode};
use serde_json::Value;
use shim_tests::daemon::{Handler, Options};
use shim_tests::image::PauseImage;
use shim_tests::lab::ShimUnderTest;
use shim_tests::{
    Daemon, Pod, PodSpec, Version, cgroups, in_every_mode, on_every_containerd, ours_only,
};

/// The handler with pods of the Sandbox API.
const API: &str = "api";

/// What a container sees of its pod. Nothing here may depend on the runtime handler.
const LOOK: &str = r#"
for kind in cgroup ipc net pid user uts; do echo "namespace $kind: $(readlink /proc/self/ns/$kind)"; done
echo "hostname: $(hostname)"
echo "domainname: $(cat /proc/sys/kernel/domainname)"
for file in hostname resolv.conf hosts; do echo "/etc/$file: $(cat /etc/$file)"; done
awk '$5 ~ "^/etc/" { print "mount " $5 ": " $6 }' /proc/self/mountinfo
awk '$5 == "/dev/shm" { print "mount " $5 ": " $6 " " $(NF-2) " " $NF }' /proc/self/mountinfo
for key in net.ipv4.ping_group_range net.ipv4.ip_unprivileged_port_start net.core.somaxconn kernel.shm_rmid_forced; do
    echo "$key: $(cat /proc/sys/$(echo $key | tr . /) 2>&1)"
done
echo "uid_map: $(cat /proc/self/uid_map)"
echo "is PID 1: $(tr '\0' ' ' </proc/1/cmdline | grep -c '^sleep')"
echo "loopback: $(ip address show lo | grep -c 127.0.0.1)"
"#;

type Facts = BTreeMap<String, String>;
type Change = fn(PodSpec) -> PodSpec;

fn security(spec: &mut PodSpec) -> &mut api::LinuxSandboxSecurityContext {
    let linux = spec.config.linux.as_mut().unwrap();
    linux.security_context.as_mut().unwrap()
}

fn resources(spec: &mut PodSpec, resources: api::LinuxContainerResources) {
    spec.config.linux.as_mut().unwrap().resources = Some(resources);
}

/// A pod as kubelet 1.28 describes it (`generatePodSandboxConfig`).
fn kubelet(name: &str) -> PodSpec {
    let mut spec = PodSpec::new(name).dns("10.96.0.10", "default.svc.cluster.local");
    let dns = spec.config.dns_config.as_mut().unwrap();
    dns.searches.push("svc.cluster.local".to_owned());
    dns.options.push("ndots:5".to_owned());
    let uid = "0b9c4f5e-9a55-4c0c-8a43-0b2f6f6f7a10";
    for (key, value) in [
        ("app", "web"),
        ("io.kubernetes.pod.name", name),
        ("io.kubernetes.pod.namespace", "default"),
        ("io.kubernetes.pod.uid", uid),
    ] {
        spec.config.labels.insert(key.to_owned(), value.to_owned());
    }
    spec = spec
        .annotation(
            "kubernetes.io/config.seen",
            "2026-11-28T10:00:00.000000000Z",
        )
        .annotation("kubernetes.io/config.source", "api");
    spec.config.port_mappings.push(api::PortMapping {
        container_port: 80,
        ..Default::default()
    });
    let security = security(&mut spec);
    security.seccomp = Some(api::SecurityProfile::default());
    let least = api::LinuxContainerResources {
        cpu_shares: 2,
        ..Default::default()
    };
    spec.config.linux.as_mut().unwrap().overhead = Some(api::LinuxContainerResources::default());
    resources(&mut spec, least);
    spec
}

/// From 1.33 on, a kubelet says that the pod has the node's user namespace.
fn newer(mut spec: PodSpec) -> PodSpec {
    let namespaces = security(&mut spec).namespace_options.as_mut().unwrap();
    namespaces.userns_options = Some(api::UserNamespace {
        mode: NamespaceMode::Node.into(),
        ..Default::default()
    });
    spec
}

/// The fields, set and empty.
const FIELDS: &[(&str, Change)] = &[
    ("of-1-28", |spec| spec),
    ("of-1-33", newer),
    ("pod-resources", |spec| {
        let mut spec = newer(spec);
        security(&mut spec).supplemental_groups_policy =
            api::SupplementalGroupsPolicy::Strict.into();
        resources(
            &mut spec,
            api::LinuxContainerResources {
                cpu_period: 100_000,
                cpu_quota: 50_000,
                cpu_shares: 512,
                memory_limit_in_bytes: 256 << 20,
                ..Default::default()
            },
        );
        spec
    }),
    ("users", |mut spec| {
        let security = security(&mut spec);
        security.run_as_user = Some(api::Int64Value { value: 1000 });
        security.run_as_group = Some(api::Int64Value { value: 1000 });
        security.supplemental_groups = vec![1000, 2000];
        security.readonly_rootfs = true;
        spec
    }),
    ("privileged", |mut spec| {
        security(&mut spec).privileged = true;
        spec
    }),
    ("no-hostname", |mut spec| {
        spec.config.hostname.clear();
        spec
    }),
    ("hostname-of-64", |mut spec| {
        spec.config.hostname = "h".repeat(64);
        spec
    }),
    ("hostname-of-65", |mut spec| {
        spec.config.hostname = "h".repeat(65);
        spec
    }),
    ("no-dns", |mut spec| {
        spec.config.dns_config = None;
        spec
    }),
    ("empty-dns", |mut spec| {
        spec.config.dns_config = Some(api::DnsConfig::default());
        spec
    }),
    ("only-options-of-dns", |mut spec| {
        let dns = spec.config.dns_config.as_mut().unwrap();
        (dns.servers, dns.searches) = (Vec::new(), Vec::new());
        spec
    }),
    ("servers-of-dns", |mut spec| {
        let dns = spec.config.dns_config.as_mut().unwrap();
        dns.servers.push("fd00::10".to_owned());
        (dns.searches, dns.options) = (Vec::new(), Vec::new());
        spec
    }),
    ("no-labels", |mut spec| {
        spec.config.labels.clear();
        spec.config.annotations.clear();
        spec.config.port_mappings.clear();
        spec
    }),
];

/// The namespaces, and the node's.
const NAMESPACES: &[(&str, Change)] = &[
    ("no-namespace-options", |mut spec| {
        security(&mut spec).namespace_options = None;
        spec
    }),
    ("no-security", |mut spec| {
        spec.config.linux.as_mut().unwrap().security_context = None;
        spec
    }),
    ("host-network", |spec| newer(spec.host_network())),
    ("host-network-and-a-hostname", |spec| {
        let mut spec = spec.host_network();
        spec.config.hostname = "another".to_owned();
        spec
    }),
    ("host-pid", |spec| newer(spec.host_pid())),
    ("host-ipc", |spec| newer(spec.host_ipc())),
    ("all-of-the-host", |spec| {
        newer(spec.host_network().host_pid().host_ipc())
    }),
    ("shared-processes", |spec| newer(spec.shared_processes())),
    ("shared-processes-host-network", |spec| {
        newer(spec.shared_processes().host_network())
    }),
];

/// Sysctls, allowed and refused.
const SYSCTLS: &[(&str, Change)] = &[
    ("sysctls", |spec| {
        newer(
            spec.sysctl("net.core.somaxconn", "777")
                .sysctl("kernel.shm_rmid_forced", "1"),
        )
    }),
    ("sysctls-with-slashes", |spec| {
        newer(spec.sysctl("net/core/somaxconn", "778"))
    }),
    ("own-defaults", |spec| {
        newer(
            spec.sysctl("net.ipv4.ping_group_range", "1 0")
                .sysctl("net.ipv4.ip_unprivileged_port_start", "80"),
        )
    }),
    ("sysctl-of-the-host-network", |spec| {
        newer(spec.host_network().sysctl("net.core.somaxconn", "779"))
    }),
    ("sysctl-of-the-host-ipc", |spec| {
        newer(spec.host_ipc().sysctl("kernel.shm_rmid_forced", "1"))
    }),
    ("sysctl-of-the-node", |spec| {
        newer(spec.sysctl("kernel.pid_max", "4194303"))
    }),
    ("sysctl-that-is-none", |spec| {
        newer(spec.sysctl("net.core.nothing", "1"))
    }),
];

/// The facts of a pod with one container; one fact alone when the pod is refused.
fn facts(daemon: &Daemon, spec: PodSpec) -> Facts {
    let name = spec.config.metadata.as_ref().unwrap().name.clone();
    let pod = match spec.try_run(daemon) {
        Ok(pod) => pod,
        Err(failure) => {
            eprintln!("{name} refused: {failure}");
            return Facts::from([("refused".to_owned(), String::new())]);
        }
    };
    let mut facts = of_status(&pod);
    let container = pod.sleeper("one");
    let seen = container.output(&["sh", "-c", LOOK]);
    let mut last = String::new();
    for line in seen.lines() {
        // The lines of a file belong to the first one.
        match line
            .split_once(": ")
            .or_else(|| line.strip_suffix(':').map(|key| (key, "")))
        {
            Some((key, value)) if !last.starts_with("/etc/") || is_key(key) => {
                key.clone_into(&mut last);
                facts.insert(last.clone(), whose(&last, value, pod.pid()));
            }
            _ => {
                let value = facts.entry(last.clone()).or_default();
                value.push('\n');
                value.push_str(line);
            }
        }
    }
    pod.stop();
    pod.remove();
    facts
}

fn is_key(key: &str) -> bool {
    ["/etc/", "mount ", "net.", "kernel."]
        .iter()
        .any(|start| key.starts_with(start))
}

fn in_the_nodes_network(spec: &PodSpec) -> bool {
    let linux = spec.config.linux.as_ref().unwrap();
    let security = linux.security_context.as_ref();
    let namespaces = security.and_then(|security| security.namespace_options.as_ref());
    namespaces.is_some_and(|namespaces| namespaces.network() == NamespaceMode::Node)
}

/// A namespace is the node's, or the sandbox's, or another one.
fn whose(key: &str, value: &str, sandbox: i32) -> String {
    let Some(kind) = key.strip_prefix("namespace ") else {
        return value.to_owned();
    };
    let of = |process: &str| {
        let link = fs::read_link(format!("/proc/{process}/ns/{kind}")).unwrap();
        link.to_string_lossy() == value
    };
    // Where a thread holds the namespaces, the shim's process namespace is that of `/proc/TID`: the node's.
    if of("self") {
        "the node's"
    } else if kind != "pid" && of(&sandbox.to_string()) {
        "the pod's"
    } else {
        "of its own, or the pod's processes"
    }
    .to_owned()
}

fn of_status(pod: &Pod<'_>) -> Facts {
    let (status, info) = pod.status();
    let namespaces = status.linux.clone().and_then(|linux| linux.namespaces);
    let has_ip = status
        .network
        .clone()
        .is_some_and(|network| !network.ip.is_empty());
    let labels: BTreeMap<_, _> = status.labels.iter().collect();
    let annotations: BTreeMap<_, _> = status.annotations.iter().collect();
    let spec = &info["runtimeSpec"];
    let mut facts = Facts::new();
    for (key, value) in [
        ("status state", format!("{:?}", status.state())),
        (
            "status namespaces",
            format!("{:?}", namespaces.and_then(|namespaces| namespaces.options)),
        ),
        ("status has an address", has_ip.to_string()),
        ("status labels", format!("{labels:?}")),
        ("status annotations", format!("{annotations:?}")),
        ("spec hostname", spec["hostname"].to_string()),
        ("spec sysctl", spec["linux"]["sysctl"].to_string()),
    ] {
        facts.insert(key.to_owned(), value);
    }
    for (key, value) in spec["annotations"].as_object().into_iter().flatten() {
        // The name of the image: a pod of the Sandbox API has none.
        if key != "io.kubernetes.cri.podsandbox.image-name" && key != "io.kubernetes.cri.sandbox-id"
        {
            facts.insert(format!("spec annotation {key}"), value.to_string());
        }
    }
    facts
}

/// What differs, one line each.
fn differences(wanted: &Facts, got: &Facts) -> Vec<String> {
    let keys: BTreeSet<_> = wanted.keys().chain(got.keys()).collect();
    let different = keys
        .into_iter()
        .filter(|key| wanted.get(*key) != got.get(*key));
    different
        .map(|key| {
            format!(
                "{key}: {:?}, the stock shim {:?}",
                got.get(key),
                wanted.get(key)
            )
        })
        .collect()
}

/// Runs each pod under the stock shim, and under ours in each mode that this containerd has.
#[track_caller]
fn compare(version: Version, configs: &[(&str, Change)]) {
    ours_only!("the stock shim is what ours is compared with");
    let api = Handler {
        name: API.to_owned(),
        runtime_type: ShimUnderTest::get().runtime_type().to_owned(),
        runtime_path: None,
        options: String::new(),
        sandbox_api: true,
    };
    let has_api = version >= Version::V2_0;
    let options = Options {
        handlers: has_api.then_some(api).into_iter().collect(),
        pause_image: PauseImage::Works,
        ..Options::default()
    };
    let daemon = Daemon::with(version, &options);
    let ours: &[&str] = if has_api { &["", API] } else { &[""] };
    let mut different = Vec::new();
    for (name, change) in configs {
        let wanted = facts(&daemon, change(kubelet(name)).handler("runc"));
        for &handler in ours {
            // containerd 2.0 to 2.2 crashes on it; `sandbox_api::a_pod_in_the_nodes_network` plays a later one.
            let crashes = version < Version::V2_3 && in_the_nodes_network(&change(kubelet(name)));
            if handler == API && crashes {
                continue;
            }
            let got = facts(&daemon, change(kubelet(name)).handler(handler));
            let lines = differences(&wanted, &got);
            different.extend(lines.iter().map(|line| format!("{name} {handler}: {line}")));
        }
    }
    assert!(different.is_empty(), "{}", different.join("\n"));
    daemon.end();
}

on_every_containerd! {
    fn a_pod_of_a_kubelet_has_what_the_stock_shims_has(version) {
        compare(version, FIELDS);
    }

    fn a_pod_of_a_kubelet_shares_with_the_node_what_the_stock_shims_does(version) {
        compare(version, NAMESPACES);
    }

    fn a_pod_of_a_kubelet_has_the_sysctls_of_the_stock_shims(version) {
        compare(version, SYSCTLS);
    }
}

/// What containerd has written down of a container: the labels. cAdvisor reads them.
fn labels(daemon: &Daemon, id: &str) -> Value {
    let known = daemon.ctr_in("k8s.io", &["containers", "list", "--quiet"]);
    if !known.lines().any(|line| line == id) {
        return Value::Null;
    }
    let record = daemon.ctr_in("k8s.io", &["containers", "info", id]);
    serde_json::from_str::<Value>(&record).unwrap()["Labels"].take()
}

/// The names of the network interfaces that a process has.
fn interfaces(pid: i32) -> BTreeSet<String> {
    let table = fs::read_to_string(format!("/proc/{pid}/net/dev")).unwrap();
    let names = table.lines().filter_map(|line| line.split_once(':'));
    names.map(|(name, _)| name.trim().to_owned()).collect()
}

in_every_mode! {
    fn a_kubelet_finds_what_it_reads_of_a_pod(version) {
        let daemon = Daemon::start(version);
        let pod = kubelet("seen").run(&daemon);
        let mut one = pod.container("one").command(&["sleep", "3600"]);
        for (key, value) in [
            ("io.kubernetes.container.name", "one"),
            ("io.kubernetes.pod.name", "seen"),
            ("io.kubernetes.pod.namespace", "default"),
        ] {
            one.config.labels.insert(key.to_owned(), value.to_owned());
        }
        let one = one.start();
        // cAdvisor finds a container by the directory of its cgroup, whose name is the id.
        let parent = cgroups::root("memory").join(daemon.cgroup_parent().trim_start_matches('/'));
        for id in [&pod.id, &one.id] {
            assert!(parent.join(id).is_dir(), "{}/{id}", parent.display());
        }
        assert_eq!(cgroups::directory(one.pid(), "memory").unwrap(), parent.join(&one.id));
        let of_container = labels(&daemon, &one.id);
        assert_eq!(of_container["io.cri-containerd.kind"], "container");
        assert_eq!(of_container["io.kubernetes.container.name"], "one");
        assert_eq!(of_container["io.kubernetes.pod.name"], "seen");
        let (cpu, memory) = (one.stats().cpu.unwrap(), one.stats().memory.unwrap());
        assert!(cpu.usage_core_nano_seconds.unwrap().value > 0);
        assert!(memory.working_set_bytes.unwrap().value > 0);
        // The network's counters: those of the process of the sandbox's container, or, with the kubelet's feature gate
        // PodAndContainerStatsFromCRI, what CRI says.
        let of_sandbox = labels(&daemon, &pod.id);
        if version.sandboxes_are_tasks() {
            assert_eq!(of_sandbox["io.cri-containerd.kind"], "sandbox");
            assert_eq!(of_sandbox["io.kubernetes.pod.name"], "seen");
            let tasks = daemon.ctr_in("k8s.io", &["tasks", "list"]);
            let line = tasks.lines().find(|line| line.starts_with(&pod.id)).expect("a task");
            let pid = line.split_whitespace().nth(1).unwrap().parse().unwrap();
            assert!(interfaces(pid).contains("eth0"), "{:?}", interfaces(pid));
        } else {
            assert_eq!(of_sandbox, Value::Null, "docs/pause-image.md says that there is none");
        }
        let network = pod.stats().network.unwrap().default_interface.unwrap();
        assert_eq!(network.name, "eth0");
        assert!(network.rx_bytes.is_some() && network.tx_bytes.is_some());
        daemon.end();
    }
}
