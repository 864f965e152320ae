//! The routes of keys and passwords, `GET /key/{length}` and `GET /password/{length}`: the hot path.

use std::sync::Arc;

use axum::http::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use axum::http::{Method, Response};

use crate::access::audit::{AuditRecord, AuditSubject};
use crate::access::authorization::Authorized;
use crate::access::peer::Peer;
use crate::access::stream_permits::StreamPermit;
use crate::http::body::Body;
use crate::http::problem::Problem;
use crate::http::query::KeyRequest;
use crate::http::rate_limit_headers::rate_limit_headers;
use crate::http::request_head::RequestHead;
use crate::http::response::KEY_HEADERS;
use crate::http::state::AppState;
use crate::keys::encoded_stream::EncodedStream;
use crate::keys::format::{Format, Kind};
use crate::keys::key::{KeyLength, LengthError};
use crate::keys::key_spec::{BATCH_BYTES_MAX, BatchError, KeySpec};
use crate::keys::password::Alphabet;
use crate::telemetry::endpoint::{Endpoint, KEY_PREFIX, PASSWORD_PREFIX};
use crate::telemetry::labels::{KeyRequestError, Rejection};

/// Seconds until a client may retry after all permits of streamed responses were taken.
const STREAM_RETRY_AFTER: u32 = 1;

/// Identifies the audit record of a response. The header of this name in a request is ignored.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// The bits of entropy of each password in a response.
const ENTROPY_BITS: HeaderName = HeaderName::from_static("entropy-bits");

/// Stops nginx from spooling a streamed response to a file on its disk, which it does at once when a client reads
/// slowly.
const X_ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// A path of these routes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeyPath<'a> {
    kind: Kind,
    /// Not yet parsed.
    length: &'a str,
}

impl KeyPath<'_> {
    pub(crate) fn endpoint(&self) -> Endpoint {
        match self.kind {
            Kind::Key => Endpoint::Key,
            Kind::Password(_) => Endpoint::Password,
        }
    }
}

/// Parses the path of a key or a password; `None` is another route. The alphabet is the default one until the query is
/// parsed.
pub(crate) fn parse_path(path: &str) -> Option<KeyPath<'_>> {
    let (kind, length) = match path.strip_prefix(KEY_PREFIX) {
        Some(length) => (Kind::Key, length),
        None => (Kind::Password(Alphabet::default()), path.strip_prefix(PASSWORD_PREFIX)?),
    };
    (!length.contains('/')).then_some(KeyPath { kind, length })
}

/// Issues keys. A HEAD request gets the headers of GET: no key is generated, and no byte is charged.
///
/// # Errors
/// Why the client gets no key.
pub(crate) fn respond(
    state: &AppState,
    head: &RequestHead<'_>,
    path: KeyPath<'_>,
    peer: &Peer,
    needs_negotiation: bool,
) -> Result<Response<Body>, Problem> {
    if !matches!(*head.method, Method::GET | Method::HEAD) {
        return Err(Problem::method_not_allowed());
    }
    let is_head = head.is_head();
    let mut authorized = authorize(state, head.headers, peer)?;
    let spec = parse_spec(state, head, path, authorized.as_deref(), needs_negotiation)?;
    if let Some(failure) = state.generator.failure() {
        return Err(state.generator_problem(failure));
    }
    // The permit comes before the charge: a client does not pay for a key that it does not get.
    let permit = if spec.is_streamed() && !is_head {
        Some(stream_permit(state, head.headers, authorized.as_deref(), peer)?)
    } else {
        None
    };
    if let Some(authorized) = &mut authorized {
        let bytes = if is_head { 0 } else { spec.key_bytes() };
        state.authorizer.check_rate_limit(authorized, peer, bytes).map_err(|status| {
            state.metrics.count_rejection(Rejection::Rate);
            Problem::too_many_requests(&status)
        })?;
    }
    let body = if is_head { Ok(Body::empty()) } else { key_body(state, &spec, permit) };
    let mut response = Response::new(body?);
    *response.headers_mut() = key_headers(&spec);
    if let Some(authorized) = authorized {
        if let Some(status) = &authorized.rate_limit {
            response.headers_mut().extend(rate_limit_headers(status));
        }
        if authorized.audit && !is_head {
            let record =
                AuditRecord::new(AuditSubject::Client(*authorized), peer.clone(), spec, &state.generator)
                    .map_err(|failure| state.generator_problem(failure))?;
            let id = HeaderValue::try_from(record.request_id()).expect("an id has hexadecimal digits only");
            response.headers_mut().insert(REQUEST_ID, id);
            response.body_mut().attach_audit_record(record);
        }
    }
    if is_head {
        // Hyper derives the header from a body, and there is none.
        response.headers_mut().insert(CONTENT_LENGTH, spec.encoded_len().into());
    }
    Ok(response)
}

/// Authorizes the client; `None` if no rule applies to any client.
fn authorize(state: &AppState, headers: &HeaderMap, peer: &Peer) -> Result<Option<Box<Authorized>>, Problem> {
    if state.authorizer.is_unrestricted() {
        return Ok(None);
    }
    let authorized = state.authorizer.authorize(peer, headers).map_err(|reason| {
        state.metrics.count_rejection(Rejection::Unauthorized);
        Problem::unauthorized(reason)
    })?;
    Ok(Some(authorized))
}

/// What is to be generated, by the path, the query and the `Accept` headers.
fn parse_spec(
    state: &AppState,
    head: &RequestHead<'_>,
    path: KeyPath<'_>,
    authorized: Option<&Authorized>,
    needs_negotiation: bool,
) -> Result<KeySpec, Problem> {
    let kind = path.kind;
    let max_size = kind.length_max(state.max_size_for(authorized));
    let length = KeyLength::parse(path.length, max_size).map_err(length_problem)?;
    let request = match head.query {
        None if !needs_negotiation => KeyRequest { kind, format: kind.formats()[0], count: None },
        query => KeyRequest::parse(kind, query, head.headers.get_all(ACCEPT))
            .map_err(|error| error.into_problem(kind))?,
    };
    KeySpec::new(request.kind, length, request.format, request.count)
        .map_err(|error| batch_problem(kind, error))
}

/// A permit for a streamed response.
fn stream_permit(
    state: &AppState,
    headers: &HeaderMap,
    authorized: Option<&Authorized>,
    peer: &Peer,
) -> Result<StreamPermit, Problem> {
    if state.health.is_stopping() {
        state.metrics.count_key_error(KeyRequestError::Draining);
        return Err(Problem::draining());
    }
    state.authorizer.acquire_stream_permit(authorized, peer, headers).ok_or_else(|| {
        state.metrics.count_key_error(KeyRequestError::Bulk);
        Problem::unavailable("Too many large responses are being sent", STREAM_RETRY_AFTER)
    })
}

/// The keys of `spec`: generated here, or, with a permit, as the client reads them.
fn key_body(state: &AppState, spec: &KeySpec, permit: Option<StreamPermit>) -> Result<Body, Problem> {
    let body = match permit {
        Some(permit) => EncodedStream::start(spec, Arc::clone(&state.generator))
            .map(|stream| Body::stream(stream, permit)),
        None => state.generate(spec).map(Body::full),
    };
    body.map_err(|failure| state.generator_problem(failure))
}

/// The headers that follow from `spec`.
fn key_headers(spec: &KeySpec) -> HeaderMap {
    let mut headers = KEY_HEADERS.clone();
    if spec.format() != Format::Raw {
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(spec.content_type()));
    }
    if spec.is_streamed() {
        headers.insert(X_ACCEL_BUFFERING, HeaderValue::from_static("no"));
    }
    if let Kind::Password(alphabet) = spec.kind() {
        let bits = format!("{:.1}", alphabet.entropy_bits(spec.length()));
        let bits = HeaderValue::try_from(bits).expect("a number has digits and a point only");
        headers.insert(ENTROPY_BITS, bits);
    }
    headers
}

fn length_problem(error: LengthError) -> Problem {
    let detail = error.to_string();
    match error {
        LengthError::NotAnInteger => Problem::bad_request(detail),
        LengthError::Zero => Problem::bad_request(detail).with_min(1),
        LengthError::TooLarge { limit } => Problem::too_large(detail).with_max(limit),
    }
}

fn batch_problem(kind: Kind, error: BatchError) -> Problem {
    match error {
        BatchError::Unseparable(format) => {
            let formats = kind.formats().iter().filter(|format| format.has_batches());
            Problem::bad_request(format!(
                "Keys in format {} could not be told apart in a batch; formats that allow a count: {}",
                format.name(),
                formats.map(|format| format.name()).collect::<Vec<_>>().join(", ")
            ))
        }
        BatchError::TooLarge => Problem::too_large(format!(
            "Length times count exceeds the maximum size of a batch, {BATCH_BYTES_MAX}"
        ))
        .with_max(BATCH_BYTES_MAX),
    }
}
