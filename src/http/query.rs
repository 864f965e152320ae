//! What a request for keys asks for: by its query, else by its `Accept` headers, else the default.

use std::borrow::Cow;

use crate::http::negotiation::negotiate;
use crate::http::problem::Problem;
use crate::keys::format::{Format, Kind};
use crate::keys::key_spec::{COUNT_MAX, CountError, parse_count};
use crate::keys::password::Alphabet;

/// The parameter that names a [`Format`].
pub(crate) const FORMAT: &str = "format";
/// The parameter that makes the response a batch of so many keys.
pub(crate) const COUNT: &str = "count";
/// The parameter that names the [`Alphabet`] of a password.
pub(crate) const ALPHABET: &str = "alphabet";

/// The query parameters of the route of `kind`.
pub(crate) fn parameters(kind: Kind) -> &'static [&'static str] {
    match kind {
        Kind::Key => &[FORMAT, COUNT],
        Kind::Password(_) => &[ALPHABET, FORMAT, COUNT],
    }
}

/// What a request asks for, except the length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyRequest {
    /// What is to be generated.
    pub kind: Kind,
    /// How a key is to be encoded.
    pub format: Format,
    /// How many keys the batch has, 1 to [`COUNT_MAX`]; `None` is a single key, not in a batch.
    pub count: Option<u64>,
}

impl KeyRequest {
    /// Parses a query and negotiates. `kind` is that of the path, with the default alphabet. The query wins over
    /// `Accept` (RFC 9110 section 12.5.1), whose weights are honoured; of formats with equal weights the first in
    /// [`Kind::formats`] is chosen.
    ///
    /// # Errors
    /// An unknown, repeated or invalid parameter, or no acceptable format.
    pub fn parse<'a>(
        kind: Kind,
        query: Option<&[u8]>,
        accept: impl IntoIterator<Item = &'a [u8]>,
    ) -> Result<Self, ParamError> {
        let query = query.map_or_else(|| Ok(RawQuery::default()), |query| RawQuery::parse(kind, query))?;
        let is_batch = query.count.is_some();
        let format = match query.format {
            Some(format) => format,
            None => negotiate(kind.formats(), |format| format.media_type(is_batch), accept)
                .ok_or(ParamError::NotAcceptable { is_batch })?,
        };
        Ok(Self { kind: query.alphabet.map_or(kind, Kind::Password), format, count: query.count })
    }
}

/// Why a request's query or `Accept` headers can't be satisfied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ParamError {
    /// The name of a parameter that the route does not have.
    UnknownParameter(String),
    /// The name of a parameter that is there more than once.
    RepeatedParameter(String),
    /// A value of `format` that the route does not have.
    UnknownFormat(String),
    /// A value of `alphabet` that does not exist.
    UnknownAlphabet(String),
    /// A value of `count` that is not an integer from 1 to [`COUNT_MAX`].
    InvalidCount(String),
    /// The `Accept` headers match no format.
    NotAcceptable {
        /// Whether the request is for a batch, whose media types differ.
        is_batch: bool,
    },
}

impl ParamError {
    /// The response, which lists what the route of `kind` has.
    pub(crate) fn into_problem(self, kind: Kind) -> Problem {
        match self {
            Self::UnknownParameter(name) => Problem::bad_request(format!(
                "Unknown query parameter \"{name}\"; known: {}",
                parameters(kind).join(", ")
            )),
            Self::RepeatedParameter(name) => {
                Problem::bad_request(format!("Query parameter \"{name}\" is given twice"))
            }
            Self::UnknownFormat(value) => {
                let known: Vec<_> = kind.formats().iter().map(|format| format.name()).collect();
                Problem::bad_request(format!("Unknown format \"{value}\"; known: {}", known.join(", ")))
            }
            Self::UnknownAlphabet(value) => Problem::bad_request(format!(
                "Unknown alphabet \"{value}\"; known: {}",
                Alphabet::ALL.map(Alphabet::name).join(", ")
            )),
            Self::InvalidCount(value) => {
                Problem::bad_request(format!("Invalid count \"{value}\": {CountError}"))
                    .with_min(1)
                    .with_max(COUNT_MAX)
            }
            Self::NotAcceptable { is_batch } => {
                Problem::not_acceptable(&acceptable_media_types(kind, is_batch))
            }
        }
    }
}

/// The media types of every format.
fn acceptable_media_types(kind: Kind, is_batch: bool) -> String {
    let mut types: Vec<_> = kind.formats().iter().map(|format| format.media_type(is_batch)).collect();
    types.dedup();
    types.join(", ")
}

/// The parameters of a query; `None` is one that is not there.
#[derive(Default)]
struct RawQuery {
    format: Option<Format>,
    count: Option<u64>,
    alphabet: Option<Alphabet>,
}

impl RawQuery {
    fn parse(kind: Kind, text: &[u8]) -> Result<Self, ParamError> {
        let mut query = Self::default();
        for parameter in text.split(|byte| *byte == b'&').filter(|parameter| !parameter.is_empty()) {
            let (name, value) = decode(parameter);
            let is = |known: &str| *name == *known.as_bytes();
            let is_first = if is(FORMAT) {
                let known = kind.formats().iter().find(|format| *value == *format.name().as_bytes());
                let format = known.ok_or_else(|| ParamError::UnknownFormat(quoted(&value)))?;
                query.format.replace(*format).is_none()
            } else if is(COUNT) {
                let count = parse_count(&*value).map_err(|_| ParamError::InvalidCount(quoted(&value)))?;
                query.count.replace(count).is_none()
            } else if is(ALPHABET) && kind != Kind::Key {
                let known = Alphabet::ALL.into_iter().find(|alphabet| *value == *alphabet.name().as_bytes());
                let alphabet = known.ok_or_else(|| ParamError::UnknownAlphabet(quoted(&value)))?;
                query.alphabet.replace(alphabet).is_none()
            } else {
                return Err(ParamError::UnknownParameter(quoted(&name)));
            };
            if !is_first {
                return Err(ParamError::RepeatedParameter(quoted(&name)));
            }
        }
        Ok(query)
    }
}

/// The name and the value of a parameter.
fn decode(parameter: &[u8]) -> (Cow<'_, [u8]>, Cow<'_, [u8]>) {
    if parameter.iter().any(|byte| matches!(byte, b'%' | b'+')) {
        let (name, value) = form_urlencoded::parse(parameter).next().unwrap_or_default();
        return (name.into_owned().into_bytes().into(), value.into_owned().into_bytes().into());
    }
    // The same, at a tenth of the cost.
    let mut parts = parameter.splitn(2, |byte| *byte == b'=').map(Cow::from);
    (parts.next().unwrap_or_default(), parts.next().unwrap_or_default())
}

/// The most characters of a request that a problem repeats.
const QUOTED_MAX: usize = 64;

/// A text of the request as a problem repeats it: shortened, if it is long.
fn quoted(text: &[u8]) -> String {
    let text = String::from_utf8_lossy(text);
    match text.char_indices().nth(QUOTED_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.into_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(query: Option<&str>, accept: &[&str]) -> Result<KeyRequest, ParamError> {
        KeyRequest::parse(Kind::Key, query.map(str::as_bytes), accept.iter().map(|text| text.as_bytes()))
    }

    fn format(query: Option<&str>, accept: &[&str]) -> Result<Format, ParamError> {
        parse(query, accept).map(|request| request.format)
    }

    #[test]
    fn the_default_is_one_raw_key() {
        let default = Ok(KeyRequest { kind: Kind::Key, format: Format::Raw, count: None });
        assert_eq!(parse(None, &[]), default);
        assert_eq!(parse(Some(""), &["*/*"]), default);
    }

    #[test]
    fn accept_is_parsed_by_rfc_9110() {
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
            ("application/json, text/plain, */*", Format::Raw), // what browsers' libraries send: all weights are equal
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
            assert_eq!(
                format(None, &[unsatisfied]),
                Err(ParamError::NotAcceptable { is_batch: false }),
                "{unsatisfied}"
            );
        }
        assert_eq!(format(None, &["text/html", "*/*"]), Ok(Format::Raw), "two headers");
    }

    #[test]
    fn a_batch_of_jwks_is_a_jwk_set() {
        assert_eq!(format(Some("count=2"), &["application/jwk-set+json"]), Ok(Format::Jwk));
        assert_eq!(
            format(Some("count=2"), &["application/jwk+json"]),
            Err(ParamError::NotAcceptable { is_batch: true })
        );
        assert!(acceptable_media_types(Kind::Key, true).contains("jwk-set+json"));
    }

    #[test]
    fn the_query_wins_and_its_errors_name_the_value() {
        for known in Kind::Key.formats() {
            assert_eq!(format(Some(&format!("format={}", known.name())), &["text/html"]), Ok(*known));
        }
        assert_eq!(format(Some("format=%72aw"), &[]), Ok(Format::Raw));
        assert_eq!(format(Some("format=hax"), &[]), Err(ParamError::UnknownFormat("hax".into())));
        assert_eq!(format(Some("format=text"), &[]), Err(ParamError::UnknownFormat("text".into())));
        assert_eq!(format(Some("alphabet=hex"), &[]), Err(ParamError::UnknownParameter("alphabet".into())));
        assert_eq!(format(Some("format=Hex"), &[]), Err(ParamError::UnknownFormat("Hex".into())));
        assert_eq!(format(Some("size=1"), &[]), Err(ParamError::UnknownParameter("size".into())));
        assert_eq!(
            format(Some("format=raw&format=raw"), &[]),
            Err(ParamError::RepeatedParameter("format".into()))
        );
        let request = KeyRequest { kind: Kind::Key, format: Format::Hex, count: Some(1024) };
        assert_eq!(parse(Some("count=1024&format=hex"), &[]), Ok(request));
        for count in ["0", "1025", "01", "-1", "x", "", "99999999999999999999999"] {
            let refused = Err(ParamError::InvalidCount(count.into()));
            assert_eq!(parse(Some(&format!("count={count}")), &[]), refused, "{count}");
        }
    }
}
