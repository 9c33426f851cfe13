//! The virtual machine of the tests: see README.md beside this file.
#![allow(
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a command line tool of the tests"
)]

use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};
use std::{fs, io};

use serde_json::json;
use shim_tests::lab::lab;
use shim_tests::until::{ok_if, within};
use shim_tests::vm;

const USAGE: &str = "usage:
  vm run COMMAND…    start the VM, run a command beside it, end the VM; the tests of the binary `vm` find it
  vm sh COMMAND…     run a command in the VM that `vm run` has started: vm run vm sh systemctl status
  vm agent           in the VM: run what the tests ask for";

/// The longest time for the VM's boot: software emulation, on a machine that may be busy.
const BOOT: Duration = Duration::from_secs(240);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match words[..] {
        ["agent"] => {
            vm::agent().expect("listen");
            ExitCode::SUCCESS
        }
        ["run", program, ref rest @ ..] => run(program, rest),
        ["sh", ref command @ ..] if !command.is_empty() => inside(&command.join(" ")),
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn inside(command: &str) -> ExitCode {
    let address = std::env::var(vm::ADDRESS).expect("no VM: call me below `vm run`");
    let mut agent = vm::connect(&address).expect("connect to the VM");
    let environment =
        json!({ "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LAB_DIR": "/lab", "TERM": "dumb" });
    let mut out = io::stdout();
    let code = vm::run(
        &mut agent,
        "/bin/sh",
        &["-c", command],
        &environment,
        &mut out,
    );
    ExitCode::from(u8::try_from(code.expect("run in the VM")).unwrap_or(255))
}

fn run(program: &str, arguments: &[&str]) -> ExitCode {
    let start = Instant::now();
    let mut machine = match Machine::start() {
        Ok(machine) => machine,
        Err(why) => {
            eprintln!("vm: {why}");
            return ExitCode::FAILURE;
        }
    };
    eprintln!("vm: up after {:.1} s", start.elapsed().as_secs_f64());
    let status = Command::new(program)
        .args(arguments)
        .env(vm::ADDRESS, &machine.address)
        .status();
    machine.end();
    match status {
        Ok(status) if status.success() => ExitCode::SUCCESS,
        Ok(status) => ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1)),
        Err(error) => {
            eprintln!("vm: {program}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// A running VM. The VM ends with this program, even when the program is killed.
struct Machine {
    qemu: Child,
    address: String,
}

impl Machine {
    /// Boots a VM and waits until its agent answers.
    fn start() -> Result<Self, String> {
        let parts = lab().join("vm");
        if !parts.join("root.ext4").is_file() {
            return Err(format!(
                "no VM in {}: run tests/lab/prepare vm",
                parts.display()
            ));
        }
        let folder = tempfile::tempdir_in(&parts)
            .map_err(|error| format!("{}: {error}", parts.display()))?;
        let disk = lab_disk(folder.path())?;
        // A port that is free now, and most likely still free when QEMU binds it.
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .map_err(|error| format!("no free port: {error}"))?
            .port();
        let qemu = qemu(&parts, &disk, port)
            .spawn()
            .map_err(|error| format!("start QEMU by setpriv: {error}; is util-linux installed?"))?;
        let mut machine = Self {
            qemu,
            address: format!("127.0.0.1:{port}"),
        };
        let up = within(BOOT, || {
            if let Ok(Some(status)) = machine.qemu.try_wait() {
                return Ok(Err(format!("QEMU ended, {status}")));
            }
            vm::connect(&machine.address)
                .map(|_| Ok(()))
                .map_err(|error| format!("the VM does not answer: {error}"))
        });
        let failure = up.and_then(|ended| ended).err();
        if let Some(why) = failure {
            machine.end();
            return Err(format!(
                "{why}; its console: {}",
                parts.join("console.log").display()
            ));
        }
        // QEMU has the disk open: a file without a name goes with QEMU's end.
        let _ = folder.close();
        Ok(machine)
    }

    fn end(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.end();
    }
}

/// Makes a disk with the lab for one VM: the containerds, runc, the parts of the images, and this program.
fn lab_disk(folder: &Path) -> Result<std::path::PathBuf, String> {
    let (stage, disk) = (folder.join("lab"), folder.join("lab.ext4"));
    fs::create_dir(&stage).map_err(|error| format!("{}: {error}", stage.display()))?;
    let entries = fs::read_dir(lab()).map_err(|error| format!("{}: {error}", lab().display()))?;
    // Debian's packages, files that tests of this machine left in the lab, and the node are of no use in the VM.
    let useless = ["apt", "debs", "failed", "vm", "images", "node"];
    let parts: Vec<_> = entries
        .flatten()
        .filter(|entry| {
            entry.path().is_dir() && !useless.iter().any(|name| entry.file_name() == *name)
        })
        .map(|entry| entry.path())
        .collect();
    // Links into this machine (runc, the CNI plugins) become copies of their targets.
    command(
        Command::new("cp")
            .args(["--recursive", "--dereference", "--reflink=auto"])
            .args(parts)
            .arg(&stage),
    )?;
    let ourselves = std::env::current_exe().map_err(|error| error.to_string())?;
    command(Command::new("cp").arg(ourselves).arg(stage.join("vm")))?;
    command(
        Command::new("mke2fs")
            .args(["-q", "-t", "ext4", "-O", "^has_journal", "-d"])
            .args([&stage, &disk])
            .arg("3G")
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin"),
    )?;
    Ok(disk)
}

fn command(command: &mut Command) -> Result<(), String> {
    let program = command.get_program().to_owned();
    let output = command
        .output()
        .map_err(|error| format!("{}: {error}", program.display()))?;
    ok_if(output.status.success(), || {
        format!(
            "{}: {}",
            program.display(),
            String::from_utf8_lossy(&output.stderr).trim()
        )
    })
}

fn qemu(parts: &Path, disk: &Path, port: u16) -> Command {
    let mut command = unpacked_qemu(&parts.join("qemu"));
    add_machine(&mut command);
    add_kernel(&mut command, parts);
    add_disks(&mut command, &parts.join("root.ext4"), disk);
    add_devices(&mut command, port);
    command.stdin(Stdio::null());
    command
}

/// QEMU as the lab unpacked it, with its own loader and libraries: this machine's may not fit.
fn unpacked_qemu(folder: &Path) -> Command {
    let libraries = folder.join("usr/lib/x86_64-linux-gnu");
    let share = folder.join("usr/share");
    // `setpriv`: QEMU dies with this program.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--"])
        .arg(folder.join("lib64/ld-linux-x86-64.so.2"))
        .arg("--library-path")
        .arg(&libraries)
        .arg(folder.join("usr/bin/qemu-system-x86_64"))
        .env("QEMU_MODULE_DIR", libraries.join("qemu"))
        .arg("-L")
        .arg(share.join("qemu"))
        .arg("-L")
        .arg(share.join("seabios"));
    command
}

fn add_machine(command: &mut Command) {
    // Software emulation: the machine that runs the tests is often a VM itself, and seldom lends its KVM.
    let processors =
        std::thread::available_parallelism().map_or(2, |number| number.get().clamp(2, 4));
    command.args([
        "-machine",
        "q35",
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        "max",
        "-m",
        "3G",
    ]);
    command.args([
        "-smp",
        &processors.to_string(),
        "-nodefaults",
        "-no-user-config",
        "-no-reboot",
    ]);
}

fn add_kernel(command: &mut Command, parts: &Path) {
    command.args(["-display", "none", "-serial"]);
    command.arg(format!("file:{}", parts.join("console.log").display()));
    command.arg("-kernel").arg(parts.join("vmlinuz"));
    command.arg("-initrd").arg(parts.join("initrd"));
    command.args([
        "-append",
        "console=ttyS0 quiet net.ifnames=0 panic=-1 mitigations=off no_timer_check systemd.show_status=true \
         systemd.default_timeout_start_sec=600",
    ]);
}

/// Adds the root, whose writes go to a file without a name, and the lab's disk, which belongs to this VM alone.
fn add_disks(command: &mut Command, root: &Path, disk: &Path) {
    command.args([
        "-drive",
        &format!("file={},if=virtio,format=raw,snapshot=on", root.display()),
    ]);
    command.args([
        "-drive",
        &format!("file={},if=virtio,format=raw,cache=unsafe", disk.display()),
    ]);
}

/// Adds random numbers, and a network in which only the agent can be reached, at `port` of this machine.
fn add_devices(command: &mut Command, port: u16) {
    command.args([
        "-device",
        "virtio-rng-pci",
        "-device",
        "virtio-net-pci,netdev=net,romfile=",
    ]);
    command.args([
        "-netdev",
        &format!(
            "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:{}",
            vm::PORT
        ),
    ]);
}
