//! The shim's log: lines in the format of containerd's log. stderr is the bundle's `log` FIFO, which containerd copies
//! into its own log.
//!
//! The logger drops a line rather than wait: during a restart of containerd nobody empties the FIFO, and a waiting shim
//! serves no pod.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use humantime::format_rfc3339_millis;
use log::{LevelFilter, Log, Metadata, Record};

struct Logger {
    id: String,
    namespace: String,
}

/// Logs to stderr from now on. `id` and `namespace` stand in each line. A second call changes nothing.
pub fn start(level: LevelFilter, id: &str, namespace: &str) {
    let logger = Logger {
        id: id.to_owned(),
        namespace: namespace.to_owned(),
    };
    if log::set_boxed_logger(Box::new(logger)).is_ok() {
        log::set_max_level(level);
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata) -> bool {
        // Other crates only warn: the ttrpc library logs the end of each connection.
        metadata.target().starts_with(env!("CARGO_CRATE_NAME"))
            || metadata.level() <= log::Level::Warn
    }

    fn log(&self, record: &Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = line(
            SystemTime::now(),
            &record.level().as_str().to_lowercase(),
            &record.args().to_string(),
            &[
                ("id", self.id.as_str()),
                ("namespace", self.namespace.as_str()),
            ],
        );
        // Fails when the FIFO is full, or without a reader.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// One line in logrus' text format. The time is in UTC, with milliseconds (RFC 3339).
fn line(at: SystemTime, level: &str, message: &str, fields: &[(&str, &str)]) -> String {
    let level = if level == "warn" { "warning" } else { level };
    // humantime panics before 1970.
    let at = format_rfc3339_millis(at.max(UNIX_EPOCH));
    let mut line = String::new();
    // Fails only after the year 9999.
    let _ = write!(line, "time=\"{at}\" level={level} msg={message:?}");
    for (key, value) in fields {
        let _ = write!(line, " {key}={value:?}");
    }
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_are_utc() {
        let at = |seconds| {
            let at = UNIX_EPOCH + Duration::from_secs(seconds);
            let line = line(at, "info", "", &[]);
            line.split('"').nth(1).unwrap_or_default().to_owned()
        };
        assert_eq!(at(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(951_782_399), "2000-02-28T23:59:59.000Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.000Z");
        assert_eq!(at(1_735_689_599), "2024-12-31T23:59:59.000Z");
        assert_eq!(at(1_795_219_200), "2026-11-21T00:00:00.000Z");
    }

    #[test]
    fn a_clock_before_1970_does_not_end_the_shim() {
        let before = UNIX_EPOCH - Duration::from_secs(1);
        let line = line(before, "info", "x", &[]);
        assert!(
            line.starts_with("time=\"1970-01-01T00:00:00.000Z\""),
            "{line}"
        );
    }

    #[test]
    fn a_line_is_one_line_as_logrus_writes_it() {
        let line = line(UNIX_EPOCH, "warn", "say \"no\"\nplease", &[("id", "c1")]);
        assert_eq!(
            line,
            "time=\"1970-01-01T00:00:00.000Z\" level=warning msg=\"say \\\"no\\\"\\nplease\" id=\"c1\"\n"
        );
    }
}
