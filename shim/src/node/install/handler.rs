//! The handler as text: for pods as they are under the node's own handler `runc`.

use std::fmt::Write;

use toml::{Table, Value};

use super::super::config::TYPE;
use super::plan::{Found, HANDLER, PROGRAM};
use super::text::quoted;
use crate::kernel::cgroup::Driver;

/// The names of the plugin with CRI's handlers: of 2.x, of 1.x, and of the format's version 1.
pub(super) const CRI: [&str; 3] = [
    "io.containerd.cri.v1.runtime",
    "io.containerd.grpc.v1.cri",
    "cri",
];

/// What of the handler `runc` a pod gets under any shim.
const SETTINGS: [&str; 9] = [
    "base_runtime_spec",
    "cgroup_writable",
    "cni_conf_dir",
    "cni_max_conf_num",
    "container_annotations",
    "pod_annotations",
    "privileged_without_host_devices",
    "privileged_without_host_devices_all_devices_allowed",
    "snapshotter",
];
/// The stock shim's options that this shim has, too, but for the cgroup driver.
const OPTIONS: [&str; 9] = [
    "BinaryName",
    "CriuImagePath",
    "CriuWorkPath",
    "IoGid",
    "IoUid",
    "NoNewKeyring",
    "NoPivotRoot",
    "Root",
    "ShimCgroup",
];

/// How containerd finds the shim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Naming {
    /// By the name of the program in containerd's PATH. Options stand in the fixed file.
    ByType,
    /// By the program's path, as if the program was the stock shim. Options stand in the handler's table.
    ByPath,
}

/// The tables of our handler for the plugin of this name, and the handler `runc` where `beside`, the file's other content,
/// has no handlers: 1.x forgets its own `runc` when a file has a table of handlers.
pub(super) fn lines(found: &Found, plugin: &str, naming: Naming, beside: &Table) -> String {
    let mut text = String::new();
    let runc = of_dump(&found.dump, "runc").cloned().unwrap_or_default();
    let mut ours = kept(&runc, &SETTINGS);
    let mut options = Table::new();
    match naming {
        Naming::ByType => {
            ours.insert("runtime_type".into(), TYPE.into());
        }
        Naming::ByPath => {
            ours.insert("runtime_type".into(), "io.containerd.runc.v2".into());
            ours.insert("runtime_path".into(), PROGRAM.into());
            options = self::options(found);
        }
    }
    handler(&mut text, plugin, HANDLER, &ours, &options);
    let has_handlers =
        cri_of(beside).is_some_and(|cri| runtimes(cri).is_some_and(|table| !table.is_empty()));
    if plugin != CRI[0]
        && found.version < super::super::containerd::Version::of(2, 0)
        && !has_handlers
    {
        let mut settings = runc;
        let options = settings.remove("options");
        let options = options.as_ref().and_then(Value::as_table).cloned();
        settings.retain(|_, value| !is_zero(value));
        let mut options = options.unwrap_or_default();
        options.retain(|_, value| !is_zero(value));
        text.push('\n');
        handler(&mut text, plugin, "runc", &settings, &options);
    }
    text
}

fn handler(text: &mut String, plugin: &str, name: &str, settings: &Table, options: &Table) {
    let plugin = match plugin {
        "cri" => plugin.to_owned(),
        plugin => quoted(plugin),
    };
    let table = format!("plugins.{plugin}.containerd.runtimes.{name}");
    let _ = writeln!(text, "[{table}]");
    text.push_str(&self::settings(settings, "  "));
    if !options.is_empty() {
        let _ = writeln!(text, "  [{table}.options]");
        text.push_str(&self::settings(options, "    "));
    }
}

/// A table without tables in it, one line a key.
pub(super) fn settings(table: &Table, indent: &str) -> String {
    let mut text = String::new();
    for (key, value) in table {
        if let Some(value) = value_of(value) {
            let _ = writeln!(text, "{indent}{key} = {value}");
        }
    }
    text
}

fn value_of(value: &Value) -> Option<String> {
    Some(match value {
        Value::String(text) => quoted(text),
        Value::Integer(number) => number.to_string(),
        Value::Boolean(truth) => truth.to_string(),
        Value::Array(values) => {
            let values: Option<Vec<_>> = values.iter().map(value_of).collect();
            format!("[{}]", values?.join(", "))
        }
        Value::Float(_) | Value::Datetime(_) | Value::Table(_) => return None,
    })
}

/// The shim's options: those of the node's handler `runc`, with the kubelet's cgroup driver.
pub(super) fn options(found: &Found) -> Table {
    let runc = of_dump(&found.dump, "runc").and_then(|runc| runc.get("options")?.as_table());
    let systemd = match found.kubelet {
        Some(driver) => driver == Driver::Systemd,
        None => runc.and_then(|options| options.get("SystemdCgroup")?.as_bool()) == Some(true),
    };
    let mut options = runc
        .map(|options| kept(options, &OPTIONS))
        .unwrap_or_default();
    options.insert("SystemdCgroup".into(), systemd.into());
    options
}

/// Those of the keys that say something.
fn kept(table: &Table, keys: &[&str]) -> Table {
    let kept = table
        .iter()
        .filter(|(key, value)| keys.contains(&key.as_str()) && !is_zero(value));
    kept.map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

/// Whether a value says no more than its absence: containerd prints every key that it knows.
fn is_zero(value: &Value) -> bool {
    match value {
        Value::String(text) => text.is_empty(),
        Value::Integer(number) => *number == 0,
        Value::Boolean(truth) => !truth,
        Value::Array(values) => values.is_empty(),
        Value::Table(table) => table.values().all(is_zero),
        Value::Float(_) | Value::Datetime(_) => false,
    }
}

/// CRI's settings in a file or a dump.
pub(super) fn cri_of(root: &Table) -> Option<&Table> {
    let plugins = root.get("plugins")?.as_table()?;
    CRI.iter().find_map(|name| plugins.get(*name)?.as_table())
}

fn runtimes(cri: &Table) -> Option<&Table> {
    cri.get("containerd")?
        .as_table()?
        .get("runtimes")?
        .as_table()
}

/// A handler of an effective configuration.
pub(super) fn of_dump<'a>(dump: &'a Table, name: &str) -> Option<&'a Table> {
    let plugins = dump.get("plugins")?.as_table()?;
    // 2.x keeps what it does not know of 1.x below the old name, without handlers.
    let found = |plugin: &&str| {
        runtimes(plugins.get(*plugin)?.as_table()?)?
            .get(name)?
            .as_table()
    };
    CRI.iter().find_map(found)
}

/// Whether our handler of an effective configuration leads to our program.
pub(super) fn is_listed(dump: &Table) -> bool {
    let text = |handler: &Table, key: &str| handler.get(key)?.as_str().map(str::to_owned);
    of_dump(dump, HANDLER).is_some_and(|ours| {
        text(ours, "runtime_type").as_deref() == Some(TYPE)
            || text(ours, "runtime_path").as_deref() == Some(PROGRAM)
    })
}

/// The first key in which two effective configurations differ, apart from our handler and the list of files.
pub(super) fn difference(before: &Table, after: &Table) -> Option<String> {
    differing("", &compared(before), &compared(after))
}

fn compared(dump: &Table) -> Table {
    let mut dump = dump.clone();
    dump.remove("imports");
    let plugins = dump.get_mut("plugins").and_then(Value::as_table_mut);
    for (_, plugin) in plugins.into_iter().flatten() {
        let handlers = plugin
            .get_mut("containerd")
            .and_then(|containerd| containerd.get_mut("runtimes"))
            .and_then(Value::as_table_mut);
        if let Some(handlers) = handlers {
            handlers.remove(HANDLER);
        }
    }
    dump
}

fn differing(at: &str, before: &Table, after: &Table) -> Option<String> {
    let nothing = Value::Boolean(false);
    for key in before.keys().chain(after.keys()) {
        let place = format!("{at}.{key}");
        let (old, new) = (
            before.get(key).unwrap_or(&nothing),
            after.get(key).unwrap_or(&nothing),
        );
        let found = match (old, new) {
            (Value::Table(old), Value::Table(new)) => differing(&place, old, new),
            (old, new) if old == new || (is_zero(old) && is_zero(new)) => None,
            _ => Some(place.trim_start_matches('.').to_owned()),
        };
        if found.is_some() {
            return found;
        }
    }
    None
}
