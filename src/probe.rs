//! The `health` subcommand: checks a running service with one request, one line of output and one exit status, as a
//! container's HEALTHCHECK and the chart's test need it.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, ToSocketAddrs};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConnection, StreamOwned};

use crate::access::file_source::FileSource;
use crate::access::forwarded::TrustedProxies;
use crate::access::peer::Peer;
use crate::access::proxy_header::LOCAL_HEADER;
use crate::config::{ConfigErrors, LocalEndpoint, Sources};
use crate::server::address::Host;
use crate::server::tls::pem;
use crate::server::tls::pinned_client::pinned_client;
use crate::server::tls::plain_http::PLAIN_HTTP_DETAIL;
use crate::telemetry::endpoint::HEALTH_PATH;

/// How long each step may take: connecting, the request, the response.
const STEP_TIMEOUT: Duration = Duration::from_secs(2);

/// How many bytes of a response are read at most.
const RESPONSE_MAX: u64 = 4096;

/// Why there is no healthy service.
#[derive(Debug)]
pub enum ProbeError {
    /// The configuration has errors in the settings that locate the service.
    Config(ConfigErrors),
    /// The service can't be reached, or is not healthy. A sentence: what was expected, and what was found.
    Unhealthy(String),
}

/// Checks the service at `url`, by default the one that `sources` configure, and returns the body of its response.
///
/// # Errors
/// Why the service is not healthy.
pub fn run(url: Option<&str>, sources: &Sources) -> Result<String, ProbeError> {
    let target = match url {
        None => Target::local(&sources.endpoint().map_err(ProbeError::Config)?),
        // The URL alone is enough: plain HTTP needs no certificate of the configuration.
        Some(url) if url.starts_with("http://") => Target::parse(url, None),
        Some(url) => Target::parse(url, Some(&sources.endpoint().map_err(ProbeError::Config)?)),
    };
    target.and_then(|target| target.check()).map_err(ProbeError::Unhealthy)
}

/// A URL to check, and what the service there needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// `host:port`, or `unix:/path`.
    authority: String,
    path: String,
    /// The certificate that the service must have, if it speaks TLS.
    certificate: Option<CertificateDer<'static>>,
    /// The proxies that must send a PROXY header, if any must.
    proxies: Option<TrustedProxies>,
    /// Why the metrics listener is checked instead of the one for keys.
    metrics_reason: Option<String>,
}

impl Target {
    /// The service at `endpoint`, on this machine. The metrics listener is checked instead, over plain HTTP, if this program
    /// lacks what the listener for keys needs: a client certificate, or the certificate that identifies the service, which
    /// may be a credential of its unit or a file that the caller may not read.
    ///
    /// # Errors
    /// A sentence, if no listener can be checked.
    pub fn local(endpoint: &LocalEndpoint) -> Result<Self, String> {
        let is_tls = endpoint.tls && !matches!(endpoint.host, Host::Unix(_));
        let certificate = match (is_tls, endpoint.wants_certificate) {
            (false, _) => Ok(None),
            (true, true) => Err("tls-client-ca requires client certificates, and health has none".into()),
            (true, false) => pinned_certificate(endpoint.certificate.as_ref()).map(Some),
        };
        let (host, port, certificate, metrics_reason) = match certificate {
            Ok(certificate) => (&endpoint.host, endpoint.srv_port, certificate, None),
            Err(reason) if endpoint.shares_port() => {
                return Err(format!(
                    "expected a metrics-port of its own to check health, found that of srv-port: {reason}"
                ));
            }
            Err(reason) => (&endpoint.metrics_host, endpoint.metrics_port, None, Some(reason)),
        };
        let authority = match host {
            Host::Unix(path) => format!("unix:{}", path.display()),
            // IPv4 works whether or not this machine has IPv6.
            Host::Any => SocketAddr::from((Ipv4Addr::LOCALHOST, port)).to_string(),
            // A socket on the unspecified address also accepts connections to loopback.
            Host::Ip(ip) if ip.is_unspecified() => {
                let loopback = match ip {
                    IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::LOCALHOST),
                    IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::LOCALHOST),
                };
                SocketAddr::new(loopback, port).to_string()
            }
            Host::Ip(ip) => SocketAddr::new(*ip, port).to_string(),
        };
        let proxies = endpoint.proxies.clone().filter(|_| metrics_reason.is_none());
        Ok(Self { authority, path: HEALTH_PATH.into(), certificate, proxies, metrics_reason })
    }

    /// The service at `http://host:port/path`, or at `https://` with the certificate of `endpoint`. The default path is
    /// `/health`.
    ///
    /// # Errors
    /// A sentence, if `url` has another form.
    pub fn parse(url: &str, endpoint: Option<&LocalEndpoint>) -> Result<Self, String> {
        let expected = || format!("expected http://host:port/path, found {url:?}");
        let (rest, default_port, certificate) =
            match (url.strip_prefix("http://"), url.strip_prefix("https://")) {
                (Some(rest), _) => (rest, "80", None),
                (None, Some(rest)) => {
                    let certificate = endpoint.and_then(|endpoint| endpoint.certificate.as_ref());
                    (rest, "443", Some(pinned_certificate(certificate)?))
                }
                (None, None) => return Err(expected()),
            };
        let (authority, path) = match rest.find('/') {
            Some(end) => rest.split_at(end),
            None => (rest, HEALTH_PATH),
        };
        let (host, port) = authority.rsplit_once(':').unwrap_or((authority, default_port));
        let is_graphic = |text: &str| text.bytes().all(|byte| byte.is_ascii_graphic());
        if host.is_empty() || port.parse::<u16>().is_err() || !is_graphic(rest) {
            return Err(expected());
        }
        let (authority, path) = (format!("{host}:{port}"), path.to_owned());
        Ok(Self { authority, path, certificate, proxies: None, metrics_reason: None })
    }

    /// Sends one request, and returns the response's body if its status is 200.
    ///
    /// # Errors
    /// A sentence: what was expected, and what was found.
    pub fn check(&self) -> Result<String, String> {
        let response = self.exchange().map_err(|error| {
            let reason = self.metrics_reason.as_ref();
            let reason = reason.map_or_else(String::new, |reason| format!(" (metrics: {reason})"));
            format!("{self}: {}{reason}", describe(&error))
        })?;
        let text = String::from_utf8_lossy(&response);
        let refuses_plain_http = text.starts_with("HTTP/1.1 400 ") && text.contains(PLAIN_HTTP_DETAIL);
        if self.certificate.is_none() && (is_tls(&response) || refuses_plain_http) {
            return Err(format!(
                "{self}: expected plain HTTP, found a port that speaks TLS: set the service's certificate (tls-cert, or \
                 KEYSERVICE_TLS_CERT=FILE) and use --url https://{self}, or check the metrics port, which speaks plain HTTP"
            ));
        }
        if response.is_empty() {
            return Err(format!("{self}: expected an HTTP response, found the end of the connection"));
        }
        if !response.starts_with(b"HTTP/") {
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
                stream.set_read_timeout(Some(STEP_TIMEOUT))?;
                stream.set_write_timeout(Some(STEP_TIMEOUT))?;
                self.send_request(stream, self.proxy_header(TrustedProxies::trusts_unix), "localhost")
            }
            None => {
                let mut stream = connect(&self.authority)?;
                stream.set_read_timeout(Some(STEP_TIMEOUT))?;
                stream.set_write_timeout(Some(STEP_TIMEOUT))?;
                // On the same machine, the service sees the local address of this socket.
                let own = Peer::tcp(stream.local_addr()?).origin;
                let header = self.proxy_header(|proxies| proxies.contains(own));
                match &self.certificate {
                    None => self.send_request(stream, header, &self.authority),
                    Some(certificate) => {
                        stream.write_all(header)?;
                        // The server gets the name, but only the certificate is checked.
                        let host = self.authority.rsplit_once(':').map_or("", |(host, _)| host);
                        let name = ServerName::try_from(host.trim_matches(['[', ']']).to_owned())
                            .map_err(io::Error::other)?;
                        let client = ClientConnection::new(pinned_client(certificate.clone()), name)
                            .map_err(io::Error::other)?;
                        self.send_request(StreamOwned::new(client, stream), &[], &self.authority)
                    }
                }
            }
        }
    }

    /// The PROXY header to send, if the service `trusts` this client to send one.
    fn proxy_header(&self, trusts: impl FnOnce(&TrustedProxies) -> bool) -> &'static [u8] {
        if self.proxies.as_ref().is_some_and(trusts) { &LOCAL_HEADER } else { &[] }
    }

    fn send_request(&self, mut stream: impl Read + Write, header: &[u8], host: &str) -> io::Result<Vec<u8>> {
        let request = format!("GET {} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n", self.path);
        // A server may respond and close before it has read everything. After a TLS alert there may be a reset, or nothing.
        let sent = stream.write_all(&[header, request.as_bytes()].concat());
        let mut response = Vec::new();
        let read = stream.take(RESPONSE_MAX).read_to_end(&mut response);
        if is_tls(&response) || (read.is_ok() && !response.is_empty()) {
            return Ok(response);
        }
        sent.and(read).map(|_| response)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.authority, self.path)
    }
}

/// Whether `response` begins with a record, such as an alert, of TLS 1.0 to 1.3 (RFC 8446 section 5.1).
fn is_tls(response: &[u8]) -> bool {
    matches!(response, [20..=23, 3, ..])
}

/// Untrusted text for a terminal: characters that do not print, or move the cursor, are escaped.
fn printable(text: &str) -> String {
    let is_printable = |c: char| matches!(c, ' '..='~' | '\n' | '\t');
    text.chars()
        .map(|c| if is_printable(c) { c.to_string() } else { c.escape_default().to_string() })
        .collect()
}

/// The error, in a sentence if the system or TLS has none.
fn describe(error: &io::Error) -> String {
    let is_timeout = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
    let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
    match cause {
        Some(rustls::Error::InvalidMessage(_)) => {
            "expected TLS, found something else: use --url http:// if the port speaks plain HTTP".into()
        }
        _ if is_timeout => format!("expected a response within {} s, found none", STEP_TIMEOUT.as_secs()),
        _ => error.to_string(),
    }
}

/// The certificate that the service must have.
fn pinned_certificate(certificate: Option<&FileSource>) -> Result<CertificateDer<'static>, String> {
    let expected = || "expected tls-cert in the configuration to identify the service, found none".to_owned();
    pem::leaf_certificate(certificate.ok_or_else(expected)?)
}

/// Tries every address of the name, which may have IPv4 and IPv6 addresses.
fn connect(authority: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in authority.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, STEP_TIMEOUT) {
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
    fn untrusted_text_is_escaped_for_a_terminal() {
        assert_eq!(printable("OK\tas\nit \"is\""), "OK\tas\nit \"is\"");
        assert_eq!(printable("\x15\x03\x1b[2J\r\u{fffd}\u{202e}"), r"\u{15}\u{3}\u{1b}[2J\r\u{fffd}\u{202e}");
    }

    #[test]
    fn an_unreachable_target_is_named_in_the_error() {
        // Bound but not listening: no other process can listen there.
        let held = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
        held.bind(&SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
        let free = held.local_addr().unwrap().as_socket().unwrap();
        let error = Target::parse(&format!("http://{free}"), None).unwrap().check().unwrap_err();
        assert!(error.starts_with(&format!("{free}/health: ")), "{error}");
    }
}
