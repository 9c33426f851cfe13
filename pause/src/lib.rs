//! What a pod sandbox is to the kernel.
