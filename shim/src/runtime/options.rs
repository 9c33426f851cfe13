//! The operator's options: the type, the TOML text, the fixed file, and the copy in the bundle of a sandbox.
//!
//! ```text
//!  TOML text or file ──▶ Options ──keep──▶ BUNDLE/options.json ──kept──▶ Options
//! ```

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::bundle::write_private;
use crate::error::{Error, IoError, Result};

/// The fixed file: all options where containerd passes none, and this shim's own options ([`Options`]) where containerd
/// passes a message that has no fields for these.
pub const DEFAULT_FILE: &str = "/etc/containerd-shim-pause-v2/config.toml";

/// The file in a bundle that [`Options::keep`] writes.
const KEPT: &str = "options.json";

/// What holds the namespaces of a sandbox.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Holder {
    /// A thread where the kernel allows one, else a process.
    #[default]
    Auto,
    /// A parked thread of the shim.
    Thread,
    /// The built-in pause program.
    Process,
    /// The configured pause image, run by runc as the stock shim does.
    Image,
}

/// The operator's settings. In TOML the fields have the names of the stock shim's options, so that an operator can move
/// a table from one runtime to the other; only this shim knows `holder`, `shortcuts` and `sandbox_start_timeout`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "PascalCase")]
pub struct Options {
    /// The OCI runtime: a name to look up in `PATH`, or a path.
    #[serde(deserialize_with = "runc_unless_empty")]
    pub binary_name: PathBuf,
    /// The parent of runc's state directories, one for each containerd namespace.
    #[serde(deserialize_with = "runc_root_unless_empty")]
    pub root: PathBuf,
    /// systemd makes the cgroups.
    pub systemd_cgroup: bool,
    /// `runc create --no-pivot`.
    pub no_pivot_root: bool,
    /// `runc create --no-new-keyring`.
    pub no_new_keyring: bool,
    /// The cgroup of the shim itself.
    #[serde(deserialize_with = "none_if_empty")]
    pub shim_cgroup: Option<PathBuf>,
    /// The owner (uid) of the containers' pipes and FIFOs.
    pub io_uid: u32,
    /// The group (gid) of the containers' pipes and FIFOs.
    pub io_gid: u32,
    /// The folder of checkpoints.
    #[serde(deserialize_with = "none_if_empty")]
    pub criu_image_path: Option<PathBuf>,
    /// The folder of criu's logs and work files.
    #[serde(deserialize_with = "none_if_empty")]
    pub criu_work_path: Option<PathBuf>,
    /// Without effect, as in runc: criu is looked up in `PATH`. containerd 1.7 prints the option in its default
    /// configuration.
    #[serde(deserialize_with = "none_if_empty", skip_serializing)]
    pub criu_path: Option<PathBuf>,
    /// What holds the namespaces of a sandbox.
    #[serde(rename = "holder")]
    pub holder: Holder,
    /// Start and delete containers without running the runtime, and ready the kernel for its moves between cgroups, if
    /// the runtime is a release of runc or crun that the shim knows.
    #[serde(rename = "shortcuts")]
    pub shortcuts: bool,
    /// The seconds after which a sandbox of the Sandbox API ends that was made and not started; 0 for no end.
    #[serde(rename = "sandbox_start_timeout")]
    pub sandbox_start_timeout: u32,
}

/// The OCI runtime unless the options name one.
pub const RUNC: &str = "runc";
const RUNC_ROOT: &str = "/run/containerd/runc";

impl Default for Options {
    fn default() -> Self {
        Self {
            binary_name: RUNC.into(),
            root: RUNC_ROOT.into(),
            systemd_cgroup: false,
            no_pivot_root: false,
            no_new_keyring: false,
            shim_cgroup: None,
            io_uid: 0,
            io_gid: 0,
            criu_image_path: None,
            criu_work_path: None,
            criu_path: None,
            holder: Holder::Auto,
            shortcuts: true,
            // A slow pull of the pause image, between the two calls, takes less.
            sandbox_start_timeout: 600,
        }
    }
}

fn runc_unless_empty<'de, D: serde::Deserializer<'de>>(d: D) -> Result<PathBuf, D::Error> {
    Ok(path_or(String::deserialize(d)?, RUNC))
}

fn runc_root_unless_empty<'de, D: serde::Deserializer<'de>>(d: D) -> Result<PathBuf, D::Error> {
    Ok(path_or(String::deserialize(d)?, RUNC_ROOT))
}

/// containerd's default configuration prints every path as an empty string.
fn none_if_empty<'de, D: serde::Deserializer<'de>>(d: D) -> Result<Option<PathBuf>, D::Error> {
    let given = Option::<PathBuf>::deserialize(d)?;
    Ok(given.filter(|path| !path.as_os_str().is_empty()))
}

fn path_or(given: String, default: &str) -> PathBuf {
    if given.is_empty() {
        default.into()
    } else {
        given.into()
    }
}

impl Options {
    /// Writes the options into the `bundle` of a sandbox of the Sandbox API: `CreateSandbox` brings no options.
    ///
    /// # Errors
    /// `Io` when the file cannot be written.
    pub fn keep(&self, bundle: &Path) -> Result<()> {
        let path = bundle.join(KEPT);
        let text = serde_json::to_vec(self).map_err(|e| IoError::at("encode", &path)(e))?;
        write_private(&path, &text)
    }

    /// Reads the options that [`Options::keep`] wrote. An unknown option is one of a later release: the binary may be
    /// replaced between `start` and the server.
    ///
    /// # Errors
    /// `Io` when the file cannot be read or decoded.
    pub fn kept(bundle: &Path) -> Result<Self> {
        let path = bundle.join(KEPT);
        let text = std::fs::read(&path).map_err(IoError::at("read runtime options", &path))?;
        let decoded = serde_json::from_slice(&text).and_then(|mut kept: Map<String, Value>| {
            let known = serde_json::to_value(Self::default())?;
            kept.retain(|name, _| known.get(name).is_some());
            serde_json::from_value(Value::Object(kept))
        });
        Ok(decoded.map_err(|e| IoError::at("decode", &path)(e))?)
    }

    /// The holder, in the words of the crate `pause`.
    pub fn holder_choice(&self) -> pause::HolderChoice {
        match self.holder {
            Holder::Auto | Holder::Image => pause::HolderChoice::Auto,
            Holder::Thread => pause::HolderChoice::Thread,
            Holder::Process => pause::HolderChoice::Process,
        }
    }

    /// Reads the fixed file at `path`; a missing file means the defaults.
    ///
    /// # Errors
    /// `Io` when the file cannot be read, `InvalidArgument` as [`Options::from_toml`].
    pub fn from_default_file(path: &Path) -> Result<Self> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::from_toml(&text, &path.display().to_string()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(IoError::at("read runtime options", path)(error).into()),
        }
    }

    /// Reads the file that the operator named as `ConfigPath`.
    ///
    /// # Errors
    /// `Io` when the file cannot be read, `InvalidArgument` as [`Options::from_toml`].
    pub fn from_config_path(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path)
            .map_err(IoError::at("read runtime options (ConfigPath)", path))?;
        Self::from_toml(&text, &path.display().to_string())
    }

    /// Reads TOML text. `from` says in an error where the text comes from.
    ///
    /// # Errors
    /// `InvalidArgument` for text that is no TOML, and for an unknown option or value.
    pub fn from_toml(text: &str, from: &str) -> Result<Self> {
        toml::from_str(text).map_err(|error: toml::de::Error| {
            // The message alone names a wrong value, and not the option that has the value.
            let at = error.span().map_or(0, |span| span.start);
            Error::InvalidArgument(format!(
                "runtime options in {from}: {}: {}",
                error.message(),
                line_at(text, at)
            ))
        })
    }

    /// Reads a table of TOML. `from` says in an error where the table stands.
    ///
    /// # Errors
    /// `InvalidArgument` as [`Options::from_toml`].
    pub fn from_table(table: toml::Table, from: &str) -> Result<Self> {
        table.try_into().map_err(|error: toml::de::Error| {
            // The error's own text has the option on a line of its own.
            let why = error.to_string().trim().replace('\n', " ");
            Error::InvalidArgument(format!("runtime options in {from}: {why}"))
        })
    }
}

/// The line of `text` that has the byte `at`.
fn line_at(text: &str, at: usize) -> &str {
    let before = text.get(..at).unwrap_or_default();
    let begin = before.rfind('\n').map_or(0, |end| end + 1);
    let line = text.get(begin..).and_then(|rest| rest.lines().next());
    line.unwrap_or_default().trim()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_value_is_named_with_its_option() {
        for line in [
            "IoUid = 'many'",
            "holder = 'pod'",
            "shortcuts = 1",
            "Root = []",
        ] {
            let text = format!("SystemdCgroup = true\n{line}\n# the end\n");
            let refused = Options::from_toml(&text, "x.toml").map_err(|error| error.to_string());
            assert!(
                matches!(&refused, Err(text) if text.contains(line) && text.contains("x.toml")),
                "{refused:?}"
            );
        }
    }
}
