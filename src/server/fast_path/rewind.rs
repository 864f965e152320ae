//! A connection lent to hyper: bytes that were read already come first, and what hyper does with it is noted.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::server::fast_path::request::READ_BUFFER;
use crate::server::transport::{Sending, Transport};

/// From so many bytes of a response on, the kernel may hold more of it. A response that long has a permit.
const STREAMING_MIN: usize = 64 * 1024;

/// Any stream.
pub(super) trait Io: AsyncRead + Transport + Send + Unpin {}

impl<I: AsyncRead + Transport + Send + Unpin> Io for I {}

/// How far hyper is with the requests that it was lent a connection for.
#[derive(Debug, Default)]
pub struct Exchange {
    /// A request was read.
    is_started: AtomicBool,
    /// A request had a body, so hyper alone knows where the next one begins.
    has_body: AtomicBool,
    /// Hyper asks for a request after those that it has answered.
    wants_more: AtomicBool,
    /// Something was written that may not be with the kernel yet.
    is_unflushed: AtomicBool,
    /// Bytes written since the last request was read.
    written: AtomicUsize,
    /// The connection has begun to end.
    is_ending: AtomicBool,
}

impl Exchange {
    /// Notes that a request was read.
    pub fn start(&self, has_body: bool) {
        self.is_started.store(true, Ordering::Relaxed);
        self.has_body.fetch_or(has_body, Ordering::Relaxed);
        self.written.store(0, Ordering::Relaxed);
    }

    /// Whether a request was read.
    pub fn is_started(&self) -> bool {
        self.is_started.load(Ordering::Relaxed)
    }

    /// Whether so much of a response was written that it must have a permit. It has none while the connection ends.
    pub fn is_streaming(&self) -> bool {
        self.written.load(Ordering::Relaxed) >= STREAMING_MIN && !self.is_ending.load(Ordering::Relaxed)
    }

    /// Whether every request that was read is answered and every answer sent.
    pub fn is_over(&self) -> bool {
        self.wants_more.load(Ordering::Relaxed) && !self.is_unflushed.load(Ordering::Relaxed)
    }
}

/// A stream that yields already-read bytes first. It is one type whatever the stream is: hyper would be in the binary
/// once for each. It reads little at a time, so that hyper's buffer does not grow beyond what one request needs.
pub struct Rewind<'a> {
    unread: Vec<u8>,
    at: usize,
    io: &'a mut dyn Io,
    exchange: &'a Exchange,
    is_streaming: bool,
}

impl<'a> Rewind<'a> {
    pub(super) fn new(unread: Vec<u8>, io: &'a mut dyn Io, exchange: &'a Exchange) -> Self {
        Self { unread, at: 0, io, exchange, is_streaming: false }
    }

    /// What was read before and hyper did not take. The stream is as it was lent.
    pub fn finish(self) -> Vec<u8> {
        if self.is_streaming {
            self.io.set_sending(Sending::Short);
        }
        self.unread[self.at..].to_vec()
    }

    /// Before each write: lets the kernel hold as much as the response needs.
    fn prepare(&mut self) {
        let is_streaming = self.exchange.is_streaming();
        if is_streaming != self.is_streaming {
            self.is_streaming = is_streaming;
            self.io.set_sending(if is_streaming { Sending::Stream } else { Sending::Short });
        }
    }

    fn note(&self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
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
        let unread = &this.unread[this.at..];
        if unread.is_empty() {
            // Without a body to read, and while its client may close its sending side, hyper reads only for a request.
            if this.exchange.is_started() && !this.exchange.has_body.load(Ordering::Relaxed) {
                this.exchange.wants_more.store(true, Ordering::Relaxed);
                return Poll::Pending;
            }
            // It has begun, or has a body; after a body, only hyper knows whether the next one has.
            this.io.expect_head();
            let few = buf.remaining().min(READ_BUFFER);
            let mut few = ReadBuf::new(buf.initialize_unfilled_to(few));
            ready!(Pin::new(&mut *this.io).poll_read(cx, &mut few))?;
            let read = few.filled().len();
            buf.advance(read);
            return Poll::Ready(Ok(()));
        }
        let size = unread.len().min(buf.remaining()).min(READ_BUFFER);
        buf.put_slice(&unread[..size]);
        this.at += size;
        if this.at == this.unread.len() {
            (this.unread, this.at) = (Vec::new(), 0);
        }
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Rewind<'_> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.prepare();
        let written = Pin::new(&mut *this.io).poll_write(cx, buf);
        this.note(written)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.prepare();
        let written = Pin::new(&mut *this.io).poll_write_vectored(cx, bufs);
        this.note(written)
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
        this.exchange.is_ending.store(true, Ordering::Relaxed);
        Pin::new(&mut *this.io).poll_shutdown(cx)
    }
}
