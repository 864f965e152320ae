//! The buffer that responses of the fast path, keys included, are written to and sent from.

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

/// Bytes of answers that are written at once.
const WRITE_BUFFER: usize = 8192;

/// Of it, what an answer may need beside its key.
const ANSWER_HEAD_MAX: usize = 1024;

/// Of that, what the service may say. The rest is for the length, the date and the end, which are written here.
const HEADERS_MAX: usize = ANSWER_HEAD_MAX - 128;

/// The longest key that goes this way, in bytes.
pub const KEY_MAX: u64 = 4096;

/// Answers to requests that came together, from their heads until all are sent or given up: then their time is taken
/// and their keys are wiped.
pub struct ResponseBuffer<'a> {
    /// Never grows, which would leave keys behind.
    bytes: Vec<u8>,
    sent: usize,
    count: usize,
    started: Instant,
    metrics: &'a Metrics,
}

thread_local! {
    /// Room for answers: wiped, empty, and there while no answers are. To ask the allocator for each cost more than all
    /// that is written into it.
    static SPARE: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
}

/// Makes the calling thread's room for answers.
pub fn reserve() {
    SPARE.set(Vec::with_capacity(WRITE_BUFFER));
}

impl fmt::Debug for ResponseBuffer<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Answers({}, {} of {} bytes sent)", self.count, self.sent, self.bytes.len())
    }
}

impl<'a> ResponseBuffer<'a> {
    pub(super) fn start(metrics: &'a Metrics) -> Self {
        let spare = SPARE.take();
        let bytes = if spare.capacity() < WRITE_BUFFER { Vec::with_capacity(WRITE_BUFFER) } else { spare };
        Self { bytes, sent: 0, count: 0, started: Instant::now(), metrics }
    }

    /// When it was started, if it has a response.
    pub(super) fn responses_since(&self) -> Option<Instant> {
        (self.count > 0).then_some(self.started)
    }

    /// Whether a key of `length` has room, with its head.
    pub fn have_room(&self, length: KeyLength) -> bool {
        length.bytes() <= (WRITE_BUFFER - self.bytes.len()).saturating_sub(ANSWER_HEAD_MAX) as u64
    }

    /// Adds the answer to `request`, which is for a key of `length`: `head`, a status line and fields, more `fields`, all
    /// with their line's end, and the key that `draw` makes.
    ///
    /// # Errors
    /// That of `draw`; nothing is added then.
    ///
    /// # Panics
    /// Without room for it, or with a `head` and `fields` of more than 896 bytes.
    pub fn add<E>(
        &mut self,
        request: &FastRequest<'_>,
        length: KeyLength,
        head: &str,
        fields: &str,
        generate: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        assert!(self.have_room(length) && head.len() + fields.len() <= HEADERS_MAX, "an answer has room");
        let bytes = &mut self.bytes;
        let start = bytes.len();
        let end = if request.closes { "connection: close\r\n" } else { "" };
        // A length has one form, so its text is good for the answer, too.
        for part in [head, fields, end, "content-length: ", request.length, "\r\ndate: "] {
            bytes.extend_from_slice(part.as_bytes());
        }
        bytes.extend_from_slice(&date(self.started));
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

    /// Sends them; `last` says that the connection ends with them.
    pub(super) fn poll_send<I: Transport + Unpin>(
        &mut self,
        io: &mut I,
        last: bool,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while self.sent < self.bytes.len() {
            let (io, rest) = (Pin::new(&mut *io), &self.bytes[self.sent..]);
            match ready!(if last { io.poll_write_last(cx, rest) } else { io.poll_write(cx, rest) })? {
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
        let took = self.started.elapsed();
        for _ in 0..self.count {
            self.metrics.requests_in_flight.dec();
            self.metrics.finished(Endpoint::Key, took);
        }
    }
}
