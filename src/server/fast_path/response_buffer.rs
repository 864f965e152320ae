//! The buffer that keys and their response headers are written to, and sent from.

use std::cell::Cell;
use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Instant;

use zeroize::Zeroize;

use crate::keys::key::KeyLength;
use crate::keys::secret_buf::keep_lower;
use crate::server::fast_path::date::date;
use crate::server::fast_path::request::FastRequest;
use crate::server::transport::Transport;
use crate::telemetry::endpoint::Endpoint;
use crate::telemetry::metrics::Metrics;

/// Size of the buffer, which is sent in one write, in bytes.
const WRITE_BUFFER: usize = 8192;

/// The part of the buffer that a response may need beside its key, in bytes.
const OVERHEAD_MAX: usize = 1024;

/// The part of [`OVERHEAD_MAX`] for the status line and headers of the service. The rest is for those written here.
const HEADERS_MAX: usize = OVERHEAD_MAX - 128;

/// The longest key of the fast path, in bytes.
pub(crate) const FAST_KEY_MAX: u64 = 4096;

/// The responses to requests that were read together. Dropping them, sent or not, wipes the keys and records the
/// latency.
pub struct ResponseBuffer<'a> {
    /// Never grows, because reallocation would leave keys behind.
    bytes: Vec<u8>,
    sent: usize,
    count: usize,
    read_at: Instant,
    metrics: &'a Metrics,
}

thread_local! {
    /// A wiped, empty buffer for the next responses. To allocate one each time cost more than to fill it.
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Allocates the calling thread's buffer.
pub(crate) fn reserve() {
    SPARE.set(Vec::with_capacity(WRITE_BUFFER));
}

impl fmt::Debug for ResponseBuffer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ResponseBuffer({}, {} of {} bytes sent)", self.count, self.sent, self.bytes.len())
    }
}

impl<'a> ResponseBuffer<'a> {
    /// An empty buffer for requests that have been read now.
    pub(super) fn new(metrics: &'a Metrics) -> Self {
        let spare = SPARE.take();
        let bytes = if spare.capacity() < WRITE_BUFFER { Vec::with_capacity(WRITE_BUFFER) } else { spare };
        Self { bytes, sent: 0, count: 0, read_at: Instant::now(), metrics }
    }

    /// Whether there is no response.
    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// When the requests were read.
    pub(super) fn read_at(&self) -> Instant {
        self.read_at
    }

    /// Whether a response with a key of `length` fits.
    pub fn has_room(&self, length: KeyLength) -> bool {
        length.bytes() <= (WRITE_BUFFER - self.bytes.len()).saturating_sub(OVERHEAD_MAX) as u64
    }

    /// Adds the response to `request` for a key of `length`: `head` (a status line and headers) and `headers`, every
    /// line with its end, and the key that `generate` makes.
    ///
    /// # Errors
    /// The error of `generate`; then nothing is added.
    ///
    /// # Panics
    /// If the response does not fit, or `head` and `headers` have more than 896 bytes.
    pub fn add<E>(
        &mut self,
        request: &FastRequest<'_>,
        length: KeyLength,
        head: &str,
        headers: &str,
        generate: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        assert!(self.has_room(length) && head.len() + headers.len() <= HEADERS_MAX, "the response fits");
        let bytes = &mut self.bytes;
        let start = bytes.len();
        let connection = if request.closes { "connection: close\r\n" } else { "" };
        // Every valid length has one spelling, so the request's text serves as Content-Length.
        for part in [head, headers, connection, "content-length: ", request.length, "\r\ndate: "] {
            bytes.extend_from_slice(part.as_bytes());
        }
        bytes.extend_from_slice(&date(self.read_at));
        bytes.extend_from_slice(b"\r\n\r\n");
        let key = bytes.len();
        bytes.resize(key + usize::try_from(length.bytes()).unwrap_or(0), 0);
        let generated = generate(&mut bytes[key..]);
        match generated {
            Ok(()) => {
                self.count += 1;
                self.metrics.requests_in_flight.inc();
            }
            Err(_) => bytes.truncate(start),
        }
        generated
    }

    /// Sends the responses. `is_final` states that the connection closes after them.
    pub(super) fn poll_send<I: Transport + Unpin>(
        &mut self,
        io: &mut I,
        is_final: bool,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while self.sent < self.bytes.len() {
            let (io, rest) = (Pin::new(&mut *io), &self.bytes[self.sent..]);
            match ready!(if is_final { io.poll_write_final(cx, rest) } else { io.poll_write(cx, rest) })? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                sent => self.sent += sent,
            }
        }
        Pin::new(io).poll_flush(cx)
    }
}

impl Drop for ResponseBuffer<'_> {
    fn drop(&mut self) {
        self.bytes.as_mut_slice().zeroize();
        self.bytes.clear();
        keep_lower(&SPARE, &mut self.bytes);
        let latency = self.read_at.elapsed();
        for _ in 0..self.count {
            self.metrics.requests_in_flight.dec();
            self.metrics.observe_latency(Endpoint::Key, latency);
        }
    }
}
