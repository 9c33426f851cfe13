//! What is set inside the pod's namespaces, by a thread that stands in them: loopback, names, sysctls.

use std::collections::BTreeMap;
use std::io;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};
use rustix::system::{setdomainname, sethostname, uname};

use crate::{Error, sysctls};

pub(crate) const HOSTNAME: &str = "hostname";
pub(crate) const DOMAINNAME: &str = "domainname";

/// A name that the kernel takes and, where the UTS namespace is the node's, that the node has already: what is asked
/// for is so, and nothing is to be written. Answers whether there is something to write.
pub(crate) fn check_name(
    field: &'static str,
    value: Option<&str>,
    own_uts: bool,
) -> Result<bool, Error> {
    const LONGEST: usize = 64;
    let Some(value) = value else {
        return Ok(false);
    };
    let refuse = |reason| {
        Err(Error::BadName {
            field,
            value: value.to_owned(),
            reason,
        })
    };
    if value.is_empty() || value.len() > LONGEST {
        return refuse("it must have 1 to 64 bytes");
    }
    if value.contains(['\0', '\n']) {
        return refuse("it must be one line");
    }
    if own_uts {
        return Ok(true);
    }
    let node = uname();
    let current = if field == HOSTNAME {
        node.nodename()
    } else {
        node.domainname()
    };
    if current.to_bytes() == value.as_bytes() {
        return Ok(false);
    }
    refuse("the UTS namespace is the node's")
}

/// Everything to be set, checked.
pub(crate) struct Settings {
    pub(crate) loopback_up: bool,
    pub(crate) hostname: Option<String>,
    pub(crate) domainname: Option<String>,
    pub(crate) sysctls: BTreeMap<String, String>,
}

/// Sets it, in the namespaces of the calling thread.
pub(crate) fn apply(settings: &Settings) -> Result<(), Error> {
    if settings.loopback_up {
        loopback_up().map_err(Error::Loopback)?;
    }
    type Set = fn(&[u8]) -> rustix::io::Result<()>;
    let names: [(_, _, Set); 2] = [
        (HOSTNAME, &settings.hostname, sethostname),
        (DOMAINNAME, &settings.domainname, setdomainname),
    ];
    for (field, value, set) in names {
        if let Some(value) = value {
            set(value.as_bytes()).map_err(|e| Error::SetName {
                field,
                value: value.clone(),
                source: e.into(),
            })?;
        }
    }
    for (key, value) in &settings.sysctls {
        sysctls::write(key, value)?;
    }
    Ok(())
}

/// `ip link set lo up`: one rtnetlink message and its acknowledgement.
///
/// ```text
///   nlmsghdr   length 32 | RTM_NEWLINK, REQUEST|ACK | sequence | port
///   ifinfomsg  family, type | index 1 (lo is the first device of every network namespace) | flags UP | change UP
///   answer     nlmsghdr (16) | error (4), 0 for done | ...
/// ```
fn loopback_up() -> io::Result<()> {
    const RTM_NEWLINK: u16 = 16;
    const REQUEST_ACK: u16 = 1 | 4;
    const NLMSG_ERROR: u16 = 2;
    const IFF_UP: u32 = 1;
    const LO: u32 = 1;
    let ([a, b], [c, d]) = (RTM_NEWLINK.to_ne_bytes(), REQUEST_ACK.to_ne_bytes());
    let what = u32::from_ne_bytes([a, b, c, d]);
    let request = [32, what, 1, 0, 0, LO, IFF_UP, IFF_UP].map(u32::to_ne_bytes);

    // Protocol 0 of netlink is rtnetlink.
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        None,
    )?;
    send(&socket, request.as_flattened(), SendFlags::empty())?;
    let mut answer = [0_u8; 256];
    // The kernel answers while it handles `send`: the answer is there, and a missing one is an error, not a wait.
    let (_, length) = recv(&socket, &mut answer[..], RecvFlags::DONTWAIT)?;
    let header: Option<([u8; 2], [u8; 4])> = answer.get(..length).and_then(|bytes| {
        let kind = bytes.get(4..6)?.try_into().ok()?;
        Some((kind, bytes.get(16..20)?.try_into().ok()?))
    });
    match header {
        Some((kind, error)) if u16::from_ne_bytes(kind) == NLMSG_ERROR => {
            match i32::from_ne_bytes(error) {
                0 => Ok(()),
                error => Err(io::Error::from_raw_os_error(-error)),
            }
        }
        _ => Err(Errno::BADMSG.into()),
    }
}
