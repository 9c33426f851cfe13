//! The OCI runtime: where it is, which release it is, and what the shim does in its place.

use std::path::Path;

use super::Node;
use super::cgroups::has_unused_v2;
use crate::node::programs;
use crate::node::report::{Verdict, note, ok, todo};
use crate::runtime::options::Options;
use crate::runtime::release;

impl Node<'_> {
    pub(super) fn runtime(&self, options: &Options) -> Verdict {
        let name = options.binary_name.display();
        let Some(file) = self.runtime_file(options) else {
            return todo(missing(options, &programs::shown(&self.folders)));
        };
        let path = file.display();
        let Some(said) = programs::first_line(&file, "--version") else {
            return todo(format!(
                "{path} does not say its version (`{path} --version`): install runc (apt-get install runc), or name \
                 another runtime in BinaryName"
            ));
        };
        if said.starts_with("crun") && has_unused_v2() {
            return todo(format!(
                "{said}: crun refuses a node with cgroup v1 and v2 side by side: take runc as BinaryName, or boot with \
                 systemd.unified_cgroup_hierarchy=1"
            ));
        }
        let at = if Path::new(&options.binary_name) == file {
            format!("{path}: {said}")
        } else {
            format!("{name} is {path}: {said}")
        };
        match release::done_instead(&file, &said) {
            _ if !options.shortcuts => ok(format!("{at}; it does all itself (shortcuts = false)")),
            Some(done) => ok(format!("{at}; {done}")),
            None => note(format!(
                "{at}; this shim does not know this release, so it does every start and delete itself, which works and is \
                 slower (docs/containerd.md lists the releases)"
            )),
        }
    }
}

fn missing(options: &Options, folders: &str) -> String {
    let name = options.binary_name.display();
    if options.binary_name.components().count() > 1 {
        return format!(
            "BinaryName names {name}, where there is no program: install it there, or correct BinaryName"
        );
    }
    format!(
        "{name} is not in containerd's PATH ({folders}), and no container starts: install it (apt-get install {name}), or \
         name its file in BinaryName"
    )
}
