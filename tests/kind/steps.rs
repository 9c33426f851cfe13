//! What `make kind` shows and checks: the scenarios that the project began with, by kubectl.

use std::time::Instant;

use serde_json::Value;
use shim_tests::screen;

use crate::cluster::{Cluster, Outcome, page, within};

const PODS: usize = 5;

/// A pod with one container, of this runtime class.
fn small_pod(name: &str, class: &str) -> String {
    format!(
        r#"{{"apiVersion":"v1","kind":"Pod","metadata":{{"name":"{name}"}},"spec":{{"runtimeClassName":"{class}",
        "nodeName":"NODE","terminationGracePeriodSeconds":0,"containers":[{{"name":"c","image":"nginx",
        "imagePullPolicy":"IfNotPresent","command":["sleep","infinity"]}}]}}}}"#
    )
}

/// All of them, in order.
///
/// # Errors
/// The first statement that does not hold.
pub(crate) fn all(cluster: &Cluster) -> Outcome {
    let worker = cluster.node("worker");
    screen::title("1. Two nodes, no pause container");
    cluster.wait_for(&["nodes", "--all"])?;
    for node in [cluster.node("control-plane"), worker.clone()] {
        no_pause_on(cluster, &node)?;
    }

    screen::title("2. config/pod.yaml: two containers, one network");
    cluster.apply(&["runtimeclass.yaml", "pod.yaml"])?;
    cluster.wait_for(&["pod/myweb2"])?;
    two_containers_share(cluster)?;
    the_node_shows_it(cluster, &worker)?;

    screen::title("3. nginx ends and is started again");
    nginx_is_started_again(cluster)?;

    screen::title("4. shareProcessNamespace");
    cluster.apply(&["shared-processes.yaml"])?;
    cluster.wait_for(&["pod/shared"])?;
    processes_are_shared(cluster)?;

    screen::title("5. Services on NodePorts");
    cluster.apply(&["web.yaml", "kube-ops-view.yaml"])?;
    cluster.wait_for(&["pod", "--selector", "app=deploy-websrv"])?;
    cluster.wait_for(&[
        "pod",
        "--namespace",
        "kube-system",
        "--selector",
        "app=kube-ops-view",
    ])?;
    let web = within(60, || page(31001))?;
    check(
        web.contains("Welcome to nginx!"),
        "http://localhost:31001/ is nginx' page",
    )?;
    within(60, || page(31000))?;
    screen::ok("http://localhost:31000/ is kube-ops-view");

    screen::title("6. containerd is restarted on the worker");
    containerd_is_restarted(cluster, &worker)?;

    screen::title("7. The same pod with the stock shim");
    compare(cluster, &worker)?;

    screen::title("8. The pods are deleted");
    delete_the_pods(cluster, &worker)
}

/// Prints `what` when `holds`.
fn check(holds: bool, what: &str) -> Outcome {
    if holds {
        screen::ok(what);
        Ok(())
    } else {
        Err(format!("not so: {what}"))
    }
}

fn no_pause_on(cluster: &Cluster, node: &str) -> Outcome {
    let processes = cluster.processes(node)?;
    let count = |name: &str| processes.values().filter(|found| *found == name).count();
    // The kernel keeps 15 characters of a name.
    let (shims, pauses) = (count("containerd-shim"), count("pause"));
    check(
        shims > 0 && pauses == 0,
        &format!("{node}: {shims} shims, {pauses} processes named pause"),
    )
}

const NAMESPACES: [&str; 3] = ["net", "ipc", "uts"];

/// The namespaces of a container of myweb2.
fn namespaces(cluster: &Cluster, container: &str) -> Outcome<Vec<String>> {
    let paths = NAMESPACES.map(|kind| format!("/proc/self/ns/{kind}"));
    let command: Vec<_> = std::iter::once("readlink")
        .chain(paths.iter().map(String::as_str))
        .collect();
    let links = cluster.exec("myweb2", container, &command)?;
    Ok(links.lines().map(str::to_owned).collect())
}

fn text<'a>(value: &'a Value, path: &str) -> Outcome<&'a str> {
    let found = value.pointer(path).and_then(Value::as_str);
    found.ok_or_else(|| format!("the pod has no {path}"))
}

fn two_containers_share(cluster: &Cluster) -> Outcome {
    let pod = cluster.pod("myweb2")?;
    let address = text(&pod, "/status/podIP")?;
    let containers = ["myweb2-nginx", "myweb2-netshoot"];
    for container in containers {
        let seen = cluster.exec("myweb2", container, &["hostname", "-i"])?;
        check(
            seen == address,
            &format!("{container} has the pod's address: {seen}"),
        )?;
    }
    let first = namespaces(cluster, containers[0])?;
    check(
        first.len() == NAMESPACES.len() && namespaces(cluster, containers[1])? == first,
        &format!("both are in {}", first.join(", ")),
    )?;
    let page = cluster.exec("myweb2", containers[1], &["curl", "--silent", "localhost"])?;
    check(
        page.contains("Welcome to nginx!"),
        "curl localhost from the client is nginx' page",
    )
}

/// The pid of a container on the pod's node.
fn pid_of(cluster: &Cluster, node: &str, pod: &Value, container: usize) -> Outcome<i32> {
    let id = text(
        pod,
        &format!("/status/containerStatuses/{container}/containerID"),
    )?;
    let id = id.trim_start_matches("containerd://");
    let template = [
        "crictl",
        "inspect",
        "--output",
        "go-template",
        "--template",
        "{{.info.pid}}",
        id,
    ];
    let pid = cluster.on_node(node, &template)?;
    pid.parse()
        .map_err(|_| format!("crictl inspect {id}: no pid in {pid:?}"))
}

/// The shim above a process of the node.
fn shim_above(cluster: &Cluster, node: &str, pid: i32) -> Outcome<i32> {
    let parent = cluster.on_node(node, &["ps", "-o", "ppid=", "-p", &pid.to_string()])?;
    parent
        .trim()
        .parse()
        .map_err(|_| format!("process {pid} has no parent: {parent:?}"))
}

fn the_node_shows_it(cluster: &Cluster, worker: &str) -> Outcome {
    let pod = cluster.pod("myweb2")?;
    let pid = pid_of(cluster, worker, &pod, 0)?;
    let lsns = cluster.on_node(
        worker,
        &[
            "lsns",
            "--output",
            "NS,TYPE,NPROCS,COMMAND",
            "--task",
            &pid.to_string(),
        ],
    )?;
    for line in lsns.lines() {
        screen::line(&screen::short(line, 90));
    }
    check(
        NAMESPACES.iter().all(|kind| lsns.contains(kind)) && !lsns.contains("/pause"),
        "lsns on the node: no namespace belongs to a pause container",
    )
}

fn nginx_is_started_again(cluster: &Cluster) -> Outcome {
    let restarts = |pod: &Value| -> u64 {
        let statuses = pod["status"]["containerStatuses"].as_array();
        let counts = statuses
            .into_iter()
            .flatten()
            .map(|status| status["restartCount"].as_u64());
        counts.flatten().sum()
    };
    let before = cluster.pod("myweb2")?;
    // The shell ends with nginx, whose end may be faster than the answer.
    let _ = cluster.exec("myweb2", "myweb2-nginx", &["nginx", "-s", "stop"]);
    within(120, || {
        let now = cluster.pod("myweb2")?;
        if restarts(&now) > restarts(&before) {
            Ok(())
        } else {
            Err("the kubelet has not restarted nginx".to_owned())
        }
    })?;
    cluster.wait_for(&["pod/myweb2"])?;
    let after = cluster.pod("myweb2")?;
    let address = text(&after, "/status/podIP")?;
    check(
        address == text(&before, "/status/podIP")?,
        &format!("nginx runs again; the address is still {address}"),
    )?;
    two_containers_share(cluster)
}

fn processes_are_shared(cluster: &Cluster) -> Outcome {
    let list = cluster.exec("shared", "client", &["ps", "-e", "-o", "pid,args"])?;
    for line in list.lines().take(6) {
        screen::line(&screen::short(line, 90));
    }
    check(
        list.contains("nginx: master process") && list.contains("sleep infinity"),
        "each container sees the other's processes",
    )?;
    let first = cluster.exec("shared", "client", &["cat", "/proc/1/comm"])?;
    check(first == "pause", "PID 1 is the shim's own pause program")
}

fn containerd_is_restarted(cluster: &Cluster, worker: &str) -> Outcome {
    let state = |cluster: &Cluster| -> Outcome<(String, i32)> {
        let pod = cluster.pod("myweb2")?;
        let pid = pid_of(cluster, worker, &pod, 0)?;
        Ok((text(&pod, "/status/podIP")?.to_owned(), pid))
    };
    let before = state(cluster)?;
    cluster.on_node(worker, &["systemctl", "restart", "containerd"])?;
    let after = within(60, || state(cluster))?;
    check(
        before == after,
        &format!(
            "myweb2 has the address {} and nginx the pid {} as before",
            after.0, after.1
        ),
    )?;
    let answer = within(60, || {
        cluster.exec("myweb2", "myweb2-netshoot", &["echo", "works"])
    })?;
    check(answer == "works", "kubectl exec works")
}

/// The shims of the pods that the files of `config/` have made.
fn shims(cluster: &Cluster, worker: &str) -> Outcome<Vec<i32>> {
    let shim = |name: &&str| {
        shim_above(
            cluster,
            worker,
            pid_of(cluster, worker, &cluster.pod(name)?, 0)?,
        )
    };
    ["myweb2", "shared"].iter().map(shim).collect()
}

fn delete_the_pods(cluster: &Cluster, worker: &str) -> Outcome {
    let shims = shims(cluster, worker)?;
    let files =
        ["shared-processes.yaml", "pod.yaml"].map(|file| format!("--filename=config/{file}"));
    cluster.kubectl(&["delete", "--wait", &files[0], &files[1]])?;
    within(30, || {
        let processes = cluster.processes(worker)?;
        match shims.iter().find(|shim| processes.contains_key(shim)) {
            Some(shim) => Err(format!("{worker}: shim {shim} runs without a pod")),
            None => Ok(()),
        }
    })?;
    screen::ok("no shim of theirs is left on the worker");
    Ok(())
}

/// A figure of one pod.
struct Figure {
    ready_ms: u128,
    private_kb: u64,
    processes: usize,
}

/// Makes a pod, measures and deletes it.
fn measure(cluster: &Cluster, worker: &str, name: &str, class: &str) -> Outcome<Figure> {
    let manifest = std::env::temp_dir().join(format!("{name}.json"));
    let body = small_pod(name, class).replace("NODE", worker);
    std::fs::write(&manifest, body).map_err(|error| format!("{}: {error}", manifest.display()))?;
    let begin = Instant::now();
    let path = manifest.to_string_lossy().into_owned();
    let applied = cluster.kubectl(&["apply", "--filename", &path]);
    let _ = std::fs::remove_file(&manifest);
    applied?;
    cluster.wait_for(&[&format!("pod/{name}")])?;
    let ready_ms = begin.elapsed().as_millis();
    let pid = pid_of(cluster, worker, &cluster.pod(name)?, 0)?;
    let shim = shim_above(cluster, worker, pid)?;
    let children = cluster.on_node(
        worker,
        &["ps", "-o", "pid=,comm=", "--ppid", &shim.to_string()],
    )?;
    let pauses = children.lines().filter_map(|line| {
        let (pid, name) = line.trim().split_once(' ')?;
        (name.trim() == "pause").then(|| pid.parse::<i32>().ok())?
    });
    let helpers: Vec<i32> = std::iter::once(shim).chain(pauses).collect();
    let mut private_kb = 0;
    for &helper in &helpers {
        private_kb += cluster.private_kb(worker, helper)?;
    }
    cluster.kubectl(&["delete", "pod", name, "--wait"])?;
    Ok(Figure {
        ready_ms,
        private_kb,
        processes: helpers.len(),
    })
}

fn median<T: Ord + Copy>(figures: &[Figure], of: impl Fn(&Figure) -> T) -> T {
    let mut values: Vec<T> = figures.iter().map(of).collect();
    values.sort_unstable();
    values[values.len() / 2]
}

fn compare(cluster: &Cluster, worker: &str) -> Outcome {
    let stock = r#"{"apiVersion":"node.k8s.io/v1","kind":"RuntimeClass","metadata":{"name":"stock"},"handler":"runc"}"#;
    let manifest = std::env::temp_dir().join("pause-v2-stock.json");
    std::fs::write(&manifest, stock).map_err(|error| format!("{}: {error}", manifest.display()))?;
    let applied = cluster.kubectl(&["apply", "--filename", &manifest.to_string_lossy()]);
    let _ = std::fs::remove_file(&manifest);
    applied?;
    let mut figures = [Vec::new(), Vec::new()];
    for turn in 0..PODS {
        for (figures, class) in figures.iter_mut().zip(["pause", "stock"]) {
            figures.push(measure(cluster, worker, &format!("{class}-{turn}"), class)?);
        }
    }
    let [ours, stocks] = &figures;
    let row =
        |name: &str, of: &dyn Fn(&[Figure]) -> String| vec![name.to_owned(), of(ours), of(stocks)];
    screen::table(&[
        ["", "this shim", "stock shim"].map(str::to_owned).to_vec(),
        row("kubectl apply until Ready", &|figures| {
            format!("{} ms", median(figures, |figure| figure.ready_ms))
        }),
        row("processes beside the app", &|figures| {
            median(figures, |figure| figure.processes).to_string()
        }),
        row("private memory of them", &|figures| {
            format!("{} kB", median(figures, |figure| figure.private_kb))
        }),
    ]);
    screen::text(&format!(
        "Medians of {PODS} pods each, made in turn on the worker. The kubelet looks after its pods about once a second: \
         the time until Ready has that grain."
    ));
    Ok(())
}
