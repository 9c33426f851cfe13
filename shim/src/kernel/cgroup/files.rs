//! Reads the statistics files of a cgroup.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::str::FromStr;

/// The statistics files of one cgroup directory. A missing or unreadable file counts as empty: the set of files depends
/// on the kernel, its configuration and the enabled controllers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Files<'a> {
    pub(super) directory: &'a Path,
    /// The number that containerd reads as "max".
    pub(super) unlimited: u64,
}

impl Files<'_> {
    pub(super) fn text(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.directory.join(name)).ok()
    }

    /// The lines of a file that `parse` accepts.
    pub(super) fn lines<T>(&self, name: &str, parse: impl Fn(&str) -> Option<T>) -> Vec<T> {
        self.text(name)
            .unwrap_or_default()
            .lines()
            .filter_map(parse)
            .collect()
    }

    /// The number of a file with one number; zero if the file has none, or a negative one.
    pub(super) fn number(&self, name: &str) -> u64 {
        match self.text(name).as_deref().map(str::trim) {
            Some("max") => self.unlimited,
            Some(text) => text.parse().unwrap_or(0),
            None => 0,
        }
    }

    /// Reads a file of lines `key number`.
    pub(super) fn table(&self, name: &str) -> Table {
        Table::parse(&self.text(name).unwrap_or_default())
    }

    /// The huge page sizes (such as `2MB`) that have a file `hugetlb.<size><suffix>`, sorted.
    pub(super) fn huge_page_sizes(&self, suffix: &str) -> Vec<String> {
        let entries = fs::read_dir(self.directory)
            .into_iter()
            .flatten()
            .filter_map(Result::ok);
        let size = |name: &str| {
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(suffix)?;
            // `2MB.rsvd` counts reservations; the metrics have no field for them.
            (!size.contains('.')).then(|| size.to_owned())
        };
        let mut sizes: Vec<_> = entries
            .filter_map(|entry| size(entry.file_name().to_str()?))
            .collect();
        sizes.sort();
        sizes
    }
}

/// A file of lines `key number`. Other lines are left out.
#[derive(Debug, Default)]
pub(super) struct Table(HashMap<String, u64>);

impl Table {
    pub(super) fn parse(text: &str) -> Self {
        let entry = |line: &str| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), value.trim().parse().ok()?))
        };
        Self(text.lines().filter_map(entry).collect())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The number of a key; zero if the key is missing.
    pub(super) fn get(&self, key: &str) -> u64 {
        self.0.get(key).copied().unwrap_or(0)
    }
}

/// A line of `blkio.*`: `major:minor [operation] value`. The totals at the end of a file do not have this form.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Blkio {
    pub(super) major: u64,
    pub(super) minor: u64,
    pub(super) operation: String,
    pub(super) value: u64,
}

impl Blkio {
    pub(super) fn parse(line: &str) -> Option<Self> {
        let mut fields = line.split_ascii_whitespace();
        let (major, minor) = device(fields.next()?)?;
        let (operation, value) = match (fields.next()?, fields.next()) {
            (operation, Some(value)) => (operation, value),
            (value, None) => ("", value),
        };
        Some(Self {
            major,
            minor,
            operation: operation.to_owned(),
            value: value.parse().ok()?,
        })
    }
}

/// Reads a device number, `major:minor`.
pub(super) fn device(text: &str) -> Option<(u64, u64)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The `/dev` names of the devices in `/proc/partitions`: lines `major minor blocks name`, below a heading of two
/// lines.
pub(super) fn partitions(text: &str) -> HashMap<(u64, u64), String> {
    let entry = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let number = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        Some((number, format!("/dev/{}", fields.nth(1)?)))
    };
    text.lines().filter_map(entry).collect()
}

/// The value of `key` in a line of `key=value` fields.
pub(super) fn field<T: FromStr>(line: &str, key: &str) -> Option<T> {
    let value = |field: &str| field.strip_prefix(key)?.strip_prefix('=')?.parse().ok();
    line.split_ascii_whitespace().find_map(value)
}

/// A line of `rdma.current` or `rdma.max`: `device hca_handle=… hca_object=…`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Rdma {
    pub(super) device: String,
    pub(super) handles: u32,
    pub(super) objects: u32,
}

impl Rdma {
    pub(super) fn parse(line: &str) -> Option<Self> {
        let number = |key| match field::<String>(line, key)?.as_str() {
            "max" => Some(u32::MAX),
            number => number.parse().ok(),
        };
        Some(Self {
            device: line.split_ascii_whitespace().next()?.to_owned(),
            handles: number("hca_handle").unwrap_or(0),
            objects: number("hca_object").unwrap_or(0),
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_statistics_are_read() {
        let table = Table::parse(
            "cache 13246464\nrss 8171520\nhierarchical_memory_limit 9223372036854771712\nbad\nx -1\n",
        );
        assert_eq!(
            (table.get("cache"), table.get("rss")),
            (13_246_464, 8_171_520)
        );
        assert_eq!(
            table.get("hierarchical_memory_limit"),
            9_223_372_036_854_771_712
        );
        assert_eq!((table.get("bad"), table.get("x")), (0, 0));

        let blkio = |operation: &str, value| Blkio {
            major: 253,
            minor: 16,
            operation: operation.to_owned(),
            value,
        };
        assert_eq!(Blkio::parse("253:16 Read 4096"), Some(blkio("Read", 4096)));
        assert_eq!(Blkio::parse("253:16 77"), Some(blkio("", 77)));
        assert_eq!(Blkio::parse("Total 4096"), None);

        let devices = partitions(
            "major minor  #blocks  name\n\n 254        0  268435456 vda\n 254  1 1 vda1\n",
        );
        assert_eq!(
            devices.get(&(254, 1)).map(String::as_str),
            Some("/dev/vda1")
        );
        assert_eq!(devices.len(), 2);

        let rdma = Rdma::parse("mlx4_0 hca_handle=2 hca_object=max").unwrap();
        assert_eq!(
            (&*rdma.device, rdma.handles, rdma.objects),
            ("mlx4_0", 2, u32::MAX)
        );
        assert_eq!(field::<f64>("avg10=0.12 avg100=3", "avg10"), Some(0.12));
    }
}
