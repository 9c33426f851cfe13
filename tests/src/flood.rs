//! Output by the gigabyte that can be checked byte by byte: the probe writes it, a test reads it back.

use std::io::{BufRead, Write};
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;

/// The length of most lines in bytes, without the newline.
const SHORT: usize = 1000;
/// The number of lines in a block. The last line of a block is longer than a line of CRI's log may be.
const BLOCK: u64 = 64;
const LONG: usize = 40_000;
/// The bytes of a block, newlines included.
const BLOCK_BYTES: u64 = 63 * 1001 + 40_001;

const LETTERS: &[u8] = b"abcdefghijklmnopqrstuvwxyz";

/// The line with this number, without the newline. No two lines are equal.
pub fn line(number: u64) -> Vec<u8> {
    static RING: OnceLock<Vec<u8>> = OnceLock::new();
    let ring = RING.get_or_init(|| LETTERS.repeat(LONG / LETTERS.len() + 2));
    let length = if number % BLOCK == BLOCK - 1 {
        LONG
    } else {
        SHORT
    };
    let mut line = format!("{number:012} ").into_bytes();
    let first = usize::try_from(number % 26).unwrap_or_default();
    line.extend_from_slice(&ring[first..first + length - line.len()]);
    line
}

/// The number of lines in `mib` MiB.
pub fn lines(mib: u64) -> u64 {
    (mib << 20).div_ceil(BLOCK_BYTES) * BLOCK
}

/// The number of lines before the pause in the middle. The last line before the pause is a short one.
pub fn half(mib: u64) -> u64 {
    lines(mib) / 2 - 10
}

/// Writes `mib` MiB to stdout. In the middle, makes the file `half` in `folder` and waits for the file `go` there.
///
/// # Errors
/// The error of a write.
pub fn write(mib: u64, folder: &Path) -> std::io::Result<()> {
    let mut out = std::io::BufWriter::with_capacity(64 * 1024, std::io::stdout().lock());
    let lines = lines(mib);
    for number in 0..lines {
        if number == half(mib) {
            out.flush()?;
            std::fs::write(folder.join("half"), "")?;
            while !folder.join("go").exists() {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        out.write_all(&line(number))?;
        out.write_all(b"\n")?;
    }
    out.flush()
}

/// Checks lines in the order of their arrival.
#[derive(Debug, Default)]
pub struct Checked {
    /// The number of right lines so far.
    pub lines: u64,
}

impl Checked {
    /// Takes the next line.
    ///
    /// # Errors
    /// The difference between the line and the expected line.
    pub fn take(&mut self, found: &[u8]) -> Result<(), String> {
        let expected = line(self.lines);
        if found != expected {
            let show =
                |line: &[u8]| String::from_utf8_lossy(&line[..line.len().min(40)]).into_owned();
            return Err(format!(
                "line {} is {:?}… of {} bytes, not {:?}… of {}",
                self.lines,
                show(found),
                found.len(),
                show(&expected),
                expected.len()
            ));
        }
        self.lines += 1;
        Ok(())
    }

    /// Takes all of a log that CRI wrote, with stdout only.
    ///
    /// # Errors
    /// As [`Self::take`], and the error of a read.
    pub fn take_cri_log(&mut self, log: impl BufRead) -> Result<(), String> {
        cri_lines(log, |line| self.take(line))
    }
}

/// Compares a log that CRI wrote with what should be there: the numbers of the missing lines, and the number of records
/// that are no line.
///
/// # Errors
/// The error of a read.
pub fn missing(log: impl BufRead, lines: u64) -> Result<(Vec<u64>, u64), String> {
    let mut seen = std::collections::BTreeSet::new();
    let mut broken = 0;
    cri_lines(log, |found| {
        let number = std::str::from_utf8(found.get(..12).unwrap_or_default());
        match number.ok().and_then(|number| number.parse().ok()) {
            Some(number) if found == line(number) => {
                seen.insert(number);
            }
            _ => broken += 1,
        }
        Ok(())
    })?;
    Ok((
        (0..lines).filter(|line| !seen.contains(line)).collect(),
        broken,
    ))
}

/// Puts the lines of a log that CRI wrote (`TIME STREAM P|F TEXT`) together.
fn cri_lines(
    log: impl BufRead,
    mut take: impl FnMut(&[u8]) -> Result<(), String>,
) -> Result<(), String> {
    let mut whole = Vec::new();
    for record in log.split(b'\n') {
        let record = record.map_err(|error| error.to_string())?;
        let mut words = record.splitn(4, |byte| *byte == b' ').skip(1);
        let (stream, tag, text) = (words.next(), words.next(), words.next());
        if stream != Some(b"stdout") {
            return Err(format!(
                "not of stdout: {:?}",
                String::from_utf8_lossy(&record)
            ));
        }
        whole.extend_from_slice(text.unwrap_or_default());
        if tag == Some(b"F") {
            take(&whole)?;
            whole.clear();
        }
    }
    if whole.is_empty() {
        Ok(())
    } else {
        Err(format!("{} bytes without an end of line", whole.len()))
    }
}
