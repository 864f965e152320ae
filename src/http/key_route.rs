//! The routes of keys and passwords, `GET /key/{length}` and `GET /password/{length}`: the hot path.

use std::sync::Arc;

use crate::access::audit::{AuditRecord, AuditSubject, RequestId};
use crate::access::authorization::Authorized;
use crate::access::peer::Peer;
use crate::access::request_head::{RequestHead, RequestHeader};
use crate::access::stream_permits::StreamPermit;
use crate::access::verified_token::VerifiedToken;
use crate::http::body::Body;
use crate::http::not_found::example_path;
use crate::http::problem::Problem;
use crate::http::query::KeyRequest;
use crate::http::rate_limit_headers::append_rate_limit_lines;
use crate::http::state::AppState;
use crate::keys::encoded_stream::EncodedStream;
use crate::keys::format::Kind;
use crate::keys::generator::GeneratorError;
use crate::keys::key::{KeyLength, LengthError};
use crate::keys::key_spec::{BATCH_BYTES_MAX, BatchError, KeySpec};
use crate::keys::password::Alphabet;
use crate::server::fast_path::response_buffer::ResponseHead;
use crate::telemetry::clock::{self, Nanos};
use crate::telemetry::endpoint::{Endpoint, KEY_PREFIX, PASSWORD_PREFIX};
use crate::telemetry::labels::{KeyRequestError, Rejection};

/// Seconds until a client may retry after all permits of streamed responses were taken.
const STREAM_RETRY_AFTER: u32 = 1;

/// A path of these routes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct KeyPath<'a> {
    kind: Kind,
    /// Not yet parsed.
    length: &'a [u8],
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
pub(crate) fn parse_path(path: &[u8]) -> Option<KeyPath<'_>> {
    let (kind, length) = match path.strip_prefix(KEY_PREFIX.as_bytes()) {
        Some(length) => (Kind::Key, length),
        None => (Kind::Password(Alphabet::default()), path.strip_prefix(PASSWORD_PREFIX.as_bytes())?),
    };
    (!length.contains(&b'/')).then_some(KeyPath { kind, length })
}

/// A request for keys that the rules allow. Nothing is charged and no key is generated yet.
#[derive(Debug)]
pub(crate) struct KeyOrder {
    pub(crate) spec: KeySpec,
    authorized: Option<Box<Authorized>>,
    /// Whether the request is for the headers only: no key is generated, and no byte is charged.
    pub(crate) is_head: bool,
    request_id: Option<RequestId>,
}

impl KeyOrder {
    /// Decides whether a client gets keys, and which.
    ///
    /// # Errors
    /// Why the client gets no key.
    pub(crate) fn decide(
        state: &AppState,
        head: &RequestHead<'_>,
        path: KeyPath<'_>,
        peer: &Peer,
        verified_token: &VerifiedToken,
    ) -> Result<Self, Problem> {
        if !head.reads() {
            return Err(Problem::method_not_allowed());
        }
        let authorized = authorize(state, head, peer, verified_token)?;
        let spec = parse_spec(state, head, path, authorized.as_deref())?;
        if let Some(failure) = state.generator.failure() {
            return Err(state.generator_problem(failure));
        }
        Ok(Self { spec, authorized, is_head: head.is_head(), request_id: None })
    }

    /// Whether the response is generated as the client reads it.
    pub(crate) fn is_streamed(&self) -> bool {
        self.spec.is_streamed() && !self.is_head
    }

    /// A permit for a streamed response. It comes before the charge: a client does not pay for a key that it does not
    /// get.
    pub(crate) fn stream_permit(
        &self,
        state: &AppState,
        head: &RequestHead<'_>,
        peer: &Peer,
    ) -> Result<StreamPermit, Problem> {
        if state.health.is_stopping() {
            state.metrics.count_key_error(KeyRequestError::Draining);
            return Err(Problem::draining());
        }
        state.authorizer.acquire_stream_permit(self.authorized.as_deref(), peer, head).ok_or_else(|| {
            state.metrics.count_key_error(KeyRequestError::Bulk);
            Problem::unavailable("Too many large responses are being sent", STREAM_RETRY_AFTER)
        })
    }

    /// Charges the client, and returns the head of the response.
    pub(crate) fn charge(&mut self, state: &AppState, peer: &Peer) -> Result<ResponseHead, Problem> {
        let mut lines = String::new();
        if let Some(authorized) = &mut self.authorized {
            let bytes = if self.is_head { 0 } else { self.spec.key_bytes() };
            state.authorizer.check_rate_limit(authorized, peer, bytes).map_err(|status| {
                state.metrics.count_rejection(Rejection::Rate);
                Problem::too_many_requests(&status)
            })?;
            if let Some(status) = &authorized.rate_limit {
                append_rate_limit_lines(&mut lines, status);
            }
            if authorized.audit && !self.is_head {
                let id = RequestId::generate(&state.generator)
                    .map_err(|failure| state.generator_problem(failure))?;
                lines.extend(["x-request-id: ", id.as_str(), "\r\n"]);
                self.request_id = Some(id);
            }
        }
        if let Kind::Password(alphabet) = self.spec.kind() {
            // The bits of entropy of each password in the response.
            lines += "entropy-bits: ";
            alphabet.write_entropy_bits(self.spec.length(), |part| lines += part);
            lines += "\r\n";
        }
        if self.spec.is_streamed() {
            // Stops nginx from spooling a streamed response to a file on its disk, which it does at once when a client
            // reads slowly.
            lines += "x-accel-buffering: no\r\n";
        }
        Ok(ResponseHead::of_keys(&self.spec, lines))
    }

    /// Appends the keys to `text`, which has the capacity for them, and counts them. Returns when they were ready.
    pub(crate) fn append_keys(&self, state: &AppState, text: &mut Vec<u8>) -> Result<Nanos, GeneratorError> {
        if self.is_head { Ok(clock::now()) } else { state.append_keys(&self.spec, text) }
    }

    /// The keys as a body for hyper: generated here, or, with a permit, as the client reads them.
    pub(crate) fn body(
        &self,
        state: &AppState,
        permit: Option<StreamPermit>,
    ) -> Result<Body, GeneratorError> {
        match permit {
            Some(permit) => EncodedStream::start(&self.spec, Arc::clone(&state.generator))
                .map(|stream| Body::stream(stream, permit)),
            None if self.is_head => Ok(Body::empty()),
            None => state.generate(&self.spec).map(Body::full),
        }
    }

    /// The audit record of the keys, which were generated; `None` if there is none, or after the first call.
    pub(crate) fn take_record(&mut self, peer: &Peer) -> Option<Box<AuditRecord>> {
        let (id, authorized) = (self.request_id.take()?, self.authorized.take()?);
        Some(Box::new(AuditRecord::new(id, AuditSubject::Client(*authorized), peer.clone(), self.spec)))
    }
}

/// Authorizes the client; `None` if no rule applies to any client.
fn authorize(
    state: &AppState,
    head: &RequestHead<'_>,
    peer: &Peer,
    verified_token: &VerifiedToken,
) -> Result<Option<Box<Authorized>>, Problem> {
    if state.authorizer.is_unrestricted() {
        return Ok(None);
    }
    let authorized = state.authorizer.authorize(peer, head, verified_token).map_err(|reason| {
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
) -> Result<KeySpec, Problem> {
    let kind = path.kind;
    let max_size = kind.length_max(state.max_size_for(authorized));
    let length = KeyLength::parse(path.length, max_size).map_err(|error| match path.length {
        b"" => Problem::bad_request(format!("{error}; try {}", example_path(kind, b"", max_size))),
        _ => length_problem(error),
    })?;
    let request = KeyRequest::parse(kind, head.query, head.values(RequestHeader::Accept))
        .map_err(|error| error.into_problem(kind))?;
    KeySpec::new(request.kind, length, request.format, request.count).map_err(batch_problem)
}

fn length_problem(error: LengthError) -> Problem {
    let detail = error.to_string();
    match error {
        LengthError::NotAnInteger => Problem::bad_request(detail),
        LengthError::Zero => Problem::bad_request(detail).with_min(1),
        LengthError::TooLarge { limit } => Problem::too_large(detail).with_max(limit),
    }
}

fn batch_problem(error: BatchError) -> Problem {
    let detail = error.to_string();
    match error {
        BatchError::Unseparable(_) => Problem::bad_request(detail),
        BatchError::TooLarge => Problem::too_large(detail).with_max(BATCH_BYTES_MAX),
    }
}
