//! Whether the cgroup driver is the same for the kubelet and the shim, and which cgroups the node has.

use std::path::Path;

use super::Node;
use super::handler::STOCK;
use super::options::Received;
use crate::kernel::cgroup::{Driver, Hierarchy};
use crate::node::containerd::Version;
use crate::node::kubelet::CgroupDriver;
use crate::node::report::{Verdict, note, ok, todo};

/// There while systemd is PID 1 (sd_booted(3)).
const SYSTEMD: &str = "/run/systemd/system";
/// Where systemd mounts an unused version 2 beside version 1.
const UNUSED_V2: &str = "/sys/fs/cgroup/unified";

impl Node<'_> {
    pub(super) fn cgroup_driver(&self, received: &Received, kubelet: &CgroupDriver) -> Verdict {
        let file = self.asked.kubelet.display();
        let (driver, whose) = match kubelet {
            CgroupDriver::Set(driver) => (
                *driver,
                format!("{file} has cgroupDriver: {}", name(*driver)),
            ),
            CgroupDriver::Unset => self.unset(),
            CgroupDriver::Unknown(why) => {
                return todo(format!("the kubelet's {file} cannot be understood: {why}"));
            }
            CgroupDriver::NoFile => {
                let set = received.options.systemd_cgroup;
                if set && !runs_systemd() {
                    return no_systemd();
                }
                return note(format!(
                    "SystemdCgroup = {set}, and there is no {file} to compare with: name the kubelet's file with \
                     --kubelet-config"
                ));
            }
        };
        compare(received, driver, &whose, runs_systemd())
    }

    /// A kubelet without the key asks containerd from 2.0 on, and containerd goes by its handlers of the stock shim's
    /// type, the default one first (KEP 4033). Otherwise the kubelet takes cgroupfs.
    fn unset(&self) -> (Driver, String) {
        let file = self.asked.kubelet.display();
        if self.version < Version::of(2, 0) {
            let words = format!("{file} has no cgroupDriver, which means cgroupfs");
            return (Driver::Cgroupfs, words);
        }
        let mut handlers: Vec<_> = self.config.handlers.iter().collect();
        handlers.sort_by_key(|one| (one.name != self.config.default_handler, &one.name));
        let of_runc = handlers.iter().find(|one| one.runtime_type == STOCK);
        let driver = match of_runc {
            Some(handler) => Driver::of(
                handler
                    .options
                    .get("SystemdCgroup")
                    .and_then(toml::Value::as_bool)
                    == Some(true),
            ),
            None => Driver::of(runs_systemd()),
        };
        let words = format!(
            "{file} has no cgroupDriver, so the kubelet takes containerd's, {} (before Kubernetes 1.31: cgroupfs)",
            name(driver)
        );
        (driver, words)
    }
}

fn compare(received: &Received, kubelet: Driver, whose: &str, systemd: bool) -> Verdict {
    let ours = Driver::of(received.options.systemd_cgroup);
    let set = received.options.systemd_cgroup;
    if ours != kubelet {
        return todo(format!(
            "SystemdCgroup = {set}, but {whose}: set SystemdCgroup = {} in {}",
            !set, received.from
        ));
    }
    if ours == Driver::Systemd && !systemd {
        return no_systemd();
    }
    ok(format!("SystemdCgroup = {set}, and {whose}"))
}

fn no_systemd() -> Verdict {
    todo(format!(
        "SystemdCgroup = true, and systemd does not run this node ({SYSTEMD} is not there): take cgroupfs for the kubelet \
         and SystemdCgroup = false"
    ))
}

fn name(driver: Driver) -> &'static str {
    match driver {
        Driver::Systemd => "systemd",
        Driver::Cgroupfs => "cgroupfs",
    }
}

fn runs_systemd() -> bool {
    Path::new(SYSTEMD).is_dir()
}

/// Which cgroups the node has.
pub(super) fn mode() -> Verdict {
    match Hierarchy::detect() {
        Ok(Hierarchy::V2) => ok("v2"),
        Ok(Hierarchy::V1) if has_unused_v2() => {
            note("v1, with an unused v2 beside it (hybrid): crun refuses such a node")
        }
        Ok(Hierarchy::V1) => ok("v1"),
        Err(error) => todo(format!("{error}: mount the cgroups, as systemd does")),
    }
}

/// Whether the node has version 2 beside version 1.
pub(super) fn has_unused_v2() -> bool {
    Path::new(UNUSED_V2).join("cgroup.procs").exists()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::check::handler::Ours;
    use crate::node::check::options::received;
    use crate::node::config::Config;
    use crate::node::report::State;

    #[test]
    fn the_two_sides_must_agree_and_systemd_must_run() {
        for (set, kubelet, systemd, expected) in [
            (true, Driver::Systemd, true, State::Ok),
            (true, Driver::Systemd, false, State::Todo),
            (false, Driver::Systemd, true, State::Todo),
            (true, Driver::Cgroupfs, true, State::Todo),
            (false, Driver::Cgroupfs, false, State::Ok),
        ] {
            let text = format!(
                "[plugins.cri.containerd.runtimes.pause]\nruntime_type = 'io.containerd.pause.v2'\n\
                 options = {{ SystemdCgroup = {set} }}"
            );
            let config = Config::parse(&text);
            let handler = config.ok().and_then(|mut config| config.handlers.pop());
            let ours = handler.as_ref().and_then(Ours::of);
            let read = ours
                .and_then(|ours| received(&ours, Version::of(2, 1), Path::new("/nowhere")).ok());
            let verdict = read.map(|read| compare(&read, kubelet, "the kubelet wants it", systemd));
            assert_eq!(
                verdict.map(|(state, _)| state),
                Some(expected),
                "{set} {kubelet:?}"
            );
        }
    }
}
