//! What has failed once is not tried again by itself: a pod that fails is started again and again, and containerd must not
//! be.

use std::fs;

use sha2::{Digest, Sha256};

use super::look::read;
use super::plan::{Change, Found};
use super::{Handler, STATE, folder, settle};
use crate::error::{Error, Result};

const FILE: &str = "failed";

/// Names a change on a node, and what the change is for.
pub(super) fn digest(found: &Found, changes: &[Change], handler: Handler) -> String {
    let mut digest = Sha256::new();
    digest.update(format!("{handler:?} {} ", found.version));
    digest.update(serde_json::to_vec(&found.dump).unwrap_or_default());
    for change in changes {
        digest.update(change.path.as_os_str().as_encoded_bytes());
        digest.update(change.content.as_deref().unwrap_or_default());
    }
    digest
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// Refuses a change that has failed before.
///
/// # Errors
/// `FailedPrecondition`, with the file to remove.
pub(super) fn refuse(digest: &str) -> Result<()> {
    let path = folder(FILE);
    match read(&path)?
        .as_deref()
        .and_then(|text| text.split_once('\n'))
    {
        Some((failed, why)) if failed == digest => Err(Error::FailedPrecondition(format!(
            "the same change has failed before, and is not tried again: mend the cause, and remove {} to try again. \
             The cause: {}",
            path.display(),
            why.trim()
        ))),
        _ => Ok(()),
    }
}

/// For the next run.
pub(super) fn remember(digest: &str, why: &Error) {
    let _ = fs::create_dir_all(STATE);
    let _ = fs::write(folder(FILE), format!("{digest}\n{why}\n"));
}

/// For a node that is as it was asked for.
pub(super) fn forget() {
    let _ = fs::remove_file(folder(FILE));
    settle();
}
