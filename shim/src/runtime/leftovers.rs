//! What failed creates have left: a node without memory, pids or descriptors fails the create, and may fail the teardown
//! for the same reason.
//!
//! ```text
//!  create fails ──▶ teardown ──fails──▶ Leftovers::keep ──▶ teardown, after 1, 2, 4, … 30 s ──▶ nothing is left
//!                      └──works──▶ nothing is left                     └──the shim ends──▶ `delete` takes down
//! ```

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use log::{info, warn};
use tokio::time::sleep;

use super::teardown::{Remains, Why, take_down};

/// How long the first attempt waits. Each further one waits twice as long, up to [`LONGEST`].
const FIRST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);

/// The ids of the members of which something is left. The records stay as long: what the shim does not get to, `delete`
/// takes down.
#[derive(Debug, Clone, Default)]
pub struct Leftovers(Arc<Mutex<HashSet<String>>>);

impl Leftovers {
    /// Whether something is left of an earlier member with this id: a new one would share cgroup and mounts with that.
    pub fn has(&self, id: &str) -> bool {
        self.ids().contains(id)
    }

    /// Takes `remains` of a failed create down again until that works.
    pub fn keep(&self, remains: Remains) {
        let remains = remains.without_bundle();
        let leftovers = self.clone();
        leftovers.ids().insert(remains.id.clone());
        tokio::spawn(async move {
            let mut pause = FIRST;
            loop {
                sleep(pause).await;
                match take_down(remains.clone(), Why::NotMade).await {
                    Ok(()) => break,
                    Err(error) => {
                        warn!(container = remains.id, error:%; "still left of a failed create");
                    }
                }
                pause = (pause * 2).min(LONGEST);
            }
            leftovers.ids().remove(&remains.id);
            info!(container = remains.id; "nothing is left of the failed create");
        });
    }

    fn ids(&self) -> MutexGuard<'_, HashSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
