//! A view of a request's head: everything but the body. What a request means is decided from it.

use axum::http::header::{ACCEPT, HOST, HeaderMap, TRANSFER_ENCODING};
use axum::http::{Method, Request, Version};

use crate::http::problem::Problem;
use crate::server::fast_path::request::is_valid_host;

/// Method, path, query and headers of a request.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RequestHead<'a> {
    pub(crate) method: &'a Method,
    pub(crate) version: Version,
    pub(crate) path: &'a str,
    pub(crate) query: Option<&'a str>,
    pub(crate) headers: &'a HeaderMap,
}

impl<'a, B> From<&'a Request<B>> for RequestHead<'a> {
    fn from(request: &'a Request<B>) -> Self {
        Self {
            method: request.method(),
            version: request.version(),
            path: request.uri().path(),
            query: request.uri().query(),
            headers: request.headers(),
        }
    }
}

impl RequestHead<'_> {
    /// Whether the method is HEAD: the response has the headers of GET's, and no body.
    pub(crate) fn is_head(&self) -> bool {
        self.method == Method::HEAD
    }

    /// Checks what hyper accepts and RFC 9112 forbids. Returns whether the request needs content negotiation: whether
    /// an `Accept` header has another value than `*/*`.
    ///
    /// # Errors
    /// A missing, repeated or invalid `Host`, or any `Transfer-Encoding`. The connection is to be closed.
    pub(crate) fn validate(&self) -> Result<bool, Problem> {
        let (mut hosts, mut needs_negotiation) = (0, false);
        // One pass: each look-up by name would cost as much.
        for (name, value) in self.headers {
            if name == HOST {
                hosts += 1;
                if !is_valid_host(value.as_bytes()) {
                    return Err(Problem::malformed("The Host header is not a valid host"));
                }
            } else if name == ACCEPT {
                needs_negotiation |= value != "*/*";
            } else if name == TRANSFER_ENCODING {
                // RFC 9112 section 6.1: a request with Transfer-Encoding and Content-Length may be smuggled. Hyper
                // hides one of the two, and no route needs either.
                return Err(Problem::malformed("Transfer-Encoding is not accepted: requests have no body"));
            }
        }
        // RFC 9112 section 3.2: an HTTP/1.1 request has exactly one Host.
        match hosts {
            1 => Ok(needs_negotiation),
            0 if self.version < Version::HTTP_11 => Ok(needs_negotiation),
            0 => Err(Problem::malformed("The Host header is missing")),
            _ => Err(Problem::malformed("The Host header is repeated")),
        }
    }
}
