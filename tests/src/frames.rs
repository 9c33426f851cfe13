//! ttrpc's frames by hand: requests that reach a shim at once, and the order of the answers on the wire. See
//! <https://github.com/containerd/ttrpc/blob/main/PROTOCOL.md>.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use containerd_shim_protos::protobuf::Message;
use containerd_shim_protos::ttrpc::{Code, Request, Response};

/// A connection to a shim.
pub struct Connection {
    stream: UnixStream,
    waiting: Vec<u8>,
}

impl Connection {
    /// Connects to the address that `start` has printed.
    #[track_caller]
    pub fn to(address: &str) -> Self {
        let stream = UnixStream::connect(address.trim_start_matches("unix://")).unwrap();
        let patience = Some(Duration::from_secs(10));
        stream.set_read_timeout(patience).unwrap();
        Self {
            stream,
            waiting: Vec::new(),
        }
    }

    /// Adds a request of the stream `number`, which is odd. [`Connection::send`] sends all at once.
    #[must_use]
    pub fn with(
        mut self,
        number: u32,
        service: &str,
        method: &str,
        request: &impl Message,
    ) -> Self {
        let mut message = Request::new();
        service.clone_into(&mut message.service);
        method.clone_into(&mut message.method);
        message.payload = request.write_to_bytes().unwrap();
        let body = message.write_to_bytes().unwrap();
        let mut header = [0; 10];
        header[..4].copy_from_slice(&u32::try_from(body.len()).unwrap().to_be_bytes());
        header[4..8].copy_from_slice(&number.to_be_bytes());
        header[8] = 1;
        self.waiting.extend_from_slice(&header);
        self.waiting.extend_from_slice(&body);
        self
    }

    /// Sends what waits, in one write.
    #[must_use]
    pub fn send(mut self) -> Self {
        self.stream.write_all(&self.waiting).unwrap();
        self.waiting.clear();
        self
    }

    /// The next answer: its stream and its code.
    #[track_caller]
    pub fn answer(&mut self) -> (u32, Code) {
        let mut header = [0; 10];
        self.stream.read_exact(&mut header).unwrap();
        let [length, number] = [&header[..4], &header[4..8]]
            .map(|bytes| u32::from_be_bytes(bytes.try_into().unwrap()));
        let mut body = vec![0; length as usize];
        self.stream.read_exact(&mut body).unwrap();
        let code = Response::parse_from_bytes(&body).unwrap().status().code();
        (number, code)
    }
}
