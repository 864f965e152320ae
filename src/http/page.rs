//! `/`: a page for people with a browser, and an index for those with a shell. Neither holds a key, or knows one.

use std::sync::LazyLock;

use axum::http::header::{
    ACCEPT, CONTENT_SECURITY_POLICY, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, REFERRER_POLICY, VARY,
};
use axum::response::{IntoResponse, Response};
use base64ct::{Base64, Encoding};
use sha2::{Digest, Sha256};

use crate::http::problem::Problem;
use crate::http::query;
use crate::keys::encoding::{Format, Kind};
use crate::keys::password::Alphabet;

/// Styles, script and all: it loads nothing else.
const PAGE: &str = include_str!("page.html");

/// What is had here, the index first: whoever accepts anything is no browser.
const MEDIA_TYPES: [&str; 2] = ["text/plain", "text/html"];

/// The page for who prefers HTML, the index for who takes text.
///
/// # Errors
/// 406 for who takes neither.
pub fn serve(request: &HeaderMap) -> Result<Response, Problem> {
    let accept = request.get_all(ACCEPT);
    let chosen = query::negotiate(&MEDIA_TYPES, |media_type| media_type, accept)
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
    format!(
        "key-service {version}: cryptographically secure random keys\n\
        \n\
        /key/32                              32 random bytes\n\
        /key/32?format={hex}                   written otherwise: {key}\n\
        /key/32?format={hex}&count=10          ten of them\n\
        /password/24                         24 random characters: {password}\n\
        /password/24?alphabet={unambiguous}    of an alphabet: {alphabets}\n\
        /health                              how the service is\n\
        /openapi.json                        all of it, for tools\n",
        version = env!("CARGO_PKG_VERSION"),
        hex = Format::Hex.name(),
        key = formats(Kind::Key),
        password = formats(Kind::Password(Alphabet::default())),
        unambiguous = Alphabet::Unambiguous.name(),
        alphabets = Alphabet::ALL.map(Alphabet::name).join(", "),
    )
}
