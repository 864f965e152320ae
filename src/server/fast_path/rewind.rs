//! A connection lent to hyper: a rewound stream, and how far hyper is with the requests on it.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::server::fast_path::request::READ_BUFFER;
use crate::server::transport::{SendMode, Transport};

/// Responses of at least so many bytes have a permit, and the kernel may hold more of them.
const STREAMING_MIN: usize = 64 * 1024;

/// Any stream, as a trait object.
pub(super) trait Io: AsyncRead + Transport + Send + Unpin {}

impl<I: AsyncRead + Transport + Send + Unpin> Io for I {}

/// How far hyper is with the requests on a connection that was lent to it.
#[derive(Debug, Default)]
pub(crate) struct Exchange {
    /// A request was read.
    is_started: AtomicBool,
    /// A request had a body, so only hyper knows where the next request begins.
    has_body: AtomicBool,
    /// hyper has read for another request.
    wants_request: AtomicBool,
    /// Bytes were written and not flushed.
    is_unflushed: AtomicBool,
    /// Bytes written since the last request was read.
    written: AtomicUsize,
    /// hyper has begun to shut down the connection.
    is_closing: AtomicBool,
}

impl Exchange {
    /// Records that a request was read.
    pub(crate) fn start(&self, has_body: bool) {
        self.is_started.store(true, Ordering::Relaxed);
        self.has_body.fetch_or(has_body, Ordering::Relaxed);
        self.written.store(0, Ordering::Relaxed);
    }

    /// Whether a request was read.
    pub(crate) fn is_started(&self) -> bool {
        self.is_started.load(Ordering::Relaxed)
    }

    /// Whether so much of a response was written that the response must have a permit. While the connection closes, it
    /// has none.
    pub(crate) fn is_streaming(&self) -> bool {
        self.written.load(Ordering::Relaxed) >= STREAMING_MIN && !self.is_closing.load(Ordering::Relaxed)
    }

    /// Whether the responses to all requests that were read are sent.
    pub(crate) fn is_complete(&self) -> bool {
        self.wants_request.load(Ordering::Relaxed) && !self.is_unflushed.load(Ordering::Relaxed)
    }
}

/// A stream that yields already-read bytes first. It holds a trait object, because the binary would otherwise have one
/// copy of hyper for each type of stream. Each read is small, so that hyper's buffer grows no larger than one request.
pub(crate) struct Rewind<'a> {
    unread: Vec<u8>,
    /// How many bytes of `unread` hyper has taken.
    taken: usize,
    io: &'a mut dyn Io,
    exchange: &'a Exchange,
    is_streaming: bool,
}

impl<'a> Rewind<'a> {
    pub(super) fn new(unread: Vec<u8>, io: &'a mut dyn Io, exchange: &'a Exchange) -> Self {
        Self { unread, taken: 0, io, exchange, is_streaming: false }
    }

    /// The already-read bytes that hyper did not take. The stream is in the mode in which it was lent.
    pub(crate) fn into_unread(self) -> Vec<u8> {
        if self.is_streaming {
            self.io.set_send_mode(SendMode::Short);
        }
        self.unread[self.taken..].to_vec()
    }

    /// Lets the kernel hold as much as the response needs. To be called before each write.
    fn update_send_mode(&mut self) {
        let is_streaming = self.exchange.is_streaming();
        if is_streaming != self.is_streaming {
            self.is_streaming = is_streaming;
            self.io.set_send_mode(if is_streaming { SendMode::Stream } else { SendMode::Short });
        }
    }

    fn record(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        self.exchange.is_unflushed.store(true, Ordering::Relaxed);
        if let Poll::Ready(Ok(count)) = written {
            self.exchange.written.fetch_add(count, Ordering::Relaxed);
        }
        written
    }
}

impl AsyncRead for Rewind<'_> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let unread = &this.unread[this.taken..];
        if unread.is_empty() {
            // Without a body, hyper reads only for the next request: with half_close, it does not watch for the
            // client's end.
            if this.exchange.is_started() && !this.exchange.has_body.load(Ordering::Relaxed) {
                this.exchange.wants_request.store(true, Ordering::Relaxed);
                return Poll::Pending;
            }
            // A request has begun, or its body is read. After a body, only hyper knows whether the next request has
            // begun.
            this.io.expect_head();
            let size = buf.remaining().min(READ_BUFFER);
            let mut part = ReadBuf::new(buf.initialize_unfilled_to(size));
            ready!(Pin::new(&mut *this.io).poll_read(cx, &mut part))?;
            let read = part.filled().len();
            buf.advance(read);
            return Poll::Ready(Ok(()));
        }
        let size = unread.len().min(buf.remaining()).min(READ_BUFFER);
        buf.put_slice(&unread[..size]);
        this.taken += size;
        if this.taken == this.unread.len() {
            (this.unread, this.taken) = (Vec::new(), 0);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Rewind<'_> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.update_send_mode();
        let written = Pin::new(&mut *this.io).poll_write(cx, buf);
        this.record(written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.update_send_mode();
        let written = Pin::new(&mut *this.io).poll_write_vectored(cx, bufs);
        this.record(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        ready!(Pin::new(&mut *this.io).poll_flush(cx))?;
        this.exchange.is_unflushed.store(false, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.exchange.is_closing.store(true, Ordering::Relaxed);
        Pin::new(&mut *this.io).poll_shutdown(cx)
    }
}
