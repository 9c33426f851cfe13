//! What keeps the namespaces alive: a thread, or for what a thread cannot hold, a process that the thread starts.

pub(crate) mod process;
pub(crate) mod thread;
