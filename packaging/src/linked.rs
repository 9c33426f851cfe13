//! What is linked into the shim: its crates, without those that only build it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use crate::Result;

/// Name and version of a crate.
pub(crate) type Id = (String, String);

/// A crate that is linked into the shim.
#[derive(Debug)]
pub(crate) struct Crate {
    /// The SPDX expression of its license.
    pub(crate) license: String,
    /// Where its source comes from: a registry. None for the crates of this project.
    pub(crate) source: Option<String>,
    /// The SHA-256 of its archive, as `Cargo.lock` has it.
    pub(crate) checksum: Option<String>,
    /// The address of its repository.
    pub(crate) repository: Option<String>,
    /// Its source on this machine.
    pub(crate) folder: PathBuf,
    /// What it is linked with directly.
    pub(crate) uses: Vec<Id>,
}

/// The project's own crate that is the binary.
pub(crate) const PRODUCT: &str = "shim";

/// What is linked into the shim for a target.
pub(crate) fn linked(target: &str) -> Result<BTreeMap<Id, Crate>> {
    // `cargo metadata` has the features of the whole workspace, its tests included; `cargo tree` those of the shim.
    let tree = cargo(&[
        "tree",
        "--locked",
        "--package",
        PRODUCT,
        "--edges",
        "normal,no-proc-macro",
        "--target",
        target,
        "--prefix",
        "depth",
        "--format",
        " {p}",
    ])?;
    let uses = uses(&tree)?;
    let metadata = cargo(&["metadata", "--locked", "--format-version", "1"])?;
    let metadata: Value = serde_json::from_str(&metadata)?;
    let root = metadata["workspace_root"]
        .as_str()
        .ok_or("no workspace_root")?;
    let checksums = checksums(&std::fs::read_to_string(
        Path::new(root).join("Cargo.lock"),
    )?);
    let packages = metadata["packages"].as_array().ok_or("no packages")?;
    let mut linked = BTreeMap::new();
    for (id, uses) in uses {
        let mut packages = packages.iter();
        let package = packages.find(|one| one["name"] == *id.0 && one["version"] == *id.1);
        let package = package.ok_or_else(|| format!("cargo metadata has no {} {}", id.0, id.1))?;
        let text = |key: &str| package[key].as_str().map(str::to_owned);
        let manifest = text("manifest_path").ok_or("no manifest_path")?;
        let found = Crate {
            // Older crates write a slash.
            license: text("license")
                .ok_or_else(|| format!("{} names no license", id.0))?
                .replace('/', " OR "),
            source: text("source"),
            checksum: checksums.get(&id).cloned(),
            repository: text("repository"),
            folder: Path::new(&manifest)
                .parent()
                .unwrap_or(Path::new("/"))
                .to_owned(),
            uses,
        };
        linked.insert(id, found);
    }
    Ok(linked)
}

fn cargo(arguments: &[&str]) -> Result<String> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo).args(arguments).output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!("cargo {}: {said}", arguments.join(" ")).into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// Who uses whom, from lines `DEPTH NAME vVERSION …`. A crate's own lines stand below its first line alone.
fn uses(tree: &str) -> Result<BTreeMap<Id, Vec<Id>>> {
    let mut found: BTreeMap<Id, Vec<Id>> = BTreeMap::new();
    let mut above: Vec<Id> = Vec::new();
    for line in tree.lines().filter(|line| !line.is_empty()) {
        let mut words = line.split_whitespace();
        let (Some(depth), Some(name), Some(version)) = (words.next(), words.next(), words.next())
        else {
            return Err(format!("cargo tree: {line:?}").into());
        };
        let version = version.strip_prefix('v').unwrap_or(version);
        let id = (name.to_owned(), version.to_owned());
        above.truncate(depth.parse()?);
        if let Some(user) = above.last() {
            let used = found.entry(user.clone()).or_default();
            if !used.contains(&id) {
                used.push(id.clone());
            }
        }
        found.entry(id.clone()).or_default();
        above.push(id);
    }
    found.values_mut().for_each(|used| used.sort());
    Ok(found)
}

/// The checksums in `Cargo.lock`, in the one form in which cargo writes that file.
fn checksums(lock: &str) -> BTreeMap<Id, String> {
    let value = |part: &str, key: &str| {
        part.lines().find_map(|line| {
            let (found, value) = line.split_once(" = ")?;
            (found == key).then(|| value.trim_matches('"').to_owned())
        })
    };
    let packages = lock.split("[[package]]").skip(1);
    packages
        .filter_map(|part| {
            let id = (value(part, "name")?, value(part, "version")?);
            Some((id, value(part, "checksum")?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str, version: &str) -> Id {
        (name.to_owned(), version.to_owned())
    }

    #[test]
    fn a_crate_that_is_used_twice_keeps_what_it_uses() -> Result<()> {
        let tree = "0 shim v0.1.0 (/src/shim)\n1 log v0.4.1\n1 pause v0.1.0 (/src/pause)\n2 libc v0.2.3\n2 log v0.4.1\n\
                    1 tokio v1.2.3\n2 libc v0.2.3 (*)\n";
        let found = uses(tree)?;
        let (libc, log) = (id("libc", "0.2.3"), id("log", "0.4.1"));
        let (pause, tokio) = (id("pause", "0.1.0"), id("tokio", "1.2.3"));
        assert_eq!(
            found[&id("shim", "0.1.0")],
            [log.clone(), pause.clone(), tokio.clone()]
        );
        assert_eq!(found[&pause], [libc.clone(), log.clone()]);
        assert_eq!(found[&tokio], [libc]);
        assert!(found[&log].is_empty());
        Ok(())
    }

    #[test]
    fn the_lock_file_gives_checksums() {
        let lock = "version = 4\n\n[[package]]\nname = \"a\"\nversion = \"1.0.0\"\nsource = \"registry\"\n\
                    checksum = \"00ff\"\n\n[[package]]\nname = \"own\"\nversion = \"0.1.0\"\ndependencies = [\n \"a\",\n]\n";
        assert_eq!(
            checksums(lock),
            BTreeMap::from([(id("a", "1.0.0"), "00ff".to_owned())])
        );
    }
}
