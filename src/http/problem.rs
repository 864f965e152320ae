//! The one error type of the API: what a client is told when it gets no key, as RFC 9457 problem details.

use axum::http::header::{
    ALLOW, CONNECTION, CONTENT_TYPE, HeaderMap, HeaderName, RETRY_AFTER, WWW_AUTHENTICATE,
};
use axum::http::{HeaderValue, Response, StatusCode};
use serde::Serialize;

use crate::access::authorization::Unauthorized;
use crate::access::rate_limit::RateLimitStatus;

/// The methods of every route here.
const METHODS: HeaderValue = HeaderValue::from_static("GET, HEAD");

/// An answer without a key. Holds only what the client may know.
#[derive(Debug, Clone, Serialize)]
pub struct Problem {
    title: &'static str,
    #[serde(serialize_with = "code")]
    status: StatusCode,
    detail: String,
    /// The smallest value that is allowed, where a lower bound was broken.
    #[serde(skip_serializing_if = "Option::is_none")]
    min: Option<u64>,
    /// The largest value that is allowed, where an upper bound was broken.
    #[serde(skip_serializing_if = "Option::is_none")]
    max: Option<u64>,
    #[serde(skip)]
    retry_after: Option<u32>,
    #[serde(skip)]
    closes: bool,
    /// Fields that go with it.
    #[serde(skip)]
    fields: Vec<(HeaderName, HeaderValue)>,
}

/// draft-ietf-httpapi-ratelimit-headers-11.
const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

impl Problem {
    /// 400: the request names something that can't be.
    pub fn bad_request(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, detail)
    }

    /// 400 for a message that RFC 9112 does not allow; what follows on the connection can't be trusted.
    pub fn malformed(detail: impl Into<String>) -> Self {
        Self::bad_request(detail).closing()
    }

    /// 401 with its challenge. RFC 6750 section 3.1 names an error only where there was a token.
    pub fn unauthorized(reason: Unauthorized) -> Self {
        let challenge = match reason {
            Unauthorized::Missing => "Bearer realm=\"key-service\"",
            Unauthorized::Unknown | Unauthorized::Expired => {
                "Bearer realm=\"key-service\", error=\"invalid_token\""
            }
        };
        let mut problem = Self::new(StatusCode::UNAUTHORIZED, reason.to_string());
        problem.fields.push((WWW_AUTHENTICATE, HeaderValue::from_static(challenge)));
        problem
    }

    /// 429: where a client stands that asked too often or for too much.
    pub fn too_many_requests(standing: &RateLimitStatus) -> Self {
        let mut problem =
            Self::new(StatusCode::TOO_MANY_REQUESTS, "Too many requests or too many bytes for now");
        problem.retry_after = standing.retry_after();
        problem.fields.extend(rate_fields(standing));
        problem
    }

    /// 404.
    pub fn not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, "Path not found")
    }

    /// 405, with `Allow`.
    pub fn method_not_allowed() -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "This path answers GET and HEAD only")
    }

    /// 406: `offered` lists what can be had.
    pub fn not_acceptable(offered: &str) -> Self {
        Self::new(
            StatusCode::NOT_ACCEPTABLE,
            format!("Nothing here satisfies the Accept field; to be had: {offered}"),
        )
    }

    /// 413.
    pub fn too_large(detail: impl Into<String>) -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, detail)
    }

    /// 503: nothing can be had now; worth another try after `retry_after` seconds.
    pub fn unavailable(detail: impl Into<String>, retry_after: u32) -> Self {
        let mut problem = Self::new(StatusCode::SERVICE_UNAVAILABLE, detail);
        problem.retry_after = Some(retry_after);
        problem
    }

    /// Names the smallest allowed value.
    #[must_use]
    pub fn with_min(mut self, min: u64) -> Self {
        self.min = Some(min);
        self
    }

    /// Names the largest allowed value.
    #[must_use]
    pub fn with_max(mut self, max: u64) -> Self {
        self.max = Some(max);
        self
    }

    /// Ends the connection with this answer.
    #[must_use]
    pub fn closing(mut self) -> Self {
        self.closes = true;
        self
    }

    /// The status.
    pub fn status(&self) -> StatusCode {
        self.status
    }

    /// The problem as a response (RFC 9457).
    pub fn to_response<B: From<String>>(&self) -> Response<B> {
        let json = serde_json::to_string(self).expect("a problem has only strings and numbers");
        let mut response = Response::new(B::from(json));
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if self.status == StatusCode::METHOD_NOT_ALLOWED {
            headers.insert(ALLOW, METHODS);
        }
        headers.extend(self.fields.iter().cloned());
        if let Some(seconds) = self.retry_after {
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.closes {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    fn new(status: StatusCode, detail: impl Into<String>) -> Self {
        Self {
            title: status.canonical_reason().unwrap_or("Error"),
            status,
            detail: detail.into(),
            min: None,
            max: None,
            retry_after: None,
            closes: false,
            fields: Vec::new(),
        }
    }
}

/// Tells a client where it stands.
pub fn tell_rates(headers: &mut HeaderMap, standing: &RateLimitStatus) {
    headers.extend(rate_fields(standing));
}

/// The same, as lines of a head.
pub fn rate_lines(standing: &RateLimitStatus) -> String {
    let mut lines = String::with_capacity(256);
    lines += RATE_LIMIT_POLICY.as_str();
    lines += ": ";
    standing.rates.append_policy(&mut lines);
    lines += "\r\n";
    lines += RATE_LIMIT.as_str();
    lines += ": ";
    standing.append_field(&mut lines);
    lines += "\r\n";
    lines
}

fn rate_fields(standing: &RateLimitStatus) -> [(HeaderName, HeaderValue); 2] {
    let (mut policy, mut field) = (String::new(), String::new());
    standing.rates.append_policy(&mut policy);
    standing.append_field(&mut field);
    let value =
        |text: String| HeaderValue::try_from(text).expect("it has names, numbers and punctuation only");
    [(RATE_LIMIT_POLICY, value(policy)), (RATE_LIMIT, value(field))]
}

fn code<S: serde::Serializer>(status: &StatusCode, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u16(status.as_u16())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_written_as_rfc_9457_has_it() {
        let problem = Problem::too_large("Length exceeds maximum size of 8").with_max(8);
        let response = problem.to_response::<String>();
        assert_eq!(response.headers()[CONTENT_TYPE], "application/problem+json");
        assert_eq!(
            response.body(),
            r#"{"title":"Payload Too Large","status":413,"detail":"Length exceeds maximum size of 8","max":8}"#
        );
    }
}
