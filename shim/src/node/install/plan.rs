//! What there is on a node, and the files to change for the handler. Nothing here touches the node.
//!
//! | containerd | where the handler stands | how the shim is named | the shim's options |
//! |---|---|---|---|
//! | 1.6 | a block at the end of the file with CRI's settings | by its type | the fixed file |
//! | 1.7 | the same | by its path | the handler's table |
//! | 2.x | a drop-in, which `config.toml` imports | by its path | the handler's table |
//!
//! Before 2.0 the last file with CRI's settings replaces what the others say of CRI, so the handler goes there.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::super::config::Config;
use super::super::containerd::Version;
use super::handler::{self, Naming};
use super::text;
use crate::error::{Error, Result};
use crate::kernel::cgroup::Driver;
use crate::runtime::options::DEFAULT_FILE;

/// The handler, and the name of the RuntimeClass.
pub(super) const HANDLER: &str = "pause";
/// Where the binary goes.
pub(super) const PROGRAM: &str = "/usr/local/bin/containerd-shim-pause-v2";
/// The drop-in's name. The import has a wildcard: a file that is named without one, and is gone, keeps containerd from
/// starting.
const DROP_IN: &str = "conf.d/containerd-shim-pause-v2.toml";
const IMPORT: &str = "conf.d/containerd-shim-pause-v2*.toml";
/// The first line of each file that is ours.
const OURS: &str = "# Written by `containerd-shim-pause-v2 install`, and removed by `containerd-shim-pause-v2 uninstall`.";

/// What there is on the node.
#[derive(Debug, Clone)]
pub(super) struct Found {
    /// containerd's release.
    pub(super) version: Version,
    /// containerd's own file. It need not exist.
    pub(super) config: PathBuf,
    /// The files that containerd reads, in its order, with their texts: `config`, if it exists, and what it imports.
    pub(super) files: Vec<(PathBuf, String)>,
    /// Our drop-in, whether containerd reads the file or not.
    pub(super) drop_in: Option<String>,
    /// The effective configuration.
    pub(super) dump: Table,
    /// The folders in which containerd looks for a shim.
    pub(super) search_path: Vec<PathBuf>,
    /// `cgroupDriver` of the kubelet's configuration.
    pub(super) kubelet: Option<Driver>,
    /// The fixed file of the shim's options.
    pub(super) options: Option<String>,
    /// The binary that is there.
    pub(super) program: Option<Vec<u8>>,
}

impl Found {
    /// The files that containerd reads.
    pub(super) fn paths(&self) -> Vec<PathBuf> {
        self.files.iter().map(|(path, _)| path.clone()).collect()
    }
}

/// Who reads a file, and so what has to happen after its change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reader {
    /// containerd, when it starts.
    Containerd,
    /// Each start of a pod.
    Pods,
}

/// A file that is to be written or removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    pub(super) path: PathBuf,
    /// The whole content; none to remove the file.
    pub(super) content: Option<Vec<u8>>,
    /// For a new file. One that is there keeps its mode.
    pub(super) mode: u32,
    pub(super) reader: Reader,
}

/// The changes that make the handler, in their order; none on a node that has the handler as it should be.
///
/// # Errors
/// `FailedPrecondition` for a node that this program does not change, with what to do.
pub(super) fn install(found: &Found, program: &[u8]) -> Result<Vec<Change>> {
    refuse(found)?;
    let mut changes = Vec::new();
    if found.program.as_deref() != Some(program) {
        // containerd 2.x asks a handler for its features when containerd starts, and asked in vain if there was none.
        let reader = match &found.program {
            None => Reader::Containerd,
            Some(_) => Reader::Pods,
        };
        changes.push(write(Path::new(PROGRAM), program, 0o755, reader));
    }
    if found.version < Version::of(2, 0) {
        changes.extend(in_the_cri_file(found)?);
    } else {
        changes.extend(as_drop_in(found)?);
    }
    if found.version < Version::of(1, 7) {
        changes.extend(fixed_file(found)?);
    }
    Ok(changes)
}

/// The changes that take everything out again that [`install`] has put onto the node, and nothing else.
///
/// # Errors
/// `FailedPrecondition` for a file of containerd's that cannot be understood.
pub(super) fn uninstall(found: &Found) -> Result<Vec<Change>> {
    let mut changes = Vec::new();
    for (path, old) in &found.files {
        let mut new = text::without_block(old).unwrap_or_else(|| old.clone());
        new = text::remove_import(&new, &import(found))?;
        let made_here = old.starts_with(OURS);
        let nothing_more = text::parse(&new)?.keys().all(|key| key == "version");
        if made_here && (*path == drop_in(found) || nothing_more) {
            changes.push(remove(path, Reader::Containerd));
        } else if new != *old {
            changes.push(write(path, new.as_bytes(), 0o644, Reader::Containerd));
        }
    }
    // A drop-in that containerd does not read, as after a change of its release.
    let path = drop_in(found);
    let read = found.files.iter().any(|(file, _)| *file == path);
    if !read && found.drop_in.as_deref().is_some_and(is_ours) {
        changes.push(remove(&path, Reader::Pods));
    }
    if found.options.as_deref().is_some_and(is_ours) {
        changes.push(remove(Path::new(DEFAULT_FILE), Reader::Pods));
    }
    // Who has put the binary there without a handler of ours, as for Docker, keeps the binary.
    let installed = found.files.iter().any(|file| has_handler(found, file))
        || found.drop_in.as_deref().is_some_and(is_ours);
    let users = Config::of(&found.dump).handlers;
    let mut users = users.iter().filter(|user| user.way().is_some());
    let is_used = users.any(|user| user.name != HANDLER || is_somebody_elses(found));
    if installed && found.program.is_some() && !is_used {
        changes.push(remove(Path::new(PROGRAM), Reader::Pods));
    }
    Ok(changes)
}

/// Whether a handler with our name stands in a file that somebody else wrote.
fn is_somebody_elses(found: &Found) -> bool {
    handler::of_dump(&found.dump, HANDLER).is_some()
        && !found.files.iter().any(|file| has_handler(found, file))
}

/// Whether an installation has put the handler into a file.
fn has_handler(found: &Found, (path, text): &(PathBuf, String)) -> bool {
    text::without_block(text).is_some() || (*path == drop_in(found) && is_ours(text))
}

fn refuse(found: &Found) -> Result<()> {
    let refused = |why: String| Err(Error::FailedPrecondition(why));
    if found.version < Version::of(1, 6) {
        return refused(format!(
            "containerd {} is older than 1.6, the oldest that the shim works with",
            found.version
        ));
    }
    let off = found.dump.get("disabled_plugins").and_then(Value::as_array);
    let cri = |name: &Value| {
        name.as_str()
            .is_some_and(|name| handler::CRI.contains(&name))
    };
    if off.is_some_and(|names| names.iter().any(cri)) {
        return refused(format!(
            "CRI is switched off by disabled_plugins in {}: Kubernetes cannot use this containerd",
            found.config.display()
        ));
    }
    if is_somebody_elses(found) {
        return refused(format!(
            "a handler {HANDLER:?} stands already in containerd's configuration, and not from here: take the handler \
             out of {} and of what this file imports, and try again",
            found.config.display()
        ));
    }
    let folder = Path::new(PROGRAM).parent().unwrap_or(Path::new("/"));
    if found.version < Version::of(1, 7) && !found.search_path.iter().any(|known| known == folder) {
        return refused(format!(
            "containerd 1.6 looks for a shim in its PATH, and {} is not there: add the folder to the PATH in \
             containerd's unit",
            folder.display()
        ));
    }
    Ok(())
}

/// containerd 1.x: the file whose CRI settings count gets the handler.
fn in_the_cri_file(found: &Found) -> Result<Vec<Change>> {
    let mut target = None;
    let mut bare = Vec::new();
    for (path, old) in &found.files {
        let text = text::without_block(old).unwrap_or_else(|| old.clone());
        let table = text::parse(&text)?;
        if target.is_none() || handler::cri_of(&table).is_some() {
            target = Some((path.clone(), table));
        }
        bare.push((path, old, text));
    }
    let Some((target, table)) = target else {
        let start = format!("{OURS}\nversion = 2\n");
        let block = handler::lines(
            found,
            "io.containerd.grpc.v1.cri",
            naming(found),
            &Table::new(),
        );
        let content = text::add_block(&start, &block);
        return Ok(vec![write(
            &found.config,
            content.as_bytes(),
            0o644,
            Reader::Containerd,
        )]);
    };
    let mut changes = Vec::new();
    for (path, old, bare) in bare {
        let new = if *path == target {
            let plugin = match text::version(&bare)? {
                1 => "cri",
                _ => "io.containerd.grpc.v1.cri",
            };
            let block = handler::lines(found, plugin, naming(found), &table);
            let new = text::add_block(&bare, &block);
            text::parse(&new).map_err(|error| {
                Error::FailedPrecondition(format!(
                    "{}: a table cannot be added to the end of this file ({error}): write CRI's settings as \
                     `[plugins.\"{plugin}\"…]`",
                    path.display()
                ))
            })?;
            new
        } else {
            bare
        };
        if new != *old {
            changes.push(write(path, new.as_bytes(), 0o644, Reader::Containerd));
        }
    }
    Ok(changes)
}

/// containerd 2.x: a drop-in of the same version as `config.toml`, which imports it.
fn as_drop_in(found: &Found) -> Result<Vec<Change>> {
    let main = found.files.iter().find(|(path, _)| *path == found.config);
    let version = match main {
        None => 3,
        Some((_, text)) => text::version(text)?,
    };
    let plugin = match version {
        2 => "io.containerd.grpc.v1.cri",
        3.. => "io.containerd.cri.v1.runtime",
        _ => {
            return Err(Error::FailedPrecondition(format!(
                "{} has no line `version = 3`, and containerd 2.x does not read CRI's settings of such a file: let \
                 `containerd config migrate` write the file anew",
                found.config.display()
            )));
        }
    };
    let mut changes = Vec::new();
    // Later formats than 3 are those of a containerd that converts each file.
    let block = handler::lines(found, plugin, naming(found), &Table::new());
    let content = format!("{OURS}\nversion = {}\n\n{block}", version.min(3));
    let path = drop_in(found);
    if found.drop_in.as_deref() != Some(&content) {
        changes.push(write(&path, content.as_bytes(), 0o644, Reader::Containerd));
    }
    // A block is of a time when this was a containerd 1.x.
    for (file, old) in &found.files {
        if *file != found.config
            && let Some(new) = text::without_block(old)
        {
            changes.push(write(file, new.as_bytes(), 0o644, Reader::Containerd));
        }
    }
    let old = main.map(|(_, text)| text.as_str());
    let mut new = match old {
        None => format!("{OURS}\nversion = 3\n"),
        Some(text) => text::without_block(text).unwrap_or_else(|| text.to_owned()),
    };
    let here = found.config.parent().unwrap_or(Path::new("/"));
    let imported = text::imports(&new)?;
    if !imported
        .iter()
        .any(|pattern| covers(&here.join(pattern), &path))
    {
        new = text::add_import(&new, &import(found))?;
    }
    if old != Some(&new) {
        changes.push(write(
            &found.config,
            new.as_bytes(),
            0o644,
            Reader::Containerd,
        ));
    }
    Ok(changes)
}

/// containerd 1.6 passes no options to the shim, so they stand in the fixed file.
fn fixed_file(found: &Found) -> Result<Option<Change>> {
    let wanted = handler::options(found);
    let content = format!("{OURS}\n{}", handler::settings(&wanted, ""));
    match &found.options {
        Some(old) if !is_ours(old) => {
            let driver = |table: &Table| table.get("SystemdCgroup").and_then(Value::as_bool);
            let wanted = driver(&wanted).unwrap_or_default();
            if driver(&text::parse(old)?).unwrap_or_default() == wanted {
                return Ok(None);
            }
            Err(Error::FailedPrecondition(format!(
                "{DEFAULT_FILE} does not say SystemdCgroup = {wanted}, as the kubelet's cgroup driver asks for: \
                 change the line, or remove the file"
            )))
        }
        Some(old) if *old == content => Ok(None),
        Some(_) | None => Ok(Some(write(
            Path::new(DEFAULT_FILE),
            content.as_bytes(),
            0o644,
            Reader::Pods,
        ))),
    }
}

fn naming(found: &Found) -> Naming {
    if found.version < Version::of(1, 7) {
        // 1.6 reads a path, ignores it, and runs the stock shim.
        Naming::ByType
    } else {
        Naming::ByPath
    }
}

fn is_ours(text: &str) -> bool {
    text.starts_with(OURS)
}

/// Beside containerd's own file.
pub(super) fn drop_in(found: &Found) -> PathBuf {
    found.config.with_file_name(DROP_IN)
}

fn import(found: &Found) -> String {
    found.config.with_file_name(IMPORT).display().to_string()
}

/// Whether a pattern of `imports` names a file. A wildcard stands in the file's name, if at all.
fn covers(pattern: &Path, path: &Path) -> bool {
    if pattern.parent() != path.parent() {
        return false;
    }
    let name = |path: &Path| {
        path.file_name()
            .map(|name| name.to_string_lossy().into_owned())
    };
    let (Some(pattern), Some(name)) = (name(pattern), name(path)) else {
        return false;
    };
    match pattern.split_once('*') {
        None => pattern == name,
        Some((start, end)) => {
            name.len() >= start.len() + end.len() && name.starts_with(start) && name.ends_with(end)
        }
    }
}

fn write(path: &Path, content: &[u8], mode: u32, reader: Reader) -> Change {
    Change {
        path: path.to_owned(),
        content: Some(content.to_owned()),
        mode,
        reader,
    }
}

fn remove(path: &Path, reader: Reader) -> Change {
    Change {
        path: path.to_owned(),
        content: None,
        mode: 0,
        reader,
    }
}

#[cfg(test)]
mod tests;
