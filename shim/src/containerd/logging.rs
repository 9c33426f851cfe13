//! The shim's log: lines in the format of containerd's log, with fields. stderr is the bundle's `log` FIFO, which containerd
//! copies into its own log, byte for byte.
//!
//! ```text
//!  time="2026-11-29T01:00:00.000Z" level=info msg="container started" container=4f… pid=712 pod=a1… namespace=k8s.io
//!  runtime=io.containerd.pause.v2      (one line)
//! ```
//!
//! A shim is not told the format of containerd's log (`[debug] format`), and writes text in any case, as the stock shim
//! does.
//!
//! The logger drops a line rather than wait: during a restart of containerd nobody empties the FIFO, and a waiting shim
//! serves no pod.

use std::fmt::{Display, Write as _};
use std::io::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use humantime::format_rfc3339_millis;
use log::kv::{Error, Key, Value, VisitSource};
use log::{Level, LevelFilter, Log, Metadata, Record};

/// The field `runtime`, as the stock shim has one.
const RUNTIME: &str = "io.containerd.pause.v2";

struct Logger {
    pod: String,
    namespace: String,
}

/// Logs to stderr from now on. Each line has `pod` and `namespace`. A second call changes nothing.
pub fn start(level: LevelFilter, pod: &str, namespace: &str) {
    let logger = Logger {
        pod: pod.to_owned(),
        namespace: namespace.to_owned(),
    };
    if log::set_boxed_logger(Box::new(logger)).is_ok() {
        log::set_max_level(level);
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata) -> bool {
        // Other crates only warn: the ttrpc library logs the end of each connection.
        metadata.target().starts_with(env!("CARGO_CRATE_NAME")) || metadata.level() <= Level::Warn
    }

    fn log(&self, record: &Record) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let line = self.line(SystemTime::now(), record);
        // Fails when the FIFO is full, or without a reader.
        let _ = std::io::stderr().write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

impl Logger {
    /// One line in logrus' text format. The time is in UTC, with milliseconds (RFC 3339).
    fn line(&self, at: SystemTime, record: &Record) -> String {
        let mut line = Line(String::new());
        // humantime panics before 1970.
        line.field("time", &format_rfc3339_millis(at.max(UNIX_EPOCH)));
        line.field("level", &name(record.level()));
        line.field("msg", record.args());
        // No error: a line takes every field.
        let _ = record.key_values().visit(&mut line);
        line.field("pod", &self.pod);
        line.field("namespace", &self.namespace);
        line.field("runtime", &RUNTIME);
        line.0.push('\n');
        line.0
    }
}

/// logrus' name of a level.
fn name(level: Level) -> &'static str {
    match level {
        Level::Error => "error",
        Level::Warn => "warning",
        Level::Info => "info",
        Level::Debug => "debug",
        Level::Trace => "trace",
    }
}

struct Line(String);

impl Line {
    /// Adds a field. A field without a value is left out.
    fn field(&mut self, key: &str, value: &dyn Display) {
        let mut text = String::new();
        // Fails only for a time after the year 9999.
        let _ = write!(text, "{value}");
        if text.is_empty() {
            return;
        }
        if !self.0.is_empty() {
            self.0.push(' ');
        }
        self.0.push_str(key);
        self.0.push('=');
        if text.chars().all(is_plain) {
            self.0.push_str(&text);
        } else {
            self.quoted(&text);
        }
    }

    /// Adds a value in quotes. What could end the line or act on a terminal is escaped, in the way that Go, JSON and logfmt
    /// have in common: a container may have chosen the text.
    fn quoted(&mut self, text: &str) {
        self.0.push('"');
        for c in text.chars() {
            match c {
                '"' | '\\' => self.0.extend(['\\', c]),
                '\n' => self.0.push_str("\\n"),
                '\r' => self.0.push_str("\\r"),
                '\t' => self.0.push_str("\\t"),
                // Rust knows which characters can be printed.
                _ if c == '\'' || c.escape_debug().len() == 1 => self.0.push(c),
                _ => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        let _ = write!(self.0, "\\u{unit:04x}");
                    }
                }
            }
        }
        self.0.push('"');
    }
}

/// Whether logrus writes a value of such characters without quotes.
fn is_plain(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-._/@^+".contains(c)
}

impl<'kvs> VisitSource<'kvs> for Line {
    fn visit_pair(&mut self, key: Key<'kvs>, value: Value<'kvs>) -> Result<(), Error> {
        self.field(key.as_str(), &value);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    /// The line of a record with this message and these fields.
    fn line(at: SystemTime, level: Level, message: &str, fields: &[(&str, &str)]) -> String {
        let logger = Logger {
            pod: "p1".to_owned(),
            namespace: "k8s.io".to_owned(),
        };
        let mut record = Record::builder();
        let record = record.level(level).key_values(&fields);
        logger.line(at, &record.args(format_args!("{message}")).build())
    }

    #[test]
    fn times_are_utc() {
        let at = |seconds| {
            let at = UNIX_EPOCH + Duration::from_secs(seconds);
            let line = line(at, Level::Info, "", &[]);
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
        let line = line(before, Level::Info, "x", &[]);
        assert!(
            line.starts_with("time=\"1970-01-01T00:00:00.000Z\""),
            "{line}"
        );
    }

    #[test]
    fn a_line_is_one_line_as_logrus_writes_it() {
        let fields = [("container", "c1"), ("name", ""), ("error", "a: b")];
        let line = line(UNIX_EPOCH, Level::Warn, "say \"no\"\nplease", &fields);
        assert_eq!(
            line,
            "time=\"1970-01-01T00:00:00.000Z\" level=warning msg=\"say \\\"no\\\"\\nplease\" container=c1 \
             error=\"a: b\" pod=p1 namespace=k8s.io runtime=io.containerd.pause.v2\n"
        );
    }

    #[test]
    fn what_acts_on_a_terminal_is_escaped() {
        for (text, written) in [
            ("\x1b[31m", "\"\\u001b[31m\""),
            ("a\u{202e}b", "\"a\\u202eb\""),
            ("a\r\tb\0", "\"a\\r\\tb\\u0000\""),
            ("it's ö", "\"it's ö\""),
            ("\\", "\"\\\\\""),
            ("a=b", "\"a=b\""),
            ("default/web-1.2@x", "default/web-1.2@x"),
        ] {
            let mut line = Line(String::new());
            line.field("k", &text);
            assert_eq!(line.0, format!("k={written}"));
        }
    }
}
