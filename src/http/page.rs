//! `/`: a page for people with a browser, and an index for those with a shell. Neither holds a key, or knows one.

use std::sync::LazyLock;

use axum::http::header::{
    ACCEPT, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, REFERRER_POLICY, VARY,
};
use axum::response::{IntoResponse, Response};
use base64ct::{Base64, Encoding};
use sha2::{Digest, Sha256};

use crate::http::negotiation::negotiate;
use crate::http::problem::Problem;
use crate::http::query::{ALPHABET, COUNT, FORMAT};
use crate::keys::format::{Format, Kind};
use crate::keys::password::Alphabet;
use crate::telemetry::endpoint::{HEALTH_PATH, KEY_PREFIX, OPENAPI_PATH, PASSWORD_PREFIX};

/// Styles, script and all: it loads nothing else.
const PAGE: &str = include_str!("page.html");

/// What is had here, the index first: whoever accepts anything is no browser.
const MEDIA_TYPES: [&str; 2] = ["text/plain", "text/html"];

/// The page for who prefers HTML, the index for who takes text.
///
/// # Errors
/// 406 for who takes neither.
pub(crate) fn serve(request: &HeaderMap) -> Result<Response, Problem> {
    let accept = request.get_all(ACCEPT);
    let chosen = negotiate(&MEDIA_TYPES, |media_type| media_type, accept)
        .ok_or_else(|| Problem::not_acceptable(&MEDIA_TYPES.join(", ")))?;
    let vary = (VARY, HeaderValue::from_static("Accept"));
    Ok(if chosen == "text/html" {
        ([vary], PAGE_HEADERS.clone(), PAGE).into_response()
    } else {
        ([vary, (CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"))], index())
            .into_response()
    })
}

/// What keeps other code, other pages and other origins out of the page.
static PAGE_HEADERS: LazyLock<HeaderMap> = LazyLock::new(|| {
    let policy = format!(
        "default-src 'none'; script-src '{}'; style-src '{}'; connect-src 'self'; img-src data:; base-uri 'none'; \
        form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
        hash("script"),
        hash("style")
    );
    HeaderMap::from_iter([
        (CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8")),
        (CONTENT_SECURITY_POLICY, HeaderValue::try_from(policy).expect("hashes are base64")),
        (REFERRER_POLICY, HeaderValue::from_static("no-referrer")),
        (CROSS_ORIGIN_OPENER_POLICY, HeaderValue::from_static("same-origin")),
        (CROSS_ORIGIN_RESOURCE_POLICY, HeaderValue::from_static("same-origin")),
    ])
});

const CROSS_ORIGIN_OPENER_POLICY: HeaderName = HeaderName::from_static("cross-origin-opener-policy");
const CROSS_ORIGIN_RESOURCE_POLICY: HeaderName = HeaderName::from_static("cross-origin-resource-policy");

/// The hash source (CSP level 3) of the page's one element of this name.
fn hash(element: &str) -> String {
    let text = PAGE
        .split_once(&format!("<{element}>"))
        .and_then(|(_, rest)| rest.split_once(&format!("</{element}>")))
        .map_or("", |(text, _)| text);
    format!("sha256-{}", Base64::encode_string(&Sha256::digest(text)))
}

/// The routes, for who asks with curl.
fn index() -> String {
    let formats =
        |kind: Kind| kind.formats().iter().map(|format| format.name()).collect::<Vec<_>>().join(", ");
    let line = |path: String, what: &str| format!("{path:<36} {what}\n");
    let hex = Format::Hex.name();
    let kinds = (Kind::Key, Kind::Password(Alphabet::default()));
    [
        format!("key-service {}: cryptographically secure random keys\n\n", env!("CARGO_PKG_VERSION")),
        line(format!("{KEY_PREFIX}32"), "32 random bytes"),
        line(format!("{KEY_PREFIX}32?{FORMAT}={hex}"), &format!("written otherwise: {}", formats(kinds.0))),
        line(format!("{KEY_PREFIX}32?{FORMAT}={hex}&{COUNT}=10"), "ten of them"),
        line(format!("{PASSWORD_PREFIX}24"), &format!("24 random characters: {}", formats(kinds.1))),
        line(
            format!("{PASSWORD_PREFIX}24?{ALPHABET}={}", Alphabet::Unambiguous.name()),
            &format!("of an alphabet: {}", Alphabet::ALL.map(Alphabet::name).join(", ")),
        ),
        line(HEALTH_PATH.into(), "how the service is"),
        line(OPENAPI_PATH.into(), "all of it, for tools"),
    ]
    .concat()
}
