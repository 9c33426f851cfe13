//! Runtime options: what the operator set in containerd's configuration, in the three shapes it arrives in.
//!
//! ```text
//!  nothing ─────────────────────────────▶ /etc/containerd-shim-pause-v2/config.toml, else defaults
//!  containerd.runc.v1.Options ──────────▶ taken field by field   (ctr, Docker, io.containerd.runc.v2 + runtime_path);
//!                                         `holder` and `shortcuts`, which it has no fields for, from that same file
//!  runtimeoptions.v1.Options ──┬ body ──▶ TOML text              (CRI of containerd ≥ 1.7)
//!                              └ path ──▶ a TOML file            (CRI of containerd 1.6)
//! ```
//!
//! The type URL decides: field 3 is the TOML text in one message and a cgroup path in the other.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use containerd_shim_protos::protobuf::Message as _;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::oci;
use prost::Message as _;
use serde::{Deserialize, Serialize};

use crate::error::{Error, IoError, Result};

/// Read when containerd passes no options at all, and for what is ours when it passes options that cannot say it.
pub const DEFAULT_FILE: &str = "/etc/containerd-shim-pause-v2/config.toml";

/// The file in a bundle that [`Options::keep`] writes.
const KEPT: &str = "options.json";

/// What holds the namespaces of a sandbox.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Holder {
    /// A thread where the kernel lets one, else a process.
    #[default]
    Auto,
    /// A parked thread of the shim.
    Thread,
    /// The built-in pause program.
    Process,
    /// The configured pause image, run by runc as the stock shim does.
    Image,
}

/// The operator's settings. Field names in TOML are those of the stock shim's options, so that a table can be moved
/// from one runtime to the other; `holder` and `shortcuts` are ours.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize)]
#[serde(default, deny_unknown_fields, rename_all = "PascalCase")]
pub struct Options {
    /// The OCI runtime: a name to look up in `PATH`, or a path.
    #[serde(deserialize_with = "runc_unless_empty")]
    pub binary_name: PathBuf,
    /// Where runc keeps its state; the containerd namespace is added to it.
    #[serde(deserialize_with = "runc_root_unless_empty")]
    pub root: PathBuf,
    /// Let systemd make the cgroups.
    pub systemd_cgroup: bool,
    /// `runc create --no-pivot`.
    pub no_pivot_root: bool,
    /// `runc create --no-new-keyring`.
    pub no_new_keyring: bool,
    /// The cgroup that the shim itself goes into.
    pub shim_cgroup: Option<PathBuf>,
    /// Owner of the containers' pipes and FIFOs.
    pub io_uid: u32,
    /// Group of the containers' pipes and FIFOs.
    pub io_gid: u32,
    /// Where checkpoints are kept.
    pub criu_image_path: Option<PathBuf>,
    /// Where criu works.
    pub criu_work_path: Option<PathBuf>,
    /// What holds the namespaces of a sandbox.
    #[serde(rename = "holder")]
    pub holder: Holder,
    /// Start and delete containers of a program named `runc` without running it; ready the kernel for the others' moves
    /// between cgroups.
    #[serde(rename = "shortcuts")]
    pub shortcuts: bool,
}

/// The program that is meant when none is named.
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
            holder: Holder::Auto,
            shortcuts: true,
        }
    }
}

fn runc_unless_empty<'de, D: serde::Deserializer<'de>>(d: D) -> Result<PathBuf, D::Error> {
    Ok(path_or(String::deserialize(d)?, RUNC))
}

fn runc_root_unless_empty<'de, D: serde::Deserializer<'de>>(d: D) -> Result<PathBuf, D::Error> {
    Ok(path_or(String::deserialize(d)?, RUNC_ROOT))
}

fn path_or(given: String, default: &str) -> PathBuf {
    if given.is_empty() {
        default.into()
    } else {
        given.into()
    }
}

/// `runtimeoptions.v1.Options`, containerd's message for the options of runtimes that it does not know.
#[derive(Clone, PartialEq, prost::Message)]
struct RuntimeOptions {
    #[prost(string, tag = "1")]
    type_url: String,
    #[prost(string, tag = "2")]
    config_path: String,
    #[prost(bytes = "vec", tag = "3")]
    config_body: Vec<u8>,
}

impl Options {
    /// Reads the options of a request, whichever shape they have.
    ///
    /// # Errors
    /// `InvalidArgument` for a message of another type, for bytes that do not decode, for TOML that does not parse and
    /// for an option that there is not; `Io` for a file that is named and cannot be read.
    pub fn from_any(any: Option<&Any>) -> Result<Self> {
        Self::read(any, Path::new(DEFAULT_FILE))
    }

    fn read(any: Option<&Any>, default_file: &Path) -> Result<Self> {
        let Some(any) = any.filter(|any| !any.type_url.is_empty()) else {
            return Self::from_default_file(default_file);
        };
        // A type URL may have a prefix up to its last slash.
        match any.type_url.rsplit('/').next().unwrap_or_default() {
            "containerd.runc.v1.Options" => {
                let options = oci::Options::parse_from_bytes(&any.value)
                    .map_err(|e| undecodable(&any.type_url, &e))?;
                Ok(Self::from_default_file(default_file)?.with(options))
            }
            "runtimeoptions.v1.Options" => {
                let options = RuntimeOptions::decode(any.value.as_slice())
                    .map_err(|e| undecodable(&any.type_url, &e))?;
                Self::from_runtime_options(&options, default_file)
            }
            _ => Err(Error::InvalidArgument(format!(
                "runtime options: {:?} is neither containerd.runc.v1.Options nor runtimeoptions.v1.Options",
                any.type_url
            ))),
        }
    }

    /// Keeps them in the `bundle` of a sandbox that will be made through the Sandbox API, whose requests do not have them.
    ///
    /// # Errors
    /// `Io` when the file cannot be written.
    pub fn keep(&self, bundle: &Path) -> Result<()> {
        let path = bundle.join(KEPT);
        let text = serde_json::to_vec(self).map_err(|e| IoError::at("encode", &path)(e))?;
        Ok(std::fs::write(&path, text).map_err(IoError::at("write", &path))?)
    }

    /// What [`Options::keep`] kept.
    ///
    /// # Errors
    /// `Io` when the file cannot be read.
    pub fn kept(bundle: &Path) -> Result<Self> {
        let path = bundle.join(KEPT);
        let text = std::fs::read(&path).map_err(IoError::at("read runtime options", &path))?;
        Ok(serde_json::from_slice(&text).map_err(|e| IoError::at("decode", &path)(e))?)
    }

    /// What the crate `pause` is asked for.
    pub fn holder_choice(&self) -> pause::HolderChoice {
        match self.holder {
            Holder::Auto | Holder::Image => pause::HolderChoice::Auto,
            Holder::Thread => pause::HolderChoice::Thread,
            Holder::Process => pause::HolderChoice::Process,
        }
    }

    fn from_default_file(path: &Path) -> Result<Self> {
        match std::fs::read_to_string(path) {
            Ok(text) => Self::from_toml(&text, &path.display().to_string()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(IoError::at("read runtime options", path)(error).into()),
        }
    }

    fn from_runtime_options(options: &RuntimeOptions, default_file: &Path) -> Result<Self> {
        if !options.config_body.is_empty() {
            let text = std::str::from_utf8(&options.config_body)
                .map_err(|e| undecodable("runtimeoptions.v1.Options.config_body", &e))?;
            Self::from_toml(text, "the options table of the runtime")
        } else if !options.config_path.is_empty() {
            let path = Path::new(&options.config_path);
            let text = std::fs::read_to_string(path)
                .map_err(IoError::at("read runtime options (ConfigPath)", path))?;
            Self::from_toml(&text, &options.config_path)
        } else {
            Self::from_default_file(default_file)
        }
    }

    fn from_toml(text: &str, from: &str) -> Result<Self> {
        toml::from_str(text).map_err(|error| {
            Error::InvalidArgument(format!("runtime options in {from}: {}", error.message()))
        })
    }

    /// runc's own options, with what is ours as it is here.
    fn with(self, options: oci::Options) -> Self {
        Self {
            binary_name: path_or(options.binary_name, RUNC),
            root: path_or(options.root, RUNC_ROOT),
            systemd_cgroup: options.systemd_cgroup,
            no_pivot_root: options.no_pivot_root,
            no_new_keyring: options.no_new_keyring,
            shim_cgroup: path(options.shim_cgroup),
            io_uid: options.io_uid,
            io_gid: options.io_gid,
            criu_image_path: path(options.criu_image_path),
            criu_work_path: path(options.criu_work_path),
            holder: self.holder,
            shortcuts: self.shortcuts,
        }
    }
}

fn path(given: String) -> Option<PathBuf> {
    (!given.is_empty()).then(|| given.into())
}

fn undecodable(what: &str, error: &dyn std::fmt::Display) -> Error {
    Error::InvalidArgument(format!("runtime options: decode {what}: {error}"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn any(type_url: &str, value: Vec<u8>) -> Any {
        Any {
            type_url: type_url.into(),
            value,
            ..Any::default()
        }
    }

    fn runtime_options(config_path: &str, config_body: &str) -> Any {
        let message = RuntimeOptions {
            type_url: String::new(),
            config_path: config_path.into(),
            config_body: config_body.into(),
        };
        any("runtimeoptions.v1.Options", message.encode_to_vec())
    }

    #[test]
    fn options_of_runc_are_taken_field_by_field() {
        let mut message = oci::Options::new();
        message.binary_name = "/opt/runc".into();
        message.shim_cgroup = "/shims".into();
        message.systemd_cgroup = true;
        let any = any(
            "containerd.runc.v1.Options",
            message.write_to_bytes().unwrap(),
        );
        let options = Options::from_any(Some(&any)).unwrap();
        assert_eq!(options.binary_name, Path::new("/opt/runc"));
        assert_eq!(options.shim_cgroup.as_deref(), Some(Path::new("/shims")));
        assert_eq!(options.root, Path::new(RUNC_ROOT));
        assert!(options.systemd_cgroup);
    }

    #[test]
    fn options_of_runc_leave_what_is_ours_to_the_fixed_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        std::fs::write(
            &file,
            "holder = 'process'\nshortcuts = false\nSystemdCgroup = true\n",
        )
        .unwrap();
        let any = any("containerd.runc.v1.Options", Vec::new());
        let options = Options::read(Some(&any), &file).unwrap();
        let expected = Options {
            holder: Holder::Process,
            shortcuts: false,
            ..Options::default()
        };
        assert_eq!(options, expected, "nothing else comes from the file");
        std::fs::write(&file, "holdre = 'process'").unwrap();
        let error = Options::read(Some(&any), &file).unwrap_err().to_string();
        assert!(error.contains("config.toml"), "{error}");
    }

    #[test]
    fn a_toml_body_is_not_taken_for_a_cgroup() {
        let any = runtime_options(
            "",
            "BinaryName = '/usr/sbin/runc'\nSystemdCgroup = true\nholder = 'process'\n",
        );
        let options = Options::from_any(Some(&any)).unwrap();
        assert_eq!(options.binary_name, Path::new("/usr/sbin/runc"));
        assert_eq!(options.shim_cgroup, None);
        assert_eq!(options.holder, Holder::Process);
    }

    #[test]
    fn a_file_is_read_when_only_its_path_is_given() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pause.toml");
        std::fs::write(&file, "holder = \"image\"\nRoot = \"\"\n").unwrap();
        let any = runtime_options(file.to_str().unwrap(), "");
        let options = Options::from_any(Some(&any)).unwrap();
        assert_eq!(options.holder, Holder::Image);
        assert_eq!(options.root, Path::new(RUNC_ROOT));
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error =
            Options::from_any(Some(&runtime_options("/nowhere/pause.toml", ""))).unwrap_err();
        assert!(error.to_string().contains("/nowhere/pause.toml"), "{error}");
    }

    #[test]
    fn an_unknown_option_is_refused_by_name() {
        let error = Options::from_any(Some(&runtime_options("", "Holdre = 'x'"))).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)));
        assert!(error.to_string().contains("Holdre"), "{error}");
    }

    #[test]
    fn an_unknown_holder_is_refused_by_name() {
        let error = Options::from_any(Some(&runtime_options("", "holder = 'pod'"))).unwrap_err();
        assert!(error.to_string().contains("pod"), "{error}");
    }

    #[test]
    fn another_message_is_refused_by_its_type() {
        let error = Options::from_any(Some(&any("x.y/Z", vec![]))).unwrap_err();
        assert!(error.to_string().contains("x.y/Z"), "{error}");
    }

    #[test]
    fn no_options_are_the_defaults() {
        let missing = Path::new("/nowhere/config.toml");
        assert_eq!(
            Options::from_default_file(missing).unwrap(),
            Options::default()
        );
    }
}
