//! Why a run of runc has failed: from the run's log, which is JSON, and from the run's stderr. A runc that crashes writes
//! nothing into its log.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use log::warn;
use serde::Deserialize;

use super::call::Captured;

/// The most that is read of a log. A runtime that logs everything (`--debug`, a wrapper) still says last why it fails.
const READ: u64 = 64 * 1024;

#[derive(Deserialize)]
struct LogLine {
    level: String,
    msg: String,
}

/// Why the run with this log failed; none for a run that did not. Removes the log. `stderr` is what the run wrote to its
/// stderr, where that is not the stderr of the process that runc makes.
pub(super) fn reason(log: &Path, stderr: Option<Captured>, status: u32) -> Option<String> {
    let said = take_log(log);
    if status == 0 {
        return None;
    }
    if said.is_some() {
        return said;
    }
    let failed = format!("exit status {status} and nothing in its log");
    let Some(stderr) = stderr else {
        return Some(format!("{failed}; its stderr is that of the process"));
    };
    let printed = stderr.text();
    let Some(first) = printed.lines().next() else {
        return Some(failed);
    };
    warn!(log:% = log.display(), status, stderr = printed; "runtime failed, with nothing in its log");
    Some(format!("{failed}; it printed: {first}"))
}

/// The last error in a log of runc. Removes the log, which belongs to one run only.
pub(super) fn take_log(log: &Path) -> Option<String> {
    let text = end_of(log).ok()?;
    // A log that stays does no harm: the removal fails only while the bundle is being removed with everything in it.
    let _ = std::fs::remove_file(log);
    last_error(&text)
}

/// The end of a file, up to [`READ`]. Where the file is longer, the text begins within a line.
fn end_of(file: &Path) -> std::io::Result<String> {
    let mut file = File::open(file)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(READ)))?;
    let mut bytes = Vec::new();
    file.take(READ).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The last error in the text of a log.
pub(crate) fn last_error(text: &str) -> Option<String> {
    entries(text)
        .into_iter()
        .filter(|line| line.level == "error" || line.level == "fatal")
        .map(|line| line.msg.trim().to_owned())
        .next_back()
}

/// The entries of a log. runc writes each entry on one line, newer releases of crun on several lines. Anything else in
/// the log is left out.
fn entries(text: &str) -> Vec<LogLine> {
    let mut entries = Vec::new();
    let mut rest = text.trim_start();
    while !rest.is_empty() {
        let mut stream = serde_json::Deserializer::from_str(rest).into_iter();
        let next = match stream.next() {
            Some(Ok(entry)) => {
                entries.push(entry);
                rest.get(stream.byte_offset()..)
            }
            _ => rest.split_once('\n').map(|(_, after)| after),
        };
        rest = next.unwrap_or_default().trim_start();
    }
    entries
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn the_last_error_of_a_log_is_what_runc_said() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log.json");
        std::fs::write(
            &log,
            "{\"level\":\"warning\",\"msg\":\"w\",\"time\":\"t\"}\n\
             {\"level\":\"error\",\"msg\":\"first\",\"time\":\"t\"}\n\
             not json\n\
             {\"level\":\"error\",\"msg\":\"exec: no such file\\n\",\"time\":\"t\"}\n",
        )
        .unwrap();
        assert_eq!(take_log(&log).as_deref(), Some("exec: no such file"));
        assert!(!log.exists());
        assert_eq!(take_log(&log), None);
    }

    #[test]
    fn a_crash_is_told_by_its_first_line() {
        use std::process::Command;
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log.json");
        let run = |script: &str| {
            let stderr = Captured::new().unwrap();
            let mut command = Command::new("sh");
            command.args(["-c", script]).stderr(stderr.stdio().unwrap());
            let status = command.status().unwrap().code().unwrap();
            reason(&log, Some(stderr), status.unsigned_abs())
        };
        assert_eq!(run("echo warning >&2"), None);
        let crashed = run("echo 'panic: no memory\n\ngoroutine 1' >&2; exit 2").unwrap();
        assert!(
            crashed.ends_with("it printed: panic: no memory"),
            "{crashed}"
        );
        // The log says more than the stderr, and memory is not taken without a bound.
        let filled = run("echo first >&2; head -c 3000000 /dev/zero >&2 || exit 3").unwrap();
        assert!(
            filled.starts_with("exit status 3") && filled.ends_with("first"),
            "{filled}"
        );
        std::fs::write(&log, "{\"level\":\"error\",\"msg\":\"said\"}").unwrap();
        assert_eq!(run("echo printed >&2; exit 1").as_deref(), Some("said"));
        assert!(!log.exists());
        assert!(
            reason(&log, None, 2)
                .unwrap()
                .contains("that of the process")
        );
    }

    #[test]
    fn the_end_of_a_long_log_is_enough() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log.json");
        let noise = format!("{{\"level\":\"error\",\"msg\":\"{}\"}}\n", "x".repeat(1000));
        let last = "{\"level\":\"error\",\"msg\":\"last\"}\n\u{fffd}\n";
        std::fs::write(&log, noise.repeat(5000) + last).unwrap();
        assert_eq!(take_log(&log).as_deref(), Some("last"));
        // The one error is longer than what is read: there is no error, and no half of one.
        std::fs::write(&log, "y".repeat(200_000)).unwrap();
        assert_eq!(take_log(&log), None);
    }

    #[test]
    fn an_error_may_be_spread_over_lines() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log.json");
        std::fs::write(
            &log,
            "{\"level\":\"error\",\"msg\":\"first\"}\n{ broken\n{\n  \"msg\": \"cannot open `\\/x`\",\n  \
             \"level\": \"error\",\n  \"time\": \"t\"\n}\n{\"level\":\"warning\",\"msg\":\"w\"}",
        )
        .unwrap();
        assert_eq!(take_log(&log).as_deref(), Some("cannot open `/x`"));
    }
}
