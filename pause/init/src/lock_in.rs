//! What the holder gives up: mounts, capabilities, ids, files, system calls.

use crate::filter;
use crate::hold::{send, Failed, Step, LIFELINE};
use crate::name;
use crate::sys::{self, EINVAL};

/// Leaves the process without anything to find or to use, and reports that the holder is ready.
pub fn lock_in() -> Result<(), Failed> {
    enter_empty_root()?;
    drop_privileges()?;
    // A change of ids makes the process dumpable again and clears PDEATHSIG, so these calls come after that change.
    sys::set_no_new_privileges().map_err(Step::NoNewPrivileges.failed())?;
    sys::set_not_dumpable().map_err(Step::NotDumpable.failed())?;
    sys::die_with_parent().map_err(Step::DieWithParent.failed())?;
    end_if_orphan();
    let _ = sys::set_comm(c"pause");
    name::publish().map_err(Step::Name.failed())?;
    name::forget_start();
    close_files();
    send(b'r', 0);
    filter::install().map_err(Step::Seccomp.failed())?;
    Ok(())
}

/// Enters a mount namespace whose root is an empty, read-only file system, so that `/proc/1/root` leads nowhere, and a
/// new cgroup namespace, so that `/proc/1/ns/cgroup` does not lead to the root of the node's cgroups.
fn enter_empty_root() -> Result<(), Failed> {
    const RDONLY_NOSUID_NODEV_NOEXEC: usize = 1 | 2 | 4 | 8;
    sys::unshare(sys::CLONE_NEWNS | sys::CLONE_NEWCGROUP).map_err(Step::MountNamespace.failed())?;
    let entered = || {
        // Else the node would see the mounts that follow.
        sys::make_private(c"/")?;
        let options = c"size=4k,nr_inodes=2,mode=555";
        sys::mount(c"tmpfs", c"/proc", RDONLY_NOSUID_NODEV_NOEXEC, options)?;
        sys::chdir(c"/proc")?;
        match sys::pivot_root(c".", c".") {
            // The old root now lies on top of the new one.
            Ok(_) => sys::detach(c".")?,
            // The node runs from its initramfs, which pivot_root(2) cannot move.
            Err(_) => sys::chroot(c".")?,
        };
        sys::chdir(c"/")
    };
    entered().map_err(Step::EmptyRoot.failed())?;
    Ok(())
}

/// Drops the capabilities for good, and changes to ids that own nothing.
fn drop_privileges() -> Result<(), Failed> {
    empty_bounding_set()?;
    let _ = sys::clear_ambient_set();
    sys::clear_groups().map_err(Step::Identity.failed())?;
    become_nobody()?;
    sys::clear_capabilities().map_err(Step::Capabilities.failed())?;
    Ok(())
}

/// No capability can come back afterwards. Needs CAP_SETPCAP, so this comes before the ids change.
fn empty_bounding_set() -> Result<(), Failed> {
    for capability in 0..64 {
        match sys::drop_from_bounding_set(capability) {
            Ok(_) => {}
            // The kernel's capabilities are numbered without a gap.
            Err(EINVAL) => break,
            Err(errno) => return Err(Failed(Step::Capabilities, errno)),
        }
    }
    Ok(())
}

/// Takes 65535, as the pause images do, else 65534, else 0: a user namespace may not map the first two. Its user 0 is
/// nobody on the node, and without capabilities nobody in the user namespace either.
fn become_nobody() -> Result<(), Failed> {
    for id in [65535, 65534, 0] {
        match sys::set_group(id).and_then(|_| sys::set_user(id)) {
            Ok(_) => break,
            Err(EINVAL) if id != 0 => {}
            Err(errno) => return Err(Failed(Step::Identity, errno)),
        }
    }
    Ok(())
}

/// Ends the process if the shim died before `die_with_parent`: the shim's end of the lifeline is closed then.
fn end_if_orphan() {
    match sys::poll(LIFELINE) {
        Ok(events) if events & sys::POLLHUP == 0 => {}
        Ok(_) | Err(_) => sys::exit(1),
    }
}

/// Closes every file but the lifeline, which the last step closes.
fn close_files() {
    const FIRST: usize = LIFELINE + 1;
    if sys::close_from(FIRST).is_err() {
        // Before Linux 5.9. The starting side passes three files and marks its others close-on-exec.
        for fd in FIRST..1024 {
            let _ = sys::close(fd);
        }
    }
}
