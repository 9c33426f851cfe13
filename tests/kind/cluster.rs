//! The cluster of `make kind`, and the programs that reach into the cluster: kind, kubectl, docker.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// What went wrong, for a person.
pub(crate) type Outcome<T = ()> = Result<T, String>;

/// How long a program may take, in seconds. The creation of a cluster pulls images.
const CREATION: u64 = 900;
const CALL: u64 = 120;
const WAIT: u64 = 300;

/// A cluster that this program has made, and deletes.
pub(crate) struct Cluster {
    name: String,
    kubeconfig: PathBuf,
}

/// Runs a program to its end, which `timeout` sets. Gives the standard output.
///
/// # Errors
/// The command line with what the program said, if the program fails.
pub(crate) fn run(seconds: u64, program: &str, arguments: &[&str]) -> Outcome<String> {
    let output = Command::new("timeout")
        // In the terminal's process group: SIGINT reaches the program.
        .args(["--foreground", &seconds.to_string()])
        .arg(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| format!("timeout: {error}"))?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = match output.status.code() {
        Some(124) => format!("no end within {seconds} s; {said}"),
        _ => said.into_owned(),
    };
    let line = arguments.join(" ");
    Err(format!("{program} {line}\n{}", said.trim()))
}

impl Cluster {
    /// Makes the cluster of `config/kind.yaml`. A cluster of the same name that is there already is left alone.
    ///
    /// # Errors
    /// If there is such a cluster, or kind fails; then kind's nodes are deleted again.
    pub(crate) fn create(name: &str, kubeconfig: PathBuf) -> Outcome<Self> {
        let clusters = run(CALL, "kind", &["get", "clusters"])?;
        if clusters.lines().any(|line| line == name) {
            return Err(format!(
                "there is a cluster {name} already, and this program does not delete what others made: \
                 kind delete cluster --name {name}"
            ));
        }
        if let Some(folder) = kubeconfig.parent() {
            std::fs::create_dir_all(folder)
                .map_err(|error| format!("{}: {error}", folder.display()))?;
        }
        let cluster = Self {
            name: name.to_owned(),
            kubeconfig,
        };
        let config = ["create", "cluster", "--config", "config/kind.yaml"];
        let made = run(CREATION, "kind", &cluster.of_kind(&config));
        if let Err(why) = made {
            let deleted = cluster.delete();
            return Err([Err(why), deleted]
                .into_iter()
                .filter_map(Outcome::err)
                .collect::<Vec<_>>()
                .join("\n"));
        }
        Ok(cluster)
    }

    /// Deletes the cluster.
    ///
    /// # Errors
    /// What kind said.
    pub(crate) fn delete(self) -> Outcome {
        run(WAIT, "kind", &self.of_kind(&["delete", "cluster"])).map(drop)
    }

    fn of_kind<'a>(&'a self, arguments: &[&'a str]) -> Vec<&'a str> {
        let kubeconfig = self.kubeconfig.to_str().unwrap_or_default();
        let mut line = arguments.to_vec();
        line.extend(["--name", &self.name, "--kubeconfig", kubeconfig]);
        line
    }

    /// The container of a node.
    pub(crate) fn node(&self, role: &str) -> String {
        format!("{}-{role}", self.name)
    }

    /// Runs kubectl.
    ///
    /// # Errors
    /// What kubectl said.
    pub(crate) fn kubectl(&self, arguments: &[&str]) -> Outcome<String> {
        let kubeconfig = self.kubeconfig.to_str().unwrap_or_default();
        let line = [&["--kubeconfig", kubeconfig], arguments].concat();
        run(WAIT + CALL, "kubectl", &line)
    }

    /// Applies files of `config/`.
    ///
    /// # Errors
    /// What kubectl said.
    pub(crate) fn apply(&self, files: &[&str]) -> Outcome {
        for file in files {
            self.kubectl(&["apply", "--filename", &format!("config/{file}")])?;
        }
        Ok(())
    }

    /// Waits until the pods that the selector names are ready.
    ///
    /// # Errors
    /// With the pods' events, when the pods are not ready within five minutes.
    pub(crate) fn wait_for(&self, what: &[&str]) -> Outcome {
        let timeout = format!("--timeout={WAIT}s");
        let wait = [&["wait", "--for=condition=Ready", &timeout], what].concat();
        // kubectl does not wait for a pod that a Deployment has not made yet.
        within(30, || self.kubectl(&wait)).map(drop).map_err(|why| {
            let events = self.kubectl(&[
                "get",
                "events",
                "--all-namespaces",
                "--sort-by=.lastTimestamp",
            ]);
            let events = events.unwrap_or_else(|why| why);
            let lines: Vec<_> = events.lines().rev().take(15).collect();
            format!(
                "{why}\n{}",
                lines.into_iter().rev().collect::<Vec<_>>().join("\n")
            )
        })
    }

    /// A pod as the API server has it.
    ///
    /// # Errors
    /// If there is no such pod.
    pub(crate) fn pod(&self, name: &str) -> Outcome<Value> {
        let pod = self.kubectl(&["get", "pod", name, "--output", "json"])?;
        serde_json::from_str(&pod).map_err(|error| format!("kubectl get pod {name}: {error}"))
    }

    /// Runs a program in a container of a pod.
    ///
    /// # Errors
    /// What kubectl or the program said.
    pub(crate) fn exec(&self, pod: &str, container: &str, command: &[&str]) -> Outcome<String> {
        self.kubectl(&[&["exec", pod, "--container", container, "--"], command].concat())
    }

    /// Runs a program on a node.
    ///
    /// # Errors
    /// What docker or the program said.
    pub(crate) fn on_node(&self, node: &str, command: &[&str]) -> Outcome<String> {
        run(CALL, "docker", &[&["exec", node], command].concat())
    }

    /// The processes of a node: the pid, and the name.
    ///
    /// # Errors
    /// What docker said.
    pub(crate) fn processes(&self, node: &str) -> Outcome<BTreeMap<i32, String>> {
        let lines = self.on_node(node, &["ps", "-e", "-o", "pid=,comm="])?;
        let process = |line: &str| {
            let (pid, name) = line.trim().split_once(' ')?;
            Some((pid.parse().ok()?, name.trim().to_owned()))
        };
        Ok(lines.lines().filter_map(process).collect())
    }

    /// The private memory of a process of a node, in kB.
    ///
    /// # Errors
    /// What docker said.
    pub(crate) fn private_kb(&self, node: &str, pid: i32) -> Outcome<u64> {
        let file = format!("/proc/{pid}/smaps_rollup");
        let lines = self.on_node(node, &["cat", &file])?;
        let kb = |line: &str| {
            let value = line.strip_prefix("Private_")?.split_whitespace().nth(1)?;
            value.parse::<u64>().ok()
        };
        Ok(lines.lines().filter_map(kb).sum())
    }
}

/// Waits until `what` gives something other than an error.
///
/// # Errors
/// The last error, after `seconds`.
pub(crate) fn within<T>(seconds: u64, mut what: impl FnMut() -> Outcome<T>) -> Outcome<T> {
    let end = Instant::now() + Duration::from_secs(seconds);
    loop {
        match what() {
            Err(why) if Instant::now() > end => {
                return Err(format!("not within {seconds} s: {why}"));
            }
            Err(_) => std::thread::sleep(Duration::from_secs(1)),
            done => return done,
        }
    }
}

/// The page at this port of this machine.
///
/// # Errors
/// If nobody answers, or the answer is not `200 OK`.
pub(crate) fn page(port: u16) -> Outcome<String> {
    let failed = |error: std::io::Error| format!("http://localhost:{port}/: {error}");
    let patience = Duration::from_secs(5);
    let address = SocketAddr::from(([127, 0, 0, 1], port));
    let mut stream = TcpStream::connect_timeout(&address, patience).map_err(failed)?;
    stream.set_read_timeout(Some(patience)).map_err(failed)?;
    let request = "GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).map_err(failed)?;
    let mut answer = Vec::new();
    stream
        .take(1 << 20)
        .read_to_end(&mut answer)
        .map_err(failed)?;
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.lines().next().unwrap_or_default();
    if status.contains(" 200 ") {
        Ok(answer)
    } else {
        Err(format!("http://localhost:{port}/ answers {status:?}"))
    }
}
