//! How many connections one client may have, so that it can't take all of them.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::Semaphore;

use crate::access::forwarded::Proxies;
use crate::access::peer::{Client, Origin};

/// How many connections beyond its share a client may have to be told so; more are closed without a word.
const OVER_LIMIT_PER_CLIENT: u32 = 8;

/// How many TLS handshakes of a client are made at once while many are; its others wait for these. Those of 40 clients, who may
/// have 10,000 connections, are fewer than half of all that are made at once.
const HANDSHAKES: usize = 3;

/// The connections of each client that has any. Takes no more memory than there are connections.
#[derive(Debug)]
pub struct ClientConnectionLimit {
    open: Mutex<HashMap<Client, Count>>,
    limit: u32,
    /// They have connections for many clients, and no bound.
    proxies: Proxies,
}

/// The connections of a client.
#[derive(Debug, Default)]
struct Count {
    /// Of its share.
    own: u32,
    /// Beyond it.
    excess: u32,
    /// Turns of its TLS handshakes, from the first one that is told to take one.
    handshakes: Option<Arc<Semaphore>>,
}

impl Count {
    fn of(&mut self, is_excess: bool) -> &mut u32 {
        if is_excess { &mut self.excess } else { &mut self.own }
    }
}

impl ClientConnectionLimit {
    /// At most `limit` connections for each client but `proxies`.
    pub fn new(limit: u32, proxies: Proxies) -> Self {
        // With room from the start for many clients, so that it does not grow on the heap of a worker (`memory.rs`).
        Self { open: Mutex::new(HashMap::with_capacity(1024)), limit, proxies }
    }

    /// Counts a connection from `origin`; `None` if there are so many that it must be closed. Where nothing is bounded,
    /// as on a Unix socket, nothing is counted.
    pub fn take(client_limit: Option<&Arc<Self>>, origin: Origin) -> Option<ClientPermit> {
        let (Some(client_limit), Origin::Ip(ip)) = (client_limit, origin) else {
            return Some(ClientPermit(None));
        };
        if client_limit.proxies.trust(origin) {
            return Some(ClientPermit(None));
        }
        let client = Client::from(ip);
        let mut open = client_limit.lock();
        let count = open.entry(client).or_default();
        // Those beyond the share take nothing of it: a client that asks again and again would never get it back.
        let is_excess = count.own >= client_limit.limit;
        if is_excess && count.excess >= OVER_LIMIT_PER_CLIENT {
            return None;
        }
        *count.of(is_excess) += 1;
        drop(open);
        Some(ClientPermit(Some((Arc::clone(client_limit), client, is_excess))))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<Client, Count>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner) // nothing that can panic is done under it
    }
}

/// A connection that is counted until this is dropped.
#[derive(Debug)]
pub struct ClientPermit(Option<(Arc<ClientConnectionLimit>, Client, bool)>);

impl ClientPermit {
    /// Whether it is more than the client may have.
    pub fn is_excess(&self) -> bool {
        self.0.as_ref().is_some_and(|(.., is_excess)| *is_excess)
    }

    /// The turns of its client's TLS handshakes; `None` where its connections are not counted.
    pub fn handshakes(&self) -> Option<Arc<Semaphore>> {
        let (client_limit, client, _) = self.0.as_ref()?;
        let mut open = client_limit.lock();
        let turns = &mut open.get_mut(client)?.handshakes;
        Some(Arc::clone(turns.get_or_insert_with(|| Arc::new(Semaphore::new(HANDSHAKES)))))
    }
}

impl Drop for ClientPermit {
    fn drop(&mut self) {
        let Some((client_limit, client, is_excess)) = &self.0 else { return };
        if let Entry::Occupied(mut entry) = client_limit.lock().entry(*client) {
            let count = entry.get_mut();
            *count.of(*is_excess) -= 1;
            if count.own == 0 && count.excess == 0 {
                entry.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_has_its_share_a_little_more_to_be_told_so_and_no_others() {
        let proxies = Proxies { trusted: vec!["10.0.0.0/8".parse().unwrap()], ..Proxies::default() };
        let client_limit = Arc::new(ClientConnectionLimit::new(2, proxies));
        let take =
            |ip: &str| ClientConnectionLimit::take(Some(&client_limit), Origin::Ip(ip.parse().unwrap()));
        let mut held: Vec<_> = (0..10).map(|_| take("192.0.2.1").unwrap()).collect();
        assert!(!held[1].is_excess() && held[2].is_excess() && held[9].is_excess());
        assert!(take("192.0.2.1").is_none());
        assert!(!take("192.0.2.2").unwrap().is_excess(), "others have their own");
        let v6 = [take("2001:db8::1"), take("2001:db8::2"), take("2001:db8::3")];
        assert!(v6[2].as_ref().unwrap().is_excess(), "a network of /64 is one client");
        assert!(
            (0..100).map(|_| take("10.1.2.3").unwrap()).all(|share| !share.is_excess()),
            "a proxy is many"
        );
        held.remove(0);
        held.push(take("192.0.2.1").unwrap());
        assert!(!held[9].is_excess(), "what is given back is there, whatever is beyond");
        assert!(take("192.0.2.1").is_none());
        let turns = held[0].handshakes().unwrap();
        assert!(
            Arc::ptr_eq(&turns, &held[9].handshakes().unwrap()),
            "a client has one queue for its handshakes"
        );
        assert!(!Arc::ptr_eq(&turns, &v6[0].as_ref().unwrap().handshakes().unwrap()), "and others theirs");
        assert!(take("10.1.2.3").unwrap().handshakes().is_none(), "a proxy has none");
        drop((held, v6));
        assert!(client_limit.lock().is_empty(), "who has none is forgotten");
    }
}
