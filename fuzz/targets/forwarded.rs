//! The client address in forwarded headers. The first byte of an input selects the header and how the proxies write
//! it. The rest is forged by the client, one header value per line. The first proxy may quote the last line, as it
//! quotes the `Host` of a client.
//!
//! A chain of trusted proxies appends its elements, as proxies do. The result must be the address that the first
//! proxy saw, whatever the client forged. Headers of an untrusted peer are ignored, and every result occurs in the
//! headers.

#![no_main]

use std::net::IpAddr;

use http::Request;
use http::header::HeaderValue;
use key_service::access::forwarded::{ForwardedHeader, ProxySource, TrustedProxies};
use key_service::access::peer::Origin;
use key_service::access::request_head::RequestHead;
use libfuzzer_sys::fuzz_target;

/// The real client, in each notation.
const CLIENT: [&str; 4] = ["203.0.113.7", "203.0.113.7:4711", "[2001:db8:7::7]:4711", "2001:db8:7::7"];

/// Trusted proxies between the client and the daemon.
const BETWEEN: [&str; 2] = ["10.1.1.1", "2001:db8:1::9"];

fuzz_target!(|input: &[u8]| {
    let [setup, forged @ ..] = input else { return };
    let header = if setup & 1 == 0 { ForwardedHeader::XForwardedFor } else { ForwardedHeader::Forwarded };
    let proxies = TrustedProxies::new(&trusted(), header);
    let forged: Vec<HeaderValue> =
        forged.split(|byte| *byte == b'\n').filter_map(|line| HeaderValue::from_bytes(line).ok()).collect();

    // Requests that come directly from one peer.
    let trusted_peer = Origin::Ip("10.0.0.1".parse().expect("an address"));
    let untrusted_peer = Origin::Ip("192.0.2.9".parse().expect("an address"));
    let request = with_headers(header, &forged);
    let head = RequestHead::from(&request);
    assert_eq!(proxies.client_ip(untrusted_peer, &head), None, "an untrusted peer is itself the client");
    let found = proxies.client_ip(trusted_peer, &head);
    if let Some(found) = found {
        assert!(
            forged.iter().any(|value| contains_address(value, found)),
            "{found} is in none of {forged:?}"
        );
    }
    if header == ForwardedHeader::XForwardedFor {
        assert_eq!(found, rightmost(&forged), "{forged:?}");
    }

    // Requests through a chain of trusted proxies.
    let client = CLIENT[usize::from(setup >> 1 & 3)];
    let expected = address(client).expect("the client has an address");
    let hops = usize::from(setup >> 3 & 15) % (BETWEEN.len() + 1);
    let mut chain: Vec<Vec<u8>> =
        [client].iter().chain(&BETWEEN[..hops]).map(|hop| written(header, hop).into_bytes()).collect();
    if let (ForwardedHeader::Forwarded, true, Some(host)) = (header, setup & 128 != 0, forged.last()) {
        // RFC 7239 section 5.3: the Host of the request, quoted (RFC 9110 section 5.6.4) because it may have a colon.
        chain[0].extend(b";host=\"");
        for byte in host.as_bytes() {
            if matches!(byte, b'"' | b'\\') {
                chain[0].push(b'\\');
            }
            chain[0].push(*byte);
        }
        chain[0].push(b'"');
    }
    let chain = chain.join(&b", "[..]);
    let chain = HeaderValue::from_bytes(&chain).expect("a chain has no control characters");
    let separate: Vec<_> = forged.iter().cloned().chain([chain.clone()]).collect();
    assert_eq!(
        proxies.client_ip(trusted_peer, &RequestHead::from(&with_headers(header, &separate))),
        Some(expected),
        "as a separate value: {separate:?}"
    );
    if let Some((last, before)) = forged.split_last() {
        let joined = [last.as_bytes(), b", ", chain.as_bytes()].concat();
        let joined = HeaderValue::from_bytes(&joined).expect("two values make one");
        let values: Vec<_> = before.iter().cloned().chain([joined]).collect();
        assert_eq!(
            proxies.client_ip(trusted_peer, &RequestHead::from(&with_headers(header, &values))),
            Some(expected),
            "appended to the last value: {values:?}"
        );
    }
});

fn trusted() -> Vec<ProxySource> {
    ["10.0.0.0/8", "2001:db8:1::/48"].map(|text| text.parse().expect("a network")).to_vec()
}

fn is_trusted(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.octets()[0] == 10,
        IpAddr::V6(ip) => ip.segments()[..3] == [0x2001, 0xdb8, 1],
    }
}

fn with_headers(header: ForwardedHeader, values: &[HeaderValue]) -> Request<()> {
    let name = match header {
        ForwardedHeader::XForwardedFor => "x-forwarded-for",
        ForwardedHeader::Forwarded => "forwarded",
    };
    let request = values.iter().fold(Request::builder(), |request, value| request.header(name, value));
    request.body(()).expect("the headers are valid")
}

/// An address as a proxy writes it into the header.
fn written(header: ForwardedHeader, hop: &str) -> String {
    match header {
        ForwardedHeader::XForwardedFor => hop.to_owned(),
        ForwardedHeader::Forwarded if hop.contains(':') && !hop.contains(['[', '.']) => {
            format!("for=\"[{hop}]\";proto=https")
        }
        ForwardedHeader::Forwarded if hop.contains(':') => format!("proto=https;For=\"{hop}\""),
        ForwardedHeader::Forwarded => format!("for={hop}"),
    }
}

/// Parses an address in any notation.
fn address(text: &str) -> Option<IpAddr> {
    let bare = match (text.strip_prefix('['), text.matches(':').count()) {
        (Some(rest), _) => {
            let (inside, after) = rest.split_once(']')?;
            let port = after.strip_prefix(':');
            let is_valid = after.is_empty() || port.is_some_and(is_port);
            return inside
                .parse()
                .ok()
                .filter(|ip: &IpAddr| is_valid && ip.is_ipv6())
                .map(|ip| ip.to_canonical());
        }
        (None, 1) => {
            let (bare, port) = text.split_once(':')?;
            return bare.parse().ok().filter(|ip: &IpAddr| is_port(port) && ip.is_ipv4());
        }
        (None, _) => text,
    };
    bare.parse().ok().map(|ip: IpAddr| ip.to_canonical())
}

fn is_port(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) && text.parse::<u16>().is_ok()
}

/// The rightmost address of the list that is not trusted. If an element before it can't be parsed, the address to the
/// right of that element.
fn rightmost(values: &[HeaderValue]) -> Option<IpAddr> {
    let mut found = None;
    for value in values.iter().rev() {
        for element in value.as_bytes().rsplit(|byte| *byte == b',') {
            let text = String::from_utf8_lossy(element);
            let Some(ip) = address(text.trim_matches([' ', '\t'])) else { return found };
            found = Some(ip);
            if !is_trusted(ip) {
                return found;
            }
        }
    }
    found
}

/// Whether the value contains the address.
fn contains_address(value: &HeaderValue, ip: IpAddr) -> bool {
    let text = String::from_utf8_lossy(value.as_bytes());
    text.split([',', ';', '=', '"', ' ', '\t']).any(|word| address(word) == Some(ip))
}
