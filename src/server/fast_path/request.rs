//! Parsing: whether the bytes of a connection begin with a request for the fast path.

use std::mem::MaybeUninit;

use crate::telemetry::endpoint::KEY_PREFIX;

/// The most headers of a request; hyper reads as many, and answers more with 431.
const FIELDS_MAX: usize = 100;

/// Bytes that are read at once.
pub(super) const READ_BUFFER: usize = 4096;

/// A head that is longer takes the long way.
const HEAD_MAX: usize = READ_BUFFER / 2;

/// How a request for a key begins: its method, and its path up to the length.
const START: [u8; METHOD.len() + KEY_PREFIX.len()] = {
    let mut start = [0; METHOD.len() + KEY_PREFIX.len()];
    let (method, path) = start.split_at_mut(METHOD.len());
    method.copy_from_slice(METHOD);
    path.copy_from_slice(KEY_PREFIX.as_bytes());
    start
};
const METHOD: &[u8] = b"GET ";

/// A request for a raw key, every part of which is understood here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FastRequest<'a> {
    /// What the path has for a length; not checked.
    pub length: &'a str,
    /// Whether the client wants the connection to end with the answer.
    pub closes: bool,
}

/// What the bytes of a connection begin with.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Head<'a> {
    /// A plain request, and how many bytes it has.
    Plain(FastRequest<'a>, usize),
    /// What may become one.
    Partial,
    /// Something else.
    Other,
}

impl<'a> Head<'a> {
    pub(super) fn read(bytes: &'a [u8]) -> Self {
        let start = &bytes[..bytes.len().min(START.len())];
        if start != &START[..start.len()] {
            return Self::Other;
        }
        let mut fields = [const { MaybeUninit::uninit() }; FIELDS_MAX];
        let mut request = httparse::Request::new(&mut []);
        let size = match request.parse_with_uninit_headers(bytes, &mut fields) {
            Ok(httparse::Status::Complete(size)) if size <= HEAD_MAX => size,
            Ok(httparse::Status::Partial) if bytes.len() <= HEAD_MAX => return Self::Partial,
            _ => return Self::Other,
        };
        let path = request.path.unwrap_or_default();
        let length = path.get(KEY_PREFIX.len()..).unwrap_or_default();
        match closes(request.headers) {
            Some(closes) if request.version == Some(1) => Self::Plain(FastRequest { length, closes }, size),
            _ => Self::Other,
        }
    }
}

/// Whether the connection ends after a request with these fields; `None` where they say anything else that matters.
/// Fields that nothing here looks at are let pass, as they are on the long way.
fn closes(fields: &[httparse::Header<'_>]) -> Option<bool> {
    let (mut hosts, mut closes) = (0, false);
    for field in fields {
        let is = |name: &str| field.name.eq_ignore_ascii_case(name);
        // By length first: a comparison with every name would cost as much as the rest.
        match field.name.len() {
            4 if is("host") => {
                hosts += 1;
                if !is_host(field.value) {
                    return None;
                }
            }
            6 if is("accept") && field.value != b"*/*" => return None,
            6 if is("expect") => return None,
            7 if is("upgrade") => return None,
            9 if is("forwarded") => return None,
            10 if is("connection") => match field.value {
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

/// RFC 3986 section 3.2: whether these are characters of a host and its port.
pub fn is_host(value: &[u8]) -> bool {
    value.iter().all(|byte| HOST_CHARACTERS[usize::from(*byte)])
}

/// As a table: it is looked into for every byte of every request.
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

    fn plain(length: &str) -> Head<'_> {
        Head::Plain(FastRequest { length, closes: false }, 0)
    }

    /// What a head is read as, without its size.
    fn read(head: &str) -> Head<'_> {
        match Head::read(head.as_bytes()) {
            Head::Plain(request, size) => {
                assert_eq!(size, head.len());
                Head::Plain(request, 0)
            }
            other => other,
        }
    }

    #[test]
    fn a_plain_head_is_one_that_says_nothing_but_a_length() {
        assert_eq!(read("GET /key/32 HTTP/1.1\r\nHost: a\r\n\r\n"), plain("32"));
        assert_eq!(read("GET /key/ HTTP/1.1\r\nHost: a\r\n\r\n"), plain(""));
        let usual =
            "User-Agent: curl/8.14.1\r\nAccept: */*\r\nAccept-Encoding: gzip\r\nConnection: keep-alive\r\n";
        assert_eq!(read(&format!("GET /key/7 HTTP/1.1\r\nhost: a:1123\r\n{usual}\r\n")), plain("7"));
        assert_eq!(
            read("GET /key/7 HTTP/1.1\r\nHOST: [::1]:80\r\nCONNECTION: close\r\n\r\n"),
            Head::Plain(FastRequest { length: "7", closes: true }, 0)
        );
        let fields = (1..FIELDS_MAX).map(|n| format!("x-{n}: 1\r\n")).collect::<String>();
        assert_eq!(read(&format!("GET /key/7 HTTP/1.1\r\nHost: a\r\n{fields}\r\n")), plain("7"));
    }

    #[test]
    fn whatever_else_a_head_says_is_not_for_here() {
        for field in [
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
                read(&format!("GET /key/7 HTTP/1.1\r\nHost: a\r\n{field}\r\n\r\n")),
                Head::Other,
                "{field}"
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
            assert_eq!(read(&format!("{line}\r\nHost: a\r\n\r\n")), Head::Other, "{line}");
        }
        assert_eq!(read("GET /key/7 HTTP/1.1\r\n\r\n"), Head::Other, "no host");
        assert_eq!(read("GET /key/7 HTTP/1.1\r\nHost: a/b\r\n\r\n"), Head::Other);
        let many = "x: 1\r\n".repeat(FIELDS_MAX);
        assert_eq!(read(&format!("GET /key/7 HTTP/1.1\r\nHost: a\r\n{many}\r\n")), Head::Other);
        let long = "x".repeat(HEAD_MAX);
        assert_eq!(read(&format!("GET /key/7 HTTP/1.1\r\nHost: a\r\nx: {long}\r\n\r\n")), Head::Other);
        assert_eq!(
            read(&format!("GET /key/7 HTTP/1.1\r\nHost: a\r\nx: {long}")),
            Head::Other,
            "it will not be shorter"
        );
    }

    #[test]
    fn every_beginning_of_a_plain_head_may_become_one() {
        let head = "GET /key/32 HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n";
        for end in 0..head.len() {
            assert_eq!(read(&head[..end]), Head::Partial, "{end} bytes");
        }
    }
}
