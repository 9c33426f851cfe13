//! The files that all containers of a pod share: `/etc/hostname`, `/etc/hosts`, `/etc/resolv.conf` and `/dev/shm`.
//!
//! In podsandbox mode containerd makes and mounts them. Through the Sandbox API nobody else does: CRI binds them into a
//! container only if it finds them in a directory of its own, whose path it does not tell and which it empties when it
//! starts. So they are kept in the sandbox's bundle, and added to each container's spec ([`crate::runtime::spec::Changes`]).

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

/// What a pod's files are to be, and where.
#[derive(Debug, Clone)]
pub struct PodFiles {
    directory: PathBuf,
    /// None: the node's.
    hostname: Option<String>,
    /// None: a copy of the node's.
    resolv_conf: Option<String>,
    /// Where the pod's own is mounted; none: the node's.
    own_shm: Option<PathBuf>,
}

impl PodFiles {
    /// The files of the pod whose sandbox has this bundle. Makes nothing.
    pub fn plan(bundle: &Path, config: &PodConfig) -> Self {
        let directory = bundle.join("files");
        Self {
            own_shm: (!config.node_ipc()).then(|| directory.join("shm")),
            hostname: config.hostname().map(str::to_owned),
            resolv_conf: config.resolv_conf(),
            directory,
        }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    /// Makes them. Blocks. What was made stays after a failure: the teardown removes that.
    ///
    /// # Errors
    /// `Io` when the node's files cannot be read or the pod's not be made.
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
        // 64 MiB, as CRI and Docker have it.
        rustix::mount::mount("shm", shm, "tmpfs", flags, Some(c"mode=1777,size=67108864"))
            .map_err(IoError::at("mount the pod's /dev/shm at", shm))?;
        Ok(())
    }

    /// Where a container finds each.
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

    /// Gives the pod's own files the SELinux label of a container's mounts. A node without SELinux knows no labels.
    ///
    /// # Errors
    /// `Io` when the kernel does not take the label.
    pub fn label(&self, label: &str) -> Result<()> {
        for bind in self.binds() {
            if !bind.source.starts_with(&self.directory) {
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

    /// Where the pod's own /dev/shm is mounted.
    pub fn mount_point(&self) -> Option<PathBuf> {
        self.own_shm.clone()
    }

    /// The folder that all of them are in.
    pub fn directory(&self) -> PathBuf {
        self.directory.clone()
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    Ok(fs::write(path, text).map_err(IoError::at("write", path))?)
}

/// Only the text: mode and owner of the node's file are not the pod's.
fn copy(from: &str, to: &Path) -> Result<()> {
    let text = fs::read(from).map_err(IoError::at("read the node's", from))?;
    Ok(fs::write(to, text).map_err(IoError::at("write", to))?)
}
