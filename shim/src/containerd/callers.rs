//! Counts the connections to the shim's socket, so that callers hang up before the shim ends.
//!
//! ```text
//!  containerd ──Shutdown──▶ shim
//!             ◀──answer────
//!             ──closes─────▶ ends
//! ```
//!
//! A shim that closes first lets the answer and the end of the connection arrive together. containerd's client then
//! takes either of the two, and may report "ttrpc: closed" for a call that has worked.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use containerd_shim_protos::ttrpc::r#async::transport::Listener;
use futures_util::stream::unfold;
use log::warn;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::time::sleep;

/// The number of open connections.
#[derive(Debug)]
pub struct Callers(watch::Receiver<usize>);

impl Callers {
    /// The number, which changes with each connection.
    pub fn count(&self) -> &watch::Receiver<usize> {
        &self.0
    }

    /// Resolves when nobody is connected.
    pub async fn gone(&mut self) {
        // An error means that the listener and all connections, which hold the sender, are dropped.
        let _ = self.0.wait_for(|&open| open == 0).await;
    }
}

/// How long the listener waits after a connection that could not be accepted: the server would try again at once.
const REFUSED: Duration = Duration::from_millis(100);

/// A listener for the server that counts its connections, and the count. A connection that cannot be accepted, because
/// the shim or the node has no descriptor left, waits in the socket's queue.
pub fn counted(listener: UnixListener) -> (Listener, Callers) {
    let (open, callers) = watch::channel(0);
    let connections = unfold((listener, open), async |(listener, open)| {
        let mut refused = false;
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let connection = Connection::new(stream, open.clone());
                    return Some((Ok(connection), (listener, open)));
                }
                Err(error) => {
                    if !refused {
                        warn!(error:%; "connection not accepted, tried again");
                    }
                    refused = true;
                    sleep(REFUSED).await;
                }
            }
        }
    });
    (Listener::new(connections), Callers(callers))
}

/// An open connection, counted until the connection is dropped.
struct Connection {
    stream: UnixStream,
    open: watch::Sender<usize>,
}

impl Connection {
    fn new(stream: UnixStream, open: watch::Sender<usize>) -> Self {
        open.send_modify(|open| *open += 1);
        Self { stream, open }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.open.send_modify(|open| *open -= 1);
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
