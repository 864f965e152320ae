//! PROXY protocol, versions 1 and 2 (haproxy's doc/proxy-protocol.txt): a load balancer that forwards TCP begins each
//! connection with a header that names its client.
//!
//! A header is accepted only from a trusted proxy, and a trusted proxy must send one. The header is read in a task of its
//! own, before TLS and HTTP, and not a byte more than the header.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd};
use std::str;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::net::{RecvFlags, recv};
use strum::VariantArray;
use tokio::io::{Interest, Ready};
use tokio::time::Instant;
use tracing::warn;
use zeroize::Zeroizing;

use crate::access::forwarded::Proxies;
use crate::server::accepted::Accepted;
use crate::server::stream::Stream;
use crate::telemetry::metrics::{ProxyProtocolError, ProxyProtocolMetrics};

/// How a header of version 1 begins.
const V1_PREFIX: &[u8] = b"PROXY ";

/// How a header of version 2 begins.
const V2_SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// The longest header of version 1, in bytes, its CRLF included (section 2.1).
const V1_MAX: usize = 107;

/// The bytes of a version 2 header before the addresses.
const V2_FIXED: usize = 16;

/// The most bytes that may follow them: nginx takes as many. Addresses take up to 216, and TLVs the rest.
const V2_LENGTH_MAX: usize = 4096;

/// A header of version 2 for a connection that a proxy makes for itself, such as a health check.
pub const LOCAL: [u8; V2_FIXED] = *b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

/// How often each reason to close connections is logged.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// What a header says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The client's address. `None` for LOCAL, UNKNOWN and UNSPEC, and for a client that has no TCP address: the
    /// connection's own address counts then, as haproxy has it.
    pub client: Option<IpAddr>,
    /// How many bytes the header has; those of version 2 need not have arrived yet.
    pub length: usize,
}

/// What is wrong with a header: what was expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderError {
    /// There is none.
    Missing,
    /// It is no valid header.
    Malformed(&'static str),
}

impl Header {
    /// The header that `bytes` begin with; `None` while too few of them have arrived to tell.
    ///
    /// # Errors
    /// Where no valid header begins so.
    pub fn parse(bytes: &[u8]) -> Result<Option<Self>, HeaderError> {
        let parsed = match begins(bytes) {
            None => Ok(None),
            Some(false) => return Err(HeaderError::Missing),
            Some(true) if bytes.starts_with(V1_PREFIX) => parse_v1(bytes),
            Some(true) => parse_v2(bytes),
        };
        parsed.map_err(HeaderError::Malformed)
    }
}

/// Whether `bytes` begin as a header does; `None` while too few of them have arrived to tell.
fn begins(bytes: &[u8]) -> Option<bool> {
    let starts = [V1_PREFIX, V2_SIGNATURE];
    if starts.iter().any(|start| bytes.starts_with(start)) {
        Some(true)
    } else if starts.iter().any(|start| start.starts_with(bytes)) {
        None
    } else {
        Some(false)
    }
}

/// Section 2.1. A client's address is taken, and the rest of the line must be right all the same.
fn parse_v1(bytes: &[u8]) -> Result<Option<Header>, &'static str> {
    let line = &bytes[..bytes.len().min(V1_MAX)];
    let end = line.iter().position(|byte| matches!(byte, b'\r' | b'\n')).unwrap_or(line.len());
    match &line[end..] {
        [b'\r', b'\n', ..] => {}
        [] | [b'\r'] if line.len() < V1_MAX => return Ok(None),
        [] | [b'\r'] => return Err("expected CR LF within 107 bytes"),
        _ => return Err("expected CR and LF together"),
    }
    let header = |client| Some(Header { client, length: end + 2 });
    let mut fields = line[V1_PREFIX.len()..end].split(|byte| *byte == b' ');
    let client = match fields.next() {
        // Whatever follows is ignored.
        Some(b"UNKNOWN") => return Ok(header(None)),
        Some(b"TCP4") => addresses::<Ipv4Addr>(fields).map(IpAddr::V4),
        Some(b"TCP6") => addresses::<Ipv6Addr>(fields).map(IpAddr::V6),
        _ => return Err("expected TCP4, TCP6 or UNKNOWN"),
    };
    let client = client.ok_or("expected two addresses and two ports, separated by single spaces")?;
    Ok(header(Some(client.to_canonical())))
}

/// The source of exactly two addresses and two ports.
fn addresses<'a, A: FromStr>(mut fields: impl Iterator<Item = &'a [u8]>) -> Option<A> {
    let mut text = || str::from_utf8(fields.next()?).ok();
    let (source, destination, ports) = (text()?.parse().ok()?, text()?.parse::<A>(), [text()?, text()?]);
    // Digits only, since `parse` takes a sign, and no leading zero.
    let is_port = |text: &str| {
        let is_decimal =
            text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
        is_decimal && text.parse::<u16>().is_ok()
    };
    (destination.is_ok() && ports.into_iter().all(is_port) && fields.next().is_none()).then_some(source)
}

/// Section 2.2. TLVs are skipped, CRC32C among them.
fn parse_v2(bytes: &[u8]) -> Result<Option<Header>, &'static str> {
    let Some((&[.., command, family, high, low], rest)) = bytes.split_first_chunk::<V2_FIXED>() else {
        return Ok(None);
    };
    let length = usize::from(u16::from_be_bytes([high, low]));
    if length > V2_LENGTH_MAX {
        return Err("expected at most 4096 bytes after the first 16");
    }
    let header = |client| Ok(Some(Header { client, length: V2_FIXED + length }));
    match command {
        // A LOCAL header's family is ignored, too.
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

/// The proxies that may send headers, and what happens to other connections.
#[derive(Debug)]
pub struct ProxyProtocol {
    proxies: Proxies,
    metrics: ProxyProtocolMetrics,
    /// When each reason was logged last.
    logged: Mutex<[Option<Instant>; ProxyProtocolError::VARIANTS.len()]>,
}

impl ProxyProtocol {
    /// `proxies` must send headers.
    pub fn new(proxies: Proxies, metrics: ProxyProtocolMetrics) -> Self {
        Self { proxies, metrics, logged: Mutex::default() }
    }

    /// `accepted` with the client that the header names; `None` where the connection has to be closed.
    async fn identify(&self, mut accepted: Accepted) -> Option<Accepted> {
        let origin = accepted.peer.origin;
        let stream = &accepted.stream;
        let is_trusted = self.proxies.trust(origin);
        let read = async {
            if is_trusted { read_header(stream).await } else { refuse_header(stream).await.map(|()| None) }
        };
        let (reason, detail) = match accepted.within_head_timeout(read).await {
            Some(Ok(client)) => return accepted.set_client(client).then_some(accepted),
            // It was closed before a header, as a TCP health check does.
            Some(Err(ReadError::Closed)) => return None,
            Some(Err(ReadError::Untrusted)) => {
                (ProxyProtocolError::Untrusted, "expected a PROXY header only from trusted-proxies")
            }
            Some(Err(ReadError::Header(HeaderError::Missing))) => {
                (ProxyProtocolError::Missing, "expected a PROXY header from a trusted proxy, found none")
            }
            Some(Err(ReadError::Header(HeaderError::Malformed(expected)))) => {
                (ProxyProtocolError::Malformed, expected)
            }
            // A client that is not trusted owes no header, and a drain waits for none.
            None if !is_trusted || accepted.is_closing() => return None,
            None => (ProxyProtocolError::Timeout, "expected a complete PROXY header within head-timeout"),
        };
        self.metrics.failed(reason);
        if self.is_due(reason) {
            warn!(address = %origin, reason = <&str>::from(reason), "connection closed by proxy-protocol: {detail}");
        }
        None
    }

    fn is_due(&self, reason: ProxyProtocolError) -> bool {
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner); // nothing that can panic is done under it
        let last = &mut logged[reason as usize];
        let is_due = last.is_none_or(|last| last.elapsed() > LOG_INTERVAL);
        if is_due {
            *last = Some(Instant::now());
        }
        is_due
    }
}

/// Calls `begin` for each connection, once its header is read. Without `protocol`, none is.
pub fn identified(
    protocol: Option<Arc<ProxyProtocol>>,
    begin: impl Fn(Accepted) + Clone + Send + 'static,
) -> impl Fn(Accepted) + Clone + Send + 'static {
    move |accepted| match &protocol {
        None => begin(accepted),
        Some(protocol) => {
            let (protocol, begin) = (Arc::clone(protocol), begin.clone());
            // A task of its own, so that an open connection keeps none of its memory.
            accepted.spawn(|accepted| async move {
                if let Some(accepted) = protocol.identify(accepted).await {
                    begin(accepted);
                }
            });
        }
    }
}

/// Why there is no client.
#[derive(Debug)]
enum ReadError {
    /// The connection ended before a header began.
    Closed,
    /// A header that is not looked at.
    Untrusted,
    /// No valid header.
    Header(HeaderError),
}

/// Reads the header, and names the client that is in it.
async fn read_header(stream: &Stream) -> Result<Option<IpAddr>, ReadError> {
    let truncated = || ReadError::Header(HeaderError::Malformed("expected the whole header, found the end"));
    let header = match peek(stream, |bytes| Header::parse(bytes).transpose()).await {
        Ok((Some(parsed), _)) => parsed.map_err(ReadError::Header)?,
        Ok((None, 0)) | Err(_) => return Err(ReadError::Closed),
        Ok((None, _)) => return Err(truncated()),
    };
    skip(stream, header.length).await.map_err(|_| truncated())?;
    Ok(header.client)
}

/// Refuses a header, which must not begin the connection. What has arrived stays to be read.
async fn refuse_header(stream: &Stream) -> Result<(), ReadError> {
    match peek(stream, begins).await {
        Ok((Some(true), _)) => Err(ReadError::Untrusted),
        Ok((None, 0)) | Err(_) => Err(ReadError::Closed),
        Ok(_) => Ok(()), // TLS or HTTP, or too little for either, which is theirs to refuse
    }
}

/// What `judge` makes of the bytes that have arrived, as soon as they are enough for it, and how many they are. They stay to
/// be read. `None` where the stream ends before they are enough.
async fn peek<T>(stream: &Stream, judge: impl Fn(&[u8]) -> Option<T>) -> io::Result<(Option<T>, usize)> {
    // The beginning of a request may follow the header at once, and a token may be in it: wiped.
    let mut buffer = Zeroizing::new([0; V1_MAX]);
    loop {
        // Tokio forgets that bytes are there when `receive` wants to wait for more, but never that the stream has ended:
        // without this look, a client that sends half a header and its end would keep the task running. It comes first:
        // what arrives after it is another event.
        let has_ended = readable(stream).await?.is_read_closed();
        let mut found = (None, 0);
        let is_enough = receive(stream, &mut buffer[..], RecvFlags::PEEK, |bytes| {
            found = (judge(bytes), bytes.len());
            found.0.is_some() || bytes.is_empty()
        })?;
        if is_enough || has_ended {
            return Ok(found);
        }
    }
}

/// Takes `length` bytes from the stream, and not one more.
async fn skip(stream: &Stream, mut length: usize) -> io::Result<()> {
    let mut buffer = [0; 256];
    while length > 0 {
        readable(stream).await?;
        let wanted = length.min(buffer.len());
        let mut count = None;
        receive(stream, &mut buffer[..wanted], RecvFlags::empty(), |bytes| {
            count = Some(bytes.len());
            true
        })?;
        match count {
            Some(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => length -= count.unwrap_or_default(),
        }
    }
    Ok(())
}

/// Returns when there may be something to read.
async fn readable(stream: &Stream) -> io::Result<Ready> {
    match stream {
        Stream::Tcp(stream) => stream.ready(Interest::READABLE).await,
        Stream::Unix(stream) => stream.ready(Interest::READABLE).await,
    }
}

/// recv(2), whose bytes `judge` finds enough or not. If there are none, or not enough, [`readable`] waits for more.
fn receive(
    stream: &Stream,
    buffer: &mut [u8],
    flags: RecvFlags,
    judge: impl FnOnce(&[u8]) -> bool,
) -> io::Result<bool> {
    let receive = |socket: BorrowedFd<'_>| {
        let (count, _) = recv(socket, &mut *buffer, flags)?;
        if judge(&buffer[..count]) { Ok(()) } else { Err(io::ErrorKind::WouldBlock.into()) }
    };
    let received = match stream {
        Stream::Tcp(stream) => stream.try_io(Interest::READABLE, || receive(stream.as_fd())),
        Stream::Unix(stream) => stream.try_io(Interest::READABLE, || receive(stream.as_fd())),
    };
    match received {
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
        result => result.map(|()| true),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::cell::Cell;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::UnixStream;

    /// A header of version 2.
    fn v2(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
        let length = u16::try_from(block.len()).unwrap();
        [V2_SIGNATURE, &[command, family], &length.to_be_bytes(), block].concat()
    }

    fn v1(line: &str) -> Vec<u8> {
        format!("PROXY {line}\r\n").into_bytes()
    }

    fn client(bytes: &[u8]) -> Result<Option<IpAddr>, HeaderError> {
        let header = Header::parse(bytes)?.expect("a whole header");
        assert_eq!(header.length, bytes.len());
        Ok(header.client)
    }

    #[test]
    fn a_valid_header_names_its_client() {
        let longest = ["ffff"; 8].join(":");
        for (bytes, named) in [
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
            // UDP over TCP, Unix sockets and whatever has no address: the connection's own counts.
            (v2(0x21, 0x12, &[1; 12]), None),
            (v2(0x21, 0x22, &[1; 36]), None),
            (v2(0x21, 0x31, &[1; 216]), None),
            (v2(0x21, 0x32, &[1; 300]), None),
            (v2(0x21, 0x00, &[]), None),
            (v2(0x21, 0x00, &[1; 4096]), None),
            (v2(0x21, 0x10, &[]), None),
            (v2(0x21, 0x01, &[]), None),
            // Of LOCAL everything else is ignored.
            (LOCAL.to_vec(), None),
            (v2(0x20, 0x11, &[]), None),
            (v2(0x20, 0x11, &[1; 12]), None),
            (v2(0x20, 0x99, &[1; 40]), None),
        ] {
            let named = named.map(|text| text.parse().unwrap());
            assert_eq!(client(&bytes), Ok(named), "{}", bytes.escape_ascii());
        }
    }

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
            // 108 bytes, in which the CRLF begins at the 107th or later.
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
            let found = Header::parse(&bytes);
            assert!(matches!(found, Err(HeaderError::Malformed(_))), "{}: {found:?}", bytes.escape_ascii());
        }
        assert_eq!(client(&v1(&format!("UNKNOWN {}", long(91)))), Ok(None), "107 bytes");
    }

    #[test]
    fn other_bytes_are_no_header() {
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
            assert_eq!(Header::parse(bytes), Err(HeaderError::Missing), "{}", bytes.escape_ascii());
            assert_eq!(begins(bytes), Some(false));
        }
    }

    /// Bytes that get past the first look, more often than any bytes do.
    fn nearly_headers() -> impl Strategy<Value = Vec<u8>> {
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

    /// The bytes of a valid header, and whom it names.
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
        fn no_bytes_make_the_parser_panic(bytes in nearly_headers()) {
            let found = Header::parse(&bytes);
            if let Ok(Some(header)) = found {
                let (shortest, longest) = if bytes[0] == b'P' { (15, V1_MAX) } else { (16, 16 + V2_LENGTH_MAX) };
                prop_assert!((shortest..=longest).contains(&header.length));
                if bytes[0] == b'P' {
                    prop_assert!(bytes[..header.length].ends_with(b"\r\n"));
                }
            }
            // What is decided stays decided, whatever follows.
            let longer = [bytes.as_slice(), b"GET / HTTP/1.1\r\n\r\n"].concat();
            if found != Ok(None) {
                prop_assert_eq!(Header::parse(&longer), found);
            }
            prop_assert_eq!(found == Err(HeaderError::Missing), begins(&bytes) == Some(false));
        }

        #[test]
        fn every_valid_header_is_read(
            (bytes, client) in headers(),
            next in proptest::collection::vec(any::<u8>(), 0..50),
        ) {
            let header = Header { client, length: bytes.len() };
            prop_assert_eq!(Header::parse(&[bytes.as_slice(), &next].concat()), Ok(Some(header)));
            // A part of it is not decided, or, where it says enough, decided alike.
            for end in 0..bytes.len() {
                let part = Header::parse(&bytes[..end]);
                prop_assert!(part == Ok(None) || (bytes[0] == b'\r' && end >= 16 && part == Ok(Some(header))));
            }
        }
    }

    #[tokio::test]
    async fn not_a_byte_beyond_the_header_is_read() {
        for header in [
            v1("TCP4 192.0.2.1 192.0.2.2 1 2"),
            v2(0x21, 0x11, &[[192, 0, 2, 1].as_slice(), &[7; 900]].concat()),
        ] {
            let (mut theirs, ours) = UnixStream::pair().unwrap();
            let mut ours = Stream::Unix(ours);
            theirs.write_all(&[header.as_slice(), b"next"].concat()).await.unwrap();
            assert_eq!(read_header(&ours).await.unwrap(), Some([192, 0, 2, 1].into()));
            let mut next = [0; 5];
            assert_eq!(ours.read(&mut next).await.unwrap(), 4);
            assert_eq!(&next[..4], b"next");
        }
    }

    #[tokio::test]
    async fn waiting_for_the_rest_of_a_header_takes_no_cpu() {
        let (mut theirs, ours) = UnixStream::pair().unwrap();
        let ours = Stream::Unix(ours);
        let looks = Cell::new(0);
        let looking = peek(&ours, |bytes| {
            looks.set(looks.get() + 1);
            Header::parse(bytes).transpose()
        });
        let sending = async {
            for byte in b"PROXY TCP4" {
                theirs.write_all(&[*byte]).await.unwrap();
                for _ in 0..100 {
                    tokio::task::yield_now().await;
                }
            }
            theirs.shutdown().await.unwrap();
        };
        let (found, ()) = tokio::join!(looking, sending);
        assert_eq!(found.unwrap(), (None, 10), "the end is seen");
        assert!(looks.get() <= 13, "{} looks at ten bytes and the end", looks.get());
    }
}
