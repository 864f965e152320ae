//! The daemon's server, sending zeros instead of keys: it shows the cost of a large response without key generation.
//!
//! The accept loop, the timeouts and the limits are the library's, on one thread. `/key/N` returns N zero bytes in
//! chunks of [`CHUNK_SIZE`], all of them the same static chunk. So the difference from the daemon is the work for a key
//! (clearing, generating, counting, wiping). `benches/compare/run` builds this example and compares the two. It
//! generates no keys, and the daemon itself has no option to do this.
//!
//! It listens on the inherited sockets named `http` and ends with SIGTERM.

use std::convert::Infallible;
use std::error::Error;
use std::future::{Ready, ready};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response};
use key_service::keys::generator::CHUNK_SIZE;
use key_service::server::accept::serve;
use key_service::server::activation::ActivatedSockets;
use key_service::server::connection::http_handler;
use key_service::server::connection_limit::ConnectionLimit;
use key_service::server::context::ServerContext;
use key_service::server::drain::Drain;
use key_service::server::fast_path::service::SlowPathOnly;
use key_service::server::heartbeat::Heartbeats;
use key_service::server::timeouts::Timeouts;
use key_service::telemetry::metrics::Metrics;

static ZEROS: [u8; CHUNK_SIZE] = [0; CHUNK_SIZE];

fn main() -> Result<(), Box<dyn Error>> {
    let inherited = ActivatedSockets::take()?;
    let mut heartbeats = Heartbeats::new();
    let listeners = inherited.http.into_iter().map(|listener| (listener, heartbeats.register())).collect();
    let timeouts = Timeouts::new(Duration::from_secs(10), Duration::from_secs(75), Duration::from_secs(15));
    let context = ServerContext::new(ConnectionLimit::new(10_000, 256), timeouts, Arc::new(Metrics::new()));
    let drain = Drain::new();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    runtime.block_on(serve(
        listeners,
        http_handler(|_, _| SlowPathOnly(service_fn(respond))),
        context,
        drain.subscribe(),
    ))?;
    Ok(())
}

fn respond(request: Request<Incoming>) -> Ready<Result<Response<Zeros>, Infallible>> {
    let length = request.uri().path().strip_prefix("/key/").and_then(|length| length.parse().ok());
    ready(Ok(Response::new(Zeros { remaining: length.unwrap_or(0) })))
}

struct Zeros {
    remaining: u64,
}

impl Body for Zeros {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        if self.remaining == 0 {
            return Poll::Ready(None);
        }
        let size = usize::try_from(self.remaining).map_or(CHUNK_SIZE, |remaining| remaining.min(CHUNK_SIZE));
        self.remaining -= size as u64;
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(&ZEROS[..size])))))
    }

    fn is_end_stream(&self) -> bool {
        self.remaining == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.remaining)
    }
}
