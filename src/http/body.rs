//! The body of a response: one buffer, a stream of chunks, or what axum's router made. Dropping the body ends its
//! response: key bytes are wiped, and the time that the request took is recorded.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use http_body::{Frame, SizeHint};

use crate::access::audit::AuditRecord;
use crate::access::stream_permits::StreamPermit;
use crate::http::in_flight::InFlightRequest;
use crate::keys::encoded_stream::{Chunk, EncodedStream};
use crate::keys::generator::GeneratorError;
use crate::server::turn::poll_end_turn;
use crate::telemetry::clock;
use crate::telemetry::labels::KeyRequestError;

/// The body of a response.
#[derive(Debug)]
pub struct Body {
    content: Content,
    /// The audit record of the keys, if audited.
    record: Option<Box<AuditRecord>>,
    /// Dropped last.
    request: Option<InFlightRequest>,
}

#[derive(Debug)]
enum Content {
    /// Empty, or already handed over.
    Empty,
    Full(Bytes),
    /// Boxed, so that a short key, the common case, has less to move.
    Stream(Box<StreamBody>),
    Routed(axum::body::Body),
}

/// A streamed response, and the permit that it holds until its end.
#[derive(Debug)]
struct StreamBody {
    stream: EncodedStream,
    /// Whether other connections had a turn since the last chunk.
    has_yielded: bool,
    _permit: StreamPermit,
}

impl Body {
    /// No body.
    pub(crate) fn empty() -> Self {
        Content::Empty.into()
    }

    /// Bytes that are sent as they are. Those of [`KeySpec::generate`](crate::keys::key_spec::KeySpec::generate) wipe
    /// themselves.
    pub(crate) fn full(bytes: Bytes) -> Self {
        Content::Full(bytes).into()
    }

    /// A response in chunks, generated as fast as the client reads. `permit` is released when the body is dropped.
    pub(crate) fn stream(stream: EncodedStream, permit: StreamPermit) -> Self {
        Content::Stream(Box::new(StreamBody { stream, has_yielded: true, _permit: permit })).into()
    }

    /// Logs `record` when this body ends, and, if the body is streamed, when it begins.
    pub(crate) fn attach_audit_record(&mut self, record: Box<AuditRecord>) {
        if matches!(self.content, Content::Stream(_)) {
            record.log_start();
        }
        self.record = Some(record);
    }

    /// Keeps `request` in flight until this body is dropped.
    pub(crate) fn attach_request(&mut self, request: InFlightRequest) {
        self.request = Some(request);
    }

    /// Drops the content, and nothing that is attached: for HEAD.
    pub(crate) fn clear(&mut self) {
        self.content = Content::Empty;
    }
}

impl From<Content> for Body {
    fn from(content: Content) -> Self {
        Self { content, record: None, request: None }
    }
}

impl From<axum::body::Body> for Body {
    fn from(body: axum::body::Body) -> Self {
        Content::Routed(body).into()
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
            Content::Empty => Poll::Ready(None),
            Content::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                if let Some(record) = &mut this.record {
                    record.add_sent(bytes.len(), true);
                }
                this.content = Content::Empty;
                Poll::Ready(Some(Ok(Frame::data(bytes))))
            }
            Content::Stream(body) => {
                // Other connections of this thread have a turn before the next chunk.
                if !std::mem::replace(&mut body.has_yielded, true) {
                    return poll_end_turn(cx);
                }
                body.has_yielded = false;
                let stream = &mut body.stream;
                let started = clock::now();
                let chunk = stream.next();
                match (&chunk, &this.request) {
                    (Some(Ok(chunk)), Some(request)) => {
                        let (keys, bytes) = (chunk.keys_started, chunk.key_bytes);
                        request.metrics().record_keys(stream.spec(), keys, bytes, started);
                        let is_last = stream.remaining() == 0;
                        if let Some(record) = &mut this.record {
                            record.add_sent(chunk.bytes.len(), is_last);
                        }
                    }
                    (Some(Err(_)), Some(request)) => {
                        request.metrics().count_key_error(KeyRequestError::Generator)
                    }
                    _ => {}
                }
                let frame = |chunk: Result<Chunk, GeneratorError>| {
                    chunk.map(|chunk| Frame::data(chunk.bytes)).map_err(BodyError::Generator)
                };
                Poll::Ready(chunk.map(frame))
            }
            Content::Routed(body) => Pin::new(body).poll_frame(cx).map_err(BodyError::Routed),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Empty => true,
            Content::Full(bytes) => bytes.is_empty(),
            Content::Stream(body) => body.stream.remaining() == 0,
            Content::Routed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Empty => SizeHint::with_exact(0),
            Content::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Content::Stream(body) => SizeHint::with_exact(body.stream.remaining()),
            Content::Routed(body) => body.size_hint(),
        }
    }
}

/// Why a body ends before its length. The connection is closed then, so that no client takes the body for complete.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The generator failed in the middle of a streamed response.
    #[error("{0}")]
    Generator(GeneratorError),
    /// The router's response failed.
    #[error("{0}")]
    Routed(axum::Error),
}
