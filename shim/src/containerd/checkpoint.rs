//! The options of a checkpoint, in the two messages that containerd sends.

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::shim::oci::CheckpointOptions;

use crate::containerd::convert::type_name;
use crate::error::{Error, Result};
use crate::runtime::criu::{self, Checkpoint};

/// Reads a request for a checkpoint into the folder `path`.
///
/// # Errors
/// `InvalidArgument` without a path, and for options of another type or that do not decode.
pub fn from_request(path: &str, options: Option<&Any>) -> Result<Checkpoint> {
    if path.is_empty() {
        return Err(Error::InvalidArgument(
            "checkpoint: the request names no folder for the images".into(),
        ));
    }
    let options = options.filter(|any| !any.type_url.is_empty());
    let options = options.map(decode).transpose()?.unwrap_or_default();
    Ok(Checkpoint {
        image: path.into(),
        options: criu::Options {
            exit: options.exit,
            open_tcp: options.open_tcp,
            external_unix_sockets: options.external_unix_sockets,
            terminal: options.terminal,
            file_locks: options.file_locks,
            empty_namespaces: options.empty_namespaces,
            cgroups_mode: options.cgroups_mode,
            work: options.work_path.into(),
        },
    })
}

fn decode(any: &Any) -> Result<CheckpointOptions> {
    let wrong = |why: String| {
        Error::InvalidArgument(format!("options of a checkpoint: {}: {why}", any.type_url))
    };
    let decoded = CheckpointOptions::parse_from_bytes(&any.value).map_err(|e| wrong(e.to_string()));
    match type_name(any) {
        "containerd.runc.v1.CheckpointOptions" => decoded,
        // containerd 1.6 and 1.7 send the old message to a runtime that is not named as runc's. The old message has the
        // same fields; two have swapped their numbers.
        "containerd.linux.runc.CheckpointOptions" => decoded.map(|mut options| {
            std::mem::swap(&mut options.work_path, &mut options.image_path);
            options
        }),
        _ => Err(wrong("is not containerd.runc.v1.CheckpointOptions".into())),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::path::Path;

    use super::*;
    use crate::containerd::convert::any;

    fn options() -> CheckpointOptions {
        CheckpointOptions {
            exit: true,
            open_tcp: true,
            file_locks: true,
            empty_namespaces: vec!["network".into()],
            cgroups_mode: "full".into(),
            work_path: "/w".into(),
            ..CheckpointOptions::default()
        }
    }

    #[test]
    fn options_become_flags() {
        let plain = from_request("/i", None).unwrap();
        assert_eq!(plain.flags(), ["--image-path", "/i", "--leave-running"]);
        assert_eq!(plain.work(), None);
        let wanted = any("containerd.runc.v1.CheckpointOptions", &options());
        let wanted = from_request("/i", Some(&wanted)).unwrap();
        let flags = "--image-path /i --tcp-established --file-locks --empty-ns network --manage-cgroups-mode full";
        assert_eq!(wanted.flags(), flags.split(' ').collect::<Vec<_>>());
        assert_eq!(wanted.work(), Some(Path::new("/w")));
    }

    #[test]
    fn the_old_message_has_two_fields_the_other_way_round() {
        let old = any("containerd.linux.runc.CheckpointOptions", &options());
        assert_eq!(from_request("/i", Some(&old)).unwrap().work(), None);
    }

    #[test]
    fn other_options_are_refused() {
        let other = any("containerd.runc.v1.Options", &options());
        for (path, any) in [("", None), ("/i", Some(&other))] {
            let error = from_request(path, any).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
        }
    }
}
