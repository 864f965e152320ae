//! What all responses have in common: their headers, and how they end.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll};

use axum::http::Response;
use axum::http::header::{
    ACCEPT_RANGES, CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderName,
    HeaderValue, VARY, X_CONTENT_TYPE_OPTIONS,
};

use crate::http::body::Body;
use crate::http::in_flight::InFlightRequest;
use crate::http::problem::Problem;
use crate::keys::format::Format;

/// The headers of every response.
const COMMON_HEADERS: [(HeaderName, HeaderValue); 2] = [
    (CACHE_CONTROL, HeaderValue::from_static("no-store")),
    (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
];

/// The headers of a raw key, except its length. They are made once and cloned: five insertions cost more than the key.
pub(crate) static KEY_HEADERS: LazyLock<HeaderMap> = LazyLock::new(|| {
    let mut headers = HeaderMap::from_iter(COMMON_HEADERS);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(Format::Raw.media_type(false)));
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("none"));
    headers.insert(VARY, HeaderValue::from_static("Accept"));
    headers
});

/// The status line and [`KEY_HEADERS`], as the fast path writes them.
pub(crate) static KEY_HEAD: LazyLock<String> = LazyLock::new(|| {
    let mut head = String::from("HTTP/1.1 200 OK\r\n");
    for (name, value) in &*KEY_HEADERS {
        let value = value.to_str().expect("these values are of ASCII");
        head.extend([name.as_str(), ": ", value, "\r\n"]);
    }
    head
});

/// Sets the headers that every response has.
pub(crate) fn with_common_headers<B: Into<Body>>(response: Response<B>) -> Response<Body> {
    let mut response = response.map(Into::into);
    for (name, value) in COMMON_HEADERS {
        response.headers_mut().insert(name, value);
    }
    response
}

/// The response to a request that fails with `problem`.
pub(crate) fn problem_response(problem: &Problem) -> Response<Body> {
    with_common_headers(problem.to_response::<String>())
}

/// Counts `response` by its status, and attaches `request` to it, whose time runs until the last byte is handed over.
/// Takes the body from the response to a HEAD request, and adds `Connection: close` if the connection is to end.
pub(crate) fn finalize_response(
    mut response: Response<Body>,
    request: InFlightRequest,
    is_head: bool,
    is_closing: bool,
) -> Response<Body> {
    if is_closing {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    request.metrics().count_response(response.status());
    if is_head {
        // The length of GET's body: hyper derives the header from a body, and there is none.
        if let Some(size) = http_body::Body::size_hint(response.body()).exact() {
            response.headers_mut().entry(CONTENT_LENGTH).or_insert(size.into());
        }
        response.body_mut().clear();
    }
    response.body_mut().attach_request(request);
    response
}

/// A response that is there already, or that the router makes.
pub enum ResponseFuture {
    /// A response that is there; `None` once it was taken.
    Ready(Option<Response<Body>>),
    /// A response that the router makes.
    Routed(Pin<Box<dyn Future<Output = Response<Body>> + Send>>),
}

impl Future for ResponseFuture {
    type Output = Result<Response<Body>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Ready(response) => {
                Poll::Ready(Ok(response.take().expect("a future is not polled again after it was ready")))
            }
            Self::Routed(future) => future.as_mut().poll(cx).map(Ok),
        }
    }
}
