#![allow(clippy::unwrap_used, clippy::panic)]
use super::*;

fn parse(line: &str) -> Result<Action> {
    Action::parse(line.split_whitespace().map(OsString::from))
}

fn refused(line: &[&[u8]]) -> String {
    let arguments = line.iter().map(|part| OsStr::from_bytes(part).to_owned());
    let error = Action::parse(arguments).unwrap_err();
    assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
    error.to_string()
}

fn a_delete() -> Action {
    Action::Delete {
        id: "a".into(),
        bundle: "/b".into(),
    }
}

#[test]
fn flags_are_those_of_go() {
    let start = parse(
        "-namespace k8s.io --id=a -address /run/c.sock -publish-binary /bin/c -bundle /b -debug start",
    );
    let expected = Action::Start {
        namespace: "k8s.io".into(),
        id: "a".into(),
        address: "/run/c.sock".into(),
        bundle: "/b".into(),
        debug: true,
    };
    assert_eq!(start.unwrap(), expected);
    assert_eq!(parse("-v").unwrap(), Action::Version);
    assert_eq!(parse("--version").unwrap(), Action::Version);
    assert_eq!(parse("-info").unwrap(), Action::Info);
    assert_eq!(parse("install").unwrap(), Action::Install);
    assert_eq!(parse("uninstall").unwrap(), Action::Uninstall);
    assert_eq!(parse("repair").unwrap(), Action::Repair);
    assert_eq!(parse("repair-files").unwrap(), Action::RepairFiles);
    assert_eq!(parse("stay").unwrap(), Action::Stay);
}

#[test]
fn what_is_not_known_or_missing_is_named() {
    for (line, name) in [
        ("-id a -frobnicate start", "frobnicate"),
        ("-id a -namespace n -address x restart", "restart"),
        ("-namespace n -address x start", "-id"),
        ("", "-namespace"),
    ] {
        let error = parse(line).unwrap_err().to_string();
        assert!(error.contains(name), "{line}: {error}");
    }
}

#[test]
fn a_value_stands_apart_or_behind_an_equals_sign() {
    for line in [
        "-id a -bundle /b delete",
        "-id=a -bundle=/b delete",
        "--id a --bundle /b delete",
        "--id=a --bundle=/b delete",
    ] {
        assert_eq!(parse(line).unwrap(), a_delete(), "{line}");
    }
    let serve = parse("-namespace n -id a=b= -socket /s -address -x").unwrap();
    let expected = Action::Serve {
        namespace: "n".into(),
        id: "a=b=".into(),
        address: "-x".into(),
        socket: "/s".into(),
        debug: false,
    };
    assert_eq!(serve, expected);
}

#[test]
fn flags_end_at_the_first_positional_argument_and_at_two_dashes() {
    assert_eq!(
        parse("-id a -bundle /b delete -v -nonsense").unwrap(),
        a_delete()
    );
    assert_eq!(parse("-id a -bundle /b -- delete").unwrap(), a_delete());
    assert!(refused(&[b"-id", b"a", b"--", b"-v"]).contains("\"-v\""));
    assert!(refused(&[b"-"]).contains("\"-\""));
}

#[test]
fn a_switch_takes_the_truth_values_of_go() {
    for (switch, expected) in [("-debug", true), ("-debug=1", true), ("--debug=F", false)] {
        let serve = parse(&format!("-namespace n -socket /s {switch}"));
        let Action::Serve { debug, .. } = serve.unwrap() else {
            panic!("{switch}: no server");
        };
        assert_eq!(debug, expected, "{switch}");
    }
    // A value that stands apart is a positional argument.
    assert!(refused(&[b"-debug", b"true"]).contains("subcommand \"true\""));
    assert!(refused(&[b"-debug=maybe"]).contains("-debug"));
    assert!(refused(&[b"-debug="]).contains("-debug"));
}

#[test]
fn a_flag_that_cannot_be_read_is_named() {
    for (line, name) in [
        (&[b"-id".as_slice()] as &[&[u8]], "-id needs a value"),
        (&[b"-id", b"\xff", b"delete"], "-id is no UTF-8 text"),
        (&[b"-id=\xff", b"delete"], "-id is no UTF-8 text"),
        (&[b"-\xff"], "unknown flag -\u{fffd}"),
        (&[b"-=x"], "unknown flag -"),
        (&[b"---id=x"], "unknown flag --id"),
    ] {
        let error = refused(line);
        assert!(error.contains(name), "{error}");
    }
}

#[test]
fn a_path_need_not_be_text() {
    let arguments = [b"-id=a".as_slice(), b"-bundle", b"/\xff", b"delete"];
    let arguments = arguments.map(|part| OsStr::from_bytes(part).to_owned());
    let Action::Delete { bundle, .. } = Action::parse(arguments.into_iter()).unwrap() else {
        panic!("no delete");
    };
    assert_eq!(bundle.as_os_str().as_bytes(), b"/\xff");
}

#[test]
fn a_person_asks_with_flags_before_and_after_the_subcommand() {
    let usual = Asked {
        address: "/run/containerd/containerd.sock".into(),
        config: None,
        kubelet: "/var/lib/kubelet/config.yaml".into(),
        form: Form::Text,
    };
    assert_eq!(parse("check").unwrap(), Action::Check(usual.clone()));
    assert_eq!(parse("pods").unwrap(), Action::Pods(usual));
    let named = Asked {
        address: "/c.sock".into(),
        config: Some("/c.toml".into()),
        kubelet: "/k.yaml".into(),
        form: Form::Json,
    };
    for line in [
        "check --json --address /c.sock --config=/c.toml --kubelet-config /k.yaml",
        "-json -address /c.sock -config /c.toml check --kubelet-config=/k.yaml",
    ] {
        assert_eq!(parse(line).unwrap(), Action::Check(named.clone()), "{line}");
    }
    for (line, part) in [
        ("check now", "\"now\""),
        ("pods --frobnicate", "frobnicate"),
        ("install --help", "--help"),
        ("install now", "\"now\""),
        ("uninstall --dry-run", "--dry-run"),
        ("uninstall --json", "--json"),
        ("repair x", "\"x\""),
        ("stay --", "--"),
        ("--json install", "neither flags"),
        ("pods --address", "-address needs a value"),
        ("restart", "start and delete, a person check, pods"),
    ] {
        let error = parse(line).unwrap_err().to_string();
        assert!(error.contains(part), "{line}: {error}");
    }
}
