//! Whom a proxy speaks for: `X-Forwarded-For` or `Forwarded` (RFC 7239), believed only from proxies that are trusted.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use axum::http::header::{FORWARDED, HeaderMap, HeaderName};
use ipnet::IpNet;

use crate::peer::Origin;

/// The field that the trusted proxies write. Only one is believed: a proxy that writes the one hands on the other as its
/// client sent it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Field {
    /// `X-Forwarded-For`: addresses, separated by commas.
    #[default]
    XForwardedFor,
    /// `Forwarded`, RFC 7239.
    Forwarded,
}

impl Field {
    /// Every field's name.
    pub const NAMES: [&str; 2] = ["x-forwarded-for", "forwarded"];

    fn name(self) -> HeaderName {
        match self {
            Self::XForwardedFor => HeaderName::from_static("x-forwarded-for"),
            Self::Forwarded => FORWARDED,
        }
    }
}

impl FromStr for Field {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        [Self::XForwardedFor, Self::Forwarded].into_iter().find(|field| field.name() == text).ok_or(())
    }
}

impl fmt::Display for Field {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name().as_str())
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
    pub field: Field,
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

    /// The address that a request from `origin` comes from in truth: the rightmost one which is no trusted proxy's, or
    /// the leftmost where all are. `None` where `origin` is the client itself: because it isn't trusted, says nothing, or
    /// says something that can't be read before a client is found.
    pub fn client(&self, origin: Origin, headers: &HeaderMap) -> Option<IpAddr> {
        if !self.trust(origin) {
            return None;
        }
        let mut client = None;
        // Fields of one name are one list, in their order (RFC 9110 section 5.3).
        for value in headers.get_all(self.field.name()).iter().rev() {
            let value = value.to_str().ok()?;
            let elements = match self.field {
                Field::XForwardedFor => value.split(',').collect(),
                Field::Forwarded => split_quoted(value, b',')?,
            };
            for element in elements.into_iter().rev() {
                let ip = match self.field {
                    Field::XForwardedFor => address(element.trim_matches([' ', '\t']))?,
                    Field::Forwarded => forwarded_for(element)?,
                };
                client = Some(ip);
                if !self.trust(Origin::Ip(ip)) {
                    return client;
                }
            }
        }
        client
    }
}

/// An address as proxies write it: bare, or with a port; IPv6 in brackets where there is one. With a zone (RFC 4007) it
/// names nobody beyond the host that wrote it.
fn address(text: &str) -> Option<IpAddr> {
    let bracketed = || text.strip_prefix('[')?.strip_suffix(']')?.parse().ok().map(IpAddr::V6);
    let with_port = || text.parse().ok().map(|address: SocketAddr| address.ip());
    let ip = text.parse().ok().or_else(bracketed).or_else(with_port)?;
    (!text.contains('%')).then(|| ip.to_canonical())
}

/// The `for` of one element of `Forwarded` (RFC 7239 section 4); `unknown` and obfuscated names are no addresses.
fn forwarded_for(element: &str) -> Option<IpAddr> {
    let mut found = None;
    for pair in split_quoted(element, b';')? {
        let (name, value) = pair.trim_matches([' ', '\t']).split_once('=')?;
        if name.eq_ignore_ascii_case("for") && found.replace(value).is_some() {
            return None; // each parameter at most once
        }
    }
    let value = found?;
    match value.strip_prefix('"') {
        // An address has nothing to escape.
        Some(quoted) => address(quoted.strip_suffix('"')?),
        // Without quotes it is a token, which has no colon: IPv4 without a port.
        None => value.parse().ok().map(IpAddr::V4),
    }
}

/// The parts between separators outside of quoted strings (RFC 9110 section 5.6.4); `None` if a quote is not closed, or
/// stands where no value begins or ends.
///
/// A proxy may add its element behind what a client made up, in one line, and quote the client's Host in it. Were a stray
/// quote passed over, one in the client's text would turn the proxy's quotes inside out, and let the Host name an address.
fn split_quoted(text: &str, separator: u8) -> Option<Vec<&str>> {
    let bytes = text.as_bytes();
    let mut parts = Vec::new();
    let (mut start, mut is_quoted, mut is_escaped) = (0, false, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if is_escaped => is_escaped = false,
            b'\\' if is_quoted => is_escaped = true,
            b'"' if is_quoted => {
                is_quoted = false;
                let next = bytes[at + 1..].iter().find(|byte| !matches!(byte, b' ' | b'\t'));
                if !matches!(next, None | Some(b',' | b';')) {
                    return None;
                }
            }
            b'"' if bytes[..at].ends_with(b"=") => is_quoted = true,
            b'"' => return None,
            _ if byte == separator && !is_quoted => {
                parts.push(&text[start..at]);
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    (!is_quoted).then_some(parts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::HeaderValue;
    use proptest::prelude::*;

    fn proxies(field: Field) -> Proxies {
        let trusted = ["10.0.0.0/8", "2001:db8:1::/48"].map(|text| text.parse().unwrap());
        Proxies { trusted: trusted.to_vec(), field }
    }

    fn client(field: Field, peer: &str, values: &[&str]) -> Option<String> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(field.name(), HeaderValue::from_str(value).unwrap());
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
            (&["nonsense, 10.1.1.1"], None),
            (&["192.0.2.1,"], None),
            (&[""], None),
            (&["unknown"], None),
            (&["fe80::1%eth0"], None),
            (&["[fe80::1%1]:4711"], None),
            (&[], None),
        ] {
            assert_eq!(client(Field::XForwardedFor, "10.0.0.1", values).as_deref(), found, "{values:?}");
            assert_eq!(client(Field::XForwardedFor, "192.0.2.9", values), None, "only from a trusted proxy");
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
            (&["x=\", for=192.0.2.1;host=\", for=198.51.100.1;y=\\\"\""], None),
            (&["for=192.0.2.1;host=\", for=198.51.100.1;y=\\\"\""], Some("192.0.2.1")),
            (&["a\"b=c, for=192.0.2.1"], None),
            (&["a=\"b\"c, for=192.0.2.1"], None),
            (&["a=\"b\" ;for=192.0.2.1"], Some("192.0.2.1")),
            (&["for=192.0.2.1:80"], None),
            (&["192.0.2.1"], None),
        ] {
            assert_eq!(client(Field::Forwarded, "10.0.0.1", values).as_deref(), found, "{values:?}");
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

    proptest! {
        #[test]
        fn nothing_left_of_the_client_changes_who_it_is(made_up in "[ -~]{0,60}", through in 0usize..3) {
            let hops = format!("192.0.2.1{}", ", 10.1.1.1".repeat(through));
            let text = format!("{made_up}, {hops}");
            prop_assert_eq!(client(Field::XForwardedFor, "10.0.0.1", &[&text]), Some("192.0.2.1".into()));
            let separate = [made_up.as_str(), hops.as_str()];
            prop_assert_eq!(client(Field::XForwardedFor, "10.0.0.1", &separate), Some("192.0.2.1".into()));
            let hops = format!("for={}", hops.replace(", ", ", for="));
            let separate = [made_up.as_str(), hops.as_str()];
            prop_assert_eq!(client(Field::Forwarded, "10.0.0.1", &separate), Some("192.0.2.1".into()));
        }

        #[test]
        fn no_bytes_make_an_address_up(bytes in proptest::collection::vec(any::<u8>(), 0..80), field in 0..2) {
            let field = if field == 0 { Field::XForwardedFor } else { Field::Forwarded };
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
            prop_assert_eq!(address(&v4.to_string()), canonical(v4.into()));
            prop_assert_eq!(address(&format!("{v4}:{port}")), canonical(v4.into()));
            prop_assert_eq!(address(&v6.to_string()), canonical(v6.into()));
            prop_assert_eq!(address(&format!("[{v6}]:{port}")), canonical(v6.into()));
            prop_assert_eq!(forwarded_for(&format!("for=\"[{v6}]:{port}\"")), canonical(v6.into()));
        }
    }
}
