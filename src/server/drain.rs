//! Graceful shutdown: the phases that every server and connection goes through.

use std::future::poll_fn;
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use tokio::pin;
use tokio::sync::watch;
use tokio::task::yield_now;
use tokio::time::timeout;

use crate::server::context::{OVER_LIMIT_TIMEOUT, ServerContext};
use crate::server::timeouts::Timeouts;
use crate::server::unacknowledged::UnacknowledgedSockets;

/// How long the server keeps reading from open connections after the drain begins, so that a request in flight gets its
/// response instead of a reset.
const READ_LINGER: Duration = Duration::from_millis(250);

/// How often to ask the kernel whether clients have acknowledged the last bytes and the end of their connections.
const ACKNOWLEDGED_INTERVAL: Duration = Duration::from_millis(20);

/// How long the process waits for clients to acknowledge the last bytes before it resets their connections, and how
/// long it stays after the resets.
const RESET_GRACE: Duration = Duration::from_millis(250);

/// The phase of the servers' shutdown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Connections are accepted.
    Serving,
    /// No more connections are accepted; open ones are served.
    Draining,
    /// Idle connections close; busy ones close after their response.
    Closing,
    /// Servers return even if connections are still open.
    Aborting,
}

/// Moves all servers from one phase to the next.
#[derive(Debug)]
pub struct Drain(watch::Sender<Phase>);

impl Drain {
    /// Starts in [`Phase::Serving`].
    #[expect(clippy::new_without_default, reason = "it is made once, by name")]
    pub fn new() -> Self {
        Self(watch::Sender::new(Phase::Serving))
    }

    /// The phase, as a server watches it.
    pub fn subscribe(&self) -> watch::Receiver<Phase> {
        self.0.subscribe()
    }

    /// Stops accepting connections, keeps reading requests in flight for a moment, then closes idle connections. Busy
    /// connections may still be open when it returns.
    pub async fn begin(&self, contexts: &[&ServerContext]) {
        for timeouts in all_timeouts(contexts) {
            timeouts.keep_ended_connections();
        }
        self.0.send_replace(Phase::Draining);
        // All connections are known only once the accept loops have ended. A blocked worker must not delay the drain.
        for context in contexts {
            let _ = timeout(READ_LINGER, context.connection_limit.accept_loops.closed()).await;
        }
        if contexts.iter().any(|context| context.connection_limit.open_connections() > 0) {
            tokio::time::sleep(READ_LINGER).await;
        }
        for context in contexts {
            context.timeouts.shorten_read_timeouts(OVER_LIMIT_TIMEOUT);
        }
        self.0.send_replace(Phase::Closing);
    }

    /// Returns when the clients of all ended connections have acknowledged their last bytes and their end. Until then
    /// the network namespace must exist, and the namespace of a pod or a container is removed when the process exits.
    pub async fn wait_until_acknowledged(&self, contexts: &[&ServerContext], ports: &[u16]) {
        while self.close_acknowledged(contexts, ports) > 0 {
            tokio::time::sleep(ACKNOWLEDGED_INTERVAL).await;
        }
    }

    /// Closes the ended connections whose clients have acknowledged everything, and returns how many are left. `ports`
    /// are the ports of the listeners, which identify connections that were closed before the drain.
    pub fn close_acknowledged(&self, contexts: &[&ServerContext], ports: &[u16]) -> usize {
        let sockets = UnacknowledgedSockets::read(ports);
        let kept =
            all_timeouts(contexts).map(|timeouts| timeouts.ended_connections().close_acknowledged(&sockets));
        kept.sum::<usize>() + sockets.orphans()
    }

    /// Makes every server return at once. Dropping its runtime then resets the remaining connections.
    pub fn abort(&self, contexts: &[&ServerContext]) {
        for timeouts in all_timeouts(contexts) {
            timeouts.reset_connections();
        }
        self.0.send_replace(Phase::Aborting);
    }

    /// Resets the ended connections whose clients have not acknowledged everything. Blocks the thread for up to half a
    /// second, for these resets and those of [`Drain::abort`]: a client that has lost a segment answers a reset with a
    /// challenge (RFC 5961 section 3.2), which the kernel answers only while the network namespace exists.
    pub fn reset_ended(&self, contexts: &[&ServerContext], ports: &[u16]) {
        thread::sleep(RESET_GRACE);
        if self.close_acknowledged(contexts, ports) > 0 {
            all_timeouts(contexts).for_each(|timeouts| timeouts.ended_connections().reset());
            thread::sleep(RESET_GRACE);
        }
    }
}

fn all_timeouts<'a>(contexts: &'a [&ServerContext]) -> impl Iterator<Item = &'a Timeouts> {
    contexts.iter().flat_map(|context| [&*context.timeouts, &*context.over_limit_timeouts])
}

/// Returns once `phase` is `wanted` or a later one.
pub(crate) async fn wait_for_phase(phase: &mut watch::Receiver<Phase>, wanted: Phase) {
    // An error means that the sender is gone, and with it the whole service.
    let _ = phase.wait_for(|phase| *phase >= wanted).await;
}

/// Returns the result of `poll`, whose second argument is whether [`Phase::Closing`] has begun. `poll` is called again
/// when it begins.
pub(crate) async fn poll_until_closing<T>(
    phase: &mut watch::Receiver<Phase>,
    mut poll: impl FnMut(&mut Context<'_>, bool) -> Poll<T>,
) -> T {
    let changes = phase.clone();
    let closing = async {
        if *phase.borrow() < Phase::Closing {
            wait_for_phase(phase, Phase::Closing).await;
            // A worker that was stalled learns of the phase before the requests that have arrived meanwhile, unless it
            // looks for them now.
            yield_now().await;
        }
    };
    pin!(closing);
    let (mut is_watching, mut is_closing) = (false, false);
    poll_fn(move |cx| {
        // Polling the phase for every request cost 170 instructions each. A task's waker stays the same, so once the
        // phase has the waker, it is enough to poll it again after a change.
        if !is_closing && (!is_watching || changes.has_changed().unwrap_or(true)) {
            is_watching = true;
            is_closing = closing.as_mut().poll(cx).is_ready();
        }
        poll(cx, is_closing)
    })
    .await
}
