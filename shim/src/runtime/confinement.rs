//! What confines a container's processes beside their namespaces, and who may write their output for that reason.
//!
//! A FIFO of containerd is a file, with a label and a path. A pipe of the shim is what the stock shim uses, and allowed
//! wherever the stock shim works:
//!
//! ```text
//!   SELinux     looks at open files when the process is confined, and at each write. container-selinux lets a container
//!               write, and open again, pipes of the runtime's domain. It has no rule for a FIFO of the type
//!               container_var_run_t, which all has that containerd makes in /run/containerd.
//!   AppArmor    leaves alone what somebody who is not confined has opened. But a container that opens /dev/stdout opens
//!               the FIFO by its path. A pipe has no path, and no profile applies.
//! ```
//!
//! See the OCI spec's `process.selinuxLabel` and `process.apparmorProfile`, apparmor.d(5).

use serde::Deserialize;

use crate::io::Writer;

/// The profiles that containerd's CRI, nerdctl and Docker make. All have the rule `file,`, which allows to open any file,
/// and the flag `attach_disconnected`: without the flag, AppArmor refuses a file of another mount namespace.
const ALLOW_EVERY_FILE: [&str; 3] = [
    "cri-containerd.apparmor.d",
    "nerdctl-default",
    "docker-default",
];

/// The part of a spec's `process` that confines.
#[derive(Debug, Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct Confinement {
    selinux_label: String,
    apparmor_profile: String,
}

impl Confinement {
    /// Who writes the output FIFOs of the container's init.
    pub(super) fn writer(&self) -> Writer {
        let profile = self.apparmor_profile.as_str();
        let allows = matches!(profile, "" | "unconfined") || ALLOW_EVERY_FILE.contains(&profile);
        if self.selinux_label.is_empty() && allows {
            Writer::Process
        } else {
            Writer::Shim
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn writer(process: &str) -> Writer {
        let confinement: Confinement = serde_json::from_str(process).unwrap();
        confinement.writer()
    }

    #[test]
    fn a_process_that_may_not_open_every_file_gets_a_pipe() {
        for direct in [
            r#"{"args": ["sh"]}"#,
            r#"{"selinuxLabel": "", "apparmorProfile": ""}"#,
            r#"{"apparmorProfile": "unconfined"}"#,
            r#"{"apparmorProfile": "cri-containerd.apparmor.d"}"#,
            r#"{"apparmorProfile": "docker-default"}"#,
        ] {
            assert_eq!(writer(direct), Writer::Process, "{direct}");
        }
        for copied in [
            r#"{"selinuxLabel": "system_u:system_r:container_t:s0:c1,c2"}"#,
            r#"{"selinuxLabel": "system_u:system_r:spc_t:s0", "apparmorProfile": "unconfined"}"#,
            r#"{"apparmorProfile": "k8s-apparmor-example-deny-write"}"#,
        ] {
            assert_eq!(writer(copied), Writer::Shim, "{copied}");
        }
    }
}
