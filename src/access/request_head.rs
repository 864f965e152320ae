//! A view of a request's head: everything but the body. What a request means is decided from it, whichever transport
//! read the request.

use axum::http::{Method, Request, Version};
use strum::VariantArray;

/// Method, path, query and the headers that matter of a request.
#[derive(Debug, Clone)]
pub struct RequestHead<'a> {
    method: MethodKind,
    /// The path, not decoded.
    pub path: &'a [u8],
    /// The query, not decoded, without its question mark.
    pub query: Option<&'a [u8]>,
    /// Whether RFC 9112 section 3.2 requires a `Host`.
    needs_host: bool,
    has_transfer_encoding: bool,
    /// The first value of each header.
    first: [Option<&'a [u8]>; RequestHeader::VARIANTS.len()],
    /// The other values of repeated headers, in their order.
    more: Vec<(RequestHeader, &'a [u8])>,
}

/// What the routes distinguish: they have no other methods.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum MethodKind {
    Get,
    Head,
    Other,
}

/// The headers whose values any part of the service reads. A header that is to matter is added here, and nowhere else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, VariantArray)]
pub(crate) enum RequestHeader {
    /// `Host`
    Host,
    /// `Accept`
    Accept,
    /// `Authorization`
    Authorization,
    /// `Forwarded`
    Forwarded,
    /// `X-Forwarded-For`
    XForwardedFor,
}

/// A head that RFC 9112 forbids. The text is sent to the client; the connection is to be closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MalformedHead {
    /// A `Host` has other characters than a host and a port.
    #[error("The Host header is not a valid host")]
    InvalidHost,
    /// There is no `Host`.
    #[error("The Host header is missing")]
    MissingHost,
    /// There is more than one `Host`.
    #[error("The Host header is repeated")]
    RepeatedHost,
    /// RFC 9112 section 6.1: a request with Transfer-Encoding and Content-Length may be smuggled. hyper hides one of the
    /// two, and no route needs either.
    #[error("Transfer-Encoding is not accepted: requests have no body")]
    TransferEncoding,
}

impl<'a> RequestHead<'a> {
    /// The head of an HTTP/1.1 request, without its headers.
    pub(crate) fn new(is_head: bool, path: &'a [u8], query: Option<&'a [u8]>) -> Self {
        let method = if is_head { MethodKind::Head } else { MethodKind::Get };
        Self::with_method(method, path, query, true)
    }

    fn with_method(method: MethodKind, path: &'a [u8], query: Option<&'a [u8]>, needs_host: bool) -> Self {
        let first = [None; RequestHeader::VARIANTS.len()];
        Self { method, path, query, needs_host, has_transfer_encoding: false, first, more: Vec::new() }
    }

    /// Adds a header, whose name is valid. Names are compared without regard to case.
    #[inline(always)] // one match on the length, with that of the parser of the fast path
    pub(crate) fn add_header(&mut self, name: &[u8], value: &'a [u8]) {
        let is = |known| is_name(name, known);
        // By length first: comparing every name would cost as much as everything else here.
        let header = match name.len() {
            4 if is(b"host") => RequestHeader::Host,
            6 if is(b"accept") => RequestHeader::Accept,
            9 if is(b"forwarded") => RequestHeader::Forwarded,
            13 if is(b"authorization") => RequestHeader::Authorization,
            15 if is(b"x-forwarded-for") => RequestHeader::XForwardedFor,
            17 if is(b"transfer-encoding") => {
                self.has_transfer_encoding = true;
                return;
            }
            _ => return,
        };
        match &mut self.first[header as usize] {
            first @ None => *first = Some(value),
            Some(_) => self.more.push((header, value)),
        }
    }

    /// The values of a header, in their order.
    pub(crate) fn values(&self, header: RequestHeader) -> impl DoubleEndedIterator<Item = &'a [u8]> {
        let more = self.more.iter().filter(move |(other, _)| *other == header);
        self.first[header as usize].into_iter().chain(more.map(|(_, value)| *value))
    }

    /// Whether the method is GET or HEAD.
    pub(crate) fn reads(&self) -> bool {
        self.method != MethodKind::Other
    }

    /// Whether the method is HEAD: the response has the headers of GET's, and no body.
    pub fn is_head(&self) -> bool {
        self.method == MethodKind::Head
    }

    /// Checks what both transports accept and RFC 9112 forbids.
    ///
    /// # Errors
    /// A missing, repeated or invalid `Host`, or any `Transfer-Encoding`.
    pub(crate) fn validate(&self) -> Result<(), MalformedHead> {
        if self.has_transfer_encoding {
            return Err(MalformedHead::TransferEncoding);
        }
        let mut hosts = self.values(RequestHeader::Host);
        match (hosts.next(), hosts.next()) {
            (_, Some(_)) => Err(MalformedHead::RepeatedHost),
            (Some(host), None) if !is_valid_host(host) => Err(MalformedHead::InvalidHost),
            (None, None) if self.needs_host => Err(MalformedHead::MissingHost),
            _ => Ok(()),
        }
    }
}

impl<'a, B> From<&'a Request<B>> for RequestHead<'a> {
    fn from(request: &'a Request<B>) -> Self {
        let method = match *request.method() {
            Method::GET => MethodKind::Get,
            Method::HEAD => MethodKind::Head,
            _ => MethodKind::Other,
        };
        let uri = request.uri();
        let needs_host = request.version() >= Version::HTTP_11;
        let mut head =
            Self::with_method(method, uri.path().as_bytes(), uri.query().map(str::as_bytes), needs_host);
        for (name, value) in request.headers() {
            head.add_header(name.as_str().as_bytes(), value.as_bytes());
        }
        head
    }
}

/// Whether a valid name is `known`, which is in lower case. Of the characters of names, bit 5 distinguishes the case of
/// letters, and no other two.
pub(crate) fn is_name(name: &[u8], known: &[u8]) -> bool {
    name.len() == known.len() && name.iter().zip(known).all(|(byte, known)| byte | 0x20 == *known)
}

/// Whether `value` has only characters of a host and a port (RFC 3986 section 3.2).
fn is_valid_host(value: &[u8]) -> bool {
    value.iter().fold(true, |is_valid, byte| is_valid & HOST_CHARACTERS[usize::from(*byte)])
}

const HOST_CHARACTERS: Characters = alphanumeric_and(b"-._~!$&'()*+,;=:%[]");

/// A set of characters, as a table, because it is looked up for every byte.
pub(crate) type Characters = [bool; 256];

/// The letters and digits of ASCII, and `punctuation`.
pub(crate) const fn alphanumeric_and(punctuation: &[u8]) -> Characters {
    let mut table = [false; 256];
    let mut at = 0;
    while at < punctuation.len() {
        table[punctuation[at] as usize] = true;
        at += 1;
    }
    let mut byte = u8::MAX;
    while byte > 0 {
        table[byte as usize] |= byte.is_ascii_alphanumeric();
        byte -= 1;
    }
    table
}
