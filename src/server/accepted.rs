//! An accepted connection, with what it holds under the limits until it closes.

use std::convert::Infallible;
use std::mem;
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
use crate::telemetry::labels::Rejection;

/// A connection from which no byte was read. Dropping it closes it and releases its slot.
#[derive(Debug)]
pub struct Accepted {
    /// Its bytes, without timeouts.
    pub stream: Stream,
    /// Its client.
    pub(crate) peer: Peer,
    pub(crate) phase: watch::Receiver<Phase>,
    pub(crate) guard: ConnectionGuard,
}

impl Accepted {
    /// Its bytes under the timeouts of its class, its client, and a guard to keep until it closes.
    pub fn into_parts(self) -> (TimeoutStream<Stream>, Peer, impl Send) {
        let timeouts = Arc::clone(self.guard.context.timeouts(self.guard.class));
        (TimeoutStream::new(self.stream, timeouts), self.peer, self.guard)
    }

    /// Spawns `task` with the connection. The task of an over-limit connection may be aborted when there are too many.
    pub(crate) fn spawn<F>(self, task: impl FnOnce(Self) -> F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let over_limit = self.guard.over_limit();
        spawn(over_limit, task(self));
    }

    /// The output of `read`, unless it takes longer than request headers may take, or more than a second once idle
    /// connections close.
    pub(crate) async fn within_head_timeout<T>(&self, read: impl Future<Output = T>) -> Option<T> {
        let read = timeout(self.guard.context.timeouts(self.guard.class).head(), read);
        pin!(read);
        let mut phase = self.phase.clone();
        tokio::select! {
            biased;
            read = read.as_mut() => read.ok(),
            () = wait_for_phase(&mut phase, Phase::Closing) => timeout(OVER_LIMIT_TIMEOUT, read).await.ok()?.ok(),
        }
    }

    /// Whether idle connections are being closed.
    pub(crate) fn is_closing(&self) -> bool {
        *self.phase.borrow() >= Phase::Closing
    }

    /// Counts the connection for `client`, the address that a proxy reported; `None` keeps it counted for its own
    /// address. Returns `false` if it must be closed, because the client has too many over-limit connections. A
    /// connection that is over its client's limit but may stay open releases its slot.
    pub(crate) fn set_client(&mut self, client: Option<IpAddr>) -> bool {
        if let Some(origin) = client.map(Origin::Ip) {
            let context = &self.guard.context;
            let Some(permit) = ClientConnectionLimit::acquire(context.client_limit.as_ref(), origin) else {
                context.metrics.count_rejection(Rejection::ClientConnections);
                return false;
            };
            if permit.is_over_limit() {
                self.guard.release_slot();
            }
            self.guard.client_permit = permit;
            self.peer.origin = origin;
        }
        self.guard.acquire_slot();
        true
    }
}

/// Spawns the task of a connection. An over-limit connection is registered with its limit, and may be aborted.
pub(crate) fn spawn(
    over_limit: Option<Arc<ConnectionLimit>>,
    task: impl Future<Output = ()> + Send + 'static,
) {
    let task = tokio::spawn(task);
    if let Some(limit) = over_limit {
        limit.register(task.abort_handle());
    }
}

/// An open connection: it is counted, and may hold a slot, until this is dropped.
#[derive(Debug)]
pub(crate) struct ConnectionGuard {
    pub(crate) context: Arc<ServerContext>,
    pub(crate) class: ConnectionClass,
    pub(crate) activity: Arc<Activity>,
    pub(crate) client_permit: ClientPermit,
    /// Keeps the server from returning.
    _alive: mpsc::Sender<Infallible>,
}

impl ConnectionGuard {
    pub(crate) fn new(
        context: Arc<ServerContext>,
        class: ConnectionClass,
        client_permit: ClientPermit,
        alive: mpsc::Sender<Infallible>,
    ) -> Self {
        if let Some(gauge) = &context.gauge {
            gauge.inc();
        }
        let idle = &context.connection_limit.idle;
        let activity = idle.activity();
        if class == ConnectionClass::Normal {
            idle.add(&activity);
        }
        Self { context, class, activity, client_permit, _alive: alive }
    }

    /// The limit that this connection is over; `None` if it holds a slot.
    pub(crate) fn over_limit(&self) -> Option<Arc<ConnectionLimit>> {
        (self.class != ConnectionClass::Normal).then(|| Arc::clone(&self.context.connection_limit))
    }

    /// Takes the slot of an idle connection, if all were taken when this one was accepted.
    fn acquire_slot(&mut self) {
        let limit = &self.context.connection_limit;
        if self.class == ConnectionClass::OverLimit && limit.acquire_slot(true) {
            self.class = ConnectionClass::Normal;
            limit.idle.add(&self.activity);
        }
    }

    /// Releases the slot, if it holds one; the connection stays open.
    fn release_slot(&mut self) {
        let limit = &self.context.connection_limit;
        if mem::replace(&mut self.class, ConnectionClass::OverClientLimit) == ConnectionClass::Normal {
            limit.idle.remove(&self.activity);
            limit.release_slot();
        }
    }
}

impl Drop for ConnectionGuard {
    fn drop(&mut self) {
        if let Some(gauge) = &self.context.gauge {
            gauge.dec();
        }
        let limit = &self.context.connection_limit;
        if self.class == ConnectionClass::Normal {
            limit.idle.remove(&self.activity);
        }
        limit.release(self.class);
    }
}
