//! What was measured, as JSON and as Markdown.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use shim_tests::{Version, lab};

use crate::columns::{Column, Shim};
use crate::place::Place;
use crate::targets;
use crate::throughput::PER_SECOND;
use crate::trace::{REST, RUNS, TRACE};

/// All that was measured on one containerd, in one place.
pub(crate) struct Run {
    pub(crate) place: Place,
    pub(crate) version: Version,
    /// The OCI runtimes.
    runtimes: String,
    pub(crate) columns: Vec<Column>,
    /// Which shims cannot be measured, and why.
    absent: Vec<String>,
}

impl Run {
    /// Without figures. What cannot be measured at all is only said.
    pub(crate) fn new(place: Place, version: Version, shims: &[Shim]) -> Self {
        let shims = shims.iter().copied().filter(|&shim| place.has(shim));
        let mut run = Self {
            place,
            version,
            runtimes: String::new(),
            columns: Vec::new(),
            absent: Vec::new(),
        };
        let mut runtimes = vec![lab::runc()];
        for shim in shims {
            match shim.missing(version) {
                Some(why) => run.absent.push(format!("{}: {why}", shim.title())),
                None => run.columns.push(Column::new(shim)),
            }
        }
        if run.columns.iter().any(|column| column.shim.crun()) {
            runtimes.push(lab::crun());
        }
        let runtimes: Vec<String> = runtimes.iter().map(|runtime| named(runtime)).collect();
        run.runtimes = runtimes.join(", ");
        run
    }

    /// The exact versions, and the place.
    pub(crate) fn title(&self) -> String {
        let (exact, place) = (self.version.exact(), self.place.title());
        format!("containerd {exact}, {}: {place}", self.runtimes)
    }

    /// For bench.json.
    pub(crate) fn json(&self) -> Value {
        json!({
            "place": self.place.name(),
            "containerd": self.version.line(),
            "title": self.title(),
            "runtimes": self.runtimes,
            "absent": self.absent,
            "columns": self.columns.iter().map(Column::json).collect::<Vec<_>>(),
        })
    }

    /// The inverse of [`Self::json`].
    pub(crate) fn from_json(json: &[u8], place: Place, version: Version) -> Self {
        let json: Value = serde_json::from_slice(json).unwrap();
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        Self {
            place,
            version,
            runtimes: text(&json["runtimes"]),
            columns: json["columns"]
                .as_array()
                .unwrap()
                .iter()
                .map(Column::from_json)
                .collect(),
            absent: json["absent"]
                .as_array()
                .unwrap()
                .iter()
                .map(text)
                .collect(),
        }
    }

    /// The column of this shim.
    pub(crate) fn column(&self, shim: Shim) -> Option<&Column> {
        self.columns.iter().find(|column| column.shim == shim)
    }
}

/// `runc 1.3.6`: the first line of what it says of itself.
fn named(runtime: &Path) -> String {
    let output = Command::new(runtime).arg("--version").output();
    let output = output.unwrap_or_else(|error| panic!("{}: {error}", runtime.display()));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines().next().unwrap_or("?").replace(" version", "")
}

/// For bench.json.
pub(crate) fn json(machine: &str, runs: &[Run]) -> Value {
    json!({ "machine": machine, "runs": runs.iter().map(Run::json).collect::<Vec<_>>() })
}

/// For the screen and bench.md.
pub(crate) fn markdown(machine: &str, runs: &[Run]) -> String {
    let mut text = format!("{machine}\n");
    for run in runs {
        write!(text, "\n## {}\n", run.title()).unwrap();
        let parts = [
            ("Targets", targets::rows(run)),
            ("All figures: medians (90th, 99th percentile)", figures(run)),
            (
                "Where the time goes: in each call, the programs that ran meanwhile (how often), ms",
                traces(run),
            ),
        ];
        for (title, rows) in parts {
            // The first row is the heading.
            if rows.len() > 1 {
                write!(text, "\n### {title}\n\n{}", table(&rows)).unwrap();
            }
        }
        let worse = worse_than_published(run);
        if !worse.is_empty() {
            let worse = worse.join("; ");
            write!(text, "\nWorse than the published Rust shim: {worse}.\n").unwrap();
        }
        let notes = run.columns.iter().flat_map(|column| {
            let said = column.notes.iter();
            said.map(|note| format!("{}: {note}", column.shim.title()))
        });
        for note in run.absent.iter().cloned().chain(notes) {
            write!(text, "\n- {note}").unwrap();
        }
        text += "\n";
    }
    text
}

/// The names of the figures of all shims.
fn names(run: &Run) -> BTreeSet<&str> {
    run.columns.iter().flat_map(Column::names).collect()
}

/// What ran in each call.
fn traces(run: &Run) -> Vec<Vec<String>> {
    let mut head = vec![String::new()];
    head.extend(
        run.columns
            .iter()
            .map(|column| column.shim.title().to_owned()),
    );
    let mut rows = vec![head];
    let wanted = |name: &&str| name.starts_with(TRACE) && !name.ends_with(RUNS);
    for name in names(run).into_iter().filter(wanted) {
        let cells = run.columns.iter().map(|column| {
            let cell = median(Some(column), name).map(|time| {
                let runs = median(Some(column), &format!("{name}{RUNS}")).unwrap_or_default();
                if name.ends_with(REST) {
                    digits(time)
                } else {
                    format!("{} ({runs}×)", digits(time))
                }
            });
            cell.unwrap_or_default()
        });
        let label = name.trim_start_matches(TRACE).to_owned();
        rows.push(std::iter::once(label).chain(cells).collect());
    }
    rows
}

/// Every figure of every shim, and the ratios of the medians to the stock shim's.
fn figures(run: &Run) -> Vec<Vec<String>> {
    let stock = run.column(Shim::Stock);
    let others = |&column: &&Column| column.shim != Shim::Stock;
    let mut head = vec![String::new()];
    head.extend(
        run.columns
            .iter()
            .map(|column| column.shim.title().to_owned()),
    );
    let ratios: Vec<&Column> = run.columns.iter().filter(others).collect();
    head.extend(
        ratios
            .iter()
            .map(|column| format!("{} / stock", column.shim.name())),
    );
    let mut rows = vec![head];
    for name in names(run) {
        if name.starts_with(TRACE) {
            continue;
        }
        let mut row = vec![name.to_owned()];
        for column in &run.columns {
            row.push(
                column
                    .figure(name)
                    .map_or_else(String::new, |(unit, spread)| {
                        let mut cell = format!("{} {unit}", digits(spread.median()));
                        if spread.count() > 2 {
                            let [p90, p99] =
                                [90, 99].map(|percent| digits(spread.percentile(percent)));
                            write!(cell, " ({p90}, {p99})").unwrap();
                        }
                        cell.trim().to_owned()
                    }),
            );
        }
        row.extend(ratios.iter().map(|column| {
            ratio(Some(column), stock, name).map_or_else(String::new, |ratio| format!("{ratio:.2}"))
        }));
        rows.push(row);
    }
    rows
}

/// Our figures that are not as good as the published Rust shim's, and both.
fn worse_than_published(run: &Run) -> Vec<String> {
    let mut worse = Vec::new();
    for name in names(run)
        .into_iter()
        .filter(|name| !name.starts_with(TRACE))
    {
        for shim in [Shim::This, Shim::Api] {
            let [ours, theirs] = [shim, Shim::Published].map(|shim| median(run.column(shim), name));
            let (Some(ours), Some(theirs)) = (ours, theirs) else {
                continue;
            };
            let more_is_better = name.ends_with(PER_SECOND);
            if ours != theirs && (ours > theirs) != more_is_better {
                let [ours, theirs] = [ours, theirs].map(digits);
                worse.push(format!("{}, {name} ({ours}, not {theirs})", shim.title()));
            }
        }
    }
    worse
}

/// The median of a figure, where there is one.
pub(crate) fn median(column: Option<&Column>, name: &str) -> Option<f64> {
    Some(column?.figure(name)?.1.median())
}

/// The ratio of two medians.
pub(crate) fn ratio(this: Option<&Column>, other: Option<&Column>, name: &str) -> Option<f64> {
    let ratio = median(this, name)? / median(other, name)?;
    ratio.is_finite().then_some(ratio)
}

/// Three digits, as far as they say something.
pub(crate) fn digits(value: f64) -> String {
    match value {
        0.0 => "0".to_owned(),
        value if value.abs() < 0.1 => format!("{value:.3}"),
        value if value.abs() < 10.0 => format!("{value:.2}"),
        value if value.abs() < 100.0 => format!("{value:.1}"),
        value => format!("{value:.0}"),
    }
}

/// A table of Markdown that can also be read as it is; the first row is the heading.
pub(crate) fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or_default();
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        cells
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or_default()
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut text = String::new();
    for (number, row) in rows.iter().enumerate() {
        for (cell, &width) in row.iter().zip(&widths) {
            write!(text, "| {cell:<width$} ").unwrap();
        }
        text += "|\n";
        if number == 0 {
            for width in &widths {
                write!(text, "|{:-<1$}", "", width + 2).unwrap();
            }
            text += "|\n";
        }
    }
    text
}
