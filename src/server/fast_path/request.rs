//! The parser of the fast path: it recognises requests for raw keys whose headers change nothing about the response.

use std::mem::MaybeUninit;

use crate::telemetry::endpoint::KEY_PREFIX;

/// The most headers of a request. hyper has the same limit, and answers more with 431.
const HEADER_COUNT_MAX: usize = 100;

/// Size of the buffer of one read, in bytes.
pub(super) const READ_BUFFER: usize = 4096;

/// A request line and headers of more bytes take the slow path.
const FAST_HEAD_MAX: usize = READ_BUFFER / 2;

/// The beginning of a request for a key: the method, and the path up to the length.
const START: [u8; METHOD.len() + KEY_PREFIX.len()] = {
    let mut start = [0; METHOD.len() + KEY_PREFIX.len()];
    let (method, path) = start.split_at_mut(METHOD.len());
    method.copy_from_slice(METHOD);
    path.copy_from_slice(KEY_PREFIX.as_bytes());
    start
};
const METHOD: &[u8] = b"GET ";

/// A request for a raw key, without headers that could change the response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FastRequest<'a> {
    /// The length as the path has it, not validated.
    pub length: &'a str,
    /// Whether the connection closes after the response.
    pub closes: bool,
}

/// What the unread bytes of a connection begin with.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ParsedHead<'a> {
    /// A fast-path request, and its size in bytes.
    Fast(FastRequest<'a>, usize),
    /// The beginning of what may become a fast-path request.
    Incomplete,
    /// Anything else, which takes the slow path.
    Slow,
}

impl<'a> ParsedHead<'a> {
    pub(super) fn parse(bytes: &'a [u8]) -> Self {
        let start = &bytes[..bytes.len().min(START.len())];
        if start != &START[..start.len()] {
            return Self::Slow;
        }
        let mut headers = [const { MaybeUninit::uninit() }; HEADER_COUNT_MAX];
        let mut request = httparse::Request::new(&mut []);
        let size = match request.parse_with_uninit_headers(bytes, &mut headers) {
            Ok(httparse::Status::Complete(size)) if size <= FAST_HEAD_MAX => size,
            Ok(httparse::Status::Partial) if bytes.len() <= FAST_HEAD_MAX => return Self::Incomplete,
            _ => return Self::Slow,
        };
        let path = request.path.unwrap_or_default();
        let length = path.get(KEY_PREFIX.len()..).unwrap_or_default();
        match close_requested(request.headers) {
            Some(closes) if request.version == Some(1) => Self::Fast(FastRequest { length, closes }, size),
            _ => Self::Slow,
        }
    }
}

/// Whether `headers` ask to close the connection; `None` if they have anything else that matters to the response, or
/// not exactly one valid `Host`. Other headers are ignored, as on the slow path.
fn close_requested(headers: &[httparse::Header<'_>]) -> Option<bool> {
    let (mut hosts, mut closes) = (0, false);
    for header in headers {
        let is = |name: &str| header.name.eq_ignore_ascii_case(name);
        // By length first: comparing every name would cost as much as everything else here.
        match header.name.len() {
            4 if is("host") => {
                hosts += 1;
                if !is_valid_host(header.value) {
                    return None;
                }
            }
            6 if is("accept") && header.value != b"*/*" => return None,
            6 if is("expect") => return None,
            7 if is("upgrade") => return None,
            9 if is("forwarded") => return None,
            10 if is("connection") => match header.value {
                b"close" => closes = true,
                b"keep-alive" => {}
                _ => return None,
            },
            13 if is("authorization") => return None,
            14 if is("content-length") => return None,
            15 if is("x-forwarded-for") => return None,
            17 if is("transfer-encoding") => return None,
            _ => {}
        }
    }
    (hosts == 1).then_some(closes)
}

/// Whether `value` has only characters of a host and a port (RFC 3986 section 3.2).
pub(crate) fn is_valid_host(value: &[u8]) -> bool {
    value.iter().all(|byte| HOST_CHARACTERS[usize::from(*byte)])
}

/// A table, because it is looked up for every byte of every `Host`.
const HOST_CHARACTERS: [bool; 256] = {
    let mut table = [false; 256];
    let allowed = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~!$&'()*+,;=:%[]";
    let mut at = 0;
    while at < allowed.len() {
        table[allowed[at] as usize] = true;
        at += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    fn fast(length: &str) -> ParsedHead<'_> {
        ParsedHead::Fast(FastRequest { length, closes: false }, 0)
    }

    /// Parses `head`, and sets the size to 0 after a check.
    fn parse(head: &str) -> ParsedHead<'_> {
        match ParsedHead::parse(head.as_bytes()) {
            ParsedHead::Fast(request, size) => {
                assert_eq!(size, head.len());
                ParsedHead::Fast(request, 0)
            }
            other => other,
        }
    }

    #[test]
    fn common_headers_take_the_fast_path() {
        assert_eq!(parse("GET /key/32 HTTP/1.1\r\nHost: a\r\n\r\n"), fast("32"));
        assert_eq!(parse("GET /key/ HTTP/1.1\r\nHost: a\r\n\r\n"), fast(""));
        let common =
            "User-Agent: curl/8.14.1\r\nAccept: */*\r\nAccept-Encoding: gzip\r\nConnection: keep-alive\r\n";
        assert_eq!(parse(&format!("GET /key/7 HTTP/1.1\r\nhost: a:1123\r\n{common}\r\n")), fast("7"));
        assert_eq!(
            parse("GET /key/7 HTTP/1.1\r\nHOST: [::1]:80\r\nCONNECTION: close\r\n\r\n"),
            ParsedHead::Fast(FastRequest { length: "7", closes: true }, 0)
        );
        let headers = (1..HEADER_COUNT_MAX).map(|n| format!("x-{n}: 1\r\n")).collect::<String>();
        assert_eq!(parse(&format!("GET /key/7 HTTP/1.1\r\nHost: a\r\n{headers}\r\n")), fast("7"));
    }

    #[test]
    fn headers_that_matter_take_the_slow_path() {
        for header in [
            "Host: b",
            "Accept: text/plain",
            "Accept: */*;q=0",
            "Authorization: Bearer x",
            "Connection: upgrade",
            "Connection: Close",
            "connection: close, x",
            "Content-Length: 0",
            "Expect: 100-continue",
            "FORWARDED: for=1.2.3.4",
            "Transfer-Encoding: chunked",
            "transfer-encoding: identity",
            "Upgrade: h2c",
            "X-Forwarded-For: 1.2.3.4",
            "folded: a\r\n b",
            "no colon",
            "space : a",
        ] {
            assert_eq!(
                parse(&format!("GET /key/7 HTTP/1.1\r\nHost: a\r\n{header}\r\n\r\n")),
                ParsedHead::Slow,
                "{header}"
            );
        }
        for line in [
            "GET /key/7 HTTP/1.0",
            "GET /key/7 HTTP/2.0",
            "GET  /key/7 HTTP/1.1",
            "HEAD /key/7 HTTP/1.1",
            "get /key/7 HTTP/1.1",
            "GET /password/7 HTTP/1.1",
            "GET http://a/key/7 HTTP/1.1",
            "\r\nGET /key/7 HTTP/1.1",
        ] {
            assert_eq!(parse(&format!("{line}\r\nHost: a\r\n\r\n")), ParsedHead::Slow, "{line}");
        }
        assert_eq!(parse("GET /key/7 HTTP/1.1\r\n\r\n"), ParsedHead::Slow, "no Host");
        assert_eq!(parse("GET /key/7 HTTP/1.1\r\nHost: a/b\r\n\r\n"), ParsedHead::Slow);
        let many = "x: 1\r\n".repeat(HEADER_COUNT_MAX);
        assert_eq!(parse(&format!("GET /key/7 HTTP/1.1\r\nHost: a\r\n{many}\r\n")), ParsedHead::Slow);
        let long = "x".repeat(FAST_HEAD_MAX);
        assert_eq!(parse(&format!("GET /key/7 HTTP/1.1\r\nHost: a\r\nx: {long}\r\n\r\n")), ParsedHead::Slow);
        assert_eq!(
            parse(&format!("GET /key/7 HTTP/1.1\r\nHost: a\r\nx: {long}")),
            ParsedHead::Slow,
            "already too long"
        );
    }

    #[test]
    fn every_prefix_of_a_fast_request_is_incomplete() {
        let head = "GET /key/32 HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n";
        for end in 0..head.len() {
            assert_eq!(parse(&head[..end]), ParsedHead::Incomplete, "{end} bytes");
        }
    }
}
