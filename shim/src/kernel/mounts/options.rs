//! The options of a mount: their meaning for mount(2), and how an overlay's options fit into its page of data.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::StatVfsMountFlags;
use rustix::mount::{MountFlags, MountPropagationFlags};

use super::idmap::IdMaps;
use super::unsupported;

/// A mount's options, sorted by the system call that takes them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct MountOptions {
    pub(crate) flags: Flags,
    pub(super) id_maps: IdMaps,
    /// The options for the filesystem.
    pub(crate) data: Vec<String>,
}

/// The options that mount(2) takes as flags.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Flags {
    pub(crate) set: MountFlags,
    /// The flags that an option clears by name (`rw`, `dev`, …). A bind mount keeps the other flags of its source.
    pub(crate) cleared: MountFlags,
    pub(super) propagation: MountPropagationFlags,
    pub(super) remount: Remount,
}

impl Default for Flags {
    fn default() -> Self {
        Self {
            set: MountFlags::empty(),
            cleared: MountFlags::empty(),
            propagation: MountPropagationFlags::empty(),
            remount: Remount::No,
        }
    }
}

/// Whether a mount changes an existing mount (the option `remount`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Remount {
    No,
    Yes,
}

/// The flags of a mount, as opposed to its filesystem's: a bind mount can differ from its source in these.
pub(super) const PER_MOUNT: MountFlags = MountFlags::RDONLY
    .union(MountFlags::NOSUID)
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC)
    .union(MountFlags::NOSYMFOLLOW)
    .union(ACCESS_TIMES);

/// The flags for the update of access times. Setting one replaces the others.
const ACCESS_TIMES: MountFlags = MountFlags::NOATIME
    .union(MountFlags::NODIRATIME)
    .union(MountFlags::RELATIME)
    .union(MountFlags::STRICTATIME);

impl MountOptions {
    /// Sorts a mount's options.
    ///
    /// # Errors
    /// `Unsupported` for `loop`; `InvalidInput` for containerd's internal options and for malformed id maps.
    pub(crate) fn parse(options: &[String]) -> io::Result<Self> {
        let mut parsed = Self::default();
        for option in options {
            if let Some((flags, on)) = flag(option) {
                let (into, out_of) = match on {
                    Switch::On => (&mut parsed.flags.set, &mut parsed.flags.cleared),
                    Switch::Off => (&mut parsed.flags.cleared, &mut parsed.flags.set),
                };
                *into |= flags;
                *out_of -= flags;
            } else if let Some(propagation) = propagation(option) {
                parsed.flags.propagation |= propagation;
            } else if option == "remount" {
                parsed.flags.remount = Remount::Yes;
            } else if option == "loop" {
                return Err(unsupported(format!(
                    "the mount option {option:?} is not supported: mount a loop device that is there"
                )));
            } else if option.starts_with("X-containerd.") {
                let text = format!(
                    "the mount option {option:?} is for containerd itself and must not get here"
                );
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            } else if !parsed.id_maps.take(option)? && option != "defaults" {
                parsed.data.push(option.clone());
            }
        }
        Ok(parsed)
    }
}

/// Whether an option sets its flags or clears them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Switch {
    On,
    Off,
}

/// The flags that an option sets or clears; `None` if the option is no flag.
fn flag(option: &str) -> Option<(MountFlags, Switch)> {
    use Switch::{Off, On};
    Some(match option {
        "ro" => (MountFlags::RDONLY, On),
        "rw" => (MountFlags::RDONLY, Off),
        "nosuid" => (MountFlags::NOSUID, On),
        "suid" => (MountFlags::NOSUID, Off),
        "nodev" => (MountFlags::NODEV, On),
        "dev" => (MountFlags::NODEV, Off),
        "noexec" => (MountFlags::NOEXEC, On),
        "exec" => (MountFlags::NOEXEC, Off),
        "nosymfollow" => (MountFlags::NOSYMFOLLOW, On),
        "symfollow" => (MountFlags::NOSYMFOLLOW, Off),
        "noatime" => (MountFlags::NOATIME, On),
        "atime" => (MountFlags::NOATIME, Off),
        "nodiratime" => (MountFlags::NODIRATIME, On),
        "diratime" => (MountFlags::NODIRATIME, Off),
        "relatime" => (MountFlags::RELATIME, On),
        "norelatime" => (MountFlags::RELATIME, Off),
        "strictatime" => (MountFlags::STRICTATIME, On),
        "nostrictatime" => (MountFlags::STRICTATIME, Off),
        "lazytime" => (MountFlags::LAZYTIME, On),
        "nolazytime" => (MountFlags::LAZYTIME, Off),
        "sync" => (MountFlags::SYNCHRONOUS, On),
        "async" => (MountFlags::SYNCHRONOUS, Off),
        "dirsync" => (MountFlags::DIRSYNC, On),
        "mand" => (MountFlags::PERMIT_MANDATORY_FILE_LOCKING, On),
        "nomand" => (MountFlags::PERMIT_MANDATORY_FILE_LOCKING, Off),
        "silent" => (MountFlags::SILENT, On),
        "loud" => (MountFlags::SILENT, Off),
        "bind" => (MountFlags::BIND, On),
        "rbind" => (MountFlags::BIND.union(MountFlags::REC), On),
        _ => return None,
    })
}

/// The propagation that an option sets (mount_namespaces(7)); `None` for other options.
fn propagation(option: &str) -> Option<MountPropagationFlags> {
    let once = |name: &str| {
        Some(match name {
            "private" => MountPropagationFlags::PRIVATE,
            "shared" => MountPropagationFlags::SHARED,
            "slave" => MountPropagationFlags::DOWNSTREAM,
            "unbindable" => MountPropagationFlags::UNBINDABLE,
            _ => return None,
        })
    };
    once(option).or_else(|| Some(once(option.strip_prefix('r')?)? | MountPropagationFlags::REC))
}

/// The flags for the remount of a bind mount: the flags that the options set, and those present from the source. The
/// present flags are needed because a remount replaces all flags, and the kernel refuses to drop a flag that is locked
/// by a user namespace.
pub(super) fn bind_flags(flags: &Flags, present: MountFlags) -> MountFlags {
    let mut kept = present - flags.cleared;
    if flags.set.intersects(ACCESS_TIMES) {
        kept -= ACCESS_TIMES;
    }
    MountFlags::BIND | (flags.set & PER_MOUNT) | kept
}

/// The flags of the mount at `path`.
pub(super) fn present_flags(path: &Path) -> io::Result<MountFlags> {
    let present = rustix::fs::statvfs(path)?.f_flag;
    let pairs = [
        (StatVfsMountFlags::RDONLY, MountFlags::RDONLY),
        (StatVfsMountFlags::NOSUID, MountFlags::NOSUID),
        (StatVfsMountFlags::NODEV, MountFlags::NODEV),
        (StatVfsMountFlags::NOEXEC, MountFlags::NOEXEC),
        (StatVfsMountFlags::NOATIME, MountFlags::NOATIME),
        (StatVfsMountFlags::NODIRATIME, MountFlags::NODIRATIME),
        (StatVfsMountFlags::RELATIME, MountFlags::RELATIME),
    ];
    Ok(pairs
        .into_iter()
        .filter(|(has, _)| present.contains(*has))
        .map(|(_, flag)| flag)
        .collect())
}

/// Shortens an overlay's data that does not fit into the one page that mount(2) takes: with the layers' common parent
/// as the working directory, relative paths will do. Returns that directory if the data changed.
///
/// The newer mount API (fsconfig(2)) has no such limit, but takes layers one by one only from Linux 6.5 on.
pub(super) fn shorten(kind: &str, data: Vec<String>) -> (Option<PathBuf>, Vec<String>) {
    let length = data.iter().map(|option| option.len() + 1).sum::<usize>();
    if kind != "overlay" || length <= rustix::param::page_size() {
        return (None, data);
    }
    match below_parent(&data) {
        Some((parent, data)) => (Some(parent), data),
        None => (None, data),
    }
}

/// The directory that all lower layers of an overlay are in, and the overlay's data with the layers' paths relative to
/// that directory. `None` where [`relative_layers`] finds no such directory.
pub(super) fn below_parent(data: &[String]) -> Option<(PathBuf, Vec<String>)> {
    let layers = data
        .iter()
        .find_map(|option| option.strip_prefix("lowerdir="))?;
    let (parent, layers) = relative_layers(layers)?;
    let relative = |option: &String| match option.strip_prefix("lowerdir=") {
        Some(_) => format!("lowerdir={layers}"),
        None => option.clone(),
    };
    Some((parent, data.iter().map(relative).collect()))
}

/// The deepest directory that all layers are in, and the layers relative to that directory. `None` if the layers share
/// only `/`, or if a path has an escape (the paths of snapshotters have none).
pub(crate) fn relative_layers(layers: &str) -> Option<(PathBuf, String)> {
    if layers.contains('\\') {
        return None;
    }
    // An empty part comes from `::`, which precedes data-only layers.
    let paths = || {
        layers
            .split(':')
            .filter(|layer| !layer.is_empty())
            .map(Path::new)
    };
    let parent = paths()
        .map(Path::parent)
        .reduce(|common, parent| {
            common?
                .ancestors()
                .find(|ancestor| parent.is_some_and(|p| p.starts_with(ancestor)))
        })??
        .to_owned();
    if parent == Path::new("/") || !parent.is_absolute() {
        return None;
    }
    let relative = |layer: &str| match layer {
        "" => Some(String::new()),
        _ => Path::new(layer)
            .strip_prefix(&parent)
            .ok()?
            .to_str()
            .map(str::to_owned),
    };
    let layers = layers
        .split(':')
        .map(relative)
        .collect::<Option<Vec<_>>>()?;
    Some((parent, layers.join(":")))
}
