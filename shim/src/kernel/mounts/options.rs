//! The options of a mount: what they mean to mount(2), and how they fit into it.

use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::StatVfsMountFlags;
use rustix::mount::{MountFlags, MountPropagationFlags};

use super::owners::Owners;
use super::{page_size, unsupported};

/// A mount's options, sorted by which call takes them.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) flags: Flags,
    pub(super) owners: Owners,
    pub(super) data: Vec<String>,
}

/// The options that are not data.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Flags {
    pub(super) set: MountFlags,
    /// Asked to be off by name (`rw`, `dev`, …); matters where the present flags are kept otherwise.
    pub(super) cleared: MountFlags,
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

/// Whether a mount changes what is already mounted there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Remount {
    No,
    Yes,
}

/// The flags that belong to one mount and not to its filesystem: a bind mount can have its own.
pub(super) const PER_MOUNT: MountFlags = MountFlags::RDONLY
    .union(MountFlags::NOSUID)
    .union(MountFlags::NODEV)
    .union(MountFlags::NOEXEC)
    .union(MountFlags::NOSYMFOLLOW)
    .union(ACCESS_TIMES);

/// The flags that say when access times are written; setting one replaces the others.
const ACCESS_TIMES: MountFlags = MountFlags::NOATIME
    .union(MountFlags::NODIRATIME)
    .union(MountFlags::RELATIME)
    .union(MountFlags::STRICTATIME);

impl Options {
    pub(super) fn parse(options: &[String]) -> io::Result<Self> {
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
            } else if !parsed.owners.take(option)? && option != "defaults" {
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

/// The flags that an option sets or clears; `None` if it is no flag.
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

/// The propagation that an option asks for (mount_namespaces(7)); `None` if it asks for none.
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

/// The flags for the remount of a bind mount: those asked for, and those it has from its source. A remount replaces
/// all of them, and in a user namespace the kernel refuses to drop one that it has locked.
pub(super) fn bind_flags(flags: &Flags, present: MountFlags) -> MountFlags {
    let mut kept = present - flags.cleared;
    if flags.set.intersects(ACCESS_TIMES) {
        kept -= ACCESS_TIMES;
    }
    MountFlags::BIND | (flags.set & PER_MOUNT) | kept
}

/// The per-mount flags that the mount at `path` has.
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

/// Makes an overlay's data fit into the one page that mount(2) takes, if it does not: with the layers' common parent
/// as working directory, their paths can be short. The mount API that needs no such thing takes layers one by one only
/// from Linux 6.5 on.
pub(super) fn shorten(kind: &str, data: Vec<String>) -> (Option<PathBuf>, Vec<String>) {
    let length = data.iter().map(|option| option.len() + 1).sum::<usize>();
    if kind != "overlay" || length <= page_size() {
        return (None, data);
    }
    match below_parent(&data) {
        Some((parent, data)) => (Some(parent), data),
        None => (None, data),
    }
}

/// An overlay's data with the paths of its lower layers relative to the directory that all are in, and that directory.
/// `None` where [`relative_layers`] finds none.
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

/// The longest directory that all layers are in, and the layers relative to it. `None` if there is none but `/`, or a
/// path has an escape in it (a snapshotter's own paths have none).
pub(super) fn relative_layers(layers: &str) -> Option<(PathBuf, String)> {
    if layers.contains('\\') {
        return None;
    }
    // An empty part belongs to `::`, which introduces data-only layers.
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
