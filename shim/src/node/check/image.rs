//! Whether a pause image is needed, and whether it is there.

use std::path::Path;
use std::process::{Command, Stdio};

use super::Node;
use super::handler::Ours;
use crate::node::containerd::Version;
use crate::node::programs;
use crate::node::report::{Verdict, note, ok, todo};

impl Node<'_> {
    pub(super) fn pause_image(&self, handlers: &[Ours<'_>]) -> Verdict {
        let wanting = handlers
            .iter()
            .filter(|ours| wants_image(ours, self.version));
        let wanting: Vec<&str> = wanting.map(|ours| ours.handler.name.as_str()).collect();
        if wanting.is_empty() {
            return ok("not needed: all handlers of this shim use the Sandbox API");
        }
        let whose = wanting.join(", ");
        let Some(image) = &self.config.pause_image else {
            return todo(format!(
                "containerd wants a pause image for {whose}, and its configuration names none: set sandbox_image (1.x) or \
                 pinned_images.sandbox (2.x) in {}",
                self.config_file()
            ));
        };
        match self.has_image(image) {
            Some(true) => ok(format!(
                "{image} is there, for {whose}; this shim does not run it"
            )),
            Some(false) => note(format!(
                "{image} is not there, and containerd pulls it with the first pod of {whose}: where the node reaches no \
                 registry, import it (docs/pause-image.md)"
            )),
            None => note(format!(
                "{image} is needed for {whose}; whether it is there was not found out (ctr is missing, or containerd does \
                 not answer)"
            )),
        }
    }

    /// Whether containerd has an image for Kubernetes; none when nobody says so. `ctr` comes with containerd, and is the
    /// one client that is sure to speak its language.
    fn has_image(&self, image: &str) -> Option<bool> {
        if !self.answers {
            return None;
        }
        let ctr = programs::look_up(Path::new("ctr"), &self.folders)?;
        let answer = Command::new(ctr)
            .arg("--address")
            .arg(&self.asked.address)
            .args(["--namespace", "k8s.io", "images", "list", "--quiet"])
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .output()
            .ok()
            .filter(|answer| answer.status.success())?;
        let mut names = answer.stdout.split(|byte| *byte == b'\n');
        Some(names.any(|name| name == image.as_bytes()))
    }
}

/// Whether containerd starts no pod of this handler without a pause image.
fn wants_image(ours: &Ours<'_>, version: Version) -> bool {
    if !ours.sandbox_api() || version < Version::of(2, 0) {
        return true;
    }
    // 2.3 pulls the image all the same, and 2.4 and later unless they are told not to.
    version >= Version::of(2, 3)
        && !(version >= Version::of(2, 4) && ours.handler.disable_pause_image_pull)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use crate::node::config::Config;

    #[test]
    fn only_some_releases_want_no_image_for_the_sandbox_api() {
        for (version, lines, expected) in [
            ("1.7.24", "sandboxer = 'shim'", true),
            ("2.1.9", "sandboxer = 'podsandbox'", true),
            ("2.1.9", "sandboxer = 'shim'", false),
            (
                "2.3.4",
                "sandboxer = 'shim'\ndisable_pause_image_pull = true",
                true,
            ),
            ("2.4.0", "sandboxer = 'shim'", true),
            (
                "2.4.0",
                "sandboxer = 'shim'\ndisable_pause_image_pull = true",
                false,
            ),
        ] {
            let text = format!(
                "[plugins.cri.containerd.runtimes.pause]\nruntime_type = 'io.containerd.pause.v2'\n{lines}"
            );
            let config = Config::parse(&text).unwrap();
            let ours = Ours::of(&config.handlers[0]).unwrap();
            let version = Version::parse(version).unwrap();
            assert_eq!(wants_image(&ours, version), expected, "{version} {lines}");
        }
    }
}
