//! Rate limits on requests and key bytes per client, in a table of fixed size.
//!
//! The algorithm is GCRA (generic cell rate algorithm), the continuous form of a token bucket. It keeps one instant per
//! client and rate, the theoretical arrival time (TAT): when the rate will have made up for all that the client took. A
//! crate such as `governor` does the same in a map that grows with every new client (its issue 171), which a limit must
//! not do.

use std::hash::{BuildHasher, RandomState};
use std::num::NonZeroU64;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::access::peer::Client;

/// Slots in the table: no more clients are counted separately.
const CLIENTS_MAX: usize = 65_536;

/// Slots per set. The clients of a set share a lock and compete for its slots.
const WAYS: usize = 8;

const NANOS_PER_SECOND: u64 = 1_000_000_000;

/// The rates of a client. The default is unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rates {
    /// Requests per second.
    pub requests: Option<NonZeroU64>,
    /// Key bytes per second.
    pub bytes: Option<NonZeroU64>,
    /// Burst size in seconds of both rates: what an idle client may take at once. At least 1.
    pub burst: u32,
}

impl Rates {
    /// Whether neither rate is limited.
    pub fn are_unlimited(&self) -> bool {
        self.requests.is_none() && self.bytes.is_none()
    }

    /// The value of the `RateLimit-Policy` header (draft-ietf-httpapi-ratelimit-headers-11, section 3).
    fn policy(&self) -> String {
        let quota = |rate: NonZeroU64| rate.get().saturating_mul(self.burst.into());
        let [requests, bytes] = [self.requests, self.bytes].map(|rate| rate.map(quota));
        let mut text = String::new();
        let bytes = (bytes, "\"bytes\";q=", ";qu=\"content-bytes\";w=");
        append_list(&mut text, [(requests, "\"requests\";q=", ";w="), bytes], self.burst);
        text
    }

    /// The burst capacity in nanoseconds: how far a client's TAT may be ahead of now.
    fn burst_capacity(&self) -> u64 {
        u64::from(self.burst) * NANOS_PER_SECOND
    }
}

/// Rates that are limited, and the header that announces them: it is in every response, so it is written once.
#[derive(Debug, PartialEq, Eq)]
pub struct RatePolicy {
    rates: Rates,
    text: String,
}

impl RatePolicy {
    /// The policy of `rates`; `None` if they are unlimited.
    pub(crate) fn new(rates: Rates) -> Option<Arc<Self>> {
        (!rates.are_unlimited()).then(|| Arc::new(Self { rates, text: rates.policy() }))
    }

    /// Appends the value of the `RateLimit-Policy` header.
    pub fn append_policy(&self, text: &mut String) {
        text.push_str(&self.text);
    }
}

impl Deref for RatePolicy {
    type Target = Rates;

    fn deref(&self) -> &Rates {
        &self.rates
    }
}

/// The largest integer of a structured field: 15 digits (RFC 9651 section 3.3.1).
const INTEGER_MAX: u64 = 999_999_999_999_999;

/// Appends a list with one item per amount: the text before the amount, the amount, the text after it, and `seconds`.
/// `format!` took more instructions for it than the rest of the response.
fn append_list(text: &mut String, items: [(Option<u64>, &str, &str); 2], seconds: u32) {
    let (mut digits, mut seconds_digits) = (itoa::Buffer::new(), itoa::Buffer::new());
    let seconds = seconds_digits.format(seconds);
    let mut separator = "";
    for (amount, before, after) in items {
        if let Some(amount) = amount {
            for part in [separator, before, digits.format(amount.min(INTEGER_MAX)), after, seconds] {
                text.push_str(part);
            }
            separator = ", ";
        }
    }
}

/// A client's status after a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RateLimitStatus {
    /// The rates that apply to the client.
    pub rates: Arc<RatePolicy>,
    /// Requests that the client could make at once.
    pub requests_remaining: u64,
    /// Key bytes that the client could get at once.
    pub bytes_remaining: u64,
    /// `None` if the request is within the rates; else the time until it would be.
    pub wait: Option<Duration>,
}

impl RateLimitStatus {
    /// Seconds until the request would be within the rates, rounded up, for `Retry-After`.
    pub fn retry_after(&self) -> Option<u32> {
        self.wait.map(|wait| {
            u32::try_from(wait.as_nanos().div_ceil(NANOS_PER_SECOND.into())).unwrap_or(u32::MAX).max(1)
        })
    }

    /// Appends the value of the `RateLimit` header (the same draft, section 4). A client that takes no more than `r`
    /// within `t` seconds is not refused. Since `t` is the time in which all of `r` is replenished, `r / t` never
    /// exceeds the rate, as section 6 requires. In a 429, `t` equals `Retry-After`.
    pub fn append_status(&self, text: &mut String) {
        let window = self.retry_after().unwrap_or(self.rates.burst);
        let requests = self.rates.requests.map(|_| self.requests_remaining);
        let bytes = self.rates.bytes.map(|_| self.bytes_remaining);
        append_list(text, [(requests, "\"requests\";r=", ";t="), (bytes, "\"bytes\";r=", ";t=")], window);
    }
}

/// The rate limiter: what at most 65,536 clients have taken, in about 2 MiB.
///
/// A new client that finds no free slot takes over the slot with the earliest TAT of its set, *and that TAT*, up to one
/// burst ahead of now. So no client exceeds its rates by taking over a slot or by losing its own, however many
/// addresses it has: as in the Space-Saving algorithm, the counters err only upwards. The cost: while more than eight
/// clients of a set have used part of their burst, two of them share the rates of one client. Of 2,000 such clients in
/// the table, nine are in one set with a probability of 2⁻²⁴, of 10,000 with one of 5 %, and of 20,000 eight sets have nine
/// or more in the mean.
///
/// Only a key larger than the burst moves a TAT more than one burst ahead. A new client does not inherit that part: it
/// never requested such a key, and could wait for hours. If a client did, and its slot is taken over, its TAT is then
/// at most one burst ahead.
#[derive(Debug)]
pub(crate) struct RateLimiter {
    sets: Box<[Mutex<[Slot; WAYS]>]>,
    /// Keyed at random, so that no client can choose which others are in its set.
    hasher: RandomState,
    start: Instant,
}

/// The TATs of a client, in nanoseconds since the limiter's start.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    client: Option<Client>,
    requests_tat: u64,
    bytes_tat: u64,
}

impl Slot {
    fn latest_tat(&self) -> u64 {
        self.requests_tat.max(self.bytes_tat)
    }
}

impl RateLimiter {
    /// A limiter without clients. All of its memory is allocated now.
    pub(crate) fn new(start: Instant) -> Self {
        Self::with_sets(CLIENTS_MAX / WAYS, start)
    }

    fn with_sets(sets: usize, start: Instant) -> Self {
        Self { sets: (0..sets).map(|_| Mutex::default()).collect(), hasher: RandomState::new(), start }
    }

    /// Checks one request of `bytes` key bytes, and counts it if it is within the rates. A refused request costs
    /// nothing.
    ///
    /// A request larger than the burst capacity is within the rates if the client has its full burst; then all of its
    /// bytes count.
    pub(crate) fn check(
        &self,
        client: Client,
        rates: &Arc<RatePolicy>,
        bytes: u64,
        now: Instant,
    ) -> RateLimitStatus {
        let now = u64::try_from(now.saturating_duration_since(self.start).as_nanos()).unwrap_or(u64::MAX);
        let set = usize::try_from(self.hasher.hash_one(client) % self.sets.len() as u64).unwrap_or(0);
        // A panic in another thread may have left any TATs behind, and every TAT is valid.
        let mut set = self.sets[set].lock().unwrap_or_else(PoisonError::into_inner);
        let capacity = rates.burst_capacity();
        let slot = slot(&mut set, client, now.saturating_add(capacity));
        let (requests_time, bytes_time) =
            (emission_time(rates.requests, 1), emission_time(rates.bytes, bytes));
        let requests_wait = wait(slot.requests_tat, requests_time, capacity, now);
        let bytes_wait = wait(slot.bytes_tat, bytes_time, capacity, now);
        let wait = requests_wait.max(bytes_wait);
        if wait == 0 {
            advance(&mut slot.requests_tat, requests_time, now);
            advance(&mut slot.bytes_tat, bytes_time, now);
        }
        RateLimitStatus {
            rates: Arc::clone(rates),
            requests_remaining: remaining(rates.requests, slot.requests_tat, capacity, now),
            bytes_remaining: remaining(rates.bytes, slot.bytes_tat, capacity, now),
            wait: (wait > 0).then_some(Duration::from_nanos(wait)),
        }
    }
}

/// The slot of `client`: its own, else the slot with the earliest TAT, taken over with that TAT or `latest`, whichever
/// is earlier. Up to `latest`, the earliest TAT of a set never decreases. So a client that lost its slot and returns
/// finds at least the TAT that it left, or `latest`.
fn slot(set: &mut [Slot; WAYS], client: Client, latest: u64) -> &mut Slot {
    let own = set.iter().position(|slot| slot.client == Some(client));
    let index = own.unwrap_or_else(|| {
        let earliest = (0..WAYS).min_by_key(|index| set[*index].latest_tat()).unwrap_or(0);
        let tat = set[earliest].latest_tat().min(latest);
        set[earliest] = Slot { client: Some(client), requests_tat: tat, bytes_tat: tat };
        earliest
    });
    &mut set[index]
}

/// Nanoseconds until a request that takes `time` is within the rate; 0 means now, and is the answer without a rate.
fn wait(tat: u64, time: Option<u64>, capacity: u64, now: u64) -> u64 {
    let Some(time) = time else { return 0 };
    let ahead = tat.saturating_sub(now);
    ahead.saturating_add(time.min(capacity)).saturating_sub(capacity)
}

/// Moves the TAT on by `time`, if there is a rate.
fn advance(tat: &mut u64, time: Option<u64>, now: u64) {
    if let Some(time) = time {
        *tat = (*tat).max(now).saturating_add(time);
    }
}

/// How many units the client could take at once.
fn remaining(rate: Option<NonZeroU64>, tat: u64, capacity: u64, now: u64) -> u64 {
    let rate = rate.map_or(0, NonZeroU64::get);
    let unused = capacity.saturating_sub(tat.saturating_sub(now));
    // The division of 128-bit numbers is a function of several hundred instructions; few products need it.
    match unused.checked_mul(rate) {
        Some(product) => product / NANOS_PER_SECOND,
        None => u64::try_from(u128::from(unused) * u128::from(rate) / u128::from(NANOS_PER_SECOND))
            .unwrap_or(u64::MAX),
    }
}

/// Nanoseconds in which the rate yields `amount`, rounded up: that many of GCRA's emission intervals. `None` without a
/// rate.
fn emission_time(rate: Option<NonZeroU64>, amount: u64) -> Option<u64> {
    let rate = rate?.get();
    Some(match amount.checked_mul(NANOS_PER_SECOND) {
        Some(product) => product.div_ceil(rate),
        None => u64::try_from((u128::from(amount) * u128::from(NANOS_PER_SECOND)).div_ceil(u128::from(rate)))
            .unwrap_or(u64::MAX),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::HashMap;

    fn rates(requests: u64, bytes: u64, burst: u32) -> Arc<RatePolicy> {
        let (requests, bytes) = (NonZeroU64::new(requests), NonZeroU64::new(bytes));
        RatePolicy::new(Rates { requests, bytes, burst }).unwrap()
    }

    const ONE: Client = Client::V4(1);

    #[test]
    fn a_client_gets_its_burst_at_once_and_then_its_rate() {
        let start = Instant::now();
        let limiter = RateLimiter::new(start);
        let rates = rates(4, 0, 3);
        for left in (0..12).rev() {
            let status = limiter.check(ONE, &rates, 32, start);
            assert_eq!((status.wait, status.requests_remaining), (None, left));
        }
        let refused = limiter.check(ONE, &rates, 32, start);
        assert_eq!(refused.wait, Some(Duration::from_millis(250)));
        assert_eq!(refused.retry_after(), Some(1), "rounded up");
        assert_eq!(limiter.check(ONE, &rates, 32, start).wait, refused.wait, "a refusal costs nothing");
        let almost = start + Duration::from_millis(249);
        assert!(limiter.check(ONE, &rates, 32, almost).wait.is_some());
        let then = start + Duration::from_millis(250);
        assert_eq!(limiter.check(ONE, &rates, 32, then).wait, None);
        assert!(limiter.check(ONE, &rates, 32, then).wait.is_some(), "only one");
        assert_eq!(
            limiter.check(Client::V4(2), &rates, 32, then).wait,
            None,
            "another client has its own rate"
        );
        // However long a client is idle, it gets no more than its burst at once.
        let later = start + Duration::from_secs(86_400);
        let served = (0..100).filter(|_| limiter.check(ONE, &rates, 32, later).wait.is_none()).count();
        assert_eq!(served, 12);
    }

    #[test]
    fn a_key_above_the_burst_needs_all_of_it_and_counts_in_full() {
        let start = Instant::now();
        let limiter = RateLimiter::new(start);
        let rates = rates(0, 100, 2);
        let large = limiter.check(ONE, &rates, 1000, start);
        assert_eq!((large.wait, large.bytes_remaining), (None, 0));
        let next = limiter.check(ONE, &rates, 1, start + Duration::from_secs(7));
        assert_eq!(
            next.wait,
            Some(Duration::from_millis(1010)),
            "it took 10 seconds' worth with a burst of 2"
        );
        assert_eq!(next.retry_after(), Some(2));
        assert_eq!(limiter.check(ONE, &rates, 200, start + Duration::from_secs(10)).wait, None);
    }

    #[test]
    fn a_request_over_one_rate_counts_for_neither() {
        let start = Instant::now();
        let limiter = RateLimiter::new(start);
        let rates = rates(10, 100, 1);
        assert_eq!(limiter.check(ONE, &rates, 100, start).wait, None);
        assert!(limiter.check(ONE, &rates, 1, start).wait.is_some());
        assert_eq!(limiter.check(ONE, &rates, 1, start).requests_remaining, 9);
    }

    #[test]
    fn a_status_is_written_as_the_draft_specifies() {
        let start = Instant::now();
        let limiter = RateLimiter::new(start);
        let both = rates(5, 1000, 10);
        let written = |append: &dyn Fn(&mut String)| {
            let mut text = String::new();
            append(&mut text);
            text
        };
        let policy = |rates: &RatePolicy| written(&|text| rates.append_policy(text));
        let limit = |status: &RateLimitStatus| written(&|text| status.append_status(text));
        assert_eq!(policy(&both), r#""requests";q=50;w=10, "bytes";q=10000;qu="content-bytes";w=10"#);
        let status = limiter.check(ONE, &both, 400, start);
        assert_eq!(limit(&status), r#""requests";r=49;t=10, "bytes";r=9600;t=10"#);
        let refused = limiter.check(ONE, &both, 9700, start);
        assert_eq!(limit(&refused), r#""requests";r=49;t=1, "bytes";r=9600;t=1"#);
        assert_eq!(policy(&rates(5, 0, 10)), r#""requests";q=50;w=10"#);
    }

    #[test]
    fn the_table_uses_the_documented_memory() {
        let limiter = RateLimiter::new(Instant::now());
        assert_eq!(limiter.sets.len() * WAYS, CLIENTS_MAX);
        let bytes = limiter.sets.len() * size_of::<Mutex<[Slot; WAYS]>>();
        assert!(bytes <= 3 << 20, "{bytes}"); // the docs say about 2 MiB
    }

    #[test]
    fn a_flood_of_addresses_resets_no_rate_limit() {
        let start = Instant::now();
        let limiter = RateLimiter::new(start);
        let rates = rates(1, 0, 10);
        while limiter.check(ONE, &rates, 32, start).wait.is_none() {}
        for address in 2..1_000_000 {
            limiter.check(Client::V4(address), &rates, 32, start);
        }
        assert!(
            limiter.check(ONE, &rates, 32, start).wait.is_some(),
            "the client keeps its slot, or takes over one with as late a TAT"
        );
        let later = start + Duration::from_secs(1000);
        assert_eq!(
            limiter.check(ONE, &rates, 32, later).wait,
            None,
            "the client is served once the flood is over"
        );
    }

    #[test]
    fn a_flood_of_large_keys_delays_new_clients_by_one_burst() {
        let start = Instant::now();
        let limiter = RateLimiter::new(start);
        let rates = rates(0, 1024, 10);
        for address in 0..131_072 {
            limiter.check(Client::V4(address), &rates, 65_536, start); // 64 seconds' worth
        }
        let new_clients = 0xc000_0200..0xc000_02c8;
        let second = start + Duration::from_secs(1);
        let check_all = |bytes, now| {
            let check = |address| limiter.check(Client::V4(address), &rates, bytes, now).retry_after();
            new_clients.clone().filter_map(check).collect::<Vec<_>>()
        };
        let refused = check_all(32, start);
        assert!(refused.iter().all(|seconds| *seconds == 1), "{refused:?}");
        assert_eq!(check_all(32, second), [0; 0], "they are served after that second");
        let refused = check_all(1 << 20, second);
        assert!(refused.iter().all(|seconds| *seconds <= 10), "a key of any size: {refused:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// No client waits longer than the burst or the seconds that the largest key takes, whichever is more.
        #[test]
        fn a_wait_is_limited(requests in proptest::collection::vec((0u32..20, 0u64..30_000, 0u64..9), 1..200)) {
            let start = Instant::now();
            let limiter = RateLimiter::with_sets(1, start);
            let rates = rates(3, 1000, 2);
            let (mut known, mut now) = (std::collections::HashSet::new(), start);
            for (client, bytes, step) in requests {
                now += Duration::from_secs(step);
                let wait = limiter.check(Client::V4(client), &rates, bytes, now).retry_after().unwrap_or(0);
                let most = if known.insert(client) { 2 } else { 30 };
                prop_assert!(wait <= most, "{wait}");
            }
        }

        /// Compared with a model of unlimited size: what the limiter admits, the model admits. Twenty clients compete
        /// for one set of eight slots. No key is larger than the burst, since a slot that is taken over loses what is
        /// beyond it.
        #[test]
        fn no_client_gets_more_than_from_an_unlimited_table(
            requests in proptest::collection::vec((0u32..20, 0u64..=2000, 0u64..2_000), 1..400)
        ) {
            let start = Instant::now();
            let limiter = RateLimiter::with_sets(1, start);
            let rates = rates(3, 1000, 2);
            let mut model: HashMap<u32, (u64, u64)> = HashMap::new();
            let mut now = 0;
            for (client, bytes, step) in requests {
                now += step * 100_000;
                let status = limiter.check(Client::V4(client), &rates, bytes, start + Duration::from_nanos(now));
                let (requests_tat, bytes_tat) = model.entry(client).or_default();
                if status.wait.is_none() {
                    let capacity = rates.burst_capacity();
                    let times = (emission_time(rates.requests, 1), emission_time(rates.bytes, bytes));
                    prop_assert_eq!(wait(*requests_tat, times.0, capacity, now), 0);
                    prop_assert_eq!(wait(*bytes_tat, times.1, capacity, now), 0);
                    advance(requests_tat, times.0, now);
                    advance(bytes_tat, times.1, now);
                }
            }
        }
    }
}
