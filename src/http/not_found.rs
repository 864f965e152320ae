//! What a 404 says: the path that would have worked, if the requested one is close to a route.

use std::borrow::Cow;

use crate::http::routes::Routes;
use crate::keys::format::Kind;
use crate::keys::key::KeyLength;
use crate::keys::password::Alphabet;
use crate::telemetry::endpoint::{Endpoint, KEY_PREFIX, PASSWORD_PREFIX};

/// The detail for an unknown path. The others begin with the same words.
const UNKNOWN: &str = "Path not found";

/// The detail for every path of a metrics port.
const ON_METRICS_PORT: &str =
    "Path not found: this port serves /metrics, /health, /livez and /readyz; keys are served on the key port";

/// The detail for metrics on a key port.
const ON_KEY_PORT: &str = "Path not found: metrics are served on the metrics port";

/// The segments, in any case, by which a path is taken for one of a route.
const NAMES: [(&str, Endpoint); 12] = [
    ("key", Endpoint::Key),
    ("keys", Endpoint::Key),
    ("password", Endpoint::Password),
    ("passwords", Endpoint::Password),
    ("metrics", Endpoint::Metrics),
    ("health", Endpoint::Health),
    ("healthz", Endpoint::Health),
    ("livez", Endpoint::Livez),
    ("readyz", Endpoint::Readyz),
    ("openapi", Endpoint::OpenApi),
    ("openapi.json", Endpoint::OpenApi),
    ("index.html", Endpoint::Page),
];

/// The detail of the 404 for `path`. It repeats nothing of the path but a valid length.
#[cold] // else each transport would have a copy
pub(crate) fn detail(path: &[u8], routes: Routes, has_page: bool, max_size: u64) -> Cow<'static, str> {
    if routes == Routes::Operator {
        return ON_METRICS_PORT.into();
    }
    let Some((endpoint, length)) = closest(path) else { return UNKNOWN.into() };
    let path = match endpoint {
        Endpoint::Metrics if !routes.serve(endpoint, has_page) => return ON_KEY_PORT.into(),
        Endpoint::Key => example_path(Kind::Key, length, max_size),
        Endpoint::Password => example_path(Kind::Password(Alphabet::default()), length, max_size),
        // A visitor of a page that is off came for keys.
        Endpoint::Page if !has_page => example_path(Kind::Key, b"", max_size),
        endpoint => <&str>::from(endpoint).to_owned(),
    };
    format!("{UNKNOWN}; try {path}").into()
}

/// A path that works: with `length` if that is valid, else with one that is.
#[cold]
pub(crate) fn example_path(kind: Kind, length: &[u8], max_size: u64) -> String {
    let (prefix, example) = match kind {
        Kind::Key => (KEY_PREFIX, 32),
        Kind::Password(_) => (PASSWORD_PREFIX, 24),
    };
    let max = kind.length_max(max_size);
    format!("{prefix}{}", KeyLength::parse(length, max).map_or(example.min(max), KeyLength::bytes))
}

/// The route whose name is a segment of the path, and the segment after it. Slashes at the end, repeated ones and a
/// prefix that a proxy has not removed make no difference.
fn closest(path: &[u8]) -> Option<(Endpoint, &[u8])> {
    let mut segments = path.split(|byte| *byte == b'/').filter(|segment| !segment.is_empty()).peekable();
    if segments.peek().is_none() && !path.is_empty() {
        return Some((Endpoint::Page, b""));
    }
    let endpoint = segments.by_ref().find_map(|segment| {
        NAMES.iter().find(|(name, _)| segment.eq_ignore_ascii_case(name.as_bytes())).map(|(_, found)| *found)
    })?;
    Some((endpoint, segments.next().unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_detail_names_the_closest_route() {
        for (path, expected) in [
            ("/key", "; try /key/32"),
            ("/key/64/", "; try /key/64"),
            ("/key/64/hex", "; try /key/64"),
            ("/key/9999/", "; try /key/32"),
            ("/key/abc/", "; try /key/32"),
            ("//key/64", "; try /key/64"),
            ("/keys/64", "; try /key/64"),
            ("/KEY/64", "; try /key/64"),
            ("/proxied/key/64", "; try /key/64"),
            ("/password", "; try /password/24"),
            ("/passwords/12/", "; try /password/12"),
            ("/metrics", ": metrics are served on the metrics port"),
            ("/metrics/", ": metrics are served on the metrics port"),
            ("/health/", "; try /health"),
            ("/healthz", "; try /health"),
            ("/openapi", "; try /openapi.json"),
            ("/index.html", "; try /"),
            ("//", "; try /"),
            ("/keychain", ""),
            ("/%6bey/32", ""),
            ("*", ""),
            ("", ""),
        ] {
            let found = detail(path.as_bytes(), Routes::Client, true, 1024);
            assert_eq!(found, format!("Path not found{expected}"), "{path}");
        }
        let without_page = detail(b"/", Routes::Client, false, 8);
        assert_eq!(without_page, "Path not found; try /key/8");
        assert_eq!(detail(b"/metrics/", Routes::Both, true, 1024), "Path not found; try /metrics");
    }

    proptest! {
        #[test]
        fn the_detail_repeats_no_text_of_the_client(path: Vec<u8>, max_size in 1u64..5000) {
            let path = [b"/key/".as_slice(), &path].concat();
            let detail = detail(&path, Routes::Client, true, max_size);
            let (text, length) = detail.rsplit_once('/').unwrap();
            prop_assert_eq!(text, "Path not found; try /key");
            prop_assert!((1..=max_size).contains(&length.parse().unwrap()));
        }
    }
}
