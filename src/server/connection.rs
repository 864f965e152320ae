//! One connection, from its first byte to its last: TLS if configured, then HTTP/1.1 on the fast path or the slow path.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use hyper::body::{Body, Incoming};
use hyper::service::Service;
use hyper::{Request, Response};
use tokio::io::AsyncRead;
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::debug;

use crate::access::peer::Peer;
use crate::server::accepted::{Accepted, ConnectionGuard, spawn};
use crate::server::buffers::BufferAccount;
use crate::server::connection_limit::ConnectionClass;
use crate::server::context::OVER_LIMIT_TIMEOUT;
use crate::server::drain::{Phase, poll_until_closing, wait_for_phase};
use crate::server::fast_path::connection::{Exit, FastPathConnection};
use crate::server::fast_path::service::FastPath;
use crate::server::idle::Activity;
use crate::server::slow_path::{SlowPathExit, serve_with_hyper};
use crate::server::stream::Stream;
use crate::server::timeout_stream::TimeoutStream;
use crate::server::tls::handshake::Tls;
use crate::server::transport::Transport;
use crate::telemetry::metrics::Metrics;

/// A handler for [`serve`](crate::server::accept::serve) that speaks HTTP. `service` makes the service of a connection.
pub fn http_handler<F, S, B>(service: F) -> impl Fn(Accepted) + Clone + Send + 'static
where
    F: Fn(ConnectionClass, Peer) -> S + Clone + Send + 'static,
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>
        + FastPath
        + Send
        + Sync
        + 'static,
    S::Future: Send + Unpin,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    move |Accepted { stream, peer, phase, guard }| {
        let class = guard.class;
        let buffers = BufferAccount::new(Arc::clone(&guard.context.buffer_limit), peer.origin.into());
        let with_timeouts = |stream| TimeoutStream::new(stream, Arc::clone(guard.context.timeouts(class)));
        let over_limit = guard.over_limit();
        match (&guard.context.tls, stream) {
            (Some(tls), stream @ Stream::Tcp(_)) => {
                let (tls, stream, service) = (Arc::clone(tls), with_timeouts(stream), service.clone());
                spawn(over_limit, async move {
                    let service = move |identity| service(class, Peer { identity, ..peer });
                    serve_tls(stream, &tls, service, phase, &guard, buffers).await;
                });
            }
            (_, stream) => {
                let (stream, service) = (with_timeouts(stream), service(class, peer));
                // In a box, since the runtime moves a task's future several times.
                let task = async move {
                    let activity = Arc::clone(&guard.activity);
                    serve_connection(stream, service, phase, &guard.context.metrics, buffers, activity).await;
                };
                spawn(over_limit, Box::pin(task));
            }
        }
    }
}

/// Serves a TLS connection. The timeouts are below TLS, so that they hold for stalled records too.
async fn serve_tls<S, B>(
    stream: TimeoutStream<Stream>,
    tls: &Tls,
    service: impl FnOnce(Option<Arc<str>>) -> S,
    mut phase: watch::Receiver<Phase>,
    guard: &ConnectionGuard,
    buffers: BufferAccount,
) where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + FastPath,
    S::Future: Unpin,
    B: Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let (head_timeout, serving) = (stream.timeouts().head(), phase.clone());
    // In boxes, the handshake and what follows it: a task keeps the memory of its largest state for as long as its
    // connection lives, and a handshake takes three times as much as an idle connection.
    let mut handshake = Box::pin(async move {
        let (stream, identity) = tls.handshake(stream, head_timeout, &guard.client_permit).await?;
        let (metrics, activity) = (&guard.context.metrics, Arc::clone(&guard.activity));
        Some(Box::pin(serve_connection(stream, service(identity), serving, metrics, buffers, activity)))
    });
    let connection = tokio::select! {
        biased;
        connection = handshake.as_mut() => connection,
        () = wait_for_phase(&mut phase, Phase::Closing) => timeout(OVER_LIMIT_TIMEOUT, handshake.as_mut()).await.unwrap_or_default(),
    };
    drop(handshake);
    if let Some(connection) = connection {
        connection.await;
    }
}

/// Serves HTTP/1.1 on one connection until it closes. Simple requests for keys take the fast path; any other goes to
/// hyper, which hands the connection back once it has answered.
pub fn serve_connection<I, S, B>(
    io: I,
    service: S,
    mut phase: watch::Receiver<Phase>,
    metrics: &Metrics,
    buffers: BufferAccount,
    activity: Arc<Activity>,
) -> impl Future<Output = ()>
where
    I: AsyncRead + Transport + Send + Unpin + 'static,
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + FastPath,
    S::Future: Unpin,
    B: Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    // Made outside of the future of each connection, which would otherwise hold these arguments as well.
    let mut fast_path = FastPathConnection::new(io, service, metrics, buffers, activity);
    async move {
        loop {
            let poll = |cx: &mut Context<'_>, is_closing| match fast_path.poll_serve(cx) {
                Poll::Pending if fast_path.is_evicted() => {
                    metrics.idle_connections_closed.inc();
                    Poll::Ready(Ok(Exit::Closed))
                }
                // A response in flight is sent first.
                Poll::Pending if is_closing && fast_path.is_idle() => Poll::Ready(Ok(Exit::Handover)),
                poll => poll,
            };
            match poll_until_closing(&mut phase, poll).await {
                Ok(Exit::Closed) => return,
                Ok(Exit::Handover) => {
                    // In a box, since most connections never need it.
                    let slow_path = Box::pin(serve_with_hyper(&mut fast_path, &mut phase, metrics));
                    match slow_path.await {
                        SlowPathExit::Closed => return,
                        SlowPathExit::Reset => return fast_path.reset_on_close(),
                        SlowPathExit::Handover(unread) => fast_path.resume(unread),
                    }
                }
                Err(error) => {
                    debug!(%error, "connection failed");
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::ready;

    use hyper::service::service_fn;
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::net::UnixStream;

    use crate::access::peer::Client;
    use crate::server::buffers::BufferLimit;
    use crate::server::fast_path::service::tests::SlowPathOnly;
    use crate::server::idle::IdleConnections;

    const REQUEST: &[u8] = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";

    /// Serves a connection whose requests take the slow path.
    async fn serve<I>(io: I, phase: watch::Receiver<Phase>, metrics: &Metrics)
    where
        I: AsyncRead + Transport + Send + Unpin + 'static,
    {
        let service = service_fn(|_: Request<Incoming>| ready(Ok(Response::new(String::from("served")))));
        let buffers = BufferAccount::new(Arc::new(BufferLimit::new(8)), Client::V4(1));
        let activity = IdleConnections::new(1).activity();
        serve_connection(io, SlowPathOnly(service), phase, metrics, buffers, activity).await;
    }

    #[tokio::test]
    async fn closing_waits_for_the_first_request_only() {
        let (phases, phase) = watch::channel(Phase::Serving);
        let metrics = Metrics::new();
        let (mut new, server_of_new) = duplex(1024);
        let (mut used, server_of_used) = duplex(1024);
        let clients = async {
            used.write_all(REQUEST).await.unwrap();
            let mut response = [0; 1024];
            assert!(used.read(&mut response).await.unwrap() > 0);
            phases.send_replace(Phase::Closing);
            assert_eq!(used.read(&mut response).await.unwrap(), 0, "the used connection is closed");
            new.write_all(REQUEST).await.unwrap();
            let length = new.read(&mut response).await.unwrap();
            assert!(response[..length].ends_with(b"served"), "the new connection gets a response");
            drop(new);
        };
        let serve = |server| serve(server, phase.clone(), &metrics);
        tokio::join!(clients, serve(server_of_new), serve(server_of_used));
    }

    #[tokio::test]
    async fn closing_serves_a_request_that_has_arrived() {
        let (phases, phase) = watch::channel(Phase::Serving);
        let metrics = Metrics::new();
        let (mut client, server) = UnixStream::pair().unwrap();
        let client = async {
            client.write_all(REQUEST).await.unwrap();
            let mut response = [0; 1024];
            assert!(client.read(&mut response).await.unwrap() > 0);
            // At once: the runtime learns of the phase before it learns of the request, as after a stall of the machine.
            client.try_write(REQUEST).unwrap();
            phases.send_replace(Phase::Closing);
            let mut responses = Vec::new();
            client.read_to_end(&mut responses).await.unwrap();
            assert!(responses.ends_with(b"served"));
        };
        tokio::join!(client, serve(Stream::Unix(server), phase.clone(), &metrics));
    }
}
