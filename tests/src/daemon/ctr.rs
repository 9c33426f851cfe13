//! `ctr`, and plain containers started by `ctr`.

use std::process::{Command, Output, Stdio};
use std::time::Duration;

use super::Daemon;
use crate::image;
use crate::lab::{self, ShimUnderTest};
use crate::leaks::{self, MARK};
use crate::slot::text;
use crate::until::{eventually, ok_if};

impl Daemon {
    /// `ctr` in the slot's own containerd namespace.
    pub fn ctr_command(&self) -> Command {
        self.ctr_command_in(&self.names.name())
    }

    /// `ctr` in another containerd namespace, without a subcommand yet.
    pub fn ctr_command_in(&self, namespace: &str) -> Command {
        let mut command = Command::new(self.version().binaries().join("ctr"));
        command
            .args([
                "--address",
                &leaks::grpc_address(&self.names),
                "--namespace",
                namespace,
            ])
            .env("PATH", lab::path(&self.directory().join("bin")))
            .env(MARK, self.directory())
            .stdin(Stdio::null());
        command
    }

    /// Runs `ctr`; panics when it fails.
    #[track_caller]
    pub fn ctr(&self, arguments: &[&str]) -> String {
        checked(&self.names.name(), arguments, &self.try_ctr(arguments))
    }

    /// Runs `ctr` in another containerd namespace.
    #[track_caller]
    pub fn ctr_in(&self, namespace: &str, arguments: &[&str]) -> String {
        let output = self
            .ctr_command_in(namespace)
            .args(arguments)
            .output()
            .unwrap();
        checked(namespace, arguments, &output)
    }

    /// Runs `ctr`.
    pub fn try_ctr(&self, arguments: &[&str]) -> Output {
        self.ctr_command().args(arguments).output().unwrap()
    }

    /// Puts a task of the slot's own containerd namespace on the list of tasks that must be gone at [`Self::end`].
    pub fn expect_task(&self, id: &str) {
        self.seen.borrow_mut().task(&self.names.name(), id);
    }

    /// `ctr run` with the runtime under test; the container is on the list of [`Self::end`].
    pub fn ctr_run(&self, flags: &[&str], id: &str, command: &[&str]) -> Command {
        let mut run = self.ctr_command();
        run.args(["run", "--runtime", ShimUnderTest::get().runtime_type()]);
        run.args(["--fifo-dir", &text(&self.directory().join("fifo"))])
            .args(flags);
        // With --rootfs the first argument is a folder, and the id is the second.
        if !flags.contains(&"--rootfs") {
            self.expect_task(id);
            self.ctr_image();
            run.arg(image::BUSYBOX);
        }
        run.arg(id).args(command);
        run
    }

    /// `ctr run --detach` that must succeed.
    #[track_caller]
    pub fn run_detached(&self, flags: &[&str], id: &str, command: &[&str]) {
        let flags = [&["--detach"], flags].concat();
        let output = self.ctr_run(&flags, id, command).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        self.look();
    }

    /// The pid and the state of a task that `ctr tasks list` shows.
    #[track_caller]
    pub fn task(&self, id: &str) -> Option<(i32, String)> {
        let list = self.ctr(&["tasks", "list"]);
        let mut words = list
            .lines()
            .map(str::split_whitespace)
            .find(|words| words.clone().next() == Some(id))?
            .skip(1);
        Some((words.next()?.parse().ok()?, words.next()?.to_owned()))
    }

    /// Waits until a task is in this state.
    #[track_caller]
    pub fn wait_for_task(&self, id: &str, state: &str) {
        eventually(Duration::from_secs(20), || {
            let task = self.task(id);
            ok_if(task.as_ref().is_some_and(|(_, now)| now == state), || {
                format!("{id} is {task:?}, not {state}")
            })
        });
    }

    /// `ctr tasks delete`. Gives the task's exit code, which `ctr` prints in a warning.
    #[track_caller]
    pub fn delete_task(&self, id: &str) -> u32 {
        let output = self.try_ctr(&["tasks", "delete", id]);
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8_lossy(&output.stderr);
        let code = text
            .split("exit code ")
            .nth(1)
            .map_or("0", |rest| rest.split('"').next().unwrap());
        code.trim().parse().unwrap_or_else(|_| panic!("{output:?}"))
    }

    /// `ctr tasks exec` of a command.
    pub fn ctr_exec(&self, flags: &[&str], exec: &str, id: &str, command: &[&str]) -> Command {
        let mut run = self.ctr_command();
        run.args(["tasks", "exec", "--exec-id", exec])
            .args(["--fifo-dir", &text(&self.directory().join("fifo"))])
            .args(flags)
            .arg(id)
            .args(command);
        run
    }

    /// Imports busybox into the slot's own containerd namespace, once.
    pub fn ctr_image(&self) {
        if !self
            .ctr(&["images", "list", "--quiet"])
            .contains(image::BUSYBOX)
        {
            self.ctr(&["images", "import", &text(&image::busybox())]);
        }
    }
}

#[track_caller]
fn checked(namespace: &str, arguments: &[&str], output: &Output) -> String {
    assert!(
        output.status.success(),
        "ctr -n {namespace} {} failed: {}{}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}
