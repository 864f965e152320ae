//! Responses as both transports send them, and their conversion for hyper.

use std::borrow::Cow;
use std::convert::Infallible;
use std::pin::Pin;

use axum::http::header::{CONNECTION, CONTENT_LENGTH, HeaderMap, HeaderName, HeaderValue};
use axum::http::{Response, StatusCode};
use axum::response::IntoResponse;

use crate::http::body::Body;
use crate::http::in_flight::InFlightRequest;
use crate::keys::format::Format;
use crate::keys::key_spec::KeySpec;
use crate::server::fast_path::response_buffer::ResponseHead;

/// The header lines of every response of this media type, and further ones, in one text.
macro_rules! lines {
    ($media_type:literal $($line:literal)*) => {
        concat!(
            "content-type: ", $media_type, "\r\ncache-control: no-store\r\nx-content-type-options: nosniff\r\n",
            $($line, "\r\n"),*
        )
    };
}

/// The header lines of every response with keys of this media type.
macro_rules! key_lines {
    ($media_type:literal) => {
        lines!($media_type "accept-ranges: none" "vary: Accept")
    };
}

pub(crate) use lines;

/// A response whose body is a text.
#[derive(Debug)]
pub(crate) struct TextReply {
    pub(crate) head: ResponseHead,
    pub(crate) body: Cow<'static, str>,
}

impl ResponseHead {
    /// The head of a response with keys, with further header lines.
    pub(crate) fn of_keys(spec: &KeySpec, more_lines: String) -> Self {
        let lines = match (spec.format(), spec.count()) {
            (Format::Raw, _) => key_lines!("application/octet-stream"),
            (Format::Text | Format::Hex | Format::Base64 | Format::Base64Url, _) => {
                key_lines!("text/plain; charset=utf-8")
            }
            (Format::Json, _) => key_lines!("application/json"),
            (Format::Jwk, None) => key_lines!("application/jwk+json"),
            (Format::Jwk, Some(_)) => key_lines!("application/jwk-set+json"),
        };
        Self { status: StatusCode::OK, lines: (lines, more_lines), closes: false }
    }

    /// The response for hyper, with the length of GET's body in place of the body of HEAD.
    pub(crate) fn into_response(self, body: Body, content_length: Option<u64>) -> Response<Body> {
        let mut response = Response::new(body);
        *response.status_mut() = self.status;
        let headers = response.headers_mut();
        for lines in [self.lines.0, &self.lines.1] {
            append_lines(headers, lines);
        }
        if self.closes {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if let Some(length) = content_length {
            headers.insert(CONTENT_LENGTH, length.into());
        }
        response
    }
}

impl TextReply {
    /// A response of the status 200 with these header lines.
    pub(crate) fn ok(lines: (&'static str, String), body: impl Into<Cow<'static, str>>) -> Self {
        Self { head: ResponseHead { status: StatusCode::OK, lines, closes: false }, body: body.into() }
    }

    pub(crate) fn into_response(self) -> Response<Body> {
        let body = match self.body {
            Cow::Borrowed(text) => text.into(),
            Cow::Owned(text) => text.into(),
        };
        self.head.into_response(Body::full(body), None)
    }
}

/// For routes that axum serves.
impl IntoResponse for TextReply {
    fn into_response(self) -> axum::response::Response {
        Self::into_response(self).map(axum::body::Body::new)
    }
}

fn append_lines(headers: &mut HeaderMap, lines: &str) {
    for line in lines.split_terminator("\r\n") {
        let (name, value) = line.split_once(": ").expect("a header line has a colon");
        let name = HeaderName::try_from(name).expect("the names are ours");
        headers.append(name, HeaderValue::try_from(value).expect("the values are ours"));
    }
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
pub type ResponseFuture = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;
