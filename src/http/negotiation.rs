//! Content negotiation by `Accept` headers (RFC 9110 section 12.5.1).

use std::iter;

use memchr::memchr;

/// The most offers of a route.
const OFFERS_MAX: usize = 8;

/// The one of `offers` with the largest weight in the `Accept` headers, the first of equals. Without such a header it
/// is the first offer; `None` means that the headers match no offer.
///
/// # Panics
/// If there are more offers than [`OFFERS_MAX`].
pub(crate) fn negotiate<'a, T: Copy>(
    offers: &[T],
    media_type: impl Fn(T) -> &'static str,
    accept: impl IntoIterator<Item = &'a [u8]>,
) -> Option<T> {
    let mut accept = accept.into_iter();
    let values = match (accept.next(), accept.next()) {
        // Without the header, or with the usual one, the first offer is as good as any.
        (None | Some(b"*/*"), None) => return offers.first().copied(),
        (first, second) => first.into_iter().chain(second).chain(accept),
    };
    // Each media type, and the precision and the weight of the range that matches it most precisely.
    let mut types = [(&b""[..], (0, 0)); OFFERS_MAX];
    let types = &mut types[..offers.len()];
    types.iter_mut().zip(offers).for_each(|(found, offer)| found.0 = media_type(*offer).as_bytes());
    for value in values.filter(|value| is_visible(value)) {
        for element in split(value, b',') {
            let (range, parameters) = split_once(element, b';').unwrap_or((element, b""));
            let range = range.trim_ascii();
            let mut weight = None; // parsed if the range matches, which most ranges of a browser do not
            for (media_type, found) in &mut *types {
                let precision = precision(range, media_type);
                if precision > 0
                    && let Some(weight) = *weight.get_or_insert_with(|| parse_weight(parameters))
                {
                    *found = (*found).max((precision, weight));
                }
            }
        }
    }
    let mut best = (None, 0);
    for (offer, (_, (_, weight))) in offers.iter().zip(types) {
        if *weight > best.1 {
            best = (Some(*offer), *weight);
        }
    }
    best.0
}

/// Whether a header's value has only visible characters of ASCII, spaces and tabs.
fn is_visible(value: &[u8]) -> bool {
    // Without an early end, so that the compiler compares many bytes at once.
    value.iter().fold(true, |is_visible, byte| is_visible & matches!(byte, b' '..=b'~' | b'\t'))
}

/// The parts between the separators.
fn split(text: &[u8], separator: u8) -> impl Iterator<Item = &[u8]> {
    let mut rest = Some(text);
    iter::from_fn(move || {
        let (part, after) = match split_once(rest?, separator) {
            Some((part, after)) => (part, Some(after)),
            None => (rest?, None),
        };
        rest = after;
        Some(part)
    })
}

/// What precedes and what follows the first `separator`.
fn split_once(text: &[u8], separator: u8) -> Option<(&[u8], &[u8])> {
    let at = memchr(separator, text)?;
    Some((&text[..at], &text[at + 1..]))
}

/// How precisely a media range without parameters matches `media_type`: 3 by its type, 2 by `type/*`, 1 by `*/*`, 0 if
/// it does not.
#[inline]
fn precision(range: &[u8], media_type: &[u8]) -> u8 {
    match range {
        b"*/*" => 1,
        [main_type @ .., b'/', b'*'] => {
            let found = split_once(media_type, b'/').map(|(found, _)| found);
            if found.is_some_and(|found| found.eq_ignore_ascii_case(main_type)) { 2 } else { 0 }
        }
        _ if range.eq_ignore_ascii_case(media_type) => 3,
        _ => 0,
    }
}

/// The weight among the parameters of a media range, in thousandths. `None` is an invalid one.
fn parse_weight(parameters: &[u8]) -> Option<u16> {
    let mut weight = 1000;
    for (name, value) in split(parameters, b';').filter_map(|parameter| split_once(parameter, b'=')) {
        if name.trim_ascii().eq_ignore_ascii_case(b"q") {
            weight = thousandths(value.trim_ascii())?;
        }
    }
    Some(weight)
}

/// A qvalue (RFC 9110 section 12.4.2) in thousandths: `0` or `1`, with at most three decimals, at most 1.
fn thousandths(text: &[u8]) -> Option<u16> {
    let (whole, decimals) = split_once(text, b'.').unwrap_or((text, b""));
    if !matches!(whole, b"0" | b"1") || decimals.len() > 3 || !decimals.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let digits = whole.iter().chain(decimals).chain(b"000").take(4);
    let value = digits.fold(0, |value, digit| value * 10 + u16::from(digit - b'0'));
    (value <= 1000).then_some(value)
}
