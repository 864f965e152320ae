//! A connection that was accepted, and its place under the limits.

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;

use tokio::pin;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

use crate::access::peer::{Origin, Peer};
use crate::server::client_limit::{ClientConnectionLimit, ClientPermit};
use crate::server::connection_limit::{ConnectionClass, ConnectionLimit};
use crate::server::context::{OVER_LIMIT_TIMEOUT, ServerContext};
use crate::server::drain::{Phase, wait_for_phase};
use crate::server::idle::Activity;
use crate::server::stream::Stream;
use crate::server::timeout_stream::TimeoutStream;
use crate::telemetry::metrics::Rejection;

/// A connection that was accepted, with all that it is held to. Dropping it gives back its slot.
#[derive(Debug)]
pub struct Accepted {
    /// Its bytes.
    pub stream: Stream,
    /// Who is at the other end.
    pub peer: Peer,
    pub(crate) phase: watch::Receiver<Phase>,
    pub(crate) guard: ConnectionGuard,
}

impl Accepted {
    /// Its bytes under the deadlines of its seat, who is at the other end, and what has to be kept until its end.
    pub fn open(self) -> (TimeoutStream<Stream>, Peer, impl Send) {
        let timeouts = Arc::clone(self.guard.context.timeouts(self.guard.class));
        (TimeoutStream::new(self.stream, timeouts), self.peer, self.guard)
    }

    /// Runs `task` with it. A task of a connection without a slot is ended early when even those are too many.
    pub fn spawn<F>(self, task: impl FnOnce(Self) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let over_limit = self.guard.over_limit();
        spawn(over_limit, task(self));
    }

    /// What `read` gives, if that takes no longer than a request header may, and no longer than a second once idle
    /// connections close.
    pub async fn within_head_timeout<T>(&self, read: impl Future<Output = T>) -> Option<T> {
        let read = timeout(self.guard.context.timeouts(self.guard.class).head(), read);
        pin!(read);
        let mut phase = self.phase.clone();
        tokio::select! {
            biased;
            read = read.as_mut() => read.ok(),
            () = wait_for_phase(&mut phase, Phase::Closing) => timeout(OVER_LIMIT_TIMEOUT, read).await.ok()?.ok(),
        }
    }

    /// Whether idle connections close by now.
    pub fn is_closing(&self) -> bool {
        *self.phase.borrow() >= Phase::Closing
    }

    /// Counts it from now on for `client`, whom a proxy named, or still for its own address. Returns whether the client may
    /// have it: a connection over its limit gives back its slot, and is one that gets a 503; beyond those it must be closed.
    pub fn identified(&mut self, client: Option<IpAddr>) -> bool {
        if let Some(origin) = client.map(Origin::Ip) {
            let context = &self.guard.context;
            let Some(share) = ClientConnectionLimit::take(context.client_limit.as_ref(), origin) else {
                context.metrics.rejected(Rejection::ClientConnections);
                return false;
            };
            if share.is_excess() {
                self.guard.give_up_slot();
            }
            self.guard.share = share;
            self.peer.origin = origin;
        }
        self.guard.ask_for_slot();
        true
    }
}

/// Runs the task of a connection. Without a slot among those of `over_limit`, it ends early when even such are too many.
pub(crate) fn spawn(
    over_limit: Option<Arc<ConnectionLimit>>,
    task: impl Future<Output = ()> + Send + 'static,
) {
    let task = tokio::spawn(task);
    if let Some(slots) = over_limit {
        slots.register(task.abort_handle());
    }
}

/// An open connection: leaving gives back its slot.
#[derive(Debug)]
pub(crate) struct ConnectionGuard {
    pub(crate) context: Arc<ServerContext>,
    /// Whether it got a slot.
    pub(crate) class: ConnectionClass,
    /// Whether it is idle.
    pub(crate) activity: Arc<Activity>,
    _alive: mpsc::Sender<Infallible>,
    pub(crate) share: ClientPermit,
}

impl ConnectionGuard {
    pub(crate) fn new(
        context: Arc<ServerContext>,
        class: ConnectionClass,
        alive: mpsc::Sender<Infallible>,
        share: ClientPermit,
    ) -> Self {
        if let Some(gauge) = &context.gauge {
            gauge.inc();
        }
        let activity = context.slots.idle.activity();
        if class == ConnectionClass::Normal {
            context.slots.idle.add(&activity);
        }
        Self { context, class, activity, _alive: alive, share }
    }

    /// The slots of which it has none; `None` if it has one.
    pub(crate) fn over_limit(&self) -> Option<Arc<ConnectionLimit>> {
        (self.class != ConnectionClass::Normal).then(|| Arc::clone(&self.context.slots))
    }

    /// Takes the slot of an idle connection, if all were taken when this one was accepted.
    fn ask_for_slot(&mut self) {
        if self.class == ConnectionClass::OverLimit && self.context.slots.take_slot(true) {
            self.class = ConnectionClass::Normal;
            self.context.slots.idle.add(&self.activity);
        }
    }

    /// Gives back the slot of a connection that stays open without one.
    fn give_up_slot(&mut self) {
        if std::mem::replace(&mut self.class, ConnectionClass::OverClientLimit) == ConnectionClass::Normal {
            self.context.slots.idle.remove(&self.activity);
            self.context.slots.release_slot();
        }
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        if let Some(gauge) = &self.context.gauge {
            gauge.dec();
        }
        if self.class == ConnectionClass::Normal {
            self.context.slots.idle.remove(&self.activity);
        }
        self.context.slots.release(self.class);
    }
}
