//! `start`: makes or finds the pod's server, and tells containerd the server's address.
//!
//! ```text
//!  containerd ──exec──▶ start ──┬─ nobody answers at the socket: listen, execute the server with the socket as stdin
//!      ▲   stdin: options       └─ the pod's server answers: nothing to make
//!      └────stdout: the address, in the form that this containerd reads
//! ```
//!
//! | containerd | standard input | answer |
//! |---|---|---|
//! | 1.6 | options in an `Any`, or nothing | the bare address |
//! | 1.7 | the same | JSON, version 2 (3 is refused) |
//! | 2.0 to 2.2 | the same | JSON, version 3 for a pod: the pod's containers then need no `start` |
//! | from 2.3 | `BootstrapParams` | `BootstrapResult`, version 3 |
//!
//! containerd reads stdout and stderr as one, so `start` writes nothing but the answer to either.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;

use super::{launch, socket};
use crate::containerd::options;
use crate::error::{Error, Result};
use crate::runtime::bundle;
use crate::runtime::spec::Spec;

/// What `start` reads: the command line, the environment, standard input.
#[derive(Debug)]
pub struct Start {
    /// `-namespace`: containerd's namespace.
    pub namespace: String,
    /// `-id`: the container, or the sandbox.
    pub id: String,
    /// `-address`: containerd's gRPC socket.
    pub address: String,
    /// `-debug`: the server logs debug messages, too.
    pub debug: bool,
    /// The directory that containerd makes for the container.
    pub bundle: PathBuf,
    /// `MAX_SHIM_VERSION` is set: containerd 1.7 or later.
    pub knows_versions: bool,
    /// Standard input, to its end.
    pub input: Vec<u8>,
}

/// Standard input, decoded.
#[derive(Debug)]
pub(crate) enum Input {
    Options(Option<Any>),
    Params(Box<BootstrapParams>),
}

/// Starts or finds the server, and returns the bytes for containerd.
///
/// # Errors
/// `InvalidArgument` for input, a spec or options that cannot be understood; `Io` for what the kernel refuses. A failed
/// start leaves neither a server nor a socket behind.
pub fn start(start: &Start) -> Result<Vec<u8>> {
    let input = start.parse_input()?;
    let options = options::from_any(input.options())?;
    let purpose = start.purpose()?;
    let group = match &purpose {
        Purpose::Task(spec) => spec.group().unwrap_or(&start.id),
        Purpose::Sandbox => {
            options.keep(&start.bundle)?;
            &start.id
        }
    };
    let socket = socket::path(input.socket_dir(), &start.address, &start.namespace, group)?;
    // `delete` reads there which socket to remove: this process may be killed as soon as the socket is there.
    let address = bundle::save_address(&start.bundle, &socket)?;
    if let Some(listener) = socket::listen(&socket)? {
        launch::launch(start, group, &socket, listener, &options)
            .inspect_err(|_| socket::remove_quietly(&socket))?;
    }
    Ok(start.answer(&input, &purpose, address))
}

/// Why containerd wants the server.
#[derive(Debug)]
enum Purpose {
    /// A container, or a sandbox in podsandbox mode: the bundle has a spec.
    Task(Box<Spec>),
    /// A sandbox through the Sandbox API: `CreateSandbox` describes the sandbox later.
    Sandbox,
}

impl Input {
    pub(crate) fn options(&self) -> Option<&Any> {
        match self {
            Self::Options(any) => any.as_ref(),
            Self::Params(params) => params
                .extensions
                .iter()
                .filter_map(|extension| extension.value.as_ref())
                .find(|any| any.type_url.ends_with(".Options")),
        }
    }

    fn socket_dir(&self) -> &Path {
        match self {
            Self::Params(params) if !params.socket_dir().is_empty() => {
                Path::new(params.socket_dir())
            }
            Self::Params(_) | Self::Options(_) => Path::new(socket::DIRECTORY),
        }
    }
}

impl Start {
    /// The content tells the two messages apart: `BootstrapParams` repeats the id and the namespace of the command line;
    /// an `Any` has a type URL in the id's place.
    ///
    /// # Errors
    /// `InvalidArgument` for bytes that are neither.
    pub(crate) fn parse_input(&self) -> Result<Input> {
        if self.input.is_empty() {
            return Ok(Input::Options(None));
        }
        if let Ok(params) = BootstrapParams::parse_from_bytes(&self.input)
            && params.instance_id == self.id
            && params.namespace == self.namespace
        {
            return Ok(Input::Params(Box::new(params)));
        }
        match Any::parse_from_bytes(&self.input) {
            Ok(any) => Ok(Input::Options(Some(any))),
            Err(error) => Err(Error::InvalidArgument(format!(
                "start {}: standard input is neither options nor BootstrapParams: {error}",
                self.id
            ))),
        }
    }

    /// A bundle without a spec is a bundle for the Sandbox API, which came after versions: from an older containerd the
    /// missing spec is an error.
    fn purpose(&self) -> Result<Purpose> {
        match Spec::load(&self.bundle) {
            Ok(spec) => Ok(Purpose::Task(Box::new(spec))),
            Err(Error::Io(error))
                if error.source.kind() == ErrorKind::NotFound && self.knows_versions =>
            {
                Ok(Purpose::Sandbox)
            }
            Err(error) => Err(error),
        }
    }

    fn answer(&self, input: &Input, purpose: &Purpose, address: String) -> Vec<u8> {
        let protocol = "ttrpc".to_owned();
        if let Input::Params(_) = input {
            let result = BootstrapResult {
                version: 3,
                address,
                protocol,
                ..BootstrapResult::default()
            };
            return result.write_to_bytes().unwrap_or_default();
        }
        if !self.knows_versions {
            return address.into_bytes();
        }
        let version = match purpose {
            Purpose::Task(spec) if !spec.is_from_containerd_2() => 2,
            Purpose::Task(_) | Purpose::Sandbox => 3,
        };
        serde_json::json!({ "version": version, "address": address, "protocol": protocol })
            .to_string()
            .into_bytes()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn a_start(input: Vec<u8>) -> Start {
        Start {
            namespace: "k8s.io".into(),
            id: "pod1".into(),
            address: "/run/containerd/containerd.sock".into(),
            debug: false,
            bundle: "/bundle".into(),
            knows_versions: true,
            input,
        }
    }

    fn params() -> Vec<u8> {
        let mut params = BootstrapParams::new();
        params.instance_id = "pod1".into();
        params.namespace = "k8s.io".into();
        params.set_socket_dir("/run/s".into());
        params.write_to_bytes().unwrap()
    }

    #[test]
    fn bootstrap_params_are_told_from_options_by_their_content() {
        assert!(matches!(
            a_start(params()).parse_input().unwrap(),
            Input::Params(_)
        ));
        let mut any = Any::new();
        any.type_url = "containerd.runc.v1.Options".into();
        let any = a_start(any.write_to_bytes().unwrap());
        assert!(matches!(
            any.parse_input().unwrap(),
            Input::Options(Some(_))
        ));
        assert!(matches!(
            a_start(vec![]).parse_input().unwrap(),
            Input::Options(None)
        ));
    }

    #[test]
    fn garbage_on_standard_input_is_refused() {
        let error = a_start(vec![0xff; 40]).parse_input().unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
    }

    #[test]
    fn each_containerd_gets_the_answer_it_reads() {
        let task = |spec: &str| Purpose::Task(serde_json::from_str(spec).unwrap());
        let old = task("{}");
        let new = task(r#"{"annotations": {"io.kubernetes.cri.podsandbox.image-name": "p"}}"#);
        let answer = |start: &Start, purpose: &Purpose| {
            start.answer(&start.parse_input().unwrap(), purpose, "unix:///s".into())
        };
        let mut start = a_start(vec![]);
        let text = |bytes| String::from_utf8(bytes).unwrap();
        assert_eq!(
            text(answer(&start, &old)),
            r#"{"address":"unix:///s","protocol":"ttrpc","version":2}"#
        );
        for purpose in [&new, &Purpose::Sandbox] {
            assert_eq!(
                text(answer(&start, purpose)),
                r#"{"address":"unix:///s","protocol":"ttrpc","version":3}"#
            );
        }
        start.knows_versions = false;
        assert_eq!(text(answer(&start, &old)), "unix:///s");
        start.input = params();
        let result = BootstrapResult::parse_from_bytes(&answer(&start, &old)).unwrap();
        assert_eq!(
            (
                result.version,
                result.address.as_str(),
                result.protocol.as_str()
            ),
            (3, "unix:///s", "ttrpc")
        );
    }
}
