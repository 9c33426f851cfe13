//! Images without a registry: docker-archives written here, from what `tests/lab/prepare` unpacked.
//!
//! The same input gives the same bytes. An archive is kept in `target/lab/images/` under a name with a digest of its
//! configuration and of its sources' sizes and times, so a changed source makes a new one.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::json;
use sha2::{Digest, Sha256};

use crate::{lab, oci};

/// Part of an archive's name. To be raised when the layers below change; otherwise an old archive would be used.
const FORMAT: u32 = 1;

/// busybox (static) with the usual applets; no entrypoint, command `sh`.
pub const BUSYBOX: &str = "shim-tests.local/busybox:latest";
/// Debian's nginx on port 80 with the usual welcome page.
pub const NGINX: &str = "shim-tests.local/nginx:latest";

/// The content of the pause image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PauseImage {
    /// Nothing that could run. A pod that works shows that nobody runs the image.
    Hollow,
    /// The built-in pause program, as `make pause-image` makes it. The stock shim needs one.
    Works,
}

/// A file of a layer.
struct Entry {
    path: String,
    what: What,
    mode: u32,
}

enum What {
    Folder,
    File(Vec<u8>),
    Link(String),
}

fn folder(path: &str) -> Entry {
    let mode = if path == "tmp" || path == "var/tmp" {
        0o1777
    } else {
        0o755
    };
    Entry {
        path: path.to_owned(),
        what: What::Folder,
        mode,
    }
}

fn file(path: &str, content: impl Into<Vec<u8>>, mode: u32) -> Entry {
    Entry {
        path: path.to_owned(),
        what: What::File(content.into()),
        mode,
    }
}

fn link(path: &str, to: &str) -> Entry {
    Entry {
        path: path.to_owned(),
        what: What::Link(to.to_owned()),
        mode: 0o777,
    }
}

fn base() -> Vec<Entry> {
    let mut entries: Vec<Entry> = [
        "bin", "dev", "etc", "proc", "root", "sys", "tmp", "usr", "var", "run",
    ]
    .into_iter()
    .map(folder)
    .collect();
    entries.push(file(
        "etc/passwd",
        "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n",
        0o644,
    ));
    entries.push(file("etc/group", "root:x:0:\nnogroup:x:65534:\n", 0o644));
    entries
}

/// The applets that tests call by name.
const APPLETS: &str = "sh ash cat cp dd echo env expr false grep head hostname id ifconfig ip ipcs kill ln ls mkdir \
                       mkfifo mount mv nc nohup nproc ps printenv printf pwd readlink rm seq setsid sleep sort stat \
                       stty sync tail tee test touch tr true tty umount uname usleep wc wget which whoami yes \
                       sysctl ulimit free df du find sed awk cut date dmesg chmod chown unshare timeout";

fn busybox_layer() -> Vec<Entry> {
    let mut entries = base();
    entries.push(file(
        "bin/busybox",
        fs::read(lab::lab().join("rootfs/busybox")).unwrap(),
        0o755,
    ));
    entries.extend(
        APPLETS
            .split_whitespace()
            .map(|applet| link(&format!("bin/{applet}"), "busybox")),
    );
    entries
}

const NGINX_CONF: &str = "daemon off;
user root;
worker_processes 1;
error_log /dev/stderr warn;
pid /run/nginx.pid;
events { worker_connections 64; }
http {
    access_log /dev/stdout;
    server {
        listen 80;
        location / { root /usr/share/nginx/html; }
    }
}
";

const WELCOME: &str = "<!DOCTYPE html>
<html><head><title>Welcome to nginx!</title></head>
<body><h1>Welcome to nginx!</h1></body></html>
";

fn nginx_layer() -> Vec<Entry> {
    let root = lab::lab().join("rootfs/nginx");
    let mut entries = busybox_layer();
    let mut pending = vec![PathBuf::new()];
    while let Some(path) = pending.pop() {
        let mut inside: Vec<_> = fs::read_dir(root.join(&path))
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        inside.sort();
        for name in inside {
            let path = path.join(name);
            let on_disk = root.join(&path);
            let kind = fs::symlink_metadata(&on_disk).unwrap().file_type();
            let name = path.to_str().unwrap().to_owned();
            if kind.is_dir() {
                if !entries.iter().any(|entry| entry.path == name) {
                    entries.push(folder(&name));
                }
                pending.push(path);
            } else if kind.is_symlink() {
                entries.push(link(
                    &name,
                    fs::read_link(&on_disk).unwrap().to_str().unwrap(),
                ));
            } else {
                entries.push(file(&name, fs::read(&on_disk).unwrap(), 0o755));
            }
        }
    }
    for path in [
        "var/lib",
        "var/lib/nginx",
        "var/log",
        "var/log/nginx",
        "usr/share",
        "usr/share/nginx",
    ] {
        entries.push(folder(path));
    }
    entries.push(folder("usr/share/nginx/html"));
    entries.push(folder("etc/nginx"));
    entries.push(file("etc/nginx/nginx.conf", NGINX_CONF, 0o644));
    entries.push(file("usr/share/nginx/html/index.html", WELCOME, 0o644));
    entries
}

/// The archive of busybox.
pub fn busybox() -> PathBuf {
    let config = json!({"Cmd": ["sh"], "Env": ["PATH=/bin:/usr/bin:/usr/sbin"]});
    archive(
        BUSYBOX,
        &[&lab::lab().join("rootfs/busybox")],
        &config,
        busybox_layer,
    )
}

/// A place of busybox's image that is a link to a folder of the node, to catch whoever follows links outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trap {
    /// The files that every container of a pod gets: `/etc/hostname`, `/etc/hosts`, `/etc/resolv.conf`.
    Files,
    /// `/etc/passwd` and `/etc/group`, in which users are looked up.
    Users,
    /// `/etc`.
    Etc,
    /// `/dev`.
    Dev,
    /// `/proc`.
    Proc,
    /// `/sys`.
    Sys,
}

impl Trap {
    /// Every trap.
    pub const ALL: [Self; 6] = [
        Self::Files,
        Self::Users,
        Self::Etc,
        Self::Dev,
        Self::Proc,
        Self::Sys,
    ];

    /// The image's name.
    pub fn name(self) -> String {
        format!("shim-tests.local/trap-{self:?}:latest").to_lowercase()
    }

    fn places(self) -> &'static [&'static str] {
        match self {
            Self::Files => &["etc/hostname", "etc/hosts", "etc/resolv.conf"],
            Self::Users => &["etc/passwd", "etc/group"],
            Self::Etc => &["etc"],
            Self::Dev => &["dev"],
            Self::Proc => &["proc"],
            Self::Sys => &["sys"],
        }
    }

    /// busybox, with links into `victim`, a folder of the node.
    fn layer(self, victim: &str) -> Vec<Entry> {
        let mut entries = busybox_layer();
        for place in self.places() {
            entries.retain(|entry| !Path::new(&entry.path).starts_with(place));
            let up = "../".repeat(16);
            entries.push(link(place, &format!("{up}{victim}/{place}")));
        }
        entries
    }
}

/// The archive of an image with links into `victim`, a folder of the node.
pub fn trapped(trap: Trap, victim: &Path) -> PathBuf {
    let victim = crate::slot::text(victim);
    let config = json!({"Env": ["PATH=/bin", format!("VICTIM={victim}")]});
    let busybox = lab::lab().join("rootfs/busybox");
    archive(&trap.name(), &[&busybox], &config, || trap.layer(&victim))
}

/// The archive of nginx.
pub fn nginx() -> PathBuf {
    let config =
        json!({"Entrypoint": ["/usr/sbin/nginx"], "Env": ["PATH=/bin:/usr/bin:/usr/sbin"]});
    archive(
        NGINX,
        &[&lab::lab().join("rootfs/nginx")],
        &config,
        nginx_layer,
    )
}

/// The archive of a pause image with this name.
pub fn pause(name: &str, kind: PauseImage) -> PathBuf {
    match kind {
        PauseImage::Hollow => {
            let config = json!({"Entrypoint": ["/pause"]});
            archive(name, &[], &config, || {
                vec![file("README", "Nobody runs this image.\n", 0o644)]
            })
        }
        PauseImage::Works => {
            let image = oci::pause_image(name).unwrap();
            let digest = hex(&Sha256::digest(&image));
            let images = lab::lab().join("images");
            let path = images.join(format!("pause-{}.tar", &digest[..16]));
            if !path.exists() {
                fs::create_dir_all(&images).unwrap();
                // Whole or not at all: other tests look for the same file.
                let new = tempfile::NamedTempFile::new_in(&images).unwrap();
                fs::write(new.path(), image).unwrap();
                new.persist(&path).unwrap();
            }
            path
        }
    }
}

/// A root filesystem on disk with busybox's files, for `ctr run --rootfs`.
pub fn unpack_busybox(into: &Path) {
    for entry in busybox_layer() {
        let path = into.join(&entry.path);
        match entry.what {
            What::Folder => fs::create_dir_all(&path).unwrap(),
            What::File(content) => {
                fs::write(&path, content).unwrap();
                fs::set_permissions(
                    &path,
                    std::os::unix::fs::PermissionsExt::from_mode(entry.mode),
                )
                .unwrap();
            }
            What::Link(to) => std::os::unix::fs::symlink(to, &path).unwrap(),
        }
    }
}

fn hex(digest: &[u8]) -> String {
    digest.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn archive(
    name: &str,
    sources: &[&Path],
    config: &serde_json::Value,
    layer: impl FnOnce() -> Vec<Entry>,
) -> PathBuf {
    let mut key = format!("{FORMAT} {name} {config}");
    for source in sources {
        let metadata = fs::metadata(source).unwrap();
        key += &format!(" {} {:?}", metadata.len(), metadata.modified().unwrap());
    }
    let key = hex(&Sha256::digest(key));
    let images = lab::lab().join("images");
    let path = images.join(format!(
        "{}-{}.tar",
        name.rsplit('/').next().unwrap().replace(':', "-"),
        &key[..16]
    ));
    if path.exists() {
        return path;
    }

    let layer = tar_of(&layer());
    let digest = hex(&Sha256::digest(&layer));
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let image = json!({
        "architecture": architecture, "os": "linux", "config": config,
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
        "history": [{"created_by": "shim-tests"}],
    });
    let image = serde_json::to_vec(&image).unwrap();
    let image_name = format!("{}.json", hex(&Sha256::digest(&image)));
    let manifest = json!([{"Config": image_name, "RepoTags": [name], "Layers": ["layer.tar"]}]);

    fs::create_dir_all(&images).unwrap();
    let whole = tar_of(&[
        file(&image_name, image, 0o644),
        file("layer.tar", layer, 0o644),
        file(
            "manifest.json",
            serde_json::to_vec(&manifest).unwrap(),
            0o644,
        ),
    ]);
    // Another test may write the same archive at the same time: each test writes its own file, and the last rename
    // wins.
    let mut temporary = tempfile::NamedTempFile::new_in(&images).unwrap();
    temporary.write_all(&whole).unwrap();
    temporary.persist(&path).unwrap();
    path
}

fn tar_of(entries: &[Entry]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for entry in entries {
        let mut header = tar::Header::new_gnu();
        header.set_mode(entry.mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(0);
        match &entry.what {
            What::Folder => {
                header.set_entry_type(tar::EntryType::Directory);
                builder
                    .append_data(&mut header, &entry.path, std::io::empty())
                    .unwrap();
            }
            What::File(content) => {
                header.set_entry_type(tar::EntryType::Regular);
                header.set_size(content.len() as u64);
                builder
                    .append_data(&mut header, &entry.path, &content[..])
                    .unwrap();
            }
            What::Link(to) => {
                header.set_entry_type(tar::EntryType::Symlink);
                builder.append_link(&mut header, &entry.path, to).unwrap();
            }
        }
    }
    builder.into_inner().unwrap()
}
