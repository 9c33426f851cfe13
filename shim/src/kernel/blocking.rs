//! Blocking work, on worker threads instead of the reactor thread.
//!
//! ```text
//!  run, run_anyway, spawn ──▶ an idle worker, else a new worker ──▶ the work ──▶ the answer
//!                                                   │
//!                          the kernel makes no thread:
//!                            run                  ResourceExhausted, the work is dropped
//!                            run_anyway, spawn    the work is done in place, and the reactor waits
//! ```
//!
//! tokio's `spawn_blocking` panics when the kernel makes no thread (pids.max, threads-max, no memory for a stack), and
//! a panic takes the pod down. So nothing else in the shim makes a thread for work; clippy's `disallowed-methods`
//! refuses the call. A worker ends after half a second without work: a pod at rest has no worker.

use std::collections::VecDeque;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::Builder;
use std::time::Duration;

use tokio::sync::oneshot;

use crate::error::{Error, Result};

/// How long an idle worker waits for work before the worker ends. Less than the second after which containerd 2.3 and
/// later ask for each pod's stats again: otherwise two workers would stay for a pod at rest.
const IDLE: Duration = Duration::from_millis(500);

/// The stack of a worker, in bytes. The deepest work is reading JSON and mounting.
const STACK: usize = 256 * 1024;

type Work = Box<dyn FnOnce() + Send>;

static POOL: Pool = Pool {
    queue: Mutex::new(Queue {
        work: VecDeque::new(),
        idle: 0,
    }),
    changed: Condvar::new(),
};

/// Does `work` on another thread.
///
/// # Errors
/// `ResourceExhausted` when no thread can be made, and the errors of the work.
pub async fn run<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (send, answer) = oneshot::channel();
    let boxed: Work = Box::new(move || {
        // The caller may be gone. The work is done all the same.
        let _ = send.send(work());
    });
    POOL.give(boxed).map_err(|(_, error)| {
        Error::ResourceExhausted(format!(
            "make a thread: {error}; the limit of processes (pids.max, threads-max) of the shim's cgroup or of the node is reached"
        ))
    })?;
    answer
        .await
        .map_err(|_| Error::Internal("a worker is gone"))?
}

/// Does `work` on another thread, or on this thread where no other can be made. For short work that must be done.
///
/// # Errors
/// The errors of the work.
pub async fn run_anyway<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (send, answer) = oneshot::channel();
    spawn(move || {
        let _ = send.send(work());
    });
    answer
        .await
        .map_err(|_| Error::Internal("a worker is gone"))?
}

/// As [`run_anyway`], for work that nobody waits for.
pub fn spawn(work: impl FnOnce() + Send + 'static) {
    if let Err((work, error)) = POOL.give(Box::new(work)) {
        log::debug!(error:%; "no thread for blocking work, done in place");
        work();
    }
}

struct Pool {
    queue: Mutex<Queue>,
    changed: Condvar,
}

struct Queue {
    /// Never longer than the number of idle workers: no work waits behind other work.
    work: VecDeque<Work>,
    /// The number of workers that wait for work.
    idle: usize,
}

impl Pool {
    /// Hands `work` to a worker. Returns the work when no thread can be made.
    fn give(&'static self, work: Work) -> Result<(), (Work, io::Error)> {
        let mut queue = self.lock();
        queue.work.push_back(work);
        if queue.idle >= queue.work.len() {
            // Without the lock, which the worker takes first.
            drop(queue);
            self.changed.notify_one();
            return Ok(());
        }
        // The lock is held while the thread is made. Otherwise a worker that becomes idle could take this work, and
        // `pop_back` could return the work of another caller.
        match Builder::new()
            .name("blocking".to_owned())
            .stack_size(STACK)
            .spawn(|| self.work())
        {
            Ok(_) => {
                queue.idle += 1;
                Ok(())
            }
            Err(error) => match queue.work.pop_back() {
                Some(work) => Err((work, error)),
                None => Ok(()),
            },
        }
    }

    /// The life of a worker. A new worker counts as idle from its beginning.
    fn work(&self) {
        loop {
            let queue = self.lock();
            let (mut queue, _) = self
                .changed
                .wait_timeout_while(queue, IDLE, |queue| queue.work.is_empty())
                .unwrap_or_else(PoisonError::into_inner);
            queue.idle -= 1;
            let Some(work) = queue.work.pop_front() else {
                return;
            };
            drop(queue);
            work();
            self.lock().idle += 1;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::sync::mpsc;

    use super::*;

    #[tokio::test]
    async fn work_is_done_on_another_thread_and_answered() {
        let here = std::thread::current().id();
        for run_on in 0..3 {
            let there = run(move || Ok((run_on, std::thread::current().id())))
                .await
                .unwrap();
            assert_eq!(there.0, run_on);
            assert_ne!(there.1, here);
        }
    }

    #[tokio::test]
    async fn no_work_waits_behind_other_work() {
        // Each piece of work waits until the next one begins. With fewer threads than work the test would hang.
        let (mut chain, mut waiting) = (None::<mpsc::Sender<()>>, Vec::new());
        for _ in 0..20 {
            let (begun, begins) = mpsc::channel();
            let before = chain.replace(begun);
            waiting.push(tokio::spawn(run(move || {
                if let Some(before) = before {
                    before.send(()).unwrap();
                }
                Ok(begins.recv().is_ok())
            })));
            tokio::task::yield_now().await;
        }
        chain.take().unwrap().send(()).unwrap();
        for worker in waiting {
            assert!(worker.await.unwrap().unwrap());
        }
    }
}
