//! The end of a TLS connection, which is announced.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker};

use rustls::ServerConnection;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::unconstrained;
use tokio_rustls::server::TlsStream;

use crate::server::transport::{SendMode, Transport};

/// How many bytes of records wait for the kernel to take them, beside those of a handshake.
const NOTSENT_LOWAT: usize = 8 * 1024;

/// The same while a response is streamed: a chunk.
const UNSENT_MAX_STREAMING: usize = 64 * 1024;

/// A connection that announces its end by close_notify (RFC 8446 section 6.1), whatever ends it: the client, a deadline,
/// the drain, its eviction. Only a connection that is reset is not announced: its client must not take what it has for
/// all of it.
#[derive(Debug)]
pub struct CloseNotify<S: AsyncRead + Transport + Unpin>(TlsStream<S>);

impl<S: AsyncRead + Transport + Unpin> CloseNotify<S> {
    /// A connection whose handshake is done.
    pub fn new(mut stream: TlsStream<S>) -> Self {
        let (below, connection) = stream.get_mut();
        connection.set_buffer_limit(Some(NOTSENT_LOWAT));
        below.expect_head();
        Self(stream)
    }

    /// What is known of it since the handshake.
    pub fn connection(&self) -> &ServerConnection {
        self.0.get_ref().1
    }
}

impl<S: AsyncRead + Transport + Unpin> Drop for CloseNotify<S> {
    fn drop(&mut self) {
        if self.0.get_ref().0.resets_on_close() {
            return;
        }
        // One try, which never waits: a client that has left no room for it does not read. After a shutdown it does
        // nothing more. Unconstrained, since the task may have used up its turn.
        let shutdown = pin!(unconstrained(poll_fn(|cx| Pin::new(&mut self.0).poll_shutdown(cx))));
        let _ = shutdown.poll(&mut Context::from_waker(Waker::noop()));
    }
}

impl<S: AsyncRead + Transport + Unpin> AsyncRead for CloseNotify<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl<S: AsyncRead + Transport + Unpin> AsyncWrite for CloseNotify<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

/// Its last bytes are a record of its own, close_notify.
impl<S: AsyncRead + Transport + Unpin> Transport for CloseNotify<S> {
    fn reset_on_close(&self) {
        self.0.get_ref().0.reset_on_close();
    }

    fn resets_on_close(&self) -> bool {
        self.0.get_ref().0.resets_on_close()
    }

    fn expect_head(&mut self) {
        self.0.get_mut().0.expect_head();
    }

    fn set_send_mode(&mut self, sending: SendMode) {
        let (stream, connection) = self.0.get_mut();
        let is_short = sending == SendMode::Short;
        connection.set_buffer_limit(Some(if is_short { NOTSENT_LOWAT } else { UNSENT_MAX_STREAMING }));
        stream.set_send_mode(sending);
    }
}
