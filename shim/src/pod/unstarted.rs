//! A sandbox that the Sandbox API makes and nobody starts.
//!
//! ```text
//!  CreateSandbox ──▶ made ─┬─ StartSandbox ──────────────▶ runs, no timer
//!                          ├─ the deletion ──────────────▶ gone, no timer
//!                          └─ `sandbox_start_timeout` ───▶ deleted, and the shim ends
//! ```
//!
//! containerd 2.3 pulls the pause image between the two calls. When the pull fails, containerd forgets the sandbox and
//! calls nothing any more; each of the kubelet's retries makes another sandbox, with another shim.
//!
//! In podsandbox mode the image is there before the sandbox is made, and a containerd that has died before the start
//! deletes the sandbox when containerd is back.

use std::sync::Arc;
use std::time::Duration;

use log::warn;
use tokio::time::timeout;

use super::Pod;
use super::lifecycle::Occasion;
use crate::container::mailbox::ProcessId;

impl Pod {
    /// Sees to the end of a sandbox that was just made, and of the shim, if the sandbox is not started in time. Does
    /// nothing for other members, and where the operator has set no time.
    pub(super) fn expect_start(self: &Arc<Self>, id: &str) {
        let Ok((sandbox, described)) = self.sandbox(id) else {
            return;
        };
        let patience = Duration::from_secs(described.options.sandbox_start_timeout.into());
        if patience.is_zero() {
            return;
        }
        let mut started = sandbox.started();
        // Weak, because the pod keeps the queue of events open.
        let (pod, id) = (Arc::downgrade(self), id.to_owned());
        tokio::spawn(async move {
            // An error of `wait_for`, too, ends the wait: the sandbox is deleted.
            while timeout(patience, started.wait_for(|started| *started))
                .await
                .is_err()
            {
                let Some(pod) = pod.upgrade() else {
                    return;
                };
                warn!(after = patience.as_secs(); "sandbox not started in time");
                match pod.delete_now(&id, ProcessId::Init).await {
                    Ok(_) => return pod.settle(Occasion::NeverStarted),
                    // Started in the last moment, which ends the wait. Otherwise what is left is tried again later.
                    Err(error) => warn!(error:%; "sandbox not deleted"),
                }
            }
        });
    }
}
