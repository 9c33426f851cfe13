//! Thousands of pods, one after the other and at once, with restarts of containerd in between: nothing grows.
//!
//! `SOAK_PODS` sets how many: 10,000 in `make faults`, a few otherwise. A pod has one to three containers, of which some
//! end by themselves, and execs. A pod beside them lives all the time and has execs all the time. What is there is
//! measured after each tenth, and printed: `cargo nextest run -p shim-tests --test soak --no-capture`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stderr,
    reason = "a test reports by failing, and this one by its measurements, too"
)]

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use shim_tests::cri::Failure;
use shim_tests::cri_calls::{Calls, pod_config};
use shim_tests::daemon::{Network, Options};
use shim_tests::image::BUSYBOX;
use shim_tests::leaks::{self, TaskId};
use shim_tests::proc::{self, Process};
use shim_tests::slot::Names;
use shim_tests::until::ok_if;
use shim_tests::{Container, Daemon, PodSpec, eventually, on_the_newest_in_every_mode};

/// How many pods at a time.
const LANES: usize = 4;

/// The pods between two restarts of containerd, at least.
const PART: usize = 10;

/// How much more memory than after the first part a shim may have, in kB: what an allocator keeps.
const SHIM_SLACK: u64 = 512;

/// The same for containerd, which collects its garbage when it likes.
const CONTAINERD_SLACK: u64 = 32 * 1024;

fn pods() -> usize {
    let number = std::env::var("SOAK_PODS");
    number.map_or(3 * PART, |number| number.parse().unwrap())
}

/// What a process has.
#[derive(Clone, Copy, Debug)]
struct Has {
    descriptors: usize,
    threads: usize,
    memory_kb: u64,
    zombies: usize,
}

impl Has {
    fn of(pid: i32) -> Self {
        let fds = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
        let children = proc::children(pid);
        Self {
            descriptors: fds.count(),
            threads: proc::threads(pid),
            memory_kb: proc::anonymous_kb(pid),
            zombies: children.iter().filter(|child| child.state == 'Z').count(),
        }
    }
}

/// What is there while only the long-lived pod lives.
#[derive(Clone, Debug)]
struct Measured {
    shim: Has,
    containerd: Has,
    /// Processes, mounts, cgroups, bundles, sockets, FIFOs and files of runc, of the long-lived pod.
    left: Vec<String>,
}

impl Measured {
    /// Waits until the threads of the last calls have ended.
    fn when_at_rest(daemon: &Daemon, shim: &Process, before: Option<&Self>) -> Self {
        let now = || Self {
            shim: Has::of(shim.pid),
            containerd: Has::of(daemon.pid()),
            left: daemon.left(),
        };
        eventually(Duration::from_secs(10), || {
            let now = now();
            let (threads, left) = before.map_or((2, now.left.len()), |before| {
                (before.shim.threads, before.left.len())
            });
            let rest =
                now.shim.threads <= threads && now.left.len() <= left && daemon.shims().len() == 1;
            ok_if(rest, || format!("{now:#?}")).map(|()| now)
        })
    }

    #[track_caller]
    fn assert_not_more_than(&self, first: &Self) {
        assert_eq!(
            self.left.len(),
            first.left.len(),
            "{:#?}, then {:#?}",
            first.left,
            self.left
        );
        let no_more = |name: &str, now: Has, then: Has, fds: usize, threads: usize, slack: u64| {
            assert!(
                now.descriptors <= then.descriptors + fds,
                "{name}: {then:?}, then {now:?}"
            );
            assert!(
                now.threads <= then.threads + threads,
                "{name}: {then:?}, then {now:?}"
            );
            assert!(
                now.memory_kb <= then.memory_kb + slack,
                "{name}: {then:?}, then {now:?}"
            );
            assert_eq!(now.zombies, 0, "{name}");
        };
        no_more("shim", self.shim, first.shim, 0, 0, SHIM_SLACK);
        // containerd connects to its shims and its clients anew, and Go keeps the threads of its busiest moment.
        no_more(
            "containerd",
            self.containerd,
            first.containerd,
            4,
            8,
            CONTAINERD_SLACK,
        );
    }
}

/// A pod's life. Gives the pod's id.
fn live(names: &Names, calls: &Calls, number: usize) -> Result<String, Failure> {
    let config = pod_config(names, PodSpec::new(&format!("soak{number}")));
    let pod = calls.run_pod(&config, "")?;
    let mut containers = Vec::new();
    for index in 0..=number % 3 {
        let script = if index == 1 {
            "exit 7"
        } else {
            "trap 'exit 0' TERM; sleep 3600 & wait"
        };
        let container = calls.create(
            (&pod, &config),
            &format!("c{index}"),
            BUSYBOX,
            &["sh", "-c", script],
            &[],
        )?;
        calls.start(&container)?;
        containers.push(container);
    }
    let code = calls.exec(&containers[0], &["sh", "-c", "exit 5"])?;
    assert_eq!(code, 5, "an exec in {pod}");
    if number.is_multiple_of(2) {
        calls.stop(&containers[0])?;
        assert_eq!(calls.exit_code(&containers[0])?, Some(0), "{pod}");
    }
    calls.stop_pod(&pod)?;
    if let Some(ended) = containers.get(1) {
        assert_eq!(calls.exit_code(ended)?, Some(7), "{pod}");
    }
    calls.remove_pod(&pod)?;
    let logs = names.directory().join("logs").join(format!("soak{number}"));
    std::fs::remove_dir_all(logs).unwrap();
    Ok(pod)
}

/// The lives of these pods, while execs go on in the container beside them. Gives the pods' ids and the number of execs.
fn live_all(names: &Names, numbers: Range<usize>, beside: &str) -> (Vec<String>, usize) {
    let (next, over) = (AtomicUsize::new(numbers.start), AtomicBool::new(false));
    thread::scope(|scope| {
        let execs = scope.spawn(|| {
            let (calls, mut count) = (Calls::new(names), 0);
            while !over.load(Ordering::Relaxed) {
                let code = calls
                    .exec(beside, &["sh", "-c", "exit 3"])
                    .unwrap_or_else(|failure| panic!("{failure}"));
                assert_eq!(code, 3);
                count += 1;
            }
            count
        });
        let lane = || {
            let (calls, mut lived) = (Calls::new(names), Vec::new());
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= numbers.end {
                    return lived;
                }
                lived.push(
                    live(names, &calls, number)
                        .unwrap_or_else(|failure| panic!("pod {number}: {failure}")),
                );
            }
        };
        let lanes: Vec<_> = (0..LANES).map(|_| scope.spawn(lane)).collect();
        let ended: Vec<_> = lanes
            .into_iter()
            .map(thread::ScopedJoinHandle::join)
            .collect();
        over.store(true, Ordering::Relaxed);
        let execs = execs.join().unwrap();
        (ended.into_iter().flat_map(Result::unwrap).collect(), execs)
    })
}

fn assert_no_sockets(names: &Names, pods: &[String]) {
    for id in pods {
        let task = TaskId {
            namespace: "k8s.io".to_owned(),
            id: id.clone(),
        };
        let socket = leaks::shim_socket(&leaks::grpc_address(names), &task);
        assert!(!socket.exists(), "{} of {id}", socket.display());
    }
}

fn assert_alive(container: &Container<'_>, pid: i32) {
    assert_eq!(container.pid(), pid);
    assert_eq!(container.output(&["echo", "works"]), "works");
}

on_the_newest_in_every_mode! {
    fn thousands_of_pods_leave_nothing(version) {
        let daemon = Daemon::with(version, &Options { network: Network::Loopback, debug: false, ..Options::default() });
        let long = PodSpec::new("long").run(&daemon);
        // Ten thousand pods take an hour and more.
        let container = long.container("beside").command(&["sleep", "1000000"]).start();
        let (shim, pid) = (daemon.shim(), container.pid());
        let part = (pods() / 10).max(PART);
        let mut first: Option<Measured> = None;
        for start in (0..pods()).step_by(part) {
            // The same containerd for all parts would hide what a restart costs, and show nothing more of the shims.
            daemon.kill();
            daemon.start_again();
            let begin = Instant::now();
            let numbers = start..(start + part).min(pods());
            let (lived, execs) = live_all(&daemon.names, numbers.clone(), &container.id);
            let took = begin.elapsed();
            assert_no_sockets(&daemon.names, &lived);
            assert_alive(&container, pid);
            let now = Measured::when_at_rest(&daemon, &shim, first.as_ref());
            eprintln!(
                "{} pods, {:.0} ms each, {execs} execs beside; shim {:?}; containerd {:?}; {} things of the pod beside",
                numbers.end, took.as_secs_f64() * 1000.0 / f64::from(u32::try_from(numbers.len()).unwrap()),
                now.shim, now.containerd, now.left.len(),
            );
            match &first {
                Some(first) => now.assert_not_more_than(first),
                None => first = Some(now),
            }
        }
        assert!(shim.alive());
        daemon.end();
    }
}
