//! Which handlers lead to this shim, and whether containerd finds the shim there.

use std::path::{Path, PathBuf};

use super::Node;
use crate::node::config::{Config, Handler, TYPE, Way};
use crate::node::containerd::Version;
use crate::node::programs::{self, SHIM};
use crate::node::report::{Verdict, note, ok, todo};

/// The stock shim's type, with `runtime_path`.
pub(super) const STOCK: &str = "io.containerd.runc.v2";

const V1_7: Version = Version::of(1, 7);
const V2_0: Version = Version::of(2, 0);
const V2_3: Version = Version::of(2, 3);

/// A handler of this shim.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Ours<'a> {
    pub(super) handler: &'a Handler,
    pub(super) way: Way,
}

impl<'a> Ours<'a> {
    pub(super) fn of(handler: &'a Handler) -> Option<Self> {
        let way = handler.way()?;
        Some(Self { handler, way })
    }

    /// Whether containerd makes the sandbox by the Sandbox API.
    pub(super) fn sandbox_api(&self) -> bool {
        self.handler.sandboxer == "shim"
    }
}

impl Node<'_> {
    pub(super) fn handler(&self, ours: &Ours<'_>) -> Verdict {
        let file = match self.file(ours) {
            Ok(file) => file,
            Err(missing) => return missing,
        };
        let sandboxer = self.sandboxer(ours.handler);
        let default = self.config.default_handler == ours.handler.name;
        if let Some(verdict) = limits(ours, self.version, &sandboxer, default) {
            return verdict;
        }
        let way = match ours.way {
            Way::Type => format!("type {TYPE}, which is"),
            Way::Path(_) => "runtime_path".to_owned(),
        };
        let sandboxer = match sandboxer.as_str() {
            "" => String::new(),
            name => format!(", sandboxer {name}"),
        };
        let default = if default { ", the default handler" } else { "" };
        let words = format!("{way} {}{sandboxer}{default}", file.display());
        if programs::is_this(&file) {
            return ok(words);
        }
        let this = env!("CARGO_PKG_VERSION");
        match programs::shim_version(&file) {
            Some(version) if version == this => note(format!(
                "{words}; another file than this one, of the same version {version}"
            )),
            Some(version) => todo(format!(
                "containerd runs {} of version {version}, and this check is of version {this}: install this version \
                 there, or run the check of that one",
                file.display()
            )),
            None => todo(format!(
                "{} is not this shim: install this shim's binary there, or correct {}",
                file.display(),
                self.config_file()
            )),
        }
    }

    /// The file that containerd executes.
    fn file(&self, ours: &Ours<'_>) -> Result<PathBuf, Verdict> {
        match &ours.way {
            Way::Type => programs::look_up(Path::new(SHIM), &self.folders).ok_or_else(|| {
                todo(format!(
                    "containerd finds no {SHIM} in its PATH ({}): install the binary as /usr/local/bin/{SHIM}, or name \
                     its file with runtime_path",
                    programs::shown(&self.folders)
                ))
            }),
            Way::Path(path) => programs::look_up(path, &[]).ok_or_else(|| {
                todo(format!(
                    "runtime_path names {}, where there is no program: install the binary there, or correct the path in \
                     {}, then restart containerd",
                    path.display(),
                    self.config_file()
                ))
            }),
        }
    }

    /// The handler's `sandboxer`. What 1.x does not know is not in its dump, but in its file.
    fn sandboxer(&self, handler: &Handler) -> String {
        if self.version >= V2_0 {
            return handler.sandboxer.clone();
        }
        let files = self.config.files(&self.containerd.config);
        let configs = files.into_iter().filter_map(|file| {
            let text = std::fs::read_to_string(file).ok()?;
            Config::parse(&text).ok()
        });
        let named = |config: Config| Some(config.handler(&handler.name)?.sandboxer.clone());
        let mut sandboxers = configs.filter_map(named);
        sandboxers.find(|name| !name.is_empty()).unwrap_or_default()
    }

    pub(super) fn no_handler(&self) -> Verdict {
        let drop_in = match self.version {
            version if version < V1_7 => "config/containerd-1-dropin.toml",
            version if version < V2_0 => "config/containerd-1-runtime-path.toml",
            _ => "config/containerd-2-runtime-path.toml",
        };
        let config = self.config_file();
        let folder = self.containerd.config.with_file_name("conf.d");
        if let Some(file) = self.not_imported(&folder) {
            return todo(format!(
                "no handler leads to this shim, and {} is not imported: put imports = [\"{}/*.toml\"] above the first \
                 table of {config}, see that both have the same version, then restart containerd",
                file.display(),
                folder.display()
            ));
        }
        todo(format!(
            "no handler leads to this shim: install {drop_in} as {}/pause.toml, which {config} must import, then restart \
             containerd",
            folder.display()
        ))
    }

    /// A file in the folder of drop-ins that names this shim, and that containerd has not read.
    fn not_imported(&self, folder: &Path) -> Option<PathBuf> {
        let read = self.config.files(&self.containerd.config);
        let names_this_shim = |path: &PathBuf| {
            let text = std::fs::read_to_string(path).unwrap_or_default();
            let other = !read.contains(path);
            other && (text.contains(TYPE) || text.contains(SHIM))
        };
        let files = std::fs::read_dir(folder).ok()?.flatten();
        let mut files = files.map(|file| file.path());
        files.find(names_this_shim)
    }
}

/// What this release of containerd cannot do with such a handler (docs: config/README.md).
fn limits(ours: &Ours<'_>, version: Version, sandboxer: &str, default: bool) -> Option<Verdict> {
    let by_path = matches!(ours.way, Way::Path(_));
    let has_table = !ours.handler.options.is_empty();
    if version < V1_7 && ours.handler.runtime_type == STOCK {
        return Some(todo(format!(
            "containerd {version} ignores runtime_path and runs the stock shim: take runtime_type = \"{TYPE}\" and no \
             runtime_path"
        )));
    }
    if sandboxer != "shim" {
        let hidden = version >= V2_0 && ours.handler.runtime_type == TYPE && has_table;
        return hidden.then(|| {
            note(
                "with an options table for this type, no container starts in a pod with hostUsers: false: move the \
                 options to the fixed file, or take config/containerd-2-runtime-path.toml",
            )
        });
    }
    Some(match version {
        _ if version < V2_0 => todo(
            "sandboxer = \"shim\" is unknown to containerd before 2.0, which makes pods with the pause image: take the line \
             out, or upgrade containerd to 2.3 or later",
        ),
        _ if version >= V2_3 => return None,
        _ if by_path => todo(
            "with sandboxer = \"shim\", containerd 2.0 to 2.2 ignore runtime_path and start the stock shim: take \
             runtime_type = \"io.containerd.pause.v2\" and no runtime_path",
        ),
        _ if has_table => todo(
            "with sandboxer = \"shim\" and an options table, containerd 2.0 to 2.2 start no container: move the options to \
             the fixed file, /etc/containerd-shim-pause-v2/config.toml",
        ),
        _ if default => todo(
            "with sandboxer = \"shim\", a pod with hostNetwork: true crashes containerd 2.0 to 2.2, and this is the default \
             handler: give the handler to pods by a RuntimeClass, or upgrade containerd to 2.3 or later",
        ),
        _ => note(
            "with sandboxer = \"shim\", a pod with hostNetwork: true crashes containerd 2.0 to 2.2: never give such a pod \
             this handler, or upgrade containerd to 2.3 or later",
        ),
    })
}

#[cfg(test)]
mod tests;
