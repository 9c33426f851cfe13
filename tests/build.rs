//! Which containerds the suites run on: those of `tests/lab/prepare`, or the one that `CONTAINERD_BIN` names.
//!
//! The names of the tests say which containerd they run on, and a containerd that is not there has no tests. So this is
//! decided when the tests are built.

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-env-changed=CONTAINERD_BIN");
    println!("cargo:rustc-check-cfg=cfg(given_containerd)");
    match env::var_os("CONTAINERD_BIN") {
        Some(named) if !named.is_empty() => take(Path::new(&named)),
        _ => Ok(()),
    }
}

/// Tells the tests what they need to know of the containerd, and writes the macro with the names of its tests.
fn take(named: &Path) -> Result<()> {
    let folder = folder_of(named)?;
    println!("cargo:rustc-cfg=given_containerd");
    println!(
        "cargo:rerun-if-changed={}",
        folder.join("containerd").display()
    );
    let said = output(&folder, &["--version"])?;
    // containerd github.com/containerd/containerd/v2 v2.3.4 <commit>
    let exact = said.split_whitespace().nth(2).unwrap_or_default();
    let exact = exact.trim_start_matches('v');
    let mut numbers = exact.split('.').map(str::parse::<u32>);
    let (Some(Ok(major)), Some(Ok(minor))) = (numbers.next(), numbers.next()) else {
        return Err(format!("`containerd --version` in {}: {said:?}", folder.display()).into());
    };
    let pause_image = pause_image(&output(&folder, &["config", "default"])?)
        .ok_or("`containerd config default` names no pause image")?;
    for (name, value) in [
        ("FOLDER", folder.to_str().ok_or("the path is not UTF-8")?),
        ("VERSION", exact),
        ("PAUSE_IMAGE", &pause_image),
    ] {
        println!("cargo:rustc-env=GIVEN_CONTAINERD_{name}={value}");
    }
    let file = PathBuf::from(env::var_os("OUT_DIR").ok_or("no OUT_DIR")?).join("given.rs");
    Ok(fs::write(file, tests_of(major, minor))?)
}

/// The folder with containerd and ctr.
fn folder_of(named: &Path) -> Result<PathBuf> {
    let named = fs::canonicalize(named)
        .map_err(|error| format!("CONTAINERD_BIN={}: {error}", named.display()))?;
    let folder = match named.is_dir() {
        true => &*named,
        false => named.parent().ok_or("CONTAINERD_BIN is the root folder")?,
    };
    for name in ["containerd", "ctr"] {
        if !folder.join(name).is_file() {
            return Err(format!(
                "CONTAINERD_BIN: no `{name}` in {}. What to do: name a folder with containerd and ctr of one release in it",
                folder.display()
            )
            .into());
        }
    }
    Ok(folder.to_owned())
}

fn output(folder: &Path, arguments: &[&str]) -> Result<String> {
    let output = Command::new(folder.join("containerd"))
        .args(arguments)
        .output()?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(format!(
            "{} {}: {said}",
            folder.join("containerd").display(),
            arguments.join(" ")
        )
        .into());
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// `sandbox_image = "…"` (1.x), or `sandbox = "…"` among the pinned images (2.x).
fn pause_image(config: &str) -> Option<String> {
    config.lines().find_map(|line| {
        let (key, value) = line.split_once('=')?;
        let image = value.trim().trim_matches(['"', '\'']);
        let named = ["sandbox_image", "sandbox"].contains(&key.trim()) && !image.is_empty();
        named.then(|| image.to_owned())
    })
}

/// The macro `tests_on` of this containerd; see `src/lib.rs`. containerd 1.x has no Sandbox API.
fn tests_of(major: u32, minor: u32) -> String {
    let version = format!("$crate::Version::of({major}, {minor})");
    let plain = format!("$crate::test_on! {{ v{major}_{minor} {version} }}");
    let sandbox_api = match major {
        1 => String::new(),
        _ => format!(
            "$crate::test_on! {{ v{major}_{minor}_sandbox_api {version}.through_the_sandbox_api() }}"
        ),
    };
    format!(
        "#[doc(hidden)]
#[macro_export]
macro_rules! tests_on {{
    (every_containerd) => {{ {plain} }};
    (every_mode) => {{ {plain} {sandbox_api} }};
    (sandbox_api) => {{ {sandbox_api} }};
    (two_newest_containerds) => {{ {plain} }};
    (newest_containerd) => {{ {plain} }};
    (newest_in_every_mode) => {{ {plain} {sandbox_api} }};
}}
"
    )
}
