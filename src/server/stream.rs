//! The socket of a connection, TCP or Unix, with the options that limit what the kernel holds for it.

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

/// TCP_NOTSENT_LOWAT (tcp(7)) of an ordinary connection: the kernel accepts another write only while it holds fewer
/// unsent bytes than this. A response of 16 KiB over a new connection is still sent without a wait. Without the option,
/// the kernel would accept up to 4 MB (tcp_wmem) for each of 10,000 connections that read nothing.
pub(crate) const NOTSENT_LOWAT: u32 = 4096;

/// TCP_NOTSENT_LOWAT of a connection with a streamed response, which must not run out of bytes to send. The number of
/// permits limits such connections.
const NOTSENT_LOWAT_STREAMING: u32 = 128 * 1024;

/// TCP_NOTSENT_LOWAT of a connection with a streamed response to a slow client: more than the last large write, of one
/// chunk, left unsent.
const NOTSENT_LOWAT_SLOW: u32 = NOTSENT_LOWAT_STREAMING + 64 * 1024;

/// The most bytes of one write to a Unix socket. The kernel frees the memory of a write only as a whole, so a slow
/// client has to read one write before the next is accepted.
const UNIX_WRITE_MAX: usize = 8 * 1024;

/// Size of the buffer, in bytes, for what a client still sends after its last response.
const DISCARD_BUFFER: usize = 1024;

/// The socket of a connection.
#[derive(Debug)]
pub enum Stream {
    /// TCP.
    Tcp(tokio::net::TcpStream),
    /// Unix.
    Unix(tokio::net::UnixStream),
}

impl Stream {
    /// The abstract name that the peer is bound to (unix(7)), without the leading NUL.
    pub fn peer_name(&self) -> Option<Vec<u8>> {
        match self {
            Self::Tcp(_) => None,
            Self::Unix(stream) => stream.peer_addr().ok()?.as_abstract_name().map(<[u8]>::to_vec),
        }
    }

    /// Waits for the next byte and returns it without reading it. `None` at the end of the connection, and for a Unix
    /// socket.
    ///
    /// # Errors
    /// As recv(2).
    pub(crate) async fn peek(&self) -> io::Result<Option<u8>> {
        let mut first = [0];
        match self {
            Self::Tcp(stream) => Ok((stream.peek(&mut first).await? > 0).then_some(first[0])),
            Self::Unix(_) => Ok(None),
        }
    }
}

/// Sends with `send`, now or once the socket is writable.
fn poll_send(
    stream: &tokio::net::TcpStream,
    cx: &mut Context<'_>,
    send: impl Fn() -> rustix::io::Result<usize>,
) -> Poll<io::Result<usize>> {
    loop {
        // Without asking for readiness first: a socket is writable before nearly every response.
        match stream.try_io(Interest::WRITABLE, || Ok(send()?)) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => ready!(stream.poll_write_ready(cx))?,
            result => return Poll::Ready(result),
        }
    }
}

/// send(2): with MSG_EOR, the next write begins a new segment. Otherwise the kernel adds writes to the last unsent
/// segment, up to 64 KiB of it, whatever TCP_NOTSENT_LOWAT is.
const SEND_FLAGS: SendFlags = SendFlags::EOR.union(SendFlags::NOSIGNAL);

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
            Self::Tcp(stream) => poll_send(stream, cx, || send(&*stream, buf, SEND_FLAGS)),
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, &buf[..buf.len().min(UNIX_WRITE_MAX)]),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut filled = bufs.iter().filter(|buf| !buf.is_empty());
        let first = filled.next().map_or(&[][..], |buf| buf);
        match self.get_mut() {
            Self::Tcp(stream) if filled.next().is_some() => poll_send(stream, cx, || {
                sendmsg(&*stream, bufs, &mut SendAncillaryBuffer::default(), SEND_FLAGS)
            }),
            // rustls writes one buffer for most responses, and send(2) costs less than sendmsg(2).
            stream => Pin::new(stream).poll_write(cx, first),
        }
    }

    /// Vectored writes keep key bytes out of hyper's own buffers.
    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, poll_flush, cx)
    }

    /// Sends the bytes that [`Transport::poll_write_final`] held back, and the end. close(2) would discard them if the
    /// client had sent more than was read.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, poll_shutdown, cx)
    }
}

impl Transport for Stream {
    fn poll_write_final(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        // send(2): with MSG_MORE, the bytes wait for shutdown(2), and one segment has both.
        match self.get_mut() {
            Self::Tcp(stream) => {
                poll_send(stream, cx, || send(&*stream, buf, SendFlags::MORE | SendFlags::NOSIGNAL))
            }
            Self::Unix(stream) => Pin::new(stream).poll_write(cx, buf),
        }
    }

    fn reset_on_close(&self) {
        // socket(7), tcp(7): closing with an SO_LINGER of 0 resets. A Unix socket discards unsent bytes anyway.
        if let Self::Tcp(stream) = self {
            let _ = SockRef::from(stream).set_linger(Some(Duration::ZERO)); // if it fails, the close is orderly
        }
    }

    fn poll_client_closed(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        let Self::Tcp(stream) = self else { return Poll::Ready(true) };
        let mut input = Zeroizing::new([0; DISCARD_BUFFER]); // may have a token
        loop {
            let mut unread = ReadBuf::new(&mut input[..]);
            match ready!(Pin::new(&mut *stream).poll_read(cx, &mut unread)) {
                Ok(()) if !unread.filled().is_empty() => {}
                // getpeername(2) fails once both ends are closed and acknowledged, or the connection is reset.
                Ok(()) | Err(_) => return Poll::Ready(stream.peer_addr().is_err()),
            }
        }
    }

    fn shutdown_and_duplicate(&self) -> Option<OwnedFd> {
        let Self::Tcp(stream) = self else { return None };
        let kept = stream.as_fd().try_clone_to_owned().ok()?; // out of descriptors: the close is orderly
        // close(2) does not shut down the connection while it has another descriptor. This may fail on a broken
        // connection.
        let _ = shutdown(&kept, Shutdown::Write);
        Some(kept)
    }

    fn try_write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Ok(match self {
            Self::Tcp(stream) => send(&*stream, buf, SEND_FLAGS)?,
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

    fn set_send_mode(&mut self, mode: SendMode) {
        if let Self::Tcp(stream) = self {
            let lowat = match mode {
                SendMode::Short => NOTSENT_LOWAT,
                SendMode::Stream => NOTSENT_LOWAT_STREAMING,
                SendMode::SlowStream => NOTSENT_LOWAT_SLOW,
            };
            // If it fails, the response is slower, or the kernel holds more of it.
            let _ = SockRef::from(&*stream).set_tcp_notsent_lowat(lowat);
        }
    }
}
