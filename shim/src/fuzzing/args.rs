//! The command line.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use crate::cli::args::Action;
use crate::node::{Asked, Form};

/// The command line, one argument a line.
pub(super) fn args(data: &[u8]) {
    let words = data.split(|byte| *byte == b'\n');
    let read = Action::parse(words.map(|word| OsString::from_vec(word.to_vec())));
    let action = match read {
        Ok(action) => action,
        Err(error) => {
            let text = error.to_string();
            let named = ["flag -", "subcommand", "-namespace", "-id", "-address"];
            let named = named.iter().chain(&["-socket", "is too much"]);
            assert!(named.into_iter().any(|name| text.contains(name)), "{text}");
            return;
        }
    };
    let again = Action::parse(written(&action).into_iter());
    assert_eq!(again.ok(), Some(action));
}

/// The command line of an action.
fn written(action: &Action) -> Vec<OsString> {
    let flag = |name: &str, value: &OsStr| [OsString::from(name), value.to_owned()];
    let switch = |debug: bool| OsString::from(format!("-debug={debug}"));
    let mut words: Vec<OsString> = Vec::new();
    match action {
        Action::Version => words.push("-v".into()),
        Action::Info => words.push("-info".into()),
        Action::Install => words.push("install".into()),
        Action::Uninstall => words.push("uninstall".into()),
        Action::Repair => words.push("repair".into()),
        Action::RepairFiles => words.push("repair-files".into()),
        Action::Stay => words.push("stay".into()),
        Action::Start {
            namespace,
            id,
            address,
            bundle,
            debug,
        } => {
            words.extend(flag("-namespace", namespace.as_ref()));
            words.extend(flag("--id", id.as_ref()));
            words.extend(flag("-address", address.as_ref()));
            words.extend(flag("-bundle", bundle.as_ref()));
            words.extend([switch(*debug), "start".into()]);
        }
        Action::Delete { id, bundle } => {
            words.extend(flag("-id", id.as_ref()));
            words.extend(flag("--bundle", bundle.as_ref()));
            words.push("delete".into());
        }
        Action::Serve {
            namespace,
            id,
            address,
            socket,
            debug,
        } => {
            words.extend(flag("--namespace", namespace.as_ref()));
            words.extend(flag("-id", id.as_ref()));
            words.extend(flag("-address", address.as_ref()));
            words.extend(flag("-socket", socket.as_ref()));
            words.push(switch(*debug));
        }
        Action::Check(asked) => words.extend(question(asked, "check")),
        Action::Pods(asked) => words.extend(question(asked, "pods")),
    }
    words
}

/// The command line of what a person asks. Flags stand on both sides of the subcommand.
fn question(asked: &Asked, subcommand: &str) -> Vec<OsString> {
    let flag = |name: &str, value: &Path| [OsString::from(name), value.as_os_str().to_owned()];
    let mut words = Vec::from(flag("-address", &asked.address));
    if let Some(config) = &asked.config {
        words.extend(flag("--config", config));
    }
    words.push(subcommand.into());
    words.extend(flag("--kubelet-config", &asked.kubelet));
    words.push(format!("--json={}", asked.form == Form::Json).into());
    words
}
