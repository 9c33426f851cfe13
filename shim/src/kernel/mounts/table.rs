//! The mount table: `/proc/self/mountinfo`, proc_pid_mountinfo(5).

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::failed;
use crate::error::IoError;

/// A line of the mount table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountedAt {
    /// The mounted part of the filesystem: `/`, or the source directory of a bind mount.
    pub root: PathBuf,
    /// The mount point.
    pub target: PathBuf,
    /// The filesystem's type.
    pub kind: String,
    /// The filesystem's own options, comma separated. cgroup v1 lists its controllers here.
    pub super_options: String,
}

/// The mounts of the shim's mount namespace that `keep` accepts, in the table's order. A node with many pods has
/// thousands of mounts; `keep` sees each line as it is read, so that the other lines take no memory.
///
/// # Errors
/// The error of reading `/proc/self/mountinfo`.
pub fn mounts_that(keep: impl Fn(&MountedAt) -> bool) -> Result<Vec<MountedAt>, IoError> {
    let path = Path::new("/proc/self/mountinfo");
    let read = || mounts_in(BufReader::new(File::open(path)?), keep);
    read().map_err(failed("read the mount table", path))
}

/// Reads mountinfo: lines `id parent major:minor root target options [tag]… - type source super-options`. Leaves out
/// lines of another form.
pub(crate) fn mounts_in(
    text: impl BufRead,
    keep: impl Fn(&MountedAt) -> bool,
) -> io::Result<Vec<MountedAt>> {
    let mut mounts = Vec::new();
    for line in text.split(b'\n') {
        mounts.extend(parse_line(&line?).filter(&keep));
    }
    Ok(mounts)
}

fn parse_line(line: &[u8]) -> Option<MountedAt> {
    let mut fields = line.split(|byte| *byte == b' ');
    let root = unescape(fields.nth(3)?);
    let target = unescape(fields.next()?);
    // The number of tags differs from line to line; a lone "-" ends the tags.
    let mut after_tags = fields.skip_while(|field| *field != b"-").skip(1);
    let kind = String::from_utf8_lossy(after_tags.next()?).into_owned();
    let super_options = String::from_utf8_lossy(after_tags.nth(1)?).into_owned();
    Some(MountedAt {
        root: root.into(),
        target: target.into(),
        kind,
        super_options,
    })
}

/// Decodes the kernel's escapes for space, tab, newline and backslash: a backslash and three octal digits, such as
/// `\040`.
pub(super) fn unescape(field: &[u8]) -> OsString {
    let octal = |digits: &[u8]| {
        digits.iter().try_fold(0_u8, |value, digit| match digit {
            b'0'..=b'7' => value.checked_mul(8)?.checked_add(digit - b'0'),
            _ => None,
        })
    };
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, tail)) = rest.split_first() {
        let escaped = tail.get(..3).filter(|_| *first == b'\\').and_then(octal);
        bytes.push(escaped.unwrap_or(*first));
        rest = if escaped.is_some() { &tail[3..] } else { tail };
    }
    OsString::from_vec(bytes)
}
