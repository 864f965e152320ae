//! The headers that tell a client its rate limits and what is left of them: draft-ietf-httpapi-ratelimit-headers-11.

use axum::http::header::{HeaderName, HeaderValue};

use crate::access::rate_limit::RateLimitStatus;

const RATE_LIMIT: HeaderName = HeaderName::from_static("ratelimit");
const RATE_LIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");

/// The headers of a response.
pub(crate) fn rate_limit_headers(status: &RateLimitStatus) -> [(HeaderName, HeaderValue); 2] {
    let (mut policy, mut limit) = (String::new(), String::new());
    status.rates.append_policy(&mut policy);
    status.append_status(&mut limit);
    let value =
        |text: String| HeaderValue::try_from(text).expect("it has names, numbers and punctuation only");
    [(RATE_LIMIT_POLICY, value(policy)), (RATE_LIMIT, value(limit))]
}

/// The same headers as lines, for the fast path.
pub(crate) fn rate_limit_header_lines(status: &RateLimitStatus) -> String {
    let mut lines = String::with_capacity(256);
    lines += RATE_LIMIT_POLICY.as_str();
    lines += ": ";
    status.rates.append_policy(&mut lines);
    lines += "\r\n";
    lines += RATE_LIMIT.as_str();
    lines += ": ";
    status.append_status(&mut lines);
    lines += "\r\n";
    lines
}
