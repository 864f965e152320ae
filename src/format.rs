//! How a key is written, and which way of writing a request asks for.

use axum::http::header::HeaderValue;

/// A way of writing a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// The bytes as they are.
    Raw,
}

impl Format {
    /// Every format, the default one first.
    pub const ALL: [Self; 1] = [Self::Raw];

    /// The value of `?format=` that asks for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
        }
    }

    /// Its media type, in lower case.
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Raw => "application/octet-stream",
        }
    }

    /// The format that a request asks for: by its query, else by its `Accept` fields, else the default.
    ///
    /// # Errors
    /// What no format here satisfies.
    pub fn negotiate<'a>(
        query: Option<&str>,
        accept: impl IntoIterator<Item = &'a HeaderValue>,
    ) -> Result<Self, Unsatisfied> {
        if let Some(format) = query.map_or(Ok(None), from_query)? {
            return Ok(format);
        }
        let mut accept = accept.into_iter();
        let (first, second) = (accept.next(), accept.next());
        // Most requests say nothing, or `*/*` as curl does; reading that as a list took a tenth of all instructions.
        if first.is_none_or(|first| first == "*/*") && second.is_none() {
            return Ok(Self::ALL[0]);
        }
        let ranges: Vec<Range<'_>> = first
            .into_iter()
            .chain(second)
            .chain(accept)
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter_map(Range::parse)
            .collect();
        Self::ALL
            .into_iter()
            .rev() // of equal weights the last one wins in max_by_key, which must be the default
            .max_by_key(|format| weight(*format, &ranges))
            .filter(|format| weight(*format, &ranges) > 0)
            .ok_or(Unsatisfied::Accept)
    }

    /// The media types of every format, for an error to list.
    pub fn offered() -> String {
        Self::ALL.map(Self::media_type).join(", ")
    }
}

/// What a request asked for and can't have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unsatisfied {
    /// A query parameter that is not known here.
    Parameter(String),
    /// A parameter that came more than once.
    Twice(String),
    /// A value of `format` that is not known here.
    Format(String),
    /// No range of the `Accept` fields has a format here.
    Accept,
}

fn from_query(query: &str) -> Result<Option<Format>, Unsatisfied> {
    let mut found = None;
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        if name != "format" {
            return Err(Unsatisfied::Parameter(name.into_owned()));
        }
        let format = Format::ALL.into_iter().find(|format| format.name() == value);
        if found.is_some() {
            return Err(Unsatisfied::Twice(name.into_owned()));
        }
        found = Some(format.ok_or_else(|| Unsatisfied::Format(value.into_owned()))?);
    }
    Ok(found)
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

    /// How closely the range names `format`: 3 by its type, 2 by `type/*`, 1 by `*/*`.
    fn precision(&self, format: Format) -> Option<u8> {
        let (kind, subkind) = format.media_type().split_once('/').expect("a media type has one slash");
        match (self.kind, self.subkind) {
            ("*", "*") => Some(1),
            (k, "*") if k.eq_ignore_ascii_case(kind) => Some(2),
            (k, s) if k.eq_ignore_ascii_case(kind) && s.eq_ignore_ascii_case(subkind) => Some(3),
            _ => None,
        }
    }
}

/// The weight of the range that names `format` most closely; 0 where none does.
fn weight(format: Format, ranges: &[Range<'_>]) -> u16 {
    ranges
        .iter()
        .filter_map(|range| Some((range.precision(format)?, range.weight)))
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

    fn negotiate(query: Option<&str>, accept: &[&str]) -> Result<Format, Unsatisfied> {
        let accept: Vec<_> = accept.iter().map(|text| HeaderValue::from_str(text).unwrap()).collect();
        Format::negotiate(query, &accept)
    }

    #[test]
    fn without_a_wish_the_bytes_come_as_they_are() {
        assert_eq!(negotiate(None, &[]), Ok(Format::Raw));
        assert_eq!(negotiate(Some(""), &["*/*"]), Ok(Format::Raw));
    }

    #[test]
    fn accept_is_read_as_rfc_9110_has_it() {
        for satisfied in [
            "application/octet-stream",
            "Application/Octet-Stream;q=0.001",
            "application/*",
            "text/html, */*;q=0.1",
            "*/*;q=0, application/octet-stream",
            "nonsense, */*",
        ] {
            assert_eq!(negotiate(None, &[satisfied]), Ok(Format::Raw), "{satisfied}");
        }
        for unsatisfied in [
            "text/html",
            "",
            "*/*;q=0",
            "*/*;q=0.000",
            "application/octet-stream;q=0, */*",
            "application/octet-stream;q=2",
            "application/octet-stream;q=0.0001",
        ] {
            assert_eq!(negotiate(None, &[unsatisfied]), Err(Unsatisfied::Accept), "{unsatisfied}");
        }
        assert_eq!(negotiate(None, &["text/html", "*/*"]), Ok(Format::Raw), "two fields");
    }

    #[test]
    fn the_query_wins_and_its_errors_name_what_is_wrong() {
        assert_eq!(negotiate(Some("format=raw"), &["text/html"]), Ok(Format::Raw));
        assert_eq!(negotiate(Some("format=%72aw"), &[]), Ok(Format::Raw));
        assert_eq!(negotiate(Some("format=hax"), &[]), Err(Unsatisfied::Format("hax".into())));
        assert_eq!(negotiate(Some("size=1"), &[]), Err(Unsatisfied::Parameter("size".into())));
        assert_eq!(negotiate(Some("format=raw&format=raw"), &[]), Err(Unsatisfied::Twice("format".into())));
    }
}
