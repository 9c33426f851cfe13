//! The options that reach the shim, read as containerd sends them and with the shim's own parser.
//!
//! | type of the handler | containerd | what arrives of the options table |
//! |---|---|---|
//! | `io.containerd.runc.v2` | all | what runc's own message has; the rest of the shim's options from the fixed file |
//! | any other | 1.6 | `ConfigPath` |
//! | | later | the file that `ConfigPath` names; without one, the whole table |
//! | any, without a table | all | nothing: the fixed file |

use std::path::Path;

use toml::{Table, Value};

use super::handler::{Ours, STOCK};
use crate::error::Result;
use crate::node::containerd::Version;
use crate::node::report::{Verdict, note, ok, todo};
use crate::runtime::options::{Holder, Options};

/// The keys of runc's message, in containerd's words. containerd leaves any other key of the table out.
const OF_RUNC: [&str; 11] = [
    "BinaryName",
    "CriuImagePath",
    "CriuPath",
    "CriuWorkPath",
    "IoGid",
    "IoUid",
    "NoNewKeyring",
    "NoPivotRoot",
    "Root",
    "ShimCgroup",
    "SystemdCgroup",
];
const CONFIG_PATH: &str = "ConfigPath";

/// What the shim gets.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Received {
    pub(super) options: Options,
    /// Where the options stand.
    pub(super) from: String,
    /// Keys that containerd does not pass on.
    lost: Vec<String>,
}

/// Reads the options of a handler. `fixed` is the fixed file.
///
/// # Errors
/// What the shim would answer to the pod's creation.
pub(super) fn received(ours: &Ours<'_>, version: Version, fixed: &Path) -> Result<Received> {
    let table = &ours.handler.options;
    let the_table = format!("the options table of the handler {}", ours.handler.name);
    let but = |kept: &[&str]| -> Vec<String> {
        let lost = table.keys().filter(|key| !kept.contains(&key.as_str()));
        lost.cloned().collect()
    };
    if ours.handler.runtime_type == STOCK {
        let mut given: Table = table.clone();
        given.retain(|key, _| OF_RUNC.contains(&key));
        let fixed = Options::from_default_file(fixed)?;
        let given = Options::from_table(given, &the_table)?;
        return Ok(Received {
            options: Options {
                holder: fixed.holder,
                shortcuts: fixed.shortcuts,
                sandbox_start_timeout: fixed.sandbox_start_timeout,
                ..given
            },
            from: the_table,
            lost: but(&OF_RUNC),
        });
    }
    let named = table.get(CONFIG_PATH).and_then(Value::as_str);
    if let Some(file) = named.filter(|file| !file.is_empty()) {
        return Ok(Received {
            options: Options::from_config_path(Path::new(file))?,
            from: file.to_owned(),
            lost: but(&[CONFIG_PATH, "TypeUrl"]),
        });
    }
    if table.is_empty() || version < Version::of(1, 7) {
        return Ok(Received {
            options: Options::from_default_file(fixed)?,
            from: match fixed.exists() {
                true => fixed.display().to_string(),
                false => format!("{} (not there: the defaults)", fixed.display()),
            },
            lost: but(&[CONFIG_PATH]),
        });
    }
    Ok(Received {
        options: Options::from_table(table.clone(), &the_table)?,
        from: the_table,
        lost: Vec::new(),
    })
}

pub(super) fn verdict(received: &Result<Received>) -> Verdict {
    let received = match received {
        Ok(received) => received,
        Err(error) => {
            return todo(format!(
                "no pod starts: {error}. Correct that (docs/options.md has all options)"
            ));
        }
    };
    if !received.lost.is_empty() {
        return note(format!(
            "containerd does not pass {} on from this table: write these options into \
             /etc/containerd-shim-pause-v2/config.toml (or, on 1.6, into the file that ConfigPath names)",
            received.lost.join(", ")
        ));
    }
    let Options {
        binary_name,
        systemd_cgroup,
        holder,
        shortcuts,
        ..
    } = &received.options;
    let holder = match holder {
        Holder::Auto => "auto",
        Holder::Thread => "thread",
        Holder::Process => "process",
        Holder::Image => "image",
    };
    ok(format!(
        "from {}: SystemdCgroup = {systemd_cgroup}, BinaryName = {:?}, holder = {holder:?}, shortcuts = {shortcuts}",
        received.from, binary_name
    ))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::node::config::{Config, Handler};
    use crate::node::report::State;

    fn handler(kind: &str, options: &str) -> Handler {
        let path = match kind {
            STOCK => "runtime_path = '/x/containerd-shim-pause-v2'\n",
            _ => "",
        };
        let config = format!(
            "[plugins.cri.containerd.runtimes.pause]\nruntime_type = '{kind}'\n{path}\
             [plugins.cri.containerd.runtimes.pause.options]\n{options}"
        );
        Config::parse(&config).unwrap().handlers.remove(0)
    }

    fn read(kind: &str, options: &str, version: &str, fixed: &Path) -> Result<Received> {
        let handler = handler(kind, options);
        let version = Version::parse(version).unwrap();
        received(&Ours::of(&handler).unwrap(), version, fixed)
    }

    const OURS: &str = "io.containerd.pause.v2";

    #[test]
    fn each_release_passes_on_its_part() {
        let dir = tempfile::tempdir().unwrap();
        let fixed = dir.path().join("config.toml");
        std::fs::write(&fixed, "SystemdCgroup = true\nholder = 'process'\n").unwrap();
        let other = dir.path().join("other.toml");
        std::fs::write(&other, "BinaryName = '/opt/runc'\n").unwrap();
        let by_path = format!("ConfigPath = '{}'\nIoUid = 7", other.display());
        // (type, table, release, SystemdCgroup, BinaryName, holder, what is lost)
        for (kind, table, version, systemd, binary, holder, lost) in [
            (OURS, "", "2.1.9", true, "runc", Holder::Process, vec![]),
            (
                OURS,
                "NoNewKeyring = true",
                "2.1.9",
                false,
                "runc",
                Holder::Auto,
                vec![],
            ),
            (
                OURS,
                "NoNewKeyring = true",
                "1.6.20",
                true,
                "runc",
                Holder::Process,
                vec!["NoNewKeyring"],
            ),
            (
                OURS,
                &by_path,
                "1.6.20",
                false,
                "/opt/runc",
                Holder::Auto,
                vec!["IoUid"],
            ),
            (
                OURS,
                &by_path,
                "1.7.24",
                false,
                "/opt/runc",
                Holder::Auto,
                vec!["IoUid"],
            ),
            (STOCK, "", "2.1.9", false, "runc", Holder::Process, vec![]),
            (
                STOCK,
                "SystemdCgroup = true\nholder = 'thread'",
                "1.7.24",
                true,
                "runc",
                Holder::Process,
                vec!["holder"],
            ),
        ] {
            let received = read(kind, table, version, &fixed).unwrap();
            let options = &received.options;
            assert_eq!(options.systemd_cgroup, systemd, "{kind} {table} {version}");
            assert_eq!(
                options.binary_name,
                Path::new(binary),
                "{kind} {table} {version}"
            );
            assert_eq!(options.holder, holder, "{kind} {table} {version}");
            assert_eq!(received.lost, lost, "{kind} {table} {version}");
            let state = if lost.is_empty() {
                State::Ok
            } else {
                State::Note
            };
            assert_eq!(verdict(&Ok(received)).0, state);
        }
    }

    #[test]
    fn what_the_shim_refuses_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let fixed = dir.path().join("config.toml");
        for (kind, table, part) in [
            (OURS, "Holdre = 'x'", "Holdre"),
            (OURS, "SystemdCgroup = 'yes'", "SystemdCgroup"),
            (OURS, "holder = 'pod'", "holder"),
            (OURS, "ConfigPath = '/nowhere/x.toml'", "/nowhere/x.toml"),
            (STOCK, "IoUid = 'root'", "IoUid"),
        ] {
            let (state, text) = verdict(&read(kind, table, "2.1.9", &fixed));
            assert_eq!(state, State::Todo, "{table}: {text}");
            assert!(text.contains(part), "{table}: {text}");
        }
        std::fs::write(&fixed, "holdre = 'x'").unwrap();
        let (state, text) = verdict(&read(STOCK, "", "2.1.9", &fixed));
        assert!(
            state == State::Todo && text.contains("config.toml"),
            "{text}"
        );
    }
}
