//! The texts of cgroups: paths, memberships, and the forms that the kernel's statistics have.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use super::Driver;

/// Where a process is: controllers (none for v2) and the path, relative to the hierarchy's root.
pub(super) type Membership = (Vec<String>, PathBuf);

/// Reads `/proc/<pid>/cgroup`: `hierarchy:controller[,controller]…:path`.
pub(super) fn memberships(text: &str) -> io::Result<Vec<Membership>> {
    let parse_line = |line: &str| {
        let mut fields = line.splitn(3, ':').skip(1);
        let (Some(names), Some(path)) = (fields.next(), fields.next()) else {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("no cgroup: {line:?}"),
            ));
        };
        Ok((controllers(names), relative(path)?))
    };
    text.lines().map(parse_line).collect()
}

/// `cpu,cpuacct` as a list; empty for v2.
pub(super) fn controllers(names: &str) -> Vec<String> {
    names
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

/// The OCI spec's `linux.cgroupsPath`, relative to the root.
pub(super) fn cgroups_path(text: &str, driver: Driver) -> io::Result<PathBuf> {
    let path = match driver {
        Driver::Cgroupfs => relative(text)?,
        Driver::Systemd => systemd_path(text)?,
    };
    if path.as_os_str().is_empty() {
        return Err(invalid("it names the root"));
    }
    Ok(path)
}

/// Whether a cgroups path is `slice:prefix:name`, systemd's form.
pub(super) fn is_systemds(text: &str) -> bool {
    systemd_path(text).is_ok()
}

/// `slice:prefix:name` as systemd places it: the unit `prefix-name.scope` in the slice, and a slice `a-b.slice` in
/// `a.slice` (systemd.slice(5)). As runc has it, no slice is `system.slice`, and a name that ends in `.slice` is the
/// unit's whole name.
fn systemd_path(text: &str) -> io::Result<PathBuf> {
    let fields: Vec<_> = text.split(':').collect();
    let &[slice, prefix, name] = &fields[..] else {
        return Err(invalid("it is not slice:prefix:name"));
    };
    let unit = match (prefix, name) {
        (_, "") => return Err(invalid("it names no unit")),
        (_, name) if name.ends_with(".slice") => name.to_owned(),
        ("", name) => format!("{name}.scope"),
        (prefix, name) => format!("{prefix}-{name}.scope"),
    };
    if unit.contains('/') {
        return Err(invalid("its unit has a slash"));
    }
    Ok(slice_path(if slice.is_empty() {
        "system.slice"
    } else {
        slice
    })?
    .join(unit))
}

/// `a-b.slice` as `a.slice/a-b.slice`; the root for `-.slice`.
fn slice_path(slice: &str) -> io::Result<PathBuf> {
    if slice == "-.slice" {
        return Ok(PathBuf::new());
    }
    let name = slice
        .strip_suffix(".slice")
        .ok_or_else(|| invalid("its slice does not end in .slice"))?;
    if name.contains('/') || name.split('-').any(str::is_empty) {
        return Err(invalid("its slice has an empty part, or a slash"));
    }
    let ends = name
        .match_indices('-')
        .map(|(end, _)| end)
        .chain([name.len()]);
    Ok(ends
        .filter_map(|end| Some(format!("{}.slice", name.get(..end)?)))
        .collect())
}

/// A path without a leading `/`; `..` is refused, since it would leave the hierarchy.
fn relative(path: &str) -> io::Result<PathBuf> {
    let mut relative = PathBuf::new();
    for component in Path::new(path).components() {
        match component {
            Component::Normal(name) => relative.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err(invalid("it leads upwards")),
        }
    }
    Ok(relative)
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

/// The files of a cgroup. A file that is not there, or does not read, is as empty: which ones there are differs with
/// the kernel, its configuration and the enabled controllers.
#[derive(Debug, Clone, Copy)]
pub(super) struct Files<'a> {
    pub(super) directory: &'a Path,
    /// What containerd understands by "max".
    pub(super) unlimited: u64,
}

impl Files<'_> {
    pub(super) fn text(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.directory.join(name)).ok()
    }

    /// The lines of a file.
    pub(super) fn lines<T>(&self, name: &str, parse: impl Fn(&str) -> Option<T>) -> Vec<T> {
        self.text(name)
            .unwrap_or_default()
            .lines()
            .filter_map(parse)
            .collect()
    }

    /// The only number in a file; zero if it has none or a negative one.
    pub(super) fn number(&self, name: &str) -> u64 {
        match self.text(name).as_deref().map(str::trim) {
            Some("max") => self.unlimited,
            Some(text) => text.parse().unwrap_or(0),
            None => 0,
        }
    }

    /// A file of lines `key number`.
    pub(super) fn table(&self, name: &str) -> Table {
        Table::parse(&self.text(name).unwrap_or_default())
    }

    /// The huge page sizes for which there is a file `hugetlb.<size><suffix>`, such as `2MB`, sorted.
    pub(super) fn huge_page_sizes(&self, suffix: &str) -> Vec<String> {
        let entries = fs::read_dir(self.directory)
            .into_iter()
            .flatten()
            .filter_map(Result::ok);
        let size = |name: &str| {
            let size = name.strip_prefix("hugetlb.")?.strip_suffix(suffix)?;
            // `2MB.rsvd` counts reservations, which have no place in the metrics.
            (!size.contains('.')).then(|| size.to_owned())
        };
        let mut sizes: Vec<_> = entries
            .filter_map(|entry| size(entry.file_name().to_str()?))
            .collect();
        sizes.sort();
        sizes
    }
}

/// Lines `key number`.
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

    /// Zero if it is not there.
    pub(super) fn get(&self, key: &str) -> u64 {
        self.0.get(key).copied().unwrap_or(0)
    }
}

/// A line of `blkio.*`: `major:minor [operation] value`. The totals at the end are none.
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

/// `major:minor`.
pub(super) fn device(text: &str) -> Option<(u64, u64)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The names in `/dev` of the devices in `/proc/partitions` (`major minor blocks name`, below two lines of heading).
pub(super) fn partitions(text: &str) -> HashMap<(u64, u64), String> {
    let entry = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let number = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        Some((number, format!("/dev/{}", fields.nth(1)?)))
    };
    text.lines().filter_map(entry).collect()
}

/// The value of `key` among `key=value` fields.
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
    fn memberships_are_read_and_must_stay_inside() {
        let text = "12:name=systemd:/a/b:c\n3:cpu,cpuacct:/\n0::/user.slice/x y\n";
        let expected = [
            (vec!["name=systemd"], "a/b:c"),
            (vec!["cpu", "cpuacct"], ""),
            (vec![], "user.slice/x y"),
        ];
        let read = memberships(text).unwrap();
        assert_eq!(read.len(), expected.len());
        for ((controllers, path), (names, expected)) in read.iter().zip(expected) {
            assert_eq!(
                (controllers, &**path),
                (
                    &names.iter().map(|name| (*name).to_owned()).collect(),
                    Path::new(expected)
                )
            );
        }
        memberships("0::/../escaped\n").unwrap_err();
        memberships("0\n").unwrap_err();
    }

    #[test]
    fn a_cgroups_path_is_placed_as_its_driver_places_it() {
        let cgroupfs = |text| cgroups_path(text, Driver::Cgroupfs).ok();
        let systemd = |text| cgroups_path(text, Driver::Systemd).ok();
        assert_eq!(cgroupfs("/kubepods/pod1/a"), Some("kubepods/pod1/a".into()));
        assert_eq!(cgroupfs("default/./a"), Some("default/a".into()));
        for bad in ["", "/", "/a/../../b"] {
            assert_eq!(cgroupfs(bad), None, "{bad:?}");
        }

        let kubepods = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/cri-containerd-a.scope";
        assert_eq!(
            systemd("kubepods-burstable-pod1.slice:cri-containerd:a"),
            Some(kubepods.into())
        );
        assert_eq!(
            systemd(":docker:a"),
            Some("system.slice/docker-a.scope".into())
        );
        assert_eq!(systemd("-.slice::a"), Some("a.scope".into()));
        assert_eq!(
            systemd("user.slice:x:a-b.slice"),
            Some("user.slice/a-b.slice".into())
        );
        for bad in [
            "",
            "a.slice",
            "a:b",
            "a:b:c",
            "a.slice:b:",
            "a--b.slice:c:d",
            ".slice:c:d",
            "a.slice:..:/x",
            "a/b.slice:c:d",
        ] {
            assert_eq!(systemd(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn systemds_form_is_told_from_a_path() {
        for systemds in [
            "kubepods-burstable-pod1.slice:cri-containerd:a",
            "system.slice:docker:a",
            ":docker:a",
        ] {
            assert!(is_systemds(systemds), "{systemds}");
        }
        for path in [
            "",
            "/",
            "/kubepods/pod1/a",
            "/default/a:b:c",
            "default/a",
            "/x.slice:a:b",
        ] {
            assert!(!is_systemds(path), "{path}");
        }
    }

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
