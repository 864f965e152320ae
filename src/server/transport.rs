//! What HTTP needs of a socket beside its bytes, through every layer down to it.

use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::io::AsyncWrite;

/// What a connection sends, which decides how much the kernel may hold of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SendMode {
    /// Short responses: as little as possible, since there may be as many as connections.
    Short,
    /// A streamed response, of which there are as many as permits: the connection must not run dry.
    Stream,
    /// The same, to a client that was fast and no longer is: room beside what a last large write has left there.
    SlowStream,
}

/// A stream down to the socket, with what HTTP wants of a socket beside its bytes.
pub trait Transport: AsyncWrite {
    /// Writes as `poll_write` does. What is written may wait for the shutdown, which has to follow, and go with it.
    ///
    /// # Errors
    /// Those of `poll_write`.
    fn poll_write_final(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write(cx, buf)
    }

    /// Writes what the kernel takes at once, even if it has not called the socket writable again.
    ///
    /// # Errors
    /// `WouldBlock` if it takes nothing; those of a write.
    fn try_write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::ErrorKind::WouldBlock.into())
    }

    /// Whether bytes have arrived that were not read.
    fn has_input(&self) -> bool {
        false
    }

    /// A request has begun, or has to begin: its headers have to be complete within their timeout.
    fn expect_head(&mut self) {}

    /// From now on, closing it forgets what was not sent, and resets the connection.
    fn reset_on_close(&self);

    /// Whether closing it is such a reset, and so not to be announced.
    fn resets_on_close(&self) -> bool {
        false
    }

    /// After the sending side was shut down: discards what the client sends. Ready once the client has closed its sending
    /// side, too; true if it has acknowledged everything.
    fn poll_client_closed(&mut self, _: &mut Context<'_>) -> Poll<bool> {
        Poll::Ready(true)
    }

    /// Ends the sending side, and gives another descriptor of the connection. `None` where closing it is enough: where the
    /// client gets the rest whatever becomes of the network.
    fn shutdown_and_duplicate(&self) -> Option<OwnedFd> {
        None
    }

    /// Lets the kernel hold as many unsent bytes as `sending` needs.
    fn set_send_mode(&mut self, sending: SendMode);
}

/// In memory there is no kernel that holds anything.
impl Transport for tokio::io::DuplexStream {
    fn reset_on_close(&self) {}

    fn set_send_mode(&mut self, _: SendMode) {}
}
