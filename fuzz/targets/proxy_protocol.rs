//! The parser of PROXY headers. An input is the start of a connection. A first byte of 1 or 2 is replaced by the
//! start of a header of that version, so that most inputs are nearly headers.
//!
//! The parser must agree with a second implementation of the specification, below, which uses none of the standard
//! library's parsers. Further bytes must not change a result, and a prefix of the input must give the same result or
//! none yet.

#![no_main]

use std::net::IpAddr;

use key_service::access::proxy_header::{ProxyHeader, ProxyHeaderError};
use libfuzzer_sys::fuzz_target;

const SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

fuzz_target!(|input: &[u8]| {
    let input = match input {
        [1, rest @ ..] => [b"PROXY ", rest].concat(),
        [2, rest @ ..] => [SIGNATURE, rest].concat(),
        _ => input.to_vec(),
    };
    let found = ProxyHeader::parse(&input);
    let expected = expected(&input);
    match (&found, &expected) {
        (Ok(None), Expected::More) => {}
        (Ok(Some(header)), Expected::Header(client, length)) => {
            assert_eq!((header.client, header.length), (*client, *length), "{}", input.escape_ascii());
        }
        (Err(ProxyHeaderError::Missing), Expected::Missing)
        | (Err(ProxyHeaderError::Malformed(_)), Expected::Malformed) => {}
        _ => panic!("{}: expected {expected:?}, found {found:?}", input.escape_ascii()),
    }
    if found != Ok(None) {
        let longer = [input.as_slice(), b"\r\nGET / HTTP/1.1\r\n\r\n"].concat();
        assert_eq!(ProxyHeader::parse(&longer), found, "{}", input.escape_ascii());
    }
    for end in 0..input.len().min(120) {
        let part = ProxyHeader::parse(&input[..end]);
        assert!(part == Ok(None) || part == found, "{}, {end} bytes: {part:?}", input.escape_ascii());
    }
});

#[derive(Debug)]
enum Expected {
    More,
    Missing,
    Malformed,
    Header(Option<IpAddr>, usize),
}

fn expected(input: &[u8]) -> Expected {
    let common = |start: &[u8]| input.iter().zip(start).all(|(a, b)| a == b);
    match (common(b"PROXY "), common(SIGNATURE)) {
        (false, false) => Expected::Missing,
        (true, false) if input.len() >= 6 => text(input),
        (false, true) if input.len() >= 12 => binary(input),
        _ => Expected::More,
    }
}

/// Version 1, section 2.1 of the specification.
fn text(input: &[u8]) -> Expected {
    for (at, byte) in input.iter().enumerate() {
        match (byte, input.get(at + 1)) {
            (b'\r', Some(b'\n')) if at + 2 <= 107 => return line(&input[6..at], at + 2),
            (b'\r', None) if at + 2 <= 107 => return Expected::More,
            (b'\r' | b'\n', _) => return Expected::Malformed,
            _ if at >= 106 => return Expected::Malformed,
            _ => {}
        }
    }
    Expected::More
}

fn line(line: &[u8], length: usize) -> Expected {
    let words: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let client = match words.as_slice() {
        [b"UNKNOWN", ..] => return Expected::Header(None, length),
        [b"TCP4", from, to, ports @ ..]
            if ports.len() == 2 && ports.iter().all(|port| is_number(port, 65_535)) =>
        {
            v4(to).and(v4(from)).map(IpAddr::from)
        }
        [b"TCP6", from, to, ports @ ..]
            if ports.len() == 2 && ports.iter().all(|port| is_number(port, 65_535)) =>
        {
            v6(to).and(v6(from)).map(IpAddr::from)
        }
        _ => None,
    };
    match client {
        Some(client) => Expected::Header(Some(unmapped(client)), length),
        None => Expected::Malformed,
    }
}

/// A decimal number without leading zeros.
fn number(text: &[u8]) -> Option<u32> {
    let is_canonical = matches!(text, [b'0'] | [b'1'..=b'9', ..]) && text.len() <= 5;
    let digits = text.iter().map(|byte| byte.is_ascii_digit().then(|| u32::from(byte - b'0')));
    is_canonical
        .then(|| digits.collect::<Option<Vec<_>>>())?
        .map(|digits| digits.iter().fold(0, |sum, digit| sum * 10 + digit))
}

fn is_number(text: &[u8], limit: u32) -> bool {
    number(text).is_some_and(|number| number <= limit)
}

fn v4(text: &[u8]) -> Option<[u8; 4]> {
    let parts: Option<Vec<u8>> =
        text.split(|byte| *byte == b'.').map(|part| u8::try_from(number(part)?).ok()).collect();
    parts?.try_into().ok()
}

/// RFC 4291 section 2.2: groups of one to four digits, at most one `::` for one or more groups, and at the end an
/// IPv4 address for the last two.
fn v6(text: &[u8]) -> Option<[u8; 16]> {
    let at = text.windows(2).position(|pair| pair == b"::");
    let (head, tail) = match at {
        Some(at) => (groups(&text[..at], false)?, groups(&text[at + 2..], true)?),
        None => (groups(text, true)?, Vec::new()),
    };
    let missing = 16_usize.checked_sub(head.len() + tail.len())?;
    // As in the standard library, `::` stands for at least one group.
    if (at.is_some() && missing == 0) || (at.is_none() && missing != 0) {
        return None;
    }
    [head, vec![0; missing], tail].concat().try_into().ok()
}

fn groups(text: &[u8], may_end_in_v4: bool) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    if text.is_empty() {
        return Some(bytes);
    }
    let parts: Vec<&[u8]> = text.split(|byte| *byte == b':').collect();
    for (n, part) in parts.iter().enumerate() {
        if may_end_in_v4 && n + 1 == parts.len() && part.contains(&b'.') {
            bytes.extend(v4(part)?);
            continue;
        }
        if part.is_empty() || part.len() > 4 || !part.iter().all(u8::is_ascii_hexdigit) {
            return None;
        }
        let value = part
            .iter()
            .fold(0_u32, |value, digit| value * 16 + char::from(*digit).to_digit(16).expect("a digit"));
        bytes.extend(&value.to_be_bytes()[2..]);
    }
    Some(bytes)
}

fn unmapped(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V6(v6) if v6.octets()[..12] == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255] => {
            let octets = v6.octets();
            IpAddr::from([octets[12], octets[13], octets[14], octets[15]])
        }
        ip => ip,
    }
}

/// Version 2, section 2.2 of the specification.
fn binary(input: &[u8]) -> Expected {
    if input.len() < 16 {
        return Expected::More;
    }
    let (version, command, family, protocol) =
        (input[12] >> 4, input[12] & 15, input[13] >> 4, input[13] & 15);
    let length = usize::from(input[14]) * 256 + usize::from(input[15]);
    if version != 2 || command > 1 || length > 4096 {
        return Expected::Malformed;
    }
    let own = Expected::Header(None, 16 + length);
    if command == 0 {
        return own;
    }
    if family > 3 || protocol > 2 {
        return Expected::Malformed;
    }
    let size = [0, 12, 36, 216][usize::from(family)];
    if protocol > 0 && length < size {
        return Expected::Malformed;
    }
    let width = match (family, protocol) {
        (1, 1) => 4,
        (2, 1) => 16,
        _ => return own,
    };
    let Some(address) = input[16..].get(..width) else { return Expected::More };
    let client = match <[u8; 4]>::try_from(address) {
        Ok(octets) => IpAddr::from(octets),
        Err(_) => {
            unmapped(IpAddr::from(<[u8; 16]>::try_from(address).expect("an IPv6 address has 16 bytes")))
        }
    };
    Expected::Header(Some(client), 16 + length)
}
