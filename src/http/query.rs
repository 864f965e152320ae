//! What a request for a key asks for: by its query, else by its `Accept` fields, else the default.

use axum::http::header::HeaderValue;

use crate::keys::encoding::{COUNT_MAX, Format, Kind};
use crate::keys::key::KeyLength;
use crate::keys::password::Alphabet;

/// The query parameters that are known.
pub fn parameters(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::Key => &[FORMAT, COUNT],
        Kind::Password(_) => &[ALPHABET, FORMAT, COUNT],
    }
}

/// How a key is to be written.
pub const FORMAT: &str = "format";
/// How many there are to be.
pub const COUNT: &str = "count";
/// What a password is to be made of.
pub const ALPHABET: &str = "alphabet";

/// What a request asks for, beside a length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyRequest {
    /// What is to be drawn.
    pub kind: Kind,
    /// How the key is to be written.
    pub format: Format,
    /// How many there are to be, 1 to [`COUNT_MAX`]; `None` is one that is no batch.
    pub count: Option<u64>,
}

impl KeyRequest {
    /// Reads it. The query wins over `Accept` (RFC 9110 section 12.5.1), whose weights are honoured; of formats with
    /// equal weights the first in [`Kind::formats`] is taken. `kind` is what the path names, with the default alphabet.
    ///
    /// # Errors
    /// What can't be had.
    pub fn read<'a>(
        kind: Kind,
        query: Option<&str>,
        accept: impl IntoIterator<Item = &'a HeaderValue>,
    ) -> Result<Self, ParamError> {
        let asked = match query {
            Some(query) => from_query(kind, query)?,
            None => RawQuery::default(),
        };
        let format = match asked.format {
            Some(format) => format,
            None => negotiate_format(kind, accept, asked.count.is_some())?,
        };
        Ok(Self { kind: asked.alphabet.map_or(kind, Kind::Password), format, count: asked.count })
    }
}

/// The media types of every format, for an error to list.
pub fn acceptable_media_types(kind: Kind, is_batch: bool) -> String {
    let mut types: Vec<_> = kind.formats().iter().map(|format| format.media_type(is_batch)).collect();
    types.dedup();
    types.join(", ")
}

/// What a request asked for and can't have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ParamError {
    /// A query parameter that is not known here.
    Parameter(String),
    /// A parameter that came more than once.
    Twice(String),
    /// A value of `format` that is not known here.
    Format(String),
    /// A value of `alphabet` that is not known here.
    Alphabet(String),
    /// A value of `count` that is no number from 1 to [`COUNT_MAX`].
    Count(String),
    /// No range of the `Accept` fields has a format here; of a batch, or not.
    Accept(bool),
}

/// What a query asks for.
#[derive(Default)]
struct RawQuery {
    format: Option<Format>,
    count: Option<u64>,
    alphabet: Option<Alphabet>,
}

fn from_query(kind: Kind, query: &str) -> Result<RawQuery, ParamError> {
    let mut asked = RawQuery::default();
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        let is_new = match &*name {
            FORMAT => {
                let known = kind.formats().iter().copied().find(|format| format.name() == value);
                asked.format.replace(known.ok_or_else(|| ParamError::Format(value.into()))?).is_none()
            }
            COUNT => {
                let number = KeyLength::parse(&value, COUNT_MAX).map(KeyLength::bytes);
                asked.count.replace(number.map_err(|_| ParamError::Count(value.into()))?).is_none()
            }
            ALPHABET if kind != Kind::Key => {
                let known = Alphabet::ALL.into_iter().find(|alphabet| alphabet.name() == value);
                asked.alphabet.replace(known.ok_or_else(|| ParamError::Alphabet(value.into()))?).is_none()
            }
            _ => return Err(ParamError::Parameter(name.into())),
        };
        if !is_new {
            return Err(ParamError::Twice(name.into()));
        }
    }
    Ok(asked)
}

fn negotiate_format<'a>(
    kind: Kind,
    accept: impl IntoIterator<Item = &'a HeaderValue>,
    is_batch: bool,
) -> Result<Format, ParamError> {
    negotiate(kind.formats(), |format| format.media_type(is_batch), accept)
        .ok_or(ParamError::Accept(is_batch))
}

/// The one of `offers` that the `Accept` fields weigh most, the first of equals; `None` where they weigh none.
pub fn negotiate<'a, T: Copy>(
    offers: &[T],
    media_type: impl Fn(T) -> &'static str,
    accept: impl IntoIterator<Item = &'a HeaderValue>,
) -> Option<T> {
    let mut accept = accept.into_iter().peekable();
    if accept.peek().is_none() {
        return offers.first().copied();
    }
    let ranges: Vec<Range<'_>> = accept
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(Range::parse)
        .collect();
    let weight = |offer: &T| weight(media_type(*offer), &ranges);
    offers
        .iter()
        .copied()
        .rev() // of equal weights the last one wins in max_by_key, which must be the default
        .max_by_key(weight)
        .filter(|offer| weight(offer) > 0)
}

/// One media range of an `Accept` field (RFC 9110 section 12.5.1).
struct Range<'a> {
    kind: &'a str,
    subkind: &'a str,
    /// The weight in thousandths.
    weight: u16,
}

impl<'a> Range<'a> {
    /// `None` for what is not a media range; such an element is passed over, as if it were not there.
    fn parse(text: &'a str) -> Option<Self> {
        let mut parts = text.split(';').map(str::trim);
        let (kind, subkind) = parts.next()?.split_once('/')?;
        let mut weight = 1000;
        for parameter in parts {
            let Some((name, value)) = parameter.split_once('=') else {
                continue;
            };
            if name.trim().eq_ignore_ascii_case("q") {
                weight = thousandths(value.trim())?;
            }
        }
        Some(Self { kind, subkind, weight })
    }

    /// How closely the range names `media_type`: 3 by its type, 2 by `type/*`, 1 by `*/*`.
    fn precision(&self, media_type: &str) -> Option<u8> {
        let (kind, subkind) = media_type.split_once('/').expect("a media type has one slash");
        match (self.kind, self.subkind) {
            ("*", "*") => Some(1),
            (k, "*") if k.eq_ignore_ascii_case(kind) => Some(2),
            (k, s) if k.eq_ignore_ascii_case(kind) && s.eq_ignore_ascii_case(subkind) => Some(3),
            _ => None,
        }
    }
}

/// The weight of the range that names `media_type` most closely; 0 where none does.
fn weight(media_type: &str, ranges: &[Range<'_>]) -> u16 {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn read(query: Option<&str>, accept: &[&str]) -> Result<KeyRequest, ParamError> {
        let accept: Vec<_> = accept.iter().map(|text| HeaderValue::from_str(text).unwrap()).collect();
        KeyRequest::read(Kind::Key, query, &accept)
    }

    fn format(query: Option<&str>, accept: &[&str]) -> Result<Format, ParamError> {
        read(query, accept).map(|wish| wish.format)
    }

    #[test]
    fn without_a_wish_the_bytes_come_as_they_are() {
        let default = Ok(KeyRequest { kind: Kind::Key, format: Format::Raw, count: None });
        assert_eq!(read(None, &[]), default);
        assert_eq!(read(Some(""), &["*/*"]), default);
    }

    #[test]
    fn accept_is_read_as_rfc_9110_has_it() {
        for (accept, expected) in [
            ("application/octet-stream", Format::Raw),
            ("Application/Octet-Stream;q=0.001", Format::Raw),
            ("application/*", Format::Raw),
            ("text/html, */*;q=0.1", Format::Raw),
            ("*/*;q=0, application/octet-stream", Format::Raw),
            ("nonsense, */*", Format::Raw),
            ("text/plain", Format::Hex),
            ("text/*", Format::Hex),
            ("text/html, text/plain;q=0.9, */*;q=0.8", Format::Hex),
            ("application/json", Format::Json),
            ("application/json, text/plain, */*", Format::Raw), // as browsers' libraries ask: all weigh the same
            ("application/octet-stream;q=0.5, application/jwk+json", Format::Jwk),
            ("application/octet-stream;q=0, */*", Format::Hex),
            ("application/*;q=0.4, application/json;q=0.6, text/plain;q=0.5", Format::Json),
        ] {
            assert_eq!(format(None, &[accept]), Ok(expected), "{accept}");
        }
        for unsatisfied in [
            "text/html",
            "",
            "*/*;q=0",
            "*/*;q=0.000",
            "application/octet-stream;q=2",
            "application/octet-stream;q=0.0001",
            "application/jwk-set+json",
        ] {
            assert_eq!(format(None, &[unsatisfied]), Err(ParamError::Accept(false)), "{unsatisfied}");
        }
        assert_eq!(format(None, &["text/html", "*/*"]), Ok(Format::Raw), "two fields");
    }

    #[test]
    fn a_batch_of_jwks_is_a_set() {
        assert_eq!(format(Some("count=2"), &["application/jwk-set+json"]), Ok(Format::Jwk));
        assert_eq!(format(Some("count=2"), &["application/jwk+json"]), Err(ParamError::Accept(true)));
        assert!(acceptable_media_types(Kind::Key, true).contains("jwk-set+json"));
    }

    #[test]
    fn the_query_wins_and_its_errors_name_what_is_wrong() {
        for known in Kind::Key.formats() {
            assert_eq!(format(Some(&format!("format={}", known.name())), &["text/html"]), Ok(*known));
        }
        assert_eq!(format(Some("format=%72aw"), &[]), Ok(Format::Raw));
        assert_eq!(format(Some("format=hax"), &[]), Err(ParamError::Format("hax".into())));
        assert_eq!(format(Some("format=text"), &[]), Err(ParamError::Format("text".into())));
        assert_eq!(format(Some("alphabet=hex"), &[]), Err(ParamError::Parameter("alphabet".into())));
        assert_eq!(format(Some("format=Hex"), &[]), Err(ParamError::Format("Hex".into())));
        assert_eq!(format(Some("size=1"), &[]), Err(ParamError::Parameter("size".into())));
        assert_eq!(format(Some("format=raw&format=raw"), &[]), Err(ParamError::Twice("format".into())));
        let wish = KeyRequest { kind: Kind::Key, format: Format::Hex, count: Some(1024) };
        assert_eq!(read(Some("count=1024&format=hex"), &[]), Ok(wish));
        for count in ["0", "1025", "01", "-1", "x", "", "99999999999999999999999"] {
            let refused = Err(ParamError::Count(count.into()));
            assert_eq!(read(Some(&format!("count={count}")), &[]), refused, "{count}");
        }
    }
}
