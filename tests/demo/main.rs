//! `make demo`: a pod without a pause container on a real containerd, shown to a person.
//!
//! ```text
//!   main     the story, in order
//!   node     containerd, with a file of config/
//!   view     the pod: processes, namespaces, addresses
//!   compare  the same pod on this shim and on the stock shim, measured
//! ```
//!
//! The harness of the tests does the work. The demo checks every statement, and fails when one is wrong.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "the demo fails as a test does; the harness' rescue.rs makes it readable"
)]

mod compare;
mod node;
mod view;

use std::time::{Duration, Instant};

use rustix::process::Signal;
use shim_tests::takedown::take_down;
use shim_tests::until::ok_if;
use shim_tests::{
    Container, Daemon, Pod, PodSpec, Version, eventually, image, leaks, proc, rescue, screen,
};

/// Fetches the page as curl would, in HTTP 0.9: the `wget` of Debian's static busybox crashes.
const FETCH: &str = "echo GET / | nc localhost 80";
/// The client of `config/pod.yaml`.
const CLIENT: &str = "while true; do sleep 5; echo GET / | nc localhost 80; done";

fn main() {
    let begin = Instant::now();
    let version = wanted();
    refuse_where_it_cannot_run();
    rescue::arm("demo");
    let daemon = start_containerd(version);
    show_a_pod(&daemon);
    compare_with_the_stock_shim(&daemon);
    take_everything_down(daemon);
    screen::line(&format!("It took {:.0} s.", begin.elapsed().as_secs_f64()));
}

fn refuse_where_it_cannot_run() {
    if !rustix::process::geteuid().is_root() {
        rescue::refuse(
            "namespaces and mounts need root.",
            "`make demo` calls sudo when you are not root. By itself: sudo -E target/…/demo",
        );
    }
    if std::env::var("SHIM_UNDER_TEST").is_ok_and(|shim| shim != "pause") {
        rescue::refuse(
            "SHIM_UNDER_TEST is set, but the demo always shows both shims.",
            "env -u SHIM_UNDER_TEST make demo",
        );
    }
}

fn start_containerd(version: Option<Version>) -> Daemon {
    screen::title("A pod without a pause container");
    rescue::step(
        "starting containerd",
        "`tests/lab/prepare` says whether something is missing; the log says why containerd did not start.",
    );
    node::start(version.unwrap_or_else(node::newest))
}

/// A pod of this shim, from its start to its removal.
fn show_a_pod(daemon: &Daemon) {
    screen::title("1. The pod of config/pod.yaml: nginx, and a client beside it");
    rescue::step(
        "starting the pod",
        "The log has the shim's own words. To see whether the machine or the shim is at fault, run such pods on the \
         stock shim: `.ci/setup test && SHIM_UNDER_TEST=runc cargo nextest run -p shim-tests s1_`",
    );
    let pod = PodSpec::new("myweb2").handler(node::OURS).run(daemon);
    let web = pod.container("myweb2-nginx").image(image::NGINX).start();
    let client = pod.container("myweb2-netshoot").shell(CLIENT).start();

    rescue::step(
        "looking at the pod",
        "This is a fault of the shim. Its tests say more: \
         `.ci/setup test && cargo nextest run -p shim-tests s1_ s2_ s7_`",
    );
    view::processes(daemon, &pod, &[&web, &client]);

    screen::title("2. What the pod shares");
    view::namespaces_and_addresses(daemon, &pod, &web, &client);

    screen::title("3. nginx is killed and started again");
    rescue::step(
        "killing nginx and starting it again",
        "This is a fault of the shim. Its tests say more: `.ci/setup test && cargo nextest run -p shim-tests s4_`",
    );
    restart(daemon, &pod, &web, &client);

    rescue::step(
        "removing the pod",
        "The lines above name what is left. If they are mounts or cgroups, something else may be using them.",
    );
    daemon.cri().remove_all_pods();
    daemon.assert_nothing_left();
    screen::ok("the pod is removed, and nothing of it is left");
}

fn compare_with_the_stock_shim(daemon: &Daemon) {
    screen::title("4. The same pod on the stock shim, in the same run");
    rescue::step(
        "comparing with the stock shim",
        "The message names the call. If it is about the handler \"runc\", the stock shim does not work on this machine.",
    );
    compare::run(daemon);
}

fn take_everything_down(daemon: Daemon) {
    screen::title("5. Everything is taken down");
    rescue::step(
        "taking everything down",
        "The lines above name what is left. If they are mounts or cgroups, something else may be using them.",
    );
    end(daemon);
}

/// The containerd that the command line names.
fn wanted() -> Option<Version> {
    let line = std::env::args().nth(1)?;
    let found = [Version::V1_6, Version::V1_7, Version::V2_1]
        .into_iter()
        .find(|version| version.line() == line);
    if found.is_none() {
        rescue::refuse(
            &format!("there is no containerd {line}."),
            "demo [1.6|1.7|2.1]",
        );
    }
    found
}

/// Prints `what` when `holds`; otherwise ends the demo.
#[track_caller]
fn check(holds: bool, what: &str) {
    assert!(holds, "not so: {what}");
    screen::ok(what);
}

fn restart(daemon: &Daemon, pod: &Pod<'_>, web: &Container<'_>, client: &Container<'_>) {
    let shim = daemon.shim().pid;
    let look = || {
        let kinds = ["net", "ipc", "uts"].map(|kind| proc::namespace(client.pid(), kind));
        (view::ip(client), view::mac(client), kinds, client.pid())
    };
    let before = look();
    let old = web.pid();
    proc::kill(old, Signal::KILL);
    let code = web.wait();
    check(
        code == 137 && client.running() && pod.ready(),
        &format!(
            "SIGKILL to nginx (pid {old}): exit code {code}; the pod is ready, the client runs"
        ),
    );
    let again = pod
        .container("myweb2-nginx")
        .image(image::NGINX)
        .attempt(1)
        .start();
    check(
        again.pid() != old && daemon.shim().pid == shim,
        &format!(
            "nginx runs again as pid {}, below the same shim",
            again.pid()
        ),
    );
    let kinds = ["net", "ipc", "uts"].map(|kind| proc::namespace(again.pid(), kind));
    let after = (view::ip(&again), view::mac(&again), kinds, client.pid());
    check(
        after == before && look() == before && pod.ip() == before.0,
        &format!("same address as before: {} ({})", before.0, before.1),
    );
    let [net, ipc, uts] = before.2;
    check(
        kinds == before.2,
        &format!("same namespaces as before: net {net}, ipc {ipc}, uts {uts}"),
    );
    let page = view::welcome(client);
    check(
        page == "Welcome to nginx!",
        &format!("http://localhost/ from the client: \"{page}\""),
    );
}

/// Ends the daemon, and looks at the machine once more.
fn end(daemon: Daemon) {
    let names = daemon.names.clone();
    daemon.end();
    // `end` has failed already if a pod left something. This is about the demo's own things.
    let left = || {
        let mut left: Vec<String> = leaks::processes(&names)
            .iter()
            .map(proc::Process::describe)
            .collect();
        let paths = leaks::mounts(&names)
            .into_iter()
            .chain(leaks::cgroup_parents(&names));
        left.extend(paths.map(|path| path.display().to_string()));
        left.extend(leaks::links(&names));
        left
    };
    eventually(Duration::from_secs(5), || {
        let _ = take_down(&names);
        ok_if(left().is_empty(), || {
            format!("left behind: {}", left().join(", "))
        })
    });
    screen::ok(
        "nothing is left: no process, no mount, no network namespace, no veth or bridge, no cgroup, no socket or FIFO, \
         no state of runc, no file of the demo's containerd",
    );
}
