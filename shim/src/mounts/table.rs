//! The mount table: `/proc/self/mountinfo`, proc_pid_mountinfo(5).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use super::failed;
use crate::error::IoError;

/// A line of the mount table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MountedAt {
    /// What of the filesystem is mounted: `/`, or the directory that was bound.
    pub(crate) root: PathBuf,
    /// Where.
    pub(crate) target: PathBuf,
    /// The filesystem's type.
    pub(crate) kind: String,
    /// The filesystem's own options, comma separated; for cgroup v1 the controllers are among them.
    pub(crate) super_options: String,
}

/// What is mounted in the shim's mount namespace, in the order of the mounts.
///
/// # Errors
/// What reading `/proc/self/mountinfo` says.
pub(crate) fn mount_table() -> Result<Vec<MountedAt>, IoError> {
    let path = Path::new("/proc/self/mountinfo");
    let text = std::fs::read(path).map_err(failed("read the mount table", path))?;
    Ok(parse_mount_table(&text))
}

/// Reads mountinfo: `id parent major:minor root target options [tag]… - type source super-options`. A line that is
/// not of that form is left out.
pub(super) fn parse_mount_table(text: &[u8]) -> Vec<MountedAt> {
    let parse_line = |line: &[u8]| {
        let mut fields = line.split(|byte| *byte == b' ');
        let root = unescape(fields.nth(3)?);
        let target = unescape(fields.next()?);
        // The number of tags differs; a lone "-" ends them.
        let mut after_tags = fields.skip_while(|field| *field != b"-").skip(1);
        let kind = String::from_utf8_lossy(after_tags.next()?).into_owned();
        let super_options = String::from_utf8_lossy(after_tags.nth(1)?).into_owned();
        Some(MountedAt {
            root: root.into(),
            target: target.into(),
            kind,
            super_options,
        })
    };
    text.split(|byte| *byte == b'\n')
        .filter_map(parse_line)
        .collect()
}

/// Undoes the kernel's escapes: `\040` (three octal digits) for space, tab, newline and backslash.
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
