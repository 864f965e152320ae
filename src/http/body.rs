//! What is sent back: a page, a key in one piece, or a key in many. When it is dropped the answer is over: its key
//! bytes are wiped and its time is taken.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use http_body::{Frame, SizeHint};

use crate::access::audit::AuditRecord;
use crate::access::stream_permits::StreamPermit;
use crate::keys::encoding::{Chunk, EncodedStream};
use crate::keys::generator::GeneratorError;
use crate::telemetry::endpoint::Endpoint;
use crate::telemetry::metrics::{KeyFailure, Metrics};

/// The body of an answer.
#[derive(Debug)]
pub struct Body {
    content: Content,
    /// What the key leaves in the log, where it does.
    record: Option<Box<AuditRecord>>,
    /// Dropped last.
    _answer: Option<InFlightRequest>,
}

#[derive(Debug)]
enum Content {
    /// Empty, or already handed over.
    Nothing,
    Whole(Bytes),
    /// Boxed, so that the short keys, which are many, have less to move.
    Stream(Box<Bulk>),
    Page(axum::body::Body),
}

/// A streamed response, with the permit that it has until its end.
#[derive(Debug)]
struct Bulk {
    writing: EncodedStream,
    /// Whether other connections have had their turn since the last chunk.
    has_yielded: bool,
    _permit: StreamPermit,
}

impl Body {
    /// No body.
    pub fn empty() -> Self {
        Content::Nothing.into()
    }

    /// Bytes that are sent as they are. Those of a key come from [`crate::keys::encoding::KeySpec::generate`] and are wiped.
    pub fn whole(bytes: Bytes) -> Self {
        Content::Whole(bytes).into()
    }

    /// A response in chunks, generated as fast as the client reads. `permit` is given back when the body is dropped.
    pub fn stream(writing: EncodedStream, permit: StreamPermit) -> Self {
        Content::Stream(Box::new(Bulk { writing, has_yielded: true, _permit: permit })).into()
    }

    /// Leaves `record` when this body ends; a streamed key leaves one when it begins, too.
    pub fn leave(&mut self, record: AuditRecord) {
        if matches!(self.content, Content::Stream(_)) {
            record.started();
        }
        self.record = Some(Box::new(record));
    }

    /// Ties the end of this body to the end of `answer`.
    pub fn end(&mut self, answer: InFlightRequest) {
        self._answer = Some(answer);
    }

    /// Leaves nothing to send, and the end as it is: for HEAD.
    pub fn empty_out(&mut self) {
        self.content = Content::Nothing;
    }
}

impl From<Content> for Body {
    fn from(content: Content) -> Self {
        Self { content, record: None, _answer: None }
    }
}

impl From<String> for Body {
    fn from(text: String) -> Self {
        Self::whole(text.into())
    }
}

impl From<axum::body::Body> for Body {
    fn from(page: axum::body::Body) -> Self {
        Content::Page(page).into()
    }
}

impl http_body::Body for Body {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = self.get_mut();
        match &mut this.content {
            Content::Nothing => Poll::Ready(None),
            Content::Whole(bytes) => {
                let bytes = std::mem::take(bytes);
                if let Some(record) = &mut this.record {
                    record.sent(bytes.len(), true);
                }
                this.content = Content::Nothing;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Content::Stream(bulk) => {
                // A chunk is up to 0.3 ms of work: other connections of this thread have a turn before the next one.
                if !std::mem::replace(&mut bulk.has_yielded, true) {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                bulk.has_yielded = false;
                let writing = &mut bulk.writing;
                let started = Instant::now();
                let piece = writing.next();
                match (&piece, &this._answer) {
                    (Some(Ok(piece)), Some(answer)) => {
                        let shape = writing.shape();
                        answer.metrics.generated(started);
                        (0..piece.keys).for_each(|_| answer.metrics.key_served(shape.length().bytes()));
                        answer.metrics.key_bytes_served(shape.format(), piece.key_bytes);
                        let is_last = writing.remaining() == 0;
                        if let Some(record) = &mut this.record {
                            record.sent(piece.bytes.len(), is_last);
                        }
                    }
                    (Some(Err(_)), Some(answer)) => answer.metrics.key_failed(KeyFailure::Generator),
                    _ => {}
                }
                let frame = |piece: Result<Chunk, GeneratorError>| {
                    piece.map(|piece| Frame::data(piece.bytes)).map_err(BodyError::Generator)
                };
                Poll::Ready(piece.map(frame))
            }
            Content::Page(page) => Pin::new(page).poll_frame(cx).map_err(BodyError::Page),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Nothing => true,
            Content::Whole(bytes) => bytes.is_empty(),
            Content::Stream(bulk) => bulk.writing.remaining() == 0,
            Content::Page(page) => page.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Nothing => SizeHint::with_exact(0),
            Content::Whole(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Content::Stream(bulk) => SizeHint::with_exact(bulk.writing.remaining()),
            Content::Page(page) => page.size_hint(),
        }
    }
}

/// Why a body ends before its length: the connection is cut, so that no client takes it for complete.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The generator failed in the middle of a long key.
    #[error("{0}")]
    Generator(GeneratorError),
    /// A page could not be made.
    #[error("{0}")]
    Page(axum::Error),
}

/// A request that is being answered, from its head until this is dropped.
#[derive(Debug)]
pub struct InFlightRequest {
    metrics: Arc<Metrics>,
    endpoint: Endpoint,
    started: Instant,
}

impl InFlightRequest {
    /// Starts the clock.
    pub fn start(metrics: Arc<Metrics>, endpoint: Endpoint) -> Self {
        metrics.requests_in_flight.inc();
        Self { metrics, endpoint, started: Instant::now() }
    }

    /// Where it is counted.
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
    }
}

impl Drop for InFlightRequest {
    fn drop(&mut self) {
        self.metrics.requests_in_flight.dec();
        self.metrics.finished(self.endpoint, self.started.elapsed());
    }
}
