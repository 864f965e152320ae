//! How much a client may ask for: a rate of requests and of bytes, counted in a table that never grows.
//!
//! The algorithm is GCRA, the continuous form of a token bucket: of each client one instant is kept, the one at which it
//! will have paid for all that it took. A crate such as `governor` does the same in a map that grows with every new
//! client (its issue 171), which is what a bound must not do.

use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroU64;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::access::peer::Client;

/// How many clients the table holds, whatever comes.
pub const CLIENTS_MAX: usize = 65_536;

/// How many of them share a lock and compete for places.
const WAYS: usize = 8;

const SECOND: u128 = 1_000_000_000;

/// What a client may take; the defaults are no bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rates {
    /// Requests a second.
    pub requests: Option<NonZeroU64>,
    /// Key bytes a second.
    pub bytes: Option<NonZeroU64>,
    /// How many seconds' worth of it an idle client saves up and may take at once: at least 1.
    pub burst: u32,
}

impl Rates {
    /// Whether there is nothing to count.
    pub fn are_unlimited(&self) -> bool {
        self.requests.is_none() && self.bytes.is_none()
    }

    /// Appends the value of `RateLimit-Policy` (draft-ietf-httpapi-ratelimit-headers-11, section 3).
    pub fn append_policy(&self, text: &mut String) {
        let quota = |rate: NonZeroU64| rate.get().saturating_mul(self.burst.into());
        let [requests, bytes] = [self.requests, self.bytes].map(|rate| rate.map(quota));
        let bytes = (bytes, "\"bytes\";q=", ";qu=\"content-bytes\";w=");
        append(text, [(requests, "\"requests\";q=", ";w="), bytes], self.burst);
    }

    /// How far ahead of its payments a client may be, in nanoseconds.
    fn tolerance(&self) -> u64 {
        u64::from(self.burst) * 1_000_000_000
    }
}

/// Structured fields have integers of at most 15 digits (RFC 9651 section 3.3.1).
const INTEGER_MAX: u64 = 999_999_999_999_999;

/// Appends an HTTP list: of each amount that there is, what comes before it, and what comes between it and `seconds`.
/// Piece by piece, since it is in every answer: formatted, it took more than all the rest of one.
fn append(text: &mut String, items: [(Option<u64>, &str, &str); 2], seconds: u32) {
    let (mut digits, mut seconds_digits) = (itoa::Buffer::new(), itoa::Buffer::new());
    let seconds = seconds_digits.format(seconds);
    let mut separator = "";
    for (amount, before, between) in items {
        if let Some(amount) = amount {
            for part in [separator, before, digits.format(amount.min(INTEGER_MAX)), between, seconds] {
                text.push_str(part);
            }
            separator = ", ";
        }
    }
}

/// Where a client stands after a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RateLimitStatus {
    /// What it was counted against.
    pub rates: Rates,
    /// Requests that it could make at once.
    pub requests_left: u64,
    /// Key bytes that it could have at once.
    pub bytes_left: u64,
    /// `None` if the request was admitted; else how long until it would be.
    pub wait: Option<Duration>,
}

impl RateLimitStatus {
    /// Seconds until the request would be admitted, rounded up, for `Retry-After`.
    pub fn retry_after(&self) -> Option<u32> {
        self.wait.map(|wait| u32::try_from(wait.as_nanos().div_ceil(SECOND)).unwrap_or(u32::MAX).max(1))
    }

    /// Appends the value of `RateLimit` (the same draft, section 4). A client that takes no more than `r` within `t`
    /// seconds is not refused; since `t` is the time in which all of `r` would be earned, the ratio of both never exceeds the rate,
    /// as section 6 wants it. Of a refusal, `t` is what `Retry-After` says.
    pub fn append_field(&self, text: &mut String) {
        let window = self.retry_after().unwrap_or(self.rates.burst);
        let requests = self.rates.requests.map(|_| self.requests_left);
        let bytes = self.rates.bytes.map(|_| self.bytes_left);
        append(text, [(requests, "\"requests\";r=", ";t="), (bytes, "\"bytes\";r=", ";t=")], window);
    }
}

/// What every client has taken, for at most [`CLIENTS_MAX`] of them, in about 2 MiB.
///
/// A newcomer that finds no free place takes over the one of the client that is closest to having paid, *and its debt*, up
/// to one burst. So no client gets more than its rate by having another one's entry or its own pushed out, however many
/// addresses it has (the counters only ever err upwards, as those of the Space-Saving algorithm do). The price: while more
/// clients than there are places are in debt, some of them share what one of them may have.
///
/// Only a key larger than the burst makes a debt above one burst. A newcomer does not inherit that part: it never took such
/// a key, and could wait for hours. A client that did take one, and whose entry was pushed out since, owes one burst then.
#[derive(Debug)]
pub struct RateLimiter {
    sets: Box<[Mutex<[Entry; WAYS]>]>,
    /// Keyed at random, so that nobody can choose whom it competes with.
    hasher: RandomState,
    start: Instant,
}

/// When a client will have paid, in nanoseconds since the table's start.
#[derive(Debug, Clone, Copy, Default)]
struct Entry {
    client: Option<Client>,
    requests: u64,
    bytes: u64,
}

impl Entry {
    fn debt(&self) -> u64 {
        self.requests.max(self.bytes)
    }
}

impl RateLimiter {
    /// An empty table, all of whose memory is taken now.
    pub fn new(start: Instant) -> Self {
        Self::with_sets(CLIENTS_MAX / WAYS, start)
    }

    fn with_sets(sets: usize, start: Instant) -> Self {
        Self { sets: (0..sets).map(|_| Mutex::default()).collect(), hasher: RandomState::new(), start }
    }

    /// Asks for one request of `bytes` key bytes, and charges it if it is admitted.
    ///
    /// A request larger than what a client can save up is admitted once the client has saved up all it can, and is paid
    /// in full afterwards. A refused one costs nothing.
    pub fn ask(&self, client: Client, rates: &Rates, bytes: u64, now: Instant) -> RateLimitStatus {
        let now = u64::try_from(now.saturating_duration_since(self.start).as_nanos()).unwrap_or(u64::MAX);
        let set = usize::try_from(self.hasher.hash_one(client) % self.sets.len() as u64).unwrap_or(0);
        // What a panic elsewhere could leave behind is an entry, and any entry is sound.
        let mut set = self.sets[set].lock().unwrap_or_else(PoisonError::into_inner);
        let tolerance = rates.tolerance();
        let entry = place(&mut set, client, now.saturating_add(tolerance));
        let wait = wait(rates.requests, entry.requests, 1, tolerance, now).max(wait(
            rates.bytes,
            entry.bytes,
            bytes,
            tolerance,
            now,
        ));
        if wait == 0 {
            charge(rates.requests, &mut entry.requests, 1, now);
            charge(rates.bytes, &mut entry.bytes, bytes, now);
        }
        RateLimitStatus {
            rates: *rates,
            requests_left: left(rates.requests, entry.requests, tolerance, now),
            bytes_left: left(rates.bytes, entry.bytes, tolerance, now),
            wait: (wait > 0).then_some(Duration::from_nanos(wait)),
        }
    }
}

/// The entry of `client`: its own, else that of the client with the least debt, which it takes over, but none of what is
/// to be paid after `latest`. Before `latest`, the least debt of a set never falls: that is why a client which comes back
/// finds the debt that it left, or one burst.
fn place(set: &mut [Entry; WAYS], client: Client, latest: u64) -> &mut Entry {
    let own = set.iter().position(|entry| entry.client == Some(client));
    let place = own.unwrap_or_else(|| {
        let least = (0..WAYS).min_by_key(|place| set[*place].debt()).unwrap_or(0);
        let debt = set[least].debt().min(latest);
        set[least] = Entry { client: Some(client), requests: debt, bytes: debt };
        least
    });
    &mut set[place]
}

/// Nanoseconds until `amount` may be had; 0 is now.
fn wait(rate: Option<NonZeroU64>, paid_at: u64, amount: u64, tolerance: u64, now: u64) -> u64 {
    let Some(rate) = rate else { return 0 };
    let ahead = paid_at.saturating_sub(now);
    ahead.saturating_add(cost(rate, amount).min(tolerance)).saturating_sub(tolerance)
}

fn charge(rate: Option<NonZeroU64>, paid_at: &mut u64, amount: u64, now: u64) {
    if let Some(rate) = rate {
        *paid_at = (*paid_at).max(now).saturating_add(cost(rate, amount));
    }
}

/// How many units could be had at once.
fn left(rate: Option<NonZeroU64>, paid_at: u64, tolerance: u64, now: u64) -> u64 {
    let rate = rate.map_or(0, NonZeroU64::get);
    let saved = tolerance.saturating_sub(paid_at.saturating_sub(now));
    u64::try_from(u128::from(saved) * u128::from(rate) / SECOND).unwrap_or(u64::MAX)
}

/// The nanoseconds in which `amount` is earned, rounded up.
fn cost(rate: NonZeroU64, amount: u64) -> u64 {
    u64::try_from((u128::from(amount) * SECOND).div_ceil(u128::from(rate.get()))).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn rates(requests: u64, bytes: u64, burst: u32) -> Rates {
        Rates { requests: NonZeroU64::new(requests), bytes: NonZeroU64::new(bytes), burst }
    }

    const ONE: Client = Client::V4(1);

    #[test]
    fn a_client_gets_its_burst_at_once_and_its_rate_from_then_on() {
        let start = Instant::now();
        let table = RateLimiter::new(start);
        let rates = rates(4, 0, 3);
        for left in (0..12).rev() {
            let standing = table.ask(ONE, &rates, 32, start);
            assert_eq!((standing.wait, standing.requests_left), (None, left));
        }
        let refused = table.ask(ONE, &rates, 32, start);
        assert_eq!(refused.wait, Some(Duration::from_millis(250)));
        assert_eq!(refused.retry_after(), Some(1), "rounded up");
        assert_eq!(table.ask(ONE, &rates, 32, start).wait, refused.wait, "a refusal costs nothing");
        let almost = start + Duration::from_millis(249);
        assert!(table.ask(ONE, &rates, 32, almost).wait.is_some());
        let then = start + Duration::from_millis(250);
        assert_eq!(table.ask(ONE, &rates, 32, then).wait, None);
        assert!(table.ask(ONE, &rates, 32, then).wait.is_some(), "one, not more");
        assert_eq!(table.ask(Client::V4(2), &rates, 32, then).wait, None, "others have their own");
        // However long it was idle, it has not saved up more than its burst.
        let later = start + Duration::from_secs(86_400);
        let served = (0..100).filter(|_| table.ask(ONE, &rates, 32, later).wait.is_none()).count();
        assert_eq!(served, 12);
    }

    #[test]
    fn a_key_larger_than_the_burst_waits_for_all_of_it_and_is_paid_in_full() {
        let start = Instant::now();
        let table = RateLimiter::new(start);
        let rates = rates(0, 100, 2);
        let large = table.ask(ONE, &rates, 1000, start);
        assert_eq!((large.wait, large.bytes_left), (None, 0));
        let next = table.ask(ONE, &rates, 1, start + Duration::from_secs(7));
        assert_eq!(next.wait, Some(Duration::from_millis(1010)), "it took 10 seconds' worth with 2 in hand");
        assert_eq!(next.retry_after(), Some(2));
        assert_eq!(table.ask(ONE, &rates, 200, start + Duration::from_secs(10)).wait, None);
    }

    #[test]
    fn either_bound_refuses_and_then_neither_is_charged() {
        let start = Instant::now();
        let table = RateLimiter::new(start);
        let rates = rates(10, 100, 1);
        assert_eq!(table.ask(ONE, &rates, 100, start).wait, None);
        assert!(table.ask(ONE, &rates, 1, start).wait.is_some());
        assert_eq!(table.ask(ONE, &rates, 1, start).requests_left, 9);
    }

    #[test]
    fn a_standing_is_written_as_the_draft_has_it() {
        let start = Instant::now();
        let table = RateLimiter::new(start);
        let both = rates(5, 1000, 10);
        let written = |append: &dyn Fn(&mut String)| {
            let mut text = String::new();
            append(&mut text);
            text
        };
        let policy = |rates: &Rates| written(&|text| rates.append_policy(text));
        let field = |standing: &RateLimitStatus| written(&|text| standing.append_field(text));
        assert_eq!(policy(&both), r#""requests";q=50;w=10, "bytes";q=10000;qu="content-bytes";w=10"#);
        let standing = table.ask(ONE, &both, 400, start);
        assert_eq!(field(&standing), r#""requests";r=49;t=10, "bytes";r=9600;t=10"#);
        let refused = table.ask(ONE, &both, 9700, start);
        assert_eq!(field(&refused), r#""requests";r=49;t=1, "bytes";r=9600;t=1"#);
        assert_eq!(policy(&rates(5, 0, 10)), r#""requests";q=50;w=10"#);
    }

    #[test]
    fn the_table_takes_no_more_memory_than_was_promised() {
        let table = RateLimiter::new(Instant::now());
        assert_eq!(table.sets.len() * WAYS, CLIENTS_MAX);
        let bytes = table.sets.len() * size_of::<Mutex<[Entry; WAYS]>>();
        assert!(bytes <= 3 << 20, "{bytes}"); // the documents say about 2 MiB
    }

    #[test]
    fn a_flood_of_addresses_frees_nobody_of_its_debt() {
        let start = Instant::now();
        let table = RateLimiter::new(start);
        let rates = rates(1, 0, 10);
        while table.ask(ONE, &rates, 32, start).wait.is_none() {}
        for address in 2..1_000_000 {
            table.ask(Client::V4(address), &rates, 32, start);
        }
        assert!(table.ask(ONE, &rates, 32, start).wait.is_some(), "it is remembered, or took over as much");
        let later = start + Duration::from_secs(1000);
        assert_eq!(table.ask(ONE, &rates, 32, later).wait, None, "and is free once the flood is over");
    }

    #[test]
    fn a_flood_of_large_keys_keeps_new_clients_waiting_for_a_burst_at_most() {
        let start = Instant::now();
        let table = RateLimiter::new(start);
        let rates = rates(0, 1024, 10);
        for address in 0..131_072 {
            table.ask(Client::V4(address), &rates, 65_536, start); // 64 seconds' worth
        }
        let newcomers = 0xc000_0200..0xc000_02c8;
        let second = start + Duration::from_secs(1);
        let ask_all = |bytes, now| {
            let ask = |address| table.ask(Client::V4(address), &rates, bytes, now).retry_after();
            newcomers.clone().filter_map(ask).collect::<Vec<_>>()
        };
        let refused = ask_all(32, start);
        assert!(refused.iter().all(|seconds| *seconds == 1), "{refused:?}");
        assert_eq!(ask_all(32, second), [0; 0], "and are served then");
        let refused = ask_all(1 << 20, second);
        assert!(refused.iter().all(|seconds| *seconds <= 10), "a key of any size: {refused:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Beyond the burst or the seconds that the largest key is worth, whichever is more, nobody waits.
        #[test]
        fn a_wait_is_bounded(asked in proptest::collection::vec((0u32..20, 0u64..30_000, 0u64..9), 1..200)) {
            let start = Instant::now();
            let table = RateLimiter::with_sets(1, start);
            let rates = rates(3, 1000, 2);
            let (mut known, mut now) = (std::collections::HashSet::new(), start);
            for (client, bytes, step) in asked {
                now += Duration::from_secs(step);
                let wait = table.ask(Client::V4(client), &rates, bytes, now).retry_after().unwrap_or(0);
                let most = if known.insert(client) { 2 } else { 30 };
                prop_assert!(wait <= most, "{wait}");
            }
        }

        /// Against a model without a bound: what the table admits, the model admits. Twenty clients in one set of eight
        /// push each other out all the time. No key is larger than the burst, beyond which a debt is not inherited.
        #[test]
        fn nobody_gets_more_than_an_unbounded_table_would_give(
            asked in proptest::collection::vec((0u32..20, 0u64..3000, 0u64..2_000), 1..400)
        ) {
            let start = Instant::now();
            let table = RateLimiter::with_sets(1, start);
            let rates = rates(3, 1000, 2);
            let mut model: HashMap<u32, (u64, u64)> = HashMap::new();
            let mut now = 0;
            for (client, bytes, step) in asked {
                now += step * 100_000;
                let standing = table.ask(Client::V4(client), &rates, bytes, start + Duration::from_nanos(now));
                let (requests, sent) = model.entry(client).or_default();
                if standing.wait.is_none() {
                    let tolerance = rates.tolerance();
                    prop_assert_eq!(wait(rates.requests, *requests, 1, tolerance, now), 0);
                    prop_assert_eq!(wait(rates.bytes, *sent, bytes, tolerance, now), 0);
                    charge(rates.requests, requests, 1, now);
                    charge(rates.bytes, sent, bytes, now);
                }
            }
        }
    }
}
