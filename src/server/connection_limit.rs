//! The limit on open connections, and the class of a connection under it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout_at};

use crate::server::idle::IdleConnections;
use crate::telemetry::labels::{KeyRequestError, Rejection};
use crate::telemetry::metrics::Metrics;

/// Connections above the limit that are still accepted, to return 503 and to answer health checks.
pub const OVER_LIMIT_CONNECTIONS: usize = 256;

/// How long an over-limit connection is kept when no more are accepted and other clients wait.
const EVICTION_GRACE: Duration = Duration::from_millis(250);

/// Whether a connection holds a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionClass {
    /// It holds a slot.
    Normal,
    /// All slots are taken: it gets responses to health checks, and 503 to the rest.
    OverLimit,
    /// Its client has as many connections as it may have: it gets the same responses.
    OverClientLimit,
}

impl ConnectionClass {
    /// Why requests for keys fail on such a connection; `None` if they don't.
    pub fn failure(self) -> Option<KeyRequestError> {
        match self {
            Self::Normal => None,
            Self::OverLimit => Some(KeyRequestError::Connections),
            Self::OverClientLimit => Some(KeyRequestError::ClientConnections),
        }
    }
}

/// The connection slots that the listeners of one role share.
#[derive(Debug)]
pub struct ConnectionLimit {
    /// How many slots are taken.
    slots_taken: AtomicUsize,
    /// How many connections are open, with a slot or without.
    open: AtomicUsize,
    /// How many connections were ever accepted.
    accepted: AtomicU64,
    limit: usize,
    /// How many connections without a slot are accepted.
    over_limit: usize,
    /// Notified when a connection closes while no more could be accepted.
    closed: Notify,
    /// Connections with a slot. The longest idle one closes for a new connection.
    pub(crate) idle: IdleConnections,
    /// The tasks of connections without a slot and when they started, the oldest first.
    over_limit_tasks: Mutex<VecDeque<(Instant, AbortHandle)>>,
    /// Every accept loop holds a receiver; nothing is ever sent.
    pub(crate) accept_loops: watch::Sender<()>,
}

impl ConnectionLimit {
    /// Slots for `limit` connections; `over_limit` more are accepted without one.
    pub fn new(limit: usize, over_limit: usize) -> Self {
        Self {
            slots_taken: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            accepted: AtomicU64::new(0),
            limit,
            over_limit,
            closed: Notify::new(),
            idle: IdleConnections::new(limit),
            over_limit_tasks: Mutex::new(VecDeque::with_capacity(2 * over_limit)),
            accept_loops: watch::Sender::new(()),
        }
    }

    /// How many connections are open.
    pub fn open_connections(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// Returns when no connection has been open under any of `limits` for `period`, give or take a second.
    pub async fn idle_for(limits: &[&Self], period: Duration) {
        let second = Duration::from_secs(1);
        let mut idle = Duration::ZERO;
        let mut accepted = 0;
        while idle < period {
            tokio::time::sleep(second).await;
            let now: u64 = limits.iter().map(|limit| limit.accepted.load(Ordering::Relaxed)).sum();
            let is_idle = limits.iter().all(|limit| limit.open_connections() == 0) && now == accepted;
            idle = if is_idle { idle + second } else { Duration::ZERO };
            accepted = now;
        }
    }

    /// Returns when a connection may be accepted: at once, unless `over_limit` connections have no slot. Then the
    /// oldest of those is closed, and counted in `metrics` as rejected: its request was not read.
    pub(crate) async fn ready(&self, metrics: &Metrics) {
        loop {
            let closed = self.closed.notified();
            if self.open_connections() < self.limit + self.over_limit {
                return;
            }
            let _ = timeout_at(self.evict_over_limit(metrics), closed).await;
        }
    }

    /// Closes the oldest connection without a slot, if its grace is over. Returns when to try again.
    fn evict_over_limit(&self, metrics: &Metrics) -> Instant {
        let (mut tasks, now) = (self.over_limit_tasks(), Instant::now());
        while tasks.front().is_some_and(|(_, task)| task.is_finished()) {
            tasks.pop_front();
        }
        match tasks.front() {
            Some((since, _)) if *since + EVICTION_GRACE > now => return *since + EVICTION_GRACE,
            Some((_, oldest)) => {
                oldest.abort();
                metrics.count_rejection(Rejection::Connections);
            }
            None => {}
        }
        tasks.pop_front();
        now + EVICTION_GRACE
    }

    /// Registers the task of a connection without a slot, to be aborted when there are too many.
    pub(crate) fn register(&self, task: AbortHandle) {
        let mut tasks = self.over_limit_tasks();
        if tasks.len() == tasks.capacity() {
            tasks.retain(|(_, task)| !task.is_finished());
        }
        tasks.push_back((Instant::now(), task));
    }

    fn over_limit_tasks(&self) -> MutexGuard<'_, VecDeque<(Instant, AbortHandle)>> {
        // No code under the lock can panic.
        self.over_limit_tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a connection as open and returns its class; [`ConnectionLimit::release`] has to follow. If all slots are
    /// taken and `evicts` is true, it gets the slot of the longest idle connection, which closes.
    ///
    /// Connections over their client's limit take no slot: a client that keeps connecting would take each one that is
    /// released, and no other client would get a key.
    pub(crate) fn acquire(&self, is_over_client_limit: bool, evicts: bool) -> ConnectionClass {
        self.accepted.fetch_add(1, Ordering::Relaxed);
        self.open.fetch_add(1, Ordering::Relaxed);
        match is_over_client_limit {
            true => ConnectionClass::OverClientLimit,
            false if self.acquire_slot(evicts) => ConnectionClass::Normal,
            false => ConnectionClass::OverLimit,
        }
    }

    /// Takes a slot for an open connection. Returns `false` if there is none.
    pub(crate) fn acquire_slot(&self, evicts: bool) -> bool {
        let is_free = self.slots_taken.fetch_add(1, Ordering::Relaxed) < self.limit;
        let has_slot = is_free || (evicts && self.idle.evict());
        if !has_slot {
            self.release_slot();
        }
        has_slot
    }

    /// Counts a connection of `class` as closed.
    pub(crate) fn release(&self, class: ConnectionClass) {
        if class == ConnectionClass::Normal {
            self.release_slot();
        }
        if self.open.fetch_sub(1, Ordering::Relaxed) >= self.limit + self.over_limit {
            self.closed.notify_waiters();
        }
    }

    /// Releases the slot of a connection that stays open without one.
    pub(crate) fn release_slot(&self) {
        self.slots_taken.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use tokio::time::timeout;

    use crate::server::context::OVER_LIMIT_TIMEOUT;

    const OVER_LIMIT: usize = OVER_LIMIT_CONNECTIONS;

    #[test]
    fn over_limit_connections_take_no_slot() {
        let limit = ConnectionLimit::new(2, OVER_LIMIT);
        let acquire = || limit.acquire(false, true);
        assert_eq!(
            [acquire(), acquire(), acquire(), acquire()],
            [
                ConnectionClass::Normal,
                ConnectionClass::Normal,
                ConnectionClass::OverLimit,
                ConnectionClass::OverLimit
            ]
        );
        assert_eq!(limit.acquire(true, true), ConnectionClass::OverClientLimit);
        limit.release(ConnectionClass::Normal);
        assert_eq!(
            [acquire(), acquire()],
            [ConnectionClass::Normal, ConnectionClass::OverLimit],
            "a released slot is free, however many connections are over the limit"
        );
        for class in [
            ConnectionClass::OverLimit,
            ConnectionClass::OverLimit,
            ConnectionClass::OverLimit,
            ConnectionClass::OverClientLimit,
            ConnectionClass::Normal,
        ] {
            limit.release(class);
        }
        assert_eq!([acquire(), acquire()], [ConnectionClass::Normal, ConnectionClass::OverLimit]);
        limit.release(ConnectionClass::Normal);
        limit.release(ConnectionClass::OverLimit);
        assert_ne!(limit.open_connections(), 0);
        limit.release(ConnectionClass::Normal);
        assert_eq!(limit.open_connections(), 0);
    }

    /// An open connection, released when it is dropped.
    struct Open(Arc<ConnectionLimit>, ConnectionClass);

    impl Drop for Open {
        fn drop(&mut self) {
            self.0.release(self.1);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_over_limit_connection_is_evicted_for_a_new_one() {
        let limit = Arc::new(ConnectionLimit::new(2, OVER_LIMIT));
        let connect = || {
            let open = Open(Arc::clone(&limit), limit.acquire(false, true));
            let is_normal = open.1 == ConnectionClass::Normal;
            let task = tokio::spawn(async move {
                let _open = open;
                std::future::pending::<()>().await;
            });
            if !is_normal {
                limit.register(task.abort_handle());
            }
            task
        };
        let metrics = Metrics::new();
        let ready = || timeout(OVER_LIMIT_TIMEOUT, limit.ready(&metrics));
        let tasks: Vec<_> = (0..2 + OVER_LIMIT).map(|_| connect()).collect();
        let start = Instant::now();
        ready().await.expect("an eviction");
        assert_eq!(start.elapsed(), EVICTION_GRACE, "the client had time to send its request");
        let finished = || tasks.iter().map(tokio::task::JoinHandle::is_finished).collect::<Vec<_>>();
        assert_eq!(finished()[..4], [false, false, true, false], "connections with a slot stay");
        // The other clients had as much time.
        for count in 1..=3 * OVER_LIMIT {
            connect();
            ready().await.expect("an eviction");
            assert_eq!(
                start.elapsed(),
                EVICTION_GRACE * u32::try_from(1 + count / OVER_LIMIT).unwrap(),
                "{count}"
            );
        }
        assert_eq!(finished().iter().filter(|is_finished| !**is_finished).count(), 2);
        assert!(limit.over_limit_tasks().len() < 4 * OVER_LIMIT, "finished tasks are removed");
    }
}
