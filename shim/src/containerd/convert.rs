//! Conversions between the shim's types and the messages on the wire.

use std::time::{SystemTime, UNIX_EPOCH};

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use containerd_shim_protos::types::mount::Mount as WireMount;
use rustix::process::Pid;

use crate::kernel::cgroup::Metrics;
use crate::kernel::mounts::Mount;

/// A point in time on the wire; none for a time before 1970.
pub fn timestamp(at: SystemTime) -> Option<Timestamp> {
    let since = at.duration_since(UNIX_EPOCH).ok()?;
    Some(Timestamp {
        seconds: i64::try_from(since.as_secs()).ok()?,
        nanos: i32::try_from(since.subsec_nanos()).ok()?,
        ..Timestamp::default()
    })
}

/// Wraps `message` in an `Any`. `type_url` is the full name of the message's type, as in containerd's typeurl package.
pub fn any(type_url: &str, message: &impl Message) -> Any {
    Any {
        type_url: type_url.to_owned(),
        // Fails only for a message of more than 2 GiB.
        value: message.write_to_bytes().unwrap_or_default(),
        ..Any::default()
    }
}

/// The counters of a cgroup on the wire. containerd's clients choose the message type by the type URL.
pub fn metrics(metrics: &Metrics) -> Any {
    match metrics {
        Metrics::V1(message) => any("io.containerd.cgroups.v1.Metrics", &**message),
        Metrics::V2(message) => any("io.containerd.cgroups.v2.Metrics", &**message),
    }
}

/// The full name of the type in an `Any`: a type URL may have a prefix, which ends at the last slash (any.proto).
pub fn type_name(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}

/// A pid on the wire; 0 for no pid.
pub fn wire_pid(pid: Option<Pid>) -> u32 {
    pid.map_or(0, |pid| pid.as_raw_nonzero().get().unsigned_abs())
}

/// A mount from a request.
pub fn mount(wire: WireMount) -> Mount {
    Mount {
        kind: wire.type_,
        source: wire.source,
        target: wire.target,
        options: wire.options,
    }
}

/// A mount for an event.
pub fn wire_mount(mount: Mount) -> WireMount {
    WireMount {
        type_: mount.kind,
        source: mount.source,
        target: mount.target,
        options: mount.options,
        ..WireMount::default()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use containerd_shim_protos::{cgroups, cgroups_v2};

    use super::*;

    #[test]
    fn metrics_are_containerds_messages_under_their_type_urls() {
        let mut v1 = cgroups::metrics::Metrics::new();
        v1.pids.mut_or_insert_default().current = 3;
        let wire = metrics(&Metrics::V1(Box::new(v1.clone())));
        assert_eq!(wire.type_url, "io.containerd.cgroups.v1.Metrics");
        let read = cgroups::metrics::Metrics::parse_from_bytes(&wire.value).unwrap();
        assert_eq!(read, v1);

        let mut v2 = cgroups_v2::metrics::Metrics::new();
        let memory = v2.memory.mut_or_insert_default();
        memory.anon = 4096;
        // Field 40 stands for a field of a newer version of the message.
        memory
            .special_fields
            .mut_unknown_fields()
            .add_varint(40, 11);
        let wire = metrics(&Metrics::V2(Box::new(v2.clone())));
        assert_eq!(wire.type_url, "io.containerd.cgroups.v2.Metrics");
        let read = cgroups_v2::metrics::Metrics::parse_from_bytes(&wire.value).unwrap();
        assert_eq!(read, v2);
    }
}
