//! Idle connections. When all slots are taken, the one that has been idle for longest closes for a new connection.
//!
//! A request only stores two numbers. When an idle connection is needed, one search finds many of the longest idle
//! ones.

use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::Waker;

use crate::telemetry::clock::{self, Nanos};

/// How many connections one search finds.
const FOUND_MAX: usize = 256;

/// Searches take at most one part in this many of the time. Without this limit, each new connection would cause a
/// useless search while all others are busy.
const SEARCH_INTERVAL_FACTOR: Nanos = 10;

/// The most that a search needs for each connection. Time beyond that went to another thread, and must not delay the
/// next search.
const SEARCH_MAX: Nanos = 200;

/// [`Activity::idle_since`] while a request is read or answered.
const BUSY: Nanos = Nanos::MAX;

/// The connections with a slot.
#[derive(Debug)]
pub struct IdleConnections {
    registry: Mutex<Registry>,
}

#[derive(Debug)]
struct Registry {
    connections: Vec<Arc<Activity>>,
    /// The connections that the last search found and when they became idle, the longest idle last.
    candidates: Vec<(Nanos, Arc<Activity>)>,
    next_search: Nanos,
}

/// Whether a connection is idle, and whether it must close.
#[derive(Debug)]
pub struct Activity {
    /// When the connection became idle, or [`BUSY`].
    idle_since: AtomicI64,
    is_evicted: AtomicBool,
    waker: OnceLock<Waker>,
    /// Its index in the registry. The registry's lock guards this.
    index: AtomicUsize,
}

impl IdleConnections {
    /// For about `count` connections at once.
    pub fn new(count: usize) -> Self {
        // With their full capacity from the start, so that they never grow on the heap of a worker (`memory.rs`).
        let (connections, candidates) =
            (Vec::with_capacity(count + FOUND_MAX), Vec::with_capacity(FOUND_MAX));
        Self { registry: Mutex::new(Registry { connections, candidates, next_search: 0 }) }
    }

    /// The activity of a busy connection. It is not evicted before it is added.
    pub fn activity(&self) -> Arc<Activity> {
        Arc::new(Activity {
            idle_since: AtomicI64::new(BUSY),
            is_evicted: AtomicBool::new(false),
            waker: OnceLock::new(),
            index: AtomicUsize::new(0),
        })
    }

    /// Adds a connection that may be evicted; [`IdleConnections::remove`] has to follow.
    pub(crate) fn add(&self, activity: &Arc<Activity>) {
        let connections = &mut self.registry().connections;
        activity.index.store(connections.len(), Ordering::Relaxed);
        connections.push(Arc::clone(activity));
    }

    /// Removes a connection that was added. It counts as busy from then on.
    pub(crate) fn remove(&self, activity: &Activity) {
        activity.set_busy();
        let connections = &mut self.registry().connections;
        let index = activity.index.load(Ordering::Relaxed);
        if index < connections.len() {
            connections.swap_remove(index);
        }
        if let Some(moved) = connections.get(index) {
            moved.index.store(index, Ordering::Relaxed);
        }
    }

    /// Makes the longest idle connection close. Returns `false` if none is idle.
    pub(crate) fn evict(&self) -> bool {
        let mut registry = self.registry();
        let evicted = registry.longest_idle().or_else(|| {
            let now = clock::now();
            if now < registry.next_search {
                return None;
            }
            registry.search(now);
            let took = (clock::now() - now).min(SEARCH_MAX * registry.connections.len() as Nanos);
            registry.next_search = now + took * (SEARCH_INTERVAL_FACTOR - 1);
            registry.longest_idle()
        });
        let Some(evicted) = evicted else { return false };
        evicted.is_evicted.store(true, Ordering::Relaxed);
        if let Some(waker) = evicted.waker.get() {
            waker.wake_by_ref();
        }
        true
    }

    /// Forgets what the last search found: a closed connection that it found keeps the memory of its task.
    pub(crate) fn forget_candidates(&self) {
        self.registry().candidates.clear();
    }

    fn registry(&self) -> std::sync::MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner) // no code under the lock can panic
    }
}

impl Registry {
    /// The longest idle candidate that is still idle.
    fn longest_idle(&mut self) -> Option<Arc<Activity>> {
        while let Some((since, activity)) = self.candidates.pop() {
            // A connection that has been busy since the search is not among the longest idle any more.
            if activity.idle_since.load(Ordering::Relaxed) == since && !activity.is_evicted() {
                return Some(activity);
            }
        }
        None
    }

    /// Finds the connections that have been idle for longest at `now`.
    fn search(&mut self, now: Nanos) {
        let mut found = BinaryHeap::with_capacity(FOUND_MAX + 1);
        for (index, activity) in self.connections.iter().enumerate() {
            let since = activity.idle_since.load(Ordering::Relaxed);
            if since <= now && !activity.is_evicted() {
                found.push((since, index));
                if found.len() > FOUND_MAX {
                    found.pop();
                }
            }
        }
        let longest_last = found.into_sorted_vec().into_iter().rev();
        self.candidates.clear();
        let found = longest_last.map(|(since, index)| (since, Arc::clone(&self.connections[index])));
        self.candidates.extend(found);
    }
}

impl Activity {
    /// The connection has been waiting for a request since `since`. If that is in the future, it is not evicted before.
    pub(crate) fn set_idle(&self, since: Nanos) {
        self.idle_since.store(since, Ordering::Relaxed);
    }

    /// The connection has read something.
    pub(crate) fn set_busy(&self) {
        self.idle_since.store(BUSY, Ordering::Relaxed);
    }

    /// Whether the connection must close as soon as it is idle.
    pub(crate) fn is_evicted(&self) -> bool {
        self.is_evicted.load(Ordering::Relaxed)
    }

    /// Calls `waker` on eviction. A task's waker stays the same, so only the first one is kept.
    pub(crate) fn wake_on_eviction(&self, waker: &Waker) {
        self.waker.get_or_init(|| waker.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::clock::SECOND;

    fn idle(connections: &IdleConnections, since: Nanos) -> Arc<Activity> {
        let activity = connections.activity();
        connections.add(&activity);
        activity.set_idle(since);
        activity
    }

    #[test]
    fn the_longest_idle_connection_is_evicted_and_a_busy_one_never() {
        let connections = IdleConnections::new(8);
        let now = clock::now();
        let [third, first, second, busy] = [3, 5, 4, 6].map(|ago| idle(&connections, now - ago));
        busy.set_busy();
        let later = idle(&connections, clock::now() + 60 * SECOND);
        let evicted = || [&first, &second, &third].map(|activity| activity.is_evicted());
        for expected in [[true, false, false], [true, true, false], [true, true, true]] {
            assert!(connections.evict());
            assert_eq!(evicted(), expected);
        }
        assert!(!connections.evict(), "one is busy, and one is not idle yet");
        assert!(!busy.is_evicted() && !later.is_evicted());
    }

    #[test]
    fn a_connection_used_or_closed_since_the_search_is_skipped() {
        let connections = IdleConnections::new(8);
        let [first, used, closed, last] = [4, 3, 2, 1].map(|ago| idle(&connections, clock::now() - ago));
        assert!(connections.evict());
        used.set_busy();
        used.set_idle(clock::now());
        connections.remove(&closed);
        assert!(connections.evict());
        assert!(first.is_evicted() && last.is_evicted() && !used.is_evicted() && !closed.is_evicted());
        for activity in [&first, &used, &last] {
            connections.remove(activity);
        }
        assert!(connections.registry().connections.is_empty());
        assert!(!connections.evict());
    }
}
