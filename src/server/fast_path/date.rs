//! The `Date` header of responses.

use std::cell::Cell;
use std::io::Write;
use std::time::SystemTime;

use crate::telemetry::clock::{Nanos, SECOND};

/// The header line with the current time in the format of RFC 9110 section 5.6.7. `now` is the monotonic time of a moment ago. Each thread
/// reads the clock and formats it once a second, so a step of the clock shows within a second.
pub(super) fn date_line(now: Nanos) -> [u8; 37] {
    thread_local! {
        /// The line, and when it expires.
        static CACHED: Cell<(Nanos, [u8; 37])> = const { Cell::new((0, [0; 37])) };
    }
    let (expiry, line) = CACHED.get();
    if now < expiry {
        return line;
    }
    let time = SystemTime::now();
    let second = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().subsec_nanos();
    let mut line = *b"date: Thu, 01 Jan 1970 00:00:00 GMT\r\n";
    write!(&mut line[6..], "{}", httpdate::HttpDate::from(time)).expect("an HTTP date has 29 bytes");
    CACHED.set((now + SECOND - Nanos::from(second), line));
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::clock;
    use std::time::Duration;

    #[test]
    fn the_date_follows_rfc_9110_and_changes_each_second() {
        let parsed = |now| {
            let line = String::from_utf8(date_line(now).to_vec()).unwrap();
            let date = line.strip_prefix("date: ").unwrap().strip_suffix("\r\n").unwrap();
            httpdate::parse_http_date(date).unwrap()
        };
        let now = clock::now();
        let first = parsed(now);
        assert!(first.elapsed().is_ok_and(|age| age < Duration::from_secs(2)), "{first:?}");
        assert_eq!(parsed(now), first);
        std::thread::sleep(Duration::from_secs(1));
        assert!(parsed(clock::now()) > first);
    }
}
