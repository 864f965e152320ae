//! The accept loop: accepts connections within the limits, and starts a task for each.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::pin;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::{debug, error};

use crate::access::peer::Peer;
use crate::server::accepted::{Accepted, ConnectionGuard};
use crate::server::client_limit::ClientConnectionLimit;
use crate::server::context::ServerContext;
use crate::server::drain::{Phase, wait_for_phase};
use crate::server::heartbeat::Heartbeat;
use crate::server::listener::{Acceptor, Listener};
use crate::server::memory;
use crate::server::stream::Stream;
use crate::telemetry::labels::{AcceptError, Rejection};
use crate::telemetry::metrics::Metrics;

/// How long an accept loop may keep emptying its queue after the drain begins: clients that keep connecting must not
/// delay the drain.
const ACCEPT_DRAIN: Duration = Duration::from_millis(20);

/// With more open connections than this, there may soon be so many that their memory must be returned to the kernel:
/// see [`memory`].
const FEW_CONNECTIONS: usize = 16;

/// How long to wait after accept(2) has failed for a reason other than the connection.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// How many connections in a row may fail before the failure counts as persistent.
const ACCEPT_FAILURES_MAX: u32 = 100;

/// How often a persistent failure is logged.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Serves `listeners` until the drain is over or aborted. `handler` starts a task for each connection, as
/// [`http_handler`](crate::server::connection::http_handler) does.
///
/// Runs on the calling thread's runtime; the connections it accepts stay there.
///
/// # Errors
/// If the runtime can't register a listener.
pub async fn serve(
    listeners: Vec<(Listener, Heartbeat)>,
    handler: impl Fn(Accepted) + Clone + Send + 'static,
    context: ServerContext,
    mut phase: watch::Receiver<Phase>,
) -> io::Result<()> {
    let context = Arc::new(context);
    // Every accept loop and connection holds a sender; nothing is ever sent.
    let (alive, mut all_gone) = mpsc::channel::<Infallible>(1);
    for (listener, heartbeat) in listeners {
        let accept_loop = AcceptLoop {
            acceptor: listener.into_acceptor()?,
            handler: handler.clone(),
            context: Arc::clone(&context),
            phase: phase.clone(),
            alive: alive.clone(),
            has_reserved: false,
            failures: AcceptFailures::default(),
        };
        tokio::spawn(accept_loop.run(heartbeat));
    }
    drop(alive);
    tokio::select! {
        _ = all_gone.recv() => {}
        () = wait_for_phase(&mut phase, Phase::Aborting) => {}
    }
    Ok(())
}

struct AcceptLoop<F> {
    acceptor: Acceptor,
    handler: F,
    context: Arc<ServerContext>,
    phase: watch::Receiver<Phase>,
    alive: mpsc::Sender<Infallible>,
    /// Whether the thread has reserved its memory: see [`memory::reserve`].
    has_reserved: bool,
    failures: AcceptFailures,
}

impl<F: Fn(Accepted)> AcceptLoop<F> {
    /// Accepts connections until the drain begins.
    async fn run(mut self, mut heartbeat: Heartbeat) {
        let _running = self.context.connection_limit.accept_loops.subscribe();
        // Both futures keep one place in their wait lists for the life of the loop, instead of a new one for each
        // connection.
        let mut phase = self.phase.clone();
        let draining = wait_for_phase(&mut phase, Phase::Draining);
        pin!(draining);
        let heartbeat = heartbeat.run();
        pin!(heartbeat);
        loop {
            let accepted = tokio::select! {
                biased;
                () = draining.as_mut() => break,
                never = heartbeat.as_mut() => match never {},
                accepted = accept(&self.acceptor, &self.context) => accepted,
            };
            self.handle(accepted).await;
        }
        // Closing a socket that was bound here resets the connections in its queue, so they are accepted first.
        let since = Instant::now();
        while since.elapsed() <= ACCEPT_DRAIN {
            let Some(accepted) = try_now(accept(&self.acceptor, &self.context)).await else { return };
            self.handle(accepted).await;
        }
    }

    async fn handle(&mut self, accepted: io::Result<(Stream, Peer)>) {
        match accepted {
            Ok((stream, peer)) => {
                self.failures.consecutive = 0;
                self.begin(stream, peer);
            }
            Err(error) => self.failures.handle(&error, &self.context.metrics).await,
        }
    }

    /// Starts the task of a connection, unless its client has too many.
    fn begin(&mut self, stream: Stream, peer: Peer) {
        let context = &self.context;
        let Some(permit) = ClientConnectionLimit::acquire(context.client_limit.as_ref(), peer.origin) else {
            // Other over-limit connections of the client get a 503 already. This one is closed without a response and
            // holds nothing.
            context.metrics.count_rejection(Rejection::ClientConnections);
            return;
        };
        let class = context.connection_limit.acquire(permit.is_over_limit(), !context.uses_proxy_protocol);
        if !self.has_reserved && context.connection_limit.open_connections() > FEW_CONNECTIONS {
            self.has_reserved = true;
            memory::reserve();
        }
        let guard = ConnectionGuard::new(Arc::clone(context), class, permit, self.alive.clone());
        (self.handler)(Accepted { stream, peer, phase: self.phase.clone(), guard });
    }
}

/// The next connection, once the limit has room for it.
async fn accept(acceptor: &Acceptor, context: &ServerContext) -> io::Result<(Stream, Peer)> {
    context.connection_limit.ready(&context.metrics).await;
    acceptor.accept().await
}

/// Failures of accept(2) in a row.
#[derive(Debug, Default)]
struct AcceptFailures {
    consecutive: u32,
    last_logged: Option<Instant>,
}

impl AcceptFailures {
    /// Counts `error`. Returns at once if only one connection has failed; logs and backs off if it is persistent.
    async fn handle(&mut self, error: &io::Error, metrics: &Metrics) {
        let kind = AcceptError::classify(error);
        metrics.count_accept_error(kind);
        self.consecutive += 1;
        if kind == AcceptError::Connection && self.consecutive <= ACCEPT_FAILURES_MAX {
            debug!(%error, "connection closed before it was accepted");
            return;
        }
        // The connection stays in the queue, or the listener itself is broken: the loop can only wait.
        if self.last_logged.is_none_or(|last| last.elapsed() > LOG_INTERVAL) {
            self.last_logged = Some(Instant::now());
            error!(%error, "failed to accept connections: {}", kind.reason());
        }
        tokio::time::sleep(ACCEPT_BACKOFF).await;
    }
}

/// The output of `next` if it is ready once the runtime has polled its sockets again; `None` if it would wait.
async fn try_now<T>(next: impl Future<Output = T>) -> Option<T> {
    tokio::task::yield_now().await;
    tokio::select! {
        biased;
        output = next => Some(output),
        () = std::future::ready(()) => None,
    }
}
