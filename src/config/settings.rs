//! The table of settings: the one place that defines each of them.
//!
//! `Config`, its loading, printing and reload, `--help` and the documents come from it; see `table.rs` for what an
//! entry means. After a change, `UPDATE_DOCUMENTS=1 cargo test --test settings` writes the documents again.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use figment::value::Value;
use strum::VariantNames;

use super::credential_rules::CredentialTable;
use super::loader::Loader;
use super::print::to_toml;
use super::table::{Reload, Setting, settings};
use super::value_kind::{
    Boolean, FilePath, TlsVersion, ValueKind, duration, integer, list, none_if_zero, one_of, text,
};
use crate::access::file_source::FileSource;
use crate::access::forwarded::{ForwardedHeader, ProxySource};
use crate::access::tokens_file::Grant;
use crate::server::address::{Host, SocketMode};
use crate::server::tls::settings::MinVersion;
use crate::systemd::credentials::CredentialRules;
use crate::telemetry::log_level::LogLevel;

/// The largest value that `max-size` may have: 1 GiB.
pub const MAX_SIZE_LIMIT: u64 = 1 << 30;

/// The value of `max-size` unless configured.
pub const MAX_SIZE_DEFAULT: u64 = 1024;

/// The most threads that serve.
pub const WORKERS_MAX: usize = 256;

/// One hour, in seconds.
const HOUR: u64 = 3600;

/// What `host` and `metrics-host` may be.
const HOST: &str = "an IP address, unix:/path or *";

settings! {
    "host" host: Host {
        kind: text(HOST),
        default: Host::Any,
        reload: NeedsRestart,
        flag: "ADDRESS",
        help: "Address to serve keys on",
        details: "`*` is every address, IPv4 and IPv6, or IPv4 alone if the host has no IPv6; `0.0.0.0` is every \
                  IPv4 address. Not used if the service inherits a socket named `http`.",
    }
    "srv-port" srv_port: u16 {
        kind: integer(0..=65_535),
        default: 1123,
        reload: NeedsRestart,
        flag: "PORT",
        help: "Port for keys and health",
        details: "0 is any free port.",
    }
    "max-size" max_size: u64 {
        kind: integer(1..=MAX_SIZE_LIMIT),
        default: MAX_SIZE_DEFAULT,
        reload: Applied,
        flag: "BYTES",
        help: "Maximum key size, in bytes",
    }
    "metrics-host" metrics_host: Host {
        kind: text(HOST),
        // Metrics of a service on a Unix socket are for this machine only, unless configured otherwise.
        default: match &host {
            Some(host @ (Host::Any | Host::Ip(_))) => host.clone(),
            _ => Host::Ip(IpAddr::V4(Ipv4Addr::LOCALHOST)),
        },
        reload: NeedsRestart,
        help: "Address to serve metrics on",
        details: "The default is the value of `host`, or `127.0.0.1` if that is a path.",
    }
    "metrics-port" metrics_port: u16 {
        kind: integer(0..=65_535),
        default: 8000,
        reload: NeedsRestart,
        flag: "PORT",
        help: "Port for metrics, or the value of `srv-port` to serve them beside the keys",
        details: "0 is any free port.",
    }
    "log-level" log_level: LogLevel {
        kind: one_of(&LogLevel::NAMES),
        default: "info".parse().expect("info is a level"),
        reload: Applied,
        flag: "LEVEL",
        help: "Minimum log level",
    }
    "workers" workers: usize {
        kind: integer(0..=WORKERS_MAX as u64),
        default: 0,
        reload: NeedsRestart,
        help: "Worker threads; 0 is one for each CPU, up to 256",
        details: "If the limit of tasks (`TasksMax=`, a container's pids limit, `RLIMIT_NPROC`) allows fewer, the \
                  service starts fewer and logs a warning with both numbers. Then nothing else can run within that \
                  limit, not even a container's health check: set fewer.",
    }
    "max-connections" max_connections: usize {
        kind: integer(1..=1_000_000),
        default: 10_000,
        reload: NeedsRestart,
        help: "Maximum number of open connections",
        details: "Beyond it, a new connection closes the one that has been idle for longest. While none is idle, up \
                  to 256 extra connections are accepted to answer health checks and return 503. The service lowers \
                  the number to what the limit of open files allows.",
    }
    "head-timeout" head_timeout: Duration {
        kind: duration(1..=HOUR),
        default: Duration::from_secs(10),
        reload: NeedsRestart,
        help: "Time within which the headers of a request must be complete",
        details: "A TLS handshake and a PROXY header have as long.",
    }
    "idle-timeout" idle_timeout: Duration {
        kind: duration(1..=HOUR),
        default: Duration::from_secs(75),
        reload: NeedsRestart,
        help: "Time after which an idle connection is closed",
        details: "Proxies in front should close theirs sooner: common load balancers do so after 60 s.",
    }
    "write-timeout" write_timeout: Duration {
        kind: duration(1..=HOUR),
        default: Duration::from_secs(15),
        reload: NeedsRestart,
        help: "Time after which a client that takes nothing of its response is closed",
        details: "Progress is what the client's kernel acknowledges, so a slow client is not closed.",
    }
    "drain-timeout" drain_timeout: Duration {
        kind: duration(0..=HOUR),
        default: Duration::from_secs(20),
        reload: NeedsRestart,
        help: "Time that busy connections have to finish at shutdown",
        details: "`TimeoutStopSec=` of the unit must be longer than this and `drain-delay` together.",
    }
    "drain-delay" drain_delay: Duration {
        kind: duration(0..=HOUR),
        default: Duration::ZERO,
        reload: NeedsRestart,
        help: "Time for which the service goes on accepting connections at shutdown, before the drain",
        details: "`/readyz` returns 503 meanwhile.",
    }
    "exit-idle" exit_idle: Option<Duration> {
        kind: none_if_zero(duration(0..=24 * HOUR)),
        default: None,
        reload: NeedsRestart,
        help: "Time without a connection for keys or credentials after which the service exits; 0 is never",
        details: "Applies only if one of its sockets started the service, and not if it had to bind the key socket \
                  itself or its generator has failed.",
    }
    "tls-cert" tls_cert: Option<FileSource> {
        kind: FilePath,
        default: None,
        reload: AppliedWithTls,
        help: "PEM file with the certificate and its chain",
        details: "With `tls-key`, keys are served over TLS to clients that connect by TCP; a Unix socket and the \
                  metrics port stay plain. `credential:NAME` is a file in `$CREDENTIALS_DIRECTORY`, where systemd \
                  puts the credentials of the unit (`LoadCredential=`). The service reads the file again within \
                  seconds after it has changed. It uses a certificate that has expired, or will within 7 days, and \
                  logs a warning.",
    }
    "tls-key" tls_key: Option<FileSource> {
        kind: FilePath,
        default: None,
        reload: AppliedWithTls,
        help: "PEM file with the private key of the certificate, without a passphrase",
        details: "A file that others than its owner have access to is refused.",
    }
    "tls-client-ca" tls_client_ca: Option<FileSource> {
        kind: FilePath,
        default: None,
        reload: AppliedWithTls,
        protects: true,
        help: "PEM file with the certificate authorities (CAs) for client certificates",
        details: "If set, every client needs a certificate from one of them that names the client.",
    }
    "tls-min-version" tls_min_version: MinVersion {
        kind: TlsVersion,
        default: MinVersion::Tls13,
        reload: AppliedWithTls,
        help: "Minimum version of TLS",
    }
    "tokens-file" tokens_file: Option<FileSource> {
        kind: FilePath,
        default: None,
        reload: Applied,
        protects: true,
        help: "File with the hashes of bearer tokens",
        details: "If set, a request for a key needs a token; health and metrics do not. Each line is one token: its \
                  name, `sha256:` and 64 hexadecimal digits, and optionally `max-size=`, `rate-requests=`, \
                  `rate-bytes=` and `expires=YYYY-MM-DD`. `key-service token new` prints such lines. The service \
                  reads the file again within seconds after it has changed.",
    }
    "unix-mode" unix_mode: SocketMode {
        kind: text("a mode in octal digits, such as \"0660\""),
        default: SocketMode::default(),
        reload: NeedsRestart,
        help: "Mode of a Unix socket that the service binds itself",
    }
    "unix-trust" unix_trust: bool {
        kind: Boolean,
        default: false,
        reload: NeedsRestart,
        help: "Skip token authentication for clients of a Unix socket",
    }
    "rate-requests" rate_requests: Option<u64> {
        kind: none_if_zero(integer(0..=1_000_000_000)),
        default: None,
        reload: Applied,
        protects: true,
        help: "Requests per second for each client; 0 is no limit",
        details: "A client is an IPv4 address, an IPv6 network of /64, a user of the Unix socket, or the bearer of \
                  a token that has rates of its own.",
    }
    "rate-bytes" rate_bytes: Option<u64> {
        kind: none_if_zero(integer(0..=1 << 40)),
        default: None,
        reload: Applied,
        protects: true,
        help: "Key bytes per second for each client; 0 is no limit",
    }
    "rate-burst" rate_burst: Duration {
        kind: duration(1..=HOUR),
        default: Duration::from_secs(10),
        reload: Applied,
        help: "Burst size, in seconds of the configured rates",
    }
    "trusted-proxies" trusted_proxies: Vec<ProxySource> {
        kind: list("an IP address, a network (10.0.0.0/8) or unix"),
        default: Vec::new(),
        reload: NeedsRestart,
        help: "Proxies that are trusted to report the client's address",
        details: "`unix` is every client of the Unix socket. A variable separates them by commas.",
    }
    "forwarded-header" forwarded_header: ForwardedHeader {
        kind: one_of(ForwardedHeader::VARIANTS),
        default: ForwardedHeader::default(),
        reload: NeedsRestart,
        help: "The one header in which trusted proxies report the client's address",
        details: "`forwarded` is that of RFC 7239.",
    }
    "proxy-protocol" proxy_protocol: bool {
        kind: Boolean,
        default: false,
        reload: NeedsRestart,
        help: "Require a PROXY header, version 1 or 2, at the start of each connection from a trusted proxy",
        details: "Load balancers that forward TCP send it (haproxy's PROXY protocol). Its address is the client's \
                  in every respect. A connection from a trusted proxy without a valid header within `head-timeout` \
                  is closed, and so is a connection with a PROXY header from any other address. Requires \
                  `trusted-proxies`. Applies to the key listener alone.",
    }
    "max-connections-per-client" max_connections_per_client: Option<u32> {
        kind: none_if_zero(integer(0..=1_000_000)),
        default: Some(256),
        reload: NeedsRestart,
        help: "Maximum number of open connections from one client address; 0 is no limit",
        details: "A client address is an IPv4 address or an IPv6 network of /64. Beyond the limit, 8 extra \
                  connections are accepted to answer health checks and return 503; others are closed. Trusted \
                  proxies and Unix sockets have no such limit.",
    }
    "max-bulk-streams" max_bulk_streams: usize {
        kind: integer(1..=1_000_000),
        default: 64,
        reload: NeedsRestart,
        help: "Maximum number of responses above 16 KiB in flight, in any format",
        details: "One client (the bearer of a token, else an address or a Unix user) has at most a quarter of them, \
                  and at least one. Beyond either limit, new requests get a 503.",
    }
    "audit" audit: bool {
        kind: Boolean,
        default: false,
        reload: Applied,
        protects: true,
        help: "Log a record for each key: client, time and size",
        details: "The records do not depend on `log-level`. A streamed key also has a record when it begins.",
    }
    "page" page: bool {
        kind: Boolean,
        default: true,
        reload: NeedsRestart,
        help: "Serve a page for browsers at `/`, and a short index for curl",
    }
    "credentials" credentials: CredentialRules {
        kind: CredentialTable,
        default: CredentialRules::default(),
        reload: Applied,
        help: "Keys for systemd units that load a credential from `/run/key-service/credential.sock`",
        details: "An entry is for the name of a credential, or for a unit, a colon and the name. In it, `length` (1 \
                  to 4096, default 32) counts bytes, and `format` is `raw` (the default), `hex`, `base64`, \
                  `base64url`, `json` or `jwk`. With an `alphabet` (`alnum`, `ascii`, `digits`, `hex` or \
                  `unambiguous`) it is a password of `length` characters, at most 1024, with the format `text` or \
                  `json`. A name with a dot stands in quotation marks. A credential without an entry is 32 raw \
                  bytes. The header `[credentials]` also works, but includes every line after it, other settings \
                  too.",
        examples: [
            "credentials.\"cookie.key\" = { length = 64, format = \"base64\" }",
            "credentials.\"db.service:password\" = { length = 24, alphabet = \"alnum\" }",
        ],
    }
}

impl Default for Config {
    fn default() -> Self {
        let settings = LoadedSettings::read(&mut Loader::default());
        settings.complete(None, Arc::default()).expect("every default is valid")
    }
}

/// The effective configuration, as TOML.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines = NAMES.iter().zip(self.values());
        lines.try_for_each(|(name, value)| writeln!(f, "{name} = {}", to_toml(&value)))
    }
}
