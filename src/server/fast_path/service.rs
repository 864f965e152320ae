//! Services with a fast path beside the slow one, which is [`hyper::service::Service`].

use crate::server::fast_path::request::FastRequest;
use crate::server::fast_path::response_buffer::ResponseBuffer;

/// A service that knows the answers of plain requests.
pub trait FastPath {
    /// Adds the answer to `request`, or leaves `answers` as they were.
    fn respond_fast(&self, request: &FastRequest<'_>, answers: &mut ResponseBuffer<'_>) -> FastOutcome;
}

/// A service that gets every request by way of hyper.
#[derive(Debug, Clone)]
pub struct SlowPathOnly<S>(pub S);

impl<S> FastPath for SlowPathOnly<S> {
    fn respond_fast(&self, _: &FastRequest<'_>, _: &mut ResponseBuffer<'_>) -> FastOutcome {
        FastOutcome::NotHandled
    }
}

impl<R, S: hyper::service::Service<R>> hyper::service::Service<R> for SlowPathOnly<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn call(&self, request: R) -> S::Future {
        self.0.call(request)
    }
}

/// What became of a plain request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FastOutcome {
    /// It has its answer.
    Written,
    /// There is no room for its answer before the others are sent.
    BufferFull,
    /// It has to take the long way.
    NotHandled,
}
