//! `-v` and `-info`: this program's name, version and commit, and the features of its runc.

use std::process::{Command, Stdio};

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::types::introspection::{RuntimeInfo, RuntimeVersion};

use crate::containerd::options;
use crate::error::{Error, IoError, Result};

const NAME: &str = "io.containerd.pause.v2";
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// What the program was built from: `make build` says so, by `packaging/commit`. Not asked in a build script, which would
/// build the crate again for each commit.
const COMMIT: &str = match option_env!("SHIM_COMMIT") {
    Some(commit) => commit,
    None => "unknown",
};

/// The line that `-v` prints: name, version, commit, as `containerd --version` has them.
pub fn version() -> String {
    format!(
        "containerd-shim-pause-v2 {} {COMMIT}\n",
        env!("CARGO_PKG_VERSION")
    )
}

/// The bytes that `-info` prints: a `RuntimeInfo`, for the options in `input` (an `Any`, or nothing). The features are
/// what `runc features` prints, for the runc that the options name; without an answer of runc there are none.
///
/// # Errors
/// `InvalidArgument` when the options cannot be understood.
pub fn runtime_info(input: &[u8]) -> Result<Vec<u8>> {
    let given = if input.is_empty() {
        None
    } else {
        let any = Any::parse_from_bytes(input)
            .map_err(|e| Error::InvalidArgument(format!("-info: decode options: {e}")))?;
        Some(any)
    };
    let options = options::from_any(given.as_ref())?;
    let features = Command::new(&options.binary_name)
        .arg("features")
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()
        .filter(|output| output.status.success())
        .map(|output| Any {
            type_url: FEATURES.to_owned(),
            value: output.stdout,
            ..Any::default()
        });
    let info = RuntimeInfo {
        name: NAME.to_owned(),
        version: Some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            revision: COMMIT.to_owned(),
            ..RuntimeVersion::default()
        })
        .into(),
        options: given.into(),
        features: features.into(),
        ..RuntimeInfo::default()
    };
    Ok(info
        .write_to_bytes()
        .map_err(|e| IoError::at("encode", "-info")(std::io::Error::other(e)))?)
}
