//! The parser of the fast path: it recognizes the heads that need nothing but a response.
//!
//! It accepts a subset of what hyper accepts, and hyper judges the rest: a rule may be stricter here, and never more
//! lenient. `fuzz/targets/connection.rs` compares the two.

use crate::access::request_head::{Characters, RequestHead, alphanumeric_and, is_name};

/// The most headers of a request. hyper has the same limit, and answers more with 431.
const HEADER_COUNT_MAX: usize = 100;

/// Size of the buffer of one read, in bytes.
pub(super) const READ_BUFFER: usize = 4096;

/// A request line and headers of more bytes take the slow path.
const FAST_HEAD_MAX: usize = READ_BUFFER / 2;

/// A request that the fast path may respond to: its head is complete, and it has no body.
#[derive(Debug)]
pub(super) struct FastRequest<'a> {
    pub(super) head: RequestHead<'a>,
    /// Whether the client asks to close the connection.
    pub(super) closes: bool,
    /// Its size in bytes.
    pub(super) size: usize,
}

/// Why bytes do not begin with such a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NotFast {
    /// They are the beginning of what may become one.
    Incomplete,
    /// The request takes the slow path.
    Slow,
}

impl<'a> FastRequest<'a> {
    #[inline(always)] // with all it calls: otherwise the head is copied into the result
    pub(super) fn parse(bytes: &'a [u8]) -> Result<Self, NotFast> {
        let bytes = &bytes[..bytes.len().min(FAST_HEAD_MAX)];
        Unparsed { rest: bytes }.parse_head(bytes.len()).map_err(|reason| match reason {
            NotFast::Incomplete if bytes.len() == FAST_HEAD_MAX => NotFast::Slow,
            reason => reason,
        })
    }
}

/// The bytes that are not parsed yet.
struct Unparsed<'a> {
    rest: &'a [u8],
}

impl<'a> Unparsed<'a> {
    /// A request line and headers (RFC 9112 sections 3 and 5) that are among the next `length` bytes.
    #[inline(always)]
    fn parse_head(mut self, length: usize) -> Result<FastRequest<'a>, NotFast> {
        let is_head = self.rest.first() == Some(&b'H');
        if is_head { self.expect(b"HEAD ") } else { self.expect(b"GET ") }?;
        let path = self.take_while(|bytes| count_while(&PATH_CHARACTERS, bytes))?;
        if !path.starts_with(b"/") {
            return Err(NotFast::Slow);
        }
        let mut query = None;
        if self.rest[0] == b'?' {
            self.rest = &self.rest[1..];
            query = Some(self.take_while(|bytes| count_while(&QUERY_CHARACTERS, bytes))?);
        }
        self.expect(b" HTTP/1.1\r\n")?;
        let mut head = RequestHead::new(is_head, path, query);
        let mut closes = None;
        // Not ..=, which checks a flag of its own for each header.
        for _ in 0..HEADER_COUNT_MAX + 1 {
            if self.rest.first() == Some(&b'\r') {
                self.expect(b"\r\n")?;
                return Ok(FastRequest {
                    head,
                    closes: closes.unwrap_or(false),
                    size: length - self.rest.len(),
                });
            }
            let (name, value) = self.parse_header()?;
            let is = |known| is_name(name, known);
            // What concerns the connection, and not the response. By length first, as in `add_header`.
            match name.len() {
                6 if is(b"expect") => return Err(NotFast::Slow),
                7 if is(b"upgrade") => return Err(NotFast::Slow),
                10 if is(b"connection") => match closes {
                    None if value.eq_ignore_ascii_case(b"close") => closes = Some(true),
                    None if value.eq_ignore_ascii_case(b"keep-alive") => closes = Some(false),
                    _ => return Err(NotFast::Slow),
                },
                14 if is(b"content-length") => return Err(NotFast::Slow),
                17 if is(b"transfer-encoding") => return Err(NotFast::Slow),
                _ => head.add_header(name, value),
            }
        }
        Err(NotFast::Slow)
    }

    /// A header line, with at most one space around its value.
    #[inline(always)]
    fn parse_header(&mut self) -> Result<(&'a [u8], &'a [u8]), NotFast> {
        let name = self.take_while(count_name)?;
        if name.is_empty() {
            return Err(NotFast::Slow);
        }
        self.expect(b":")?;
        let value = self.take_while(count_printing)?;
        self.expect(b"\r\n")?;
        let value = value.strip_prefix(b" ").unwrap_or(value);
        if value.starts_with(b" ") || value.ends_with(b" ") {
            return Err(NotFast::Slow);
        }
        Ok((name, value))
    }

    /// Takes as many bytes as `count` counts at the beginning. At least one byte is left.
    #[inline]
    fn take_while(&mut self, count: impl FnOnce(&[u8]) -> usize) -> Result<&'a [u8], NotFast> {
        let (taken, rest) = self.rest.split_at(count(self.rest));
        self.rest = rest;
        if rest.is_empty() { Err(NotFast::Incomplete) } else { Ok(taken) }
    }

    /// Takes exactly `text`.
    #[inline]
    fn expect(&mut self, text: &[u8]) -> Result<(), NotFast> {
        if let Some(rest) = self.rest.strip_prefix(text) {
            self.rest = rest;
            return Ok(());
        }
        Err(if text.starts_with(self.rest) { NotFast::Incomplete } else { NotFast::Slow })
    }
}

/// What may be in a path and is the same to every parser of URIs (RFC 3986 section 3.3).
const PATH_CHARACTERS: Characters = alphanumeric_and(b"-._~/%=&+,:;@!$'()*");
/// The same for a query (RFC 3986 section 3.4).
const QUERY_CHARACTERS: Characters = alphanumeric_and(b"-._~/%=&+,:;@!$'()*?");
/// What names of headers have, of the characters that RFC 9110 section 5.6.2 allows.
const NAME_CHARACTERS: Characters = alphanumeric_and(b"-_");

/// How many of `bytes`, from the first on, are among `characters`.
#[inline]
fn count_while(characters: &Characters, bytes: &[u8]) -> usize {
    let mut count = 0;
    while bytes.get(count).is_some_and(|byte| characters[usize::from(*byte)]) {
        count += 1;
    }
    count
}

/// How many of `bytes`, from the first on, may be in the name of a header.
#[inline]
fn count_name(bytes: &[u8]) -> usize {
    // Letters and hyphens: nearly every name has nothing else.
    let (count, _) = count_by_word(bytes, |word| {
        let (low, lower) = (word & each(0x7f), (word | each(0x20)) & each(0x7f));
        let letters = (lower + each(0x80 - b'a')) & !(lower + each(0x7f - b'z'));
        let hyphens = !((low ^ each(b'-')) + each(0x7f));
        !(letters | hyphens) | word
    });
    if bytes.get(count) == Some(&b':') {
        return count;
    }
    count + count_while(&NAME_CHARACTERS, &bytes[count..])
}

/// How many of `bytes`, from the first on, are printing ASCII characters or spaces.
#[inline]
fn count_printing(bytes: &[u8]) -> usize {
    let (count, is_exact) = count_by_word(bytes, |word| {
        let low = word & each(0x7f);
        !(low + each(0x80 - b' ')) | (low + each(0x7f - b'~')) | word
    });
    if is_exact {
        return count;
    }
    count + bytes[count..].iter().take_while(|byte| matches!(byte, b' '..=b'~')).count()
}

/// How many of `bytes`, from the first on, `others` does not mark by the first bit of each in eight of them, and whether
/// that is because the next one is marked. It stops before the last bytes that are fewer than eight. Most of a head is
/// names and values, and one byte at a time took three times as long.
#[inline]
fn count_by_word(bytes: &[u8], others: impl Fn(u64) -> u64) -> (usize, bool) {
    let (words, _) = bytes.as_chunks();
    for (index, word) in words.iter().enumerate() {
        let marked = others(u64::from_le_bytes(*word)) & each(0x80);
        if marked != 0 {
            return (8 * index + marked.trailing_zeros() as usize / 8, true);
        }
    }
    (8 * words.len(), false)
}

/// Eight times the same byte. A sum of such words has no carry from one byte to the next if no byte's sum exceeds 255.
const fn each(byte: u8) -> u64 {
    u64::from_ne_bytes([byte; 8])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::request_head::RequestHeader;

    fn parse(text: &str) -> Result<FastRequest<'_>, NotFast> {
        FastRequest::parse(text.as_bytes())
    }

    /// A head with these lines after its `Host`.
    fn with_lines(lines: &str) -> String {
        format!("GET /key/7 HTTP/1.1\r\nHost: a\r\n{lines}\r\n")
    }

    fn is_slow(text: &str) -> bool {
        matches!(parse(text), Err(NotFast::Slow))
    }

    #[test]
    fn a_head_is_parsed_and_the_next_request_is_not() {
        let text = "HEAD /key/32?format=hex HTTP/1.1\r\nhost:[::1]:80\r\nAccept: text/plain\r\nX-Y_z:\r\nACCEPT:*/*\r\n\r\n";
        let following = format!("{text}GET /");
        let FastRequest { head, closes, size } = parse(&following).unwrap();
        assert_eq!(
            (head.is_head(), head.path, head.query),
            (true, &b"/key/32"[..], Some(&b"format=hex"[..]))
        );
        assert_eq!((closes, size), (false, text.len()));
        assert!(head.values(RequestHeader::Host).eq([b"[::1]:80"]));
        assert!(head.values(RequestHeader::Accept).eq([&b"text/plain"[..], b"*/*"]));
        assert_eq!(head.values(RequestHeader::Authorization).count(), 0);
    }

    #[test]
    fn connection_close_is_recognized() {
        for (value, expected) in
            [("close", true), ("Close", true), ("keep-alive", false), ("Keep-Alive", false)]
        {
            assert_eq!(parse(&with_lines(&format!("connection: {value}\r\n"))).unwrap().closes, expected);
        }
    }

    #[test]
    fn heads_that_need_more_than_a_response_take_the_slow_path() {
        for line in [
            "Connection: upgrade",
            "connection: close, x",
            "Connection: close\r\nConnection: keep-alive",
            "Content-Length: 0",
            "Expect: 100-continue",
            "Transfer-Encoding: chunked",
            "transfer-encoding: identity",
            "Upgrade: h2c",
            "folded: a\r\n b",
            "no colon",
            "space : a",
            "two-spaces:  a",
            "tab:\ta",
            "bare: a\nx: b",
            "carriage: a\rb",
            "control: \x01",
            "delete: \x7f",
            "latin: \u{e9}",
            ": a",
        ] {
            assert!(is_slow(&with_lines(&format!("{line}\r\n"))), "{line}");
        }
        for line in [
            "GET /key/7 HTTP/1.0",
            "GET /key/7 HTTP/2.0",
            "GET  /key/7 HTTP/1.1",
            "get /key/7 HTTP/1.1",
            "POST /key/7 HTTP/1.1",
            "HEAD/key/7 HTTP/1.1",
            "GET http://a/key/7 HTTP/1.1",
            "GET * HTTP/1.1",
            "GET  HTTP/1.1",
            "GET /key/7#a HTTP/1.1",
            "GET /\u{e9} HTTP/1.1",
            "GET /a\\b HTTP/1.1",
            "\r\nGET /key/7 HTTP/1.1",
        ] {
            assert!(is_slow(&format!("{line}\r\nHost: a\r\n\r\n")), "{line}");
        }
    }

    #[test]
    fn a_head_has_limits() {
        let headers = |count| (1..count).map(|n| format!("x-{n}: 1\r\n")).collect::<String>();
        assert!(parse(&with_lines(&headers(HEADER_COUNT_MAX))).is_ok());
        assert!(is_slow(&with_lines(&headers(HEADER_COUNT_MAX + 1))));
        let of_size =
            |size: usize| with_lines(&format!("x: {}\r\n", "x".repeat(size - with_lines("x: \r\n").len())));
        assert!(parse(&of_size(FAST_HEAD_MAX)).is_ok());
        assert!(is_slow(&of_size(FAST_HEAD_MAX + 1)));
        assert!(is_slow(&of_size(2 * FAST_HEAD_MAX)[..FAST_HEAD_MAX]), "already too long");
    }

    #[test]
    fn every_prefix_of_a_head_is_incomplete() {
        for head in ["GET /key/32?a=b HTTP/1.1\r\nHost: a\r\nAccept: */*\r\n\r\n", "HEAD / HTTP/1.1\r\n\r\n"]
        {
            for end in 0..head.len() {
                assert!(matches!(parse(&head[..end]), Err(NotFast::Incomplete)), "{end} bytes of {head:?}");
            }
        }
    }

    #[test]
    fn characters_are_counted_exactly() {
        for byte in 0..=u8::MAX {
            let is_printing = matches!(byte, b' '..=b'~');
            let is_name = byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
            for at in 0..20 {
                let mut bytes = *b"abcXYZ-_0189-azAZ---";
                bytes[at] = byte;
                assert_eq!(count_printing(&bytes), if is_printing { 20 } else { at }, "{byte} at {at}");
                assert_eq!(count_name(&bytes), if is_name { 20 } else { at }, "{byte} at {at}");
            }
        }
    }
}
