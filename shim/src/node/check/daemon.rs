//! Which containerd answers, and whether its configuration can be read.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::process::Pid;

use super::Node;
use crate::error::Error;
use crate::kernel::process;
use crate::node::Asked;
use crate::node::config::Config;
use crate::node::containerd::{Containerd, Version};
use crate::node::programs;
use crate::node::report::{Finding, State, Verdict, note, ok, todo};

/// Series of containerd that all tests run on, or have run on (docs/containerd.md).
const TESTED: [(u32, u32); 4] = [(1, 6), (1, 7), (2, 1), (2, 3)];
const OLDEST: Version = Version::of(1, 6);
/// The first release that nobody has tried.
const UNKNOWN: Version = Version::of(2, 5);

/// Finds containerd and reads its configuration. Without either there is no node to look at.
pub(super) fn look<'a>(asked: &'a Asked, findings: &mut Vec<Finding>) -> Option<Node<'a>> {
    let Found {
        containerd,
        answers,
        version,
    } = find(asked, findings)?;
    let config = containerd.config();
    let verdict = match &config {
        Ok(config) => configuration(&containerd, config, version),
        Err(error) => {
            let file = containerd.config.display();
            todo(format!("{error}. Mend {file}, then restart containerd"))
        }
    };
    findings.push(Finding::new("config", verdict));
    let config = config.ok()?;
    let folders = folders(&containerd, &config);
    Some(Node {
        asked,
        containerd,
        answers,
        version,
        config,
        folders,
    })
}

struct Found {
    containerd: Containerd,
    answers: bool,
    version: Version,
}

fn find(asked: &Asked, findings: &mut Vec<Finding>) -> Option<Found> {
    let mut add = |verdict| findings.push(Finding::new("containerd", verdict));
    let found = Containerd::at(&asked.address, asked.config.as_deref());
    let answers = found.is_ok();
    let containerd = found.unwrap_or_else(|error| {
        add(todo(nobody(asked, &error)));
        Containerd::installed(asked.config.as_deref())
    });
    if containerd.is_in_another_place() {
        add(todo(elsewhere(containerd.pid)));
        return None;
    }
    let version = match containerd.version() {
        Ok(version) => version,
        Err(error) => {
            if answers {
                add(todo(format!("{error}: is this containerd?")));
            }
            return None;
        }
    };
    let (state, words) = supported(version);
    if answers {
        let pid = containerd.pid.map(|pid| format!(", pid {pid}"));
        let (at, pid) = (asked.address.display(), pid.unwrap_or_default());
        add((state, format!("{version} answers at {at}{pid}{words}")));
    } else if state == State::Todo {
        add((state, format!("{version} is installed{words}")));
    }
    Some(Found {
        containerd,
        answers,
        version,
    })
}

fn nobody(asked: &Asked, error: &Error) -> String {
    let other = "or name its socket with --address";
    if matches!(error, Error::NotFound(_)) {
        return format!("{error}. Start containerd (systemctl start containerd), {other}");
    }
    format!(
        "{error}: {} cannot be used, {other}",
        asked.address.display()
    )
}

fn elsewhere(pid: Option<Pid>) -> String {
    let pid = pid.map_or_else(|| "PID".to_owned(), |pid| pid.to_string());
    format!(
        "the containerd that answers (pid {pid}) has files of its own, as in a container: run this check there \
         (nsenter --target {pid} --all containerd-shim-pause-v2 check, or docker exec)"
    )
}

fn supported(version: Version) -> Verdict {
    let series = (version.major, version.minor);
    if version < OLDEST {
        todo(". This is too old: install 1.6 or later (1.6, 1.7, 2.1 and 2.3 are tested)")
    } else if version >= UNKNOWN {
        note(
            ". This series is newer than this shim: 1.6, 1.7, 2.1 and 2.3 are tested, so try a pod first",
        )
    } else if TESTED.contains(&series) {
        ok("")
    } else {
        note(". This series is not tested; its neighbours are (docs/containerd.md)")
    }
}

fn configuration(containerd: &Containerd, config: &Config, version: Version) -> Verdict {
    let file = containerd.config.display();
    if config.has_no_cri() {
        return todo(format!(
            "CRI is switched off, which Kubernetes needs: take \"cri\" out of disabled_plugins in {file}, then restart \
             containerd"
        ));
    }
    let files = config.files(&containerd.config);
    if let Some(words) = ignored(&files, version) {
        return todo(words);
    }
    let read = containerd.pid.and_then(started);
    for file in &files {
        let changed = std::fs::metadata(file).and_then(|file| file.modified());
        if let (Ok(changed), Some(read)) = (changed, read)
            // The time of a start is known to the second.
            && changed > read + Duration::from_secs(1)
        {
            return note(format!(
                "{} was changed after containerd had started: sudo systemctl restart containerd",
                file.display()
            ));
        }
    }
    if containerd.config.exists() {
        ok(format!("{file}, version {}", config.version))
    } else {
        ok(format!("{file} is not there: containerd's defaults"))
    }
}

/// What this release ignores because of the versions that the files have (config/README.md), without an error.
fn ignored(files: &[PathBuf], version: Version) -> Option<String> {
    let read = |file: &PathBuf| {
        let text = std::fs::read_to_string(file).ok()?;
        Some((file.display().to_string(), Config::parse(&text).ok()?))
    };
    let mut read = files.iter().filter_map(read);
    if version < Version::of(2, 0) {
        let (file, config) = read.find(|(_, config)| config.version > 2)?;
        return Some(format!(
            "containerd {version} ignores {file}, which has version {}: write it with version = 2, and plugins by the names \
             of that version (config/containerd-1-dropin.toml)",
            config.version
        ));
    }
    if version >= Version::of(2, 3) {
        return None;
    }
    let (first, of_first) = read.next()?;
    let (file, other) = read.find(|(_, other)| other.version != of_first.version)?;
    other.plugin.map(|_| {
        format!(
            "{first} has version {}, and {file} version {}: containerd 2.0 to 2.2 lose the CRI settings of one of them, so \
             give both the same version",
            of_first.version, other.version
        )
    })
}

/// When a process was started.
fn started(pid: Pid) -> Option<SystemTime> {
    let ticks = process::start_time(pid)?;
    let stat = std::fs::read_to_string("/proc/stat").ok()?;
    let boot = stat.lines().find_map(|line| line.strip_prefix("btime "))?;
    let boot: u64 = boot.trim().parse().ok()?;
    let since_boot = ticks / rustix::param::clock_ticks_per_second().max(1);
    Some(UNIX_EPOCH + Duration::from_secs(boot + since_boot + 1))
}

/// Where containerd looks for programs: what its configuration puts first, its PATH, and its own folder.
fn folders(containerd: &Containerd, config: &Config) -> Vec<PathBuf> {
    let opt = config.opt.iter().map(|opt| opt.join("bin"));
    let mut folders: Vec<PathBuf> = opt
        .chain(programs::folders(&containerd.search_path))
        .collect();
    let program = std::fs::read_link(&containerd.program).ok();
    folders.extend(
        program
            .as_deref()
            .and_then(Path::parent)
            .map(Path::to_owned),
    );
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_tested_a_neighbour_too_old_or_too_new() {
        for (version, expected) in [
            ("1.5.18", State::Todo),
            ("1.6.20", State::Ok),
            ("1.7.24", State::Ok),
            ("2.0.1", State::Note),
            ("2.1.9", State::Ok),
            ("2.2.0", State::Note),
            ("2.3.4", State::Ok),
            ("2.5.0", State::Note),
            ("3.0.0", State::Note),
        ] {
            let read = Version::parse(version);
            let state = read.map(|version| supported(version).0);
            assert_eq!(state, Some(expected), "{version}");
        }
    }

    #[test]
    fn this_process_has_started_before_now() {
        let started = started(rustix::process::getpid());
        assert!(started.is_some_and(|at| at < SystemTime::now() + Duration::from_secs(2)));
    }
}
