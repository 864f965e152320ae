//! The buffer that responses are written to, and sent from.

use std::cell::Cell;
use std::fmt;
use std::io;
use std::ops::Range;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::http::StatusCode;
use zeroize::Zeroize;

use crate::access::audit::AuditRecord;
use crate::keys::secret_buf::keep_lower;
use crate::server::fast_path::date::append_date;
use crate::server::transport::Transport;
use crate::telemetry::clock::{self, Nanos};
use crate::telemetry::endpoint::Endpoint;
use crate::telemetry::metrics::Metrics;

/// Usual size of the buffer, which is sent in one write, in bytes. A single response may need a larger one.
const WRITE_BUFFER: usize = 8192;

/// The part of the buffer that a response may need beside its body, in bytes.
const HEAD_MAX: usize = 1024;

/// The part of [`HEAD_MAX`] for what is written here, beside the header lines of the service.
const OWN_HEAD_MAX: usize = 192;

/// The largest body of the fast path, in bytes.
pub const BODY_MAX: usize = 16 * 1024;

/// The responses to requests that were read together. Dropping them, sent or not, wipes them and logs the audit records.
pub struct ResponseBuffer<'a> {
    /// Never grows, because reallocation would leave keys behind.
    bytes: Vec<u8>,
    sent: usize,
    /// The number of responses.
    pub(super) count: i64,
    /// The audit records of responses, and where their bodies begin and end.
    records: Vec<(Box<AuditRecord>, Range<usize>)>,
    /// When the requests were read.
    pub(super) read_at: Nanos,
    metrics: &'a Metrics,
}

/// The head of a response, without the headers that a transport adds: Content-Length, Date and Connection.
#[derive(Debug)]
pub struct ResponseHead {
    /// The status line's status.
    pub status: StatusCode,
    /// Header lines, each with its end: those that are always the same, and the others.
    pub lines: (&'static str, String),
    /// Whether the connection closes after the response, which announces it.
    pub closes: bool,
}

thread_local! {
    /// A wiped, empty buffer for the next responses. To allocate it each time cost more than to fill it.
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Allocates the calling thread's buffer.
pub(crate) fn reserve() {
    SPARE.set(Vec::with_capacity(WRITE_BUFFER));
}

impl fmt::Debug for ResponseBuffer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ResponseBuffer({} of {} bytes sent)", self.sent, self.bytes.len())
    }
}

impl<'a> ResponseBuffer<'a> {
    /// An empty buffer for requests that have been read now.
    pub(super) fn new(metrics: &'a Metrics) -> Self {
        let spare = SPARE.take();
        let bytes = if spare.capacity() < WRITE_BUFFER { Vec::with_capacity(WRITE_BUFFER) } else { spare };
        Self { bytes, sent: 0, count: 0, records: Vec::new(), read_at: clock::now(), metrics }
    }

    /// Makes room for a response with a body of `length` bytes. Returns whether there is room now.
    pub fn make_room(&mut self, length: usize) -> bool {
        let needed = HEAD_MAX + length;
        if self.bytes.capacity() - self.bytes.len() >= needed {
            return true;
        }
        if self.count > 0 || length > BODY_MAX {
            return false;
        }
        self.bytes = Vec::with_capacity(needed);
        true
    }

    /// Adds a response of the route `endpoint`: `head`, with the length of the body of GET, and the body that `write`
    /// appends. `write` returns the audit record, which is logged once the body is sent, or can't be, and when the body was
    /// ready.
    ///
    /// # Errors
    /// The error of `write`, which has appended nothing then. No response is added.
    ///
    /// # Panics
    /// If the header lines have more than 832 bytes.
    pub fn add<E>(
        &mut self,
        head: &ResponseHead,
        content_length: u64,
        endpoint: Endpoint,
        write: impl FnOnce(&mut Vec<u8>) -> Result<(Option<Box<AuditRecord>>, Nanos), E>,
    ) -> Result<(), E> {
        assert!(head.lines.0.len() + head.lines.1.len() <= HEAD_MAX - OWN_HEAD_MAX, "the response fits");
        let bytes = &mut self.bytes;
        let start = bytes.len();
        match head.status {
            StatusCode::OK => bytes.extend_from_slice(b"HTTP/1.1 200 OK\r\n"),
            status => {
                let reason = status.canonical_reason().unwrap_or_default();
                for part in ["HTTP/1.1 ", status.as_str(), " ", reason, "\r\n"] {
                    bytes.extend_from_slice(part.as_bytes());
                }
            }
        }
        bytes.extend_from_slice(head.lines.0.as_bytes());
        bytes.extend_from_slice(head.lines.1.as_bytes());
        if head.closes {
            bytes.extend_from_slice(b"connection: close\r\n");
        }
        bytes.extend_from_slice(b"content-length: ");
        bytes.extend_from_slice(itoa::Buffer::new().format(content_length).as_bytes());
        append_date(self.read_at, bytes);
        let body = bytes.len();
        let (record, ready_at) = write(bytes).inspect_err(|_| bytes.truncate(start))?;
        if let Some(record) = record {
            self.records.push((record, body..bytes.len()));
        }
        self.count += 1;
        // Before the response is sent: a client that has it finds it in the metrics.
        self.metrics.requests_in_flight.inc();
        self.metrics.count_response(head.status);
        self.metrics.observe_latency(endpoint, self.read_at, ready_at);
        Ok(())
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
        if self.bytes.capacity() == WRITE_BUFFER {
            keep_lower(&SPARE, &mut self.bytes);
        }
        self.metrics.requests_in_flight.sub(self.count);
        for (record, body) in &mut self.records {
            record.add_sent(self.sent.clamp(body.start, body.end) - body.start, self.sent >= body.end);
        }
    }
}
