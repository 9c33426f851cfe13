//! Containers with the smallest limits of memory start as often as they do when the shim leaves everything to runc.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::cast_precision_loss,
    reason = "a test reports by failing"
)]

use std::path::{Path, PathBuf};
use std::time::Instant;

use serde_json::json;
use shim_tests::direct::Group;
use shim_tests::slot::text;
use shim_tests::{Daemon, lab, on_the_newest_containerd, ours_only, vm};

/// The starts of one row of the table.
fn starts() -> usize {
    std::env::var(vm::WHOLE_TABLE).map_or(60, |starts| starts.parse().unwrap())
}

/// The whole table with `SMALL_LIMIT_STARTS`, else the row that has failed most; in the VM those of its
/// own runc. The whole table has crun in the VM, where cgroup v2 is alone.
fn rows() -> Vec<(PathBuf, i64)> {
    let whole = std::env::var_os(vm::WHOLE_TABLE).is_some();
    if vm::inside() && !whole {
        return [8, 10, 12, 14].map(|mib| (lab::runc(), mib)).into();
    }
    let copies_itself = lab::newer_runtime("runc-1.1.15");
    if !whole {
        return vec![(copies_itself, 8)];
    }
    let mut runtimes = vec![lab::runc(), copies_itself, lab::newer_runtime("runc")];
    runtimes.extend(vm::inside().then(lab::crun));
    let row = |runtime: &PathBuf| [8, 10, 12, 14].map(|mib| (runtime.clone(), mib));
    runtimes.iter().flat_map(row).collect()
}

/// How many creates or starts have failed, and how long the others took, in ms.
#[derive(Default)]
struct Column {
    failed: usize,
    create: Vec<f64>,
    start: Vec<f64>,
}

impl Column {
    fn start(&mut self, group: &Group, id: &str, mib: i64, options: &str) {
        let bundle = group.bundle(id, "exec sleep 3600", |spec| {
            spec["linux"]["resources"]["memory"] = json!({"limit": mib << 20, "swap": mib << 20});
        });
        let begin = Instant::now();
        if group.create_with_options(id, &bundle, options).is_err() {
            self.failed += 1;
            return group.remove_bundle(id);
        }
        self.create.push(begin.elapsed().as_secs_f64() * 1e3);
        let begin = Instant::now();
        match group.shim.start(id, "") {
            Ok(_) => self.start.push(begin.elapsed().as_secs_f64() * 1e3),
            Err(_) => self.failed += 1,
        }
        // An init that was killed for its memory takes no signal.
        let _ = group.shim.kill(id, "", 9);
        group.shim.wait(id, "").unwrap();
        group.shim.delete(id, "").unwrap();
        group.remove_bundle(id);
    }

    fn text(&mut self) -> String {
        let [create, start] = [&mut self.create, &mut self.start].map(|times| {
            times.sort_by(f64::total_cmp);
            times.get(times.len() / 2).copied().unwrap_or_default()
        });
        format!(
            "{} failed, create {create:.1} ms, start {start:.1} ms",
            self.failed
        )
    }
}

/// What two columns of so many starts may differ by if both fail alike, `failed` together: 3.5 standard deviations. Where
/// other processes move between cgroups all the time, runc alone fails, too.
fn chance(failed: usize, starts: usize) -> f64 {
    let each = failed as f64 / (2 * starts) as f64;
    1.0 + 3.5 * (2.0 * starts as f64 * each * (1.0 - each)).sqrt()
}

/// A program named `runc` or `crun`, and its root.
fn options(daemon: &Daemon, runtime: &Path, shortcuts: bool) -> String {
    // Two of the runtimes are named `runc`.
    let name = text(runtime).replace('/', "-");
    let folder = daemon.directory().join(format!("small{name}"));
    let program = folder.join(lab::program_name(runtime));
    if !program.exists() {
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::copy(runtime, &program).unwrap();
    }
    let root = daemon.directory().join("small-root");
    format!(
        "BinaryName = '{}'\nRoot = '{}'\nshortcuts = {shortcuts}\n",
        text(&program),
        text(&root)
    )
}

on_the_newest_containerd! {
    fn a_small_limit_of_memory_fails_no_more_starts_than_runc_alone_does(version) {
        ours_only!("it compares two settings of ours");
        let daemon = Daemon::start(version);
        let group = Group::start(&daemon, "small");
        let starts = starts();
        for (runtime, mib) in rows() {
            let mut columns = [Column::default(), Column::default()];
            for turn in 0..starts {
                for (column, shortcuts) in columns.iter_mut().zip([true, false]) {
                    let options = options(&daemon, &runtime, shortcuts);
                    column.start(&group, &format!("c{mib}-{turn}-{shortcuts}"), mib, &options);
                }
            }
            let [with, without] = &mut columns;
            println!("{} {mib} MiB, {starts} starts: {}; without shortcuts {}", runtime.display(), with.text(), without.text());
            assert!(mib < 14 || without.failed < starts, "{}: it does not run here at all", runtime.display());
            let (more, chance) = (with.failed.saturating_sub(without.failed), chance(with.failed + without.failed, starts));
            assert!(more as f64 <= chance, "{}; without shortcuts {}", with.text(), without.text());
        }
        group.end();
        daemon.end();
    }
}
