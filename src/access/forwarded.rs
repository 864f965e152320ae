//! Whom a proxy speaks for: `X-Forwarded-For` or `Forwarded` (RFC 7239), believed only from proxies that are trusted.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use axum::http::header::{FORWARDED, HeaderMap, HeaderName};
use ipnet::IpNet;

use crate::access::peer::Origin;

/// The field that the trusted proxies write. Only one is believed: a proxy that writes the one hands on the other as its
/// client sent it.
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

impl ForwardedHeader {
    fn name(self) -> HeaderName {
        match self {
            Self::XForwardedFor => HeaderName::from_static("x-forwarded-for"),
            Self::Forwarded => FORWARDED,
        }
    }
}

/// Where a trusted proxy connects from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proxy {
    /// An address of this network.
    Network(IpNet),
    /// The Unix socket.
    Unix,
}

impl FromStr for Proxy {
    type Err = ();

    /// `192.0.2.1`, `2001:db8::/32` or `unix`. Mapped IPv4 addresses are refused: no client has one here.
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

impl fmt::Display for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Network(network) => network.fmt(f),
            Self::Unix => f.write_str("unix"),
        }
    }
}

/// The proxies whose word on their clients is taken.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Proxies {
    /// Where they connect from.
    pub trusted: Vec<Proxy>,
    /// What they write.
    pub field: ForwardedHeader,
}

impl Proxies {
    /// Whether what connects from `origin` is one of them.
    pub fn trust(&self, origin: Origin) -> bool {
        self.trusted.iter().any(|proxy| match (proxy, origin) {
            (Proxy::Network(network), Origin::Ip(ip)) => network.contains(&ip),
            (Proxy::Unix, Origin::Unix(_)) => true,
            _ => false,
        })
    }

    /// The address that a request from `origin` comes from in truth: the rightmost one which is no trusted proxy's. Where
    /// the list ends, or can't be read, before there is one: the last trusted proxy that was read. `None` where that is
    /// `origin` itself, and where `origin` isn't trusted.
    ///
    /// The list is read from the right, byte by byte, up to the client's address, and no further: what stands left of it,
    /// the client may have made up.
    pub fn client(&self, origin: Origin, headers: &HeaderMap) -> Option<IpAddr> {
        if !self.trust(origin) {
            return None;
        }
        let mut client = None;
        // Fields of one name are one list, in their order (RFC 9110 section 5.3).
        for value in headers.get_all(self.field.name()).iter().rev() {
            let mut left = Some(value.as_bytes());
            while let Some(list) = left {
                let Some((ip, rest)) = self.field.last(list) else {
                    return client;
                };
                client = Some(ip);
                if !self.trust(Origin::Ip(ip)) {
                    return client;
                }
                left = rest;
            }
        }
        client
    }
}

impl ForwardedHeader {
    /// The address in the last element of `list`, and what is left of that element's comma. `None` if there is no address.
    fn last(self, list: &[u8]) -> Option<(IpAddr, Option<&[u8]>)> {
        match self {
            Self::XForwardedFor => {
                let comma = list.iter().rposition(|byte| *byte == b',');
                let element = comma.map_or(list, |comma| &list[comma + 1..]);
                Some((address(trimmed(element))?, comma.map(|comma| &list[..comma])))
            }
            Self::Forwarded => {
                let (element, rest) = last_part(list, b',')?;
                Some((forwarded_for(element)?, rest))
            }
        }
    }
}

/// Without the optional whitespace of RFC 9110 section 5.6.3 around it.
fn trimmed(mut text: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', inner @ ..] | [inner @ .., b' ' | b'\t'] = text {
        text = inner;
    }
    text
}

/// An address as proxies write it: bare, or with a port; IPv6 in brackets where there is one. With a zone (RFC 4007) it
/// names nobody beyond the host that wrote it.
fn address(text: &[u8]) -> Option<IpAddr> {
    let text = str::from_utf8(text).ok()?;
    let bracketed = || text.strip_prefix('[')?.strip_suffix(']')?.parse().ok().map(IpAddr::V6);
    let with_port = || text.parse().ok().map(|address: SocketAddr| address.ip());
    let ip = text.parse().ok().or_else(bracketed).or_else(with_port)?;
    (!text.contains('%')).then(|| ip.to_canonical())
}

/// The `for` of one element of `Forwarded` (RFC 7239 section 4); `unknown` and obfuscated names are no addresses.
fn forwarded_for(element: &[u8]) -> Option<IpAddr> {
    let mut found = None;
    let mut left = Some(element);
    while let Some(pairs) = left {
        let (pair, rest) = last_part(pairs, b';')?;
        let pair = trimmed(pair);
        let equals = pair.iter().position(|byte| *byte == b'=')?;
        if pair[..equals].eq_ignore_ascii_case(b"for") && found.replace(&pair[equals + 1..]).is_some() {
            return None; // each parameter at most once
        }
        left = rest;
    }
    match found? {
        // An address has nothing to escape.
        [b'"', quoted @ .., b'"'] => address(quoted),
        // Without quotes it is a token, which has no colon: IPv4 without a port.
        token => str::from_utf8(token).ok()?.parse().ok().map(IpAddr::V4),
    }
}

/// What stands behind the last separator outside of quoted strings (RFC 9110 section 5.6.4), and what stands before it,
/// if there is one. `None` if a quote has no other one, or stands where no value begins or ends.
///
/// A proxy may add its element behind what a client made up, in one line, and quote the client's Host in it. Read from
/// the left, a quote in the client's text could turn the proxy's quotes inside out, and let the Host name an address. From
/// the right, a closing quote has exactly one opening one: the nearest that no backslash escapes, since an opening quote
/// follows a `=`. So an element that is well-formed is read the same, whatever stands left of its comma.
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

/// Whether a backslash escapes the byte at `at`: of an even number of them, each other one escapes the next.
fn is_escaped(text: &[u8], at: usize) -> bool {
    text[..at].iter().rev().take_while(|byte| **byte == b'\\').count() % 2 == 1
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;
    use proptest::prelude::*;

    fn proxies(field: ForwardedHeader) -> Proxies {
        let trusted = ["10.0.0.0/8", "2001:db8:1::/48"].map(|text| text.parse().unwrap());
        Proxies { trusted: trusted.to_vec(), field }
    }

    fn client(field: ForwardedHeader, peer: &str, values: &[impl AsRef<[u8]>]) -> Option<String> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(field.name(), HeaderValue::from_bytes(value.as_ref()).unwrap());
        }
        let ip = proxies(field).client(Origin::Ip(peer.parse().unwrap()), &headers)?;
        Some(ip.to_string())
    }

    #[test]
    fn the_client_is_the_rightmost_address_that_is_no_trusted_proxy() {
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
            // What a client made up stands left of its own address and is never looked at.
            (&["nonsense, 192.0.2.1"], Some("192.0.2.1")),
            (&["192.0.2.1, nonsense"], None),
            (&["192.0.2.1,"], None),
            (&[""], None),
            (&["unknown"], None),
            (&["fe80::1%eth0"], None),
            (&["[fe80::1%1]:4711"], None),
            (&[], None),
            // A trusted proxy whose own client can't be read.
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
    fn forwarded_is_read_as_rfc_7239_has_it() {
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
    fn a_proxy_is_an_address_a_network_or_the_unix_socket() {
        for (text, shown) in
            [("10.0.0.1", "10.0.0.1/32"), ("10.1.2.3/8", "10.0.0.0/8"), ("::1", "::1/128"), ("unix", "unix")]
        {
            assert_eq!(text.parse::<Proxy>().unwrap().to_string(), shown);
        }
        for bad in
            ["", "localhost", "10.0.0.0/33", "10.0.0.0/", "::ffff:10.0.0.0/104", "*", "10.0.0.0-10.1.0.0"]
        {
            assert!(bad.parse::<Proxy>().is_err(), "{bad}");
        }
    }

    /// The field values that HTTP permits (RFC 9110 section 5.5).
    fn field_value(length: usize) -> impl Strategy<Value = Vec<u8>> {
        let byte = prop_oneof![
            4 => prop::sample::select(b"\",;=\\ for10.".to_vec()),
            1 => prop_oneof![Just(b'\t'), b' '..=b'~', 0x80..=0xffu8],
        ];
        prop::collection::vec(byte, 0..length)
    }

    /// A quoted string (RFC 9110 section 5.6.4).
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
        fn nothing_left_of_the_client_changes_who_it_is(
            made_up in field_value(60), host in field_value(40), through in 0usize..3
        ) {
            let hops = format!("192.0.2.1{}", ", 10.1.1.1".repeat(through)).into_bytes();
            let elements = [
                b"for=192.0.2.1;host=".to_vec(),
                quoted(&host),
                ", for=10.1.1.1;proto=https".repeat(through).into_bytes(),
            ];
            for (field, proxies) in [(ForwardedHeader::XForwardedFor, hops), (ForwardedHeader::Forwarded, elements.concat())] {
                let joined = [&made_up[..], b", ", &proxies].concat();
                let lines = [made_up.clone(), proxies];
                prop_assert_eq!(client(field, "10.0.0.1", &[joined]), Some("192.0.2.1".into()));
                prop_assert_eq!(client(field, "10.0.0.1", &lines), Some("192.0.2.1".into()));
            }
        }

        #[test]
        fn no_bytes_make_an_address_up(bytes in proptest::collection::vec(any::<u8>(), 0..80), field in 0..2) {
            let field = if field == 0 { ForwardedHeader::XForwardedFor } else { ForwardedHeader::Forwarded };
            let mut headers = HeaderMap::new();
            if let Ok(value) = HeaderValue::from_bytes(&bytes) {
                headers.append(field.name(), value);
            }
            // It does not panic, and whom it names was named.
            let found = proxies(field).client(Origin::Ip([10, 0, 0, 1].into()), &headers);
            let text = String::from_utf8_lossy(&bytes).into_owned();
            prop_assert!(found.is_none_or(|_| text.contains(['.', ':'])));
        }

        #[test]
        fn every_address_is_read_in_every_form(v4: [u8; 4], v6: [u16; 8], port: u16) {
            let (v4, v6) = (std::net::Ipv4Addr::from(v4), std::net::Ipv6Addr::from(v6));
            let canonical = |ip: IpAddr| Some(ip.to_canonical());
            let address = |text: String| address(text.as_bytes());
            prop_assert_eq!(address(v4.to_string()), canonical(v4.into()));
            prop_assert_eq!(address(format!("{v4}:{port}")), canonical(v4.into()));
            prop_assert_eq!(address(v6.to_string()), canonical(v6.into()));
            prop_assert_eq!(address(format!("[{v6}]:{port}")), canonical(v6.into()));
            let element = format!("for=\"[{v6}]:{port}\"");
            prop_assert_eq!(forwarded_for(element.as_bytes()), canonical(v6.into()));
        }
    }
}
