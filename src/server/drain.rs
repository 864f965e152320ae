//! The shutdown of the servers, phase by phase.

use std::future::poll_fn;
use std::task::{Context, Poll};
use std::thread;
use std::time::Duration;

use tokio::pin;
use tokio::sync::watch;
use tokio::time::timeout;

use crate::server::context::{OVER_LIMIT_TIMEOUT, ServerContext};
use crate::server::timeouts::Timeouts;
use crate::server::unacknowledged::UnacknowledgedSockets;

/// How long open connections are still read from after the drain began, so that a request which is on its way gets its
/// answer instead of a reset.
const READ_LINGER: Duration = Duration::from_millis(250);

/// How often the kernel is asked whether clients have acknowledged the last bytes and the end of their connections.
const ACKNOWLEDGED_INTERVAL: Duration = Duration::from_millis(20);

/// How long the process stays for clients that were reset, and for the acknowledgement of what was sent last.
const RESET_GRACE: Duration = Duration::from_millis(250);

/// How far a server is on its way to the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Accepting.
    Serving,
    /// Accepting no more; open connections are served.
    Draining,
    /// Idle connections close, busy ones after their answer.
    Closing,
    /// Servers return, whatever is still open.
    Aborting,
}

/// Moves all servers from one phase to the next.
#[derive(Debug)]
pub struct Drain(watch::Sender<Phase>);

impl Drain {
    /// Everything serves.
    #[expect(clippy::new_without_default, reason = "it is made once, by name")]
    pub fn new() -> Self {
        Self(watch::Sender::new(Phase::Serving))
    }

    /// A view for a server.
    pub fn watch(&self) -> watch::Receiver<Phase> {
        self.0.subscribe()
    }

    /// Stops accepting; after a moment in which requests on their way are still read, lets idle connections go.
    /// Returns then; busy connections may still be there.
    pub async fn begin(&self, context: &[&ServerContext]) {
        for timeouts in all_timeouts(context) {
            timeouts.keep_ended_connections();
        }
        self.0.send_replace(Phase::Draining);
        // Only then is it known who is here. A worker that is blocked is not waited for.
        for context in context {
            let _ = timeout(READ_LINGER, context.slots.accepting.closed()).await;
        }
        if context.iter().any(|context| !context.slots.are_empty()) {
            tokio::time::sleep(READ_LINGER).await;
        }
        for context in context {
            context.timeouts.shorten_reads(OVER_LIMIT_TIMEOUT);
        }
        self.0.send_replace(Phase::Closing);
    }

    /// Returns when the clients of all connections that have ended have acknowledged their last bytes and their end. Until
    /// then the network that these are sent through has to stay, and in a pod or a container it goes away with the process.
    pub async fn acknowledged(&self, context: &[&ServerContext], ports: &[u16]) {
        while self.close_acknowledged(context, ports) > 0 {
            tokio::time::sleep(ACKNOWLEDGED_INTERVAL).await;
        }
    }

    /// Closes the ended connections whose clients have all of them, and returns how many others there are. `ports` are
    /// those of the listeners: connections that were closed before the drain are found by them.
    pub fn close_acknowledged(&self, context: &[&ServerContext], ports: &[u16]) -> usize {
        let sockets = UnacknowledgedSockets::look(ports);
        let kept =
            all_timeouts(context).map(|timeouts| timeouts.ended_connections().close_acknowledged(&sockets));
        kept.sum::<usize>() + sockets.orphans()
    }

    /// Makes every server return at once. Its runtime is to be dropped then, which resets the connections that are left.
    pub fn abort(&self, context: &[&ServerContext]) {
        for timeouts in all_timeouts(context) {
            timeouts.reset_connections();
        }
        self.0.send_replace(Phase::Aborting);
    }

    /// Resets the ended connections whose clients don't have all of them. Returns once those that were reset, and those
    /// that [`Drain::abort`] reset, have had a moment: a client that has lost a segment answers a reset by a question (RFC
    /// 5961 section 3.2), which the kernel answers only while the network is there.
    pub fn reset_ended(&self, context: &[&ServerContext], ports: &[u16]) {
        thread::sleep(RESET_GRACE);
        if self.close_acknowledged(context, ports) > 0 {
            all_timeouts(context).for_each(|timeouts| timeouts.ended_connections().reset());
            thread::sleep(RESET_GRACE);
        }
    }
}

fn all_timeouts<'a>(context: &'a [&ServerContext]) -> impl Iterator<Item = &'a Timeouts> {
    context.iter().flat_map(|context| [&*context.timeouts, &*context.over_limit_timeouts])
}

pub(crate) async fn wait_for_phase(phase: &mut watch::Receiver<Phase>, wanted: Phase) {
    // An error says that whoever leads the phases is gone, and with it the whole service.
    let _ = phase.wait_for(|phase| *phase >= wanted).await;
}

/// What `poll` gives, which is told whether the drain is at its end, and polled when it is.
pub(crate) async fn poll_until_closing<T>(
    phase: &mut watch::Receiver<Phase>,
    mut poll: impl FnMut(&mut Context<'_>, bool) -> Poll<T>,
) -> T {
    let changes = phase.clone();
    let closing = wait_for_phase(phase, Phase::Closing);
    pin!(closing);
    let (mut is_watching, mut is_closing) = (false, false);
    poll_fn(move |cx| {
        // Polled for every request, the phase took 170 instructions of each. A task's waker stays the same, so once it
        // is left there, it is enough to look again after a change.
        if !is_closing && (!is_watching || changes.has_changed().unwrap_or(true)) {
            is_watching = true;
            is_closing = closing.as_mut().poll(cx).is_ready();
        }
        poll(cx, is_closing)
    })
    .await
}
