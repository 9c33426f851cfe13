//! Where the time goes in each call: which programs ran meanwhile, how often and how long.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use shim_tests::cri::Failure;

use crate::columns::{Column, Shim, in_turn};
use crate::connector::{Event, Recorder, What};
use crate::node::{CniOrHost, Node, STEPS, Times, life, milliseconds};

/// A program that ran, and from when to when.
struct Ran {
    program: String,
    begin: u64,
    end: u64,
}

impl Ran {
    /// A program that has begun and runs.
    fn since(begin: u64, program: String) -> Self {
        Self {
            program,
            begin,
            end: u64::MAX,
        }
    }
}

/// Of one pod: step and program → how often it ran in that step, and its milliseconds there.
type Seen = BTreeMap<(usize, String), (f64, f64)>;

/// What the name of a figure ends with that says how often a program ran.
pub(crate) const RUNS: &str = ", runs";
/// And what it begins with.
pub(crate) const TRACE: &str = "trace ";

/// What no program below containerd took: containerd itself, the shim that is there already, the kernel.
pub(crate) const REST: &str = "the rest (containerd, the running shim)";

pub(crate) fn run(node: &Node, columns: &mut [Column], network: CniOrHost, rounds: usize) {
    let what = format!("trace, {} network", network.name());
    let mut all: Vec<(Shim, Seen)> = Vec::new();
    in_turn(node, columns, &what, network, rounds, |column, _| {
        let unheard = |error| Failure(format!("the kernel's process events: {error}"));
        let recorder = Recorder::start(node.daemon.pid()).map_err(unheard)?;
        let times = life(node, column.shim, network);
        let ran = programs(&recorder.stop().map_err(unheard)?);
        all.push((column.shim, seen(&times?, &ran)));
        Ok(())
    });
    for column in columns {
        let mine = || all.iter().filter(|(shim, _)| *shim == column.shim);
        let keys: BTreeSet<_> = mine().flat_map(|(_, seen)| seen.keys().cloned()).collect();
        let figures: Vec<_> = keys
            .into_iter()
            .flat_map(|(step, program)| {
                let name = format!("{TRACE}{} {}: {program}", network.name(), named(step));
                mine().map(move |(_, seen)| {
                    let key = (step, program.clone());
                    (name.clone(), seen.get(&key).copied().unwrap_or_default())
                })
            })
            .collect();
        for (name, (count, time)) in figures {
            column.add(&format!("{name}{RUNS}"), "", count);
            column.add(&name, "ms", time);
        }
    }
}

/// The step's name, so that names are in the order of the steps.
fn named(step: usize) -> String {
    format!("{} {}", step + 1, STEPS[step])
}

/// What ran in each step.
fn seen(times: &[Times], ran: &[Ran]) -> Seen {
    let mut seen = Seen::new();
    for (step, time) in times.iter().enumerate() {
        let mut covered = Vec::new();
        for one in ran {
            let (begin, end) = (one.begin.max(time.begin), one.end.min(time.end));
            if begin < end && shown(&one.program) {
                let entry = seen.entry((step, one.program.clone())).or_default();
                entry.1 += milliseconds(end - begin);
                if one.begin >= time.begin {
                    entry.0 += 1.0;
                }
                if waited_for(&one.program) {
                    covered.push((begin, end));
                }
            }
        }
        covered.sort_unstable();
        let mut rest = time.end - time.begin;
        let mut until = 0;
        for (begin, end) in covered {
            rest -= end.saturating_sub(begin.max(until));
            until = until.max(end);
        }
        seen.insert((step, REST.to_owned()), (1.0, milliseconds(rest)));
    }
    seen
}

/// Whether it says something: shims, pause processes and apps run all the time.
fn shown(program: &str) -> bool {
    waited_for(program) || program == "runc init"
}

/// Whether somebody waits for the end of such a program.
fn waited_for(program: &str) -> bool {
    program.starts_with("CNI ")
        || ["shim start", "shim delete"].contains(&program)
        || (program.starts_with("runc ") && program != "runc init")
}

/// Which programs ran when. What still runs at the end ran until then.
fn programs(events: &[Event]) -> Vec<Ran> {
    let mut running: BTreeMap<u32, Ran> = BTreeMap::new();
    let mut ran = Vec::new();
    for event in events {
        match &event.what {
            What::Fork => {
                let forked = Ran::since(event.at, "a fork".to_owned());
                running.insert(event.pid, forked);
            }
            What::Exec(words) => {
                let program = name(words);
                match running.get_mut(&event.pid) {
                    // The time until its first exec is the program's; and runc copies itself, and runs the copy.
                    Some(now) if now.program == "a fork" => now.program = program,
                    Some(now) if now.program == program => {}
                    other => {
                        let begin = event.at;
                        if let Some(before) = other {
                            let program = std::mem::take(&mut before.program);
                            ran.push(Ran {
                                program,
                                begin: before.begin,
                                end: begin,
                            });
                        }
                        running.insert(event.pid, Ran::since(begin, program));
                    }
                }
            }
            What::Exit => {
                if let Some(before) = running.remove(&event.pid) {
                    ran.push(Ran {
                        end: event.at,
                        ..before
                    });
                }
            }
        }
    }
    ran.extend(running.into_values());
    ran
}

/// What to call a program with these arguments.
fn name(words: &[String]) -> String {
    let Some(path) = words.first().map(Path::new) else {
        return "unknown".to_owned();
    };
    let program = path.file_name().unwrap_or_default().to_string_lossy();
    let last = words.last().map_or("", String::as_str);
    if program.starts_with("containerd-shim-") {
        return match last {
            "start" | "delete" => format!("shim {last}"),
            _ => "shim".to_owned(),
        };
    }
    if program == "runc" || program == "exe" {
        let known = ["init", "create", "start", "exec", "kill", "delete", "state"];
        let command = words.iter().find(|word| known.contains(&word.as_str()));
        return format!("runc {}", command.map_or("?", String::as_str));
    }
    match path.parent() {
        Some(folder) if folder.ends_with("cni") => format!("CNI {program}"),
        _ => program.into_owned(),
    }
}
