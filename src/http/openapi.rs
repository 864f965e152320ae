//! The OpenAPI 3.1 document of the client routes, built from the limits and names that the routes themselves use.

use serde_json::{Map, Value, json};

use crate::http::query;
use crate::keys::format::{Format, Kind};
use crate::keys::key_spec::{BATCH_BYTES_MAX, COUNT_MAX};
use crate::keys::password::Alphabet;
use crate::telemetry::endpoint::{
    HEALTH_PATH, KEY_PATH, LIVEZ_PATH, OPENAPI_PATH, PAGE_PATH, PASSWORD_PATH, READYZ_PATH,
};

/// The part of the document that depends on the configuration.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DocumentOptions {
    /// The largest key, in bytes.
    pub(crate) max_size: u64,
    /// Whether clients need a token for keys.
    pub(crate) needs_token: bool,
    /// Whether the web page is served.
    pub(crate) has_page: bool,
}

/// The document, as JSON.
pub(crate) fn document(options: DocumentOptions) -> String {
    let DocumentOptions { max_size, needs_token, has_page } = options;
    let key = key_path(Kind::Key, max_size, needs_token);
    let password = key_path(Kind::Password(Alphabet::default()), max_size, needs_token);
    let mut document = json!({
        "openapi": "3.1.0",
        "info": {
            "title": "key-service",
            "version": env!("CARGO_PKG_VERSION"),
            "summary": "Cryptographically secure random keys",
            "description": "Keys are generated on request and never stored. A HEAD request gets the headers of GET, and no key is \
                generated. Every error is a problem document (RFC 9457), and nothing may be cached. The 404 for a path that is close to \
                one of these names that one.",
            "license": { "name": "MIT OR Apache-2.0", "identifier": "MIT OR Apache-2.0" },
        },
        "servers": [{ "url": "/" }],
        "security": [], // an operation that needs a token says so itself
        "tags": [
            { "name": "keys", "description": "Random keys and passwords" },
            { "name": "state", "description": "Health and description of the service" },
        ],
        "paths": {
            KEY_PATH: key,
            PASSWORD_PATH: password,
            HEALTH_PATH: health_path("health", "Whether the generator works: it generates a block for each request"),
            LIVEZ_PATH: health_path("livez", "Whether every worker makes progress"),
            READYZ_PATH: health_path("readyz", "Whether a key that is requested now will be served"),
            OPENAPI_PATH: get_and_head("description", &json!({
                "tags": ["state"],
                "summary": "This document, with the limits in force",
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
        document["paths"][PAGE_PATH] = get_and_head(
            "index",
            &json!({
                "tags": ["state"],
                "summary": "A web page for browsers, and a plain-text index for command-line clients",
                "responses": responses(json!({
                    "200": {
                        "description": "By the Accept header",
                        "content": { "text/plain": text, "text/html": text },
                    },
                }), &["400", "405", "406", "431", "503"]),
            }),
        );
    }
    restore_order(&document)
}

/// Serializes `document`, and takes off the control characters that [`ordered_name`] has set.
fn restore_order(document: &Value) -> String {
    (0..=POSITION_MAX)
        .fold(document.to_string(), |text, position| text.replace(&format!("\"\\u{position:04x}"), "\""))
}

/// `name` in an object whose order matters to readers. `serde_json` sorts names, so this name begins with a control
/// character, which [`restore_order`] takes off.
fn ordered_name(position: u8, name: &str) -> String {
    debug_assert!(position <= POSITION_MAX, "JSON escapes this control character by its number");
    format!("{}{name}", char::from(position))
}

/// The last position: JSON has short escapes for control characters from 8 on.
const POSITION_MAX: u8 = 7;

/// The path of keys or of passwords.
fn key_path(kind: Kind, max_size: u64, needs_token: bool) -> Value {
    let (id, summary, unit) = match kind {
        Kind::Key => ("key", "Random bytes", "number of bytes of each key, in any format"),
        Kind::Password(_) => ("password", "Random characters", "number of characters of each password"),
    };
    let mut errors = vec!["400", "405", "406", "413", "429", "431", "503"];
    let mut operation = json!({
        "tags": ["keys"],
        "summary": summary,
        "description": format!(
            "The format parameter wins over the Accept header; without either the format is {}. Length times count is at most \
            {BATCH_BYTES_MAX}.", kind.formats()[0].name()),
        "parameters": query::parameters(kind).iter().map(|name| parameter(kind, name)).collect::<Value>(),
    });
    if needs_token {
        operation["security"] = json!([{ "token": [] }]);
        errors.insert(1, "401");
    }
    operation["responses"] = responses(json!({ "200": key_response(kind) }), &errors);
    let mut path = get_and_head(id, &operation);
    path["parameters"] = json!([{
        "name": "length",
        "in": "path",
        "required": true,
        "description": format!("The {unit}, in decimal digits without sign or leading zero. A token may have a smaller limit."),
        "schema": { "type": "integer", "minimum": 1, "maximum": kind.length_max(max_size) },
    }]);
    path
}

/// A query parameter; its values are those that requests are checked against.
fn parameter(kind: Kind, name: &str) -> Value {
    let (description, schema) = match name {
        query::FORMAT => (
            // Without a default: tools send a stated default, and it would win over the media type that they accept.
            format!("The format; by default that of the Accept header, or {}", kind.formats()[0].name()),
            json!({ "type": "string", "enum": kind.formats().iter().map(|format| format.name()).collect::<Vec<_>>() }),
        ),
        query::ALPHABET => (
            "The characters of the password".to_owned(),
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
                    "; {} keys have no batches, because they could not be told apart",
                    without.join(" and ")
                ),
            };
            (
                format!(
                    "Returns a batch of so many, each generated on its own: lines, a JSON array or a JWK Set{except}"
                ),
                json!({ "type": "integer", "minimum": 1, "maximum": COUNT_MAX }),
            )
        }
        _ => (String::new(), json!({})), // a test fails for a parameter without a description
    };
    json!({ "name": name, "in": "query", "description": description, "schema": schema })
}

/// The response with keys. Its media types are in the order of the formats, the default first: client generators that
/// support one type for each status take the first. For keys that is `application/octet-stream`, which such a client
/// hands over as bytes, in whatever format they are.
fn key_response(kind: Kind) -> Value {
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
        .map(|(position, (media_type, schema))| {
            (ordered_name(position, media_type), json!({ "schema": schema }))
        })
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
    json!({ "description": "Generated for this request", "headers": headers, "content": content })
}

/// The schema of a format.
fn schema(kind: Kind, format: Format, is_batch: bool) -> Value {
    let reference = match format {
        Format::Raw => return json!({ "description": "The raw bytes" }),
        Format::Text | Format::Hex | Format::Base64 | Format::Base64Url => {
            return json!({ "type": "string", "description": "A line for each, with a newline at its end" });
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

/// The path of a health route.
fn health_path(id: &str, summary: &str) -> Value {
    get_and_head(
        id,
        &json!({
            "tags": ["state"],
            "summary": summary,
            "responses": responses(json!({
                "200": {
                    "description": "Yes",
                    "content": { "text/plain": { "schema": { "type": "string", "const": "OK" } } },
                },
            }), &["400", "405", "431", "503"]),
        }),
    )
}

/// GET and HEAD of a path, with the responses of `operation`.
fn get_and_head(id: &str, operation: &Value) -> Value {
    let named = |prefix: &str| {
        let mut named = operation.clone();
        named["operationId"] = format!("{prefix}-{id}").into();
        named
    };
    let mut head = named("head");
    // A response to HEAD has no content, whatever the content type of GET's is.
    head["responses"] = ["200", "400", "401", "405", "406", "413", "429", "431", "503"]
        .into_iter()
        .filter(|status| !operation["responses"][status].is_null())
        .map(|status| (status.to_owned(), json!({ "description": "The headers of GET's response" })))
        .collect::<Map<_, _>>()
        .into();
    json!({ "get": named("get"), "head": head })
}

/// `responses` and the shared responses of `errors`, which are statuses.
fn responses(mut responses: Value, errors: &[&str]) -> Value {
    for status in errors {
        responses[*status] = json!({ "$ref": format!("#/components/responses/{status}") });
    }
    responses
}

fn components(needs_token: bool) -> Value {
    let mut components = json!({
        "responses": error_responses(),
        "headers": response_headers(),
        "schemas": schemas(),
    });
    if needs_token {
        components["responses"]["401"] = error_response("No valid bearer token", &["WWW-Authenticate"]);
        components["headers"]["WWW-Authenticate"] =
            response_header("The challenge (RFC 6750)", json!({ "type": "string" }), true);
        components["securitySchemes"] = json!({
            "token": { "type": "http", "scheme": "bearer", "description": "A token of this service, which begins with ks_" },
        });
    }
    components
}

/// The error responses by status, except 401.
fn error_responses() -> Value {
    json!({
        "400": error_response("An invalid length, query parameter or value, raw keys with a count, or a malformed request", &[]),
        "405": error_response("A method other than GET and HEAD", &["Allow"]),
        "406": error_response("No available type matches the Accept header; the detail lists the available types", &[]),
        "413": error_response("A length or a batch above its limit, which is in max", &[]),
        "429": error_response("The client's rate limit of requests or bytes is exceeded", &["RateLimit-Policy", "RateLimit"]),
        "431": error_response("Too many headers, or headers that are too large; there is no content, and the connection is closed", &[]),
        "503": error_response("Not available now: the generator is out of service, the service is stopping, or a limit of connections or of large responses is reached", &["Retry-After"]),
    })
}

fn error_response(description: &str, headers: &[&str]) -> Value {
    let headers: Map<_, _> = headers
        .iter()
        .map(|name| ((*name).to_owned(), json!({ "$ref": format!("#/components/headers/{name}") })))
        .collect();
    json!({
        "description": description,
        "headers": headers,
        "content": { "application/problem+json": { "schema": { "$ref": "#/components/schemas/Problem" } } },
    })
}

/// The response headers by name, except that of 401.
fn response_headers() -> Value {
    json!({
        "Allow": response_header("The methods of the path", json!({ "type": "string", "const": "GET, HEAD" }), true),
        "Entropy-Bits": response_header("Bits of entropy of each password", json!({ "type": "number", "minimum": 0 }), true),
        "RateLimit": response_header("What is left of the client's rate limits, if there are any", json!({ "type": "string" }), false),
        "RateLimit-Policy": response_header("The client's rate limits, if there are any", json!({ "type": "string" }), false),
        "Retry-After": response_header("Seconds until the client may retry", json!({ "type": "integer", "minimum": 0 }), true),
        "X-Accel-Buffering": response_header("Asks nginx not to spool a response above 16 KiB to its disk; absent below", json!({ "type": "string", "const": "no" }), false),
        "X-Request-Id": response_header("The id of the audit record, if there is one", json!({ "type": "string" }), false),
    })
}

fn response_header(description: &str, schema: Value, is_required: bool) -> Value {
    json!({ "description": description, "schema": schema, "required": is_required })
}

fn schemas() -> Value {
    json!({
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
            "kid": { "type": "string", "description": "Random, and not derived from the key" },
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
                "min": { "type": "integer", "description": "The smallest allowed value, if the value was smaller" },
                "max": { "type": "integer", "description": "The largest allowed value, if the value was larger" },
            },
            "required": ["title", "status", "detail"],
        },
    })
}

/// The schema of an object with exactly these fields.
fn object(properties: Value) -> Value {
    let names: Vec<_> = properties.as_object().into_iter().flat_map(Map::keys).cloned().collect();
    json!({ "type": "object", "properties": properties, "required": names, "additionalProperties": false })
}
