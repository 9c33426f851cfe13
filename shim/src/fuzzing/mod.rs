//! What comes from outside, one function per parser: for the fuzzers in `fuzz/`, and for the test that replays their
//! corpora (`tests/tests/fuzz.rs`). Behind the feature `fuzzing`, so nothing of this is in the binary.
//!
//! Each function takes any bytes. A panic is a finding: of the parser, or of what is asserted here about the result.

mod args;
mod kernel;
mod node;

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Component, Path, PathBuf};

use containerd_shim_protos::protobuf::well_known_types::any::Any;

use crate::cli::start::{Input, Start};
use crate::containerd::{checkpoint, options as wire_options, podconfig};
use crate::error::Error;
use crate::io::uri::{self, Destination};
use crate::kernel::cgroup::{Driver, paths};
use crate::runtime::log;
use crate::runtime::options::Options;
use crate::runtime::shortcuts::RuncState;
use crate::runtime::shortcuts::crun::{CrunConfig, CrunStatus};
use crate::runtime::spec::{Bind, Changes, Spec};

/// A target: any bytes in, nothing out.
pub type Target = fn(&[u8]);

/// All targets by name. The name is that of the fuzzer, and of the folder of its corpus.
pub const TARGETS: [(&str, Target); 14] = [
    ("args", args::args),
    ("cgroup_files", kernel::cgroup_files),
    ("cgroup_paths", kernel::cgroup_paths),
    ("mount_options", kernel::mount_options),
    ("mountinfo", kernel::mountinfo),
    ("node_files", node::node_files),
    ("options", options),
    ("podconfig", podconfig),
    ("runc_log", runc_log),
    ("runc_state", runc_state),
    ("spec", spec),
    ("start_input", start_input),
    ("sysctls", sysctls),
    ("uri", stream_uri),
];

/// Standard input of `start`: `BootstrapParams`, or options.
pub fn start_input(data: &[u8]) {
    let start = Start {
        namespace: "k8s.io".into(),
        id: "pod1".into(),
        address: "/run/containerd/containerd.sock".into(),
        debug: false,
        bundle: "/bundle".into(),
        knows_versions: true,
        input: data.to_vec(),
    };
    match start.parse_input() {
        Ok(input) => {
            if let Input::Params(params) = &input {
                assert_eq!(
                    (&*params.instance_id, &*params.namespace),
                    ("pod1", "k8s.io")
                );
            }
            read_options(input.options());
        }
        Err(error) => assert_refused(&error, "start pod1"),
    }
}

/// Options: the first byte chooses the message, the rest is the message. Then all of it as TOML.
pub fn options(data: &[u8]) {
    const TYPES: [&str; 5] = [
        "containerd.runc.v1.Options",
        "runtimeoptions.v1.Options",
        "containerd.runc.v1.CheckpointOptions",
        "containerd.linux.runc.CheckpointOptions",
        "types.example/containerd.runc.v1.Other",
    ];
    if let Some((first, value)) = data.split_first() {
        let any = Any {
            type_url: TYPES[usize::from(*first) % TYPES.len()].to_owned(),
            value: value.to_vec(),
            ..Any::default()
        };
        read_options(Some(&any));
        if let Err(error) = checkpoint::from_request("/images", Some(&any)) {
            assert_refused(&error, "options of a checkpoint");
        }
    }
    if let Ok(text) = std::str::from_utf8(data) {
        read_toml(text);
    }
}

fn read_options(any: Option<&Any>) {
    // The path of a file with options is the operator's; a fuzzer would have us read any file of the machine.
    if any.is_some_and(wire_options::names_a_file) {
        return;
    }
    match wire_options::from_any(any) {
        Ok(options) => assert_kept(&options),
        Err(error) => assert_refused(&error, "runtime options"),
    }
}

fn read_toml(text: &str) {
    match Options::from_toml(text, "the table") {
        Ok(options) => assert_kept(&options),
        Err(error) => {
            assert_refused(&error, "the table");
            // Text that is TOML, and no table of options: the message names the option.
            let table = text.parse::<toml::Table>();
            if let Some(table) = table.ok().filter(|_| !text.contains('\\')) {
                let text = error.to_string();
                assert!(table.keys().any(|key| text.contains(key)), "{text}");
            }
        }
    }
}

/// What `CreateSandbox` reads from the bundle is what `start` has written.
fn assert_kept(options: &Options) {
    let kept = serde_json::to_vec(options).ok();
    let kept = kept.and_then(|kept| serde_json::from_slice::<Options>(&kept).ok());
    assert_eq!(kept.as_ref(), Some(options));
}

/// `config.json` of a container, and what the shim changes in the file.
pub fn spec(data: &[u8]) {
    let file = Path::new("/bundle/config.json");
    let spec = match Spec::parse(data.to_vec(), file) {
        Ok(spec) => spec,
        Err(error) => return assert_refused(&error, "/bundle/config.json"),
    };
    let _ = (
        spec.role("id"),
        spec.is_from_containerd_2(),
        spec.mount_label(),
    );
    let _ = spec.shares_process_namespace();
    assert_ne!(spec.group(), Some(""));
    if let Some(path) = spec.cgroups_path() {
        let _ = Driver::choose(false, Some(path));
    }
    let sandbox = spec.sandbox(pause::HolderChoice::Auto);
    let _ = pause::check_sysctls(&sandbox.sysctls, &sandbox.namespaces);
    let bind = |destination| Bind {
        destination,
        source: "/pod/file".into(),
    };
    let changes = Changes {
        pid_namespace: spec.has_pid_namespace().then(|| "/proc/7/ns/pid".into()),
        binds: ["/etc/hosts", "/dev/shm"].map(bind).to_vec(),
    };
    let changed = match spec.changed(file, &changes) {
        Ok(changed) => changed.to_string().into_bytes(),
        Err(error) => return assert_refused(&error, "/bundle/config.json"),
    };
    let again = Spec::parse(changed, file);
    assert!(again.is_ok(), "{again:?}");
    let again = again.unwrap_or_default();
    assert_eq!(again.pid_namespace_path(), changes.pid_namespace.as_deref());
    assert_eq!(again.group(), spec.group());
    assert_eq!(again.cgroups_path(), spec.cgroups_path());
    // Only the mount points: a number that fits no u64 is read as a float, whose last digit may change.
    let points = |spec: &Spec| {
        let spec = spec.changed(file, &changes).unwrap_or_default();
        let mounts = spec["mounts"].as_array().cloned().unwrap_or_default();
        let point = |mount: &serde_json::Value| mount["destination"].as_str().map(str::to_owned);
        mounts.iter().map(point).collect::<Vec<_>>()
    };
    assert_eq!(
        points(&again),
        points(&spec),
        "a second change changes nothing"
    );
}

/// CRI's description of a pod, and what follows from the description.
pub fn podconfig(data: &[u8]) {
    let any = Any {
        type_url: "runtime.v1.PodSandboxConfig".to_owned(),
        value: data.to_vec(),
        ..Any::default()
    };
    let config = match podconfig::from_any(Some(&any)) {
        Ok(config) => config,
        Err(error) => return assert_refused(&error, "runtime.v1.PodSandboxConfig"),
    };
    let _ = (config.hostname(), config.node_ipc(), config.resolv_conf());
    for network in ["", "/run/netns/a"] {
        match config.sandbox(Path::new(network), pause::HolderChoice::Auto) {
            Ok(sandbox) => {
                let _ = pause::check_sysctls(&sandbox.sysctls, &sandbox.namespaces);
            }
            Err(error) => assert_refused(&error, "user namespace"),
        }
    }
    if let Some(path) = config.cgroups_path("pod1") {
        assert!(path.ends_with("pod1"), "{path}");
        assert_inside(&path, Driver::of(config.has_slice()));
    }
    let paths = BTreeMap::from([(pause::NamespaceKind::User, PathBuf::from("/proc/7/ns/user"))]);
    let spec = config.spec("pod1", &BTreeMap::new(), &paths, &[]);
    let spec = Spec::parse(spec.to_string().into_bytes(), Path::new("config.json"));
    assert!(spec.is_ok_and(|spec| spec.group() == Some("pod1")));
    assert!(serde_json::to_string(&config).is_ok());
}

/// The log of a run of runc.
pub fn runc_log(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    if let Some(error) = log::last_error(&text) {
        assert_eq!(error, error.trim());
    }
}

/// runc's `state.json`, and crun's `status` and `config.json`.
pub fn runc_state(data: &[u8]) {
    let _ = serde_json::from_slice::<CrunStatus>(data);
    let _ = serde_json::from_slice::<CrunConfig>(data);
    let state = serde_json::from_slice::<RuncState>(data);
    let _ = state.map(RuncState::cgroups_if_plain);
}

/// The name of a stream.
pub fn stream_uri(data: &[u8]) {
    let name = String::from_utf8_lossy(data);
    let input = uri::input(&name);
    let destination = match uri::parse(&name) {
        Ok(destination) => destination,
        Err(error) => return assert_refused(&error, &name),
    };
    let again = match &destination {
        Destination::Null | Destination::Path(_) => {
            assert!(input.is_ok());
            return;
        }
        Destination::File(path) => format!("file://{}", escaped(path.as_os_str())),
        Destination::Program(program) => {
            assert!(program.path.is_absolute() && program.arguments.len() % 2 == 0);
            let scheme = match program.readiness {
                uri::Readiness::Close => "binary",
                uri::Readiness::Byte => "binary-v2",
            };
            let arguments: Vec<_> = program.arguments.iter().map(|word| escaped(word)).collect();
            let pairs: Vec<_> = arguments.chunks(2).map(|pair| pair.join("=")).collect();
            format!(
                "{scheme}://{}?{}",
                escaped(program.path.as_os_str()),
                pairs.join("&")
            )
        }
    };
    assert!(input.is_err());
    assert_eq!(uri::parse(&again).ok(), Some(destination), "{again}");
}

/// Every byte as an escape.
fn escaped(text: &OsStr) -> String {
    text.as_bytes()
        .iter()
        .map(|byte| format!("%{byte:02X}"))
        .collect()
}

/// A sysctl: the first line is the key, the rest is the value.
pub fn sysctls(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (key, value) = text.split_once('\n').unwrap_or((&text, ""));
    let sysctls = BTreeMap::from([(key.to_owned(), value.to_owned())]);
    let namespaces = pause::Namespaces {
        net: pause::Namespace::New,
        ipc: pause::Namespace::New,
        uts: pause::Namespace::New,
        pid: pause::Namespace::New,
        user: pause::UserNamespace::Node,
    };
    if let Err(error) = pause::check_sysctls(&sysctls, &namespaces) {
        assert!(error.to_string().contains(&format!("{key:?}")), "{error}");
        return;
    }
    // sysctl(8): the first separator decides.
    let path = match key.find(['.', '/']) {
        Some(at) if key[at..].starts_with('.') => {
            let swap = |c| match c {
                '.' => '/',
                '/' => '.',
                other => other,
            };
            key.chars().map(swap).collect()
        }
        _ => key.to_owned(),
    };
    let trees = [
        "net/",
        "fs/mqueue/",
        "kernel/shm",
        "kernel/msg",
        "kernel/sem",
    ];
    let inside = trees.iter().any(|tree| path.starts_with(tree)) || path == "kernel/domainname";
    assert!(inside, "{path}");
    assert_relative(Path::new(&path));
    assert!(
        !path.ends_with('/') && !path.contains("//") && !path.contains("/."),
        "{path}"
    );
    assert!(!value.contains(['\n', '\0']), "{value:?}");
}

/// A refusal is told as one, and names what was refused.
fn assert_refused(error: &Error, name: &str) {
    assert!(matches!(error, Error::InvalidArgument(_)), "{error:?}");
    assert!(
        error.to_string().contains(name),
        "{name:?} is not named: {error}"
    );
}

/// A cgroup's path stays below the root of its hierarchy, and is not the root.
fn assert_inside(cgroups_path: &str, driver: Driver) {
    if let Ok(path) = paths::cgroups_path(cgroups_path, driver) {
        assert_relative(&path);
        assert!(!path.as_os_str().is_empty(), "{cgroups_path}");
    }
}

fn assert_relative(path: &Path) {
    let mut parts = path.components();
    assert!(
        parts.all(|part| matches!(part, Component::Normal(_))),
        "{path:?}"
    );
}
