//! A process as the kernel describes the process: which one has a pid.

use rustix::process::Pid;

/// When the process with this pid was started, in clock ticks since the node's boot (proc_pid_stat(5), field 22); none when
/// there is no such process. A pid and a start time name one process for as long as the node runs.
pub fn start_time(pid: Pid) -> Option<u64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_start_time(&stat)
}

fn parse_start_time(stat: &str) -> Option<u64> {
    // The second field is the name in parentheses, and a name may hold anything. The third field comes after the last one.
    let (_, fields) = stat.rsplit_once(')')?;
    fields.split_ascii_whitespace().nth(22 - 3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_start_time_is_found_behind_any_name() {
        let fields = (3..=24)
            .map(|n| format!("{n}"))
            .collect::<Vec<_>>()
            .join(" ");
        for name in ["sh", "a b", "x) y (z", ""] {
            assert_eq!(
                parse_start_time(&format!("7 ({name}) {fields}")),
                Some(22),
                "{name}"
            );
        }
        assert_eq!(parse_start_time("7 (sh) S 1"), None);
    }

    #[test]
    fn a_process_has_one_start_time_and_no_process_has_none() {
        let this = rustix::process::getpid();
        assert!(start_time(this).is_some());
        assert_eq!(start_time(this), start_time(this));
        assert_eq!(Pid::from_raw(i32::MAX).and_then(start_time), None);
    }
}
