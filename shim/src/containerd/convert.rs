//! Between our types and the messages on the wire.

use std::time::{SystemTime, UNIX_EPOCH};

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::types::mount::Mount as WireMount;
use rustix::process::Pid;

use crate::kernel::mounts::Mount;

/// A point in time; one before 1970 is not there.
pub fn timestamp(at: SystemTime) -> Option<Timestamp> {
    let since = at.duration_since(UNIX_EPOCH).ok()?;
    Some(Timestamp {
        seconds: i64::try_from(since.as_secs()).ok()?,
        nanos: i32::try_from(since.subsec_nanos()).ok()?,
        ..Timestamp::default()
    })
}

/// `message` in an `Any` with the full name of its type as the URL, as containerd's typeurl package writes it.
pub fn any(type_url: &str, message: &impl Message) -> Any {
    Any {
        type_url: type_url.to_owned(),
        // Fails only for a message of more than 2 GiB.
        value: message.write_to_bytes().unwrap_or_default(),
        ..Any::default()
    }
}

/// A pid as the protocols have it; 0 is none.
pub fn wire_pid(pid: Option<Pid>) -> u32 {
    pid.map_or(0, |pid| pid.as_raw_nonzero().get().unsigned_abs())
}

/// A mount of a request.
pub fn mount(wire: WireMount) -> Mount {
    Mount {
        kind: wire.type_,
        source: wire.source,
        target: wire.target,
        options: wire.options,
    }
}

/// A mount of an event.
pub fn wire_mount(mount: Mount) -> WireMount {
    WireMount {
        type_: mount.kind,
        source: mount.source,
        target: mount.target,
        options: mount.options,
        ..WireMount::default()
    }
}
