//! The slow path: a connection that hyper serves for as long as its requests need more than the fast path knows.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use hyper::body::{Body, Incoming};
use hyper::server::conn::http1;
use hyper::service::Service;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncRead;
use tokio::sync::watch;
use tracing::debug;

use crate::server::drain::{Phase, poll_until_closing};
use crate::server::fast_path::connection as fast_path;
use crate::server::fast_path::rewind::Exchange;
use crate::server::fast_path::service::FastPath;
use crate::server::transport::Transport;
use crate::telemetry::metrics::{Metrics, Rejection};

/// The largest request head, in bytes; hyper answers a larger one with 431.
const HEAD_MAX: usize = 16 * 1024;

/// How hyper leaves a connection.
pub(crate) enum SlowPathExit {
    /// At its end.
    Closed,
    /// With nothing that may be taken for its end: its body failed, or another connection needs its buffers.
    Reset,
    /// Between two requests; these bytes were read and not used.
    Handover(Vec<u8>),
}

/// Serves a connection by hyper until every request that it has read is answered.
pub(crate) async fn serve_with_hyper<I, S, B>(
    plain: &mut fast_path::Connection<'_, I, S>,
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
    let (buffers, has_answered) = (plain.buffers().clone(), plain.has_answered());
    let (io, service) = plain.lend(&exchange);
    let mut connection = http1::Builder::new()
        .max_buf_size(HEAD_MAX)
        // A client may close its sending side after its request and still read the answer.
        .half_close(true)
        .serve_connection(TokioIo::new(io), TrackRequests { service, exchange: &exchange });
    let mut held = None;
    let mut is_stopping = false;
    let result = poll_until_closing(phase, |cx, is_closing| {
        if is_closing && !is_stopping {
            is_stopping = true;
            // Without an answer yet, it has just come and would be closed unheard. Its first request is still waited
            // for, as long as a head may take by now, and its answer ends the connection.
            if has_answered || exchange.is_started() {
                Pin::new(&mut connection).graceful_shutdown();
            }
        }
        match Pin::new(&mut connection).poll(cx) {
            Poll::Ready(result) => Poll::Ready(Some(result)),
            Poll::Pending if exchange.is_over() => Poll::Ready(None),
            Poll::Pending if exchange.is_streaming() => {
                held = None; // it has a permit, of which there are few, and may be read slowly
                Poll::Pending
            }
            Poll::Pending => {
                let held = held.get_or_insert_with(|| buffers.hold(cx.waker()));
                if held.is_evicted() { Poll::Ready(None) } else { Poll::Pending }
            }
        }
    });
    match result.await {
        Some(Ok(())) => SlowPathExit::Closed,
        Some(Err(problem)) => {
            // Which peer and which bytes it was is nobody's business; that it happens is counted.
            if problem.is_parse() {
                metrics.rejected(Rejection::Malformed);
            }
            debug!(error = %problem, "a connection ended early");
            if problem.is_user() { SlowPathExit::Reset } else { SlowPathExit::Closed }
        }
        None if exchange.is_over() => {
            let parts = connection.into_parts();
            let mut unread = parts.read_buf.to_vec();
            unread.extend_from_slice(&parts.io.into_inner().finish());
            SlowPathExit::Handover(unread)
        }
        None => {
            metrics.rejected(Rejection::Buffers);
            SlowPathExit::Reset
        }
    }
}

/// A service that notes on its way what is asked of it, and lets other connections have a turn between requests that
/// came together: each may be half a millisecond of work.
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
    type Future = Paced<S::Future>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let is_first = !self.exchange.is_started();
        self.exchange.start(!request.body().is_end_stream());
        Paced { future: self.service.call(request), has_yielded: is_first }
    }
}

/// A future that may let other tasks have a turn before it ends.
struct Paced<F> {
    future: F,
    has_yielded: bool,
}

impl<F: Future + Unpin> Future for Paced<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        if !std::mem::replace(&mut self.has_yielded, true) {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        Pin::new(&mut self.future).poll(cx)
    }
}
