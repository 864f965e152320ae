//! Permits for streamed responses: how many there may be at once, and how many of them one client may hold.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::access::peer::Client;

/// One client holds at most one in so many of the permits.
const SHARE: usize = 4;

/// The permits that all clients share.
#[derive(Debug)]
pub struct StreamPermits {
    limit: usize,
    held: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    by_client: HashMap<Client, usize>,
    count: usize,
}

impl StreamPermits {
    /// `limit` permits, a quarter of them for each client, but at least one.
    pub fn new(limit: usize) -> Self {
        // With its room from the start, so that it never grows on the heap of a worker (`memory.rs`).
        let by_client = HashMap::with_capacity(limit.min(1024));
        Self { limit, held: Mutex::new(Held { by_client, count: 0 }) }
    }

    /// A permit for `client`, until it is dropped; `None` when all are held, or the client's share of them.
    pub fn acquire(self: &Arc<Self>, client: Client) -> Option<StreamPermit> {
        let mut held = self.lock();
        if held.count >= self.limit {
            return None;
        }
        let own = held.by_client.entry(client).or_default();
        if *own >= (self.limit / SHARE).max(1) {
            return None;
        }
        *own += 1;
        held.count += 1;
        Some(StreamPermit { permits: Arc::clone(self), client })
    }

    fn lock(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner) // nothing that can panic is done under it
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
    fn one_client_holds_a_quarter_and_all_clients_the_whole() {
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
        assert!(permits.lock().by_client.is_empty() && permits.lock().count == 0, "nothing is left behind");
    }

    #[test]
    fn a_client_has_one_permit_however_few_there_are() {
        let permits = Arc::new(StreamPermits::new(1));
        let only = permits.acquire(Client::V4(1));
        assert!(only.is_some() && permits.acquire(Client::V4(2)).is_none());
        drop(only);
        assert!(permits.acquire(Client::V4(2)).is_some());
    }
}
