//! The log of one run of runc, in JSON, with the reason of a failure.

use std::path::Path;

use serde::Deserialize;

#[derive(Deserialize)]
struct LogLine {
    level: String,
    msg: String,
}

/// The last error in a log of runc. Removes the log, which belongs to one run only.
pub(super) fn take_log(log: &Path) -> Option<String> {
    let text = std::fs::read_to_string(log).ok()?;
    // A log that stays does no harm: the removal fails only while the bundle is being removed with everything in it.
    let _ = std::fs::remove_file(log);
    entries(&text)
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
