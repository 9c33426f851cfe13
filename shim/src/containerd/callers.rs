//! Who is connected to the shim's socket, so that at its end the shim lets them hang up first.
//!
//! ```text
//!  containerd ──Shutdown──▶ shim        the answer and the end of the connection arrive together, if the shim
//!             ◀──answer────             closes first; containerd's client takes either of them then, and with
//!             ──closes─────▶ ends       "ttrpc: closed" it says that the call has failed
//! ```

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};

use containerd_shim_protos::ttrpc::r#async::transport::Listener;
use futures_util::stream::poll_fn;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;

/// How many connections are open.
#[derive(Debug)]
pub struct Callers(watch::Receiver<usize>);

impl Callers {
    /// Resolves when nobody is connected.
    pub async fn gone(&mut self) {
        // The sender is gone with the listener and the last connection.
        let _ = self.0.wait_for(|&open| open == 0).await;
    }
}

/// A listener for the server, whose connections are counted.
pub fn counted(listener: UnixListener) -> (Listener, Callers) {
    let (open, callers) = watch::channel(0);
    let connections = poll_fn(move |cx| {
        let counted = |stream| Connection::new(stream, open.clone());
        let accepted = listener.poll_accept(cx);
        accepted.map(|accepted| Some(accepted.map(|(stream, _)| counted(stream))))
    });
    (Listener::new(connections), Callers(callers))
}

/// An open connection.
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
