//! The files that all containers of a pod share: `/etc/hostname`, `/etc/hosts`, `/etc/resolv.conf` and `/dev/shm`.
//!
//! | mode | who makes the files | who binds the files into a container |
//! |---|---|---|
//! | podsandbox | containerd's CRI | containerd's CRI |
//! | Sandbox API | the shim | the shim, in the container's spec ([`Bind`]) |
//!
//! CRI binds only files that CRI finds in a directory of its own. The shim cannot put files there: CRI does not tell
//! the path, and empties the directory at each start.
//!
//! A container may write into these files. The bundle is in memory (`/run`), the node's and not the pod's: the files are
//! therefore in the bundle's `work`, a link to a directory on disk that containerd makes for each bundle, and removes
//! with the bundle. CRI's own files of a pod are on the same disk. The shared memory has a size, and stays in the bundle,
//! where `delete` looks for mounts.

use std::fs;
use std::path::{Path, PathBuf};

use rustix::fs::XattrFlags;
use rustix::io::Errno;
use rustix::mount::MountFlags;

use crate::error::{IoError, Result};
use crate::pod::config::PodConfig;
use crate::runtime::spec::Bind;

const HOSTS: &str = "/etc/hosts";
const RESOLV_CONF: &str = "/etc/resolv.conf";
const DEV_SHM: &str = "/dev/shm";

/// The content of a pod's files, and their places.
#[derive(Debug, Clone)]
pub struct PodFiles {
    /// The directory of the text files.
    directory: PathBuf,
    /// None: the node's hostname.
    hostname: Option<String>,
    /// None: a copy of the node's file.
    resolv_conf: Option<String>,
    /// Where the pod's own `/dev/shm` is mounted. None: the node's `/dev/shm`.
    own_shm: Option<PathBuf>,
}

impl PodFiles {
    /// The files of the pod whose sandbox has this bundle. Makes nothing.
    pub fn plan(bundle: &Path, config: &PodConfig) -> Self {
        // Without a link, the bundle is all there is.
        let work = bundle.join("work");
        let disk = fs::canonicalize(work).unwrap_or_else(|_| bundle.to_owned());
        Self {
            directory: disk.join("files"),
            hostname: config.hostname().map(str::to_owned),
            resolv_conf: config.resolv_conf(),
            own_shm: (!config.node_ipc()).then(|| bundle.join("shm")),
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Makes the files. Blocks. After a failure the files made so far stay, and the teardown removes these files.
    ///
    /// # Errors
    /// `Io` when a file of the node cannot be read, or a file of the pod cannot be made.
    pub fn make(&self) -> Result<()> {
        fs::create_dir(&self.directory)
            .map_err(IoError::at("create the pod's files", &self.directory))?;
        let hostname = match &self.hostname {
            Some(name) => name.clone(),
            None => rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned(),
        };
        write(&self.file("hostname"), &format!("{hostname}\n"))?;
        copy(HOSTS, &self.file("hosts"))?;
        let resolv_conf = self.file("resolv.conf");
        match &self.resolv_conf {
            Some(text) => write(&resolv_conf, text)?,
            None => copy(RESOLV_CONF, &resolv_conf)?,
        }
        let Some(shm) = &self.own_shm else {
            return Ok(());
        };
        fs::create_dir(shm).map_err(IoError::at("create", shm))?;
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        // 64 MiB, as in CRI and in Docker.
        rustix::mount::mount("shm", shm, "tmpfs", flags, Some(c"mode=1777,size=67108864"))
            .map_err(IoError::at("mount the pod's /dev/shm at", shm))?;
        Ok(())
    }

    /// The place of each file in a container.
    pub fn binds(&self) -> Vec<Bind> {
        let bind = |destination, source| Bind {
            destination,
            source,
        };
        vec![
            bind("/etc/hostname", self.file("hostname")),
            bind(HOSTS, self.file("hosts")),
            bind(RESOLV_CONF, self.file("resolv.conf")),
            bind(
                DEV_SHM,
                self.own_shm.clone().unwrap_or_else(|| DEV_SHM.into()),
            ),
        ]
    }

    /// Gives the pod's own files the SELinux label of a container's mounts. Does nothing on a node without SELinux.
    ///
    /// # Errors
    /// `Io` when the kernel refuses the label.
    pub fn label(&self, label: &str) -> Result<()> {
        for bind in self.binds() {
            // The node's shared memory keeps the node's label.
            if bind.source == Path::new(DEV_SHM) {
                continue;
            }
            let set = rustix::fs::setxattr(
                &bind.source,
                "security.selinux",
                label.as_bytes(),
                XattrFlags::empty(),
            );
            match set {
                Ok(()) | Err(Errno::NOTSUP) => {}
                Err(error) => {
                    return Err(IoError::at("set the SELinux label of", &bind.source)(error).into());
                }
            }
        }
        Ok(())
    }

    /// Where the pod's own `/dev/shm` is mounted; none where the pod uses the node's.
    pub fn mount_point(&self) -> Option<PathBuf> {
        self.own_shm.clone()
    }

    /// The directories that the files are in.
    pub fn directories(&self) -> Vec<PathBuf> {
        let own_shm = self.own_shm.iter();
        own_shm.chain([&self.directory]).cloned().collect()
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    Ok(fs::write(path, text).map_err(IoError::at("write", path))?)
}

/// Copies the text alone: the mode and the owner of the node's file are not for the pod's file.
fn copy(from: &str, to: &Path) -> Result<()> {
    let text = fs::read(from).map_err(IoError::at("read the node's", from))?;
    Ok(fs::write(to, text).map_err(IoError::at("write", to))?)
}
