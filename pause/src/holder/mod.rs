//! What keeps the namespaces alive: a thread, and for what a thread cannot hold, a process that it starts.

pub(crate) mod process;
pub(crate) mod thread;
