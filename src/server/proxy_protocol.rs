//! Reads the PROXY header of each connection, if `proxy-protocol` is on.
//!
//! A header is accepted only from a trusted proxy, and a trusted proxy must send one. It is read in a task of its own,
//! before TLS and HTTP, and no byte after it is consumed.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::net::{RecvFlags, recv};
use strum::VariantArray;
use tokio::io::{Interest, Ready};
use tokio::time::Instant;
use tracing::warn;
use zeroize::Zeroizing;

use crate::access::forwarded::TrustedProxies;
use crate::access::proxy_header::{self, ProxyHeader, ProxyHeaderError};
use crate::server::accepted::Accepted;
use crate::server::stream::Stream;
use crate::telemetry::labels::ProxyProtocolError;
use crate::telemetry::metrics::ProxyProtocolMetrics;

/// Minimum time between two log entries for the same reason.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// The proxies that must send headers, and what happens to connections with a wrong one.
#[derive(Debug)]
pub struct ProxyProtocol {
    proxies: TrustedProxies,
    metrics: ProxyProtocolMetrics,
    /// When each reason was last logged.
    logged: Mutex<[Option<Instant>; ProxyProtocolError::VARIANTS.len()]>,
}

impl ProxyProtocol {
    /// Requires a header from `proxies`, and from no other peer.
    pub fn new(proxies: TrustedProxies, metrics: ProxyProtocolMetrics) -> Self {
        Self { proxies, metrics, logged: Mutex::default() }
    }

    /// Reads the header, and returns `accepted` with the client that it names; `None` if the connection must be closed.
    async fn identify(&self, mut accepted: Accepted) -> Option<Accepted> {
        let origin = accepted.peer.origin;
        let stream = &accepted.stream;
        let is_trusted = self.proxies.contains(origin);
        let read = async {
            if is_trusted { read_header(stream).await } else { refuse_header(stream).await.map(|()| None) }
        };
        let (reason, detail) = match accepted.within_head_timeout(read).await {
            Some(Ok(client)) => return accepted.set_client(client).then_some(accepted),
            // A TCP health check closes the connection before a header.
            Some(Err(ReadError::Closed)) => return None,
            Some(Err(ReadError::Untrusted)) => {
                (ProxyProtocolError::Untrusted, "expected a PROXY header only from trusted-proxies")
            }
            Some(Err(ReadError::Header(ProxyHeaderError::Missing))) => {
                (ProxyProtocolError::Missing, "expected a PROXY header from a trusted proxy, found none")
            }
            Some(Err(ReadError::Header(ProxyHeaderError::Malformed(expected)))) => {
                (ProxyProtocolError::Malformed, expected)
            }
            // An untrusted peer owes no header, and shutdown waits for none.
            None if !is_trusted || accepted.is_closing() => return None,
            None => (ProxyProtocolError::Timeout, "expected a complete PROXY header within head-timeout"),
        };
        self.metrics.count_error(reason);
        if self.is_due(reason) {
            warn!(address = %origin, reason = <&str>::from(reason), "connection closed by proxy-protocol: {detail}");
        }
        None
    }

    fn is_due(&self, reason: ProxyProtocolError) -> bool {
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner); // no code under the lock can panic
        let last = &mut logged[reason as usize];
        let is_due = last.is_none_or(|last| last.elapsed() > LOG_INTERVAL);
        if is_due {
            *last = Some(Instant::now());
        }
        is_due
    }
}

/// Wraps `serve` so that it is called for each connection once its PROXY header is read; at once without `protocol`.
pub fn read_proxy_headers(
    protocol: Option<Arc<ProxyProtocol>>,
    serve: impl Fn(Accepted) + Clone + Send + 'static,
) -> impl Fn(Accepted) + Clone + Send + 'static {
    move |accepted| match &protocol {
        None => serve(accepted),
        Some(protocol) => {
            let (protocol, serve) = (Arc::clone(protocol), serve.clone());
            // In a task of its own, so that an open connection does not keep the memory of this future.
            accepted.spawn(|accepted| async move {
                if let Some(accepted) = protocol.identify(accepted).await {
                    serve(accepted);
                }
            });
        }
    }
}

/// Why a connection can't be served.
#[derive(Debug)]
enum ReadError {
    /// The connection was closed before a header began.
    Closed,
    /// An untrusted peer sent a header.
    Untrusted,
    /// A trusted proxy sent no valid header.
    Header(ProxyHeaderError),
}

/// Reads the header, and returns the client in it.
async fn read_header(stream: &Stream) -> Result<Option<IpAddr>, ReadError> {
    let truncated =
        || ReadError::Header(ProxyHeaderError::Malformed("expected the whole header, found the end"));
    let header = match peek(stream, |bytes| ProxyHeader::parse(bytes).transpose()).await {
        Ok((Some(parsed), _)) => parsed.map_err(ReadError::Header)?,
        Ok((None, 0)) | Err(_) => return Err(ReadError::Closed),
        Ok((None, _)) => return Err(truncated()),
    };
    skip(stream, header.length).await.map_err(|_| truncated())?;
    Ok(header.client)
}

/// Refuses a header from an untrusted peer. The bytes that have arrived are not consumed.
async fn refuse_header(stream: &Stream) -> Result<(), ReadError> {
    match peek(stream, proxy_header::is_header).await {
        Ok((Some(true), _)) => Err(ReadError::Untrusted),
        Ok((None, 0)) | Err(_) => Err(ReadError::Closed),
        Ok(_) => Ok(()), // TLS or HTTP, which refuse incomplete requests themselves
    }
}

/// Returns the result of `parse` as soon as the bytes that have arrived suffice for one, and the number of those bytes.
/// They are not consumed. `None` if the stream ends before they suffice.
async fn peek<T>(stream: &Stream, parse: impl Fn(&[u8]) -> Option<T>) -> io::Result<(Option<T>, usize)> {
    // Wiped, since the start of a request, with a token, may have arrived behind the header.
    let mut buffer = Zeroizing::new([0; proxy_header::V1_MAX]);
    loop {
        // When `receive` needs more bytes, tokio clears the readiness for bytes, but never that for the end of the
        // stream: without this check, a client that sends half a header and closes would keep the task running. The
        // check comes first, since bytes that arrive after it are another event.
        let has_ended = readable(stream).await?.is_read_closed();
        let mut found = (None, 0);
        let is_sufficient = receive(stream, &mut buffer[..], RecvFlags::PEEK, |bytes| {
            found = (parse(bytes), bytes.len());
            found.0.is_some() || bytes.is_empty()
        })?;
        if is_sufficient || has_ended {
            return Ok(found);
        }
    }
}

/// Consumes exactly `length` bytes.
async fn skip(stream: &Stream, mut length: usize) -> io::Result<()> {
    let mut buffer = [0; 256];
    while length > 0 {
        readable(stream).await?;
        let wanted = length.min(buffer.len());
        let mut count = None;
        receive(stream, &mut buffer[..wanted], RecvFlags::empty(), |bytes| {
            count = Some(bytes.len());
            true
        })?;
        match count {
            Some(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => length -= count.unwrap_or_default(),
        }
    }
    Ok(())
}

/// Waits until there may be something to read.
async fn readable(stream: &Stream) -> io::Result<Ready> {
    match stream {
        Stream::Tcp(stream) => stream.ready(Interest::READABLE).await,
        Stream::Unix(stream) => stream.ready(Interest::READABLE).await,
    }
}

/// Calls recv(2), and returns whether `suffices` accepts its bytes. If there are none, or too few, [`readable`] waits
/// for more.
fn receive(
    stream: &Stream,
    buffer: &mut [u8],
    flags: RecvFlags,
    suffices: impl FnOnce(&[u8]) -> bool,
) -> io::Result<bool> {
    let receive = |socket: BorrowedFd<'_>| {
        let (count, _) = recv(socket, &mut *buffer, flags)?;
        if suffices(&buffer[..count]) { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
    };
    let received = match stream {
        Stream::Tcp(stream) => stream.try_io(Interest::READABLE, || receive(stream.as_fd())),
        Stream::Unix(stream) => stream.try_io(Interest::READABLE, || receive(stream.as_fd())),
    };
    match received {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        result => result.map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    #[tokio::test]
    async fn no_byte_after_the_header_is_consumed() {
        for header in [
            b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n".to_vec(),
            [b"\r\n\r\n\0\r\nQUIT\n\x21\x11\x03\x88\xc0\0\x02\x01".as_slice(), &[7; 900]].concat(),
        ] {
            let (mut theirs, ours) = UnixStream::pair().unwrap();
            let mut ours = Stream::Unix(ours);
            theirs.write_all(&[header.as_slice(), b"next"].concat()).await.unwrap();
            assert_eq!(read_header(&ours).await.unwrap(), Some([192, 0, 2, 1].into()));
            let mut next = [0; 5];
            assert_eq!(ours.read(&mut next).await.unwrap(), 4);
            assert_eq!(&next[..4], b"next");
        }
    }

    #[tokio::test]
    async fn waiting_for_the_rest_of_a_header_takes_no_cpu() {
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        let ours = Stream::Unix(ours);
        let calls = Cell::new(0);
        let reading = peek(&ours, |bytes| {
            calls.set(calls.get() + 1);
            ProxyHeader::parse(bytes).transpose()
        });
        let sending = async {
            for byte in b"PROXY TCP4" {
                theirs.write_all(&[*byte]).await.unwrap();
                for _ in 0..100 {
                    tokio::task::yield_now().await;
                }
            }
            theirs.shutdown().await.unwrap();
        };
        let (found, ()) = tokio::join!(reading, sending);
        assert_eq!(found.unwrap(), (None, 10), "the end of the stream is noticed");
        assert!(calls.get() <= 13, "{} calls for ten bytes and the end", calls.get());
    }
}
