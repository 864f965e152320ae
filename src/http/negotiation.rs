//! Content negotiation by `Accept` headers (RFC 9110 section 12.5.1).

/// The one of `offers` with the largest weight in the `Accept` headers, the first of equals. Without such a header it
/// is the first offer; `None` means that the headers match no offer.
pub(crate) fn negotiate<'a, T: Copy>(
    offers: &[T],
    media_type: impl Fn(T) -> &'static str,
    accept: impl IntoIterator<Item = &'a [u8]>,
) -> Option<T> {
    let mut accept = accept.into_iter().peekable();
    // Without the header, or with the usual one, the first offer is as good as any.
    while accept.peek().is_some_and(|value| *value == b"*/*") {
        accept.next();
        if accept.peek().is_none() {
            return offers.first().copied();
        }
    }
    if accept.peek().is_none() {
        return offers.first().copied();
    }
    let ranges: Vec<MediaRange<'_>> = accept
        .filter_map(visible_text)
        .flat_map(|value| value.split(','))
        .filter_map(MediaRange::parse)
        .collect();
    let weight = |offer: &T| weight(media_type(*offer), &ranges);
    offers
        .iter()
        .copied()
        .rev() // of equal weights max_by_key returns the last one, which must be the first offer
        .max_by_key(weight)
        .filter(|offer| weight(offer) > 0)
}

/// The text of a header's value; `None` if it has other characters than those of ASCII that are visible, spaces and
/// tabs.
fn visible_text(value: &[u8]) -> Option<&str> {
    let is_visible = |byte: &u8| matches!(byte, b' '..=b'~' | b'\t');
    std::str::from_utf8(value).ok().filter(|text| text.as_bytes().iter().all(is_visible))
}

/// One media range of an `Accept` header.
struct MediaRange<'a> {
    main_type: &'a str,
    subtype: &'a str,
    /// The weight in thousandths.
    weight: u16,
}

impl<'a> MediaRange<'a> {
    /// `None` is an invalid element of the header, which is skipped.
    fn parse(text: &'a str) -> Option<Self> {
        let mut parts = text.split(';').map(str::trim);
        let (main_type, subtype) = parts.next()?.split_once('/')?;
        let mut weight = 1000;
        for parameter in parts {
            let Some((name, value)) = parameter.split_once('=') else {
                continue;
            };
            if name.trim().eq_ignore_ascii_case("q") {
                weight = thousandths(value.trim())?;
            }
        }
        Some(Self { main_type, subtype, weight })
    }

    /// How precisely the range matches `media_type`: 3 by its type, 2 by `type/*`, 1 by `*/*`.
    fn precision(&self, media_type: &str) -> Option<u8> {
        let (main_type, subtype) = media_type.split_once('/').expect("a media type has one slash");
        match (self.main_type, self.subtype) {
            ("*", "*") => Some(1),
            (m, "*") if m.eq_ignore_ascii_case(main_type) => Some(2),
            (m, s) if m.eq_ignore_ascii_case(main_type) && s.eq_ignore_ascii_case(subtype) => Some(3),
            _ => None,
        }
    }
}

/// The weight of the range that matches `media_type` most precisely; 0 if none does.
fn weight(media_type: &str, ranges: &[MediaRange<'_>]) -> u16 {
    ranges
        .iter()
        .filter_map(|range| Some((range.precision(media_type)?, range.weight)))
        .max()
        .map_or(0, |(_, weight)| weight)
}

/// A qvalue (RFC 9110 section 12.4.2) in thousandths: `0` or `1`, with at most three decimals, at most 1.
fn thousandths(text: &str) -> Option<u16> {
    let (whole, decimals) = text.split_once('.').unwrap_or((text, ""));
    if !matches!(whole, "0" | "1") || decimals.len() > 3 || !decimals.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let value: u16 = format!("{whole}{decimals:0<3}").parse().ok()?;
    (value <= 1000).then_some(value)
}
