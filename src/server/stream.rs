//! A connection's socket, TCP or Unix, with the socket options that bound what the kernel holds for it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recv, send, sendmsg, shutdown};
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use zeroize::Zeroizing;

use crate::server::transport::{SendMode, Transport};

/// TCP_NOTSENT_LOWAT (tcp(7)) of an ordinary connection: the kernel takes another write only while it holds fewer unsent
/// bytes than this. A response of 16 KiB over a new connection still goes without a wait. The kernel would take up to 4 MB
/// (tcp_wmem) otherwise, from each of 10,000 connections that read nothing.
pub(crate) const NOTSENT_LOWAT: u32 = 4096;

/// The same for a connection with a streamed response, of which there are as many as permits: it must not run dry.
const NOTSENT_LOWAT_STREAMING: u32 = 128 * 1024;

/// The same once its client is slow: above what the last large write, of a chunk, left there.
const NOTSENT_LOWAT_SLOW: u32 = NOTSENT_LOWAT_STREAMING + 64 * 1024;

/// The most bytes of one write to a Unix socket, whose kernel gives memory back only for whole writes: a slow client has to
/// have read one before the next is taken.
const UNIX_WRITE_MAX: usize = 8 * 1024;

/// Bytes that are read at once from a client that goes on sending after its last response.
const DISCARDED_AT_ONCE: usize = 1024;

/// A connection.
#[derive(Debug)]
pub enum Stream {
    /// TCP.
    Tcp(tokio::net::TcpStream),
    /// Unix.
    Unix(tokio::net::UnixStream),
}

impl Stream {
    /// The abstract name that the other end is bound to (unix(7)), without the NUL that begins it.
    pub fn peer_name(&self) -> Option<Vec<u8>> {
        match self {
            Self::Tcp(_) => None,
            Self::Unix(stream) => stream.peer_addr().ok()?.as_abstract_name().map(<[u8]>::to_vec),
        }
    }

    /// The first byte that is to be read, which stays to be read. `None` at the end, and for a Unix socket.
    ///
    /// # Errors
    /// As recv(2).
    pub async fn peek(&self) -> io::Result<Option<u8>> {
        let mut first = [0];
        match self {
            Self::Tcp(stream) => Ok((stream.peek(&mut first).await? > 0).then_some(first[0])),
            Self::Unix(_) => Ok(None),
        }
    }
}

/// Sends by `send`, once the kernel takes bytes again.
fn poll_send(
    stream: &tokio::net::TcpStream,
    cx: &mut Context<'_>,
    send: impl Fn() -> rustix::io::Result<usize>,
) -> Poll<io::Result<usize>> {
    loop {
        ready!(stream.poll_write_ready(cx))?;
        match stream.try_io(Interest::WRITABLE, || Ok(send()?)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            result => return Poll::Ready(result),
        }
    }
}

/// send(2): with MSG_EOR each write begins a segment of its own. Without it the kernel adds a write to its last unsent
/// segment, up to 64 KiB of them, and does not look at TCP_NOTSENT_LOWAT.
const SEND: SendFlags = SendFlags::EOR.union(SendFlags::NOSIGNAL);

macro_rules! delegate {
    ($self:ident, $method:ident $(, $argument:ident)*) => {
        match $self.get_mut() {
            Stream::Tcp(stream) => Pin::new(stream).$method($($argument),*),
            Stream::Unix(stream) => Pin::new(stream).$method($($argument),*),
        }
    };
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        delegate!(self, poll_read, cx, buf)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => poll_send(stream, cx, || send(&*stream, buf, SEND)),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, &buf[..buf.len().min(UNIX_WRITE_MAX)]),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(stream) => {
                poll_send(stream, cx, || sendmsg(&*stream, bufs, &mut SendAncillaryBuffer::default(), SEND))
            }
            unix @ Self::Unix(_) => {
                let first = bufs.iter().find(|buf| !buf.is_empty()).map_or(&[][..], |buf| buf);
                Pin::new(unix).poll_write(cx, first)
            }
        }
    }

    /// Vectored writes are what keeps key bytes out of hyper's own buffers.
    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, poll_flush, cx)
    }

    /// Sends what waits for the end, and the end: close(2) would forget it if the client had sent more than was read.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, poll_shutdown, cx)
    }
}

impl Transport for Stream {
    fn poll_write_final(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        // send(2): with MSG_MORE, one segment has the data and the end, which shutdown(2) sends.
        match self.get_mut() {
            Self::Tcp(stream) => {
                poll_send(stream, cx, || send(&*stream, buf, SendFlags::MORE | SendFlags::NOSIGNAL))
            }
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn reset_on_close(&self) {
        // tcp(7), socket(7): closing with SO_LINGER of 0 resets. A Unix socket forgets anyway.
        if let Self::Tcp(stream) = self {
            let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO)); // without it, it is closed in order
        }
    }

    fn poll_client_closed(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let Self::Tcp(stream) = self else { return Poll::Ready(true) };
        let mut input = Zeroizing::new([0; DISCARDED_AT_ONCE]); // it may have a token
        loop {
            let mut unread = ReadBuf::new(&mut input[..]);
            match ready!(Pin::new(&mut *stream).poll_read(cx, &mut unread)) {
                Ok(()) if !unread.filled().is_empty() => {}
                // getpeername(2): a TCP connection has no peer once both ends are closed and acknowledged, or it is reset.
                Ok(()) | Err(_) => return Poll::Ready(stream.peer_addr().is_err()),
            }
        }
    }

    fn shutdown_and_duplicate(&self) -> Option<OwnedFd> {
        let Self::Tcp(stream) = self else { return None };
        let kept = stream.as_fd().try_clone_to_owned().ok()?; // out of descriptors, it is closed in order
        // While there is another descriptor, close(2) does not end it. It may have ended already, or be broken.
        let _ = shutdown(&kept, Shutdown::Write);
        Some(kept)
    }

    fn try_write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(match self {
            Self::Tcp(stream) => send(&*stream, buf, SEND)?,
            Self::Unix(stream) => send(&*stream, buf, SendFlags::NOSIGNAL)?,
        })
    }

    fn has_input(&self) -> bool {
        let mut first = [0];
        let found = match self {
            Self::Tcp(stream) => recv(stream, &mut first, RecvFlags::PEEK),
            Self::Unix(stream) => recv(stream, &mut first, RecvFlags::PEEK),
        };
        found.is_ok_and(|(read, _)| read > 0)
    }

    fn set_send_mode(&mut self, sending: SendMode) {
        if let Self::Tcp(stream) = self {
            let lowat = match sending {
                SendMode::Short => NOTSENT_LOWAT,
                SendMode::Stream => NOTSENT_LOWAT_STREAMING,
                SendMode::SlowStream => NOTSENT_LOWAT_SLOW,
            };
            let _ = SockRef::from(&*stream).set_tcp_notsent_lowat(lowat); // without it, it is slower or holds more
        }
    }
}
