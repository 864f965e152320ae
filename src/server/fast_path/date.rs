//! The `Date` header of responses.

use std::cell::Cell;
use std::io::Write;
use std::time::{Duration, Instant, SystemTime};

/// The current time in the format of RFC 9110 section 5.6.7. `now` is the monotonic time of a moment ago. Each thread
/// reads the clock and formats it once a second, so a step of the clock shows within a second.
pub(super) fn date(now: Instant) -> [u8; 29] {
    thread_local! {
        /// The formatted time, and when it expires.
        static CACHED: Cell<Option<(Instant, [u8; 29])>> = const { Cell::new(None) };
    }
    if let Some((expiry, date)) = CACHED.get()
        && now < expiry
    {
        return date;
    }
    let time = SystemTime::now();
    let second = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().subsec_nanos();
    let mut date = [0; 29];
    write!(&mut date[..], "{}", httpdate::HttpDate::from(time)).expect("an HTTP date has 29 bytes");
    CACHED.set(Some((now + Duration::from_secs(1) - Duration::from_nanos(second.into()), date)));
    date
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_date_follows_rfc_9110_and_changes_each_second() {
        let parsed = |now| httpdate::parse_http_date(std::str::from_utf8(&date(now)).unwrap()).unwrap();
        let now = Instant::now();
        let first = parsed(now);
        assert!(first.elapsed().is_ok_and(|age| age < Duration::from_secs(2)), "{first:?}");
        assert_eq!(parsed(now), first);
        std::thread::sleep(Duration::from_secs(1));
        assert!(parsed(Instant::now()) > first);
    }
}
