//! Idle connections. When all slots are taken, the one that has been idle for longest closes for a new connection.
//!
//! A request only stores two numbers. When an idle connection is needed, one search finds many of the longest idle
//! ones.

use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

/// How many connections one search finds.
const FOUND_MAX: usize = 256;

/// Searches take at most one part in this many of the time. Without this limit, each new connection would cause a
/// useless search while all others are busy.
const SEARCH_INTERVAL_FACTOR: u32 = 10;

/// The most that a search needs for each connection. Time beyond that went to another thread, and must not delay the
/// next search.
const SEARCH_MAX: Duration = Duration::from_nanos(200);

/// [`Activity::idle_since`] while a request is read or answered.
const BUSY: u64 = u64::MAX;

/// The connections with a slot.
#[derive(Debug)]
pub struct IdleConnections {
    start: Instant,
    registry: Mutex<Registry>,
}

#[derive(Debug, Default)]
struct Registry {
    connections: Vec<Arc<Activity>>,
    /// The connections that the last search found and when they became idle, the longest idle last.
    candidates: Vec<(u64, Arc<Activity>)>,
    next_search: Option<Instant>,
}

/// Whether a connection is idle, and whether it must close.
#[derive(Debug)]
pub struct Activity {
    start: Instant,
    /// A [`sort_key`] of the time since the start, or [`BUSY`].
    idle_since: AtomicU64,
    is_evicted: AtomicBool,
    waker: OnceLock<Waker>,
    /// Its index in the registry. The registry's lock guards this.
    index: AtomicUsize,
}

impl IdleConnections {
    /// No connections yet.
    #[expect(clippy::new_without_default, reason = "it is made once, by name")]
    pub fn new() -> Self {
        Self { start: Instant::now(), registry: Mutex::default() }
    }

    /// The activity of a busy connection. It is not evicted before it is added.
    pub fn activity(&self) -> Arc<Activity> {
        Arc::new(Activity {
            start: self.start,
            idle_since: AtomicU64::new(BUSY),
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
            let now = Instant::now();
            if registry.next_search.is_some_and(|next| now < next) {
                return None;
            }
            registry.search(sort_key(now - self.start));
            let count = u32::try_from(registry.connections.len()).unwrap_or(u32::MAX);
            let took = now.elapsed().min(SEARCH_MAX.saturating_mul(count));
            registry.next_search = Some(now + took * (SEARCH_INTERVAL_FACTOR - 1));
            registry.longest_idle()
        });
        let Some(evicted) = evicted else {
            return false;
        };
        evicted.is_evicted.store(true, Ordering::Relaxed);
        if let Some(waker) = evicted.waker.get() {
            waker.wake_by_ref();
        }
        true
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
    fn search(&mut self, now: u64) {
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
        self.candidates =
            longest_last.map(|(since, index)| (since, Arc::clone(&self.connections[index]))).collect();
    }
}

impl Activity {
    /// The connection has been waiting for a request since `since`. If that is in the future, it is not evicted before.
    pub(crate) fn set_idle(&self, since: Instant) {
        self.idle_since.store(sort_key(since - self.start), Ordering::Relaxed);
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

/// A number that compares as `time` does, without a division.
fn sort_key(time: Duration) -> u64 {
    time.as_secs() << 32 | u64::from(time.subsec_nanos())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn idle(connections: &IdleConnections, since: Instant) -> Arc<Activity> {
        let activity = connections.activity();
        connections.add(&activity);
        activity.set_idle(since);
        activity
    }

    #[test]
    fn the_longest_idle_connection_is_evicted_and_a_busy_one_never() {
        let connections = IdleConnections::new();
        let at = |millis| connections.start + Duration::from_millis(millis);
        std::thread::sleep(Duration::from_millis(6)); // the times below have passed
        let [third, first, second, busy] = [3, 1, 2, 0].map(|millis| idle(&connections, at(millis)));
        busy.set_busy();
        let later = idle(&connections, Instant::now() + Duration::from_secs(60));
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
        let connections = IdleConnections::new();
        let start = connections.start;
        let [first, used, closed, last] =
            [1, 2, 3, 4].map(|n| idle(&connections, start + Duration::from_nanos(n)));
        assert!(connections.evict());
        used.set_busy();
        used.set_idle(Instant::now());
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
