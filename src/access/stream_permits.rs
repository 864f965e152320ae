//! Permits for streamed responses: they limit how many are sent at once, in total and to one client.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::access::peer::Client;

/// One client holds at most this fraction of the permits: a quarter.
const CLIENT_DIVISOR: usize = 4;

/// The permits of all clients.
#[derive(Debug)]
pub(crate) struct StreamPermits {
    limit: usize,
    held: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    by_client: HashMap<Client, usize>,
    count: usize,
}

impl StreamPermits {
    /// `limit` permits. One client may hold a quarter of them, and always at least one.
    pub(crate) fn new(limit: usize) -> Self {
        // Allocated now, so that it never grows on the heap of a worker thread (`server/memory.rs`).
        let by_client = HashMap::with_capacity(limit.min(1024));
        Self { limit, held: Mutex::new(Held { by_client, count: 0 }) }
    }

    /// Acquires a permit for `client`; dropping it releases it. `None` if all permits are held, or all that one client
    /// may hold.
    pub(crate) fn acquire(self: &Arc<Self>, client: Client) -> Option<StreamPermit> {
        let mut held = self.lock();
        if held.count >= self.limit {
            return None;
        }
        let own = held.by_client.entry(client).or_default();
        if *own >= (self.limit / CLIENT_DIVISOR).max(1) {
            return None;
        }
        *own += 1;
        held.count += 1;
        Some(StreamPermit { permits: Arc::clone(self), client })
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner) // no code under the lock can panic
    }
}

/// The right to send one streamed response.
#[derive(Debug)]
pub struct StreamPermit {
    permits: Arc<StreamPermits>,
    client: Client,
}

impl Drop for StreamPermit {
    fn drop(&mut self) {
        let mut held = self.permits.lock();
        held.count -= 1;
        if let Entry::Occupied(mut own) = held.by_client.entry(self.client) {
            *own.get_mut() -= 1;
            if *own.get() == 0 {
                own.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_holds_at_most_a_quarter_of_the_permits() {
        let permits = Arc::new(StreamPermits::new(8));
        let acquire = |client| permits.acquire(Client::V4(client));
        let mut held: Vec<_> = [1, 1, 2, 2, 3, 3].map(|client| acquire(client).unwrap()).into();
        assert!(acquire(1).is_none() && acquire(2).is_none(), "two are a quarter of eight");
        held.extend([acquire(4).unwrap(), acquire(4).unwrap()]);
        assert!(acquire(5).is_none(), "all are held");
        held.remove(0);
        assert!(acquire(2).is_none());
        assert!(acquire(5).is_some() && acquire(1).is_some());
        drop(held);
        assert!(permits.lock().by_client.is_empty() && permits.lock().count == 0, "no entry is left behind");
    }

    #[test]
    fn a_client_may_hold_one_permit_if_there_is_only_one() {
        let permits = Arc::new(StreamPermits::new(1));
        let only = permits.acquire(Client::V4(1));
        assert!(only.is_some() && permits.acquire(Client::V4(2)).is_none());
        drop(only);
        assert!(permits.acquire(Client::V4(2)).is_some());
    }
}
