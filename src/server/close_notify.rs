//! A TLS connection that sends close_notify when it ends, so that its client can tell the end from a truncation.

use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::task::{Context, Poll, Waker, ready};

use rustls::ServerConnection;
use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::unconstrained;
use tokio_rustls::server::TlsStream;

use crate::server::transport::{SendMode, Transport};

/// The limit of rustls's buffer of TLS records that the kernel has not accepted, in bytes. A handshake has no limit.
const RECORD_BUFFER: usize = 8 * 1024;

/// The limit of that buffer while a response is streamed: one chunk.
const RECORD_BUFFER_STREAMING: usize = 64 * 1024;

/// A TLS connection that sends close_notify (RFC 8446 section 6.1) whatever ends it: the client, a timeout, the drain
/// or an eviction. Only a connection that is reset sends none: its client must not take a part of a response for all of
/// it.
#[derive(Debug)]
pub(crate) struct CloseNotify<S: AsyncRead + Transport + Unpin>(TlsStream<S>);

impl<S: AsyncRead + Transport + Unpin> CloseNotify<S> {
    /// Wraps a connection whose handshake is complete.
    pub(crate) fn new(mut stream: TlsStream<S>) -> Self {
        let (transport, connection) = stream.get_mut();
        connection.set_buffer_limit(Some(RECORD_BUFFER));
        transport.expect_head();
        Self(stream)
    }

    /// The state of the TLS connection, with the result of the handshake.
    pub(crate) fn connection(&self) -> &ServerConnection {
        self.0.get_ref().1
    }
}

impl<S: AsyncRead + Transport + Unpin> Drop for CloseNotify<S> {
    fn drop(&mut self) {
        if self.0.get_ref().0.resets_on_close() {
            return;
        }
        // One attempt that never waits: a client whose buffers are full does not read. After a shutdown it does
        // nothing. Unconstrained, because the task's budget may be used up.
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
        // Until all decrypted bytes are taken. `poll_read` of tokio-rustls would read on until a read has to wait.
        loop {
            let received = ready!(Pin::new(&mut self.0).poll_fill_buf(cx))?;
            let count = received.len().min(buf.remaining());
            buf.put_slice(&received[..count]);
            Pin::new(&mut self.0).consume(count);
            if count == 0 || self.connection().wants_read() {
                return Poll::Ready(Ok(()));
            }
        }
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

/// `poll_write_final` is the default: the last bytes are not the response's but a record of their own, close_notify.
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

    fn set_send_mode(&mut self, mode: SendMode) {
        let (stream, connection) = self.0.get_mut();
        let is_short = mode == SendMode::Short;
        connection.set_buffer_limit(Some(if is_short { RECORD_BUFFER } else { RECORD_BUFFER_STREAMING }));
        stream.set_send_mode(mode);
    }
}
