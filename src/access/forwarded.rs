//! The client's address in `X-Forwarded-For` or `Forwarded` (RFC 7239), which only trusted proxies may report.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use ipnet::IpNet;

use crate::access::peer::Origin;
use crate::access::request_head::{RequestHead, RequestHeader};

/// The header that the trusted proxies write. Only that one is read: a proxy that writes one of the two passes the
/// other on as its client sent it.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, Default, strum::Display, strum::EnumString, strum::VariantNames,
)]
#[strum(serialize_all = "kebab-case")]
pub enum ForwardedHeader {
    /// `X-Forwarded-For`: addresses, separated by commas.
    #[default]
    XForwardedFor,
    /// `Forwarded`, RFC 7239.
    Forwarded,
}

impl From<ForwardedHeader> for RequestHeader {
    fn from(header: ForwardedHeader) -> Self {
        match header {
            ForwardedHeader::XForwardedFor => Self::XForwardedFor,
            ForwardedHeader::Forwarded => Self::Forwarded,
        }
    }
}

/// Where trusted proxies connect from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProxySource {
    /// The addresses of a network.
    Network(IpNet),
    /// The Unix socket.
    Unix,
}

impl FromStr for ProxySource {
    type Err = ();

    /// Parses `192.0.2.1`, `2001:db8::/32` or `unix`. IPv4-mapped addresses are refused: [`Origin`] has none, so they
    /// would never match.
    fn from_str(text: &str) -> Result<Self, ()> {
        if text == "unix" {
            return Ok(Self::Unix);
        }
        let network = text.parse().or_else(|_| text.parse().map(|ip: IpAddr| ip.into())).map_err(|_| ())?;
        match network {
            IpNet::V6(network) if network.addr().to_ipv4_mapped().is_some() => Err(()),
            network => Ok(Self::Network(network.trunc())),
        }
    }
}

impl fmt::Display for ProxySource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(network) => network.fmt(f),
            Self::Unix => f.write_str("unix"),
        }
    }
}

/// The proxies that are trusted to report the addresses of their clients.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct TrustedProxies {
    v4: AddressRanges<u32>,
    v6: AddressRanges<u128>,
    trusts_unix: bool,
    header: ForwardedHeader,
}

impl TrustedProxies {
    /// Proxies that connect from `sources` and write `header`.
    pub fn new(sources: &[ProxySource], header: ForwardedHeader) -> Self {
        let networks = sources.iter().filter_map(|source| match source {
            ProxySource::Network(network) => Some(*network),
            ProxySource::Unix => None,
        });
        let (mut v4, mut v6) = (Vec::new(), Vec::new());
        for network in IpNet::aggregate(&networks.collect()) {
            match network {
                IpNet::V4(network) => v4.push((network.network().into(), network.broadcast().into())),
                IpNet::V6(network) => v6.push((network.network().into(), network.broadcast().into())),
            }
        }
        let trusts_unix = sources.contains(&ProxySource::Unix);
        Self { v4: AddressRanges::new(v4), v6: AddressRanges::new(v6), trusts_unix, header }
    }

    /// Whether connections to the Unix socket are a trusted proxy's.
    pub fn trusts_unix(&self) -> bool {
        self.trusts_unix
    }

    /// Whether a connection from `origin` is a trusted proxy's.
    pub fn contains(&self, origin: Origin) -> bool {
        match origin {
            Origin::Ip(IpAddr::V4(ip)) => self.v4.contain(ip.into()),
            Origin::Ip(IpAddr::V6(ip)) => self.v6.contain(ip.into()),
            Origin::Unix(_) => self.trusts_unix,
        }
    }

    /// The address of the client behind `origin`: the rightmost one that is not a trusted proxy's. If the list ends
    /// before such an address, or an element can't be parsed, the result is the last trusted proxy's address that was
    /// read. `None` if no address was read, or if `origin` is not trusted.
    ///
    /// The list is read from the right, byte by byte, up to the client's address and no further: the client may have
    /// made up everything left of it.
    pub fn client_ip(&self, origin: Origin, head: &RequestHead<'_>) -> Option<IpAddr> {
        if !self.contains(origin) {
            return None;
        }
        let mut client = None;
        // Headers of one name are one list, in their order (RFC 9110 section 5.3).
        for value in head.values(self.header.into()).rev() {
            let mut unread = Some(value);
            while let Some(list) = unread {
                let Some((ip, rest)) = self.header.last_address(list) else {
                    return client;
                };
                client = Some(ip);
                if !self.contains(Origin::Ip(ip)) {
                    return client;
                }
                unread = rest;
            }
        }
        client
    }
}

/// Disjoint ranges of addresses, in their order: the first and the last address of each. A look-up compares few of
/// them, however many there are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
struct AddressRanges<T>(Vec<(T, T)>);

impl<T: Ord> AddressRanges<T> {
    fn new(mut disjoint: Vec<(T, T)>) -> Self {
        disjoint.sort_unstable();
        Self(disjoint)
    }

    fn contain(&self, ip: T) -> bool {
        let next = self.0.partition_point(|(first, _)| *first <= ip);
        next.checked_sub(1).is_some_and(|nearest| ip <= self.0[nearest].1)
    }
}

impl ForwardedHeader {
    /// The address in the last element of `list`, and the list before that element. `None` if the element has no
    /// address.
    fn last_address(self, list: &[u8]) -> Option<(IpAddr, Option<&[u8]>)> {
        match self {
            Self::XForwardedFor => {
                let comma = list.iter().rposition(|byte| *byte == b',');
                let element = comma.map_or(list, |comma| &list[comma + 1..]);
                Some((parse_address(trim(element))?, comma.map(|comma| &list[..comma])))
            }
            Self::Forwarded => {
                let (element, rest) = last_part(list, b',')?;
                Some((forwarded_for(element)?, rest))
            }
        }
    }
}

/// Removes the optional whitespace (RFC 9110 section 5.6.3) around `text`.
fn trim(mut text: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', inner @ ..] | [inner @ .., b' ' | b'\t'] = text {
        text = inner;
    }
    text
}

/// Parses an address as proxies write it, with or without a port. IPv6 with a port is in brackets; without a port,
/// brackets are optional. An address with a zone (RFC 4007) is refused: it has a meaning only on the host that wrote
/// it.
fn parse_address(text: &[u8]) -> Option<IpAddr> {
    let text = str::from_utf8(text).ok()?;
    let bracketed = || text.strip_prefix('[')?.strip_suffix(']')?.parse().ok().map(IpAddr::V6);
    let with_port =
        || text.parse().ok().filter(|_| !text.contains('%')).map(|address: SocketAddr| address.ip());
    text.parse().ok().or_else(bracketed).or_else(with_port).map(|ip: IpAddr| ip.to_canonical())
}

/// The address in the `for` parameter of one element of `Forwarded` (RFC 7239 section 4). `None` for `unknown` and for
/// obfuscated identifiers.
fn forwarded_for(element: &[u8]) -> Option<IpAddr> {
    let mut found = None;
    let mut unread = Some(element);
    while let Some(pairs) = unread {
        let (pair, rest) = last_part(pairs, b';')?;
        let pair = trim(pair);
        let equals = pair.iter().position(|byte| *byte == b'=')?;
        if pair[..equals].eq_ignore_ascii_case(b"for") && found.replace(&pair[equals + 1..]).is_some() {
            return None; // each parameter at most once
        }
        unread = rest;
    }
    match found? {
        // No address contains a character that must be escaped.
        [b'"', quoted @ .., b'"'] => parse_address(quoted),
        // Without quotes the value is a token, which has no colon: IPv4 without a port.
        token => str::from_utf8(token).ok()?.parse().ok().map(IpAddr::V4),
    }
}

/// Splits `text` at the last separator outside of quoted strings (RFC 9110 section 5.6.4): the text after it, and the
/// text before it if there is a separator. `None` if a quote is unpaired, or is not at the beginning or the end of a
/// value.
///
/// A proxy may append its element to a line that a client made up, and quote the client's Host in the element. If the
/// line were read from the left, a quote in the client's text could swap the inside and the outside of the proxy's
/// quotes, and an address in the Host would count. From the right, a closing quote has exactly one opening quote: the
/// nearest one without a backslash before it, since an opening quote follows a `=`. So a well-formed element is parsed
/// the same, whatever is left of its comma.
fn last_part(text: &[u8], separator: u8) -> Option<(&[u8], Option<&[u8]>)> {
    let mut at = text.len();
    while let Some(last) = at.checked_sub(1) {
        match text[last] {
            byte if byte == separator => return Some((&text[at..], Some(&text[..last]))),
            b'"' => {
                let next = text[at..].iter().find(|byte| !matches!(byte, b' ' | b'\t'));
                at = (0..last).rev().find(|at| text[*at] == b'"' && !is_escaped(text, *at))?;
                if is_escaped(text, last)
                    || !matches!(next, None | Some(b',' | b';'))
                    || !text[..at].ends_with(b"=")
                {
                    return None;
                }
            }
            _ => at = last,
        }
    }
    Some((text, None))
}

/// Whether a backslash escapes the byte at `at`: an odd number of backslashes precedes it, since in an even number
/// every second one is escaped itself.
fn is_escaped(text: &[u8], at: usize) -> bool {
    text[..at].iter().rev().take_while(|byte| **byte == b'\\').count() % 2 == 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::peer::PeerCredentials;
    use axum::http::{HeaderValue, Request};
    use proptest::prelude::*;
    use std::net::{Ipv4Addr, Ipv6Addr};

    fn proxies(header: ForwardedHeader) -> TrustedProxies {
        TrustedProxies::new(&["10.0.0.0/8", "2001:db8:1::/48"].map(|text| text.parse().unwrap()), header)
    }

    fn client(header: ForwardedHeader, peer: &str, values: &[impl AsRef<[u8]>]) -> Option<String> {
        let name = match header {
            ForwardedHeader::XForwardedFor => "x-forwarded-for",
            ForwardedHeader::Forwarded => "forwarded",
        };
        let values = values.iter().map(|value| HeaderValue::from_bytes(value.as_ref()).unwrap());
        let request = values.fold(Request::builder(), |request, value| request.header(name, value));
        let request = request.body(()).unwrap();
        let ip =
            proxies(header).client_ip(Origin::Ip(peer.parse().unwrap()), &RequestHead::from(&request))?;
        Some(ip.to_string())
    }

    #[test]
    fn the_client_is_the_rightmost_untrusted_address() {
        for (values, found) in [
            (&["192.0.2.1"][..], Some("192.0.2.1")),
            (&["198.51.100.1, 192.0.2.1"], Some("192.0.2.1")),
            (&["192.0.2.1, 10.1.1.1"], Some("192.0.2.1")),
            (&["192.0.2.1, 2001:db8:1::7 ,10.1.1.1"], Some("192.0.2.1")),
            (&["198.51.100.1", "192.0.2.1", "10.1.1.1"], Some("192.0.2.1")),
            (&["192.0.2.1:4711"], Some("192.0.2.1")),
            (&["[2001:db8::1]:4711"], Some("2001:db8::1")),
            (&["[2001:db8::1]"], Some("2001:db8::1")),
            (&["::ffff:192.0.2.1"], Some("192.0.2.1")),
            (&["10.1.1.1"], Some("10.1.1.1")),
            (&["10.2.2.2, 10.1.1.1"], Some("10.2.2.2")),
            // What a client made up is left of its own address and is never read.
            (&["nonsense, 192.0.2.1"], Some("192.0.2.1")),
            (&["192.0.2.1, nonsense"], None),
            (&["192.0.2.1,"], None),
            (&[""], None),
            (&["unknown"], None),
            (&["fe80::1%eth0"], None),
            (&["[fe80::1%1]:4711"], None),
            (&[], None),
            // The address of the trusted proxy's own client can't be parsed.
            (&["nonsense, 10.1.1.1"], Some("10.1.1.1")),
            (&["192.0.2.1", ", 10.1.1.1"], Some("10.1.1.1")),
        ] {
            assert_eq!(
                client(ForwardedHeader::XForwardedFor, "10.0.0.1", values).as_deref(),
                found,
                "{values:?}"
            );
            assert_eq!(
                client(ForwardedHeader::XForwardedFor, "192.0.2.9", values),
                None,
                "only from a trusted proxy"
            );
        }
    }

    #[test]
    fn forwarded_is_parsed_as_rfc_7239_specifies() {
        for (values, found) in [
            (&["for=192.0.2.1"][..], Some("192.0.2.1")),
            (&["For=192.0.2.1;proto=http;by=203.0.113.43"], Some("192.0.2.1")),
            (&["proto=http; for=\"192.0.2.1:80\""], Some("192.0.2.1")),
            (&["for=\"[2001:db8::1]:4711\""], Some("2001:db8::1")),
            (&["for=198.51.100.1, for=192.0.2.1, for=10.0.0.7"], Some("192.0.2.1")),
            (&["for=\"a,b;for=1.1.1.1\", for=192.0.2.1"], Some("192.0.2.1")),
            (&["for=unknown"], None),
            (&["for=_hidden"], None),
            (&["proto=http"], None),
            (&["for=192.0.2.1;for=192.0.2.2"], None),
            (&["for=\"192.0.2.1"], None),
            // A client's Forwarded `x="` and its Host `, for=198.51.100.1;y="`, as a proxy joins and quotes them.
            (&["x=\", for=192.0.2.1;host=\", for=198.51.100.1;y=\\\"\""], Some("192.0.2.1")),
            (&["for=192.0.2.1;host=\", for=198.51.100.1;y=\\\"\""], Some("192.0.2.1")),
            (&["for=192.0.2.1;host=\"a\\\\\""], Some("192.0.2.1")),
            (&["for=192.0.2.1;host=\"a\\\""], None),
            (&["a\"b=c, for=192.0.2.1"], Some("192.0.2.1")),
            (&["a=\"b\"c, for=192.0.2.1"], Some("192.0.2.1")),
            (&["for=192.0.2.1;a\"b=c"], None),
            (&["for=192.0.2.1;a=\"b\"c"], None),
            (&["for=192.0.2.1;a \"b\""], None),
            (&["a=\"b, for=10.1.1.1"], Some("10.1.1.1")),
            (&["a=\"b\" ;for=192.0.2.1"], Some("192.0.2.1")),
            (&["for=192.0.2.1:80"], None),
            (&["192.0.2.1"], None),
        ] {
            assert_eq!(
                client(ForwardedHeader::Forwarded, "10.0.0.1", values).as_deref(),
                found,
                "{values:?}"
            );
        }
    }

    #[test]
    fn a_proxy_source_is_an_address_a_network_or_unix() {
        for (text, shown) in
            [("10.0.0.1", "10.0.0.1/32"), ("10.1.2.3/8", "10.0.0.0/8"), ("::1", "::1/128"), ("unix", "unix")]
        {
            assert_eq!(text.parse::<ProxySource>().unwrap().to_string(), shown);
        }
        for bad in
            ["", "localhost", "10.0.0.0/33", "10.0.0.0/", "::ffff:10.0.0.0/104", "*", "10.0.0.0-10.1.0.0"]
        {
            assert!(bad.parse::<ProxySource>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_unix_socket_is_trusted_only_if_it_is_named() {
        let origin = Origin::Unix(PeerCredentials { pid: None, uid: None, gid: None });
        for (sources, is_trusted) in
            [(&["0.0.0.0/0", "::/0", "unix"][..], true), (&["0.0.0.0/0", "::/0"], false)]
        {
            let sources: Vec<_> = sources.iter().map(|text| text.parse().unwrap()).collect();
            let proxies = TrustedProxies::new(&sources, ForwardedHeader::default());
            assert_eq!((proxies.contains(origin), proxies.trusts_unix()), (is_trusted, is_trusted));
        }
    }

    /// Networks that often contain, meet or follow each other: few different bits, at both ends of the address.
    fn network() -> impl Strategy<Value = IpNet> {
        let bits = prop_oneof![0..16u32, 0..16u32, (0..16u32).prop_map(|bits| !bits)];
        let v4 = (bits.clone(), 0..=32u8)
            .prop_map(|(bits, prefix)| IpNet::new(Ipv4Addr::from(bits).into(), prefix));
        let high = (bits, any::<bool>(), 0..=128u8);
        let v6 = high.prop_map(|(bits, is_high, prefix)| {
            let bits = if is_high { u128::from(bits) << 96 } else { u128::from(bits) };
            IpNet::new(Ipv6Addr::from(bits).into(), prefix)
        });
        prop_oneof![v4, v6].prop_map(|network| network.unwrap().trunc())
    }

    /// Header values that HTTP permits (RFC 9110 section 5.5).
    fn header_value(length: usize) -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![
            4 => prop::sample::select(b"\",;=\\ for10.".to_vec()),
            1 => prop_oneof![Just(b'\t'), b' '..=b'~', 0x80..=0xffu8],
        ];
        prop::collection::vec(byte, 0..length)
    }

    /// `text` as a quoted string (RFC 9110 section 5.6.4).
    fn quoted(text: &[u8]) -> Vec<u8> {
        let escaped = text.iter().flat_map(|byte| match byte {
            b'"' | b'\\' => vec![b'\\', *byte],
            byte => vec![*byte],
        });
        [b'"'].into_iter().chain(escaped).chain([b'"']).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn text_left_of_the_client_does_not_change_its_address(
            made_up in header_value(60), host in header_value(40), through in 0usize..3
        ) {
            let hops = format!("192.0.2.1{}", ", 10.1.1.1".repeat(through)).into_bytes();
            let elements = [
                b"for=192.0.2.1;host=".to_vec(),
                quoted(&host),
                ", for=10.1.1.1;proto=https".repeat(through).into_bytes(),
            ];
            for (header, proxies) in [(ForwardedHeader::XForwardedFor, hops), (ForwardedHeader::Forwarded, elements.concat())] {
                let joined = [&made_up[..], b", ", &proxies].concat();
                let lines = [made_up.clone(), proxies];
                prop_assert_eq!(client(header, "10.0.0.1", &[joined]), Some("192.0.2.1".into()));
                prop_assert_eq!(client(header, "10.0.0.1", &lines), Some("192.0.2.1".into()));
            }
        }

        #[test]
        fn an_address_is_trusted_if_any_network_contains_it(
            networks in prop::collection::vec(network(), 0..40), others in prop::collection::vec(network(), 1..40)
        ) {
            let sources: Vec<_> = networks.iter().copied().map(ProxySource::Network).collect();
            let proxies = TrustedProxies::new(&sources, ForwardedHeader::default());
            let edges = networks.iter().chain(&others).flat_map(|network| [network.network(), network.broadcast()]);
            for ip in edges {
                let expected = networks.iter().any(|network| network.contains(&ip));
                prop_assert_eq!(proxies.contains(Origin::Ip(ip)), expected, "{}", ip);
            }
        }

        #[test]
        fn no_address_is_found_in_bytes_without_one(bytes in proptest::collection::vec(any::<u8>(), 0..80), header in 0..2) {
            let header = if header == 0 { ForwardedHeader::XForwardedFor } else { ForwardedHeader::Forwarded };
            let values: Vec<_> = HeaderValue::from_bytes(&bytes).map(|_| &bytes).into_iter().collect();
            // The parser does not panic, and an address that it finds is in the text.
            let found = client(header, "10.0.0.1", &values);
            let text = String::from_utf8_lossy(&bytes).into_owned();
            prop_assert!(found.is_none_or(|_| text.contains(['.', ':'])));
        }

        #[test]
        fn every_address_is_parsed_in_every_form(v4: [u8; 4], v6: [u16; 8], port: u16) {
            let (v4, v6) = (Ipv4Addr::from(v4), Ipv6Addr::from(v6));
            let canonical = |ip: IpAddr| Some(ip.to_canonical());
            let address = |text: String| parse_address(text.as_bytes());
            prop_assert_eq!(address(v4.to_string()), canonical(v4.into()));
            prop_assert_eq!(address(format!("{v4}:{port}")), canonical(v4.into()));
            prop_assert_eq!(address(v6.to_string()), canonical(v6.into()));
            prop_assert_eq!(address(format!("[{v6}]:{port}")), canonical(v6.into()));
            let element = format!("for=\"[{v6}]:{port}\"");
            prop_assert_eq!(forwarded_for(element.as_bytes()), canonical(v6.into()));
        }
    }
}
