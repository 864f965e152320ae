//! Who may ask, and for how much: tokens, rates, and permits for streamed responses.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Instant;

use axum::http::header::{AUTHORIZATION, HeaderMap};
use subtle::ConstantTimeEq;

use crate::access::forwarded::Proxies;
use crate::access::peer::{Client, Origin, Peer};
use crate::access::rate_limit::{RateLimitStatus, RateLimiter, Rates};
use crate::access::stream_permits::{StreamPermit, StreamPermits};
use crate::access::token::{self, Grant, Name};

/// What a request for a key is judged by.
#[derive(Debug, Clone, Default)]
pub struct AccessRules {
    /// The tokens; `None` where none is asked for.
    pub tokens: Option<Arc<[Grant]>>,
    /// Whether who could open the Unix socket needs no token.
    pub trusts_unix: bool,
    /// What each client may take.
    pub rates: Rates,
    /// Whose word on the client's address is taken.
    pub proxies: Proxies,
    /// Whether each key leaves a record.
    pub audit: bool,
}

/// The rules in force, and what has been taken under them.
#[derive(Debug)]
pub struct Authorizer {
    is_unrestricted: AtomicBool,
    books: RwLock<Arc<Policy>>,
    /// Made when it is first needed, and kept: rules change, debts stay.
    table: OnceLock<RateLimiter>,
    streams: Arc<StreamPermits>,
}

/// Rules, with their tokens.
#[derive(Debug, Default)]
struct Policy {
    rules: AccessRules,
    grants: Grants,
}

/// Grants by a keyed hash of their digest. The key is random and stays in the process, so the time of a look-up tells nothing
/// about a digest; the digest itself is compared in constant time.
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

    /// The grant of the token `text`.
    fn find(&self, text: &[u8]) -> Option<&Grant> {
        let digest = token::digest_of(text)?;
        let candidates = self.by_hash.get(&self.hasher.hash_one(digest))?;
        candidates.iter().find(|grant| grant.digest.ct_eq(&digest).into())
    }
}

impl Authorizer {
    /// `streams` responses may be streamed at once.
    pub fn new(rules: AccessRules, streams: usize) -> Self {
        let authorizer = Self {
            is_unrestricted: AtomicBool::new(true),
            books: RwLock::new(Arc::new(Policy::default())),
            table: OnceLock::new(),
            streams: Arc::new(StreamPermits::new(streams)),
        };
        authorizer.replace(rules);
        authorizer
    }

    /// Puts `rules` in force for every request from now on.
    pub fn replace(&self, rules: AccessRules) {
        let grants = rules.tokens.as_deref().unwrap_or_default();
        let is_limited = |grant: &Grant| grant.rate_requests.or(grant.rate_bytes).is_some();
        let is_rated = !rules.rates.are_unlimited() || grants.iter().any(is_limited);
        if is_rated {
            self.table.get_or_init(|| RateLimiter::new(Instant::now()));
        }
        let is_unrestricted = rules.tokens.is_none() && !is_rated && !rules.audit;
        let grants = Grants::new(grants);
        *self.books.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Policy { rules, grants });
        self.is_unrestricted.store(is_unrestricted, Ordering::Relaxed);
    }

    /// Whether nothing is asked of anyone, nothing counted and nothing recorded: all that the hot path looks at then.
    #[inline]
    pub fn is_unrestricted(&self) -> bool {
        self.is_unrestricted.load(Ordering::Relaxed)
    }

    /// Whether a key takes a token, at least from who comes by TCP.
    pub fn needs_token(&self) -> bool {
        self.books.read().unwrap_or_else(PoisonError::into_inner).rules.tokens.is_some()
    }

    /// Whether each key leaves a record.
    pub fn audits(&self) -> bool {
        self.books.read().unwrap_or_else(PoisonError::into_inner).rules.audit
    }

    /// Lets a request for a key in.
    ///
    /// # Errors
    /// Without a valid token where there must be one.
    pub fn authorize(&self, peer: &Peer, headers: &HeaderMap) -> Result<Box<Authorized>, Unauthorized> {
        let books = Arc::clone(&self.books.read().unwrap_or_else(PoisonError::into_inner));
        let rules = &books.rules;
        let forwarded = rules.proxies.client(peer.origin, headers);
        let is_trusted = rules.trusts_unix && matches!(peer.origin, Origin::Unix(_));
        let grant = match &rules.tokens {
            Some(_) => match books.grant(headers) {
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
            standing: None,
        }))
    }

    /// Charges a visitor for one request of `bytes` key bytes, and notes where it stands then.
    ///
    /// # Errors
    /// Where it stands, when it has to wait.
    pub fn check_rate_limit(
        &self,
        visit: &mut Authorized,
        peer: &Peer,
        bytes: u64,
    ) -> Result<(), RateLimitStatus> {
        let (Some((client, rates)), Some(table)) = (visit.account(peer), self.table.get()) else {
            return Ok(());
        };
        let standing = table.ask(client, &rates, bytes, Instant::now());
        if standing.wait.is_some() {
            return Err(standing);
        }
        visit.standing = Some(standing);
        Ok(())
    }

    /// A permit for one streamed response, to be kept until its last byte. It counts for the bearer of a token, else for
    /// the address that a trusted proxy reports, else for the connection's origin. `None` when all permits are held, or the
    /// client's share of them.
    pub fn stream(
        &self,
        visit: Option<&Authorized>,
        peer: &Peer,
        headers: &HeaderMap,
    ) -> Option<StreamPermit> {
        let client = match visit {
            Some(visit) => visit.client(peer),
            None => {
                let books = self.books.read().unwrap_or_else(PoisonError::into_inner);
                books
                    .rules
                    .proxies
                    .client(peer.origin, headers)
                    .map_or_else(|| peer.origin.into(), Client::from)
            }
        };
        self.streams.acquire(client)
    }
}

/// Why a request is not authorized.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unauthorized {
    /// There is no token.
    #[error("A bearer token is needed")]
    Missing,
    /// No grant is for this token.
    #[error("The token is not valid")]
    Unknown,
    /// Its grant is over.
    #[error("The token has expired")]
    Expired,
}

impl Policy {
    fn grant(&self, headers: &HeaderMap) -> Result<&Grant, Unauthorized> {
        let mut fields = headers.get_all(AUTHORIZATION).iter();
        let field = match (fields.next(), fields.next()) {
            (Some(field), None) => field.as_bytes(),
            (None, _) => return Err(Unauthorized::Missing),
            (Some(_), Some(_)) => return Err(Unauthorized::Unknown),
        };
        // RFC 9110 section 11.4: the scheme's case does not matter, and spaces follow it.
        let scheme = b"bearer ";
        let is_bearer = field.get(..scheme.len()).is_some_and(|start| start.eq_ignore_ascii_case(scheme));
        if !is_bearer {
            return Err(Unauthorized::Missing); // credentials of another kind are none here
        }
        let token = field[scheme.len()..].trim_ascii_start();
        let grant = self.grants.find(token).ok_or(Unauthorized::Unknown)?;
        if grant.has_expired() { Err(Unauthorized::Expired) } else { Ok(grant) }
    }
}

/// A request that was let in, and whose it is.
#[derive(Debug, Clone)]
pub struct Authorized {
    rates: Rates,
    grant: Option<Grant>,
    /// Whether its key leaves a record.
    pub audit: bool,
    /// Where it comes from, where that has an address.
    pub address: Option<IpAddr>,
    /// Whether a proxy said so.
    pub is_forwarded: bool,
    /// Where it stands, where anything is counted for it.
    pub standing: Option<RateLimitStatus>,
}

impl Authorized {
    /// The largest key that it may ask for, where everyone may ask for `limit`.
    pub fn max_size(&self, limit: u64) -> u64 {
        self.grant.as_ref().and_then(|grant| grant.max_size).map_or(limit, |own| own.min(limit))
    }

    /// Whose token it showed.
    pub fn bearer(&self) -> Option<&Name> {
        self.grant.as_ref().map(|grant| &grant.name)
    }

    /// Whose it is: the bearer of a token, else the address, else the user of the Unix socket.
    fn client(&self, peer: &Peer) -> Client {
        match &self.grant {
            Some(grant) => Client::Bearer(grant.name.number()),
            None => self.address.map_or_else(|| peer.origin.into(), Client::from),
        }
    }

    /// Whom it is counted for, and by which rates: the bearer of a token that has rates of its own, wherever it comes
    /// from; else the address, or the user of the Unix socket.
    fn account(&self, peer: &Peer) -> Option<(Client, Rates)> {
        let own = self.grant.as_ref().filter(|grant| grant.rate_requests.or(grant.rate_bytes).is_some());
        let (client, rates) = match own {
            Some(grant) => {
                let rates = Rates { requests: grant.rate_requests, bytes: grant.rate_bytes, ..self.rates };
                (Client::Bearer(grant.name.number()), rates)
            }
            None => (self.address.map_or_else(|| peer.origin.into(), Client::from), self.rates),
        };
        (!rates.are_unlimited()).then_some((client, rates))
    }
}
