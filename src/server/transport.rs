//! The trait of every layer of a connection down to its socket: what HTTP needs beside reading and writing bytes.

use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::{AsyncWrite, DuplexStream};

/// What a connection sends, which decides how many unsent bytes the kernel may hold for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendMode {
    /// Short responses. The kernel holds as little as possible, because all connections may send one at once.
    Short,
    /// A streamed response, which has a permit. The kernel holds enough that the connection never waits for more.
    Stream,
    /// A streamed response to a client that was fast and no longer is. The kernel may hold more than the last large
    /// write left there.
    SlowStream,
}

/// A layer of a connection, from TLS or timeouts down to the socket.
pub trait Transport: AsyncWrite {
    /// Writes as `poll_write` does. The kernel may hold back the bytes until the shutdown, which has to follow, and
    /// send both at once.
    ///
    /// # Errors
    /// As `poll_write`.
    fn poll_write_final(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write(cx, buf)
    }

    /// Writes what the kernel takes at once, even if it has not reported the socket as writable again.
    ///
    /// # Errors
    /// `WouldBlock` if the kernel takes nothing, and the errors of a write.
    fn try_write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Whether bytes have arrived that were not read.
    fn has_input(&self) -> bool {
        false
    }

    /// Starts the head timeout: a request has begun, or must begin now.
    fn expect_head(&mut self) {}

    /// Makes closing the connection a reset that discards unsent bytes.
    fn reset_on_close(&self);

    /// Whether closing the connection resets it, so that no orderly end may be sent.
    fn resets_on_close(&self) -> bool {
        false
    }

    /// Discards what the client sends after the sending side was shut down. Ready once the client has closed its
    /// sending side, too: with true if it has acknowledged everything.
    fn poll_client_closed(&mut self, _: &mut Context<'_>) -> Poll<bool> {
        Poll::Ready(true)
    }

    /// Shuts down the sending side, and returns another descriptor of the connection. `None` if closing is enough,
    /// because the client gets the remaining bytes even if the network goes away.
    fn shutdown_and_duplicate(&self) -> Option<OwnedFd> {
        None
    }

    /// Lets the kernel hold as many unsent bytes as `mode` needs.
    fn set_send_mode(&mut self, mode: SendMode);
}

/// A stream in memory, for which no kernel holds anything.
impl Transport for DuplexStream {
    fn reset_on_close(&self) {}

    fn set_send_mode(&mut self, _: SendMode) {}
}
