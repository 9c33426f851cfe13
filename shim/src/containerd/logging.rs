//! The shim's log: lines as containerd's own, into the bundle's `log` FIFO, which containerd copies into its log.
//!
//! A line is dropped rather than waited for: while containerd is away nobody empties the FIFO, and a shim that waits to
//! log serves no pod.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use log::{LevelFilter, Log, Metadata, Record};

struct Logger {
    id: String,
    namespace: String,
}

/// Logs to stderr from now on.
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
        // The ttrpc library logs each connection that ends.
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
        // Full, or nobody there: see above.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// One line in logrus' text format.
fn line(at: SystemTime, level: &str, message: &str, fields: &[(&str, &str)]) -> String {
    let level = if level == "warn" { "warning" } else { level };
    let mut line = format!("time=\"{}\" level={level} msg={message:?}", rfc3339(at));
    for (key, value) in fields {
        // Writing to a string does not fail.
        let _ = write!(line, " {key}={value:?}");
    }
    line.push('\n');
    line
}

/// UTC, with milliseconds. The calendar is the proleptic Gregorian one, counted from 1 March of year 0, so that leap
/// days come last.
fn rfc3339(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 {
        shifted_month + 3
    } else {
        shifted_month - 9
    };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!(
        "{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}.{:03}Z",
        second / 3_600,
        second / 60 % 60,
        second % 60,
        since.subsec_millis()
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn times_are_utc() {
        let at = |seconds| rfc3339(UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(951_782_399), "2000-02-28T23:59:59.000Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00.000Z");
        assert_eq!(at(1_735_689_599), "2024-12-31T23:59:59.000Z");
        assert_eq!(at(1_795_219_200), "2026-11-21T00:00:00.000Z");
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
