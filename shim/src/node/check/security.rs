//! User namespaces, SELinux and AppArmor: what pods may have, and what confines them.

use std::path::PathBuf;

use super::Node;
use super::handler::Ours;
use crate::node::config::Way;
use crate::node::containerd::Version;
use crate::node::programs;
use crate::node::report::{Verdict, note, ok};
use crate::runtime::options::Options;

const USER_NAMESPACES: &str = "/proc/sys/user/max_user_namespaces";
const SELINUX: &str = "/sys/fs/selinux/enforce";
const APPARMOR: &str = "/sys/module/apparmor/parameters/enabled";

/// The first runc with the idmapped mounts that containerd 2.x asks for.
const RUNC: Version = Version::of(1, 2);

impl Node<'_> {
    /// Pods with `hostUsers: false`. No such pod need run on the node, so nothing here is to be done.
    pub(super) fn user_namespaces(&self, handlers: &[Ours<'_>], runtimes: &[Options]) -> Verdict {
        let most = number(USER_NAMESPACES);
        if most.unwrap_or_default() == 0 {
            return note(format!(
                "none ({USER_NAMESPACES} is 0 or not there): for pods with hostUsers: false, sysctl -w \
                 user.max_user_namespaces=15000"
            ));
        }
        let version = self.version;
        if version < Version::of(2, 0) {
            return note(format!(
                "the kernel has them; for pods with hostUsers: false, take containerd 2.0 or later (this is {version})"
            ));
        }
        let by_type = handlers.iter().find(|ours| ours.way == Way::Type);
        if let Some(ours) = by_type.filter(|_| version < Version::of(2, 3)) {
            return note(format!(
                "containerd 2.0 to 2.2 offer none for the type of the handler {}: for pods with hostUsers: false, take \
                 config/containerd-2-runtime-path.toml",
                ours.handler.name
            ));
        }
        let files: Vec<PathBuf> = runtimes
            .iter()
            .filter_map(|one| self.runtime_file(one))
            .collect();
        for file in files {
            let said = programs::first_line(&file, "--version").unwrap_or_default();
            let release = said.strip_prefix("runc version ").and_then(Version::parse);
            if let Some(release) = release.filter(|release| *release < RUNC) {
                return note(format!(
                    "containerd {version} wants runc 1.2 or later for pods with hostUsers: false, and {} is {release}: name \
                     a newer one in BinaryName",
                    file.display()
                ));
            }
        }
        ok(format!("{} at most", most.unwrap_or_default()))
    }
}

/// What confines containers, besides namespaces and capabilities.
pub(super) fn confinement() -> Verdict {
    let selinux = match number(SELINUX) {
        Some(0) => "SELinux is permissive",
        Some(_) => "SELinux is enforcing",
        None => "no SELinux",
    };
    let apparmor = std::fs::read_to_string(APPARMOR).unwrap_or_default();
    let apparmor = match apparmor.trim() {
        "Y" => "AppArmor is on",
        _ => "no AppArmor",
    };
    ok(format!("{selinux}, {apparmor}"))
}

fn number(file: &str) -> Option<u64> {
    let text = std::fs::read_to_string(file).ok()?;
    text.trim().parse().ok()
}
