//! What `containerd config dump` says of CRI: the handlers, the pause image, the files that were read.
//!
//! | version of the format | CRI's runtimes | the pause image |
//! |---|---|---|
//! | 1 | `plugins.cri` | `sandbox_image` |
//! | 2 (containerd 1.x) | `plugins."io.containerd.grpc.v1.cri"` | `sandbox_image` |
//! | 3 and later (containerd 2.x) | `plugins."io.containerd.cri.v1.runtime"` | `pinned_images.sandbox` of `…cri.v1.images` |
//!
//! containerd 2.x takes files of an earlier version, and dumps its own. A key of another type than expected counts as
//! unset, so that no configuration is refused for what nobody here asks.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::programs::{self, SHIM};
use crate::error::{Error, Result};

/// The plugins with CRI's runtimes, the latest first.
const RUNTIMES: [&str; 3] = [
    "io.containerd.cri.v1.runtime",
    "io.containerd.grpc.v1.cri",
    "cri",
];
const IMAGES: &str = "io.containerd.cri.v1.images";
/// Adds its folder to the PATH of containerd: `PATH/bin` comes first.
const OPT: &str = "io.containerd.internal.v1.opt";

/// The type that containerd turns into the name of this shim's program.
pub(super) const TYPE: &str = "io.containerd.pause.v2";

/// The effective configuration of a containerd.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// The version of the format.
    pub version: i64,
    /// The plugin that has CRI's runtimes; none without settings for CRI.
    pub plugin: Option<&'static str>,
    /// The plugins that are not loaded.
    pub disabled_plugins: Vec<String>,
    /// The handlers of CRI, by name.
    pub handlers: Vec<Handler>,
    /// The handler of a pod that names none.
    pub default_handler: String,
    /// The image of the pause container.
    pub pause_image: Option<String>,
    /// The configuration files that were read beside the first, or patterns of them: see [`Config::files`].
    pub imports: Vec<PathBuf>,
    /// Where containerd keeps what does not outlive a boot.
    pub state: Option<PathBuf>,
    /// The folder whose `bin` containerd puts before its PATH.
    pub opt: Option<PathBuf>,
}

/// A handler of CRI: what a RuntimeClass leads to.
#[derive(Debug, Clone, PartialEq)]
pub struct Handler {
    /// What a RuntimeClass has as `handler`.
    pub name: String,
    /// The shim, as a type: `io.containerd.runc.v2`.
    pub runtime_type: String,
    /// The shim, as a file.
    pub runtime_path: Option<PathBuf>,
    /// Who makes sandboxes: `podsandbox` or `shim`. Empty before 2.0.
    pub sandboxer: String,
    /// Whether containerd pulls no pause image for pods of the Sandbox API.
    pub disable_pause_image_pull: bool,
    /// The options table.
    pub options: Table,
}

/// How containerd comes to the shim's program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Way {
    /// By the name that belongs to the type.
    Type,
    /// By a path.
    Path(PathBuf),
}

impl Handler {
    /// How containerd comes to this shim by this handler; none for a handler of another shim. Whether the program is there
    /// does not matter, and the file's name is the operator's to choose.
    pub(super) fn way(&self) -> Option<Way> {
        // 1.x also takes a path for a type.
        let typed = Some(Path::new(&self.runtime_type)).filter(|path| path.is_absolute());
        match self.runtime_path.as_deref().or(typed) {
            Some(path) if self.runtime_type == TYPE || leads_here(path) => {
                Some(Way::Path(path.to_owned()))
            }
            None if self.runtime_type == TYPE => Some(Way::Type),
            Some(_) | None => None,
        }
    }
}

fn leads_here(path: &Path) -> bool {
    let name = path.file_name().map(OsStr::as_bytes).unwrap_or_default();
    name.starts_with(SHIM.as_bytes()) || programs::is_this(path)
}

impl Config {
    /// Reads what `containerd config dump` prints.
    ///
    /// # Errors
    /// `InvalidArgument` for text that is no TOML.
    pub fn parse(text: &str) -> Result<Self> {
        let root: Table = toml::from_str(text).map_err(|error: toml::de::Error| {
            let message = error.message();
            Error::InvalidArgument(format!("containerd's configuration is no TOML: {message}"))
        })?;
        Ok(Self::of(&root))
    }

    /// Reads what `containerd config dump` prints, as a table.
    pub fn of(root: &Table) -> Self {
        let plugin = RUNTIMES
            .into_iter()
            .find(|name| table(root, &["plugins", name, "containerd"]).is_some());
        let cri = plugin.and_then(|name| table(root, &["plugins", name]));
        let containerd = cri.and_then(|cri| table(cri, &["containerd"]));
        let runtimes = containerd.and_then(|containerd| table(containerd, &["runtimes"]));
        let pinned = table(root, &["plugins", IMAGES, "pinned_images"]);
        let pinned = pinned.and_then(|images| text_of(images, "sandbox"));
        Self {
            version: root.get("version").and_then(Value::as_integer).unwrap_or(1),
            plugin,
            disabled_plugins: list(root, "disabled_plugins"),
            handlers: runtimes.map(handlers).unwrap_or_default(),
            default_handler: containerd
                .and_then(|containerd| text_of(containerd, "default_runtime_name"))
                // CRI's own default.
                .unwrap_or_else(|| "runc".to_owned()),
            pause_image: pinned.or_else(|| text_of(cri?, "sandbox_image")),
            imports: list(root, "imports").into_iter().map(Into::into).collect(),
            state: text_of(root, "state").map(Into::into),
            opt: table(root, &["plugins", OPT])
                .and_then(|opt| text_of(opt, "path"))
                .map(Into::into),
        }
    }

    /// The handler with this name.
    pub fn handler(&self, name: &str) -> Option<&Handler> {
        self.handlers.iter().find(|handler| handler.name == name)
    }

    /// The configuration files: `first`, and those that its `imports` name. 1.x lists the files in its dump, 2.x the
    /// patterns (`/etc/containerd/conf.d/*.toml`).
    pub fn files(&self, first: &Path) -> Vec<PathBuf> {
        let folder = first.parent().unwrap_or(Path::new("/"));
        let mut files = vec![first.to_owned()];
        for import in &self.imports {
            let found = matching(&folder.join(import));
            files.extend(found.into_iter().filter(|file| file != first));
        }
        files
    }

    /// Whether CRI is switched off, by any of the names of its plugins.
    pub fn has_no_cri(&self) -> bool {
        let off = |name: &String| RUNTIMES.contains(&name.as_str());
        self.disabled_plugins.iter().any(off)
    }
}

/// The files that a pattern means, in the order of their names. A `*` in the name of the file is all that people write.
fn matching(pattern: &Path) -> Vec<PathBuf> {
    let name = pattern.file_name().unwrap_or_default().to_string_lossy();
    let Some((begin, end)) = name.split_once('*') else {
        return vec![pattern.to_owned()];
    };
    let folder = pattern
        .parent()
        .and_then(|folder| std::fs::read_dir(folder).ok());
    let matches = |file: &PathBuf| {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        name.strip_prefix(begin)
            .is_some_and(|rest| rest.ends_with(end))
    };
    let files = folder
        .into_iter()
        .flatten()
        .flatten()
        .map(|file| file.path());
    let mut files: Vec<PathBuf> = files.filter(matches).collect();
    files.sort_unstable();
    files
}

fn handlers(runtimes: &Table) -> Vec<Handler> {
    let handler = |(name, value): (&String, &Value)| {
        let table = value.as_table()?;
        Some(Handler {
            name: name.clone(),
            runtime_type: text_of(table, "runtime_type").unwrap_or_default(),
            runtime_path: text_of(table, "runtime_path").map(Into::into),
            sandboxer: text_of(table, "sandboxer").unwrap_or_default(),
            disable_pause_image_pull: table.get("disable_pause_image_pull")
                == Some(&Value::Boolean(true)),
            options: table
                .get("options")
                .and_then(Value::as_table)
                .cloned()
                .unwrap_or_default(),
        })
    };
    runtimes.iter().filter_map(handler).collect()
}

/// The table at the end of a path of keys.
fn table<'a>(root: &'a Table, path: &[&str]) -> Option<&'a Table> {
    path.iter()
        .try_fold(root, |table, key| table.get(*key)?.as_table())
}

/// A text that is not empty: containerd prints each unset path as an empty text.
fn text_of(table: &Table, key: &str) -> Option<String> {
    let text = table.get(key)?.as_str()?;
    (!text.is_empty()).then(|| text.to_owned())
}

fn list(table: &Table, key: &str) -> Vec<String> {
    let values = table.get(key).and_then(Value::as_array);
    let texts = values.into_iter().flatten().filter_map(Value::as_str);
    texts.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    /// As containerd 1.7.24 prints.
    const V2: &str = r#"
        disabled_plugins = ["io.containerd.snapshotter.v1.zfs"]
        imports = ["/etc/containerd/config.toml", "/etc/containerd/conf.d/pause.toml"]
        state = "/run/containerd"
        version = 2
        [plugins."io.containerd.internal.v1.opt"]
          path = "/opt/containerd"
        [plugins."io.containerd.grpc.v1.cri"]
          sandbox_image = "registry.k8s.io/pause:3.8"
          [plugins."io.containerd.grpc.v1.cri".containerd]
            default_runtime_name = "runc"
            [plugins."io.containerd.grpc.v1.cri".containerd.default_runtime]
              runtime_type = ""
            [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.pause]
              runtime_path = ""
              runtime_type = "io.containerd.pause.v2"
              sandbox_mode = "podsandbox"
              [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.pause.options]
                SystemdCgroup = true
            [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
              runtime_type = "io.containerd.runc.v2"
    "#;

    /// As containerd 2.1.9 prints.
    const V3: &str = r"
        version = 3
        [plugins.'io.containerd.cri.v1.images'.pinned_images]
          sandbox = 'registry.k8s.io/pause:3.10'
        [plugins.'io.containerd.cri.v1.runtime'.containerd]
          default_runtime_name = 'pause'
        [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.pause]
          runtime_type = 'io.containerd.runc.v2'
          runtime_path = '/usr/local/bin/containerd-shim-pause-v2'
          sandboxer = 'podsandbox'
        [plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.pauseless]
          runtime_type = 'io.containerd.pause.v2'
          sandboxer = 'shim'
          disable_pause_image_pull = true
        # What a person left of an earlier format means nothing to 2.x.
        [plugins.'io.containerd.grpc.v1.cri']
          sandbox_image = 'old'
    ";

    #[test]
    fn a_configuration_of_1_x_is_read() {
        let config = Config::parse(V2).unwrap();
        assert_eq!(config.version, 2);
        assert_eq!(config.plugin, Some("io.containerd.grpc.v1.cri"));
        assert_eq!(config.default_handler, "runc");
        assert_eq!(
            config.pause_image.as_deref(),
            Some("registry.k8s.io/pause:3.8")
        );
        assert_eq!(config.imports.len(), 2);
        assert_eq!(config.state.as_deref(), Some(Path::new("/run/containerd")));
        assert_eq!(config.opt.as_deref(), Some(Path::new("/opt/containerd")));
        let pause = config.handler("pause").unwrap();
        assert_eq!(pause.runtime_type, "io.containerd.pause.v2");
        assert_eq!(pause.runtime_path, None, "an empty path is unset");
        assert_eq!(pause.sandboxer, "");
        assert_eq!(pause.options["SystemdCgroup"], Value::Boolean(true));
        assert!(config.handler("runc").unwrap().options.is_empty());
        assert!(!config.has_no_cri());
    }

    #[test]
    fn a_configuration_of_2_x_is_read() {
        let config = Config::parse(V3).unwrap();
        assert_eq!(config.plugin, Some("io.containerd.cri.v1.runtime"));
        assert_eq!(config.default_handler, "pause");
        assert_eq!(
            config.pause_image.as_deref(),
            Some("registry.k8s.io/pause:3.10")
        );
        let by_path = config.handler("pause").unwrap();
        let path = Path::new("/usr/local/bin/containerd-shim-pause-v2");
        assert_eq!(by_path.runtime_path.as_deref(), Some(path));
        assert_eq!(by_path.sandboxer, "podsandbox");
        let pauseless = config.handler("pauseless").unwrap();
        assert!(pauseless.disable_pause_image_pull);
        assert_eq!(pauseless.sandboxer, "shim");
    }

    #[test]
    fn a_configuration_without_cri_has_no_handlers() {
        for text in [
            "",
            "version = 2",
            "plugins = 3",
            "[plugins.'io.containerd.grpc.v1.cri']\ncontainerd = 'no table'",
            "[plugins.'io.containerd.grpc.v1.cri'.containerd]\nruntimes = [1]",
            "[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes]\npause = 'no table'",
        ] {
            let config = Config::parse(text).unwrap();
            assert!(config.handlers.is_empty(), "{text}");
            assert_eq!(config.default_handler, "runc");
        }
        let off = Config::parse("disabled_plugins = ['cri']").unwrap();
        assert!(off.has_no_cri());
        let first = Config::parse("[plugins.cri.containerd.runtimes.pause]\nruntime_type = 'x'");
        assert_eq!(first.unwrap().handler("pause").unwrap().runtime_type, "x");
    }

    #[test]
    fn imports_are_files_or_patterns() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("conf.d");
        std::fs::create_dir(&folder).unwrap();
        for name in ["b.toml", "a.toml", "c.toml.old"] {
            std::fs::write(folder.join(name), "").unwrap();
        }
        let first = dir.path().join("config.toml");
        let [a, b] = ["a.toml", "b.toml"].map(|name| folder.join(name));
        let listed = format!("{first:?}, {a:?}");
        for (imports, expected) in [
            ("", vec![&first]),
            ("'conf.d/*.toml'", vec![&first, &a, &b]),
            (&format!("'{}/b*'", folder.display()), vec![&first, &b]),
            (&listed, vec![&first, &a]),
            ("'/nowhere/*.toml'", vec![&first]),
        ] {
            let config = Config::parse(&format!("imports = [{imports}]")).unwrap();
            let files = config.files(&first);
            assert_eq!(files.iter().collect::<Vec<_>>(), expected, "{imports}");
        }
    }

    #[test]
    fn what_is_no_toml_is_refused() {
        let error = Config::parse("version = ").unwrap_err();
        assert!(matches!(error, Error::InvalidArgument(_)), "{error}");
    }
}
