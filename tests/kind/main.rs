//! `make kind`: a two-node kind cluster whose every pod runs through this shim, shown to a person, and deleted again.
//!
//! ```text
//!   main     what must be there, the story in order, the end
//!   steps    what is shown and checked
//!   cluster  kind, kubectl, docker
//! ```
//!
//! kind and kubectl do the work, as on a user's machine. Every statement is checked; the first that does not hold ends the
//! program with an error, after the cluster is deleted.

mod cluster;
mod steps;

use std::process::ExitCode;

use cluster::{Cluster, Outcome, run};
use shim_tests::{lab, screen};
use tokio::signal::unix::{SignalKind, signal};

/// The cluster's name. `KEEP` in the environment leaves the cluster to the user.
const NAME: &str = "pause-v2";

/// What must be there: the program, how it says that it works, and how to get it.
const TOOLS: [(&str, &[&str], &str); 3] = [
    (
        "docker",
        &["info", "--format", "{{.ServerVersion}}"],
        "Docker Engine must run, and you must be allowed to use it: apt-get install docker.io, or \
         https://docs.docker.com/engine/install/",
    ),
    (
        "kind",
        &["version"],
        "apt-get install kind (Debian 13), or https://kind.sigs.k8s.io/docs/user/quick-start/#installation",
    ),
    (
        "kubectl",
        &["version", "--client"],
        "apt-get install kubernetes-client, or https://kubernetes.io/docs/tasks/tools/",
    ),
];

fn main() -> ExitCode {
    let lacks = missing();
    if !lacks.is_empty() {
        screen::alarm("This cannot run: something is missing.");
        for (what, advice) in lacks {
            screen::note(&what, &advice);
        }
        return ExitCode::FAILURE;
    }
    match in_a_cluster() {
        Ok(()) => ExitCode::SUCCESS,
        Err(why) => {
            screen::alarm("FAILED");
            screen::note("what", &why);
            ExitCode::FAILURE
        }
    }
}

/// The names and the remedies of what does not work here.
fn missing() -> Vec<(String, String)> {
    let mut missing = Vec::new();
    for (program, arguments, advice) in TOOLS {
        if let Err(why) = run(30, program, arguments) {
            missing.push((program.to_owned(), format!("{why}\n{advice}")));
        }
    }
    // Docker makes an empty folder of a path that is not there, and kind mounts the folder.
    if !lab::repository()
        .join("target/dist/containerd-shim-pause-v2")
        .is_file()
    {
        missing.push(("the shim".to_owned(), "make build".to_owned()));
    }
    missing
}

/// The whole story. The cluster is deleted also when a step fails or is interrupted.
fn in_a_cluster() -> Outcome {
    std::env::set_current_dir(lab::repository()).map_err(|error| error.to_string())?;
    ignore_interrupts()?;
    screen::title("A cluster without pause containers");
    screen::text(
        "kind makes two nodes: some minutes, of which most are the node image's way to this machine.",
    );
    let kubeconfig = lab::target().join("kind/kubeconfig");
    let cluster = Cluster::create(NAME, kubeconfig).map_err(|why| {
        format!(
            "{why}\nIf the node image cannot be pulled: `docker load` an archive of kindest/node that you have, and name the \
             image in KIND_EXPERIMENTAL_NODE_IMAGE or in config/kind.yaml."
        )
    })?;
    let shown = steps::all(&cluster);
    if std::env::var_os("KEEP").is_some() {
        screen::text(&format!(
            "The cluster stays: kind delete cluster --name {NAME}"
        ));
        return shown;
    }
    let deleted = cluster.delete();
    if deleted.is_ok() {
        screen::ok("the cluster is deleted");
    }
    shown.and(deleted)
}

/// A signal of the terminal ends the running kubectl, docker or kind: that step fails, and the cluster is deleted.
fn ignore_interrupts() -> Outcome {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let listen = || {
        // tokio's handler stays until the program ends.
        runtime?.block_on(async { signal(SignalKind::interrupt()).map(drop) })
    };
    listen().map_err(|error| format!("a handler for SIGINT: {error}"))
}
