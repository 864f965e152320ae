//! The header of the PROXY protocol, versions 1 and 2 (haproxy's doc/proxy-protocol.txt): a load balancer that forwards
//! TCP begins each connection with it, to report the client's address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// The start of a version 1 header.
const V1_PREFIX: &[u8] = b"PROXY ";

/// The start of a version 2 header.
const V2_SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// Maximum length of a version 1 header in bytes, with its CRLF (section 2.1).
pub(crate) const V1_MAX: usize = 107;

/// Bytes of a version 2 header before the addresses.
const V2_FIXED: usize = 16;

/// Maximum number of bytes after those, as in nginx. Addresses take up to 216, and TLVs the rest.
const V2_LENGTH_MAX: usize = 4096;

/// A version 2 header for a connection that a proxy makes on its own behalf, such as a health check.
pub const LOCAL_HEADER: [u8; V2_FIXED] = *b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

/// A parsed PROXY header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProxyHeader {
    /// The client's address. `None` for LOCAL, UNKNOWN and UNSPEC, and for a client without a TCP address: then the
    /// connection's own address counts, as in haproxy.
    pub client: Option<IpAddr>,
    /// Length of the header in bytes; the end of a version 2 header may not have arrived yet.
    pub length: usize,
}

/// Why there is no valid header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxyHeaderError {
    /// The bytes do not begin like a header.
    Missing,
    /// The header is invalid: what was expected.
    Malformed(&'static str),
}

impl ProxyHeader {
    /// Parses the header at the start of `bytes`; `None` while too few bytes have arrived.
    ///
    /// # Errors
    /// No valid header begins with `bytes`.
    pub fn parse(bytes: &[u8]) -> Result<Option<Self>, ProxyHeaderError> {
        let parsed = match is_header(bytes) {
            None => Ok(None),
            Some(false) => return Err(ProxyHeaderError::Missing),
            Some(true) if bytes.starts_with(V1_PREFIX) => parse_v1(bytes),
            Some(true) => parse_v2(bytes),
        };
        parsed.map_err(ProxyHeaderError::Malformed)
    }
}

/// Whether `bytes` begin like a header; `None` while too few bytes have arrived.
pub(crate) fn is_header(bytes: &[u8]) -> Option<bool> {
    let starts = [V1_PREFIX, V2_SIGNATURE];
    if starts.iter().any(|start| bytes.starts_with(start)) {
        Some(true)
    } else if starts.iter().any(|start| start.starts_with(bytes)) {
        None
    } else {
        Some(false)
    }
}

/// Parses a version 1 header (section 2.1). Only the client's address is used, but the whole line must be valid.
fn parse_v1(bytes: &[u8]) -> Result<Option<ProxyHeader>, &'static str> {
    let line = &bytes[..bytes.len().min(V1_MAX)];
    let end = line.iter().position(|byte| matches!(byte, b'\r' | b'\n')).unwrap_or(line.len());
    match &line[end..] {
        [b'\r', b'\n', ..] => {}
        [] | [b'\r'] if line.len() < V1_MAX => return Ok(None),
        [] | [b'\r'] => return Err("expected CR LF within 107 bytes"),
        _ => return Err("expected CR and LF together"),
    }
    let header = |client| Some(ProxyHeader { client, length: end + 2 });
    let mut fields = line[V1_PREFIX.len()..end].split(|byte| *byte == b' ');
    let client = match fields.next() {
        // The rest of the line is ignored.
        Some(b"UNKNOWN") => return Ok(header(None)),
        Some(b"TCP4") => parse_source::<Ipv4Addr>(fields).map(IpAddr::V4),
        Some(b"TCP6") => parse_source::<Ipv6Addr>(fields).map(IpAddr::V6),
        _ => return Err("expected TCP4, TCP6 or UNKNOWN"),
    };
    let client = client.ok_or("expected two addresses and two ports, separated by single spaces")?;
    Ok(header(Some(client.to_canonical())))
}

/// The source address, if the fields are exactly two addresses and two ports.
fn parse_source<'a, A: FromStr>(mut fields: impl Iterator<Item = &'a [u8]>) -> Option<A> {
    let mut text = || str::from_utf8(fields.next()?).ok();
    let (source, destination, ports) = (text()?.parse().ok()?, text()?.parse::<A>(), [text()?, text()?]);
    // `parse` would accept a sign and leading zeros.
    let is_port = |text: &str| {
        let is_decimal =
            text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
        is_decimal && text.parse::<u16>().is_ok()
    };
    (destination.is_ok() && ports.into_iter().all(is_port) && fields.next().is_none()).then_some(source)
}

/// Parses a version 2 header (section 2.2). TLVs are skipped, CRC32C among them.
fn parse_v2(bytes: &[u8]) -> Result<Option<ProxyHeader>, &'static str> {
    let Some((&[.., command, family, high, low], rest)) = bytes.split_first_chunk::<V2_FIXED>() else {
        return Ok(None);
    };
    let length = usize::from(u16::from_be_bytes([high, low]));
    if length > V2_LENGTH_MAX {
        return Err("expected at most 4096 bytes after the first 16");
    }
    let header = |client| Ok(Some(ProxyHeader { client, length: V2_FIXED + length }));
    match command {
        // LOCAL: the family is ignored as well.
        0x20 => return header(None),
        0x21 => {}
        _ => return Err("expected version 2 and the command LOCAL or PROXY"),
    }
    let needed = match family {
        0x11 | 0x12 => 12,
        0x21 | 0x22 => 36,
        0x31 | 0x32 => 216,
        0x00..=0x02 | 0x10 | 0x20 | 0x30 => 0,
        _ => return Err("expected a known address family and protocol"),
    };
    if length < needed {
        return Err("expected as many bytes as the address family has");
    }
    match family {
        0x11 => rest.first_chunk().map_or(Ok(None), |ip: &[u8; 4]| header(Some(IpAddr::from(*ip)))),
        0x21 => rest
            .first_chunk()
            .map_or(Ok(None), |ip: &[u8; 16]| header(Some(IpAddr::from(*ip).to_canonical()))),
        _ => header(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A version 2 header.
    fn v2(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
        let length = u16::try_from(block.len()).unwrap();
        [V2_SIGNATURE, &[command, family], &length.to_be_bytes(), block].concat()
    }

    /// A version 1 header.
    fn v1(line: &str) -> Vec<u8> {
        format!("PROXY {line}\r\n").into_bytes()
    }

    fn client(bytes: &[u8]) -> Result<Option<IpAddr>, ProxyHeaderError> {
        let header = ProxyHeader::parse(bytes)?.expect("a whole header");
        assert_eq!(header.length, bytes.len());
        Ok(header.client)
    }

    #[test]
    fn a_valid_header_has_the_address_of_the_client() {
        let longest = ["ffff"; 8].join(":");
        for (bytes, expected) in [
            (v1("TCP4 192.0.2.1 192.0.2.2 56324 443"), Some("192.0.2.1")),
            (v1("TCP4 255.255.255.255 255.255.255.255 65535 0"), Some("255.255.255.255")),
            (v1("TCP6 2001:db8::1 ::1 1 2"), Some("2001:db8::1")),
            (v1(&format!("TCP6 {longest} {longest} 65535 65535")), Some(longest.as_str())),
            (v1("TCP6 ::ffff:192.0.2.1 ::1 1 2"), Some("192.0.2.1")),
            (v1("UNKNOWN"), None),
            (v1("UNKNOWN ffff::1 anything \0 1 \x7f"), None),
            (v2(0x21, 0x11, &[192, 0, 2, 1, 192, 0, 2, 2, 1, 2, 3, 4]), Some("192.0.2.1")),
            (v2(0x21, 0x11, &[[192, 0, 2, 1, 5].as_slice(), &[9; 4000]].concat()), Some("192.0.2.1")),
            (v2(0x21, 0x21, &[1; 36]), Some("101:101:101:101:101:101:101:101")),
            (
                v2(0x21, 0x21, &[[0; 10].as_slice(), &[255, 255, 192, 0, 2, 1], &[0; 20]].concat()),
                Some("192.0.2.1"),
            ),
            // UDP, Unix sockets and UNSPEC: the connection's own address counts.
            (v2(0x21, 0x12, &[1; 12]), None),
            (v2(0x21, 0x22, &[1; 36]), None),
            (v2(0x21, 0x31, &[1; 216]), None),
            (v2(0x21, 0x32, &[1; 300]), None),
            (v2(0x21, 0x00, &[]), None),
            (v2(0x21, 0x00, &[1; 4096]), None),
            (v2(0x21, 0x10, &[]), None),
            (v2(0x21, 0x01, &[]), None),
            // LOCAL: everything else is ignored.
            (LOCAL_HEADER.to_vec(), None),
            (v2(0x20, 0x11, &[]), None),
            (v2(0x20, 0x11, &[1; 12]), None),
            (v2(0x20, 0x99, &[1; 40]), None),
        ] {
            let expected = expected.map(|text| text.parse().unwrap());
            assert_eq!(client(&bytes), Ok(expected), "{}", bytes.escape_ascii());
        }
    }

    #[expect(clippy::too_many_lines, reason = "a table of cases")]
    #[test]
    fn a_malformed_header_is_refused() {
        let long = |length: usize| "x".repeat(length);
        for bytes in [
            v1(""),
            v1("TCP4"),
            v1("tcp4 192.0.2.1 192.0.2.2 1 2"),
            v1("TCP5 192.0.2.1 192.0.2.2 1 2"),
            v1("UDP4 192.0.2.1 192.0.2.2 1 2"),
            v1("UNKNOWNx"),
            v1(" TCP4 192.0.2.1 192.0.2.2 1 2"),
            v1("TCP4  192.0.2.1 192.0.2.2 1 2"),
            v1("TCP4 192.0.2.1 192.0.2.2 1 2 "),
            v1("TCP4 192.0.2.1 192.0.2.2 1 2 3"),
            v1("TCP4 192.0.2.1 192.0.2.2 1"),
            v1("TCP4\t192.0.2.1 192.0.2.2 1 2"),
            v1("TCP4 192.0.2.256 192.0.2.2 1 2"),
            v1("TCP4 192.0.2.01 192.0.2.2 1 2"),
            v1("TCP4 192.0.2.1 192.0.2 1 2"),
            v1("TCP4 ::1 192.0.2.2 1 2"),
            v1("TCP4 192.0.2.1 ::1 1 2"),
            v1("TCP6 192.0.2.1 ::1 1 2"),
            v1("TCP6 fe80::1%eth0 ::1 1 2"),
            v1("TCP6 ::1 fe80::1%1 1 2"),
            v1("TCP6 [::1] ::1 1 2"),
            v1("TCP6 1::2::3 ::1 1 2"),
            v1("TCP4 192.0.2.1 192.0.2.2 65536 2"),
            v1("TCP4 192.0.2.1 192.0.2.2 1 70000"),
            v1("TCP4 192.0.2.1 192.0.2.2 01 2"),
            v1("TCP4 192.0.2.1 192.0.2.2 1 00"),
            v1("TCP4 192.0.2.1 192.0.2.2 +1 2"),
            v1("TCP4 192.0.2.1 192.0.2.2 1 -2"),
            v1("TCP4 192.0.2.1 192.0.2.2  2"),
            v1("TCP4 192.0.2.1 192.0.2.2 1 \u{663}"),
            b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\n".to_vec(),
            b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\rx".to_vec(),
            b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2 \n".to_vec(),
            b"PROXY UNKNOWN\nGET / HTTP/1.1\r\n".to_vec(),
            b"PROXY UNKNOWN a\rb\r\n".to_vec(),
            // 108 bytes, so that the CRLF ends after the 107th.
            v1(&format!("UNKNOWN {}", long(92))),
            format!("PROXY UNKNOWN {}", long(93)).into_bytes(),
            format!("PROXY {}", long(101)).into_bytes(),
            v2(0x22, 0x11, &[1; 12]),
            v2(0x2f, 0x11, &[1; 12]),
            v2(0x11, 0x11, &[1; 12]),
            v2(0x31, 0x11, &[1; 12]),
            v2(0x00, 0x00, &[]),
            v2(0x21, 0x11, &[1; 11]),
            v2(0x21, 0x12, &[1; 11]),
            v2(0x21, 0x21, &[1; 35]),
            v2(0x21, 0x31, &[1; 215]),
            v2(0x21, 0x41, &[1; 300]),
            v2(0x21, 0x13, &[1; 300]),
            v2(0x21, 0xff, &[1; 300]),
            v2(0x21, 0x11, &[1; 4097]),
            v2(0x20, 0x00, &[1; 4097]),
        ] {
            let found = ProxyHeader::parse(&bytes);
            assert!(
                matches!(found, Err(ProxyHeaderError::Malformed(_))),
                "{}: {found:?}",
                bytes.escape_ascii()
            );
        }
        assert_eq!(client(&v1(&format!("UNKNOWN {}", long(91)))), Ok(None), "107 bytes");
    }

    #[test]
    fn other_bytes_are_not_a_header() {
        let tls = [0x16, 3, 1, 2, 0].as_slice();
        for bytes in [
            b"GET / HTTP/1.1\r\n".as_slice(),
            b"POST",
            b"PROXX",
            b"PROXY\r\n",
            b"proxy ",
            tls,
            b"\r\n\r\nG",
            b"\n",
            b"\r\n\r\n\0\r\nQUIT\r",
        ] {
            assert_eq!(ProxyHeader::parse(bytes), Err(ProxyHeaderError::Missing), "{}", bytes.escape_ascii());
            assert_eq!(is_header(bytes), Some(false));
        }
    }

    /// Bytes that begin like a header more often than arbitrary bytes do.
    fn almost_headers() -> impl Strategy<Value = Vec<u8>> {
        let bytes = proptest::collection::vec(any::<u8>(), 0..300);
        let text = "[TCP46UNKOWN 0-9a-f:.\r\n+-]{0,120}".prop_map(String::into_bytes);
        let commands = proptest::sample::select(vec![0x20, 0x21, 0x22, 0x11]);
        let block =
            (commands, any::<u8>(), 0..16u8, bytes.clone()).prop_map(|(command, family, length, block)| {
                [&[command, family & 0x33, 0, length * 16], block.as_slice()].concat()
            });
        prop_oneof![
            bytes,
            text.prop_map(|line| [V1_PREFIX, &line].concat()),
            block.prop_map(|block| [V2_SIGNATURE, &block].concat()),
        ]
    }

    /// The bytes of a valid header, and the client in it.
    fn headers() -> impl Strategy<Value = (Vec<u8>, Option<IpAddr>)> {
        let text = (any::<[IpAddr; 2]>(), any::<[u16; 2]>()).prop_map(|([source, other], [from, to])| {
            let (family, destination) = match source {
                IpAddr::V4(_) => ("TCP4", IpAddr::from(Ipv4Addr::LOCALHOST)),
                IpAddr::V6(_) => ("TCP6", IpAddr::from(Ipv6Addr::LOCALHOST)),
            };
            let destination = if other.is_ipv4() == source.is_ipv4() { other } else { destination };
            (v1(&format!("{family} {source} {destination} {from} {to}")), Some(source.to_canonical()))
        });
        let tlvs = proptest::collection::vec(any::<u8>(), 0..600);
        let binary = (any::<IpAddr>(), proptest::collection::vec(any::<u8>(), 20), tlvs.clone());
        let binary = binary.prop_map(|(source, rest, tlvs)| {
            let block = match source {
                IpAddr::V4(ip) => [ip.octets().as_slice(), &rest[..8], &tlvs].concat(),
                IpAddr::V6(ip) => [ip.octets().as_slice(), &rest, &tlvs].concat(),
            };
            let family = if source.is_ipv4() { 0x11 } else { 0x21 };
            (v2(0x21, family, &block), Some(source.to_canonical()))
        });
        let unknown = "[ -~]{0,91}".prop_map(|rest| (v1(&format!("UNKNOWN {rest}")), None));
        let local = (any::<u8>(), tlvs).prop_map(|(family, tlvs)| (v2(0x20, family, &tlvs), None));
        prop_oneof![text, binary, unknown, local]
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

        #[test]
        fn the_parser_does_not_panic_on_any_bytes(bytes in almost_headers()) {
            let found = ProxyHeader::parse(&bytes);
            if let Ok(Some(header)) = found {
                let (shortest, longest) = if bytes[0] == b'P' { (15, V1_MAX) } else { (16, 16 + V2_LENGTH_MAX) };
                prop_assert!((shortest..=longest).contains(&header.length));
                if bytes[0] == b'P' {
                    prop_assert!(bytes[..header.length].ends_with(b"\r\n"));
                }
            }
            // A result stays the same, whatever follows.
            let longer = [bytes.as_slice(), b"GET / HTTP/1.1\r\n\r\n"].concat();
            if found != Ok(None) {
                prop_assert_eq!(ProxyHeader::parse(&longer), found);
            }
            prop_assert_eq!(found == Err(ProxyHeaderError::Missing), is_header(&bytes) == Some(false));
        }

        #[test]
        fn every_valid_header_is_parsed(
            (bytes, client) in headers(),
            next in proptest::collection::vec(any::<u8>(), 0..50),
        ) {
            let header = ProxyHeader { client, length: bytes.len() };
            prop_assert_eq!(ProxyHeader::parse(&[bytes.as_slice(), &next].concat()), Ok(Some(header)));
            // A part of the header has no result yet, or the same one if the addresses are complete.
            for end in 0..bytes.len() {
                let part = ProxyHeader::parse(&bytes[..end]);
                prop_assert!(part == Ok(None) || (bytes[0] == b'\r' && end >= 16 && part == Ok(Some(header))));
            }
        }
    }
}
