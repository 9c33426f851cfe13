//! runc: one function per command. The shim asks the kernel, and not runc, for what the kernel answers directly:
//! signals, processes, freezing. Where a run of runc can be spared, [`super::shortcuts`] spares the run.
//!
//! Each run of runc has a log of its own, and runc writes its errors there as JSON lines. The last error becomes the
//! text of the shim's error ([`super::log::reason`]). The exit of runc comes through the one waiter
//! ([`crate::kernel::exits`]). runc dies with the shim, so a killed shim leaves no half-run runc.

use std::ffi::OsStr;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use ::log::debug;
use rustix::process::Pid;
use tokio::time::timeout;

use super::bundle::RuncRecord;
use super::call::{Call, Running};
use super::criu::{Checkpoint, SavedStreams, Work};
use super::log::reason;
use super::options::Options;
use super::release::{Program, Runtime, Tested};
use super::shortcuts::{self, Shortcut, crun};
use crate::error::{Error, IoError, Result};
use crate::io::Streams;
use crate::kernel::blocking;
use crate::kernel::cgroup::{MoveInPlace, Unit};
use crate::kernel::exits::{Claim, Exits};

/// The file in the bundle that runc writes the init's pid into.
const INIT_PID: &str = "init.pid";

/// How long a `runc delete` may take: more than runc itself waits for systemd (30 s).
const DELETE: Duration = Duration::from_secs(45);

/// How to call runc for one container.
#[derive(Debug, Clone)]
pub struct Runc {
    id: String,
    bundle: PathBuf,
    record: RuncRecord,
    no_pivot_root: bool,
    no_new_keyring: bool,
    /// The program when the container was made, if the shim may do what is shorter with a known release of runc.
    program: Option<Program>,
    /// Where the programs' releases are kept.
    releases: PathBuf,
    criu_work_path: Option<PathBuf>,
    /// Whether a run of runc dies with the shim, so that a killed shim leaves no half-run runc.
    ends_with_shim: bool,
    exits: Arc<Exits>,
}

impl Runc {
    /// runc as `options` describe it, for container `id` of containerd namespace `namespace`.
    pub fn new(
        id: &str,
        bundle: &Path,
        namespace: &str,
        options: &Options,
        exits: &Arc<Exits>,
    ) -> Self {
        let record = RuncRecord {
            binary: options.binary_name.clone(),
            root: options.root.join(namespace),
            systemd_cgroup: options.systemd_cgroup,
        };
        let program = options.shortcuts.then(|| Program::find(&record.binary));
        Self {
            id: id.to_owned(),
            bundle: bundle.to_owned(),
            program: program.flatten(),
            releases: options.root.clone(),
            record,
            no_pivot_root: options.no_pivot_root,
            no_new_keyring: options.no_new_keyring,
            criu_work_path: options.criu_work_path.clone(),
            ends_with_shim: true,
            exits: exits.clone(),
        }
    }

    /// The runc that deletes a container whose shim has died. `logs` is a folder for runc's log: the container's own
    /// bundle may be gone.
    pub fn recorded(id: &str, logs: &Path, record: &RuncRecord, exits: &Arc<Exits>) -> Self {
        Self {
            id: id.to_owned(),
            bundle: logs.to_owned(),
            record: record.clone(),
            no_pivot_root: false,
            no_new_keyring: false,
            program: None,
            releases: PathBuf::new(),
            criu_work_path: None,
            // containerd gives `delete` some seconds; runc may finish after that.
            ends_with_shim: false,
            exits: exits.clone(),
        }
    }

    /// The same runc, with the logs of its runs in `folder`.
    pub(super) fn with_logs_in(mut self, folder: &Path) -> Self {
        self.bundle = folder.to_owned();
        self
    }

    /// What `delete` needs to call the same runc.
    pub fn record(&self) -> &RuncRecord {
        &self.record
    }

    /// `runc create`: makes the container, whose init then waits for [`Runc::start`].
    ///
    /// # Errors
    /// `Runc` with runc's own words.
    pub async fn create(&self, streams: Streams) -> Result<Claim> {
        let pid_file = self.bundle.join(INIT_PID);
        let mut call = self.call("create");
        call.command
            .arg("--bundle")
            .arg(&self.bundle)
            .arg("--pid-file")
            .arg(&pid_file);
        if self.no_pivot_root {
            call.command.arg("--no-pivot");
        }
        if self.no_new_keyring {
            call.command.arg("--no-new-keyring");
        }
        call.streams(streams);
        self.learn();
        self.run_and_claim(call, &pid_file).await
    }

    /// `runc start`: the init executes the user's program. `ended` resolves when the init has ended.
    ///
    /// # Errors
    /// `Runc` with runc's own words.
    pub async fn start(&self, ended: impl Future<Output = ()>) -> Result<()> {
        let direct = match self.tested() {
            Some(known) if known.runtime == Runtime::Crun => crun::start(&self.state()),
            Some(_) => shortcuts::start(&self.state(), ended).await,
            None => Shortcut::NotHere,
        };
        match direct {
            Shortcut::Done => Ok(()),
            Shortcut::NotHere => self.simple("start", &[]).await,
            Shortcut::Dead => Err(Error::Runc {
                command: "start",
                id: self.id.clone(),
                message: "the init of the container has ended before it was started".into(),
            }),
        }
    }

    /// `runc exec --detach` of the OCI process in `process`, a JSON file.
    ///
    /// # Errors
    /// `Runc` with runc's own words.
    pub async fn exec(&self, process: &Path, pid_file: &Path, streams: Streams) -> Result<Claim> {
        let mut call = self.call("exec");
        call.command
            .arg("--process")
            .arg(process)
            .arg("--detach")
            .arg("--pid-file")
            .arg(pid_file);
        call.streams(streams);
        self.run_and_claim(call, pid_file).await
    }

    /// `runc update` with the OCI resources in `resources`, a JSON file.
    ///
    /// # Errors
    /// `Runc` with runc's own words.
    pub async fn update(&self, resources: &Path) -> Result<()> {
        self.simple(
            "update",
            &[OsStr::new("--resources"), resources.as_os_str()],
        )
        .await
    }

    /// `runc checkpoint`: saves the container with criu. `stdout` and `stderr` are containerd's names of the
    /// container's streams.
    ///
    /// # Errors
    /// `FailedPrecondition` when criu is not there, or does not work with this kernel; `Runc` with runc's and criu's own
    /// words; `Io` for criu's files.
    pub async fn checkpoint(
        &self,
        checkpoint: &Checkpoint,
        stdout: &str,
        stderr: &str,
    ) -> Result<()> {
        let streams = SavedStreams::find(stdout, stderr);
        let wanted = checkpoint.work().or(self.criu_work_path.as_deref());
        let work = Work::new(&self.bundle, wanted, &streams.when_saved())?;
        let mut call = self.call("checkpoint");
        call.command.args(checkpoint.flags());
        call.criu(&work);
        match self.run(call).await {
            Ok(()) => streams.save(&checkpoint.image),
            Err(error) => Err(work.explain(error, "dump.log", &self.exits).await),
        }
    }

    /// `runc restore` of what [`Runc::checkpoint`] saved into `image`: the container runs again.
    ///
    /// # Errors
    /// As [`Runc::checkpoint`].
    pub async fn restore(&self, image: &Path, streams: Streams) -> Result<Claim> {
        let pid_file = self.bundle.join(INIT_PID);
        let saved = SavedStreams::load(image)?;
        let wanted = self.criu_work_path.as_deref();
        let work = Work::new(&self.bundle, wanted, &saved.when_restored())?;
        let mut call = self.call("restore");
        call.command
            .arg("--image-path")
            .arg(image)
            .arg("--bundle")
            .arg(&self.bundle)
            .arg("--pid-file")
            .arg(&pid_file)
            .args(["--detach", "--no-subreaper"]);
        if self.no_pivot_root {
            call.command.arg("--no-pivot");
        }
        call.criu(&work);
        call.streams(streams);
        self.learn();
        match self.run_and_claim(call, &pid_file).await {
            Ok(claim) => Ok(claim),
            Err(error) => Err(work.explain(error, "restore.log", &self.exits).await),
        }
    }

    /// `runc delete` of a container whose processes have ended: removes runc's state and the cgroup, which has this path in
    /// the container's spec. Ends in twice [`DELETE`].
    ///
    /// # Errors
    /// `Runc` with runc's own words.
    pub async fn delete(&self, cgroup: Option<&str>) -> Result<()> {
        if let Some(known) = self.tested()
            && self.systemd_is_done(cgroup).await
        {
            let state = self.state();
            let delete = match known.runtime {
                Runtime::Runc => shortcuts::delete,
                Runtime::Crun => crun::delete,
            };
            let deleted = blocking::run_anyway(move || Ok(delete(&state))).await?;
            if deleted == Shortcut::Done {
                return Ok(());
            }
        }
        match self.delete_with(&[]).await {
            Ok(()) => Ok(()),
            // runc has no such container, or more is left of the container than should be.
            Err(_) => self.delete_by_force().await,
        }
    }

    /// `runc delete --force`: as [`Runc::delete`], but kills the processes that are left. A container that runc does
    /// not know is no error.
    ///
    /// # Errors
    /// `Runc` with runc's own words.
    pub async fn delete_by_force(&self) -> Result<()> {
        self.delete_with(&[OsStr::new("--force")]).await
    }

    async fn delete_with(&self, flags: &[&OsStr]) -> Result<()> {
        match timeout(DELETE, self.simple("delete", flags)).await {
            Ok(deleted) => deleted,
            Err(_) => Err(Error::Runc {
                command: "delete",
                id: self.id.clone(),
                message: format!("still ran after {DELETE:?}, and was killed"),
            }),
        }
    }

    async fn simple(&self, command: &'static str, flags: &[&OsStr]) -> Result<()> {
        let mut call = self.call(command);
        call.command.args(flags);
        self.run(call).await
    }

    async fn run_and_claim(&self, call: Call, pid_file: &Path) -> Result<Claim> {
        // The process may end before the shim reads the pid. The exit is then kept for the claim.
        let _expected = self.exits.expect();
        self.run(call).await?;
        Ok(self.exits.claim(read_pid(pid_file)?))
    }

    fn call(&self, name: &'static str) -> Call {
        Call::new(name, &self.bundle, &self.record)
    }

    /// What is known of the release of runc that has made the container and is still the node's.
    fn tested(&self) -> Option<&'static Tested> {
        let program = self.program.as_ref()?;
        let now = Program::find(&self.record.binary)?;
        (now == *program).then(|| program.tested(&self.releases))?
    }

    /// The directory of runc's state of the container.
    fn state(&self) -> PathBuf {
        self.record.root.join(&self.id)
    }

    /// Whether systemd has nothing to remove: a cgroup that systemd has made goes with its unit, if need be at runc's wish.
    async fn systemd_is_done(&self, cgroup: Option<&str>) -> bool {
        match cgroup.and_then(Unit::of) {
            _ if !self.record.systemd_cgroup => true,
            Some(unit) => unit.is_gone().await,
            None => false,
        }
    }

    /// Learns the program's release while runc makes the container.
    fn learn(&self) {
        if let Some(program) = self.program.clone() {
            tokio::spawn(program.learn(self.releases.clone(), self.exits.clone()));
        }
    }

    async fn run(&self, mut call: Call) -> Result<()> {
        call.id(&self.id);
        let error = |message| Error::Runc {
            command: call.name,
            id: self.id.clone(),
            message,
        };
        if self.ends_with_shim {
            pause::die_with_parent(&mut call.command);
        }
        let Claim { child, exit } = self
            .exits
            .spawn(&mut call.command)
            .map_err(|e| error(cannot_run(&self.record.binary, &e)))?;
        let running = if call.leads {
            Running::Group(child)
        } else {
            Running::Alone(child)
        };
        if call.moves() && self.tested().is_some_and(|known| known.readies(call.name)) {
            ready_the_kernel();
        }
        // Closes the shim's copies of the streams, which the command holds. runc has its own copies.
        drop(call.command);
        let exit = exit
            .await
            .map_err(|_| Error::Internal("the waiter is gone"))?;
        drop(running);
        match reason(&call.log, call.stderr, exit.status) {
            None => Ok(()),
            Some(reason) => Err(error(reason)),
        }
    }
}

/// The pid of the init, from the file that runc writes into `bundle`; none if runc has written no pid.
pub fn init_pid(bundle: &Path) -> Option<Pid> {
    read_pid(&bundle.join(INIT_PID)).ok()
}

/// Reads a pid file: one decimal number.
///
/// # Errors
/// `Io` when the file cannot be read, `Internal` when the content is no pid.
pub fn read_pid(file: &Path) -> Result<Pid> {
    let text = std::fs::read_to_string(file).map_err(IoError::at("read pid file", file))?;
    let pid = text.trim().parse().ok().and_then(Pid::from_raw);
    pid.ok_or(Error::Internal("runc wrote no pid into its pid file"))
}

/// Readies the kernel for runc's move of a process into a cgroup, see [`MoveInPlace`]. Nobody waits: runc goes on in
/// any case.
fn ready_the_kernel() {
    let failed = |error: IoError| debug!(error:%; "kernel not readied");
    match MoveInPlace::of_the_shim() {
        Ok(moved) => blocking::spawn(move || moved.make().unwrap_or_else(failed)),
        Err(error) => failed(error),
    }
}

fn cannot_run(binary: &Path, error: &std::io::Error) -> String {
    let binary = binary.display();
    if error.kind() == ErrorKind::NotFound {
        format!("{binary} is not there: install it, or name its path in the option BinaryName")
    } else {
        format!("run {binary}: {error}")
    }
}

#[cfg(test)]
mod tests;
