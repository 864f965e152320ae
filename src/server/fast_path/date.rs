//! The `Date` header of responses.

use std::cell::Cell;
use std::io::Write;
use std::time::{Duration, Instant, SystemTime};

/// The time at `now`, which has just been, as RFC 9110 section 5.6.7 writes it. Each thread asks for it and writes it once
/// a second, so a step of the clock shows within one.
pub(super) fn date(now: Instant) -> [u8; 29] {
    thread_local! {
        /// With when it has to be written anew.
        static WRITTEN: Cell<Option<(Instant, [u8; 29])>> = const { Cell::new(None) };
    }
    if let Some((end, date)) = WRITTEN.get()
        && now < end
    {
        return date;
    }
    let time = SystemTime::now();
    let second = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().subsec_nanos();
    let mut date = [0; 29];
    write!(&mut date[..], "{}", httpdate::HttpDate::from(time)).expect("an HTTP date has 29 bytes");
    WRITTEN.set(Some((now + Duration::from_secs(1) - Duration::from_nanos(second.into()), date)));
    date
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_date_is_written_as_rfc_9110_has_it_and_anew_each_second() {
        let read = |now| httpdate::parse_http_date(std::str::from_utf8(&date(now)).unwrap()).unwrap();
        let now = Instant::now();
        let first = read(now);
        assert!(first.elapsed().is_ok_and(|age| age < Duration::from_secs(2)), "{first:?}");
        assert_eq!(read(now), first);
        std::thread::sleep(Duration::from_secs(1));
        assert!(read(Instant::now()) > first);
    }
}
