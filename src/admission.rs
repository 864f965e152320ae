//! Who may ask, and for how much: tokens, rates, and permits for streamed responses.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, PoisonError, RwLock};
use std::time::Instant;

use axum::http::header::{AUTHORIZATION, HeaderMap};

use crate::forwarded::Proxies;
use crate::peer::{Client, Origin, Peer};
use crate::permits::{StreamPermit, StreamPermits};
use crate::problem::Problem;
use crate::rate::{Rates, Standing, Table};
use crate::seal::Sealer;
use crate::token::{self, Digest, Grant, Name, PREFIX};

/// What a request for a key is judged by.
#[derive(Debug, Clone, Default)]
pub struct Rules {
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
pub struct Admission {
    is_open: AtomicBool,
    books: RwLock<Arc<Books>>,
    /// Made when it is first needed, and kept: rules change, debts stay.
    table: OnceLock<Table>,
    sealer: Arc<Sealer>,
    streams: Arc<StreamPermits>,
}

/// Rules, with their tokens by seal.
#[derive(Debug)]
struct Books {
    rules: Rules,
    grants: HashMap<Digest, Grant>,
}

impl Admission {
    /// `streams` responses may be streamed at once.
    pub fn new(rules: Rules, sealer: Sealer, streams: usize) -> Self {
        let admission = Self {
            is_open: AtomicBool::new(true),
            books: RwLock::new(Arc::new(Books { rules: Rules::default(), grants: HashMap::new() })),
            table: OnceLock::new(),
            sealer: Arc::new(sealer),
            streams: Arc::new(StreamPermits::new(streams)),
        };
        admission.replace(rules);
        admission
    }

    /// Puts `rules` in force for every request from now on.
    pub fn replace(&self, rules: Rules) {
        let grants: HashMap<_, _> = rules
            .tokens
            .iter()
            .flat_map(|grants| grants.iter())
            .map(|grant| (self.sealer.seal(&grant.digest), grant.clone()))
            .collect();
        let has_tokens = rules.tokens.is_some();
        let is_limited = |grant: &Grant| grant.rate_requests.or(grant.rate_bytes).is_some();
        let is_rated = !rules.rates.are_unlimited() || grants.values().any(is_limited);
        if is_rated {
            self.table.get_or_init(|| Table::new(Instant::now()));
        }
        let is_open = !has_tokens && !is_rated && !rules.audit;
        *self.books.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Books { rules, grants });
        self.sealer.switch(has_tokens);
        self.is_open.store(is_open, Ordering::Relaxed);
    }

    /// What keeps tokens out of what a connection reads.
    pub fn sealer(&self) -> Arc<Sealer> {
        Arc::clone(&self.sealer)
    }

    /// Whether nothing is asked of anyone, nothing counted and nothing recorded: all that the hot path looks at then.
    #[inline]
    pub fn is_open(&self) -> bool {
        self.is_open.load(Ordering::Relaxed)
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
    /// 401 for one without a valid token where there must be one.
    pub fn enter(&self, peer: &Peer, headers: &HeaderMap) -> Result<Box<Visit>, Problem> {
        let books = Arc::clone(&self.books.read().unwrap_or_else(PoisonError::into_inner));
        let rules = &books.rules;
        let forwarded = rules.proxies.client(peer.origin, headers);
        let is_trusted = rules.trusts_unix && matches!(peer.origin, Origin::Unix(_));
        let grant = match &rules.tokens {
            Some(_) => match books.grant(headers) {
                Ok(grant) => Some(grant.clone()),
                Err(Unauthorized::Missing) if is_trusted => None,
                Err(reason) => return Err(Problem::unauthorized(reason.detail(), reason.is_given())),
            },
            None => None,
        };
        let address = forwarded.or(match peer.origin {
            Origin::Ip(ip) => Some(ip),
            Origin::Unix(_) => None,
        });
        Ok(Box::new(Visit {
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
    /// 429, when it has to wait.
    pub fn charge(&self, visit: &mut Visit, peer: &Peer, bytes: u64) -> Result<(), Problem> {
        let (Some((client, rates)), Some(table)) = (visit.account(peer), self.table.get()) else {
            return Ok(());
        };
        let standing = table.ask(client, &rates, bytes, Instant::now());
        if standing.wait.is_some() {
            return Err(Problem::too_many_requests(&standing));
        }
        visit.standing = Some(standing);
        Ok(())
    }

    /// A permit for one streamed response, to be kept until its last byte. It counts for the bearer of a token, else for
    /// the address that a trusted proxy reports, else for the connection's origin.
    ///
    /// # Errors
    /// 503, when all permits are held, or the client's share of them.
    pub fn stream(
        &self,
        visit: Option<&Visit>,
        peer: &Peer,
        headers: &HeaderMap,
    ) -> Result<StreamPermit, Problem> {
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
        self.streams.acquire(client).ok_or_else(|| {
            Problem::unavailable("Too many large responses are being sent", STREAM_RETRY_AFTER)
        })
    }
}

/// Seconds after which a streamed response is worth another try.
const STREAM_RETRY_AFTER: u32 = 1;

/// Why a request is not authorized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Unauthorized {
    Missing,
    Unknown,
    Expired,
}

impl Unauthorized {
    fn detail(self) -> &'static str {
        match self {
            Self::Missing => "A bearer token is needed",
            Self::Unknown => "The token is not valid",
            Self::Expired => "The token has expired",
        }
    }

    fn is_given(self) -> bool {
        self != Self::Missing
    }
}

impl Books {
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
        let seal = token.strip_prefix(PREFIX.as_bytes()).and_then(token::from_hex);
        let grant = seal.and_then(|seal| self.grants.get(&seal)).ok_or(Unauthorized::Unknown)?;
        if grant.has_expired() { Err(Unauthorized::Expired) } else { Ok(grant) }
    }
}

/// A request that was let in, and whose it is.
#[derive(Debug, Clone)]
pub struct Visit {
    rates: Rates,
    grant: Option<Grant>,
    /// Whether its key leaves a record.
    pub audit: bool,
    /// Where it comes from, where that has an address.
    pub address: Option<IpAddr>,
    /// Whether a proxy said so.
    pub is_forwarded: bool,
    /// Where it stands, where anything is counted for it.
    pub standing: Option<Standing>,
}

impl Visit {
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
