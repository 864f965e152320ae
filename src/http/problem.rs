//! Problem details (RFC 9457): the body of every error response.

use std::borrow::Cow;

use axum::http::StatusCode;
use axum::response::IntoResponse;
use serde::Serialize;

use crate::access::authorization::Unauthorized;
use crate::access::rate_limit::RateLimitStatus;
use crate::http::rate_limit_headers::append_rate_limit_lines;
use crate::http::response::{TextReply, lines};
use crate::keys::generator::GeneratorError;
use crate::server::fast_path::response_buffer::ResponseHead;

/// Seconds until a client may retry after a 503 that concerns the whole service.
const RETRY_AFTER_UNAVAILABLE: u32 = 5;

/// An error response. Holds only what the client may know.
#[derive(Debug, Clone, Serialize)]
pub struct Problem {
    title: &'static str,
    #[serde(serialize_with = "serialize_status")]
    status: StatusCode,
    detail: Cow<'static, str>,
    /// The smallest value that is allowed, if the request has a smaller one.
    #[serde(skip_serializing_if = "Option::is_none")]
    min: Option<u64>,
    /// The largest value that is allowed, if the request has a larger one.
    #[serde(skip_serializing_if = "Option::is_none")]
    max: Option<u64>,
    #[serde(skip)]
    closes_connection: bool,
    /// Further header lines of the response, each with its end.
    #[serde(skip)]
    lines: String,
}

impl Problem {
    /// 400: the request has an invalid value.
    pub(crate) fn bad_request(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    /// 400 for a request that RFC 9112 forbids. Closes the connection, because what follows on it can't be trusted.
    pub(crate) fn malformed(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::bad_request(detail).and_close()
    }

    /// 401 with its challenge. RFC 6750 section 3.1: the challenge names an error only if the request had a token.
    pub(crate) fn unauthorized(reason: Unauthorized) -> Self {
        let challenge = match reason {
            Unauthorized::Missing => "www-authenticate: Bearer realm=\"key-service\"\r\n",
            Unauthorized::Unknown | Unauthorized::Expired => {
                "www-authenticate: Bearer realm=\"key-service\", error=\"invalid_token\"\r\n"
            }
        };
        let mut problem = Self::new(StatusCode::UNAUTHORIZED, reason.to_string());
        problem.lines += challenge;
        problem
    }

    /// 429 with the client's rate limits.
    pub(crate) fn too_many_requests(status: &RateLimitStatus) -> Self {
        let mut problem =
            Self::new(StatusCode::TOO_MANY_REQUESTS, "Rate limit of requests or bytes exceeded");
        append_rate_limit_lines(&mut problem.lines, status);
        status.retry_after().into_iter().for_each(|seconds| problem.add_retry_after(seconds));
        problem
    }

    /// 404.
    pub(crate) fn not_found(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::NOT_FOUND, detail)
    }

    /// 405 with `Allow`.
    pub(crate) fn method_not_allowed() -> Self {
        let mut problem = Self::new(StatusCode::METHOD_NOT_ALLOWED, "This path supports only GET and HEAD");
        problem.lines += "allow: GET, HEAD\r\n";
        problem
    }

    /// 406: `available` lists media types.
    pub(crate) fn not_acceptable(available: &str) -> Self {
        Self::new(StatusCode::NOT_ACCEPTABLE, format!("Not acceptable. Available types: {available}"))
    }

    /// 413.
    pub(crate) fn too_large(detail: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, detail)
    }

    /// 503: the client may retry after `retry_after` seconds.
    pub(crate) fn unavailable(detail: impl Into<Cow<'static, str>>, retry_after: u32) -> Self {
        let mut problem = Self::new(StatusCode::SERVICE_UNAVAILABLE, detail);
        problem.add_retry_after(retry_after);
        problem
    }

    /// 503 while the generator is out of service.
    pub(crate) fn generator_failed(failure: GeneratorError) -> Self {
        Self::unavailable(format!("No keys can be generated: {failure}"), RETRY_AFTER_UNAVAILABLE)
    }

    /// 503 while a worker makes no progress.
    pub(crate) fn stalled() -> Self {
        Self::unavailable("A worker makes no progress", RETRY_AFTER_UNAVAILABLE)
    }

    /// 503 for a response that might not be complete before the service stops.
    pub(crate) fn draining() -> Self {
        Self::unavailable("The service is stopping", RETRY_AFTER_UNAVAILABLE)
    }

    /// 503 for an over-limit connection, which is closed.
    pub(crate) fn too_many_connections() -> Self {
        Self::unavailable("Too many connections", RETRY_AFTER_UNAVAILABLE).and_close()
    }

    /// Names the smallest allowed value.
    #[must_use]
    pub(crate) fn with_min(mut self, min: u64) -> Self {
        self.min = Some(min);
        self
    }

    /// Names the largest allowed value.
    #[must_use]
    pub(crate) fn with_max(mut self, max: u64) -> Self {
        self.max = Some(max);
        self
    }

    /// Closes the connection after this response.
    #[must_use]
    fn and_close(mut self) -> Self {
        self.closes_connection = true;
        self
    }

    /// The response.
    pub(crate) fn into_reply(self) -> TextReply {
        let json = serde_json::to_string(&self).expect("a problem has only strings and numbers");
        let lines = (lines!("application/problem+json"), self.lines);
        let head = ResponseHead { status: self.status, lines, closes: self.closes_connection };
        TextReply { head, body: json.into() }
    }

    fn add_retry_after(&mut self, seconds: u32) {
        self.lines.extend(["retry-after: ", itoa::Buffer::new().format(seconds), "\r\n"]);
    }

    fn new(status: StatusCode, detail: impl Into<Cow<'static, str>>) -> Self {
        Self {
            title: status.canonical_reason().unwrap_or("Error"),
            status,
            detail: detail.into(),
            min: None,
            max: None,
            closes_connection: false,
            lines: String::new(),
        }
    }
}

/// For routes that axum serves.
impl IntoResponse for Problem {
    fn into_response(self) -> axum::response::Response {
        IntoResponse::into_response(self.into_reply())
    }
}

fn serialize_status<S: serde::Serializer>(status: &StatusCode, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u16(status.as_u16())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_has_the_form_of_rfc_9457() {
        let problem = Problem::too_large("Length exceeds maximum size of 8").with_max(8);
        assert_eq!(
            problem.into_reply().body,
            r#"{"title":"Payload Too Large","status":413,"detail":"Length exceeds maximum size of 8","max":8}"#
        );
    }
}
