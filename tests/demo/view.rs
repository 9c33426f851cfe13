//! The demo's view of the pod: processes, namespaces, addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use shim_tests::proc::{self, Process};
use shim_tests::until::ok_if;
use shim_tests::{Container, Daemon, Pod, eventually, screen};

use crate::{FETCH, check};

/// The tree of the pod's processes: the shim and the two apps.
pub(crate) fn processes(daemon: &Daemon, pod: &Pod<'_>, apps: &[&Container<'_>]) {
    let inits: BTreeSet<i32> = apps.iter().map(|app| app.pid()).collect();
    let shim = daemon.shim();
    // A runc that has just ended may still be seen for a moment.
    let all = eventually(Duration::from_secs(2), || {
        let all = daemon.processes();
        let known = proc::with_descendants(&inits, &all).len() + 1;
        ok_if(all.len() == known, || {
            let lines: Vec<_> = all.iter().map(Process::describe).collect();
            format!(
                "{} processes where the shim and the apps are {known}:\n{}",
                all.len(),
                lines.join("\n")
            )
        })
        .map(|()| all)
    });

    let threads = threads(shim.pid);
    let sandbox = pod.pid();
    screen::line(&format!(
        "{}  (pid {}, {} threads)",
        program(&shim),
        shim.pid,
        threads.len()
    ));
    for (id, name) in &threads {
        if *id == sandbox {
            screen::line(&format!(
                " │   its thread {id}, \"{name}\", is the sandbox: it holds net, ipc and uts"
            ));
        }
    }
    tree(&all, shim.pid, " ");
    screen::line("");
    let children: BTreeSet<i32> = proc::children(shim.pid)
        .iter()
        .map(|child| child.pid)
        .collect();
    check(
        children == inits,
        "the shim's children are the two apps; there is no pause process",
    );
    check(
        threads.contains_key(&sandbox),
        &format!("the pid that containerd has for the sandbox, {sandbox}, is a thread of the shim"),
    );
}

fn tree(all: &[Process], parent: i32, indent: &str) {
    let children: Vec<_> = all.iter().filter(|one| one.parent == parent).collect();
    for (number, child) in children.iter().enumerate() {
        let last = number + 1 == children.len();
        let (branch, below) = if last {
            ("└─", "   ")
        } else {
            ("├─", "│  ")
        };
        let command = screen::short(&child.command_line(), 75);
        screen::line(&format!("{indent}{branch} {command}  (pid {})", child.pid));
        tree(all, child.pid, &format!("{indent}{below}"));
    }
}

fn program(process: &Process) -> String {
    let command = process.command_line();
    let path = command.split(' ').next().unwrap_or_default();
    path.rsplit('/').next().unwrap_or_default().to_owned()
}

/// Thread id → name.
fn threads(pid: i32) -> BTreeMap<i32, String> {
    let folder = format!("/proc/{pid}/task");
    let ids = fs::read_dir(&folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    ids.map(|id: i32| {
        let name = fs::read_to_string(format!("{folder}/{id}/comm")).unwrap_or_default();
        (id, name.trim().to_owned())
    })
    .collect()
}

/// One table: the namespaces of node, sandbox and containers, and what follows from them.
pub(crate) fn namespaces_and_addresses(
    daemon: &Daemon,
    pod: &Pod<'_>,
    web: &Container<'_>,
    client: &Container<'_>,
) {
    let node = proc::namespaces(daemon.pid());
    let of_pod = [pod.pid(), web.pid(), client.pid()].map(proc::namespaces);
    let mut rows = vec![row(["", "node", "sandbox", "nginx", "client", ""])];
    for kind in ["net", "ipc", "uts", "mnt", "pid", "cgroup", "user", "time"] {
        let numbers = [of_pod[0][kind], of_pod[1][kind], of_pod[2][kind]];
        rows.push(namespace_row(kind, node[kind], numbers));
    }
    let same = |what: &str, look: &dyn Fn(&Container<'_>) -> String| {
        let (in_web, in_client) = (look(web), look(client));
        assert_eq!(in_web, in_client, "{what} differs between nginx and client");
        row([what, "", "", &in_web, &in_client, "the same"])
    };
    rows.push(same("IP", &ip));
    rows.push(same("MAC", &mac));
    rows.push(same("hostname", &|container| {
        container.output(&["hostname"])
    }));
    screen::table(&rows);

    screen::line("");
    let ip = pod.ip();
    check(
        ip == self::ip(web),
        &format!("containerd has the same address for the pod: {ip}"),
    );
    let page = welcome(client);
    check(
        page == "Welcome to nginx!",
        &format!("http://localhost/ from the client is nginx' page: \"{page}\""),
    );
}

fn row(cells: [&str; 6]) -> Vec<String> {
    cells.map(str::to_owned).to_vec()
}

/// One kind of namespace: the node's number, and the numbers of sandbox, nginx and client.
fn namespace_row(kind: &str, of_node: u64, numbers: [u64; 3]) -> Vec<String> {
    let shared = numbers.iter().all(|&number| number == numbers[0]);
    let what = match numbers {
        _ if shared && numbers[0] == of_node => "the node's",
        _ if shared => "* shared by the pod",
        [_, web, client] if web != client && web != of_node && client != of_node => "each its own",
        _ => "",
    };
    // net, ipc and uts must be shared; mnt and pid must not be.
    match kind {
        "net" | "ipc" | "uts" => {
            assert!(what.starts_with('*'), "{kind}: {numbers:?}, node {of_node}");
        }
        "mnt" | "pid" => {
            assert_eq!(what, "each its own", "{kind}: {numbers:?}, node {of_node}");
        }
        _ => {}
    }
    let cells = numbers.map(|number| match number {
        number if number == of_node => "= node".to_owned(),
        number if shared => format!("{number} *"),
        number => number.to_string(),
    });
    row([
        kind,
        &of_node.to_string(),
        &cells[0],
        &cells[1],
        &cells[2],
        what,
    ])
}

/// The address as a container sees it.
pub(crate) fn ip(container: &Container<'_>) -> String {
    let shown = container.output(&["ip", "-o", "-4", "addr", "show", "dev", "eth0"]);
    let address = shown.split_whitespace().find(|word| word.contains('/'));
    address
        .and_then(|address| address.split('/').next())
        .unwrap_or_else(|| panic!("no address in {shown}"))
        .to_owned()
}

/// The hardware address as a container sees it.
pub(crate) fn mac(container: &Container<'_>) -> String {
    container.output(&["cat", "/sys/class/net/eth0/address"])
}

/// The title of the page at localhost.
pub(crate) fn welcome(client: &Container<'_>) -> String {
    eventually(Duration::from_secs(5), || {
        let got = client.exec(&["timeout", "2", "sh", "-c", FETCH]);
        let title = got
            .stdout
            .split_once("<title>")
            .and_then(|(_, rest)| Some(rest.split_once("</title>")?.0.to_owned()));
        title.ok_or_else(|| format!("http://localhost/ from the client: {got:?}"))
    })
}
