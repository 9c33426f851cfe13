//! What this shim is to reach, and whether it does.

use crate::columns::Shim;
use crate::node::{CniOrHost, STEPS};
use crate::place::Place;
use crate::report::{Run, digits, median, ratio};
use shim_tests::daemon::Network;

/// How a figure is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The ratio to the stock shim's, at most.
    AtMost,
    /// The ratio to the stock shim's, at least.
    AtLeast,
    /// The figure itself, at most.
    Itself,
}

/// Something to reach.
pub(crate) struct Target {
    pub(crate) what: String,
    pub(crate) kind: Kind,
    goals: Vec<Goal>,
}

/// What one of our shims is to reach.
struct Goal {
    shim: Shim,
    figure: String,
    limit: Option<f64>,
}

impl Target {
    fn goal(&self, mode: Shim) -> Option<&Goal> {
        self.goals.iter().find(|goal| goal.shim == mode)
    }

    /// What the figure is for this shim: a ratio, or the figure itself. The others are seen as `mode`, one of ours.
    pub(crate) fn measured(&self, run: &Run, shim: Shim, mode: Shim) -> Option<f64> {
        let name = &self.goal(mode)?.figure;
        let column = run.column(shim);
        match self.kind {
            Kind::AtMost | Kind::AtLeast => ratio(column, run.column(Shim::Stock), name),
            Kind::Itself => median(column, name),
        }
    }

    /// Whether `left` is better than `right`, or as good.
    fn good(&self, left: f64, right: f64) -> bool {
        match self.kind {
            Kind::AtMost | Kind::Itself => left <= right,
            Kind::AtLeast => left >= right,
        }
    }
}

/// Ours, each with the shim whose figures stand beside.
pub(crate) const MODES: [(Shim, Shim); 3] = [
    (Shim::This, Shim::Published),
    (Shim::Api, Shim::Published),
    (Shim::ThisCrun, Shim::StockCrun),
];

const RUN_POD: &str = "RunPodSandbox, host network";
const PER_SECOND: &str = "pods ready per second, 8 clients";
const LIFE: &str = "CPU time of a pod's life";
const EXEC: &str = "CPU time of an exec";
const PRIVATE: &str = "private memory per pod, 50 pods";
const PRIVATE_KB: &str = "private memory per pod, 50 pods, kB";

/// On a quiet node: what this shim is to reach with runc and with crun, each to the stock shim with runc.
const QUIET: [(&str, f64, f64); 12] = [
    (RUN_POD, 0.17, 0.17),
    ("CreateContainer", 1.00, 1.00),
    ("StartContainer", 0.66, 0.42),
    ("pod ready", 0.42, 0.33),
    ("ExecSync", 0.64, 0.33),
    ("StopContainer", 0.36, 0.33),
    ("StopPodSandbox", 0.14, 0.14),
    (PER_SECOND, 2.0, 2.6),
    (LIFE, 0.40, 0.22),
    (EXEC, 0.85, 0.30),
    (PRIVATE, 0.06, 0.06),
    (PRIVATE_KB, 310.0, 310.0),
];

/// On a busy node, with runc.
const BUSY: [(&str, f64); 7] = [
    (RUN_POD, 0.19),
    ("CreateContainer", 1.05),
    ("StartContainer", 0.82),
    ("pod ready", 0.48),
    ("ExecSync", 0.85),
    ("StopContainer", 0.38),
    ("StopPodSandbox", 0.14),
];

/// On this machine: in podsandbox mode, and through the Sandbox API.
const MACHINE: [(&str, f64, f64); 11] = [
    (RUN_POD, 0.22, 0.15),
    ("StopPodSandbox", 0.25, 0.20),
    ("StartContainer", 0.80, 0.75),
    ("pod ready", 0.58, 0.50),
    ("ExecSync", 0.85, 0.85),
    ("StopContainer", 0.60, 0.60),
    (PER_SECOND, 1.8, 2.2),
    (PRIVATE, 0.16, 0.16),
    (PRIVATE_KB, 900.0, 900.0),
    ("PSS per pod, 50 pods", 0.16, 0.16),
    (LIFE, 0.55, 0.45),
];

/// What does not depend on the place.
const ANYWHERE: [(&str, f64); 4] = [
    ("threads of a pod beside the app", 3.0),
    ("processes of a pod beside the app", 1.0),
    ("CPU time of the shim per GiB of output", 0.10),
    ("wake-ups of an idle pod's shim in 60 s", 0.0),
];

/// What is to be reached, if anything.
fn limit(place: Place, shim: Shim, what: &str) -> Option<f64> {
    let anywhere = ANYWHERE.into_iter().find(|row| row.0 == what);
    if let Some((_, limit)) = anywhere {
        return Some(limit);
    }
    match (place, shim) {
        (Place::Systemd, Shim::This) => {
            QUIET.into_iter().find(|row| row.0 == what).map(|row| row.1)
        }
        (Place::Systemd, Shim::ThisCrun) => {
            QUIET.into_iter().find(|row| row.0 == what).map(|row| row.2)
        }
        (Place::Busy, Shim::This) => BUSY.into_iter().find(|row| row.0 == what).map(|row| row.1),
        (Place::Machine, Shim::This) => MACHINE
            .into_iter()
            .find(|row| row.0 == what)
            .map(|row| row.1),
        (Place::Machine, Shim::Api) => MACHINE
            .into_iter()
            .find(|row| row.0 == what)
            .map(|row| row.2),
        _ => None,
    }
}

/// All of them, with what is to be reached in this place.
pub(crate) fn targets(place: Place) -> Vec<Target> {
    let host = CniOrHost::Host.name();
    let cni = CniOrHost::Cni(Network::Loopback).name();
    // `NETWORK` is the host's network, which the Sandbox API of containerd 2.1 does not have.
    let target = |what: &str, kind, figure: &str| Target {
        what: what.to_owned(),
        kind,
        goals: MODES
            .iter()
            .map(|&(shim, _)| Goal {
                shim,
                figure: figure.replace("NETWORK", if shim == Shim::Api { cni } else { host }),
                limit: limit(place, shim, what),
            })
            .collect(),
    };
    let step = |what: &str| target(what, Kind::AtMost, &format!("latency NETWORK: {what}"));
    vec![
        target(
            RUN_POD,
            Kind::AtMost,
            &format!("latency NETWORK: {}", STEPS[0]),
        ),
        target(
            "RunPodSandbox, loopback network",
            Kind::AtMost,
            &format!("latency {cni}: {}", STEPS[0]),
        ),
        step("CreateContainer"),
        step("StartContainer"),
        step("pod ready"),
        step("ExecSync"),
        step("StopContainer"),
        step("StopPodSandbox"),
        target(
            PER_SECOND,
            Kind::AtLeast,
            "throughput, 8 clients: pods ready per second",
        ),
        target(LIFE, Kind::AtMost, "cpu NETWORK: of a pod's life"),
        target(EXEC, Kind::AtMost, "execs, 1 at a time: CPU of one"),
        target(PRIVATE, Kind::AtMost, "memory 50 pods: private per pod"),
        target(PRIVATE_KB, Kind::Itself, "memory 50 pods: private per pod"),
        target(
            "PSS per pod, 50 pods",
            Kind::AtMost,
            "memory 50 pods: PSS per pod",
        ),
        target(ANYWHERE[0].0, Kind::Itself, "memory 1 pod: threads per pod"),
        target(
            ANYWHERE[1].0,
            Kind::Itself,
            "memory 1 pod: processes per pod",
        ),
        target(
            ANYWHERE[2].0,
            Kind::AtMost,
            "logs 1024 MiB: CPU of the shim",
        ),
        target(
            ANYWHERE[3].0,
            Kind::Itself,
            "idle 60 s: wake-ups of the shim",
        ),
    ]
}

/// As a table; those without any figure are left out.
pub(crate) fn rows(run: &Run) -> Vec<Vec<String>> {
    let modes = MODES
        .into_iter()
        .filter(|&(mode, _)| run.column(mode).is_some());
    let modes: Vec<_> = modes.collect();
    let mut head = vec!["ratio to the stock shim".to_owned()];
    for (mode, rival) in &modes {
        head.extend([
            format!("{}: target", mode.title()),
            "measured".to_owned(),
            String::new(),
            rival.title().to_owned(),
        ]);
    }
    let mut rows = vec![head];
    for target in targets(run.place) {
        if modes
            .iter()
            .all(|&(mode, _)| target.measured(run, mode, mode).is_none())
        {
            continue;
        }
        let mut row = vec![target.what.clone()];
        for &(mode, rival) in &modes {
            row.extend(cells(&target, run, mode, rival));
        }
        rows.push(row);
    }
    rows
}

/// Target, measured, by how much it is met or missed, and the rival's figure beside ours.
fn cells(target: &Target, run: &Run, mode: Shim, rival: Shim) -> [String; 4] {
    let limit = target.goal(mode).and_then(|goal| goal.limit);
    let sign = if target.kind == Kind::AtLeast {
        "≥"
    } else {
        "≤"
    };
    let goal = limit.map_or_else(String::new, |limit| format!("{sign} {}", digits(limit)));
    let Some(measured) = target.measured(run, mode, mode) else {
        // Why that is so stands below the tables.
        let noted = run
            .column(mode)
            .is_none_or(|column| !column.notes.is_empty());
        let why = if noted {
            "not measurable (see below)"
        } else {
            "not measured"
        };
        return [goal, why.to_owned(), String::new(), String::new()];
    };
    let verdict = limit.map_or_else(String::new, |limit| {
        let by = (measured - limit).abs();
        match target.good(measured, limit) {
            true => format!("met by {}", exact(by)),
            false => format!("MISSED by {}", exact(by)),
        }
    });
    let rival = target.measured(run, rival, mode);
    let rival = rival.map_or_else(String::new, |other| {
        let verdict = match target.good(measured, other) {
            _ if exact(measured) == exact(other) => "the same",
            true => "ours is better",
            false => "ours is WORSE",
        };
        format!("{}: {verdict}", exact(other))
    });
    [goal, exact(measured), verdict, rival]
}

/// So many digits that it can be told from a target that is nearly the same.
fn exact(value: f64) -> String {
    if value > 0.0 && value < 1.0 {
        format!("{value:.3}")
    } else {
        digits(value)
    }
}
