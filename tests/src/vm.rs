//! The tests that run in a virtual machine: see `tests/vm/README.md`.
//!
//! ```text
//!   cargo nextest ── test "resources::…::v2_1" ── TCP ── `vm agent` ── the same binary, the same test
//!                    (this machine)                       (the VM)
//! ```
//!
//! A test of the binary `vm` does not run on this machine. The test hands itself to the VM and shows the output of the
//! VM. The test fails if the test in the VM fails, or if there is no VM.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, UNIX_EPOCH};
use std::{fs, io};

use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};

use crate::lab::{self, ShimUnderTest};
use crate::slot::text;

/// The variable with the VM's address. `vm run` sets the variable on this machine.
pub const ADDRESS: &str = "SHIM_TESTS_VM";

/// A variable that is set in the VM only.
const INSIDE: &str = "SHIM_TESTS_IN_VM";

/// The variable with the number of starts in each row of the whole table of `small_limits`.
pub const WHOLE_TABLE: &str = "SMALL_LIMIT_STARTS";

/// The folder in the VM with the lab (`tests/vm/main.rs` makes the disk), and with the files that tests bring.
const LAB: &str = "/lab";

/// The port of the agent in the VM.
pub const PORT: u16 = 1024;

/// The agent's first line on every connection.
const GREETING: &str = "vm agent\n";

/// The byte after a test's output. The test's exit code follows.
const END: u8 = 0;

/// Whether this process runs in the VM.
pub fn inside() -> bool {
    std::env::var_os(INSIDE).is_some()
}

/// Runs the body of a test: here, or in the VM if the test belongs there. `module` is the test's `module_path!()`, and
/// `name` the name of the test's function.
pub fn here_or_there(module: &str, name: &str, body: impl FnOnce()) {
    match module.strip_prefix("vm::") {
        Some(_) if lab::is_given() => {
            lab::left_out(module, "the VM has the packaged containerds only");
        }
        Some(inner) if !inside() => there(&format!("{inner}::{name}")),
        _ => body(),
    }
}

fn there(test: &str) {
    let Ok(address) = std::env::var(ADDRESS) else {
        panic!(
            "{test} runs in a VM, and there is none: `make test-vm` starts one and runs the tests in it"
        );
    };
    let mut agent = connect(&address).unwrap_or_else(|error| {
        panic!(
            "the VM at {address} does not answer: {error}; its console is target/lab/vm/console.log"
        )
    });
    let result = hand_over(&mut agent, test);
    let code = result.unwrap_or_else(|error| panic!("{test} in the VM: {error}"));
    assert_eq!(
        code, 0,
        "{test} failed in the VM; what it wrote stands above"
    );
}

/// Connects to the agent and waits for its greeting.
///
/// # Errors
/// The error of connecting or reading; `InvalidData` if no agent answers.
pub fn connect(address: &str) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut greeting = [0; GREETING.len()];
    stream.read_exact(&mut greeting)?;
    if greeting != GREETING.as_bytes() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not an agent"));
    }
    stream.set_read_timeout(None)?;
    Ok(stream)
}

fn hand_over(agent: &mut TcpStream, test: &str) -> io::Result<i32> {
    let program = std::env::current_exe()?;
    bring_and_run(
        agent,
        &program,
        &[test, "--exact", "--nocapture"],
        &mut io::stderr(),
    )
}

/// Brings a test program into the VM, with the helpers beside the program and with the shim, and runs the program there.
///
/// # Errors
/// As of [`run`]; that a file cannot be read.
pub fn bring_and_run(
    agent: &mut TcpStream,
    program: &Path,
    arguments: &[&str],
    output: &mut dyn Write,
) -> io::Result<i32> {
    // Test and helpers lie as cargo puts them: `lab::helper` looks for them there.
    let name = text(Path::new(program.file_name().unwrap_or_default()));
    let (there, shim) = (
        format!("{LAB}/test/deps/{name}"),
        format!("{LAB}/shim/containerd-shim-pause-v2"),
    );
    put(agent, program, &there)?;
    for helper in ["probe", "fake-runc"] {
        let from = lab::helper_beside(program, helper);
        put(agent, &from, &format!("{LAB}/test/{helper}"))?;
    }
    let mut environment = json!({
        INSIDE: "1", "LAB_DIR": LAB, "CARGO_TARGET_DIR": format!("{LAB}/target"), "TMPDIR": "/tmp", "HOME": "/root",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    });
    if ShimUnderTest::get() == ShimUnderTest::Pause {
        put(
            agent,
            &ShimUnderTest::Pause.binary(crate::Version::newest()),
            &shim,
        )?;
        environment["SHIM_BINARY"] = shim.into();
    }
    if std::env::var_os(WHOLE_TABLE).is_some() {
        put_runtimes(agent)?;
    }
    for name in ["SHIM_UNDER_TEST", "RUST_BACKTRACE", WHOLE_TABLE] {
        if let Ok(value) = std::env::var(name) {
            environment[name] = value.into();
        }
    }
    run(agent, &there, arguments, &environment, output)
}

/// Brings the newer runtimes into the VM. They find what they are linked with at the host's path.
fn put_runtimes(agent: &mut TcpStream) -> io::Result<()> {
    for name in ["runc", "runc-1.1.15"] {
        let runtime = lab::newer_runtime(name);
        put(agent, &runtime, &format!("{LAB}/runtimes/{name}"))?;
        for library in fs::read_dir(runtime.with_file_name("lib"))? {
            let library = library?.path();
            put(agent, &library, &library.display().to_string())?;
        }
    }
    Ok(())
}

/// Brings a file into the VM, unless the file is there.
fn put(agent: &mut TcpStream, from: &Path, to: &str) -> io::Result<()> {
    let meta = fs::metadata(from)?;
    let changed = meta
        .modified()?
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let stamp = format!("{} {} {}", from.display(), meta.len(), changed.as_nanos());
    say(
        agent,
        &json!({ "put": to, "stamp": stamp, "size": meta.len() }),
    )?;
    if listen(agent)? == "send" {
        io::copy(&mut fs::File::open(from)?.take(meta.len()), agent)?;
        listen(agent)?;
    }
    Ok(())
}

/// Runs a program in the VM; the output goes to `output`. Gives the exit code; 128 plus the signal's number if a signal
/// ended the program. The program is killed when the connection ends.
///
/// # Errors
/// The error of the connection; `UnexpectedEof` if the VM ended.
pub fn run(
    agent: &mut TcpStream,
    program: &str,
    arguments: &[&str],
    environment: &Value,
    output: &mut dyn Write,
) -> io::Result<i32> {
    say(
        agent,
        &json!({ "run": program, "arguments": arguments, "environment": environment }),
    )?;
    let mut agent = BufReader::new(agent);
    let mut line = Vec::new();
    while agent.read_until(b'\n', &mut line)? != 0 {
        let end = line.iter().position(|byte| *byte == END);
        output.write_all(&line[..end.unwrap_or(line.len())])?;
        if let Some(end) = end {
            let code = String::from_utf8_lossy(&line[end + 1..]).trim().parse();
            return code.map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "no exit code"));
        }
        line.clear();
    }
    Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the VM ended"))
}

fn say(stream: &mut TcpStream, what: &Value) -> io::Result<()> {
    stream.write_all(format!("{what}\n").as_bytes())
}

/// Reads one line, byte by byte: the bytes after the line belong to another reader.
fn listen(stream: &mut TcpStream) -> io::Result<String> {
    let mut line = Vec::new();
    let mut byte = [0];
    loop {
        if stream.read(&mut byte)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if byte == *b"\n" {
            return String::from_utf8(line).map_err(|_| io::ErrorKind::InvalidData.into());
        }
        line.push(byte[0]);
    }
}

/// The agent in the VM: takes files and runs programs until the machine ends.
///
/// # Errors
/// The error of listening.
pub fn agent() -> io::Result<()> {
    let listener = TcpListener::bind(("0.0.0.0", PORT))?;
    loop {
        let (stream, _) = listener.accept()?;
        std::thread::spawn(move || {
            if let Err(error) = serve(stream) {
                eprintln!("vm agent: {error}");
            }
        });
    }
}

fn serve(mut stream: TcpStream) -> io::Result<()> {
    /// Of two tests that bring the same file, the second must find the file there.
    static ONE_FILE_AT_A_TIME: Mutex<()> = Mutex::new(());
    stream.write_all(GREETING.as_bytes())?;
    loop {
        let Ok(line) = listen(&mut stream) else {
            return Ok(());
        };
        let order: Value = serde_json::from_str(&line)?;
        if let Some(to) = order["put"].as_str() {
            let _lock = ONE_FILE_AT_A_TIME.lock();
            take(&mut stream, Path::new(to), &order)?;
        } else {
            return execute(stream, &order);
        }
    }
}

fn take(stream: &mut TcpStream, to: &Path, order: &Value) -> io::Result<()> {
    let stamp = order["stamp"].as_str().unwrap_or_default();
    let stamped = PathBuf::from(format!("{}.stamp", text(to)));
    if fs::read_to_string(&stamped).is_ok_and(|have| have == stamp) {
        return stream.write_all(b"have\n");
    }
    stream.write_all(b"send\n")?;
    let new = PathBuf::from(format!("{}.new", text(to)));
    fs::create_dir_all(to.parent().unwrap_or(Path::new("/")))?;
    let mut file = fs::File::create(&new)?;
    let size = order["size"].as_u64().unwrap_or_default();
    let got = io::copy(&mut Read::take(&mut *stream, size), &mut file)?;
    if got != size {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    drop(file);
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755))?;
    fs::rename(new, to)?;
    fs::write(stamped, stamp)?;
    stream.write_all(b"have\n")
}

fn execute(mut stream: TcpStream, order: &Value) -> io::Result<()> {
    let output = OwnedFd::from(stream.try_clone()?);
    let arguments = order["arguments"].as_array().into_iter().flatten();
    let environment = order["environment"].as_object().into_iter().flatten();
    let mut child = Command::new(order["run"].as_str().unwrap_or_default())
        .args(arguments.filter_map(Value::as_str))
        .env_clear()
        .envs(environment.filter_map(|(name, value)| Some((name, value.as_str()?))))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .process_group(0)
        .spawn()?;
    let group = Pid::from_child(&child);
    let mut from = stream.try_clone()?;
    // The end of the connection means that the client is gone, for example killed by nextest's timeout. The test's
    // guard is in a session of its own and takes the slot down.
    std::thread::spawn(move || {
        while from.read(&mut [0]).is_ok_and(|bytes| bytes != 0) {}
        let _ = kill_process_group(group, Signal::KILL);
    });
    let status = child.wait()?;
    let code = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    stream.write_all(&[END])?;
    stream.write_all(format!("{code}\n").as_bytes())?;
    stream.shutdown(std::net::Shutdown::Both)
}
