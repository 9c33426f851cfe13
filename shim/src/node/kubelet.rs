//! The one key of the kubelet's configuration that concerns the shim: `cgroupDriver`.

use std::io::ErrorKind;
use std::path::Path;

use serde_json::Value;

use crate::kernel::cgroup::Driver;

/// The file that kubeadm and kind write.
pub const CONFIG: &str = "/var/lib/kubelet/config.yaml";

/// What the file says of `cgroupDriver`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum CgroupDriver {
    /// There is no such file: no kubelet, or one that is configured otherwise.
    NoFile,
    /// The file has no such key.
    Unset,
    Set(Driver),
    /// The file cannot be read, or has another value.
    Unknown(String),
}

impl CgroupDriver {
    pub(super) fn read(file: &Path) -> Self {
        match std::fs::read_to_string(file) {
            Ok(text) => Self::parse(&text),
            Err(error) if error.kind() == ErrorKind::NotFound => Self::NoFile,
            Err(error) => Self::Unknown(error.to_string()),
        }
    }

    /// The file is YAML, of which JSON is a part. The key stands at the top level, so at the begin of a line: the kubelet
    /// decodes the file by names that must be whole, and no value of another key begins a line.
    pub(crate) fn parse(text: &str) -> Self {
        if text.trim_start().starts_with('{') {
            return match serde_json::from_str::<Value>(text) {
                Ok(config) => match config.get("cgroupDriver") {
                    Some(driver) => Self::of(driver.as_str().unwrap_or_default()),
                    None => Self::Unset,
                },
                Err(error) => Self::Unknown(error.to_string()),
            };
        }
        let value = |line: &str| {
            let (key, value) = line.split_once(':')?;
            let key = key.trim_end().trim_matches(['"', '\'']);
            (key == "cgroupDriver").then(|| plain(value).to_owned())
        };
        // Of two, YAML takes the later.
        match text.lines().rev().find_map(value) {
            Some(driver) => Self::of(&driver),
            None => Self::Unset,
        }
    }

    fn of(name: &str) -> Self {
        match name {
            "systemd" => Self::Set(Driver::Systemd),
            "cgroupfs" => Self::Set(Driver::Cgroupfs),
            // Also for the kubelet.
            "" | "null" | "~" => Self::Unset,
            other => Self::Unknown(format!("cgroupDriver is {other:?}")),
        }
    }
}

/// A scalar without its comment and its quotation marks.
fn plain(value: &str) -> &str {
    let value = value.trim();
    for mark in ['"', '\''] {
        if let Some(quoted) = value.strip_prefix(mark) {
            return quoted.split(mark).next().unwrap_or_default();
        }
    }
    if value.starts_with('#') {
        return "";
    }
    value.split(" #").next().unwrap_or_default().trim_end()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_key_is_found_as_people_write_it() {
        const SYSTEMD: CgroupDriver = CgroupDriver::Set(Driver::Systemd);
        const CGROUPFS: CgroupDriver = CgroupDriver::Set(Driver::Cgroupfs);
        for (text, expected) in [
            (
                "apiVersion: kubelet.config.k8s.io/v1beta1\ncgroupDriver: systemd\nkind: KubeletConfiguration\n",
                SYSTEMD,
            ),
            ("cgroupDriver: \"systemd\"   # as containerd", SYSTEMD),
            ("cgroupDriver: 'cgroupfs'", CGROUPFS),
            ("cgroupDriver: \"cgroupfs\" # ours\n", CGROUPFS),
            ("\"cgroupDriver\": cgroupfs # old\n", CGROUPFS),
            ("cgroupDriver:   cgroupfs\r\n", CGROUPFS),
            ("cgroupDriver : systemd", SYSTEMD),
            (
                "---\ncgroupDriver: cgroupfs\ncgroupDriver: systemd\n",
                SYSTEMD,
            ),
            (
                "{\"kind\": \"KubeletConfiguration\",\n \"cgroupDriver\": \"systemd\"}",
                SYSTEMD,
            ),
            ("{\"kind\": \"KubeletConfiguration\"}", CgroupDriver::Unset),
            (
                "# cgroupDriver: systemd\ncgroupRoot: /\n",
                CgroupDriver::Unset,
            ),
            ("some:\n  cgroupDriver: systemd\n", CgroupDriver::Unset),
            ("cgroupDriver: # the default\n", CgroupDriver::Unset),
            ("cgroupDriver:", CgroupDriver::Unset),
            ("cgroupDriver:\n", CgroupDriver::Unset),
            ("", CgroupDriver::Unset),
        ] {
            assert_eq!(CgroupDriver::parse(text), expected, "{text}");
        }
        for text in [
            "cgroupDriver: podman",
            "{\"cgroupDriver\": ",
            "{",
            "cgroupDriver: \"x",
        ] {
            let read = CgroupDriver::parse(text);
            assert!(matches!(read, CgroupDriver::Unknown(_)), "{text}: {read:?}");
        }
    }

    #[test]
    fn a_file_that_is_not_there_is_no_error() {
        let dir = tempfile::tempdir().unwrap();
        let none = CgroupDriver::read(&dir.path().join("config.yaml"));
        assert_eq!(none, CgroupDriver::NoFile);
        let folder = CgroupDriver::read(dir.path());
        assert!(matches!(folder, CgroupDriver::Unknown(_)));
    }
}
