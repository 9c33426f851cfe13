//! The configuration of a test's containerd, and what a test may change in the configuration.

use std::fs;
use std::path::PathBuf;

use crate::image::PauseImage;
use crate::lab::{self, ShimUnderTest, Version};
use crate::slot::{Names, text};
use crate::{leaks, proc};

/// The name of the runtime handler that pods get when they name none.
pub const HANDLER: &str = "under-test";

/// A runtime handler of the CRI plugin.
#[derive(Clone, Debug)]
pub struct Handler {
    /// The handler's name in `RunPodSandbox`.
    pub name: String,
    /// `runtime_type`.
    pub runtime_type: String,
    /// `runtime_path`, if the handler has one.
    pub runtime_path: Option<PathBuf>,
    /// The options table's content, TOML. On 1.6 the content goes into a file that `ConfigPath` names. `$CGROUP_PARENT`
    /// becomes the slot's cgroup parent.
    pub options: String,
    /// Pods are made through the Sandbox API, also under a [`Version`] that does not say so. Not together with options.
    pub sandbox_api: bool,
}

impl Handler {
    /// A handler with the stock shim's `runtime_type` and the `runtime_path` of the shim under test. Not for containerd
    /// 1.6, which reads `runtime_path` and does not use the path.
    pub fn of_the_stock_type(name: &str, version: Version, options: &str) -> Self {
        let shim = ShimUnderTest::get();
        Self {
            name: name.to_owned(),
            runtime_type: ShimUnderTest::Runc.runtime_type().to_owned(),
            runtime_path: (shim == ShimUnderTest::Pause).then(|| shim.binary(version)),
            options: options.to_owned(),
            sandbox_api: false,
        }
    }
}

/// The network that CNI gives a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// An address on the slot's bridge.
    Bridge,
    /// Nothing but loopback, for measurements of everything else.
    Loopback,
}

/// The cgroup driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// runc makes the cgroups.
    Cgroupfs,
    /// systemd makes the cgroups; runc asks systemd.
    Systemd,
}

impl Driver {
    /// The runtime option that chooses the driver.
    fn option(self) -> &'static str {
        match self {
            Self::Cgroupfs => "",
            Self::Systemd => "SystemdCgroup = true",
        }
    }
}

/// What a test may change.
#[derive(Clone, Debug)]
pub struct Options {
    /// The options table of the default handler, TOML lines such as `holder = "process"`.
    pub runtime_options: String,
    /// Handlers beside the default one.
    pub handlers: Vec<Handler>,
    /// The content of the pause image.
    pub pause_image: PauseImage,
    /// Whether nginx is imported, too.
    pub nginx: bool,
    /// More lines for the CRI plugin's own table.
    pub cri: String,
    /// Whether containerd and shim log at the level `debug`.
    pub debug: bool,
    /// The cgroup driver of the pods. [`Self::systemd`] also sets the runtime option.
    pub driver: Driver,
    /// The network of the pods.
    pub network: Network,
    /// More environment variables for containerd.
    pub environment: Vec<(String, String)>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            runtime_options: String::new(),
            handlers: Vec::new(),
            pause_image: match ShimUnderTest::get() {
                ShimUnderTest::Pause => PauseImage::Hollow,
                ShimUnderTest::Runc => PauseImage::Works,
            },
            nginx: false,
            cri: String::new(),
            debug: true,
            driver: Driver::Cgroupfs,
            network: Network::Bridge,
            environment: Vec::new(),
        }
    }
}

impl Options {
    /// The usual options, with nginx.
    pub fn nginx() -> Self {
        Self {
            nginx: true,
            ..Self::default()
        }
    }

    /// The usual options, with systemd's cgroup driver, as for kubelet's `cgroupDriver: systemd`.
    pub fn systemd() -> Self {
        Self {
            driver: Driver::Systemd,
            ..Self::runtime(Driver::Systemd.option())
        }
    }

    /// The usual options, with these runtime options.
    pub fn runtime(options: &str) -> Self {
        Self {
            runtime_options: options.to_owned(),
            ..Self::default()
        }
    }
}

/// The pods' network: a bridge of the slot.
pub(super) fn cni_config(names: &Names, network: Network) -> String {
    if network == Network::Loopback {
        // The plugin makes nothing, and answers with the address that containerd asks for.
        let address = format!("{}.2/24", names.subnet());
        return serde_json::json!({
            "cniVersion": "0.4.0",
            "name": names.name(),
            "plugins": [{
                "type": "static",
                "ipam": { "type": "static", "addresses": [{ "address": address }] },
            }],
        })
        .to_string();
    }
    serde_json::json!({
        "cniVersion": "0.4.0",
        "name": names.name(),
        "plugins": [{
            "type": "bridge",
            "bridge": names.bridge(),
            "isGateway": true,
            "ipMasq": false,
            "ipam": {
                "type": "host-local",
                "dataDir": text(&names.directory().join("ipam")),
                "ranges": [[{ "subnet": format!("{}.0/24", names.subnet()) }]],
                "routes": [{ "dst": "0.0.0.0/0" }],
            },
        }],
    })
    .to_string()
}

/// What differs between the configurations of containerd 1.x and 2.x.
struct Dialect {
    /// The version of the file's format.
    file_version: &'static str,
    /// The name of the CRI plugin.
    cri: &'static str,
    /// The line with the pause image in the CRI plugin's own table.
    sandbox_image: String,
    /// The tables of other plugins.
    other_plugins: String,
    /// The line with the folder of the CNI plugins.
    cni_plugins: String,
}

impl Dialect {
    fn of(version: Version) -> Self {
        let plugins = text(&lab::cni_plugins());
        let pause_image = version.pause_image().unwrap_or("there-is.none/pause:0");
        if version < Version::V2_0 {
            Self {
                file_version: "2",
                cri: "io.containerd.grpc.v1.cri",
                sandbox_image: format!("sandbox_image = '{pause_image}'\n"),
                other_plugins: String::new(),
                cni_plugins: format!("bin_dir = '{plugins}'"),
            }
        } else {
            Self {
                file_version: "3",
                cri: "io.containerd.cri.v1.runtime",
                sandbox_image: String::new(),
                other_plugins: format!(
                    "[plugins.'io.containerd.cri.v1.images'.pinned_images]\nsandbox = '{pause_image}'\n\
                     [plugins.'io.containerd.nri.v1.nri']\ndisable = true\n",
                ),
                cni_plugins: format!("bin_dirs = ['{plugins}']"),
            }
        }
    }
}

/// All handlers: the default one, those of the test, and the stock shim's.
fn handlers(options: &Options) -> Vec<Handler> {
    let mut handlers = vec![Handler {
        name: HANDLER.to_owned(),
        runtime_type: ShimUnderTest::get().runtime_type().to_owned(),
        runtime_path: None,
        options: options.runtime_options.clone(),
        sandbox_api: false,
    }];
    handlers.extend(options.handlers.iter().cloned());
    if !handlers.iter().any(|handler| handler.name == "runc") {
        // containerd 1.6 and 1.7 need a handler of this name as soon as there is a table of handlers.
        handlers.push(Handler {
            name: "runc".to_owned(),
            runtime_type: "io.containerd.runc.v2".to_owned(),
            runtime_path: None,
            options: String::new(),
            sandbox_api: false,
        });
    }
    handlers
}

/// The table of one handler. `cri` is the name of the CRI plugin.
fn handler_table(version: Version, cri: &str, names: &Names, handler: &Handler) -> String {
    let section = format!("plugins.'{cri}'.containerd.runtimes.{}", handler.name);
    let mut table = format!("[{section}]\nruntime_type = '{}'\n", handler.runtime_type);
    let all_pods = version.sandbox_api() && handler.name != "runc";
    if all_pods || handler.sandbox_api {
        table += "sandboxer = 'shim'\n";
        if version >= Version::V2_4 {
            table += "disable_pause_image_pull = true\n";
        }
    }
    if let Some(path) = &handler.runtime_path {
        table += &format!("runtime_path = '{}'\n", text(path));
    }
    if !handler.options.is_empty() {
        let options = handler_options(version, names, handler);
        table += &format!("[{section}.options]\n{options}\n");
    }
    table
}

/// The options of a handler, or the name of a file with the options: containerd 1.6 passes on nothing else.
fn handler_options(version: Version, names: &Names, handler: &Handler) -> String {
    let lines = handler
        .options
        .replace("$CGROUP_PARENT", &names.cgroup_parent());
    if version != Version::V1_6 || handler.runtime_type == "io.containerd.runc.v2" {
        return lines;
    }
    let path = names.directory().join(format!("{}.toml", handler.name));
    fs::write(&path, lines).unwrap();
    format!("ConfigPath = '{}'", text(&path))
}

/// The configuration of containerd.
pub(super) fn config(version: Version, names: &Names, options: &Options) -> String {
    let directory = text(&names.directory());
    let Dialect {
        file_version,
        cri,
        sandbox_image,
        other_plugins,
        cni_plugins,
    } = Dialect::of(version);
    let handlers: String = handlers(options)
        .iter()
        .map(|handler| handler_table(version, cri, names, handler))
        .collect();
    let level = if options.debug { "debug" } else { "info" };
    format!(
        "version = {file_version}
root = '{directory}/root'
state = '{directory}/state'
[debug]
level = '{level}'
address = '{directory}/debug.sock'
[grpc]
address = '{address}'
[plugins.'io.containerd.internal.v1.opt']
path = '{directory}/opt'
{other_plugins}
[plugins.'{cri}']
restrict_oom_score_adj = {restricted}
netns_mounts_under_state_dir = true
{sandbox_image}{more}
[plugins.'{cri}'.cni]
{cni_plugins}
conf_dir = '{directory}/net.d'
[plugins.'{cri}'.containerd]
default_runtime_name = '{HANDLER}'
{handlers}
",
        address = leaks::grpc_address(names),
        // Without this, a machine whose root may not lower an oom_score_adj cannot start a CRI pod.
        restricted = !proc::may_lower_oom_scores(),
        more = options.cri,
    )
}
