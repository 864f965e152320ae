//! Requests and responses.

use crate::Result;

const HEADERS_MAX: usize = 32;

/// The request that curl sends.
pub fn request(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: localhost:1123\r\nUser-Agent: curl/7.88.1\r\nAccept: */*\r\n\r\n")
}

/// The lengths of the head and of the body of a 200 that begins with these bytes, unless its head is incomplete.
pub fn parse(response: &[u8]) -> Result<Option<(usize, usize)>> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(length) = head.parse(response)? else {
        return Ok(None);
    };
    let declared = head.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
    let body = declared.and_then(|header| std::str::from_utf8(header.value).ok()?.parse().ok());
    match body {
        Some(body) if head.code == Some(200) => Ok(Some((length, body))),
        _ => Err(format!("expected 200: {}", String::from_utf8_lossy(&response[..length])).into()),
    }
}
