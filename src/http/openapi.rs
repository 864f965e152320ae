//! The client routes as OpenAPI 3.1, for tools: written from the limits and names that the routes themselves go by.

use serde_json::{Map, Value, json};

use crate::http::query;
use crate::keys::format::{Format, Kind};
use crate::keys::key_spec::{BATCH_BYTES_MAX, COUNT_MAX};
use crate::keys::password::Alphabet;
use crate::telemetry::endpoint::{
    HEALTH_PATH, KEY_PATH, LIVEZ_PATH, OPENAPI_PATH, PAGE_PATH, PASSWORD_PATH, READYZ_PATH,
};

/// What the document depends on and the code does not fix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DocumentOptions {
    /// The largest key, in bytes, now.
    pub(crate) max_size: u64,
    /// Whether a key takes a token now.
    pub(crate) needs_token: bool,
    /// Whether there is a page for people.
    pub(crate) has_page: bool,
}

/// The document, as JSON.
pub(crate) fn document(terms: DocumentOptions) -> String {
    let DocumentOptions { max_size, needs_token, has_page } = terms;
    let key = generated(Kind::Key, max_size, needs_token);
    let password = generated(Kind::Password(Alphabet::default()), max_size, needs_token);
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "key-service",
            "version": env!("CARGO_PKG_VERSION"),
            "summary": "Cryptographically secure random keys",
            "description": "Keys are drawn when they are asked for and kept nowhere. A HEAD request answers with the head of \
                GET and draws none. Every error is a problem document (RFC 9457), and nothing may be cached.",
            "license": { "name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0" },
        },
        "servers": [{ "url": "/" }],
        "security": [], // an operation that needs a token says so
        "tags": [
            { "name": "keys", "description": "What is drawn" },
            { "name": "state", "description": "How the service is" },
        ],
        "paths": {
            KEY_PATH: key,
            PASSWORD_PATH: password,
            HEALTH_PATH: state("health", "Whether the generator makes a block now"),
            LIVEZ_PATH: state("livez", "Whether every worker makes progress"),
            READYZ_PATH: state("readyz", "Whether a key that is asked for now will be served"),
            OPENAPI_PATH: both("description", &json!({
                "tags": ["state"],
                "summary": "This document, with the limits of now",
                "responses": responses(json!({
                    "200": {
                        "description": "The document",
                        "content": { "application/json": { "schema": { "type": "object" } } },
                    },
                }), &["400", "405", "431", "503"]),
            })),
        },
        "components": components(needs_token),
    });
    if has_page {
        let text = json!({ "schema": { "type": "string" } });
        document["paths"][PAGE_PATH] = both(
            "index",
            &json!({
                "tags": ["state"],
                "summary": "A page for people with a browser, and a short index for those with a shell",
                "responses": responses(json!({
                    "200": {
                        "description": "As the Accept field prefers",
                        "content": { "text/plain": text, "text/html": text },
                    },
                }), &["400", "405", "406", "431", "503"]),
            }),
        );
    }
    in_order(&document)
}

/// Writes a document. Names keep the place that [`placed`] gave them.
fn in_order(document: &Value) -> String {
    (0..=PLACES).fold(document.to_string(), |text, place| text.replace(&format!("\"\\u{place:04x}"), "\""))
}

/// `name`, for an object in which the order has a meaning for readers: `serde_json` sorts names, and these begin with a control
/// character that [`in_order`] takes off.
fn placed(place: u8, name: &str) -> String {
    debug_assert!(place <= PLACES, "a control character that JSON escapes by its number");
    format!("{}{name}", char::from(place))
}

/// The last place: JSON has names of their own for the characters from 8 on.
const PLACES: u8 = 7;

/// The path of keys or of passwords.
fn generated(kind: Kind, max_size: u64, needs_token: bool) -> Value {
    let (id, summary, unit) = match kind {
        Kind::Key => ("key", "Random bytes", "bytes of each key, however they are written"),
        Kind::Password(_) => ("password", "Random characters", "characters of each password"),
    };
    let mut refusals = vec!["400", "405", "406", "413", "429", "431", "503"];
    let mut operation = json!({
        "tags": ["keys"],
        "summary": summary,
        "description": format!(
            "A format that is given wins over the Accept field; without either it is {}. Length times count is at most \
            {BATCH_BYTES_MAX}.", kind.formats()[0].name()),
        "parameters": query::parameters(kind).iter().map(|name| parameter(kind, name)).collect::<Value>(),
    });
    if needs_token {
        operation["security"] = json!([{ "token": [] }]);
        refusals.insert(1, "401");
    }
    operation["responses"] = responses(json!({ "200": served(kind) }), &refusals);
    let mut path = both(id, &operation);
    path["parameters"] = json!([{
        "name": "length",
        "in": "path",
        "required": true,
        "description": format!("The {unit}, in decimal digits without sign or leading zero. A token may have a smaller bound."),
        "schema": { "type": "integer", "minimum": 1, "maximum": kind.length_max(max_size) },
    }]);
    path
}

/// A query parameter; its values are those that a request is held to.
fn parameter(kind: Kind, name: &str) -> Value {
    let (description, schema) = match name {
        query::FORMAT => (
            // Without a default: tools send one that is stated, and it would win over the media type that they accept.
            format!(
                "How it is written; without it as the Accept field prefers, or {}",
                kind.formats()[0].name()
            ),
            json!({ "type": "string", "enum": kind.formats().iter().map(|format| format.name()).collect::<Vec<_>>() }),
        ),
        query::ALPHABET => (
            "The characters that it is made of".to_owned(),
            json!({
                "type": "string",
                "enum": Alphabet::ALL.map(Alphabet::name),
                "default": Alphabet::default().name(),
            }),
        ),
        query::COUNT => {
            let without: Vec<_> =
                kind.formats().iter().filter(|format| !format.has_batches()).map(|f| f.name()).collect();
            let except = match without[..] {
                [] => String::new(),
                _ => format!(
                    ", which {} keys do not have, since nothing would tell them apart",
                    without.join(" or ")
                ),
            };
            (
                format!(
                    "Makes it a batch of so many, each drawn on its own: lines, a JSON array or a JWK Set{except}"
                ),
                json!({ "type": "integer", "minimum": 1, "maximum": COUNT_MAX }),
            )
        }
        _ => (String::new(), json!({})), // there is no other; one that comes has to be described, says the test
    };
    json!({ "name": name, "in": "query", "description": description, "schema": schema })
}

/// The answer that has what was asked for. Its media types are in the order of the formats, the default first: generators
/// of clients that know one type for each status take the first. Of keys that is `application/octet-stream`, which such a
/// client hands over as bytes, in whatever format they come.
fn served(kind: Kind) -> Value {
    let mut content: Vec<(&str, Value)> = Vec::new();
    for format in kind.formats() {
        for is_batch in [false, true] {
            let media_type = format.media_type(is_batch);
            let is_new = content.iter().all(|(known, _)| *known != media_type);
            if is_new && (!is_batch || format.has_batches()) {
                content.push((media_type, schema(kind, *format, is_batch)));
            }
        }
    }
    let content: Map<_, _> = (0..)
        .zip(content)
        .map(|(place, (media_type, schema))| (placed(place, media_type), json!({ "schema": schema })))
        .collect();
    let mut headers = json!({
        "RateLimit-Policy": { "$ref": "#/components/headers/RateLimit-Policy" },
        "RateLimit": { "$ref": "#/components/headers/RateLimit" },
        "X-Accel-Buffering": { "$ref": "#/components/headers/X-Accel-Buffering" },
        "X-Request-Id": { "$ref": "#/components/headers/X-Request-Id" },
    });
    if kind != Kind::Key {
        headers["Entropy-Bits"] = json!({ "$ref": "#/components/headers/Entropy-Bits" });
    }
    json!({ "description": "Drawn for this request", "headers": headers, "content": content })
}

/// What a media type holds.
fn schema(kind: Kind, format: Format, is_batch: bool) -> Value {
    let reference = match format {
        Format::Raw => return json!({ "description": "The bytes as they are" }),
        Format::Text | Format::Hex | Format::Base64 | Format::Base64Url => {
            return json!({ "type": "string", "description": "A line for each, with its newline" });
        }
        // One media type for one object and for a batch of them.
        Format::Json => {
            let name = if kind == Kind::Key { "Key" } else { "Password" };
            let one = json!({ "$ref": format!("#/components/schemas/{name}") });
            let batch = json!({ "type": "array", "items": one, "minItems": 1, "maxItems": COUNT_MAX });
            return json!({ "oneOf": [one, batch] });
        }
        Format::Jwk if is_batch => "JwkSet",
        Format::Jwk => "Jwk",
    };
    json!({ "$ref": format!("#/components/schemas/{reference}") })
}

/// A path that says how the service is.
fn state(id: &str, summary: &str) -> Value {
    both(
        id,
        &json!({
            "tags": ["state"],
            "summary": summary,
            "responses": responses(json!({
                "200": {
                    "description": "It is so",
                    "content": { "text/plain": { "schema": { "type": "string", "const": "OK" } } },
                },
            }), &["400", "405", "431", "503"]),
        }),
    )
}

/// GET and HEAD of a path.
fn both(id: &str, operation: &Value) -> Value {
    let named = |prefix: &str| {
        let mut named = operation.clone();
        named["operationId"] = format!("{prefix}-{id}").into();
        named
    };
    let mut head = named("head");
    // The content of a HEAD's answer is none, with whatever type GET's has.
    head["responses"] = ["200", "400", "401", "405", "406", "413", "429", "431", "503"]
        .into_iter()
        .filter(|status| !operation["responses"][status].is_null())
        .map(|status| (status.to_owned(), json!({ "description": "The head of GET's answer" })))
        .collect::<Map<_, _>>()
        .into();
    json!({ "get": named("get"), "head": head })
}

/// `answers` and the refusals that a route may give.
fn responses(mut answers: Value, refusals: &[&str]) -> Value {
    for status in refusals {
        answers[*status] = json!({ "$ref": format!("#/components/responses/{status}") });
    }
    answers
}

fn components(needs_token: bool) -> Value {
    let header = |description: &str, schema: Value, is_required: bool| json!({ "description": description, "schema": schema, "required": is_required });
    let problem = |description: &str, headers: &[&str]| {
        let headers: Map<_, _> = headers
            .iter()
            .map(|name| ((*name).to_owned(), json!({ "$ref": format!("#/components/headers/{name}") })))
            .collect();
        json!({
            "description": description,
            "headers": headers,
            "content": { "application/problem+json": { "schema": { "$ref": "#/components/schemas/Problem" } } },
        })
    };
    let mut components = json!({
        "responses": {
            "400": problem("A length, a query parameter or its value that can't be, raw keys with a count, or a malformed message", &[]),
            "405": problem("Another method than GET and HEAD", &["Allow"]),
            "406": problem("Nothing satisfies the Accept field; the detail lists what can be had", &[]),
            "413": problem("A length or a batch above its bound, which max names", &[]),
            "429": problem("The client asked too often or for too much", &["RateLimit-Policy", "RateLimit"]),
            "431": problem("Too many header fields, or too large a head, which has no content; the connection closes", &[]),
            "503": problem("Not available now: the generator is out of service, the service stops, or a limit of connections or of large responses is reached", &["Retry-After"]),
        },
        "headers": {
            "Allow": header("The methods that there are", json!({ "type": "string", "const": "GET, HEAD" }), true),
            "Entropy-Bits": header("Bits of entropy in each password", json!({ "type": "number", "minimum": 0 }), true),
            "RateLimit": header("Where the client stands, where rates are bounded", json!({ "type": "string" }), false),
            "RateLimit-Policy": header("The bounds, where there are", json!({ "type": "string" }), false),
            "Retry-After": header("Seconds until it is worth another try", json!({ "type": "integer", "minimum": 0 }), true),
            "X-Accel-Buffering": header("Asks nginx not to spool a response above 16 KiB to its disk; absent below", json!({ "type": "string", "const": "no" }), false),
            "X-Request-Id": header("Names the audit record, where there is one", json!({ "type": "string" }), false),
        },
        "schemas": {
            "Key": object(json!({
                "length": { "type": "integer", "minimum": 1 },
                "encoding": { "type": "string", "const": "base64" },
                "key": { "type": "string", "pattern": "^[A-Za-z0-9+/]+={0,2}$" },
            })),
            "Password": object(json!({
                "length": { "type": "integer", "minimum": 1 },
                "alphabet": { "type": "string", "enum": Alphabet::ALL.map(Alphabet::name) },
                "entropy_bits": { "type": "number", "minimum": 0 },
                "password": { "type": "string", "minLength": 1 },
            })),
            "Jwk": object(json!({
                "kty": { "type": "string", "const": "oct" },
                "kid": { "type": "string", "description": "Drawn, not made of the key" },
                "k": { "type": "string", "pattern": "^[A-Za-z0-9_-]+$" },
            })),
            "JwkSet": object(json!({
                "keys": {
                    "type": "array",
                    "items": { "$ref": "#/components/schemas/Jwk" },
                    "minItems": 1,
                    "maxItems": COUNT_MAX,
                },
            })),
            "Problem": {
                "description": "RFC 9457",
                "type": "object",
                "properties": {
                    "title": { "type": "string" },
                    "status": { "type": "integer", "minimum": 400, "maximum": 599 },
                    "detail": { "type": "string" },
                    "min": { "type": "integer", "description": "The smallest value allowed, where it was below" },
                    "max": { "type": "integer", "description": "The largest value allowed, where it was above" },
                },
                "required": ["title", "status", "detail"],
            },
        },
    });
    if needs_token {
        components["responses"]["401"] = problem("No valid bearer token", &["WWW-Authenticate"]);
        components["headers"]["WWW-Authenticate"] =
            header("The challenge (RFC 6750)", json!({ "type": "string" }), true);
        components["securitySchemes"] = json!({
            "token": { "type": "http", "scheme": "bearer", "description": "A token of this service, which begins with ks_" },
        });
    }
    components
}

/// An object with these fields and no other.
fn object(properties: Value) -> Value {
    let names: Vec<_> = properties.as_object().into_iter().flat_map(Map::keys).cloned().collect();
    json!({ "type": "object", "properties": properties, "required": names, "additionalProperties": false })
}
