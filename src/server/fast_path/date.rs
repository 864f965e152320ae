//! The `Date` header of responses.

use std::cell::RefCell;
use std::io::Write;
use std::time::SystemTime;

use crate::telemetry::clock::{Nanos, SECOND};

/// Appends the end of a head after the value of another header: `Date` with the current time in the format of RFC 9110
/// section 5.6.7, and the empty line. `now` is the monotonic time of a moment ago. Each thread reads the clock and formats
/// it once a second, so a step of the clock shows within a second.
pub(super) fn append_date(now: Nanos, text: &mut Vec<u8>) {
    thread_local! {
        /// The appended lines, and when they expire.
        static CACHED: RefCell<(Nanos, [u8; 41])> =
            const { RefCell::new((0, *b"\r\ndate: Thu, 01 Jan 1970 00:00:00 GMT\r\n\r\n")) };
    }
    CACHED.with_borrow_mut(|(expiry, lines)| {
        if now >= *expiry {
            let time = SystemTime::now();
            let second = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().subsec_nanos();
            write!(&mut lines[8..37], "{}", httpdate::HttpDate::from(time))
                .expect("an HTTP date has 29 bytes");
            *expiry = now + SECOND - Nanos::from(second);
        }
        text.extend_from_slice(lines);
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::clock;
    use std::time::{Duration, SystemTime};

    #[test]
    fn the_date_follows_rfc_9110_and_changes_each_second() {
        let parsed = |now| {
            let mut lines = Vec::new();
            append_date(now, &mut lines);
            let lines = String::from_utf8(lines).unwrap();
            let date = lines.strip_prefix("\r\ndate: ").unwrap().strip_suffix("\r\n\r\n").unwrap();
            httpdate::parse_http_date(date).unwrap()
        };
        let (now, before) = (clock::now(), SystemTime::now());
        let first = parsed(now);
        assert!(first <= SystemTime::now() && before < first + Duration::from_secs(1), "{first:?}");
        assert_eq!(parsed(now), first);
        std::thread::sleep(Duration::from_secs(1));
        assert!(parsed(clock::now()) > first);
    }
}
