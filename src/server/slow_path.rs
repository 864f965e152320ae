//! The slow path: hyper serves a connection while its requests need more than the fast path handles.

use std::convert::Infallible;
use std::mem;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncRead;
use tokio::sync::watch;
use tracing::debug;

use crate::server::drain::{Phase, poll_until_closing};
use crate::server::fast_path::connection::FastPathConnection;
use crate::server::fast_path::rewind::Exchange;
use crate::server::fast_path::service::FastPath;
use crate::server::transport::Transport;
use crate::server::turn::poll_end_turn;
use crate::telemetry::labels::Rejection;
use crate::telemetry::metrics::Metrics;

/// The largest size of request headers, in bytes; hyper answers larger ones with 431.
const HEAD_MAX: usize = 16 * 1024;

/// Why hyper stops serving a connection.
pub(crate) enum SlowPathExit {
    /// The connection is closed.
    Closed,
    /// The client must not take what it has for a whole response: the body failed, or another connection needs the
    /// buffers.
    Reset,
    /// The connection is between two requests; these bytes were read and not used.
    Handover(Vec<u8>),
}

/// Serves a connection with hyper until every request that was read has its response.
pub(crate) async fn serve_with_hyper<I, S, B>(
    fast_path: &mut FastPathConnection<'_, I, S>,
    phase: &mut watch::Receiver<Phase>,
    metrics: &Metrics,
) -> SlowPathExit
where
    I: AsyncRead + Transport + Send + Unpin,
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + FastPath,
    S::Future: Unpin,
    B: Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let exchange = Exchange::default();
    let (buffers, was_idle) = (fast_path.buffers().clone(), fast_path.is_between_requests());
    let (io, service) = fast_path.lend(&exchange);
    let mut connection = http1::Builder::new()
        .max_buf_size(HEAD_MAX)
        // A client may close its sending side after its request and still read the response.
        .half_close(true)
        .serve_connection(TokioIo::new(io), TrackRequests { service, exchange: &exchange });
    let mut permit = None;
    let mut is_stopping = false;
    let result = poll_until_closing(phase, |cx, is_closing| {
        if is_closing && !is_stopping {
            is_stopping = true;
            // hyper would close a connection of which it has read nothing. A new one may still send its first request,
            // within the head timeout of the drain, and the fast path may have read the next request of another. These
            // close after the response.
            if was_idle || exchange.is_started() {
                Pin::new(&mut connection).graceful_shutdown();
            }
        }
        match Pin::new(&mut connection).poll(cx) {
            Poll::Ready(result) => Poll::Ready(Some(result)),
            Poll::Pending if exchange.is_complete() => Poll::Ready(None),
            Poll::Pending if exchange.is_streaming() => {
                permit = None; // the stream has its own permit, of which there are few, and may be read slowly
                Poll::Pending
            }
            Poll::Pending => {
                let permit = permit.get_or_insert_with(|| buffers.hold(cx.waker()));
                if permit.is_evicted() { Poll::Ready(None) } else { Poll::Pending }
            }
        }
    });
    match result.await {
        Some(Ok(())) => SlowPathExit::Closed,
        Some(Err(error)) => {
            // Neither the client nor its bytes are logged; malformed requests are counted.
            if error.is_parse() {
                metrics.count_rejection(Rejection::Malformed);
                if let Some(status) = parse_error_status(&error) {
                    metrics.count_response(status);
                }
            }
            debug!(%error, "connection failed");
            if error.is_user() { SlowPathExit::Reset } else { SlowPathExit::Closed }
        }
        None if exchange.is_complete() => {
            let parts = connection.into_parts();
            let mut unread = parts.read_buf.to_vec();
            unread.extend_from_slice(&parts.io.into_inner().into_unread());
            SlowPathExit::Handover(unread)
        }
        None => {
            metrics.count_rejection(Rejection::Buffers);
            SlowPathExit::Reset
        }
    }
}

/// The status of hyper's own response to a request that it can't parse, which no service sees; `None` if it only closes
/// the connection. A URI is too long for the buffer before it is too long for hyper, so there is no 414.
fn parse_error_status(error: &hyper::Error) -> Option<StatusCode> {
    if error.is_parse_version_h2() {
        return None;
    }
    Some(if error.is_parse_too_large() {
        StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE
    } else {
        StatusCode::BAD_REQUEST
    })
}

/// A service that records requests in `exchange`, and yields to other connections between pipelined requests, each of
/// which may be half a millisecond of work.
struct TrackRequests<'a, S> {
    service: &'a S,
    exchange: &'a Exchange,
}

impl<S> Service<Request<Incoming>> for TrackRequests<'_, S>
where
    S: Service<Request<Incoming>, Future: Unpin>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = YieldOnce<S::Future>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let is_first = !self.exchange.is_started();
        self.exchange.start(!request.body().is_end_stream());
        YieldOnce { future: self.service.call(request), has_yielded: is_first }
    }
}

/// A future that yields to other tasks before it is polled, unless it has already.
struct YieldOnce<F> {
    future: F,
    has_yielded: bool,
}

impl<F: Future + Unpin> Future for YieldOnce<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        if !mem::replace(&mut self.has_yielded, true) {
            return poll_end_turn(cx);
        }
        Pin::new(&mut self.future).poll(cx)
    }
}
