//! Content negotiation, compared with an independent implementation of RFC 9110 section 12.5.1. The first line of an
//! input is the query; each further line is an `Accept` header.

#![no_main]

use http::HeaderValue;
use key_service::http::query::{KeyRequest, ParamError};
use key_service::keys::format::{Format, Kind};
use key_service::keys::key_spec::COUNT_MAX;
use key_service::keys::password::Alphabet;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut lines = input.split(|byte| *byte == b'\n');
    let query = lines.next().unwrap_or_default();
    let Ok(query) = std::str::from_utf8(query) else { return };
    let query = (!query.is_empty()).then_some(query);
    let accept_headers: Vec<HeaderValue> =
        lines.filter_map(|line| HeaderValue::from_bytes(line).ok()).collect();
    for kind in [Kind::Key, Kind::Password(Alphabet::default())] {
        let found = KeyRequest::parse(
            kind,
            query.map(str::as_bytes),
            accept_headers.iter().map(HeaderValue::as_bytes),
        );
        match query {
            // `expected` does not decode escapes, so only check that the result is in range.
            Some(query) if query.contains(['%', '+']) => {
                if let Ok(key_request) = found {
                    assert!(kind.formats().contains(&key_request.format), "{query}");
                    assert!(
                        key_request.count.is_none_or(|count| (1..=COUNT_MAX).contains(&count)),
                        "{query}"
                    );
                }
            }
            query => {
                assert_eq!(
                    found,
                    expected(kind, query.unwrap_or_default(), &accept_headers),
                    "{query:?} {accept_headers:?}"
                )
            }
        }
    }
});

fn expected(kind: Kind, query: &str, accept_headers: &[HeaderValue]) -> Result<KeyRequest, ParamError> {
    let (mut format, mut count, mut password) = (None, None, None);
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let is_second = match name {
            "format" => {
                let known = kind.formats().iter().find(|format| format.name() == value);
                format.replace(*known.ok_or(ParamError::UnknownFormat(shortened(value)))?).is_some()
            }
            "count" => {
                let is_number = value.bytes().all(|byte| byte.is_ascii_digit()) && !value.starts_with('0');
                let number = value.parse().ok().filter(|number| is_number && *number <= COUNT_MAX);
                count.replace(number.ok_or(ParamError::InvalidCount(shortened(value)))?).is_some()
            }
            "alphabet" if kind != Kind::Key => {
                let known = Alphabet::ALL.into_iter().find(|alphabet| alphabet.name() == value);
                password
                    .replace(Kind::Password(known.ok_or(ParamError::UnknownAlphabet(shortened(value)))?))
                    .is_some()
            }
            _ => return Err(ParamError::UnknownParameter(shortened(name))),
        };
        if is_second {
            return Err(ParamError::RepeatedParameter(shortened(name)));
        }
    }
    let is_batch = count.is_some();
    let format = match format {
        Some(format) => format,
        None => negotiated(kind, accept_headers, is_batch).ok_or(ParamError::NotAcceptable { is_batch })?,
    };
    Ok(KeyRequest { kind: password.unwrap_or(kind), format, count })
}

/// The text as an error repeats it.
fn shortened(text: &str) -> String {
    let start: String = text.chars().take(64).collect();
    if start == text { start } else { start + "…" }
}

/// The format with the greatest weight above 0, and the first of several with that weight. A format has the weight of
/// the most specific range that matches it.
fn negotiated(kind: Kind, accept_headers: &[HeaderValue], is_batch: bool) -> Option<Format> {
    if accept_headers.is_empty() {
        return Some(kind.formats()[0]);
    }
    let texts: Vec<&str> = accept_headers.iter().filter_map(|header| header.to_str().ok()).collect();
    let elements: Vec<&str> = texts.iter().flat_map(|text| text.split(',')).collect();
    let mut best = None;
    for format in kind.formats() {
        let media_type = format.media_type(is_batch);
        let family = media_type.split('/').next()?;
        let weight = [media_type, &format!("{family}/*"), "*/*"]
            .iter()
            .find_map(|range| weight(&elements, range))
            .unwrap_or(0);
        if weight > best.map_or(0, |(weight, _)| weight) {
            best = Some((weight, *format));
        }
    }
    best.map(|(_, format)| format)
}

/// The greatest weight, in thousandths, that the list has for exactly this range.
fn weight(elements: &[&str], range: &str) -> Option<u32> {
    let weight_of = |element: &&str| {
        let mut parts = element.split(';').map(str::trim);
        if !parts.next()?.eq_ignore_ascii_case(range) {
            return None;
        }
        let mut weight = Some(1000);
        for (name, value) in parts.filter_map(|part| part.split_once('=')) {
            if name.trim().eq_ignore_ascii_case("q") {
                weight = Some(qvalue(value.trim())?);
            }
        }
        weight
    };
    elements.iter().filter_map(weight_of).max()
}

/// A qvalue of RFC 9110 section 12.4.2, in thousandths, parsed one character at a time.
fn qvalue(text: &str) -> Option<u32> {
    let mut chars = text.chars();
    let whole = match chars.next()? {
        '0' => 0,
        '1' => 1000,
        _ => return None,
    };
    match chars.next() {
        None => return Some(whole),
        Some('.') => {}
        Some(_) => return None,
    }
    let mut unit = 100;
    let mut value = whole;
    for char in chars {
        if unit == 0 {
            return None;
        }
        value += char.to_digit(10)? * unit;
        unit /= 10;
    }
    (value <= 1000).then_some(value)
}
