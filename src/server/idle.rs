//! Connections between two requests, and which of them closes first when all slots are taken: the one that has been idle for
//! longest.
//!
//! A request only stores two numbers. The oldest are searched for when one is needed, many at a time.

use std::collections::BinaryHeap;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

/// How many of the oldest one search finds.
const FOUND_MAX: usize = 256;

/// Searches take at most this part of the time: with every connection busy, each new one would cause a search in vain.
const SEARCH_SHARE: u32 = 10;

/// More than a search takes for each connection. What is beyond it was another thread's time, and must not keep an idle
/// connection from being found.
const SEARCH_MAX: Duration = Duration::from_nanos(200);

/// What [`Activity::idle_since`] is while a request is read or answered.
const BUSY: u64 = u64::MAX;

/// The connections that hold slots.
#[derive(Debug)]
pub struct IdleConnections {
    start: Instant,
    registry: Mutex<Registry>,
}

#[derive(Debug, Default)]
struct Registry {
    connections: Vec<Arc<Activity>>,
    /// Those that were idle for longest, and since when; the oldest last.
    oldest: Vec<(u64, Arc<Activity>)>,
    next_search: Option<Instant>,
}

/// Whether one connection is idle, and whether it has to close.
#[derive(Debug)]
pub struct Activity {
    start: Instant,
    /// Nanoseconds since the start, in a form that only compares; or [`BUSY`].
    idle_since: AtomicU64,
    is_evicted: AtomicBool,
    waker: OnceLock<Waker>,
    /// Where it is in the registry, whose lock guards this.
    index: AtomicUsize,
}

impl IdleConnections {
    /// None yet.
    #[expect(clippy::new_without_default, reason = "it is made once, by name")]
    pub fn new() -> Self {
        Self { start: Instant::now(), registry: Mutex::default() }
    }

    /// A busy connection, which no eviction finds before it is added.
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
    pub fn add(&self, activity: &Arc<Activity>) {
        let connections = &mut self.registry().connections;
        activity.index.store(connections.len(), Ordering::Relaxed);
        connections.push(Arc::clone(activity));
    }

    /// Removes a connection that was added.
    pub fn remove(&self, activity: &Activity) {
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

    /// Tells the connection that has been idle for longest to close. `false` if none is idle.
    pub fn evict(&self) -> bool {
        let mut registry = self.registry();
        let evicted = registry.oldest().or_else(|| {
            let now = Instant::now();
            if registry.next_search.is_some_and(|next| now < next) {
                return None;
            }
            registry.search(order(now - self.start));
            let count = u32::try_from(registry.connections.len()).unwrap_or(u32::MAX);
            let took = now.elapsed().min(SEARCH_MAX.saturating_mul(count));
            registry.next_search = Some(now + took * (SEARCH_SHARE - 1));
            registry.oldest()
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
        self.registry.lock().unwrap_or_else(PoisonError::into_inner) // nothing that can panic is done under it
    }
}

impl Registry {
    /// The oldest of those that were found and are idle still.
    fn oldest(&mut self) -> Option<Arc<Activity>> {
        while let Some((since, activity)) = self.oldest.pop() {
            // Whatever has become idle since the search is younger, this connection included if it was busy meanwhile.
            if activity.idle_since.load(Ordering::Relaxed) == since && !activity.is_evicted() {
                return Some(activity);
            }
        }
        None
    }

    /// Finds those that have been idle for longest at `now`.
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
        let oldest = found.into_sorted_vec().into_iter().rev();
        self.oldest = oldest.map(|(since, index)| (since, Arc::clone(&self.connections[index]))).collect();
    }
}

impl Activity {
    /// The connection waits for a request since `since`; before that it is not evicted, if it is in the future.
    pub fn set_idle(&self, since: Instant) {
        self.idle_since.store(order(since - self.start), Ordering::Relaxed);
    }

    /// The connection has read something.
    pub fn set_busy(&self) {
        self.idle_since.store(BUSY, Ordering::Relaxed);
    }

    /// Whether the connection has to close as soon as it is idle.
    pub fn is_evicted(&self) -> bool {
        self.is_evicted.load(Ordering::Relaxed)
    }

    /// Has `waker` called when that changes. The waker of a connection's task stays the same, so the first one counts.
    pub fn wake_on_eviction(&self, waker: &Waker) {
        self.waker.get_or_init(|| waker.clone());
    }
}

/// A number that compares as `time` does and costs no division.
fn order(time: Duration) -> u64 {
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
    fn the_longest_idle_is_evicted_first_and_a_busy_one_never() {
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
    fn a_connection_that_was_used_or_has_closed_since_the_search_is_passed_over() {
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
