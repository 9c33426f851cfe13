//! A `runc` of the test's own, first in containerd's PATH. A file makes this runc wait before or after its work.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::time::Duration;

use crate::daemon::Daemon;
use crate::lab;
use crate::until::{eventually, ok_if};

/// A runc that can be held at two points of a command: before the work (`create`), and after the work, before the shim
/// hears of the end (`create-done`).
pub struct Hold {
    folder: PathBuf,
}

impl Hold {
    /// Puts the runc into containerd's PATH. Nothing is held yet.
    pub fn install(daemon: &Daemon) -> Self {
        let folder = daemon.directory().join("hold");
        fs::create_dir(&folder).unwrap();
        // A held checkpoint has a child that hangs, as criu does.
        // Other commands are never held: containerd 2.1 runs `runc features` at its start.
        // Without a hold after the work, the script becomes runc (`exec`): a kill of the script kills runc.
        let script = format!(
            "#!/bin/sh\n\
             for word; do case $word in create|start|exec|delete|update|pause|resume|kill|checkpoint) call=$word; break;; esac; done\n\
             [ \"$call\" ] || exec {runc} \"$@\"\n\
             held() {{\n\
             [ -e {folder}/$1 ] || return 0\n\
             [ $1 != checkpoint ] || sleep 3600 &\n\
             echo > {folder}/$1-held\n\
             while [ -e {folder}/$1 ]; do sleep 0.05; done\n\
             }}\n\
             held $call\n\
             [ -e {folder}/$call-done ] || exec {runc} \"$@\"\n\
             {runc} \"$@\"\n\
             code=$?\n\
             held $call-done\n\
             exit $code\n",
            folder = folder.display(),
            runc = lab::runc().display(),
        );
        let program = daemon.directory().join("bin/runc");
        fs::write(&program, script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        Self { folder }
    }

    /// From now on runc waits at `point`.
    pub fn hold(&self, point: &str) {
        fs::write(self.folder.join(point), "").unwrap();
    }

    /// Waits until a runc waits at `point`.
    #[track_caller]
    pub fn wait_until_held(&self, point: &str) {
        let sign = self.folder.join(format!("{point}-held"));
        eventually(Duration::from_secs(20), || {
            ok_if(sign.exists(), || format!("no runc has come to {point}"))
        });
        fs::remove_file(sign).unwrap();
    }

    /// Lets runc go on at `point`.
    pub fn release(&self, point: &str) {
        fs::remove_file(self.folder.join(point)).unwrap();
    }
}
