//! The pods as a table for a person, and as JSON for a program.

use rustix::process::Pid;
use serde_json::{Value, json};

use super::{File, Holder, Pod, Shim};
use crate::node::Form;

/// As many characters of an id as crictl shows.
const SHORT: usize = 13;
const HEAD: [&str; 8] = [
    "POD ID",
    "NAMESPACE",
    "NAME",
    "HOLDER",
    "CONTAINERS",
    "SHIM",
    "MEMORY",
    "VERSION",
];

pub(super) fn pods(pods: &[Pod], form: Form) -> String {
    match form {
        Form::Text => table(pods),
        Form::Json => {
            let pods: Vec<Value> = pods.iter().map(object).collect();
            format!("{}\n", json!({ "pods": pods }))
        }
    }
}

fn table(pods: &[Pod]) -> String {
    let rows: Vec<[String; 8]> = std::iter::once(HEAD.map(str::to_owned))
        .chain(pods.iter().map(row))
        .collect();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or_default()
    };
    let widths: Vec<usize> = (0..HEAD.len()).map(width).collect();
    let line = |row: &[String; 8]| {
        let cells = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"));
        format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
    };
    rows.iter().map(line).collect()
}

fn row(pod: &Pod) -> [String; 8] {
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let shim = pod.shim.as_ref();
    [
        pod.id.chars().take(SHORT).collect(),
        or_none(pod.namespace.clone()),
        or_none(pod.name.clone()),
        match pod.holder {
            Holder::Thread(pid) => format!("thread {pid}"),
            Holder::Process(pid) => format!("process {pid}"),
            Holder::Image(pid) => format!("image {pid}"),
            Holder::None => "-".to_owned(),
        },
        pod.containers.to_string(),
        or_none(shim.map(|shim| shim.pid.to_string())),
        or_none(
            shim.and_then(|shim| shim.private)
                .map(|kib| format!("{kib} kB")),
        ),
        shim.map_or_else(
            || "gone: containerd has not cleaned up yet".to_owned(),
            version,
        ),
    ]
}

/// The version that runs, and what is on the disk if that is not the same.
fn version(shim: &Shim) -> String {
    let running = shim.version.as_deref().unwrap_or("no answer");
    match &shim.file {
        File::Current => running.to_owned(),
        File::Replaced(Some(new)) if Some(new) == shim.version.as_ref() => {
            format!("{running}, on disk: another build of {new}")
        }
        File::Replaced(Some(new)) => format!("{running}, on disk: {new}"),
        File::Replaced(None) => format!("{running}, on disk: another program"),
        File::Removed => format!("{running}, on disk: removed"),
    }
}

fn object(pod: &Pod) -> Value {
    let raw = |pid: Pid| pid.as_raw_nonzero().get();
    let (kind, pid) = match pod.holder {
        Holder::Thread(pid) => ("thread", Some(raw(pid))),
        Holder::Process(pid) => ("process", Some(raw(pid))),
        Holder::Image(pid) => ("image", Some(raw(pid))),
        Holder::None => ("none", None),
    };
    let shim = pod.shim.as_ref().map(|shim| {
        let (file, on_disk) = match &shim.file {
            File::Current => ("current", None),
            File::Replaced(version) => ("replaced", version.as_deref()),
            File::Removed => ("removed", None),
        };
        json!({
            "pid": raw(shim.pid),
            "private_kib": shim.private,
            "version": shim.version,
            "file": file,
            "file_version": on_disk,
        })
    });
    json!({
        "id": pod.id,
        "containerd_namespace": pod.containerd_namespace,
        "namespace": pod.namespace,
        "name": pod.name,
        "holder": { "kind": kind, "pid": pid },
        "containers": pod.containers,
        "shim": shim,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn a_pod(file: File) -> Pod {
        let pid = Pid::from_raw(812).unwrap();
        Pod {
            id: "3055d7576194c7d1d6097a2fd320fdb5".into(),
            containerd_namespace: "k8s.io".into(),
            name: Some("myweb2".into()),
            namespace: Some("default".into()),
            holder: Holder::Thread(pid),
            containers: 2,
            shim: Some(Shim {
                pid,
                private: Some(334),
                version: Some("0.1.0".into()),
                file,
            }),
        }
    }

    #[test]
    fn a_pod_is_a_line() {
        let gone = Pod {
            name: None,
            namespace: None,
            holder: Holder::None,
            shim: None,
            ..a_pod(File::Current)
        };
        let text = pods(&[a_pod(File::Current), gone], Form::Text);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(
            lines[..2],
            [
                "POD ID         NAMESPACE  NAME    HOLDER      CONTAINERS  SHIM  MEMORY  VERSION",
                "3055d7576194c  default    myweb2  thread 812  2           812   334 kB  0.1.0",
            ]
        );
        assert!(lines[2].contains("gone"), "{text}");
        assert_eq!(pods(&[], Form::Text).lines().count(), 1);
    }

    #[test]
    fn another_file_on_the_disk_is_said() {
        let new = |version: &str| File::Replaced(Some(version.to_owned()));
        for (file, expected) in [
            (new("0.2.0"), "0.1.0, on disk: 0.2.0"),
            (new("0.1.0"), "0.1.0, on disk: another build of 0.1.0"),
            (File::Replaced(None), "0.1.0, on disk: another program"),
            (File::Removed, "0.1.0, on disk: removed"),
        ] {
            let text = pods(&[a_pod(file)], Form::Text);
            assert!(text.contains(expected), "{text}");
        }
        let text = pods(&[a_pod(new("0.2.0"))], Form::Json);
        let value: Value = serde_json::from_str(&text).unwrap();
        let pod = &value["pods"][0];
        assert_eq!(pod["holder"]["kind"], "thread");
        assert_eq!(pod["shim"]["file"], "replaced");
        assert_eq!(pod["shim"]["file_version"], "0.2.0");
        assert_eq!(
            pod["id"].as_str().unwrap().len(),
            32,
            "JSON has the whole id"
        );
    }
}
