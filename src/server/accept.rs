//! The accept loop: it accepts connections under the limits, and starts a task for each.

use std::convert::Infallible;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::pin;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::{debug, error};

use crate::server::accepted::{Accepted, ConnectionGuard};
use crate::server::client_limit::ClientConnectionLimit;
use crate::server::context::ServerContext;
use crate::server::drain::{Phase, wait_for_phase};
use crate::server::heartbeat::Heartbeat;
use crate::server::listener::{Acceptor, Listener};
use crate::server::memory;
use crate::telemetry::metrics::{AcceptError, Rejection};

/// How long an accept loop may go on to empty its queue when the drain begins: a client that keeps coming must not hold it.
const ACCEPT_DRAIN: Duration = Duration::from_millis(20);

/// With so many connections more may come, and their memory is to be given back.
const FEW: usize = 16;

/// How long to wait after accept(2) has failed for a reason that is not the connection's.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

/// How many connections in a row may fail by themselves before that counts as a persistent failure.
const ACCEPT_FAILURES_MAX: u32 = 100;

/// How often that is logged.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Serves `listeners` until the drain is over, or aborted. `begin` starts a task for each connection, such as [`http`](crate::server::connection::http) makes.
///
/// Runs on the calling thread's runtime; the connections it accepts stay there.
///
/// # Errors
/// When the runtime can't take a listener.
pub async fn serve(
    listeners: Vec<(Listener, Heartbeat)>,
    begin: impl Fn(Accepted) + Clone + Send + 'static,
    context: ServerContext,
    mut phase: watch::Receiver<Phase>,
) -> io::Result<()> {
    let context = Arc::new(context);
    // Every accept loop and connection holds a sender; nothing is ever sent.
    let (alive, mut all_gone) = mpsc::channel::<Infallible>(1);
    for (listener, heartbeat) in listeners {
        let acceptor = listener.into_acceptor()?;
        tokio::spawn(accept(
            acceptor,
            heartbeat,
            begin.clone(),
            Arc::clone(&context),
            phase.clone(),
            alive.clone(),
        ));
    }
    drop(alive);
    tokio::select! {
        _ = all_gone.recv() => {}
        () = wait_for_phase(&mut phase, Phase::Aborting) => {}
    }
    Ok(())
}

async fn accept(
    acceptor: Acceptor,
    mut heartbeat: Heartbeat,
    begin: impl Fn(Accepted) + Clone + Send + 'static,
    context: Arc<ServerContext>,
    phase: watch::Receiver<Phase>,
    alive: mpsc::Sender<Infallible>,
) {
    let mut last_logged: Option<Instant> = None;
    let mut has_put_aside = false;
    let mut failures = 0;
    let mut sweeping: Option<Instant> = None;
    let _accepting = context.slots.accepting.subscribe();
    // Both wait in one place for the life of the loop, instead of joining and leaving it for each connection.
    let mut stopping = phase.clone();
    let draining = wait_for_phase(&mut stopping, Phase::Draining);
    pin!(draining);
    let beat = heartbeat.beat();
    pin!(beat);
    loop {
        let next = async {
            context.slots.ready(&context.metrics).await;
            acceptor.accept().await
        };
        // Closing a socket that was bound here resets whoever is in its queue: they are taken first.
        let accepted = if let Some(since) = sweeping {
            if since.elapsed() > ACCEPT_DRAIN {
                return;
            }
            let Some(accepted) = try_now(next).await else {
                return;
            };
            accepted
        } else {
            tokio::select! {
                biased;
                () = draining.as_mut() => {
                    sweeping = Some(Instant::now());
                    continue;
                }
                never = beat.as_mut() => match never {},
                accepted = next => accepted,
            }
        };
        match accepted {
            Ok((stream, peer)) => {
                failures = 0;
                let Some(share) = ClientConnectionLimit::take(context.client_limit.as_ref(), peer.origin)
                else {
                    // Those who were told 503 are many already; dropped here, it holds nothing.
                    context.metrics.rejected(Rejection::ClientConnections);
                    continue;
                };
                let class = context.slots.acquire(share.is_excess(), !context.identifies);
                if !has_put_aside && context.slots.open() > FEW {
                    has_put_aside = true;
                    memory::put_aside();
                }
                let guard = ConnectionGuard::new(Arc::clone(&context), class, alive.clone(), share);
                begin(Accepted { stream, peer, phase: phase.clone(), guard });
            }
            Err(error) => {
                let kind = AcceptError::of(&error);
                context.metrics.accept_failed(kind);
                failures += 1;
                if kind == AcceptError::Connection && failures <= ACCEPT_FAILURES_MAX {
                    debug!(%error, "connection was closed before it was accepted");
                    continue;
                }
                // The connection stays in the queue, or the listener itself is broken: waiting is all there is.
                if last_logged.is_none_or(|last| last.elapsed() > LOG_INTERVAL) {
                    last_logged = Some(Instant::now());
                    error!(%error, "failed to accept connections: {}", kind.reason());
                }
                tokio::time::sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

/// What `next` gives without waiting, once the runtime has looked at its sockets again; `None` where it would wait.
async fn try_now<T>(next: impl Future<Output = T>) -> Option<T> {
    tokio::task::yield_now().await;
    tokio::select! {
        biased;
        taken = next => Some(taken),
        () = std::future::ready(()) => None,
    }
}
