//! The limit on connections, and how a connection counts towards it.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::{Instant, timeout_at};

use crate::server::idle::IdleConnections;
use crate::telemetry::metrics::{KeyFailure, Metrics, Rejection};

/// Connections above the limit that are still accepted, to be told 503 and to have their health answered.
pub const OVER_LIMIT_CONNECTIONS: usize = 256;

/// How long it is left in peace when even the crowd is full and others wait to be accepted.
const EVICTION_GRACE: Duration = Duration::from_millis(250);

/// Whether a connection got one of the slots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConnectionClass {
    /// It did.
    Normal,
    /// All were taken: it may ask for health and is told 503 for the rest.
    OverLimit,
    /// Its client has its share already: the same.
    OverClientLimit,
}

impl ConnectionClass {
    /// Why what a connection asks for is refused; `None` if it is not.
    pub fn failure(self) -> Option<KeyFailure> {
        match self {
            Self::Normal => None,
            Self::OverLimit => Some(KeyFailure::Connections),
            Self::OverClientLimit => Some(KeyFailure::ClientConnections),
        }
    }
}

/// The connection slots that the listeners of one role share.
#[derive(Debug)]
pub struct ConnectionLimit {
    /// Those that have one.
    seated: AtomicUsize,
    /// All connections.
    open: AtomicUsize,
    /// How many connections there ever were.
    taken: AtomicU64,
    limit: usize,
    /// How many more are accepted.
    over_limit: usize,
    freed: Notify,
    /// Those that have one, of which an idle one closes for a new connection.
    pub(crate) idle: IdleConnections,
    /// The tasks of connections without a slot, and since when they are there; the oldest first.
    crowd: Mutex<VecDeque<(Instant, AbortHandle)>>,
    /// Every accept loop holds a receiver; nothing is ever sent.
    pub(crate) accepting: watch::Sender<()>,
}

impl ConnectionLimit {
    /// Slots for `limit` connections, and `over_limit` more that get none.
    pub fn new(limit: usize, over_limit: usize) -> Self {
        Self {
            seated: AtomicUsize::new(0),
            open: AtomicUsize::new(0),
            taken: AtomicU64::new(0),
            limit,
            over_limit,
            freed: Notify::new(),
            idle: IdleConnections::new(),
            crowd: Mutex::new(VecDeque::with_capacity(2 * over_limit)),
            accepting: watch::Sender::new(()),
        }
    }

    /// Returns when a connection may be accepted: at once, unless even the crowd is full. Then its oldest has to go, and is
    /// counted in `metrics`: it was closed before its request was read.
    pub(crate) async fn ready(&self, metrics: &Metrics) {
        loop {
            let freed = self.freed.notified();
            if self.open.load(Ordering::Relaxed) < self.limit + self.over_limit {
                return;
            }
            let _ = timeout_at(self.evict(metrics), freed).await;
        }
    }

    /// Ends the oldest connection without a slot, if it had its time. Returns when to look again.
    fn evict(&self, metrics: &Metrics) -> Instant {
        let (mut crowd, now) = (self.crowd(), Instant::now());
        while crowd.front().is_some_and(|(_, task)| task.is_finished()) {
            crowd.pop_front();
        }
        match crowd.front() {
            Some((since, _)) if *since + EVICTION_GRACE > now => return *since + EVICTION_GRACE,
            Some((_, oldest)) => {
                oldest.abort();
                metrics.rejected(Rejection::Connections);
            }
            None => {}
        }
        crowd.pop_front();
        now + EVICTION_GRACE
    }

    /// Keeps at hand how to end a connection without a slot.
    pub(crate) fn register(&self, task: AbortHandle) {
        let mut crowd = self.crowd();
        if crowd.len() == crowd.capacity() {
            crowd.retain(|(_, task)| !task.is_finished());
        }
        crowd.push_back((Instant::now(), task));
    }

    fn crowd(&self) -> MutexGuard<'_, VecDeque<(Instant, AbortHandle)>> {
        self.crowd.lock().unwrap_or_else(PoisonError::into_inner) // nothing that can panic is done under it
    }

    /// Returns when there has been no connection in any of `slots` for `period`, give or take a second.
    pub async fn idle_for(slots: &[&Self], period: Duration) {
        let second = Duration::from_secs(1);
        let mut quiet = Duration::ZERO;
        let mut taken = 0;
        while quiet < period {
            tokio::time::sleep(second).await;
            let now: u64 = slots.iter().map(|slots| slots.taken.load(Ordering::Relaxed)).sum();
            let is_quiet = slots.iter().all(|slots| slots.are_empty()) && now == taken;
            quiet = if is_quiet { quiet + second } else { Duration::ZERO };
            taken = now;
        }
    }

    pub(crate) fn are_empty(&self) -> bool {
        self.open() == 0
    }

    /// How many connections there are.
    pub fn open(&self) -> usize {
        self.open.load(Ordering::Relaxed)
    }

    /// A seat for one more connection. If all slots are taken, it gets that of the connection that has been idle for longest,
    /// which closes. Over-limit connections take no slot from others: if they keep coming, they would take each one that is
    /// given back, and no client would get a key.
    pub(crate) fn acquire(&self, is_excess: bool, evicts: bool) -> ConnectionClass {
        self.taken.fetch_add(1, Ordering::Relaxed);
        self.open.fetch_add(1, Ordering::Relaxed);
        match is_excess {
            true => ConnectionClass::OverClientLimit,
            false if self.take_slot(evicts) => ConnectionClass::Normal,
            false => ConnectionClass::OverLimit,
        }
    }

    pub(crate) fn take_slot(&self, evicts: bool) -> bool {
        let is_taken =
            self.seated.fetch_add(1, Ordering::Relaxed) < self.limit || (evicts && self.idle.evict());
        if !is_taken {
            self.seated.fetch_sub(1, Ordering::Relaxed);
        }
        is_taken
    }

    pub(crate) fn release(&self, class: ConnectionClass) {
        if class == ConnectionClass::Normal {
            self.release_slot();
        }
        if self.open.fetch_sub(1, Ordering::Relaxed) >= self.limit + self.over_limit {
            self.freed.notify_waiters();
        }
    }

    /// Gives back the slot of a connection that stays open without one.
    pub(crate) fn release_slot(&self) {
        self.seated.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::context::OVER_LIMIT_TIMEOUT;
    use std::sync::Arc;
    use tokio::time::timeout;

    const OVER_LIMIT: usize = OVER_LIMIT_CONNECTIONS;

    #[test]
    fn slots_seat_up_to_the_limit_and_the_rest_is_a_crowd_that_takes_none() {
        let slots = ConnectionLimit::new(2, OVER_LIMIT);
        let class = || slots.acquire(false, true);
        assert_eq!(
            [class(), class(), class(), class()],
            [
                ConnectionClass::Normal,
                ConnectionClass::Normal,
                ConnectionClass::OverLimit,
                ConnectionClass::OverLimit
            ]
        );
        assert_eq!(slots.acquire(true, true), ConnectionClass::OverClientLimit);
        slots.release(ConnectionClass::Normal);
        assert_eq!(
            [class(), class()],
            [ConnectionClass::Normal, ConnectionClass::OverLimit],
            "whatever the crowd is"
        );
        for class in [
            ConnectionClass::OverLimit,
            ConnectionClass::OverLimit,
            ConnectionClass::OverLimit,
            ConnectionClass::OverClientLimit,
            ConnectionClass::Normal,
        ] {
            slots.release(class);
        }
        assert_eq!([class(), class()], [ConnectionClass::Normal, ConnectionClass::OverLimit]);
        slots.release(ConnectionClass::Normal);
        slots.release(ConnectionClass::OverLimit);
        assert!(!slots.are_empty());
        slots.release(ConnectionClass::Normal);
        assert!(slots.are_empty());
    }

    /// Gives back a seat when it is dropped.
    struct Seated(Arc<ConnectionLimit>, ConnectionClass);

    impl Drop for Seated {
        fn drop(&mut self) {
            self.0.release(self.1);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_oldest_of_a_full_crowd_goes_for_who_comes_and_nobody_with_a_slot() {
        let slots = Arc::new(ConnectionLimit::new(2, OVER_LIMIT));
        let sit = || {
            let seated = Seated(Arc::clone(&slots), slots.acquire(false, true));
            let is_regular = seated.1 == ConnectionClass::Normal;
            let task = tokio::spawn(async move {
                let _seated = seated;
                std::future::pending::<()>().await;
            });
            if !is_regular {
                slots.register(task.abort_handle());
            }
            task
        };
        let metrics = Metrics::new();
        let ready = || timeout(OVER_LIMIT_TIMEOUT, slots.ready(&metrics));
        let tasks: Vec<_> = (0..2 + OVER_LIMIT).map(|_| sit()).collect();
        let start = Instant::now();
        ready().await.expect("room");
        assert_eq!(start.elapsed(), EVICTION_GRACE, "it has a little time to say what it wants");
        let gone = || tasks.iter().map(tokio::task::JoinHandle::is_finished).collect::<Vec<_>>();
        assert_eq!(gone()[..4], [false, false, true, false]);
        // The others had as much.
        for count in 1..=3 * OVER_LIMIT {
            sit();
            ready().await.expect("room");
            assert_eq!(
                start.elapsed(),
                EVICTION_GRACE * u32::try_from(1 + count / OVER_LIMIT).unwrap(),
                "{count}"
            );
        }
        assert_eq!(gone().iter().filter(|is_gone| !**is_gone).count(), 2);
        assert!(slots.crowd().len() < 4 * OVER_LIMIT, "those that are gone are not kept");
    }
}
