//! What is set inside the pod's namespaces, by a thread that stands in them: loopback, names, sysctls.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with,
};
use rustix::system::{setdomainname, sethostname, uname};

use crate::{Error, NamespaceKind, SandboxConfig, sysctls};

const HOSTNAME: &str = "hostname";
const DOMAINNAME: &str = "domainname";

/// Everything to be set, checked.
pub(crate) struct Settings {
    loopback_up: bool,
    hostname: Option<String>,
    domainname: Option<String>,
    sysctls: BTreeMap<String, String>,
}

impl Settings {
    /// `own` are the kinds of which the pod has a namespace for itself.
    pub(crate) fn new(
        config: &SandboxConfig,
        own: &BTreeSet<NamespaceKind>,
    ) -> Result<Self, Error> {
        let hostname = name_to_set(HOSTNAME, config.hostname.as_deref(), own)?;
        let domainname = name_to_set(DOMAINNAME, config.domainname.as_deref(), own)?;
        sysctls::check(&config.sysctls, own)?;
        Ok(Self {
            loopback_up: config.namespaces.is_new(NamespaceKind::Net),
            hostname: hostname.map(str::to_owned),
            domainname: domainname.map(str::to_owned),
            sysctls: config.sysctls.clone(),
        })
    }
}

/// The name, if it is to be set. Where the UTS namespace is the node's, only the name that the node has already is
/// accepted, and then nothing is to be set.
fn name_to_set<'a>(
    field: &'static str,
    name: Option<&'a str>,
    own: &BTreeSet<NamespaceKind>,
) -> Result<Option<&'a str>, Error> {
    /// `__NEW_UTS_LEN` of `linux/utsname.h`.
    const LONGEST: usize = 64;
    let Some(name) = name else {
        return Ok(None);
    };
    let refuse = |reason| {
        Err(Error::BadName {
            field,
            value: name.to_owned(),
            reason,
        })
    };
    if name.is_empty() || name.len() > LONGEST {
        return refuse("it must have 1 to 64 bytes");
    }
    if name.contains(['\0', '\n']) {
        return refuse("it must be one line");
    }
    if own.contains(&NamespaceKind::Uts) {
        return Ok(Some(name));
    }
    let node = uname();
    let current = if field == HOSTNAME {
        node.nodename()
    } else {
        node.domainname()
    };
    if current.to_bytes() == name.as_bytes() {
        return Ok(None);
    }
    refuse("the UTS namespace is the node's")
}

/// Sets everything, in the namespaces of the calling thread.
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

/// `ip link set lo up`: one rtnetlink(7) message and its acknowledgement.
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
    // No wait: the kernel answers while it handles `send`, so a missing answer is an error.
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
