//! The virtual machine of the tests: see README.md beside this file.
#![allow(
    clippy::print_stderr,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a command line tool of the tests"
)]

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
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
  vm exec PROGRAM…   bring a test program into that VM, with its arguments, and run the program there: cargo's runner
  vm agent           in the VM: run what the tests ask for";

/// The longest time for the VM's boot: software emulation, on a machine that may be busy.
const BOOT: Duration = Duration::from_secs(600);

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
        ["exec", program, ref rest @ ..] => exec(Path::new(program), rest),
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn agent() -> TcpStream {
    let address = std::env::var(vm::ADDRESS).expect("no VM: call me below `vm run`");
    vm::connect(&address).expect("connect to the VM")
}

/// Runs a test program of the VM's kind of machine.
fn exec(program: &Path, arguments: &[&str]) -> ExitCode {
    let code = vm::bring_and_run(&mut agent(), program, arguments, &mut io::stdout());
    ExitCode::from(u8::try_from(code.expect("run in the VM")).unwrap_or(255))
}

fn inside(command: &str) -> ExitCode {
    let mut agent = agent();
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
        let guest = Guest::of_lab(&parts)?;
        let disk = lab_disk(folder.path(), &guest.agent()?)?;
        // A port that is free now, and most likely still free when QEMU binds it.
        let port = TcpListener::bind("127.0.0.1:0")
            .and_then(|listener| listener.local_addr())
            .map_err(|error| format!("no free port: {error}"))?
            .port();
        let qemu = qemu(guest, &parts, &disk, port)
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

/// What kind of machine the VM is.
#[derive(Clone, Copy)]
enum Guest {
    Amd64,
    Arm64,
}

impl Guest {
    /// The kind that `tests/lab/prepare vm` has made.
    fn of_lab(parts: &Path) -> Result<Self, String> {
        let file = parts.join("arch");
        let name = fs::read_to_string(&file)
            .map_err(|error| format!("{}: {error}: run tests/lab/prepare vm", file.display()))?;
        match name.trim() {
            "amd64" => Ok(Self::Amd64),
            "arm64" => Ok(Self::Arm64),
            other => Err(format!("{}: no machine {other:?}", file.display())),
        }
    }

    /// The name that the kernel, Rust and QEMU have for the processor.
    fn processor(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64",
            Self::Arm64 => "aarch64",
        }
    }

    /// This program, built for the machine, as cargo puts it.
    fn agent(self) -> Result<PathBuf, String> {
        let ourselves = std::env::current_exe().map_err(|error| error.to_string())?;
        if self.processor() == std::env::consts::ARCH {
            return Ok(ourselves);
        }
        let triple = format!("{}-unknown-linux-gnu", self.processor());
        // <target folder>/<triple>/<profile>/vm
        let (profile, folder) = (ourselves.ancestors().nth(1), ourselves.ancestors().nth(3));
        let agent = profile
            .and_then(Path::file_name)
            .zip(folder)
            .map(|(profile, folder)| folder.join(&triple).join(profile).join("vm"));
        agent.filter(|agent| agent.is_file()).ok_or_else(|| {
            format!("no agent: cargo build -p shim-tests --bin vm --target {triple}")
        })
    }

    /// The board, the processor, and where the console is.
    ///
    /// Software emulation: the machine that runs the tests is often a VM itself, and seldom lends its KVM. Of the Arm
    /// processors, the Neoverse N1 has each size of pages, and no signed pointers, which are slow to emulate.
    fn board(self) -> [&'static str; 3] {
        match self {
            Self::Amd64 => ["q35", "max", "ttyS0"],
            Self::Arm64 => ["virt,gic-version=3", "neoverse-n1", "ttyAMA0"],
        }
    }
}

/// Makes a disk with the lab for one VM: the containerds, runc, the parts of the images, and the agent.
fn lab_disk(folder: &Path, agent: &Path) -> Result<PathBuf, String> {
    let (stage, disk) = (folder.join("lab"), folder.join("lab.ext4"));
    fs::create_dir(&stage).map_err(|error| format!("{}: {error}", stage.display()))?;
    let entries = fs::read_dir(lab()).map_err(|error| format!("{}: {error}", lab().display()))?;
    // Debian's packages, this machine's tools, files that tests of this machine left in the lab, and the node are of no use
    // in the VM.
    let useless = ["apt", "debs", "tools", "failed", "vm", "images", "node"];
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
    command(Command::new("cp").arg(agent).arg(stage.join("vm")))?;
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

fn qemu(guest: Guest, parts: &Path, disk: &Path, port: u16) -> Command {
    let mut command = unpacked_qemu(&parts.join("qemu"), guest);
    add_machine(&mut command, guest);
    add_kernel(&mut command, guest, parts);
    add_disks(&mut command, &parts.join("root.ext4"), disk);
    add_devices(&mut command, port);
    command.stdin(Stdio::null());
    command
}

/// QEMU as the lab unpacked it, with its own loader and libraries: this machine's may not fit.
fn unpacked_qemu(folder: &Path, guest: Guest) -> Command {
    let this = std::env::consts::ARCH;
    let libraries = folder.join(format!("usr/lib/{this}-linux-gnu"));
    let loader = match this {
        "x86_64" => "lib64/ld-linux-x86-64.so.2",
        _ => "lib/ld-linux-aarch64.so.1",
    };
    let share = folder.join("usr/share");
    // `setpriv`: QEMU dies with this program.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--"])
        .arg(folder.join(loader))
        .arg("--library-path")
        .arg(&libraries)
        .arg(folder.join(format!("usr/bin/qemu-system-{}", guest.processor())))
        .env("QEMU_MODULE_DIR", libraries.join("qemu"))
        .arg("-L")
        .arg(share.join("qemu"))
        .arg("-L")
        .arg(share.join("seabios"));
    command
}

fn add_machine(command: &mut Command, guest: Guest) {
    let [board, processor, _] = guest.board();
    let processors =
        std::thread::available_parallelism().map_or(2, |number| number.get().clamp(2, 4));
    command.args([
        "-machine",
        board,
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        processor,
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

fn add_kernel(command: &mut Command, guest: Guest, parts: &Path) {
    let [_, _, console] = guest.board();
    command.args(["-display", "none", "-serial"]);
    command.arg(format!("file:{}", parts.join("console.log").display()));
    command.arg("-kernel").arg(parts.join("vmlinuz"));
    command.arg("-initrd").arg(parts.join("initrd"));
    command.arg("-append").arg(format!(
        "console={console} quiet net.ifnames=0 panic=-1 mitigations=off no_timer_check systemd.show_status=true \
         systemd.default_timeout_start_sec=600",
    ));
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
