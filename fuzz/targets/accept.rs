//! Negotiation, against another statement of RFC 9110 section 12.5.1: a query on the first line, `Accept` fields on the
//! others.

#![no_main]

use http::HeaderValue;
use key_service::format::{Format, Unsatisfied};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let mut lines = input.split(|byte| *byte == b'\n');
    let query = lines.next().unwrap_or_default();
    let Ok(query) = std::str::from_utf8(query) else { return };
    let query = (!query.is_empty()).then_some(query);
    let fields: Vec<HeaderValue> = lines.filter_map(|line| HeaderValue::from_bytes(line).ok()).collect();
    let found = Format::negotiate(query, &fields);
    match query.filter(|query| query.bytes().any(|byte| byte != b'&')) {
        None => assert_eq!(found, by_fields(&fields).ok_or(Unsatisfied::Accept), "{fields:?}"),
        // Without an escape a query is read by eye.
        Some(query) if !query.contains(['%', '+']) => assert_eq!(found, by_query(query), "{query}"),
        Some(query) => {
            if found.is_ok() {
                let bare = query.trim_matches('&');
                assert_eq!(bare.matches('=').count(), 1, "{query} has one parameter");
                assert!(!bare.contains('&'), "{query} has one parameter");
            }
            assert_ne!(found, Err(Unsatisfied::Accept), "{query}: where a query decides, no field does");
        }
    }
});

fn by_query(query: &str) -> Result<Format, Unsatisfied> {
    let mut wanted = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        if name != "format" {
            return Err(Unsatisfied::Parameter(name.into()));
        }
        if !wanted.is_empty() {
            return Err(Unsatisfied::Twice(name.into()));
        }
        let known = Format::ALL.iter().find(|format| format.name() == value);
        wanted.push(*known.ok_or(Unsatisfied::Format(value.into()))?);
    }
    Ok(wanted[0])
}

/// The first format of the greatest weight above 0, of what the closest range says of each.
fn by_fields(fields: &[HeaderValue]) -> Option<Format> {
    if fields.is_empty() {
        return Some(Format::ALL[0]);
    }
    let texts: Vec<&str> = fields.iter().filter_map(|field| field.to_str().ok()).collect();
    let elements: Vec<&str> = texts.iter().flat_map(|text| text.split(',')).collect();
    let mut best = None;
    for format in Format::ALL {
        let kind = format.media_type().split('/').next()?;
        let weight = [format.media_type(), &format!("{kind}/*"), "*/*"]
            .iter()
            .find_map(|range| weight(&elements, range))
            .unwrap_or(0);
        if weight > best.map_or(0, |(weight, _)| weight) {
            best = Some((weight, format));
        }
    }
    best.map(|(_, format)| format)
}

/// The greatest weight, in thousandths, that the list gives this very range.
fn weight(elements: &[&str], range: &str) -> Option<u32> {
    let said = |element: &&str| {
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
    elements.iter().filter_map(said).max()
}

/// RFC 9110 section 12.4.2, read letter by letter.
fn qvalue(text: &str) -> Option<u32> {
    let mut letters = text.chars();
    let whole = match letters.next()? {
        '0' => 0,
        '1' => 1000,
        _ => return None,
    };
    match letters.next() {
        None => return Some(whole),
        Some('.') => {}
        Some(_) => return None,
    }
    let mut unit = 100;
    let mut value = whole;
    for letter in letters {
        if unit == 0 {
            return None;
        }
        value += letter.to_digit(10)? * unit;
        unit /= 10;
    }
    (value <= 1000).then_some(value)
}
