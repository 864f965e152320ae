//! The limit on the connections of one client, so that no client can take all slots.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Semaphore;

use crate::access::forwarded::TrustedProxies;
use crate::access::peer::{Client, Origin};

/// How many connections over its limit a client may have. Each gets a 503, and further ones are closed without a
/// response.
const OVER_LIMIT_PER_CLIENT: u32 = 8;

/// How many TLS handshakes of one client run at once while many run; its others wait for these. 40 clients, which may
/// have 10,000 connections together, then run fewer than half of all concurrent handshakes.
const HANDSHAKES_PER_CLIENT: usize = 3;

/// The connections of each client that has any. Its memory is limited by the number of connections.
#[derive(Debug)]
pub struct ClientConnectionLimit {
    clients: Mutex<HashMap<Client, Connections>>,
    limit: u32,
    /// Proxies connect for many clients, so they have no limit.
    proxies: TrustedProxies,
}

/// The connections of one client.
#[derive(Debug, Default)]
struct Connections {
    within_limit: u32,
    over_limit: u32,
    /// Limits its TLS handshakes; made for the first one that has to wait.
    handshakes: Option<Arc<Semaphore>>,
}

impl Connections {
    fn count_mut(&mut self, is_over_limit: bool) -> &mut u32 {
        if is_over_limit { &mut self.over_limit } else { &mut self.within_limit }
    }
}

impl ClientConnectionLimit {
    /// At most `limit` connections for each client that is not one of `proxies`.
    pub fn new(limit: u32, proxies: TrustedProxies) -> Self {
        // With room for many clients from the start, so that it does not grow on the heap of a worker (`memory.rs`).
        Self { clients: Mutex::new(HashMap::with_capacity(1024)), limit, proxies }
    }

    /// Counts a connection from `origin`; `None` if there are so many that it must be closed. Without a limit, for a
    /// proxy, and on a Unix socket, nothing is counted.
    pub(crate) fn acquire(client_limit: Option<&Arc<Self>>, origin: Origin) -> Option<ClientPermit> {
        let (Some(client_limit), Origin::Ip(ip)) = (client_limit, origin) else {
            return Some(ClientPermit(None));
        };
        if client_limit.proxies.contains(origin) {
            return Some(ClientPermit(None));
        }
        let client = Client::from(ip);
        let mut clients = client_limit.lock();
        let connections = clients.entry(client).or_default();
        // Connections over the limit are counted separately. Otherwise a client that keeps connecting could never get
        // below the limit again.
        let is_over_limit = connections.within_limit >= client_limit.limit;
        if is_over_limit && connections.over_limit >= OVER_LIMIT_PER_CLIENT {
            return None;
        }
        *connections.count_mut(is_over_limit) += 1;
        drop(clients);
        Some(ClientPermit(Some(Counted { limit: Arc::clone(client_limit), client, is_over_limit })))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<Client, Connections>> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner) // no code under the lock can panic
    }
}

/// A connection, counted for its client until this is dropped.
#[derive(Debug)]
pub struct ClientPermit(Option<Counted>);

#[derive(Debug)]
struct Counted {
    limit: Arc<ClientConnectionLimit>,
    client: Client,
    is_over_limit: bool,
}

impl ClientPermit {
    /// Whether the client has more connections than it may have.
    pub(crate) fn is_over_limit(&self) -> bool {
        self.0.as_ref().is_some_and(|counted| counted.is_over_limit)
    }

    /// Limits the TLS handshakes of the client; `None` where its connections are not counted.
    pub(crate) fn handshakes(&self) -> Option<Arc<Semaphore>> {
        let Counted { limit, client, .. } = self.0.as_ref()?;
        let mut clients = limit.lock();
        let handshakes = &mut clients.get_mut(client)?.handshakes;
        Some(Arc::clone(handshakes.get_or_insert_with(|| Arc::new(Semaphore::new(HANDSHAKES_PER_CLIENT)))))
    }
}

impl Drop for ClientPermit {
    fn drop(&mut self) {
        let Some(Counted { limit, client, is_over_limit }) = &self.0 else { return };
        if let Entry::Occupied(mut entry) = limit.lock().entry(*client) {
            let connections = entry.get_mut();
            *connections.count_mut(*is_over_limit) -= 1;
            if connections.within_limit == 0 && connections.over_limit == 0 {
                entry.remove();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::forwarded::ForwardedHeader;

    #[test]
    fn a_client_gets_its_limit_and_a_few_over_limit_connections() {
        let proxies = TrustedProxies::new(&["10.0.0.0/8".parse().unwrap()], ForwardedHeader::default());
        let client_limit = Arc::new(ClientConnectionLimit::new(2, proxies));
        let acquire =
            |ip: &str| ClientConnectionLimit::acquire(Some(&client_limit), Origin::Ip(ip.parse().unwrap()));
        let mut permits: Vec<_> = (0..10).map(|_| acquire("192.0.2.1").unwrap()).collect();
        assert!(
            !permits[1].is_over_limit() && permits[2].is_over_limit() && permits[9].is_over_limit(),
            "two are within the limit"
        );
        assert!(acquire("192.0.2.1").is_none(), "8 are over it, and no more");
        assert!(!acquire("192.0.2.2").unwrap().is_over_limit(), "another client has its own limit");
        let ipv6 = [acquire("2001:db8::1"), acquire("2001:db8::2"), acquire("2001:db8::3")];
        assert!(ipv6[2].as_ref().unwrap().is_over_limit(), "a /64 network is one client");
        assert!(
            (0..100).map(|_| acquire("10.1.2.3").unwrap()).all(|permit| !permit.is_over_limit()),
            "a proxy has no limit"
        );
        permits.remove(0);
        permits.push(acquire("192.0.2.1").unwrap());
        assert!(!permits[9].is_over_limit(), "a released permit is free, however many are over the limit");
        assert!(acquire("192.0.2.1").is_none());
        let handshakes = permits[0].handshakes().unwrap();
        assert!(
            Arc::ptr_eq(&handshakes, &permits[9].handshakes().unwrap()),
            "all handshakes of a client share one limit"
        );
        let of_another = ipv6[0].as_ref().unwrap().handshakes().unwrap();
        assert!(!Arc::ptr_eq(&handshakes, &of_another), "another client has its own");
        assert!(acquire("10.1.2.3").unwrap().handshakes().is_none(), "a proxy has none");
        drop((permits, ipv6));
        assert!(client_limit.lock().is_empty(), "clients without connections are removed");
    }
}
