//! Asks a running service how it is, the way a container's HEALTHCHECK or a chart's test needs it: one request, one
//! line, one exit status.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConnection, StreamOwned};

use crate::access::file_source::FileSource;
use crate::access::forwarded::{ProxySource, TrustedProxies};
use crate::access::peer::Peer;
use crate::access::proxy_header::LOCAL_HEADER;
use crate::config::{ConfigErrors, LocalEndpoint, Sources};
use crate::server::address::Host;
use crate::server::tls::pem;
use crate::server::tls::pinned_client::pinned_client;
use crate::server::tls::plain_http::PLAIN_HTTP_DETAIL;
use crate::telemetry::endpoint::HEALTH_PATH;

/// How long each step may take: connecting, the request, the answer.
const PATIENCE: Duration = Duration::from_secs(2);

/// The most of an answer that is read, in bytes.
const ANSWER_MAX: u64 = 4096;

/// Why there is no healthy service.
#[derive(Debug)]
pub enum ProbeError {
    /// The configuration does not say where the service is.
    Config(ConfigErrors),
    /// The service can't be reached, or is not healthy. A sentence: what was expected, and what was found.
    Unhealthy(String),
}

/// Checks the service at `url`, by default the one that `sources` configure, and returns its response.
///
/// # Errors
/// Why it is not healthy.
pub fn run(url: Option<&str>, sources: &Sources) -> Result<String, ProbeError> {
    let target = match url {
        None => Target::local(&sources.endpoint().map_err(ProbeError::Config)?),
        // The URL alone is enough: plain HTTP needs no certificate of the configuration.
        Some(url) if url.starts_with("http://") => Target::parse(url, None),
        Some(url) => Target::parse(url, Some(&sources.endpoint().map_err(ProbeError::Config)?)),
    };
    target.and_then(|target| target.ask()).map_err(ProbeError::Unhealthy)
}

/// Whom to ask, and for what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// `host:port`, or `unix:/path`.
    authority: String,
    path: String,
    /// The certificate that the service has to have, where it speaks TLS.
    certificate: Option<CertificateDer<'static>>,
    /// The proxies that have to send a PROXY header there, if any do.
    proxies: Option<TrustedProxies>,
    /// Why this is not the listener of keys.
    reason: Option<String>,
}

impl Target {
    /// The service at `endpoint`, on this machine. Its metrics listener is asked, in plain HTTP, where this program lacks
    /// what the listener of keys wants: a client certificate, or the service's certificate to know it by, which may be a
    /// credential of its unit or a file that the caller may not read.
    ///
    /// # Errors
    /// A sentence, where the service has no place to ask.
    pub fn local(endpoint: &LocalEndpoint) -> Result<Self, String> {
        let is_tls = endpoint.tls && !matches!(endpoint.host, Host::Unix(_));
        let certificate = match (is_tls, endpoint.wants_certificate) {
            (false, _) => Ok(None),
            (true, true) => Err("tls-client-ca asks for certificates, and health has none to show".into()),
            (true, false) => known_by(endpoint.certificate.as_ref()).map(Some),
        };
        let (host, port, certificate, reason) = match certificate {
            Ok(certificate) => (&endpoint.host, endpoint.srv_port, certificate, None),
            Err(reason) if endpoint.shares_port() => {
                return Err(format!(
                    "expected a metrics-port of its own to ask for health, found that of srv-port: {reason}"
                ));
            }
            Err(reason) => (&endpoint.metrics_host, endpoint.metrics_port, None, Some(reason)),
        };
        let authority = match host {
            Host::Unix(path) => format!("unix:{}", path.display()),
            // Over IPv4, which it takes whether or not this machine has IPv6.
            Host::Any => std::net::SocketAddr::from((Ipv4Addr::LOCALHOST, port)).to_string(),
            // An unspecified address takes connections to this machine.
            Host::Ip(ip) if ip.is_unspecified() => {
                let loopback = match ip {
                    IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
                    IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
                };
                std::net::SocketAddr::new(loopback, port).to_string()
            }
            Host::Ip(ip) => std::net::SocketAddr::new(*ip, port).to_string(),
        };
        let proxies = endpoint.proxies.clone().filter(|_| reason.is_none());
        Ok(Self { authority, path: HEALTH_PATH.into(), certificate, proxies, reason })
    }

    /// `http://host:port/path`, or `https://` for a service with the certificate of `endpoint`; without a path,
    /// `/health`.
    ///
    /// # Errors
    /// A sentence, where `url` is none of that.
    pub fn parse(url: &str, endpoint: Option<&LocalEndpoint>) -> Result<Self, String> {
        let expected = || format!("expected http://host:port/path, found {url:?}");
        let (rest, default_port, certificate) =
            match (url.strip_prefix("http://"), url.strip_prefix("https://")) {
                (Some(rest), _) => (rest, "80", None),
                (None, Some(rest)) => {
                    let certificate = endpoint.and_then(|endpoint| endpoint.certificate.as_ref());
                    (rest, "443", Some(known_by(certificate)?))
                }
                (None, None) => return Err(expected()),
            };
        let (authority, path) = match rest.find('/') {
            Some(end) => rest.split_at(end),
            None => (rest, HEALTH_PATH),
        };
        let (host, port) = authority.rsplit_once(':').unwrap_or((authority, default_port));
        let is_plain = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        if host.is_empty() || port.parse::<u16>().is_err() || !is_plain(rest) {
            return Err(expected());
        }
        let (authority, path) = (format!("{host}:{port}"), path.to_owned());
        Ok(Self { authority, path, certificate, proxies: None, reason: None })
    }

    /// One request. The answer's body where its status is 200.
    ///
    /// # Errors
    /// A sentence: what was asked, and what came.
    pub fn ask(&self) -> Result<String, String> {
        let answer = self.exchange().map_err(|error| {
            let reason =
                self.reason.as_ref().map_or_else(String::new, |reason| format!(" (metrics: {reason})"));
            format!("{self}: {}{reason}", sentence(&error))
        })?;
        let text = String::from_utf8_lossy(&answer);
        let names_tls = text.starts_with("HTTP/1.1 400 ") && text.contains(PLAIN_HTTP_DETAIL);
        if self.certificate.is_none() && (is_tls(&answer) || names_tls) {
            return Err(format!(
                "{self}: expected plain HTTP, found a port that speaks TLS: name the service's certificate (tls-cert, or \
                 KEYSERVICE_TLS_CERT=FILE) and ask by --url https://{self}, or ask the metrics port, which speaks plain HTTP"
            ));
        }
        if answer.is_empty() {
            return Err(format!("{self}: expected an HTTP response, found the end of the connection"));
        }
        if !answer.starts_with(b"HTTP/") {
            let start = printable(text.lines().next().unwrap_or_default());
            return Err(format!("{self}: expected an HTTP response, found \"{start}\""));
        }
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let (status, body) = (head.lines().next().unwrap_or_default(), printable(body.trim()));
        match status.split(' ').nth(1) {
            Some("200") => Ok(body),
            _ => Err(format!("{self}: expected status 200, found \"{}\" {body}", printable(status))),
        }
    }

    fn exchange(&self) -> io::Result<Vec<u8>> {
        match self.authority.strip_prefix("unix:") {
            Some(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                let trusts = |proxies: &TrustedProxies| proxies.sources.contains(&ProxySource::Unix);
                self.converse(stream, self.header(trusts), "localhost")
            }
            None => {
                let mut stream = connect(&self.authority)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_write_timeout(Some(PATIENCE))?;
                // On this machine, the service sees the address that this end has.
                let own = Peer::tcp(stream.local_addr()?).origin;
                let header = self.header(|proxies| proxies.contains(own));
                match &self.certificate {
                    None => self.converse(stream, header, &self.authority),
                    Some(certificate) => {
                        stream.write_all(header)?;
                        // The name is sent, and not checked: the certificate itself is.
                        let host = self.authority.rsplit_once(':').map_or("", |(host, _)| host);
                        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())
                            .map_err(io::Error::other)?;
                        let client = ClientConnection::new(pinned_client(certificate.clone()), name)
                            .map_err(io::Error::other)?;
                        self.converse(StreamOwned::new(client, stream), &[], &self.authority)
                    }
                }
            }
        }
    }

    /// The PROXY header to send, if the service `trusts` this end to send one.
    fn header(&self, trusts: impl FnOnce(&TrustedProxies) -> bool) -> &'static [u8] {
        if self.proxies.as_ref().is_some_and(trusts) { &LOCAL_HEADER } else { &[] }
    }

    fn converse(&self, mut stream: impl Read + Write, header: &[u8], host: &str) -> io::Result<Vec<u8>> {
        let request = format!("GET {} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n", self.path);
        // A server may answer and close before it has all of it; an alert of TLS may be followed by a reset, or by nothing.
        let sent = stream.write_all(&[header, request.as_bytes()].concat());
        let mut answer = Vec::new();
        let read = stream.take(ANSWER_MAX).read_to_end(&mut answer);
        if is_tls(&answer) || (read.is_ok() && !answer.is_empty()) {
            return Ok(answer);
        }
        sent.and(read).map(|_| answer)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.authority, self.path)
    }
}

/// Whether bytes begin as a record of TLS 1.0 to 1.3 does (RFC 8446 section 5.1); an alert is one.
fn is_tls(answer: &[u8]) -> bool {
    matches!(answer, [20..=23, 3, ..])
}

/// Text of a stranger's for a terminal: what would not print as it is, or move the cursor, is escaped.
fn printable(text: &str) -> String {
    let is_plain = |c: char| matches!(c, ' '..='~' | '\n' | '\t');
    text.chars().map(|c| if is_plain(c) { c.to_string() } else { c.escape_default().to_string() }).collect()
}

/// What went wrong, where the system or TLS has no sentence for it.
fn sentence(error: &io::Error) -> String {
    let is_timeout = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
    match cause {
        Some(rustls::Error::InvalidMessage(_)) => {
            "expected TLS, found something else: ask by --url http:// if the port speaks plain HTTP".into()
        }
        _ if is_timeout => format!("expected an answer within {} s, found none", PATIENCE.as_secs()),
        _ => error.to_string(),
    }
}

/// The certificate that the service has to show.
fn known_by(certificate: Option<&FileSource>) -> Result<CertificateDer<'static>, String> {
    let expected = || "expected tls-cert in the configuration to know the service by, found none".to_owned();
    pem::leaf_certificate(certificate.ok_or_else(expected)?)
}

/// Tries every address of the name, as a name may have one of each kind.
fn connect(authority: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in authority.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, PATIENCE) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_is_an_http_url() {
        for (url, shown) in [
            ("http://keys:1123", "keys:1123/health"),
            ("http://[::1]:8000/readyz", "[::1]:8000/readyz"),
            ("http://keys", "keys:80/health"),
        ] {
            assert_eq!(Target::parse(url, None).unwrap().to_string(), shown);
        }
        for bad in
            ["", "keys:1123", "https://keys", "http://", "http://keys:x", "http://a:1/ b", "http://a:1/\r\nX"]
        {
            assert!(Target::parse(bad, None).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_what_prints_as_it_is_gets_to_a_terminal() {
        assert_eq!(printable("OK\tas\nit \"is\""), "OK\tas\nit \"is\"");
        assert_eq!(printable("\x15\x03\x1b[2J\r\u{fffd}\u{202e}"), r"\u{15}\u{3}\u{1b}[2J\r\u{fffd}\u{202e}");
    }

    #[test]
    fn a_target_that_is_not_there_is_an_error_that_names_it() {
        // Bound, so that no other process listens there.
        let held = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        held.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        let free = held.local_addr().unwrap().as_socket().unwrap();
        let error = Target::parse(&format!("http://{free}"), None).unwrap().ask().unwrap_err();
        assert!(error.starts_with(&format!("{free}/health: ")), "{error}");
    }
}
