//! What this shim is to reach, and whether it does.

use crate::columns::Shim;
use crate::node::{CniOrHost, STEPS};
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
    /// In podsandbox mode and through the Sandbox API: the figure's name, and what it is to be, if anything.
    goals: [(String, Option<f64>); 2],
}

impl Target {
    /// The figure of this shim, and what it is to be.
    fn goal(&self, shim: Shim) -> &(String, Option<f64>) {
        &self.goals[usize::from(shim == Shim::Api)]
    }

    /// What the figure is for this shim: a ratio, or the figure itself. The others are seen as `mode`, one of ours.
    pub(crate) fn measured(&self, run: &Run, shim: Shim, mode: Shim) -> Option<f64> {
        let (name, _) = self.goal(mode);
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

/// All of them.
pub(crate) fn targets() -> Vec<Target> {
    let host = CniOrHost::Host.name();
    let cni = CniOrHost::Cni(Network::Loopback).name();
    let target = |what: &str, kind, names: [String; 2], limits: [Option<f64>; 2]| {
        let [this, api] = names;
        Target {
            what: what.to_owned(),
            kind,
            goals: [(this, limits[0]), (api, limits[1])],
        }
    };
    // The Sandbox API has no host network on containerd 2.1.
    let step = |step: &str, this, api| {
        let names = [host, cni].map(|network| format!("latency {network}: {step}"));
        target(step, Kind::AtMost, names, [Some(this), Some(api)])
    };
    let both = |what: &str, kind, name: &str, this, api| {
        target(
            what,
            kind,
            [name.to_owned(), name.to_owned()],
            [Some(this), Some(api)],
        )
    };
    let run_pod = |network, limits| {
        let name = format!("latency {network}: {}", STEPS[0]);
        let what = format!("{}, {network} network", STEPS[0]);
        target(&what, Kind::AtMost, [name.clone(), name], limits)
    };
    let life = [host, cni].map(|network| format!("cpu {network}: of a pod's life"));
    vec![
        run_pod(host, [Some(0.22), Some(0.15)]),
        run_pod(cni, [None, None]),
        step("StopPodSandbox", 0.25, 0.20),
        step("StartContainer", 0.80, 0.75),
        step("pod ready", 0.58, 0.50),
        step("ExecSync", 0.85, 0.85),
        step("StopContainer", 0.60, 0.60),
        both(
            "pods ready per second, 8 clients",
            Kind::AtLeast,
            "throughput, 8 clients: pods ready per second",
            1.8,
            2.2,
        ),
        both(
            "private memory per pod, 50 pods",
            Kind::AtMost,
            "memory 50 pods: private per pod",
            0.16,
            0.16,
        ),
        both(
            "private memory per pod, 50 pods, kB",
            Kind::Itself,
            "memory 50 pods: private per pod",
            900.0,
            900.0,
        ),
        both(
            "PSS per pod, 50 pods",
            Kind::AtMost,
            "memory 50 pods: PSS per pod",
            0.16,
            0.16,
        ),
        both(
            "threads of a pod beside the app",
            Kind::Itself,
            "memory 1 pod: threads per pod",
            3.0,
            3.0,
        ),
        both(
            "processes of a pod beside the app",
            Kind::Itself,
            "memory 1 pod: processes per pod",
            1.0,
            1.0,
        ),
        target(
            "CPU time of a pod's life",
            Kind::AtMost,
            life,
            [Some(0.55), Some(0.45)],
        ),
        both(
            "CPU time of the shim per GiB of output",
            Kind::AtMost,
            "logs 1024 MiB: CPU of the shim",
            0.10,
            0.10,
        ),
        both(
            "wake-ups of an idle pod's shim in 60 s",
            Kind::Itself,
            "idle 60 s: wake-ups of the shim",
            0.0,
            0.0,
        ),
    ]
}

/// As a table; those without any figure are left out.
pub(crate) fn rows(run: &Run) -> Vec<Vec<String>> {
    let modes = [Shim::This, Shim::Api];
    let mut head = vec!["ratio to the stock shim".to_owned()];
    for mode in modes {
        head.extend(
            ["target", "measured", "", "published Rust shim"].map(|word| match word {
                "target" => format!("{}: {word}", mode.title()),
                word => word.to_owned(),
            }),
        );
    }
    let mut rows = vec![head];
    for target in targets() {
        let figures = modes.map(|mode| target.measured(run, mode, mode));
        if figures == [None, None] {
            continue;
        }
        let mut row = vec![target.what.clone()];
        for mode in modes {
            row.extend(cells(&target, run, mode));
        }
        rows.push(row);
    }
    rows
}

/// Target, measured, by how much it is met or missed, and the published shim's figure beside ours.
fn cells(target: &Target, run: &Run, mode: Shim) -> [String; 4] {
    let limit = target.goal(mode).1;
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
    let published = target.measured(run, Shim::Published, mode);
    let published = published.map_or_else(String::new, |other| {
        let verdict = match target.good(measured, other) {
            _ if exact(measured) == exact(other) => "the same",
            true => "ours is better",
            false => "ours is WORSE",
        };
        format!("{}: {verdict}", exact(other))
    });
    [goal, exact(measured), verdict, published]
}

/// So many digits that it can be told from a target that is nearly the same.
fn exact(value: f64) -> String {
    if value > 0.0 && value < 1.0 {
        format!("{value:.3}")
    } else {
        digits(value)
    }
}
