//! The demo's containerd: a containerd of the harness, with a configuration file of `config/`.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use shim_tests::image::PauseImage;
use shim_tests::slot::text;
use shim_tests::{Daemon, Options, Version, lab, leaks, screen};

/// The handler of our shim in `config/`.
pub(crate) const OURS: &str = "pause";
/// The handler of the stock shim there.
pub(crate) const STOCK: &str = "runc";

/// The handler of our shim whose pods are made through the Sandbox API.
pub(crate) const PAUSELESS: &str = "pauseless";

/// Whether the demo's containerd has the handler [`PAUSELESS`]. The options of this handler can only be in the
/// machine's own file. A machine with such a file may have other options than the demo's.
pub(crate) fn has_pauseless(version: Version) -> bool {
    version >= Version::V2_0 && !lab::has_options_of_the_machine()
}

/// The newest containerd of the lab.
pub(crate) fn newest() -> Version {
    [Version::V2_1, Version::V1_7, Version::V1_6]
        .into_iter()
        .find(|version| version.binaries().join("version").is_file())
        .unwrap_or(Version::V2_1)
}

/// Starts the containerd, and prints what it is.
pub(crate) fn start(version: Version) -> Daemon {
    let options = Options {
        nginx: true,
        pause_image: PauseImage::Works,
        ..Options::default()
    };
    let daemon = Daemon::with(version, &options);
    daemon.kill();
    let directory = daemon.directory();
    // An installed shim of another version must not be taken in place of this containerd's own.
    let stock = "containerd-shim-runc-v2";
    symlink(
        version.binaries().join(stock),
        directory.join("bin").join(stock),
    )
    .unwrap();
    let source = if version < Version::V2_0 {
        "config/containerd-1.toml"
    } else {
        "config/containerd-2.toml"
    };
    let read = |name: &str| fs::read_to_string(lab::repository().join(name)).unwrap();
    let options =
        read("config/pause.toml").replace("SystemdCgroup = true", "SystemdCgroup = false");
    fs::write(directory.join("pause.toml"), options).unwrap();
    let config = adapted(&read(source), version, &daemon);
    fs::write(directory.join("config.toml"), config).unwrap();
    daemon.start_again();
    introduce(&daemon, source);
    daemon
}

fn introduce(daemon: &Daemon, source: &str) {
    let version = daemon.version();
    let exact = version.exact();
    screen::item("shim", &our_shim(&daemon.directory()));
    screen::item(
        "containerd",
        &format!(
            "{}, started for the demo alone, with all its files below {}",
            exact,
            daemon.directory().display()
        ),
    );
    screen::item(
        "configured",
        &format!(
            "by {source} and config/pause.toml, with other folders and addresses, SystemdCgroup = false (the demo's \
             cgroups are plain ones) and restrict_oom_score_adj = true (so that it also runs where root may not \
             lower oom_score_adj)"
        ),
    );
    screen::item(
        "images",
        "nginx and busybox, made here from Debian's packages; nothing is pulled",
    );
}

fn our_shim(directory: &Path) -> String {
    let binary = fs::canonicalize(directory.join("bin/containerd-shim-pause-v2")).unwrap();
    let megabytes = fs::metadata(&binary).map_or(0, |file| file.len()) / 100_000;
    let size = format!("{}.{} MB", megabytes / 10, megabytes % 10);
    let shown = binary
        .strip_prefix(lab::repository())
        .unwrap_or(&binary)
        .display();
    if is_debug_build(directory) {
        format!("{shown}, {size}: a DEBUG build, its time and memory say little")
    } else {
        format!("{shown}, {size}")
    }
}

/// Whether the shim is a debug build, judged by the folder's name.
pub(crate) fn is_debug_build(directory: &Path) -> bool {
    fs::canonicalize(directory.join("bin/containerd-shim-pause-v2"))
        .is_ok_and(|binary| binary.iter().any(|part| part == "debug"))
}

/// The file of `config/` on the daemon's own folders.
fn adapted(file: &str, version: Version, daemon: &Daemon) -> String {
    let directory = text(&daemon.directory());
    let plugins = text(&lab::cni_plugins());
    let mut config = String::new();
    for line in file.lines() {
        let key = line.split('=').next().unwrap_or_default().trim();
        match key {
            "version" => {
                config +=
                    &format!("{line}\nroot = '{directory}/root'\nstate = '{directory}/state'");
            }
            // The node's drop-ins are not ours.
            "imports" => {}
            "bin_dir" => config += &format!("bin_dir = '{plugins}'"),
            "conf_dir" => config += &format!("conf_dir = '{directory}/net.d'"),
            "SystemdCgroup" => config += "SystemdCgroup = false",
            _ => config += line,
        }
        config += "\n";
    }
    let cri = if version < Version::V2_0 {
        "io.containerd.grpc.v1.cri"
    } else {
        "io.containerd.cri.v1.runtime"
    };
    config += &format!(
        "
[debug]
address = '{directory}/debug.sock'
[grpc]
address = '{address}'
[plugins.'io.containerd.internal.v1.opt']
path = '{directory}/opt'
[plugins.'{cri}']
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
[plugins.'{cri}'.containerd.runtimes.{OURS}.options]
ConfigPath = '{directory}/pause.toml'
",
        address = leaks::grpc_address(&daemon.names),
    );
    if version >= Version::V2_0 {
        config += &format!(
            "[plugins.'io.containerd.nri.v1.nri']\ndisable = true\n\
             [plugins.'{cri}'.cni]\nbin_dirs = ['{plugins}']\nconf_dir = '{directory}/net.d'\n"
        );
    }
    if has_pauseless(version) {
        config +=
            &fs::read_to_string(lab::repository().join("config/containerd-2-sandbox-api.toml"))
                .unwrap()
                .replace("version = 3", "");
    }
    config
}
