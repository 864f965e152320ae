//! The limit on connections that hold buffers beyond those of an idle one, so that clients which don't read their
//! responses, or don't finish their requests, can't exhaust memory. At the limit, the client with the most such
//! connections loses its oldest one.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;

use crate::access::peer::Client;

/// How many connections of a listener's role may hold buffers at once, as long as one client has several of them. Each
/// holds up to about 70 KiB: hyper's buffers, request headers, a chunk of a response, two TLS records, and what the
/// kernel has not sent.
pub(crate) const BUFFER_HOLDERS_MAX: usize = 128;

/// If every client has only one, the limit is this many times higher: each may simply be a client with a slow network.
const SINGLE_HOLDERS_FACTOR: usize = 8;

/// The limit that the connections of a server share.
#[derive(Debug)]
pub struct BufferLimit {
    limit: usize,
    holders: Mutex<Holders>,
}

/// The connections that hold buffers now, the oldest of each client first.
#[derive(Debug)]
struct Holders {
    by_client: HashMap<Client, VecDeque<Arc<Holder>>>,
    count: usize,
    /// The number of the next connection.
    next: u64,
}

#[derive(Debug)]
struct Holder {
    client: Client,
    /// Older connections have lower numbers.
    number: u64,
    /// Wakes its task to find that it was evicted.
    waker: Waker,
    is_evicted: AtomicBool,
}

impl BufferLimit {
    /// At most `limit` connections, and at least one.
    pub fn new(limit: usize) -> Self {
        // With its full capacity from the start, so that it never grows on the heap of a worker (`memory.rs`).
        let by_client = HashMap::with_capacity(limit);
        Self { limit: limit.max(1), holders: Mutex::new(Holders { by_client, count: 0, next: 0 }) }
    }

    fn lock(&self) -> MutexGuard<'_, Holders> {
        self.holders.lock().unwrap_or_else(PoisonError::into_inner) // no code under the lock can panic
    }
}

impl Holders {
    fn remove(&mut self, holder: &Arc<Holder>) {
        let Entry::Occupied(mut entry) = self.by_client.entry(holder.client) else { return };
        let holders = entry.get_mut();
        let Some(index) = holders.iter().position(|other| Arc::ptr_eq(other, holder)) else { return };
        holders.remove(index);
        self.count -= 1;
        if holders.is_empty() {
            entry.remove();
        }
    }

    /// If there are more than `limit`, the oldest connection of the client that has the most; among clients that have
    /// equally many, the oldest connection of all.
    fn victim(&self, limit: usize) -> Option<Arc<Holder>> {
        if self.count <= limit {
            return None;
        }
        let oldest = |holders: &VecDeque<Arc<Holder>>| holders.front().map(|holder| holder.number);
        let most = self
            .by_client
            .values()
            .max_by(|a, b| a.len().cmp(&b.len()).then_with(|| oldest(b).cmp(&oldest(a))))?;
        if most.len() == 1 && self.count <= SINGLE_HOLDERS_FACTOR * limit {
            return None;
        }
        most.front().cloned()
    }
}

/// The limit and the client that the buffers of a connection count towards.
#[derive(Debug, Clone)]
pub struct BufferAccount {
    limit: Arc<BufferLimit>,
    client: Client,
}

impl BufferAccount {
    /// Buffers of `client` under `limit`.
    pub fn new(limit: Arc<BufferLimit>, client: Client) -> Self {
        Self { limit, client }
    }

    /// Counts a connection, whose task has `waker`, until the permit is dropped. Over the limit, this connection or
    /// another one is evicted.
    pub(crate) fn hold(&self, waker: &Waker) -> BufferPermit {
        let mut holders = self.limit.lock();
        let holder = Arc::new(Holder {
            client: self.client,
            number: holders.next,
            waker: waker.clone(),
            is_evicted: AtomicBool::new(false),
        });
        holders.next += 1;
        holders.by_client.entry(self.client).or_default().push_back(Arc::clone(&holder));
        holders.count += 1;
        let evicted = holders.victim(self.limit.limit);
        if let Some(evicted) = &evicted {
            holders.remove(evicted);
        }
        drop(holders);
        if let Some(evicted) = evicted {
            evicted.is_evicted.store(true, Ordering::Relaxed);
            evicted.waker.wake_by_ref();
        }
        BufferPermit { limit: Arc::clone(&self.limit), holder }
    }
}

/// Lets a connection hold buffers until this is dropped or the connection is evicted.
#[derive(Debug)]
pub(crate) struct BufferPermit {
    limit: Arc<BufferLimit>,
    holder: Arc<Holder>,
}

impl BufferPermit {
    /// Whether the connection must be reset to free its buffers for another one.
    pub(crate) fn is_evicted(&self) -> bool {
        self.holder.is_evicted.load(Ordering::Relaxed)
    }
}

impl Drop for BufferPermit {
    fn drop(&mut self) {
        self.limit.lock().remove(&self.holder);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_client_with_most_buffers_loses_its_oldest() {
        let limit = Arc::new(BufferLimit::new(4));
        let hold = |client| BufferAccount::new(Arc::clone(&limit), Client::V4(client)).hold(Waker::noop());
        let (a, b) = ([hold(1), hold(1), hold(1)], hold(2));
        assert!(![&a[0], &a[1], &a[2], &b].iter().any(|permit| permit.is_evicted()));
        let late = hold(3);
        assert!(a[0].is_evicted() && ![&a[1], &a[2], &b, &late].iter().any(|permit| permit.is_evicted()));
        let more = hold(2);
        let evicted: Vec<_> =
            [&a[1], &a[2], &b, &more, &late].iter().map(|permit| permit.is_evicted()).collect();
        assert_eq!(
            evicted,
            [true, false, false, false, false],
            "two clients have two each: the oldest of all"
        );
        drop((a, b, late, more));
        assert!(limit.lock().by_client.is_empty() && limit.lock().count == 0, "nothing is left behind");
    }

    #[test]
    fn clients_with_one_buffer_each_have_a_higher_limit() {
        let limit = Arc::new(BufferLimit::new(4));
        let hold = |client| BufferAccount::new(Arc::clone(&limit), Client::V4(client)).hold(Waker::noop());
        let permits: Vec<_> = (0..32).map(hold).collect();
        assert!(!permits.iter().any(BufferPermit::is_evicted));
        let second = hold(7);
        assert!(permits[7].is_evicted() && !second.is_evicted(), "the client with two loses its oldest");
        let one_more = hold(32);
        assert!(permits[0].is_evicted() && !one_more.is_evicted(), "otherwise the oldest of all");
    }

    #[test]
    fn a_dropped_permit_is_free_again() {
        let limit = Arc::new(BufferLimit::new(2));
        let hold = |client| BufferAccount::new(Arc::clone(&limit), Client::V4(client)).hold(Waker::noop());
        let first = hold(1);
        for client in 2..1000 {
            assert!(!hold(client).is_evicted());
        }
        assert!(!first.is_evicted());
    }
}
