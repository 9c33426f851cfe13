//! `start`: makes the pod's server, or finds the one that there is, and tells containerd where it listens.
//!
//! ```text
//!  containerd ──exec──▶ start ──┬─ nobody answers at the socket: listen, execute the server with the socket as stdin
//!      ▲   stdin: options       └─ somebody does (the pod's server): nothing to make
//!      └────stdout: the address, in the form that this containerd reads
//! ```
//!
//! | containerd | standard input | answer |
//! |---|---|---|
//! | 1.6 | options in an `Any`, or nothing | the bare address |
//! | 1.7 | the same | JSON, version 2 (3 is refused) |
//! | 2.0 to 2.2 | the same | JSON, version 3 for a pod: its containers then need no `start` |
//! | from 2.3 | `BootstrapParams` | `BootstrapResult`, version 3 |
//!
//! containerd reads stdout and stderr as one, so nothing else is written to either.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{ErrorKind, IsTerminal, Read};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use containerd_shim_protos::bootstrap_api::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::io::Errno;
use rustix::thread::{CoreSchedulingScope, create_core_scheduling_cookie};
use sha2::{Digest, Sha256};

use crate::containerd::options;
use crate::error::{Error, IoError, Result};
use crate::kernel::cgroup::{Cgroup, Driver};
use crate::runtime::options::Options;
use crate::runtime::spec::Spec;

/// Where shims listen, unless containerd says otherwise.
const SOCKETS: &str = "/run/containerd/s";
/// `sockaddr_un.sun_path` with its closing NUL (unix(7)).
const SOCKET_PATH_MAX: usize = 107;

/// What `start` is told: on the command line, in the environment, on standard input.
#[derive(Debug)]
pub struct Start {
    /// `-namespace`
    pub namespace: String,
    /// `-id`
    pub id: String,
    /// `-address`: containerd's gRPC socket.
    pub address: String,
    /// `-debug`
    pub debug: bool,
    /// The working directory.
    pub bundle: PathBuf,
    /// `MAX_SHIM_VERSION` is set: containerd 1.7 or later.
    pub knows_versions: bool,
    /// Standard input, to its end.
    pub input: Vec<u8>,
}

/// What stood on standard input.
#[derive(Debug)]
enum Input {
    Options(Option<Any>),
    Params(Box<BootstrapParams>),
}

/// Starts or finds the server, and returns the bytes for containerd.
///
/// # Errors
/// `InvalidArgument` for input, a spec or options that cannot be understood, `Io` for everything that the kernel refuses.
/// No server and no socket are left behind.
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
    let socket = start.socket(input.socket_dir(), group)?;
    let listener = listen(&socket)?;
    let address = format!("unix://{}", socket.display());
    let new = listener.is_some();
    // containerd 1.6 and 1.7 read it when they come back.
    let file = start.bundle.join("address");
    std::fs::write(&file, &address)
        .map_err(|error| IoError::at("write", &file)(error).into())
        .and_then(|()| {
            listener.map_or(Ok(()), |listener| start.launch(&socket, listener, &options))
        })
        .inspect_err(|_| {
            if new {
                remove_quietly(&socket);
            }
        })?;
    Ok(start.answer(&input, &purpose, address))
}

/// What the server is wanted for.
#[derive(Debug)]
enum Purpose {
    /// A container, or a sandbox in podsandbox mode: there is a spec.
    Task(Box<Spec>),
    /// A sandbox through the Sandbox API: it is described later, by `CreateSandbox`.
    Sandbox,
}

impl Input {
    fn options(&self) -> Option<&Any> {
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
            Self::Params(_) | Self::Options(_) => Path::new(SOCKETS),
        }
    }
}

impl Start {
    /// The two messages are told apart by their content: `BootstrapParams` repeats what the command line says, and an
    /// `Any` has a type URL there.
    fn parse_input(&self) -> Result<Input> {
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

    /// A bundle without a spec is one for the Sandbox API; a containerd that knows no versions knows no such thing.
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

    fn socket(&self, dir: &Path, group: &str) -> Result<PathBuf> {
        let name = Sha256::digest(format!("{}/{}/{group}", self.address, self.namespace));
        let socket = dir.join(format!("{name:x}"));
        if socket.as_os_str().len() > SOCKET_PATH_MAX {
            return Err(Error::InvalidArgument(format!(
                "socket path {} is longer than {SOCKET_PATH_MAX} bytes: choose a shorter socket directory",
                socket.display()
            )));
        }
        Ok(socket)
    }

    fn launch(&self, socket: &Path, listener: UnixListener, options: &Options) -> Result<()> {
        isolate_cores()?;
        let server = self.spawn(socket, listener)?;
        let placed = self.place(&server, options);
        if placed.is_err() {
            end(server);
        }
        placed
    }

    fn spawn(&self, socket: &Path, listener: UnixListener) -> Result<Child> {
        let program = program();
        let mut command = Command::new(&program);
        command
            .arg0("containerd-shim-pause-v2")
            .args(["-namespace", &self.namespace])
            .args(["-id", &self.id])
            .args(["-address", &self.address])
            .arg("-socket")
            .arg(socket)
            .stdin(OwnedFd::from(listener))
            .stdout(Stdio::null())
            .stderr(self.log())
            .current_dir(&self.bundle)
            // Signals to containerd's process group are not for it.
            .process_group(0);
        if self.debug {
            command.arg("-debug");
        }
        Ok(command
            .spawn()
            .map_err(IoError::at("execute the server from", &program))?)
    }

    /// The bundle's log FIFO, open for both so that the shim outlives its reader, and never waited for.
    fn log(&self) -> Stdio {
        let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
        OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(nonblocking)
            .open(self.bundle.join("log"))
            .map_or_else(|_| Stdio::null(), Stdio::from)
    }

    /// Gives the server its place on the node, and notes its pid for `delete`.
    fn place(&self, server: &Child, options: &Options) -> Result<()> {
        let pid = server.id();
        let file = self.bundle.join("shim.pid");
        std::fs::write(&file, pid.to_string()).map_err(IoError::at("write", &file))?;
        if let Some(path) = &options.shim_cgroup {
            let cgroup = Cgroup::at(&path.to_string_lossy(), Driver::Cgroupfs)?;
            cgroup.create()?;
            cgroup.add(rustix::process::Pid::from_child(server))?;
        }
        if let Err(error) = adjust_oom_score(pid) {
            // The server stays as killable as containerd: no reason to refuse a pod.
            log::warn!("{error}");
        }
        Ok(())
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

/// This program, by its name where that still leads to it: the name is what `ps` shows. After an upgrade it may not.
fn program() -> PathBuf {
    std::env::current_exe()
        .ok()
        .filter(|path| path.exists())
        .unwrap_or_else(|| "/proc/self/exe".into())
}

/// Listens at `socket`; none when a server already does. A lock on the directory keeps two starts of one pod apart.
fn listen(socket: &Path) -> Result<Option<UnixListener>> {
    let dir = socket.parent().unwrap_or(Path::new("/"));
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(IoError::at("create", dir))?;
    // Held for as long as it takes to connect and to listen; the kernel releases it with the file.
    let lock = File::open(dir).map_err(IoError::at("open", dir))?;
    flock(&lock, FlockOperation::LockExclusive).map_err(IoError::at("lock", dir))?;
    match UnixStream::connect(socket) {
        Ok(_) => return Ok(None),
        Err(error) if error.kind() == ErrorKind::NotFound => {}
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
            // A server that was killed.
            std::fs::remove_file(socket).map_err(IoError::at("remove stale socket", socket))?;
        }
        Err(error) => return Err(IoError::at("connect to", socket)(error).into()),
    }
    let listener = UnixListener::bind(socket).map_err(IoError::at("listen on", socket))?;
    if let Err(error) = std::fs::set_permissions(socket, Permissions::from_mode(0o600)) {
        remove_quietly(socket);
        return Err(IoError::at("set the mode of", socket)(error).into());
    }
    Ok(Some(listener))
}

fn remove_quietly(socket: &Path) {
    // On the way out with another error, which says more.
    let _ = std::fs::remove_file(socket);
}

fn end(mut server: Child) {
    // It may have ended by itself.
    let _ = server.kill();
    let _ = server.wait();
}

/// With `SCHED_CORE` in containerd's environment the server, and so the whole pod, gets a core-scheduling domain: the
/// hardware threads of a core never run it together with somebody else (Documentation/admin-guide/hw-vuln/
/// core-scheduling.rst). Children inherit it.
fn isolate_cores() -> Result<()> {
    if std::env::var_os("SCHED_CORE").is_none_or(|value| value.is_empty()) {
        return Ok(());
    }
    let this = rustix::process::getpid();
    match create_core_scheduling_cookie(this, CoreSchedulingScope::ThreadGroup) {
        Ok(()) => Ok(()),
        Err(Errno::NODEV) => {
            log::info!("SCHED_CORE: no core of this node has two hardware threads, nothing to isolate");
            Ok(())
        }
        // Somebody counts on the isolation: a pod without it must not run.
        Err(error) => Err(IoError::at(
            "make a core-scheduling domain, as SCHED_CORE in containerd's environment asks for (a kernel with \
             CONFIG_SCHED_CORE has it; without the variable there is none), in",
            "/proc/self",
        )(error)
        .into()),
    }
}

/// One more than containerd's: when memory runs out, a shim goes before containerd does.
fn adjust_oom_score(pid: u32) -> Result<()> {
    let parent = rustix::process::getppid().map_or_else(|| "self".into(), |pid| pid.to_string());
    let of_parent = format!("/proc/{parent}/oom_score_adj");
    let score: i32 = std::fs::read_to_string(&of_parent)
        .map_err(IoError::at("read", &of_parent))?
        .trim()
        .parse()
        .map_err(|_| Error::Internal("oom_score_adj is no number"))?;
    let of_server = format!("/proc/{pid}/oom_score_adj");
    let score = score.saturating_add(1).min(1000);
    Ok(std::fs::write(&of_server, score.to_string()).map_err(IoError::at("write", &of_server))?)
}

/// Reads standard input to its end. A person at a terminal has nothing to say.
pub fn read_input() -> Result<Vec<u8>> {
    let mut input = Vec::new();
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        return Ok(input);
    }
    stdin
        .lock()
        .read_to_end(&mut input)
        .map_err(IoError::at("read", "standard input"))?;
    Ok(input)
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

    #[test]
    fn the_socket_has_the_name_that_containerd_computes() {
        let socket = a_start(vec![]).socket(Path::new(SOCKETS), "pod1").unwrap();
        // printf %s /run/containerd/containerd.sock/k8s.io/pod1 | sha256sum
        let name = format!(
            "{:x}",
            Sha256::digest("/run/containerd/containerd.sock/k8s.io/pod1")
        );
        assert_eq!(socket, Path::new(SOCKETS).join(name));
        assert!(
            a_start(vec![])
                .socket(Path::new(&"/x".repeat(40)), "p")
                .is_err()
        );
    }

    #[test]
    fn a_second_start_of_a_pod_finds_the_first_ones_server() {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("s");
        let first = listen(&socket).unwrap();
        assert!(first.is_some());
        assert!(listen(&socket).unwrap().is_none());
        drop(first);
        assert!(
            listen(&socket).unwrap().is_some(),
            "a stale socket is replaced"
        );
    }
}
