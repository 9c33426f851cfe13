//! The texts that name cgroups: `/proc/<pid>/cgroup` and the OCI spec's `linux.cgroupsPath`.

use std::io;
use std::path::{Component, Path, PathBuf};

use super::Driver;

/// A process's place in one hierarchy: the hierarchy's controllers (none for v2), and the path relative to its root.
pub(crate) type Membership = (Vec<String>, PathBuf);

/// Reads `/proc/<pid>/cgroup`: `hierarchy:controller[,controller]…:path`.
pub(crate) fn memberships(text: &str) -> io::Result<Vec<Membership>> {
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

/// Splits `cpu,cpuacct` into a list. v2's field is empty, and so is its list.
pub(super) fn controllers(names: &str) -> Vec<String> {
    names
        .split(',')
        .filter(|name| !name.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Reads the OCI spec's `linux.cgroupsPath`. The result is relative to the hierarchy's root.
pub(crate) fn cgroups_path(text: &str, driver: Driver) -> io::Result<PathBuf> {
    let path = match driver {
        Driver::Cgroupfs => relative(text)?,
        Driver::Systemd => systemd_path(text)?,
    };
    if path.as_os_str().is_empty() {
        return Err(invalid("it names the root"));
    }
    Ok(path)
}

/// Whether a cgroups path has systemd's form, `slice:prefix:name`.
pub(crate) fn has_systemd_form(text: &str) -> bool {
    systemd_path(text).is_ok()
}

/// Places `slice:prefix:name` where systemd does: the unit `prefix-name.scope` in the slice, and a slice `a-b.slice` in
/// `a.slice` (systemd.slice(5)). Two rules are runc's: an empty slice is `system.slice`, and a name that ends in
/// `.slice` is the unit's whole name.
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

/// Turns `a-b.slice` into `a.slice/a-b.slice`, and `-.slice` into the root.
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

/// Removes a leading `/`. Refuses `..`, which would lead out of the hierarchy.
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
            assert!(has_systemd_form(systemds), "{systemds}");
        }
        for path in [
            "",
            "/",
            "/kubepods/pod1/a",
            "/default/a:b:c",
            "default/a",
            "/x.slice:a:b",
        ] {
            assert!(!has_systemd_form(path), "{path}");
        }
    }
}
