//! One connection, to its end: TLS or not, then HTTP/1.1 by the fast path or the slow path.

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
use crate::server::fast_path::connection as fast_path;
use crate::server::fast_path::connection::Exit;
use crate::server::fast_path::service::FastPath;
use crate::server::idle::Activity;
use crate::server::slow_path::{SlowPathExit, serve_with_hyper};
use crate::server::stream::Stream;
use crate::server::timeout_stream::TimeoutStream;
use crate::server::tls::handshake::Tls;
use crate::server::transport::Transport;
use crate::telemetry::metrics::Metrics;

/// HTTP on each connection. `service` makes the service of one.
pub fn http<F, S, B>(service: F) -> impl Fn(Accepted) + Clone + Send + 'static
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
        let buffers = BufferAccount::new(Arc::clone(&guard.context.buffers), peer.origin.into());
        let timed = |stream| TimeoutStream::new(stream, Arc::clone(guard.context.timeouts(class)));
        let over_limit = guard.over_limit();
        match (&guard.context.tls, stream) {
            (Some(tls), stream @ Stream::Tcp(_)) => {
                let (tls, stream, service) = (Arc::clone(tls), timed(stream), service.clone());
                spawn(over_limit, async move {
                    let service = move |identity| service(class, Peer { identity, ..peer });
                    with_tls(stream, &tls, service, phase, &guard, buffers).await;
                });
            }
            (_, stream) => {
                let (stream, service) = (timed(stream), service(class, peer));
                // In a box, since the runtime moves a task's future several times.
                let task = async move {
                    let activity = Arc::clone(&guard.activity);
                    connection(stream, service, phase, &guard.context.metrics, buffers, activity).await;
                };
                spawn(over_limit, Box::pin(task));
            }
        }
    }
}

/// Serves one connection to its end: TLS, and HTTP/1.1 inside. The deadlines are below both, as stalls are.
async fn with_tls<S, B>(
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
    let (head, serving) = (stream.timeouts().head(), phase.clone());
    // In boxes, the handshake and what follows it: a task keeps the memory of its largest state for as long as its
    // connection lives, and that of a handshake is thrice what an idle connection needs.
    let mut handshake = Box::pin(async move {
        let (stream, identity) = tls.handshake(stream, head, &guard.share).await?;
        let (metrics, activity) = (&guard.context.metrics, Arc::clone(&guard.activity));
        Some(Box::pin(connection(stream, service(identity), serving, metrics, buffers, activity)))
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

/// Serves one connection to its end: HTTP/1.1, as strictly as the service wants it. Plain requests go the short way;
/// another one goes by hyper, which gives the connection back when it has answered.
pub fn connection<I, S, B>(
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
    // Outside of the future, which would hold what it is made of, too: there is one for each connection.
    let mut plain = fast_path::Connection::new(io, service, metrics, buffers, activity);
    async move {
        loop {
            let poll = |cx: &mut Context<'_>, is_closing| match plain.poll_serve(cx) {
                Poll::Pending if plain.is_evicted() => {
                    metrics.idle_connections_closed.inc();
                    Poll::Ready(Ok(Exit::Closed))
                }
                // A response that is in flight is sent first.
                Poll::Pending if is_closing && plain.is_idle() => Poll::Ready(Ok(Exit::Handover)),
                end => end,
            };
            match poll_until_closing(&mut phase, poll).await {
                Ok(Exit::Closed) => return,
                // In a box, since most connections never need it.
                Ok(Exit::Handover) => match Box::pin(serve_with_hyper(&mut plain, &mut phase, metrics)).await
                {
                    SlowPathExit::Closed => return,
                    SlowPathExit::Reset => return plain.forget_unsent(),
                    SlowPathExit::Handover(unread) => plain.resume(unread),
                },
                Err(problem) => {
                    debug!(error = %problem, "a connection ended early");
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

    use crate::access::peer::Client;
    use crate::server::buffers::BufferLimit;
    use crate::server::fast_path::service::SlowPathOnly;
    use crate::server::idle::IdleConnections;

    #[tokio::test]
    async fn who_has_just_come_when_the_drain_closes_is_heard_and_who_was_answered_is_let_go() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let (phases, phase) = watch::channel(Phase::Serving);
        let metrics = Metrics::new();
        let serve = |io| {
            let service = service_fn(|_: Request<Incoming>| ready(Ok(Response::new(String::from("heard")))));
            let buffers = BufferAccount::new(Arc::new(BufferLimit::new(8)), Client::V4(1));
            let activity = IdleConnections::new().activity();
            connection(io, SlowPathOnly(service), phase.clone(), &metrics, buffers, activity)
        };
        let ask = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n";
        let (mut new, theirs) = tokio::io::duplex(1024);
        let (mut old, others) = tokio::io::duplex(1024);
        let clients = async {
            old.write_all(ask).await.unwrap();
            let mut answer = [0; 1024];
            assert!(old.read(&mut answer).await.unwrap() > 0);
            phases.send_replace(Phase::Closing);
            assert_eq!(old.read(&mut answer).await.unwrap(), 0, "it is let go");
            new.write_all(ask).await.unwrap();
            let length = new.read(&mut answer).await.unwrap();
            assert!(answer[..length].ends_with(b"heard"));
            drop(new);
        };
        tokio::join!(clients, serve(theirs), serve(others));
    }
}
