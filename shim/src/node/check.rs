//! `check`: what an operator runs first and last. One finding for each part of the node.
//!
//! ```text
//!  containerd ─▶ config ─▶ each handler of this shim ─▶ options ─▶ cgroup-driver, runtime
//!                                        cgroup-mode, user-namespaces, confinement, pause-image
//! ```
//!
//! What cannot be known because an earlier part failed is left out: the first `todo` is the next step.

mod cgroups;
mod daemon;
mod handler;
mod image;
mod options;
mod runtime;
mod security;

use std::path::{Path, PathBuf};

use self::handler::Ours;
use super::config::Config;
use super::containerd::{Containerd, Version};
use super::kubelet::CgroupDriver;
use super::report::{Finding, said};
use super::{Asked, Said, programs, root_only};
use crate::error::Result;
use crate::runtime::options::{DEFAULT_FILE, Options};

/// What is known of the node.
struct Node<'a> {
    asked: &'a Asked,
    containerd: Containerd,
    /// Whether the process was found that listens at the socket.
    answers: bool,
    version: Version,
    config: Config,
    /// Where containerd, and so the shim, looks for programs.
    folders: Vec<PathBuf>,
}

/// Looks at the node.
///
/// # Errors
/// `FailedPrecondition` for anybody but root.
pub fn check(asked: &Asked) -> Result<Said> {
    root_only("check")?;
    let mut findings = Vec::new();
    if let Some(node) = daemon::look(asked, &mut findings) {
        node.look(&mut findings);
    }
    Ok(said(&findings, asked.form))
}

impl Node<'_> {
    fn look(&self, findings: &mut Vec<Finding>) {
        let handlers = self.handlers();
        if handlers.is_empty() {
            findings.push(Finding::new("handler", self.no_handler()));
        }
        for ours in &handlers {
            let name = &ours.handler.name;
            findings.push(Finding::of("handler", name, self.handler(ours)));
        }
        let mut runtimes = Vec::new();
        let kubelet = CgroupDriver::read(&self.asked.kubelet);
        for ours in &handlers {
            let name = &ours.handler.name;
            let received = options::received(ours, self.version, Path::new(DEFAULT_FILE));
            findings.push(Finding::of("options", name, options::verdict(&received)));
            let Ok(received) = received else { continue };
            let driver = self.cgroup_driver(&received, &kubelet);
            findings.push(Finding::of("cgroup-driver", name, driver));
            if !runtimes.contains(&received.options) {
                findings.push(Finding::of(
                    "runtime",
                    name,
                    self.runtime(&received.options),
                ));
                runtimes.push(received.options);
            }
        }
        findings.push(Finding::new("cgroup-mode", cgroups::mode()));
        let users = self.user_namespaces(&handlers, &runtimes);
        findings.push(Finding::new("user-namespaces", users));
        findings.push(Finding::new("confinement", security::confinement()));
        if !handlers.is_empty() {
            findings.push(Finding::new("pause-image", self.pause_image(&handlers)));
        }
    }

    /// The file of the OCI runtime that the options name.
    fn runtime_file(&self, options: &Options) -> Option<PathBuf> {
        programs::look_up(&options.binary_name, &self.folders)
    }

    /// The configuration file, for a sentence.
    fn config_file(&self) -> std::path::Display<'_> {
        self.containerd.config.display()
    }

    /// The handlers that lead to this shim.
    fn handlers(&self) -> Vec<Ours<'_>> {
        self.config.handlers.iter().filter_map(Ours::of).collect()
    }
}
