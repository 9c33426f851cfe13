//! The command line.

use shim_tests::{Version, lab};

use crate::columns::Shim;
use crate::node::CniOrHost;
use crate::place::Place;

pub(crate) const USAGE: &str = "bench [WHAT…] [--place systemd,busy,machine] [--containerd 2.1,1.7] \
     [--shims this,this-crun,api,stock,stock-crun,published] [--network host,loopback,bridge] [--rounds N] [--pods N] \
     [--standing N] [--execs N] [--calls N] [--mib N] [--seconds N] [--out FOLDER]; \
     WHAT: latency, throughput, memory, cpu, execs, calls, density, logs, idle, trace";

/// What can be measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum What {
    Latency,
    Throughput,
    Memory,
    Cpu,
    Execs,
    Calls,
    Density,
    Logs,
    Idle,
    Trace,
}

impl What {
    pub(crate) const ALL: [Self; 10] = [
        Self::Latency,
        Self::Throughput,
        Self::Memory,
        Self::Cpu,
        Self::Execs,
        Self::Calls,
        Self::Density,
        Self::Logs,
        Self::Idle,
        Self::Trace,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Latency => "latency",
            Self::Throughput => "throughput",
            Self::Memory => "memory",
            Self::Cpu => "cpu",
            Self::Execs => "execs",
            Self::Calls => "calls",
            Self::Density => "density",
            Self::Logs => "logs",
            Self::Idle => "idle",
            Self::Trace => "trace",
        }
    }
}

/// What is to be measured, how, and on what.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    pub(crate) what: Vec<What>,
    pub(crate) places: Vec<Place>,
    /// This process is already in the node of this place, and measures.
    pub(crate) inside: Option<Place>,
    pub(crate) containerds: Vec<Version>,
    pub(crate) shims: Vec<Shim>,
    pub(crate) networks: Vec<CniOrHost>,
    /// Pods of each shim whose times are taken.
    pub(crate) rounds: usize,
    /// As many pods at once as memory is measured with.
    pub(crate) pods: usize,
    /// As many pods at once as density is measured with.
    pub(crate) standing: usize,
    /// As many execs in one container.
    pub(crate) execs: usize,
    /// As many calls of each kind to one shim.
    pub(crate) calls: usize,
    /// Output of a container.
    pub(crate) mib: usize,
    /// How long an idle pod is watched.
    pub(crate) seconds: usize,
    /// Where the report goes.
    pub(crate) out: Option<String>,
}

impl Wanted {
    /// Reads the command line.
    ///
    /// # Errors
    /// What is wrong with it.
    pub(crate) fn of(mut words: impl Iterator<Item = String>) -> Result<Self, String> {
        let versions = match lab::is_given() {
            true => vec![Version::newest()],
            false => vec![Version::V2_1, Version::V1_7],
        };
        let mut wanted = Self {
            what: Vec::new(),
            places: Place::ALL.to_vec(),
            inside: None,
            containerds: versions.clone(),
            shims: Shim::ALL.to_vec(),
            networks: CniOrHost::ALL.to_vec(),
            rounds: 50,
            pods: 100,
            standing: 500,
            execs: 1000,
            calls: 10_000,
            mib: 1024,
            seconds: 60,
            out: None,
        };
        while let Some(word) = words.next() {
            if let Some(what) = What::ALL.into_iter().find(|what| what.name() == word) {
                wanted.what.push(what);
                continue;
            }
            let value = words
                .next()
                .ok_or(format!("{word}: not known, or no value"))?;
            let number = || {
                value
                    .parse()
                    .map_err(|_| format!("{word} {value}: no number"))
            };
            match word.as_str() {
                "--place" => {
                    wanted.places = list(&value, &Place::ALL, |one| one.name().to_owned())?;
                }
                "--inside" => {
                    wanted.inside = list(&value, &Place::ALL, |one| one.name().to_owned())?.pop();
                }
                "--containerd" => wanted.containerds = list(&value, &versions, |one| one.line())?,
                "--shims" => wanted.shims = list(&value, &Shim::ALL, |one| one.name().to_owned())?,
                "--network" => {
                    wanted.networks = list(&value, &CniOrHost::ALL, |one| one.name().to_owned())?;
                }
                "--rounds" => wanted.rounds = number()?,
                "--pods" => wanted.pods = number()?,
                "--standing" => wanted.standing = number()?,
                "--execs" => wanted.execs = number()?,
                "--calls" => wanted.calls = number()?,
                "--mib" => wanted.mib = number()?,
                "--seconds" => wanted.seconds = number()?,
                "--out" => wanted.out = Some(value),
                _ => return Err(format!("{word}: not known")),
            }
        }
        if wanted.what.is_empty() {
            wanted.what = What::ALL.to_vec();
        }
        Ok(wanted)
    }

    /// Whether this is to be measured. CPU time is measured with the latency.
    pub(crate) fn has(&self, what: What) -> bool {
        self.what.contains(&what) || (what == What::Latency && self.what.contains(&What::Cpu))
    }
}

/// The ones named, in the order of `all`.
fn list<T: Copy>(value: &str, all: &[T], name: impl Fn(T) -> String) -> Result<Vec<T>, String> {
    let names: Vec<&str> = value.split(',').collect();
    match names
        .iter()
        .find(|&&one| !all.iter().any(|&known| name(known) == one))
    {
        Some(unknown) => Err(format!("{unknown}: not known")),
        None => Ok(all
            .iter()
            .copied()
            .filter(|&one| names.contains(&&*name(one)))
            .collect()),
    }
}
