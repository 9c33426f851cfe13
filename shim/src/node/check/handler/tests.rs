#![allow(clippy::unwrap_used)]
use super::*;
use crate::node::report::State;

fn handler(lines: &str) -> Handler {
    let config = format!("[plugins.cri.containerd.runtimes.pause]\n{lines}");
    Config::parse(&config).unwrap().handlers.remove(0)
}

#[test]
fn a_handler_is_ours_by_its_type_or_by_its_path() {
    let path = |path: &str| Some(Way::Path(path.into()));
    for (lines, way) in [
        ("runtime_type = 'io.containerd.pause.v2'", Some(Way::Type)),
        (
            "runtime_type = 'io.containerd.pause.v2'\nruntime_path = '/opt/x'",
            path("/opt/x"),
        ),
        (
            "runtime_type = 'io.containerd.runc.v2'\nruntime_path = '/opt/containerd-shim-pause-v2-0.1'",
            path("/opt/containerd-shim-pause-v2-0.1"),
        ),
        (
            "runtime_type = 'io.containerd.runc.v2'\nruntime_path = '/proc/self/exe'",
            path("/proc/self/exe"),
        ),
        (
            "runtime_type = '/usr/local/bin/containerd-shim-pause-v2'",
            path("/usr/local/bin/containerd-shim-pause-v2"),
        ),
        ("runtime_type = 'io.containerd.runc.v2'", None),
        (
            "runtime_type = 'io.containerd.runc.v2'\nruntime_path = '/usr/bin/kata'",
            None,
        ),
        ("", None),
    ] {
        let handler = handler(lines);
        assert_eq!(Ours::of(&handler).map(|ours| ours.way), way, "{lines}");
    }
}

#[test]
fn what_a_release_cannot_do_is_said_with_the_way_out() {
    const BY_TYPE: &str = "runtime_type = 'io.containerd.pause.v2'\n";
    const BY_PATH: &str =
        "runtime_type = 'io.containerd.runc.v2'\nruntime_path = '/x/containerd-shim-pause-v2'\n";
    const TABLE: &str = "options = { NoNewKeyring = true }\n";
    // (release, lines, sandboxer, default handler, the state and a part of the sentence)
    for (version, lines, sandboxer, default, expected) in [
        (
            "1.6.20",
            vec![BY_PATH],
            "",
            false,
            Some((State::Todo, "ignores runtime_path")),
        ),
        ("1.6.20", vec![BY_TYPE], "", false, None),
        ("1.7.24", vec![BY_PATH, TABLE], "", true, None),
        (
            "1.7.24",
            vec![BY_TYPE],
            "shim",
            false,
            Some((State::Todo, "before 2.0")),
        ),
        ("2.1.9", vec![BY_PATH, TABLE], "podsandbox", true, None),
        (
            "2.1.9",
            vec![BY_TYPE, TABLE],
            "podsandbox",
            false,
            Some((State::Note, "hostUsers")),
        ),
        (
            "2.1.9",
            vec![BY_TYPE],
            "shim",
            false,
            Some((State::Note, "hostNetwork")),
        ),
        (
            "2.1.9",
            vec![BY_TYPE],
            "shim",
            true,
            Some((State::Todo, "RuntimeClass")),
        ),
        (
            "2.1.9",
            vec![BY_TYPE, TABLE],
            "shim",
            false,
            Some((State::Todo, "no container")),
        ),
        (
            "2.1.9",
            vec![BY_PATH],
            "shim",
            false,
            Some((State::Todo, "the stock shim")),
        ),
        ("2.3.0", vec![BY_TYPE, TABLE], "shim", true, None),
    ] {
        let handler = handler(&lines.concat());
        let ours = Ours::of(&handler).unwrap();
        let version = Version::parse(version).unwrap();
        let found = limits(&ours, version, sandboxer, default);
        let state = found.as_ref().map(|(state, _)| *state);
        assert_eq!(
            state,
            expected.map(|(state, _)| state),
            "{version}: {found:?}"
        );
        if let (Some((_, text)), Some((_, part))) = (&found, expected) {
            assert!(text.contains(part), "{version}: {text}");
        }
    }
}
