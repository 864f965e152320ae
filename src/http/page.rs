//! The route `/`: a web page for browsers, and a plain-text index for command-line clients. Neither contains a key.

use std::sync::LazyLock;

use axum::http::header::{ACCEPT, HeaderMap, HeaderValue};
use base64ct::{Base64, Encoding};
use sha2::{Digest, Sha256};

use crate::http::negotiation::negotiate;
use crate::http::problem::Problem;
use crate::http::query::{ALPHABET, COUNT, FORMAT};
use crate::http::response::{TextReply, lines};
use crate::keys::format::{Format, Kind};
use crate::keys::password::Alphabet;
use crate::telemetry::endpoint::{HEALTH_PATH, KEY_PREFIX, OPENAPI_PATH, PASSWORD_PREFIX};

/// The page with its styles and script; it loads nothing else.
const PAGE: &str = include_str!("page.html");

/// The media types, that of the index first: a client that accepts anything is not a browser.
const MEDIA_TYPES: [&str; 2] = ["text/plain", "text/html"];

/// The page or the index, by the `Accept` headers of a request.
///
/// # Errors
/// 406 if the client accepts neither.
pub(crate) fn serve(headers: &HeaderMap) -> Result<TextReply, Problem> {
    let chosen = negotiate(
        &MEDIA_TYPES,
        |media_type| media_type,
        headers.get_all(ACCEPT).iter().map(HeaderValue::as_bytes),
    )
    .ok_or_else(|| Problem::not_acceptable(&MEDIA_TYPES.join(", ")))?;
    Ok(if chosen == "text/html" {
        TextReply::ok((lines!("text/html; charset=utf-8" "vary: Accept"), PAGE_LINES.clone()), PAGE)
    } else {
        TextReply::ok((lines!("text/plain; charset=utf-8" "vary: Accept"), String::new()), INDEX.as_str())
    })
}

/// The header lines that keep other code, other pages and other origins out of the page.
static PAGE_LINES: LazyLock<String> = LazyLock::new(|| {
    format!(
        "content-security-policy: default-src 'none'; script-src '{}'; style-src '{}'; connect-src 'self'; \
        img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
        require-trusted-types-for 'script'; trusted-types 'none'\r\n\
        referrer-policy: no-referrer\r\n\
        cross-origin-opener-policy: same-origin\r\n\
        cross-origin-resource-policy: same-origin\r\n",
        hash_source("script"),
        hash_source("style")
    )
});

/// The hash source (CSP level 3) of the page's only element of this name.
fn hash_source(element: &str) -> String {
    let text = PAGE
        .split_once(&format!("<{element}>"))
        .and_then(|(_, rest)| rest.split_once(&format!("</{element}>")))
        .map_or("", |(text, _)| text);
    format!("sha256-{}", Base64::encode_string(&Sha256::digest(text)))
}

/// The index: examples of the routes.
static INDEX: LazyLock<String> = LazyLock::new(|| {
    let formats =
        |kind: Kind| kind.formats().iter().map(|format| format.name()).collect::<Vec<_>>().join(", ");
    let line = |path: String, description: &str| format!("{path:<36} {description}\n");
    let hex = Format::Hex.name();
    [
        format!("key-service {}: cryptographically secure random keys\n\n", env!("CARGO_PKG_VERSION")),
        line(format!("{KEY_PREFIX}32"), "32 random bytes"),
        line(format!("{KEY_PREFIX}32?{FORMAT}={hex}"), &format!("in another format: {}", formats(Kind::Key))),
        line(format!("{KEY_PREFIX}32?{FORMAT}={hex}&{COUNT}=10"), "a batch of 10 keys"),
        line(
            format!("{PASSWORD_PREFIX}24"),
            &format!("24 random characters: {}", formats(Kind::Password(Alphabet::default()))),
        ),
        line(
            format!("{PASSWORD_PREFIX}24?{ALPHABET}={}", Alphabet::Unambiguous.name()),
            &format!("from an alphabet: {}", Alphabet::ALL.map(Alphabet::name).join(", ")),
        ),
        line(HEALTH_PATH.into(), "health of the service"),
        line(OPENAPI_PATH.into(), "description of all routes, for tools"),
    ]
    .concat()
});

#[cfg(test)]
mod tests {
    use strum::VariantArray;

    use super::*;
    use crate::keys::key_spec::BATCH_BYTES_MAX;
    use crate::telemetry::endpoint::{KEY_PATH, PASSWORD_PATH};

    /// Its paths are relative, because a proxy may serve the page below a path of its own.
    #[test]
    fn the_page_uses_the_paths_of_the_routes() {
        for path in [HEALTH_PATH, OPENAPI_PATH] {
            assert!(PAGE.contains(&format!("request(\"{}\")", &path[1..])), "{path}");
        }
        for path in [KEY_PATH, PASSWORD_PATH] {
            let kind = path.trim_start_matches('/').trim_end_matches("/{length}");
            assert!(PAGE.contains(&format!("name=\"kind\" value=\"{kind}\"")), "{path}");
        }
    }

    /// The page takes names and limits from the OpenAPI document, which lacks what this test compares.
    #[test]
    fn the_page_explains_every_format_and_alphabet() {
        let table = |name: &str| {
            let (_, rest) = PAGE.split_once(&format!("const {name} = {{")).unwrap();
            rest.split_once("};").unwrap().0
        };
        for format in Format::VARIANTS {
            assert!(table("FORMATS").contains(&format!("\n  {}: \"", format.name())), "{format:?}");
        }
        for alphabet in Alphabet::ALL {
            let (_, row) = table("ALPHABETS").split_once(&format!("\n  {}: [\"", alphabet.name())).unwrap();
            let row = row.lines().next().unwrap();
            assert!(row.ends_with(&format!("\", {}],", alphabet.characters().len())), "{alphabet:?}: {row}");
        }
        let limit = format!("const BYTES_MAX = {BATCH_BYTES_MAX};");
        assert!(PAGE.replace('_', "").contains(&limit.replace('_', "")), "{limit}");
    }
}
