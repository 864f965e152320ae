//! The headers that tell a client its rate limits and what is left of them: draft-ietf-httpapi-ratelimit-headers-11.

use crate::access::rate_limit::RateLimitStatus;

/// Appends the header lines of a response.
pub(crate) fn append_rate_limit_lines(lines: &mut String, status: &RateLimitStatus) {
    lines.reserve(256);
    *lines += "ratelimit-policy: ";
    status.rates.append_policy(lines);
    *lines += "\r\nratelimit: ";
    status.append_status(lines);
    *lines += "\r\n";
}
