//! Programs on the node: where they are found, which file they are, and what they say of themselves.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The name of this shim's program.
pub(super) const SHIM: &str = "containerd-shim-pause-v2";
/// The running program's own file.
pub(super) const THIS: &str = "/proc/self/exe";

/// The file that is run as `name`, as exec.LookPath of Go finds it: a name with a slash is a path, any other is looked up
/// in `folders`.
pub(super) fn look_up(name: &Path, folders: &[PathBuf]) -> Option<PathBuf> {
    if name.as_os_str().as_bytes().contains(&b'/') {
        return is_program(name).then(|| name.to_owned());
    }
    let mut files = folders.iter().map(|folder| folder.join(name));
    files.find(|file| is_program(file))
}

fn is_program(file: &Path) -> bool {
    std::fs::metadata(file).is_ok_and(|file| file.is_file() && file.mode() & 0o111 != 0)
}

/// Which file a path leads to; none when it leads to none.
pub(super) fn identity(file: &Path) -> Option<(u64, u64)> {
    let file = std::fs::metadata(file).ok()?;
    Some((file.dev(), file.ino()))
}

/// Whether the path leads to the file of the running program.
pub(super) fn is_this(file: &Path) -> bool {
    identity(file).is_some_and(|found| Some(found) == identity(Path::new(THIS)))
}

/// The version of this shim that a file is; none for another program.
pub(super) fn shim_version(file: &Path) -> Option<String> {
    let said = first_line(file, "-v")?;
    let version = said.strip_prefix(SHIM)?.split_whitespace().next()?;
    Some(version.to_owned())
}

/// The first line that a program writes when it is run with one argument; none when it fails.
pub(super) fn first_line(program: &Path, argument: &str) -> Option<String> {
    let answer = Command::new(program)
        .arg(argument)
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    let said = String::from_utf8_lossy(&answer.stdout);
    let line = said.lines().next()?.trim().to_owned();
    (answer.status.success() && !line.is_empty()).then_some(line)
}

/// The folders of a `PATH`.
pub(super) fn folders(path: &OsStr) -> impl Iterator<Item = PathBuf> {
    std::env::split_paths(path).filter(|folder| folder.is_absolute())
}

/// The words of a list of folders.
pub(super) fn shown(folders: &[PathBuf]) -> String {
    let folders = folders.iter().map(|folder| folder.display().to_string());
    folders.collect::<Vec<_>>().join(":")
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_name_is_looked_up_and_a_path_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let folders = [dir.path().join("none"), dir.path().to_owned()];
        let file = dir.path().join("runc");
        assert_eq!(look_up(Path::new("runc"), &folders), None);
        std::fs::write(&file, "#!/bin/sh\necho \"$0 $1\"\necho more\n").unwrap();
        assert_eq!(look_up(Path::new("runc"), &folders), None, "not executable");
        std::fs::set_permissions(&file, PermissionsExt::from_mode(0o755)).unwrap();
        assert_eq!(look_up(Path::new("runc"), &folders), Some(file.clone()));
        assert_eq!(look_up(&file, &[]), Some(file.clone()));
        assert_eq!(look_up(Path::new("./runc"), &folders), None);
        let said = first_line(&file, "--version").unwrap();
        assert_eq!(said, format!("{} --version", file.display()));
        assert_eq!(shim_version(&file), None, "another program");
        assert!(is_this(Path::new(THIS)) && !is_this(&file));
        assert_eq!(first_line(&dir.path().join("gone"), "-v"), None);
    }

    #[test]
    fn a_relative_folder_is_not_containerds() {
        let path = OsStr::new("/a:b::/c");
        let found: Vec<_> = folders(path).collect();
        assert_eq!(found, [Path::new("/a"), Path::new("/c")]);
        assert_eq!(shown(&found), "/a:/c");
    }
}
