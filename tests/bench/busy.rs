//! Another client of the same containerd: starts and ends containers, and executes in them, all the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use shim_tests::cri::Failure;
use shim_tests::cri_calls::Calls;
use shim_tests::image;

use crate::columns::Shim;
use crate::node::{APP, CniOrHost, Node};

/// The client, at work until [`Self::end`].
pub(crate) struct Busy {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<usize, Failure>>,
    pod: String,
}

impl Busy {
    /// Starts it, with a pod of the stock shim, whatever shim is measured.
    pub(crate) fn start(node: &Node) -> Self {
        let calls = Calls::new(&node.daemon.names);
        let config = node.pod(CniOrHost::Host);
        let pod = calls.run_pod(&config, Shim::Stock.name());
        let pod = pod.unwrap_or_else(|failure| panic!("the busy pod: {failure}"));
        node.leave_standing(&node.shims()[0]);
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, id) = (Arc::clone(&stop), pod.clone());
        let thread = std::thread::spawn(move || {
            let mut lives = 0;
            while !stopped.load(Ordering::Relaxed) {
                let name = format!("app{lives}");
                let app = calls.create((&id, &config), &name, image::BUSYBOX, &APP, &[])?;
                calls.start(&app)?;
                calls.exec(&app, &["true"])?;
                calls.stop(&app)?;
                calls.remove(&app)?;
                lives += 1;
            }
            Ok(lives)
        });
        Self { stop, thread, pod }
    }

    /// Ends it: how many containers have lived.
    pub(crate) fn end(self, node: &Node) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        let lives = self.thread.join().unwrap();
        let ended = node.calls.stop_pod(&self.pod);
        ended
            .and_then(|()| node.calls.remove_pod(&self.pod))
            .and(lives)
            .unwrap_or_else(|failure| panic!("the other client: {failure}"))
    }
}
