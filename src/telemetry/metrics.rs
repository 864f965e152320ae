//! What the daemon counts, as a value: labels are enums, so no client can make a new series.

use std::io;
use std::time::{Duration, Instant};

use axum::http::StatusCode;
use prometheus::{
    Histogram, HistogramOpts, HistogramVec, IntCounter, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder,
};
use strum::{IntoStaticStr, VariantArray};

use crate::keys::format::Format;
use crate::telemetry::endpoint::Endpoint;
use crate::telemetry::log::DropCounters;
use crate::telemetry::process::Process;
use crate::telemetry::register::{counters, histogram, int_gauge, register, series};

/// The statuses that are answered here; anything else would be counted as `other`.
const STATUSES: [u16; 10] = [200, 400, 401, 404, 405, 406, 413, 429, 431, 503];

/// Why a request or a connection was turned away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum Rejection {
    /// Every connection slot was taken.
    Connections,
    /// The bytes were no acceptable HTTP/1.1 message.
    Malformed,
    /// The generator is out of service.
    Generator,
    /// The service is stopping and the key would not be done in time.
    Draining,
    /// No valid token where there must be one.
    Unauthorized,
    /// More requests or bytes than the client may have.
    Rate,
    /// More connections than the client may have.
    ClientConnections,
    /// As many streamed responses are in flight as may be, or as the client may have.
    Bulk,
    /// Too many connections hold buffers, and this one was reset.
    Buffers,
}

/// Why a request for a key or a password gets a 503.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum KeyFailure {
    /// Every connection slot was taken.
    Connections,
    /// Its client has more connections than it may have.
    ClientConnections,
    /// The generator is out of service.
    Generator,
    /// The service is stopping and the key would not be done in time.
    Draining,
    /// As many streamed responses are in flight as may be, or as the client may have.
    Bulk,
}

impl From<KeyFailure> for Rejection {
    fn from(reason: KeyFailure) -> Self {
        match reason {
            KeyFailure::Connections => Self::Connections,
            KeyFailure::ClientConnections => Self::ClientConnections,
            KeyFailure::Generator => Self::Generator,
            KeyFailure::Draining => Self::Draining,
            KeyFailure::Bulk => Self::Bulk,
        }
    }
}

/// Why accept(2) failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum AcceptError {
    /// That one connection was gone before it was taken.
    Connection,
    /// Descriptors or memory ran out.
    Resources,
    /// Anything else: the listener itself is broken, or a filter denies the call.
    Listener,
}

impl AcceptError {
    /// The kind of an error, by accept(2).
    pub fn of(error: &io::Error) -> Self {
        use rustix::io::Errno;
        match Errno::from_io_error(error) {
            // "Error handling": Linux passes on what the network had for the new connection, and EPERM is a firewall's.
            Some(
                Errno::CONNABORTED
                | Errno::CONNRESET
                | Errno::INTR
                | Errno::PERM
                | Errno::NETDOWN
                | Errno::PROTO
                | Errno::NOPROTOOPT
                | Errno::HOSTDOWN
                | Errno::NONET
                | Errno::HOSTUNREACH
                | Errno::NETUNREACH
                | Errno::TIMEDOUT,
            ) => Self::Connection,
            Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => Self::Resources,
            _ => Self::Listener,
        }
    }

    /// In words, for the log.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Connection => "each one is closed before",
            Self::Resources => "out of file descriptors or memory",
            Self::Listener => "the listening socket is not usable",
        }
    }
}

/// How a connection to the credential socket ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum CredentialOutcome {
    /// Its unit has its key.
    Served,
    /// It was not of a unit.
    Malformed,
    /// The generator is out of service.
    Failed,
    /// It was gone before it had all of its key.
    Aborted,
}

/// Why a TLS handshake failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum HandshakeFailure {
    /// It took too long.
    Timeout,
    /// The client went away.
    Closed,
    /// What the client sent was no TLS.
    Malformed,
    /// What the client sent was plain HTTP.
    PlainHttp,
    /// There is no version, algorithm or protocol that both speak.
    Incompatible,
    /// The client had no certificate, or none that is accepted.
    ClientCertificate,
    /// The client would not go on: it does not trust our certificate, most often.
    ClientAlert,
    /// Anything else.
    Other,
}

/// Why a connection was closed before TLS and HTTP, where the PROXY protocol is on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, IntoStaticStr, VariantArray)]
#[strum(serialize_all = "snake_case")]
pub enum ProxyProtocolError {
    /// A client that is no trusted proxy sent a header.
    Untrusted,
    /// A trusted proxy sent something else.
    Missing,
    /// A trusted proxy sent a header that is not valid.
    Malformed,
    /// A trusted proxy sent no complete header in time.
    Timeout,
}

/// Every metric of the daemon, each series resolved once.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    process: Process,
    responses: [(u16, IntCounter); STATUSES.len()],
    other_responses: IntCounter,
    latency: [Histogram; Endpoint::VARIANTS.len()],
    rejections: [IntCounter; Rejection::VARIANTS.len()],
    key_failures: [IntCounter; KeyFailure::VARIANTS.len()],
    accept_errors: [IntCounter; AcceptError::VARIANTS.len()],
    credentials: [IntCounter; CredentialOutcome::VARIANTS.len()],
    key_bytes: [IntCounter; Format::VARIANTS.len()],
    key_length: Histogram,
    generator_latency: Histogram,
    generator_healthy: IntGauge,
    log_events_dropped: IntCounter,
    audit_records_dropped: IntCounter,
    log_write_errors: IntCounter,
    /// Requests being answered now.
    pub requests_in_flight: IntGauge,
    /// Client connections that are open now.
    pub connections: IntGauge,
    /// How many of them are allowed.
    pub connections_limit: IntGauge,
    /// Idle connections that were closed for new ones.
    pub idle_connections_closed: IntCounter,
    /// Whether the last reload of the configuration was taken.
    pub config_last_reload_successful: IntGauge,
    /// Whether every worker makes progress.
    pub workers_healthy: IntGauge,
}

impl Metrics {
    /// All series at their start, registered.
    #[expect(clippy::new_without_default, reason = "registering is work; a default would hide it")]
    pub fn new() -> Self {
        let registry = Registry::new();
        let responses =
            counters(&registry, "http_responses_total", "Responses by status code.", "status_code");
        let latency = register(
            &registry,
            HistogramVec::new(
                HistogramOpts::new(
                    "request_latency_seconds",
                    "Seconds from a request's head to the end of its answer, by route.",
                )
                .buckets(vec![
                    0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01,
                    0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
                ]),
                &["endpoint"],
            ),
        );
        let rejections = counters(
            &registry,
            "http_rejections_total",
            "Requests and connections turned away, by reason.",
            "reason",
        );
        let key_failures = counters(
            &registry,
            "key_request_failures_total",
            "Requests for keys and passwords that got a 503 or a response cut short, by reason.",
            "reason",
        );
        let accept_errors =
            counters(&registry, "accept_errors_total", "Failures of accept(2), by kind.", "kind");
        let credentials = counters(
            &registry,
            "credentials_total",
            "Connections to the credential socket, by how they ended.",
            "outcome",
        );
        let key_bytes = counters(&registry, "key_bytes_total", "Key bytes handed out, by format.", "format");
        let build = register(
            &registry,
            IntGaugeVec::new(Opts::new("build_info", "Always 1; the version is a label."), &["version"]),
        );
        build.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1);
        let config_last_reload_successful = int_gauge(
            &registry,
            "config_last_reload_successful",
            "1 if the last (re)load of the configuration was taken, else 0.",
        );
        config_last_reload_successful.set(1);
        let generator_healthy = int_gauge(
            &registry,
            "generator_healthy",
            "1 while the random generator passes its tests, else 0.",
        );
        generator_healthy.set(1);
        let workers_healthy = int_gauge(
            &registry,
            "workers_healthy",
            "1 while every worker makes progress, else 0, and /livez answers 503.",
        );
        workers_healthy.set(1);
        Self {
            process: Process::register(&registry),
            responses: STATUSES.map(|status| (status, responses.with_label_values(&[&status.to_string()]))),
            other_responses: responses.with_label_values(&["other"]),
            latency: series(Endpoint::VARIANTS, &latency),
            rejections: series(Rejection::VARIANTS, &rejections),
            key_failures: series(KeyFailure::VARIANTS, &key_failures),
            accept_errors: series(AcceptError::VARIANTS, &accept_errors),
            credentials: series(CredentialOutcome::VARIANTS, &credentials),
            key_bytes: series(Format::VARIANTS, &key_bytes),
            key_length: histogram(
                &registry,
                "key_length_bytes",
                "Lengths of the keys handed out, in bytes.",
                vec![
                    8.0,
                    16.0,
                    24.0,
                    32.0,
                    48.0,
                    64.0,
                    128.0,
                    256.0,
                    512.0,
                    1024.0,
                    4096.0,
                    65_536.0,
                    1_048_576.0,
                    16_777_216.0,
                    268_435_456.0,
                    1_073_741_824.0,
                ],
            ),
            generator_latency: histogram(
                &registry,
                "generator_latency_seconds",
                "Seconds to make a response, or one chunk of a streamed response.",
                vec![
                    0.000_000_5,
                    0.000_001,
                    0.000_002_5,
                    0.000_005,
                    0.000_01,
                    0.000_025,
                    0.000_05,
                    0.000_1,
                    0.000_25,
                    0.000_5,
                    0.001,
                    0.01,
                    0.1,
                    1.0,
                ],
            ),
            generator_healthy,
            log_events_dropped: register(
                &registry,
                IntCounter::new(
                    "log_events_dropped_total",
                    "Log events dropped because the log's reader was slower than their writer, or stderr failed.",
                ),
            ),
            audit_records_dropped: register(
                &registry,
                IntCounter::new(
                    "audit_records_dropped_total",
                    "Audit records dropped because the log's reader was slower than their writer, or stderr failed.",
                ),
            ),
            log_write_errors: register(
                &registry,
                IntCounter::new(
                    "log_write_errors_total",
                    "Failed writes of log events and audit records; to the journal they are tried again.",
                ),
            ),
            requests_in_flight: int_gauge(
                &registry,
                "http_requests_in_flight",
                "Requests being answered now.",
            ),
            connections: int_gauge(&registry, "http_connections", "Client connections open now."),
            connections_limit: int_gauge(
                &registry,
                "http_connections_limit",
                "Client connections that may be open at once.",
            ),
            idle_connections_closed: register(
                &registry,
                IntCounter::new(
                    "http_idle_connections_closed_total",
                    "Idle client connections closed for new ones, when all slots were taken.",
                ),
            ),
            config_last_reload_successful,
            workers_healthy,
            registry,
        }
    }

    /// The metrics of TLS. They are there only where TLS is: a certificate that expires in 1970 would raise alarm.
    pub fn tls(&self) -> TlsMetrics {
        let failures = counters(
            &self.registry,
            "tls_handshake_failures_total",
            "TLS handshakes that failed, by reason.",
            "reason",
        );
        TlsMetrics {
            handshakes: register(
                &self.registry,
                IntCounter::new("tls_handshakes_total", "TLS handshakes that led to a connection."),
            ),
            failures: series(HandshakeFailure::VARIANTS, &failures),
            not_after: int_gauge(
                &self.registry,
                "tls_certificate_not_after_timestamp_seconds",
                "When the first certificate of the chain in use expires, in seconds since 1970.",
            ),
            last_reload_successful: int_gauge(
                &self.registry,
                "tls_last_reload_successful",
                "1 if the last (re)load of certificate and key was taken, else 0.",
            ),
        }
    }

    /// The metric of the PROXY protocol, which is there only where the protocol is on.
    pub fn proxy_protocol(&self) -> ProxyProtocolMetrics {
        let errors = counters(
            &self.registry,
            "proxy_protocol_errors_total",
            "Connections closed because of their PROXY header or the lack of one, by reason.",
            "reason",
        );
        ProxyProtocolMetrics { errors: series(ProxyProtocolError::VARIANTS, &errors) }
    }

    /// Counts an answer.
    pub fn answered(&self, status: StatusCode) {
        self.responses
            .iter()
            .find(|(code, _)| *code == status.as_u16())
            .map_or(&self.other_responses, |(_, counter)| counter)
            .inc();
    }

    /// Records how long an answer took, from the request's head to the end of the answer's body.
    pub fn finished(&self, endpoint: Endpoint, took: Duration) {
        self.latency[endpoint as usize].observe(took.as_secs_f64());
    }

    /// Counts a refusal.
    pub fn rejected(&self, reason: Rejection) {
        self.rejections[reason as usize].inc();
    }

    /// Counts a request for a key or a password that gets a 503, or whose response is cut short. The request's route counts
    /// it as well, when its answer ends.
    pub fn key_failed(&self, reason: KeyFailure) {
        self.rejected(reason.into());
        self.key_failures[reason as usize].inc();
    }

    /// Counts a connection to the credential socket.
    pub fn credential(&self, outcome: CredentialOutcome) {
        self.credentials[outcome as usize].inc();
    }

    /// Counts a failure of accept(2).
    pub fn accept_failed(&self, kind: AcceptError) {
        self.accept_errors[kind as usize].inc();
    }

    /// Counts a key that is being handed out.
    #[expect(clippy::cast_precision_loss, reason = "a length is at most 2³⁰")]
    pub fn key_served(&self, length: u64) {
        self.key_length.observe(length as f64);
    }

    /// Counts key bytes that were handed to a connection.
    pub fn key_bytes_served(&self, format: Format, bytes: u64) {
        self.key_bytes[format as usize].inc_by(bytes);
    }

    /// Records how long the generator took, from `started` until now.
    pub fn generated(&self, started: Instant) {
        self.generator_latency.observe(started.elapsed().as_secs_f64());
    }

    /// Notes that the generator is out of service.
    pub fn generator_failed(&self) {
        self.generator_healthy.set(0);
    }

    /// The text exposition format, version 0.0.4. `dropped` is the log's own count so far.
    pub fn render(&self, dropped: &DropCounters) -> String {
        self.process.refresh();
        for (counter, count) in [
            (&self.log_events_dropped, dropped.events()),
            (&self.audit_records_dropped, dropped.audit_records()),
            (&self.log_write_errors, dropped.write_errors()),
        ] {
            counter.inc_by(count.saturating_sub(counter.get()));
        }
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default() // writing into a String can't fail
    }
}

/// What is counted where TLS is on.
#[derive(Debug)]
pub struct TlsMetrics {
    handshakes: IntCounter,
    failures: [IntCounter; HandshakeFailure::VARIANTS.len()],
    not_after: IntGauge,
    last_reload_successful: IntGauge,
}

impl TlsMetrics {
    /// Notes that a certificate was taken into use, and when it expires, in seconds since 1970.
    pub fn loaded(&self, not_after: u64) {
        self.not_after.set(i64::try_from(not_after).unwrap_or(i64::MAX));
        self.last_reload_successful.set(1);
    }

    /// Notes that the certificate in use is not the one that is configured.
    pub fn reload_refused(&self) {
        self.last_reload_successful.set(0);
    }

    /// Counts a handshake that led to a connection.
    pub fn handshake_done(&self) {
        self.handshakes.inc();
    }

    /// Counts one that did not.
    pub fn handshake_failed(&self, reason: HandshakeFailure) {
        self.failures[reason as usize].inc();
    }
}

/// What is counted where the PROXY protocol is on.
#[derive(Debug)]
pub struct ProxyProtocolMetrics {
    errors: [IntCounter; ProxyProtocolError::VARIANTS.len()],
}

impl ProxyProtocolMetrics {
    /// Counts a connection that is closed.
    pub fn failed(&self, reason: ProxyProtocolError) {
        self.errors[reason as usize].inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_is_there_before_the_first_request() {
        let dropped = DropCounters::default();
        (0..3).for_each(|_| dropped.count(false));
        let text = Metrics::new().render(&dropped);
        for series in [
            "http_responses_total{status_code=\"200\"} 0",
            "request_latency_seconds_count{endpoint=\"/key/{length}\"} 0",
            "key_bytes_total{format=\"raw\"} 0",
            "http_rejections_total{reason=\"connections\"} 0",
            "key_request_failures_total{reason=\"client_connections\"} 0",
            "generator_healthy 1",
            "workers_healthy 1",
            "log_events_dropped_total 3",
            "audit_records_dropped_total 0",
            "log_write_errors_total 0",
            "build_info{version=",
        ] {
            assert!(text.contains(series), "{series} is missing:\n{text}");
        }
    }
}
