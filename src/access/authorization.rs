//! Decides every request for keys: bearer tokens, rate limits, and permits for streamed responses.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Instant;

use subtle::ConstantTimeEq;

use crate::access::forwarded::TrustedProxies;
use crate::access::peer::{Client, Origin, Peer};
use crate::access::rate_limit::{RateLimitStatus, RateLimiter, Rates};
use crate::access::request_head::{RequestHead, RequestHeader};
use crate::access::stream_permits::{StreamPermit, StreamPermits};
use crate::access::token;
use crate::access::tokens_file::{Grant, TokenName};

/// The configured rules for requests for keys. The default requires nothing.
#[derive(Debug, Clone, Default)]
pub struct AccessRules {
    /// The valid tokens; `None` if no token is required.
    pub tokens: Option<Arc<[Grant]>>,
    /// Whether clients of the Unix socket need no token.
    pub trusts_unix: bool,
    /// The rates of each client.
    pub rates: Rates,
    /// The proxies that are trusted to report their clients' addresses.
    pub proxies: TrustedProxies,
    /// Whether each key is recorded in the audit log.
    pub audit: bool,
}

/// Applies the access rules, and counts what each client has used.
#[derive(Debug)]
pub struct Authorizer {
    is_unrestricted: AtomicBool,
    policy: RwLock<Arc<Policy>>,
    /// Created when a rate is first configured, and then kept: new rules don't forget what clients have used.
    rate_limiter: OnceLock<RateLimiter>,
    stream_permits: Arc<StreamPermits>,
}

/// The rules in force, with an index of their tokens.
#[derive(Debug, Default)]
struct Policy {
    rules: AccessRules,
    grants: Grants,
}

/// Grants, indexed by a keyed hash of their digest. The key is random and never leaves the process, so the time of a
/// lookup reveals nothing about a digest; the digest itself is compared in constant time.
#[derive(Debug, Default)]
struct Grants {
    by_hash: HashMap<u64, Vec<Grant>>,
    hasher: RandomState,
}

impl Grants {
    fn new(grants: &[Grant]) -> Self {
        let mut index = Self::default();
        for grant in grants {
            index.by_hash.entry(index.hasher.hash_one(grant.digest)).or_default().push(grant.clone());
        }
        index
    }

    /// The grant of the token with this text.
    fn find(&self, token: &[u8]) -> Option<&Grant> {
        let digest = token::digest_of(token)?;
        let candidates = self.by_hash.get(&self.hasher.hash_one(digest))?;
        candidates.iter().find(|grant| grant.digest.ct_eq(&digest).into())
    }
}

impl Authorizer {
    /// Applies `rules`, and allows at most `max_streams` streamed responses at once.
    pub fn new(rules: AccessRules, max_streams: usize) -> Self {
        let authorizer = Self {
            is_unrestricted: AtomicBool::new(true),
            policy: RwLock::default(),
            rate_limiter: OnceLock::new(),
            stream_permits: Arc::new(StreamPermits::new(max_streams)),
        };
        authorizer.replace(rules);
        authorizer
    }

    /// Applies `rules` to every request from now on.
    pub fn replace(&self, rules: AccessRules) {
        let grants = rules.tokens.as_deref().unwrap_or_default();
        let has_rates = !rules.rates.are_unlimited() || grants.iter().any(Grant::has_rates);
        if has_rates {
            self.rate_limiter.get_or_init(|| RateLimiter::new(Instant::now()));
        }
        let is_unrestricted = rules.tokens.is_none() && !has_rates && !rules.audit;
        let grants = Grants::new(grants);
        *self.policy.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Policy { rules, grants });
        self.is_unrestricted.store(is_unrestricted, Ordering::Relaxed);
    }

    /// Whether no token, rate limit or audit record applies to any request: the only check that the fast path needs
    /// then.
    #[inline]
    pub fn is_unrestricted(&self) -> bool {
        self.is_unrestricted.load(Ordering::Relaxed)
    }

    /// Whether a request for a key needs a token, at least over TCP.
    pub fn needs_token(&self) -> bool {
        self.policy.read().unwrap_or_else(PoisonError::into_inner).rules.tokens.is_some()
    }

    /// Whether each key is recorded in the audit log.
    pub fn audits(&self) -> bool {
        self.policy.read().unwrap_or_else(PoisonError::into_inner).rules.audit
    }

    /// Authorizes a request for a key.
    ///
    /// # Errors
    /// The request needs a token and has no valid one.
    pub fn authorize(&self, peer: &Peer, head: &RequestHead<'_>) -> Result<Box<Authorized>, Unauthorized> {
        let policy = Arc::clone(&self.policy.read().unwrap_or_else(PoisonError::into_inner));
        let rules = &policy.rules;
        let forwarded = rules.proxies.client_ip(peer.origin, head);
        let is_trusted = rules.trusts_unix && matches!(peer.origin, Origin::Unix(_));
        let grant = match &rules.tokens {
            Some(_) => match policy.grant(head) {
                Ok(grant) => Some(grant.clone()),
                Err(Unauthorized::Missing) if is_trusted => None,
                Err(reason) => return Err(reason),
            },
            None => None,
        };
        let address = forwarded.or(match peer.origin {
            Origin::Ip(ip) => Some(ip),
            Origin::Unix(_) => None,
        });
        Ok(Box::new(Authorized {
            rates: rules.rates,
            audit: rules.audit,
            grant,
            address,
            is_forwarded: forwarded.is_some(),
            rate_limit: None,
        }))
    }

    /// Counts one request of `bytes` key bytes against the client's rates, and stores the client's status in
    /// `authorized`.
    ///
    /// # Errors
    /// The client's status, if the client must wait. The request is not counted then.
    pub fn check_rate_limit(
        &self,
        authorized: &mut Authorized,
        peer: &Peer,
        bytes: u64,
    ) -> Result<(), RateLimitStatus> {
        let (Some((client, rates)), Some(limiter)) =
            (authorized.rate_limit_key(peer), self.rate_limiter.get())
        else {
            return Ok(());
        };
        let status = limiter.check(client, &rates, bytes, Instant::now());
        if status.wait.is_some() {
            return Err(status);
        }
        authorized.rate_limit = Some(status);
        Ok(())
    }

    /// Acquires the permit for one streamed response, to be held until its last byte is sent. It counts for the bearer
    /// of a token, else for the address that a trusted proxy reports, else for the connection's origin. `None` if all
    /// permits are held, or all that one client may hold.
    pub fn acquire_stream_permit(
        &self,
        authorized: Option<&Authorized>,
        peer: &Peer,
        head: &RequestHead<'_>,
    ) -> Option<StreamPermit> {
        let client = match authorized {
            Some(authorized) => authorized.client(peer),
            None => {
                let policy = self.policy.read().unwrap_or_else(PoisonError::into_inner);
                let forwarded = policy.rules.proxies.client_ip(peer.origin, head);
                forwarded.map_or_else(|| peer.origin.into(), Client::from)
            }
        };
        self.stream_permits.acquire(client)
    }
}

/// Why a request is not authorized. The texts are sent to the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unauthorized {
    /// The request has no bearer token.
    #[error("A bearer token is required")]
    Missing,
    /// The token has no grant, or the request has more than one.
    #[error("The token is not valid")]
    Unknown,
    /// The grant of the token has expired.
    #[error("The token has expired")]
    Expired,
}

impl Policy {
    /// The grant of the bearer token in `head`.
    fn grant(&self, head: &RequestHead<'_>) -> Result<&Grant, Unauthorized> {
        let mut values = head.values(RequestHeader::Authorization);
        let credentials = match (values.next(), values.next()) {
            (Some(value), None) => value,
            (None, _) => return Err(Unauthorized::Missing),
            (Some(_), Some(_)) => return Err(Unauthorized::Unknown),
        };
        // RFC 9110 section 11.4: the scheme is case-insensitive, and spaces follow it.
        let scheme = b"bearer ";
        let is_bearer =
            credentials.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme));
        if !is_bearer {
            return Err(Unauthorized::Missing); // credentials of another scheme count as none
        }
        let token = credentials[scheme.len()..].trim_ascii_start();
        let grant = self.grants.find(token).ok_or(Unauthorized::Unknown)?;
        if grant.has_expired() { Err(Unauthorized::Expired) } else { Ok(grant) }
    }
}

/// A request that was authorized, and its client.
#[derive(Debug, Clone)]
pub struct Authorized {
    rates: Rates,
    grant: Option<Grant>,
    /// Whether its key is recorded in the audit log.
    pub audit: bool,
    /// The client's IP address; `None` for a client of the Unix socket.
    pub address: Option<IpAddr>,
    /// Whether a trusted proxy reported the address.
    pub is_forwarded: bool,
    /// The client's status after this request; `None` if no rate limit applies to the client.
    pub rate_limit: Option<RateLimitStatus>,
}

impl Authorized {
    /// The largest key that the client may request, in bytes; `limit` is the maximum for every client.
    pub fn max_size(&self, limit: u64) -> u64 {
        self.grant.as_ref().and_then(|grant| grant.max_size).map_or(limit, |own| own.min(limit))
    }

    /// The name of the token that authorized the request.
    pub fn token_name(&self) -> Option<&TokenName> {
        self.grant.as_ref().map(|grant| &grant.name)
    }

    /// The client: the bearer of a token, else the address, else the user of the Unix socket.
    fn client(&self, peer: &Peer) -> Client {
        match &self.grant {
            Some(grant) => Client::Bearer(grant.name.id()),
            None => self.address.map_or_else(|| peer.origin.into(), Client::from),
        }
    }

    /// The client that the request is counted for, and its rates: the bearer of a token with rates of its own, from any
    /// address; else the address, or the user of the Unix socket. `None` if no rate limit applies.
    fn rate_limit_key(&self, peer: &Peer) -> Option<(Client, Rates)> {
        let (client, rates) = match self.grant.as_ref().filter(|grant| grant.has_rates()) {
            Some(grant) => {
                let rates = Rates { requests: grant.rate_requests, bytes: grant.rate_bytes, ..self.rates };
                (Client::Bearer(grant.name.id()), rates)
            }
            None => (self.address.map_or_else(|| peer.origin.into(), Client::from), self.rates),
        };
        (!rates.are_unlimited()).then_some((client, rates))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::token::Token;
    use crate::keys::generator::{Generator, OsRandom};

    #[test]
    fn only_the_exact_token_finds_its_grant() {
        let generator = Generator::new(OsRandom).unwrap();
        let tokens = [(); 3].map(|()| Token::generate(&generator).unwrap());
        let [first, second, other] = &tokens;
        let grant = |name: &str, token: &Token| Grant::new(name.parse().unwrap(), token.digest);
        let grants = Grants::new(&[grant("first", first), grant("second", second)]);
        let found = |text: &[u8]| grants.find(text).map(|grant| grant.name.as_str());
        let text = first.text.as_bytes();
        assert_eq!(found(text), Some("first"));
        assert_eq!(found(second.text.as_bytes()), Some("second"));
        assert_eq!(found(other.text.as_bytes()), None);
        for at in 0..text.len() {
            let mut changed = text.to_vec();
            changed[at] = if text[at] == b'0' { b'1' } else { b'0' };
            assert_eq!(found(&changed), None, "byte {at} is changed");
            assert_eq!(found(&text[..at]), None, "only {at} bytes");
        }
        assert_eq!(found(&[text, b"0"].concat()), None, "a digit too many");
        assert_eq!(found(text.to_ascii_uppercase().as_slice()), None, "capital letters");
        assert_eq!(found(&first.digest), None, "the digest itself");
    }

    #[test]
    fn two_grants_in_one_bucket_are_distinguished() {
        let generator = Generator::new(OsRandom).unwrap();
        let tokens = [(); 3].map(|()| Token::generate(&generator).unwrap());
        let mut grants = Grants::default();
        let bucket = ["first", "second"].iter().zip(&tokens);
        let bucket: Vec<_> =
            bucket.map(|(name, token)| Grant::new(name.parse().unwrap(), token.digest)).collect();
        // As if the keyed hashes of all three digests collided.
        for token in &tokens {
            grants.by_hash.insert(grants.hasher.hash_one(token.digest), bucket.clone());
        }
        let found = tokens.each_ref().map(|token| grants.find(token.text.as_bytes()));
        let names = found.map(|grant| grant.map(|grant| grant.name.as_str()));
        assert_eq!(names, [Some("first"), Some("second"), None]);
    }
}
