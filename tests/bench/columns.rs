//! The shims that are compared, and the figures of each.

use std::collections::BTreeMap;

use serde_json::{Value, json};
use shim_tests::cri::Failure;
use shim_tests::spread::Spread;
use shim_tests::{Version, lab, rescue, screen};

use crate::node::{CniOrHost, Node};

/// After so many failures in one measurement a shim is left out of the rest of it.
const GIVE_UP: usize = 2;

/// The units of figures; a count has none.
const UNITS: [&str; 4] = ["", "ms", "s", "kB"];

/// A shim, and how containerd drives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shim {
    /// Ours, in podsandbox mode.
    This,
    /// The same, with crun.
    ThisCrun,
    /// Ours, through the Sandbox API.
    Api,
    /// The containerd version's own.
    Stock,
    /// The same, with crun.
    StockCrun,
    /// `containerd-runc-shim`, the newest that is published.
    Published,
}

impl Shim {
    /// In the order of the tables.
    pub(crate) const ALL: [Self; 6] = [
        Self::This,
        Self::ThisCrun,
        Self::Api,
        Self::Stock,
        Self::StockCrun,
        Self::Published,
    ];

    /// Its name on the command line, in the JSON, and of its handler.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::This => "this",
            Self::ThisCrun => "this-crun",
            Self::Api => "api",
            Self::Stock => "stock",
            Self::StockCrun => "stock-crun",
            Self::Published => "published",
        }
    }

    /// Its name in a table.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Self::This => "this shim",
            Self::ThisCrun => "this shim, crun",
            Self::Api => "Sandbox API",
            Self::Stock => "stock shim",
            Self::StockCrun => "stock shim, crun",
            Self::Published => "published Rust shim",
        }
    }

    /// `runtime_type`: containerd looks for a binary of that name.
    pub(crate) fn runtime_type(self) -> &'static str {
        match self {
            Self::This | Self::ThisCrun | Self::Api => "io.containerd.pause.v2",
            Self::Stock | Self::StockCrun => "io.containerd.runc.v2",
            Self::Published => "io.containerd.runc.v2-rs",
        }
    }

    /// Whether its OCI runtime is crun.
    pub(crate) fn crun(self) -> bool {
        matches!(self, Self::ThisCrun | Self::StockCrun)
    }

    /// Why it cannot be measured on this containerd at all.
    pub(crate) fn missing(self, version: Version) -> Option<&'static str> {
        match self {
            Self::Api if version < Version::V2_0 => Some("this containerd has no Sandbox API"),
            Self::Api if lab::has_options_of_the_machine() => {
                Some("its options would be those of this machine's file")
            }
            Self::Published if !crate::node::published().is_file() => {
                Some("it is not installed: `make bench` does that")
            }
            Self::This
            | Self::ThisCrun
            | Self::Api
            | Self::Stock
            | Self::StockCrun
            | Self::Published => None,
        }
    }

    /// Why it cannot be measured with this network.
    pub(crate) fn refuses(self, network: CniOrHost) -> Option<&'static str> {
        (self == Self::Api && network == CniOrHost::Host).then_some(
            "containerd 2.1 crashes (a nil pointer) on a pod with the host's network in this mode",
        )
    }
}

/// What was measured of one thing.
#[derive(Debug)]
struct Figure {
    unit: &'static str,
    values: Vec<f64>,
}

/// A shim with its figures, by name.
#[derive(Debug)]
pub(crate) struct Column {
    pub(crate) shim: Shim,
    figures: BTreeMap<String, Figure>,
    /// What could not be measured, and why.
    pub(crate) notes: Vec<String>,
    /// It has failed in one measurement so often that it was left out of the rest.
    failed: bool,
}

impl Column {
    pub(crate) fn new(shim: Shim) -> Self {
        Self {
            shim,
            figures: BTreeMap::new(),
            notes: Vec::new(),
            failed: false,
        }
    }

    /// One more value of a figure.
    pub(crate) fn add(&mut self, name: &str, unit: &'static str, value: f64) {
        let new = || Figure {
            unit,
            values: Vec::new(),
        };
        let figure = self.figures.entry(name.to_owned()).or_insert_with(new);
        figure.values.push(value);
    }

    /// Why something is missing.
    pub(crate) fn note(&mut self, what: &str, why: &str) {
        screen::line(&format!("  {}: {why}", self.shim.title()));
        // The second failure of a kind says nothing new.
        let what = format!("{what}: ");
        if !self.notes.iter().any(|note| note.starts_with(&what)) {
            self.notes.push(what + why);
        }
    }

    /// The figure's unit and values.
    pub(crate) fn figure(&self, name: &str) -> Option<(&'static str, Spread)> {
        let figure = self.figures.get(name)?;
        Some((figure.unit, figure.values.iter().copied().collect()))
    }

    /// The names of all figures.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.figures.keys().map(String::as_str)
    }

    /// For bench.json.
    pub(crate) fn json(&self) -> Value {
        let figures = self.figures.iter().map(|(name, figure)| {
            let spread: Spread = figure.values.iter().copied().collect();
            let value = json!({
                "unit": figure.unit,
                "count": spread.count(),
                "median": spread.median(),
                "p90": spread.percentile(90),
                "p99": spread.percentile(99),
                "least": spread.least(),
                "most": spread.most(),
                "values": figure.values,
            });
            (name.clone(), value)
        });
        json!({
            "shim": self.shim.name(),
            "figures": figures.collect::<serde_json::Map<_, _>>(),
            "notes": self.notes,
        })
    }

    /// The inverse of [`Self::json`].
    pub(crate) fn from_json(json: &Value) -> Self {
        let shim = Shim::ALL
            .into_iter()
            .find(|shim| json["shim"] == shim.name());
        let mut column = Self::new(shim.unwrap());
        for (name, figure) in json["figures"].as_object().unwrap() {
            let unit = UNITS.into_iter().find(|unit| figure["unit"] == *unit);
            for value in figure["values"].as_array().unwrap() {
                column.add(name, unit.unwrap(), value.as_f64().unwrap());
            }
        }
        let notes = json["notes"].as_array().unwrap().iter();
        column.notes = notes
            .map(|note| note.as_str().unwrap().to_owned())
            .collect();
        column
    }
}

/// Does `one` with the round's number, so often with each shim in turn; none is always the first. A failure is noted, and the others go on.
pub(crate) fn in_turn(
    node: &Node,
    columns: &mut [Column],
    what: &str,
    network: CniOrHost,
    rounds: usize,
    mut one: impl FnMut(&mut Column, usize) -> Result<(), Failure>,
) {
    screen::line(what);
    let mut failures = vec![0; columns.len()];
    let mut order: Vec<usize> = (0..columns.len()).collect();
    // What has only failed so far would fail again, and take its time.
    order.retain(|&at| !columns[at].failed || !columns[at].figures.is_empty());
    order.retain(|&at| match columns[at].shim.refuses(network) {
        Some(why) => {
            columns[at].note(what, why);
            false
        }
        None => true,
    });
    for round in 0..rounds {
        for &at in &order {
            rescue::checkpoint();
            if failures[at] < GIVE_UP
                && let Err(failure) = one(&mut columns[at], round)
            {
                failures[at] += 1;
                columns[at].failed |= failures[at] == GIVE_UP;
                columns[at].note(what, &screen::short(&failure.0, 600));
                node.clear();
            }
        }
        if !order.is_empty() {
            order.rotate_left(1);
        }
    }
}
