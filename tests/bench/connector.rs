//! Every fork, exec and exit below one process, as the kernel's process events connector tells them.

use std::collections::BTreeSet;
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::netlink::{CONNECTOR, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_recv_buffer_size_force, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, bind, recv, send, socket};

/// linux/connector.h and linux/cn_proc.h.
const CN_IDX_PROC: u32 = 1;
const CN_VAL_PROC: u32 = 1;
const PROC_CN_MCAST_LISTEN: u32 = 1;
const PROC_EVENT_FORK: u32 = 1;
const PROC_EVENT_EXEC: u32 = 2;
const PROC_EVENT_EXIT: u32 = 0x8000_0000;
/// Of `nlmsghdr` and `cn_msg`: what is behind them is the event.
const HEADERS: usize = 16 + 20;

/// What a process did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum What {
    /// It began.
    Fork,
    /// It runs another program now: its arguments.
    Exec(Vec<String>),
    /// It ended.
    Exit,
}

/// What a process did, and when, in nanoseconds of the monotonic clock.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    pub(crate) pid: u32,
    pub(crate) at: u64,
    pub(crate) what: What,
}

/// Listens in a thread of its own.
pub(crate) struct Recorder {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Event>, Errno>>,
}

impl Recorder {
    /// Starts listening to what descends from this process.
    ///
    /// # Errors
    /// Where the kernel has no such events, or not for us.
    pub(crate) fn start(root: i32) -> Result<Self, Errno> {
        let socket = socket(AddressFamily::NETLINK, SocketType::DGRAM, Some(CONNECTOR))?;
        bind(&socket, &SocketAddrNetlink::new(0, CN_IDX_PROC))?;
        set_socket_recv_buffer_size_force(&socket, 8 << 20)?;
        set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_millis(50)))?;
        send(&socket, &listen(), SendFlags::empty())?;
        let stop = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&stop);
        let root = root.cast_unsigned();
        let thread = std::thread::spawn(move || record(&socket, root, &until));
        Ok(Self { stop, thread })
    }

    /// Stops listening: all events so far.
    ///
    /// # Errors
    /// `ENOBUFS` when some were lost.
    pub(crate) fn stop(self) -> Result<Vec<Event>, Errno> {
        self.stop.store(true, Ordering::SeqCst);
        self.thread.join().unwrap_or(Err(Errno::CANCELED))
    }
}

/// The message that asks for events.
fn listen() -> Vec<u8> {
    let ourselves = std::process::id();
    let mut message = Vec::new();
    let mut put = |number: u32| message.extend_from_slice(&number.to_ne_bytes());
    put(u32::try_from(HEADERS + 4).unwrap());
    // nlmsghdr: type NLMSG_DONE and no flags in one word whatever the byte order; sequence, port.
    put(u32::from_ne_bytes(
        [3u16.to_ne_bytes(), [0; 2]].concat().try_into().unwrap(),
    ));
    put(0);
    put(ourselves);
    for number in [CN_IDX_PROC, CN_VAL_PROC, 0, 0] {
        put(number);
    }
    put(u32::from_ne_bytes(
        [4u16.to_ne_bytes(), [0; 2]].concat().try_into().unwrap(),
    ));
    put(PROC_CN_MCAST_LISTEN);
    message
}

fn record(socket: &OwnedFd, root: u32, stop: &AtomicBool) -> Result<Vec<Event>, Errno> {
    let mut ours = BTreeSet::from([root]);
    let mut events = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let length = match recv(socket, &mut buffer, RecvFlags::empty()) {
            Ok((length, _)) => length,
            Err(Errno::AGAIN) if stop.load(Ordering::SeqCst) => return Ok(events),
            Err(Errno::AGAIN | Errno::INTR) => continue,
            Err(error) => return Err(error),
        };
        if let Some((pid, at, what)) = read(&buffer[..length], &mut ours) {
            events.push(Event { pid, at, what });
        }
    }
}

/// An event of one of our processes; threads do not count.
fn read(message: &[u8], ours: &mut BTreeSet<u32>) -> Option<(u32, u64, What)> {
    let event = message.get(HEADERS..)?;
    let word = |number: usize| {
        let bytes = event.get(number * 4..number * 4 + 4)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?))
    };
    let at = u64::from_ne_bytes(event.get(8..16)?.try_into().ok()?);
    let (pid, process) = (word(4)?, word(5)?);
    match word(0)? {
        PROC_EVENT_FORK => {
            let (child, of) = (word(6)?, word(7)?);
            let new = child == of && ours.contains(&process) && ours.insert(child);
            new.then_some((child, at, What::Fork))
        }
        PROC_EVENT_EXEC if ours.contains(&process) => {
            let line = fs::read(format!("/proc/{process}/cmdline")).unwrap_or_default();
            let words = line.split(|&byte| byte == 0).map(String::from_utf8_lossy);
            let mut words: Vec<String> = words.map(|word| word.into_owned()).collect();
            words.pop();
            Some((process, at, What::Exec(words)))
        }
        PROC_EVENT_EXIT if pid == process && process != 0 && ours.remove(&process) => {
            Some((process, at, What::Exit))
        }
        _ => None,
    }
}
