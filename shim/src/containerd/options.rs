//! Runtime options: what the operator set in containerd's configuration. An `Any` brings the options in three shapes:
//!
//! ```text
//!  nothing ─────────────────────────────▶ /etc/containerd-shim-pause-v2/config.toml, else defaults
//!  containerd.runc.v1.Options ──────────▶ taken field by field   (ctr, Docker, io.containerd.runc.v2 + runtime_path);
//!                                         the shim's own options, unknown to runc, from that same file
//!  runtimeoptions.v1.Options ──┬ body ──▶ TOML text              (CRI of containerd ≥ 1.7)
//!                              └ path ──▶ a TOML file            (CRI of containerd 1.6)
//! ```
//!
//! The type URL decides: field 3 is the TOML text in one message and a cgroup path in the other.

use std::path::{Path, PathBuf};

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::{self, Message};
use containerd_shim_protos::shim::oci;

use crate::containerd::convert::type_name;
use crate::containerd::wire::{self, Field};
use crate::error::{Error, Result};
use crate::runtime::options::{DEFAULT_FILE, Options};

/// `runtimeoptions.v1.Options`, containerd's message for the options of other runtimes than runc. Field 1, a type URL, is
/// not needed.
#[derive(Debug, Default)]
struct RuntimeOptions {
    config_path: String,
    config_body: Vec<u8>,
}

fn runtime_options(options: &mut RuntimeOptions, field: Field<'_, '_>) -> protobuf::Result<()> {
    match field.number {
        2 => options.config_path = field.string()?,
        3 => options.config_body = field.bytes()?,
        _ => field.skip()?,
    }
    Ok(())
}

/// Reads the options of a request.
///
/// # Errors
/// `InvalidArgument` for a message of another type, for bytes that do not decode, for TOML that does not parse and for an
/// unknown option; `Io` for a named file that cannot be read.
pub fn from_any(any: Option<&Any>) -> Result<Options> {
    read(any, Path::new(DEFAULT_FILE))
}

/// Whether the options are those of a file.
#[cfg(feature = "fuzzing")]
pub(crate) fn names_a_file(any: &Any) -> bool {
    type_name(any) == "runtimeoptions.v1.Options"
        && wire::decode(&any.value, runtime_options)
            .is_ok_and(|options| options.config_body.is_empty() && !options.config_path.is_empty())
}

fn read(any: Option<&Any>, default_file: &Path) -> Result<Options> {
    let Some(any) = any.filter(|any| !any.type_url.is_empty()) else {
        return Options::from_default_file(default_file);
    };
    match type_name(any) {
        "containerd.runc.v1.Options" => {
            let options = oci::Options::parse_from_bytes(&any.value)
                .map_err(|e| undecodable(&any.type_url, &e))?;
            Ok(of_runc(options, &Options::from_default_file(default_file)?))
        }
        "runtimeoptions.v1.Options" => {
            let options = wire::decode(&any.value, runtime_options)
                .map_err(|e| undecodable(&any.type_url, &e))?;
            of_another_runtime(&options, default_file)
        }
        _ => Err(Error::InvalidArgument(format!(
            "runtime options: {:?} is neither containerd.runc.v1.Options nor runtimeoptions.v1.Options",
            any.type_url
        ))),
    }
}

/// `given`; what runc's message has no fields for comes from `ours`.
fn of_runc(given: oci::Options, ours: &Options) -> Options {
    let default = Options::default();
    Options {
        binary_name: path(given.binary_name).unwrap_or(default.binary_name),
        root: path(given.root).unwrap_or(default.root),
        systemd_cgroup: given.systemd_cgroup,
        no_pivot_root: given.no_pivot_root,
        no_new_keyring: given.no_new_keyring,
        shim_cgroup: path(given.shim_cgroup),
        io_uid: given.io_uid,
        io_gid: given.io_gid,
        criu_image_path: path(given.criu_image_path),
        criu_work_path: path(given.criu_work_path),
        criu_path: None,
        holder: ours.holder,
        shortcuts: ours.shortcuts,
        sandbox_start_timeout: ours.sandbox_start_timeout,
    }
}

fn of_another_runtime(given: &RuntimeOptions, default_file: &Path) -> Result<Options> {
    if !given.config_body.is_empty() {
        let text = std::str::from_utf8(&given.config_body)
            .map_err(|e| undecodable("runtimeoptions.v1.Options.config_body", &e))?;
        Options::from_toml(text, "the options table of the runtime")
    } else if !given.config_path.is_empty() {
        Options::from_config_path(Path::new(&given.config_path))
    } else {
        Options::from_default_file(default_file)
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
    use crate::runtime::options::Holder;
    use containerd_shim_protos::protobuf::CodedOutputStream;

    fn any(type_url: &str, value: Vec<u8>) -> Any {
        Any {
            type_url: type_url.into(),
            value,
            ..Any::default()
        }
    }

    fn runtime_options(config_path: &str, config_body: &str) -> Any {
        let mut message = Vec::new();
        let mut output = CodedOutputStream::vec(&mut message);
        output.write_string(1, "x.y/Options").unwrap();
        output.write_string(2, config_path).unwrap();
        output.write_bytes(3, config_body.as_bytes()).unwrap();
        output.flush().unwrap();
        drop(output);
        any("runtimeoptions.v1.Options", message)
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
        let options = from_any(Some(&any)).unwrap();
        assert_eq!(options.binary_name, Path::new("/opt/runc"));
        assert_eq!(options.shim_cgroup.as_deref(), Some(Path::new("/shims")));
        assert_eq!(options.root, Options::default().root);
        assert!(options.systemd_cgroup);
    }

    #[test]
    fn options_of_runc_leave_what_is_ours_to_the_fixed_file() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("config.toml");
        std::fs::write(
            &file,
            "holder = 'process'\nshortcuts = false\nsandbox_start_timeout = 7\nSystemdCgroup = true\n",
        )
        .unwrap();
        let any = any("containerd.runc.v1.Options", Vec::new());
        let options = read(Some(&any), &file).unwrap();
        let expected = Options {
            holder: Holder::Process,
            shortcuts: false,
            sandbox_start_timeout: 7,
            ..Options::default()
        };
        assert_eq!(options, expected, "nothing else comes from the file");
        std::fs::write(&file, "holdre = 'process'").unwrap();
        let error = read(Some(&any), &file).unwrap_err().to_string();
        assert!(error.contains("config.toml"), "{error}");
    }

    #[test]
    fn a_toml_body_is_not_taken_for_a_cgroup() {
        let any = runtime_options(
            "",
            "BinaryName = '/usr/sbin/runc'\nSystemdCgroup = true\nholder = 'process'\n",
        );
        let options = from_any(Some(&any)).unwrap();
        assert_eq!(options.binary_name, Path::new("/usr/sbin/runc"));
        assert_eq!(options.shim_cgroup, None);
        assert_eq!(options.holder, Holder::Process);
    }

    #[test]
    fn the_tables_of_containerds_default_configuration_are_the_defaults() {
        // As `containerd config default` prints the options of runc's handler, which an operator copies.
        let of_2_1 = "BinaryName = ''\nCriuImagePath = ''\nCriuWorkPath = ''\nIoGid = 0\nIoUid = 0\n\
                      NoNewKeyring = false\nRoot = ''\nShimCgroup = ''\nSystemdCgroup = false\n";
        let of_1_7 = format!("{of_2_1}CriuPath = \"\"\nNoPivotRoot = false\n");
        for table in [of_2_1, &of_1_7] {
            let options = from_any(Some(&runtime_options("", table))).unwrap();
            assert_eq!(options, Options::default());
        }
    }

    #[test]
    fn a_file_is_read_when_only_its_path_is_given() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("pause.toml");
        std::fs::write(&file, "holder = \"image\"\nRoot = \"\"\n").unwrap();
        let any = runtime_options(file.to_str().unwrap(), "");
        let options = from_any(Some(&any)).unwrap();
        assert_eq!(options.holder, Holder::Image);
        assert_eq!(options.root, Options::default().root);
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let error = from_any(Some(&runtime_options("/nowhere/pause.toml", ""))).unwrap_err();
        assert!(error.to_string().contains("/nowhere/pause.toml"), "{error}");
    }

    #[test]
    fn an_unknown_option_is_refused_by_name() {
        let error = from_any(Some(&runtime_options("", "Holdre = 'x'"))).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)));
        assert!(error.to_string().contains("Holdre"), "{error}");
    }

    #[test]
    fn an_unknown_holder_is_refused_by_name() {
        let error = from_any(Some(&runtime_options("", "holder = 'pod'"))).unwrap_err();
        assert!(error.to_string().contains("pod"), "{error}");
    }

    #[test]
    fn another_message_is_refused_by_its_type() {
        let error = from_any(Some(&any("x.y/Z", vec![]))).unwrap_err();
        assert!(error.to_string().contains("x.y/Z"), "{error}");
    }

    #[test]
    fn no_options_are_the_defaults() {
        let missing = Path::new("/nowhere/config.toml");
        assert_eq!(read(None, missing).unwrap(), Options::default());
    }
}
