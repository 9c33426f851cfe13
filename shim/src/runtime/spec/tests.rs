#![allow(clippy::unwrap_used)]

use super::*;

fn spec(text: &str) -> Spec {
    serde_json::from_str(text).unwrap()
}

#[test]
fn an_explicit_group_comes_before_the_sandbox() {
    let both = format!(r#"{{"annotations": {{"{GROUP}": "g", "{SANDBOX_ID}": "s"}}}}"#);
    assert_eq!(spec(&both).group(), Some("g"));
    let sandbox = format!(r#"{{"annotations": {{"{SANDBOX_ID}": "s"}}}}"#);
    assert_eq!(spec(&sandbox).group(), Some("s"));
    assert_eq!(spec("{}").group(), None);
}

#[test]
fn a_sandbox_names_itself_as_its_sandbox() {
    let of = |kind: &str, sandbox: &str| {
        let annotations = format!(r#""{CONTAINER_TYPE}": "{kind}", "{SANDBOX_ID}": "{sandbox}""#);
        spec(&format!(r#"{{"annotations": {{{annotations}}}}}"#)).role("s1")
    };
    assert_eq!(of("sandbox", "s1"), Role::Sandbox);
    assert_eq!(of("sandbox", "s2"), Role::Container);
    assert_eq!(of("container", "s1"), Role::Container);
    let alone = format!(r#"{{"annotations": {{"{CONTAINER_TYPE}": "sandbox"}}}}"#);
    assert_eq!(spec(&alone).role("s1"), Role::Container);
}

#[test]
fn a_container_joins_its_sandbox_by_the_pid_of_the_holder() {
    let of = |annotations: &str, path: &str| {
        let namespaces = format!(r#"[{{"type": "ipc"}}, {{"type": "network", "path": "{path}"}}]"#);
        let text = format!(
            r#"{{"annotations": {{{annotations}}}, "linux": {{"namespaces": {namespaces}}}}}"#
        );
        spec(&text).sandbox_to_join().map(str::to_owned)
    };
    let sandbox = format!(r#""{SANDBOX_ID}": "s""#);
    assert_eq!(of(&sandbox, "/proc/7/ns/net"), Some("s".to_owned()));
    assert_eq!(of(&sandbox, "/run/netns/x"), None, "the path needs no pid");
    assert_eq!(of(&sandbox, ""), None, "the namespace is new");
    assert_eq!(of("", "/proc/7/ns/net"), None, "there is no sandbox");
    let another_shim = format!(r#"{sandbox}, "{GROUP}": "g""#);
    assert_eq!(of(&another_shim, "/proc/7/ns/net"), None);
}

#[test]
fn root_of_a_user_namespace_is_somebody_else_on_the_node() {
    let of = |linux: &str| spec(&format!(r#"{{"linux": {{{linux}}}}}"#)).mapped_root();
    let map = |host: u32| format!(r#"[{{"containerID": 0, "hostID": {host}, "size": 65536}}]"#);
    let both = format!(
        r#""uidMappings": {}, "gidMappings": {}"#,
        map(100_000),
        map(200_000)
    );
    assert_eq!(of(&both), Some((100_000, 200_000)));
    assert_eq!(of(""), None);
    assert_eq!(of(&format!(r#""uidMappings": {}"#, map(1))), None);
}

#[test]
fn namespaces_are_made_joined_or_left_as_the_spec_says() {
    let spec = spec(
        r#"{"hostname": "web", "linux": {"namespaces": [{"type": "network", "path": "/run/netns/a"},
           {"type": "ipc"}, {"type": "pid"}, {"type": "mount"}], "sysctl": {"net.core.somaxconn": "1"}}}"#,
    );
    let config = spec.sandbox(pause::HolderChoice::Auto);
    assert!(
        matches!(config.namespaces.net, pause::Namespace::Join(p) if p == Path::new("/run/netns/a"))
    );
    assert!(matches!(config.namespaces.ipc, pause::Namespace::New));
    assert!(matches!(config.namespaces.uts, pause::Namespace::Node));
    assert!(matches!(config.namespaces.pid, pause::Namespace::Node));
    assert_eq!(config.hostname.as_deref(), Some("web"));
    assert_eq!(config.sysctls["net.core.somaxconn"], "1");
}

#[test]
fn processes_live_on_after_init_only_where_the_namespace_is_not_its_own() {
    let of = |namespaces: &str| {
        spec(&format!(r#"{{"linux": {{"namespaces": {namespaces}}}}}"#)).shares_process_namespace()
    };
    assert!(of("[]"));
    assert!(of(r#"[{"type": "pid", "path": "/proc/7/ns/pid"}]"#));
    assert!(!of(r#"[{"type": "pid"}]"#));
}

#[test]
fn only_the_process_namespace_of_a_spec_is_rewritten() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("config.json");
    let before = r#"{"linux":{"namespaces":[{"path":"/a","type":"ipc"},{"path":"/b","type":"pid"}]},"x":18446744073709551615}"#;
    std::fs::write(&file, before).unwrap();
    let changes = Changes {
        pid_namespace: Some("/proc/9/ns/pid".into()),
        ..Changes::default()
    };
    let spec = Spec::load(dir.path()).unwrap();
    spec.write(dir.path(), &changes).unwrap();
    let after = std::fs::read_to_string(&file).unwrap();
    assert_eq!(after, before.replace("/b", "/proc/9/ns/pid"));
}

#[test]
fn broken_json_is_named_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("config.json"), "{\"process\": [").unwrap();
    let error = Spec::load(dir.path()).unwrap_err();
    assert!(matches!(error, Error::InvalidArgument(_)));
    assert!(error.to_string().contains("line 1"), "{error}");
}
