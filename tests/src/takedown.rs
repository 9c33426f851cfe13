//! Removes everything that carries a slot's names, in whatever state a test ended.
//!
//! The takedown runs at a test's end, and in a guard. The guard is a process that holds the slot's lock and reads a
//! pipe from the test. When the pipe closes without a word, the test was killed (for example by nextest's timeout), and
//! the guard takes the slot down. Only processes with the slot's names are ended, each by its pid.

use std::fs;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Pid, Signal, kill_process};

use crate::leaks::{
    self, bundles, cgroup_parents, cgroups, grpc_address, mounts, processes, shim_socket,
};
use crate::proc::Process;
use crate::slot::{Names, Slot};
use crate::until::{ok_if, within};

/// Ends and removes everything with the slot's names. Gives back what could not be removed, one line each.
pub fn take_down(names: &Names) -> Vec<String> {
    let tasks = bundles(names);
    let mut left = Vec::new();
    thaw(names);
    left.extend(end_processes(names).err());
    // The next test in the slot may use the same ids again.
    forget_runc_state(names);
    left.extend(unmount_all(names));
    delete_links(names);
    stop_slice(names);
    left.extend(remove_cgroups(names).err());
    for task in &tasks {
        let _ = fs::remove_file(shim_socket(&grpc_address(names), task));
        let _ = fs::remove_dir_all(runc_state(&task.namespace).join(&task.id));
    }
    // Tasks without a bundle may have left state, too. Only this slot has a containerd namespace of this name.
    forget_runc_state(names);
    if let Err(error) = fs::remove_dir_all(names.directory())
        && error.kind() != std::io::ErrorKind::NotFound
    {
        left.push(format!("{}: {error}", names.directory().display()));
    }
    left
}

/// A frozen process (cgroup v1 and v2) does not die before it is thawed.
fn thaw(names: &Names) {
    for group in cgroups(names) {
        for (file, value) in [("freezer.state", "THAWED"), ("cgroup.freeze", "0")] {
            if group.join(file).exists() {
                let _ = fs::write(group.join(file), value);
            }
        }
    }
}

/// Sends SIGKILL to the slot's processes until all have ended.
fn end_processes(names: &Names) -> Result<(), String> {
    within(Duration::from_secs(10), || {
        let alive: Vec<_> = processes(names)
            .into_iter()
            .filter(|process| process.state != 'Z')
            .collect();
        for process in &alive {
            if let Some(pid) = Pid::from_raw(process.pid) {
                let _ = kill_process(pid, Signal::KILL);
            }
        }
        ok_if(alive.is_empty(), || {
            let lines: Vec<_> = alive.iter().map(Process::describe).collect();
            lines.join("; ")
        })
    })
}

/// Where runc keeps its state of the containers of a containerd namespace.
fn runc_state(namespace: &str) -> PathBuf {
    Path::new("/run/containerd/runc").join(namespace)
}

/// Removes runc's state of the slot's own containerd namespace.
fn forget_runc_state(names: &Names) {
    let _ = fs::remove_dir_all(runc_state(&names.name()));
}

/// Unmounts everything below the slot's directory, the last mount first. Gives back what is still mounted.
fn unmount_all(names: &Names) -> Vec<String> {
    for point in mounts(names).iter().rev() {
        let _ = unmount(point, UnmountFlags::DETACH);
    }
    mounts(names)
        .iter()
        .map(|point| format!("mount {}", point.display()))
        .collect()
}

fn delete_links(names: &Names) {
    for link in leaks::links(names) {
        // The far end's namespace may have taken the link along in the meantime.
        let _ = Command::new("ip")
            .args(["link", "delete", &link])
            .stderr(Stdio::null())
            .status();
    }
}

/// A slice that systemd has made for the test's pods stays until it is stopped: only systemd may remove its cgroup.
fn stop_slice(names: &Names) {
    if cgroup_parents(names)
        .iter()
        .any(|group| group.ends_with(names.slice()))
    {
        let _ = Command::new("systemctl")
            .args(["stop", &names.slice()])
            .stderr(Stdio::null())
            .status();
    }
}

/// Removes the slot's cgroups, from the leaves to the parents.
fn remove_cgroups(names: &Names) -> Result<(), String> {
    within(Duration::from_secs(3), || {
        for group in cgroups(names).iter().rev().chain(&cgroup_parents(names)) {
            let _ = fs::remove_dir(group);
        }
        let stay: Vec<_> = cgroup_parents(names)
            .iter()
            .map(|group| group.display().to_string())
            .collect();
        ok_if(stay.is_empty(), || format!("cgroups {}", stay.join(" ")))
    })
}

/// The process that takes a slot down when the slot's test cannot.
#[derive(Debug)]
pub struct Guard {
    child: Child,
    pipe: Option<ChildStdin>,
}

impl Guard {
    /// Starts the guard, which shares the slot's lock.
    pub fn start(slot: &Slot) -> Self {
        let mut child = Command::new(crate::lab::probe())
            .arg("guard")
            .arg(slot.names.number().to_string())
            .stdin(Stdio::piped())
            // The lock lives as long as a process has the file open.
            .stdout(Stdio::from(slot.lock()))
            .stderr(Stdio::null())
            .spawn()
            .expect("start `probe guard`");
        let pipe = child.stdin.take();
        Self { child, pipe }
    }

    /// Ends the guard after a test that has cleaned up by itself.
    pub fn dismiss(&mut self) {
        if let Some(mut pipe) = self.pipe.take() {
            let _ = pipe.write_all(b"done");
        }
        let _ = self.child.wait();
    }
}

/// The guard's own program: waits for the test's end on stdin.
pub fn guard_main(number: u8) {
    // Out of the test's process group: a signal to the test's group must not end the guard.
    let _ = rustix::process::setsid();
    let mut word = Vec::new();
    let _ = std::io::stdin().read_to_end(&mut word);
    if word != b"done" {
        take_down(&Names::of(number));
    }
}
