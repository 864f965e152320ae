//! Services with a fast path beside the slow one, which is [`hyper::service::Service`].

use crate::access::request_head::RequestHead;
use crate::server::fast_path::response_buffer::ResponseBuffer;

/// A service that can respond without hyper.
pub trait FastPath {
    /// Adds the response to a request with this head and no body, or leaves `responses` as they are. `closes` states
    /// that the connection closes afterwards.
    fn respond_fast(
        &self,
        head: &RequestHead<'_>,
        closes: bool,
        responses: &mut ResponseBuffer<'_>,
    ) -> FastOutcome;
}

/// What happened to a request on the fast path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FastOutcome {
    /// The response was added.
    Written {
        /// Whether the connection closes after it.
        closes: bool,
    },
    /// The response fits only after the others are sent.
    BufferFull,
    /// The request has to take the slow path.
    NotHandled,
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A service that gets every request by way of hyper.
    #[derive(Debug, Clone)]
    pub(crate) struct SlowPathOnly<S>(pub(crate) S);

    impl<S> FastPath for SlowPathOnly<S> {
        fn respond_fast(&self, _: &RequestHead<'_>, _: bool, _: &mut ResponseBuffer<'_>) -> FastOutcome {
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
}
