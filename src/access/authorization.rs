//! Decides every request for keys: bearer tokens, rate limits, and permits for streamed responses.

use std::mem;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Instant;

use crate::access::forwarded::TrustedProxies;
use crate::access::grants::{Bearer, Grants};
use crate::access::peer::{Client, Origin, Peer};
use crate::access::rate_limit::{RateLimitStatus, RateLimiter, RatePolicy, Rates};
use crate::access::request_head::{RequestHead, RequestHeader};
use crate::access::stream_permits::{StreamPermit, StreamPermits};
use crate::access::tokens_file::{Grant, TokenName};
use crate::access::verified_token::{Fingerprinter, VerifiedToken};
use crate::keys::generator::{Generator, GeneratorError};

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
    policy: RwLock<Policy>,
    fingerprinter: Fingerprinter,
    /// Created when a rate is first configured, and then kept: new rules don't forget what clients have used.
    rate_limiter: OnceLock<RateLimiter>,
    stream_permits: Arc<StreamPermits>,
}

/// The rules in force, with an index of their tokens.
#[derive(Debug, Default)]
struct Policy {
    /// The number of policies before this one, by which a [`VerifiedToken`] of another one is recognised.
    generation: u64,
    rules: AccessRules,
    rates: Option<Arc<RatePolicy>>,
    grants: Grants,
}

impl Authorizer {
    /// Applies `rules`, and allows at most `max_streams` streamed responses at once.
    ///
    /// # Errors
    /// The generator fails.
    pub fn new(
        rules: AccessRules,
        max_streams: usize,
        generator: &Generator,
    ) -> Result<Self, GeneratorError> {
        let authorizer = Self {
            is_unrestricted: AtomicBool::new(true),
            policy: RwLock::default(),
            fingerprinter: Fingerprinter::new(generator)?,
            rate_limiter: OnceLock::new(),
            stream_permits: Arc::new(StreamPermits::new(max_streams)),
        };
        authorizer.replace(rules);
        Ok(authorizer)
    }

    /// Applies `rules` to every request from now on.
    pub fn replace(&self, rules: AccessRules) {
        let grants = rules.tokens.as_deref().unwrap_or_default();
        let has_rates = !rules.rates.are_unlimited() || grants.iter().any(Grant::has_rates);
        if has_rates {
            self.rate_limiter.get_or_init(|| RateLimiter::new(Instant::now()));
        }
        let is_unrestricted = rules.tokens.is_none() && !has_rates && !rules.audit;
        let (grants, rates) = (Grants::new(grants, rules.rates), RatePolicy::new(rules.rates));
        let mut policy = self.policy.write().unwrap_or_else(PoisonError::into_inner);
        let new = Policy { generation: policy.generation + 1, rules, rates, grants };
        let old = mem::replace(&mut *policy, new);
        drop(policy);
        drop(old); // after the lock: to free many tokens takes longer than a request
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

    /// Authorizes a request for a key. `verified` belongs to the connection.
    ///
    /// # Errors
    /// The request needs a token and has no valid one.
    pub fn authorize(
        &self,
        peer: &Peer,
        head: &RequestHead<'_>,
        verified: &VerifiedToken,
    ) -> Result<Box<Authorized>, Unauthorized> {
        let policy = self.policy.read().unwrap_or_else(PoisonError::into_inner);
        let rules = &policy.rules;
        let forwarded = rules.proxies.client_ip(peer.origin, head);
        let is_trusted = rules.trusts_unix && matches!(peer.origin, Origin::Unix(_));
        let bearer = match &rules.tokens {
            Some(_) => match policy.bearer(head, &self.fingerprinter, verified) {
                Ok(bearer) => Some(bearer),
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
            rates: bearer
                .as_ref()
                .and_then(|bearer| bearer.rates.as_ref())
                .or(policy.rates.as_ref())
                .cloned(),
            audit: rules.audit,
            bearer,
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
        let (Some(rates), Some(limiter)) = (&authorized.rates, self.rate_limiter.get()) else {
            return Ok(());
        };
        let status = limiter.check(authorized.rate_limit_key(peer), rates, bytes, Instant::now());
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
    /// The bearer of the token in `head`.
    fn bearer(
        &self,
        head: &RequestHead<'_>,
        fingerprinter: &Fingerprinter,
        verified: &VerifiedToken,
    ) -> Result<Arc<Bearer>, Unauthorized> {
        let mut values = head.values(RequestHeader::Authorization);
        let credentials = match (values.next(), values.next()) {
            (Some(value), None) => value,
            (None, _) => return Err(Unauthorized::Missing),
            (Some(_), Some(_)) => return Err(Unauthorized::Unknown),
        };
        let fingerprint = fingerprinter.fingerprint(credentials);
        let bearer = match verified.bearer(fingerprint, self.generation) {
            Some(bearer) => bearer,
            None => {
                let bearer = self.find(credentials)?;
                verified.set(fingerprint, self.generation, bearer);
                Arc::clone(bearer)
            }
        };
        if bearer.grant.has_expired() { Err(Unauthorized::Expired) } else { Ok(bearer) }
    }

    /// The bearer with these credentials, whether or not the token has expired.
    fn find(&self, credentials: &[u8]) -> Result<&Arc<Bearer>, Unauthorized> {
        // RFC 9110 section 11.4: the scheme is case-insensitive, and spaces follow it.
        let scheme = b"bearer ";
        let is_bearer =
            credentials.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme));
        if !is_bearer {
            return Err(Unauthorized::Missing); // credentials of another scheme count as none
        }
        let token = credentials[scheme.len()..].trim_ascii_start();
        self.grants.find(token).ok_or(Unauthorized::Unknown)
    }
}

/// A request that was authorized, and its client.
#[derive(Debug, Clone)]
pub struct Authorized {
    /// The rates that apply; `None` if they are unlimited.
    rates: Option<Arc<RatePolicy>>,
    bearer: Option<Arc<Bearer>>,
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
        self.grant().and_then(|grant| grant.max_size).map_or(limit, |own| own.min(limit))
    }

    /// The name of the token that authorized the request.
    pub fn token_name(&self) -> Option<&TokenName> {
        self.grant().map(|grant| &grant.name)
    }

    fn grant(&self) -> Option<&Grant> {
        self.bearer.as_ref().map(|bearer| &bearer.grant)
    }

    /// The client: the bearer of a token, else the address, else the user of the Unix socket.
    fn client(&self, peer: &Peer) -> Client {
        self.grant().map_or_else(|| self.origin(peer), |grant| Client::Bearer(grant.name.id()))
    }

    /// The address, or the user of the Unix socket.
    fn origin(&self, peer: &Peer) -> Client {
        self.address.map_or_else(|| peer.origin.into(), Client::from)
    }

    /// The client that the request is counted for: the bearer of a token with rates of its own, from any address; else
    /// the address, or the user of the Unix socket.
    fn rate_limit_key(&self, peer: &Peer) -> Client {
        match &self.bearer {
            Some(bearer) if bearer.rates.is_some() => Client::Bearer(bearer.grant.name.id()),
            _ => self.origin(peer),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::token::Token;
    use crate::keys::generator::OsRandom;
    use axum::http::Request;

    fn rules(grants: Vec<Grant>) -> AccessRules {
        AccessRules { tokens: Some(grants.into()), ..AccessRules::default() }
    }

    /// The name of the token that authorizes a request with `value` as `Authorization` on the connection that owns
    /// `verified`.
    fn authorize(
        authorizer: &Authorizer,
        value: &str,
        verified: &VerifiedToken,
    ) -> Result<String, Unauthorized> {
        let request = Request::get("/key/32").header("authorization", value).body(()).unwrap();
        let head = RequestHead::from(&request);
        let peer = Peer::tcp(([127, 0, 0, 1], 1).into());
        let authorized = authorizer.authorize(&peer, &head, verified)?;
        Ok(authorized.token_name().unwrap().to_string())
    }

    #[test]
    fn each_request_on_a_connection_gets_the_grant_of_its_own_token() {
        let generator = Generator::new(OsRandom).unwrap();
        let tokens = [(); 3].map(|()| Token::generate(&generator).unwrap());
        let [first, second, unknown] = tokens.each_ref().map(|token| format!("Bearer {}", *token.text));
        let grant = |name: &str, token: &Token| Grant::new(name.parse().unwrap(), token.digest);
        let grants = vec![grant("first", &tokens[0]), grant("second", &tokens[1])];
        let authorizer = Authorizer::new(rules(grants), 1, &generator).unwrap();
        let verified = VerifiedToken::default();
        let lowercase = first.replace("Bearer ", "bearer  ");
        for (value, expected) in [
            (&first, Ok("first")),
            (&first, Ok("first")),
            (&second, Ok("second")),
            (&unknown, Err(Unauthorized::Unknown)),
            (&second, Ok("second")),
            (&lowercase, Ok("first")),
            (&format!("{first} "), Err(Unauthorized::Unknown)),
            (&first, Ok("first")),
        ] {
            assert_eq!(
                authorize(&authorizer, value, &verified).as_deref(),
                expected.as_ref().map(|name| *name)
            );
        }
    }

    #[test]
    fn a_revoked_token_is_refused_on_the_same_connection() {
        let generator = Generator::new(OsRandom).unwrap();
        let token = Token::generate(&generator).unwrap();
        let value = format!("Bearer {}", *token.text);
        let granted = |name: &str| rules(vec![Grant::new(name.parse().unwrap(), token.digest)]);
        let authorizer = Authorizer::new(granted("old"), 1, &generator).unwrap();
        let verified = VerifiedToken::default();
        assert_eq!(authorize(&authorizer, &value, &verified).as_deref(), Ok("old"));
        authorizer.replace(granted("new"));
        assert_eq!(authorize(&authorizer, &value, &verified).as_deref(), Ok("new"), "the new rules apply");
        authorizer.replace(rules(Vec::new()));
        assert_eq!(authorize(&authorizer, &value, &verified), Err(Unauthorized::Unknown));
        authorizer.replace(granted("again"));
        assert_eq!(authorize(&authorizer, &value, &verified).as_deref(), Ok("again"));
    }

    #[test]
    fn an_expired_token_is_refused_on_the_same_connection() {
        let generator = Generator::new(OsRandom).unwrap();
        let token = Token::generate(&generator).unwrap();
        let value = format!("Bearer {}", *token.text);
        let expires = "2000-01-01".parse().unwrap();
        let expired = Grant { expires: Some(expires), ..Grant::new("old".parse().unwrap(), token.digest) };
        let authorizer = Authorizer::new(rules(vec![expired]), 1, &generator).unwrap();
        let verified = VerifiedToken::default();
        for attempt in ["hashed", "recognised"] {
            assert_eq!(authorize(&authorizer, &value, &verified), Err(Unauthorized::Expired), "{attempt}");
        }
    }
}
