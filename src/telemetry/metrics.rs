//! The metrics of the daemon, as a value: every series exists from the start, and is found without a look-up by name.

use axum::http::StatusCode;
use prometheus::{Histogram, HistogramOpts, IntCounter, IntGauge, Registry, TextEncoder};
use strum::VariantArray;

use crate::keys::format::Format;
use crate::keys::key_spec::KeySpec;
use crate::telemetry::clock::{self, Nanos, SECOND};
use crate::telemetry::drop_counters::DropCounters;
use crate::telemetry::endpoint::Endpoint;
use crate::telemetry::labels::{
    AcceptError, CredentialOutcome, HandshakeError, KeyRequestError, ProxyProtocolError, Rejection,
};
use crate::telemetry::process::ProcessMetrics;
use crate::telemetry::register::{
    histogram, histograms, info, int_counter, int_counter_vec, int_counters, int_gauge,
};
use crate::telemetry::version::COMMIT;

/// The status codes that the daemon sends; any other would be counted as `other`.
const STATUSES: [u16; 10] = [200, 400, 401, 404, 405, 406, 413, 429, 431, 503];

/// Buckets of `request_latency_seconds`.
const REQUEST_LATENCIES: [f64; 19] = [
    0.000_01, 0.000_025, 0.000_05, 0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1,
    0.25, 0.5, 1.0, 2.5, 5.0, 10.0,
];

/// Buckets of `generator_latency_seconds`.
const GENERATOR_LATENCIES: [f64; 14] = [
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
];

/// Buckets of `key_length_bytes`.
const KEY_LENGTHS: [f64; 16] = [
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
];

/// Every metric of the daemon but those of optional protocols.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    process: ProcessMetrics,
    responses: ResponseMetrics,
    keys: KeyMetrics,
    log: LogMetrics,
    accept_errors: [IntCounter; AcceptError::VARIANTS.len()],
    credentials: [IntCounter; CredentialOutcome::VARIANTS.len()],
    /// Requests whose responses are not complete.
    pub requests_in_flight: IntGauge,
    /// Open client connections.
    pub connections: IntGauge,
    /// The limit of open client connections.
    pub connections_limit: IntGauge,
    /// Idle connections that were closed to make room for new ones.
    pub idle_connections_closed: IntCounter,
    /// 1 if the last reload of the configuration succeeded, else 0.
    pub config_last_reload_successful: IntGauge,
    /// 1 while every worker makes progress, else 0.
    pub workers_healthy: IntGauge,
}

impl Metrics {
    /// All metrics at their initial values, registered.
    #[expect(clippy::new_without_default, reason = "registering is work; a default would hide it")]
    pub fn new() -> Self {
        let registry = Registry::new();
        info(
            &registry,
            "build_info",
            "Always 1; the version and the commit are labels.",
            &[("version", env!("CARGO_PKG_VERSION")), ("commit", COMMIT.unwrap_or_default())],
        );
        Self {
            process: ProcessMetrics::register(&registry),
            responses: ResponseMetrics::register(&registry),
            keys: KeyMetrics::register(&registry),
            log: LogMetrics::register(&registry),
            accept_errors: int_counters(
                &registry,
                "accept_errors_total",
                "Errors of accept(2), by kind.",
                "kind",
                AcceptError::VARIANTS,
            ),
            credentials: int_counters(
                &registry,
                "credentials_total",
                "Connections to the credential socket, by outcome.",
                "outcome",
                CredentialOutcome::VARIANTS,
            ),
            requests_in_flight: int_gauge(&registry, "http_requests_in_flight", "Requests in flight.", 0),
            connections: int_gauge(&registry, "http_connections", "Open client connections.", 0),
            connections_limit: int_gauge(
                &registry,
                "http_connections_limit",
                "Limit of open client connections.",
                0,
            ),
            idle_connections_closed: int_counter(
                &registry,
                "http_idle_connections_closed_total",
                "Idle client connections closed to make room for new ones.",
            ),
            config_last_reload_successful: int_gauge(
                &registry,
                "config_last_reload_successful",
                "1 if the last load or reload of the configuration succeeded, else 0.",
                1,
            ),
            workers_healthy: int_gauge(
                &registry,
                "workers_healthy",
                "1 while every worker makes progress, else 0; then /livez returns 503.",
                1,
            ),
            registry,
        }
    }

    /// Counts a response.
    pub fn count_response(&self, status: StatusCode) {
        self.responses
            .by_status
            .iter()
            .find(|(code, _)| *code == status.as_u16())
            .map_or(&self.responses.other, |(_, counter)| counter)
            .inc();
    }

    /// Records when the headers of a request were read, and when the last byte of its response was ready to send.
    pub fn observe_latency(&self, endpoint: Endpoint, started: Nanos, ended: Nanos) {
        self.responses.latency[endpoint as usize].observe(seconds(ended - started));
    }

    /// Counts a rejected request or connection.
    pub fn count_rejection(&self, reason: Rejection) {
        self.responses.rejections[reason as usize].inc();
    }

    /// Counts a request for a key or a password that gets a 503, or whose response is cut short: as failed and as
    /// rejected. Its response is also counted by route when it ends.
    pub fn count_key_error(&self, reason: KeyRequestError) {
        self.count_rejection(reason.into());
        self.keys.errors[reason as usize].inc();
    }

    /// Counts a connection to the credential socket.
    pub fn count_credential(&self, outcome: CredentialOutcome) {
        self.credentials[outcome as usize].inc();
    }

    /// Counts an error of accept(2).
    pub fn count_accept_error(&self, kind: AcceptError) {
        self.accept_errors[kind as usize].inc();
    }

    /// Records what was generated of `spec` from `started` until now, which is returned: how many keys begin in it, and
    /// how many bytes it has before encoding.
    #[expect(clippy::cast_precision_loss, reason = "a length is at most 2³⁰")]
    pub fn record_keys(&self, spec: &KeySpec, keys: u64, bytes: u64, started: Nanos) -> Nanos {
        let ended = clock::now();
        self.keys.generator_latency.observe(seconds(ended - started));
        let length = spec.length().bytes().cast_signed() as f64;
        (0..keys).for_each(|_| self.keys.length.observe(length));
        self.keys.bytes[spec.format() as usize].inc_by(bytes);
        ended
    }

    /// Records that the generator is out of service.
    pub fn set_generator_failed(&self) {
        self.keys.generator_healthy.set(0);
    }

    /// All metrics in the text exposition format, version 0.0.4. `dropped` has the counts of the log.
    pub fn render(&self, dropped: &DropCounters) -> String {
        self.process.refresh();
        self.log.refresh(dropped);
        TextEncoder::new().encode_to_string(&self.registry.gather()).unwrap_or_default() // writing to a String can't fail
    }

    /// Registers the metrics of TLS. They exist only with TLS: a certificate that expires in 1970 would raise an alert.
    pub fn tls(&self) -> TlsMetrics {
        TlsMetrics::register(&self.registry)
    }

    /// Registers the metric of the PROXY protocol, which exists only with that protocol.
    pub fn proxy_protocol(&self) -> ProxyProtocolMetrics {
        let errors = int_counters(
            &self.registry,
            "proxy_protocol_errors_total",
            "Connections closed because of their PROXY header or the lack of one, by reason.",
            "reason",
            ProxyProtocolError::VARIANTS,
        );
        ProxyProtocolMetrics { errors }
    }
}

#[expect(clippy::cast_precision_loss, reason = "exact for three months")]
fn seconds(time: Nanos) -> f64 {
    time as f64 / SECOND as f64
}

/// Responses and rejections of all routes.
#[derive(Debug)]
struct ResponseMetrics {
    by_status: [(u16, IntCounter); STATUSES.len()],
    other: IntCounter,
    latency: [Histogram; Endpoint::VARIANTS.len()],
    rejections: [IntCounter; Rejection::VARIANTS.len()],
}

impl ResponseMetrics {
    fn register(registry: &Registry) -> Self {
        let responses =
            int_counter_vec(registry, "http_responses_total", "Responses, by status code.", "status_code");
        let latency = HistogramOpts::new(
            "request_latency_seconds",
            "Seconds from the headers of a request until the last byte of its response is ready to send, by route.",
        );
        Self {
            by_status: STATUSES.map(|status| (status, responses.with_label_values(&[&status.to_string()]))),
            other: responses.with_label_values(&["other"]),
            latency: histograms(
                registry,
                latency.buckets(REQUEST_LATENCIES.to_vec()),
                "endpoint",
                Endpoint::VARIANTS,
            ),
            rejections: int_counters(
                registry,
                "http_rejections_total",
                "Rejected requests and connections, by reason.",
                "reason",
                Rejection::VARIANTS,
            ),
        }
    }
}

/// Keys, passwords, and the generator.
#[derive(Debug)]
struct KeyMetrics {
    errors: [IntCounter; KeyRequestError::VARIANTS.len()],
    bytes: [IntCounter; Format::VARIANTS.len()],
    length: Histogram,
    generator_latency: Histogram,
    generator_healthy: IntGauge,
}

impl KeyMetrics {
    fn register(registry: &Registry) -> Self {
        Self {
            errors: int_counters(
                registry,
                "key_request_failures_total",
                "Requests for keys and passwords that got a 503 or a response cut short, by reason.",
                "reason",
                KeyRequestError::VARIANTS,
            ),
            bytes: int_counters(
                registry,
                "key_bytes_total",
                "Bytes of served keys and passwords before encoding, by format.",
                "format",
                Format::VARIANTS,
            ),
            length: histogram(
                registry,
                "key_length_bytes",
                "Lengths of served keys and passwords, in bytes.",
                &KEY_LENGTHS,
            ),
            generator_latency: histogram(
                registry,
                "generator_latency_seconds",
                "Seconds to generate a response, or one chunk of a streamed response.",
                &GENERATOR_LATENCIES,
            ),
            generator_healthy: int_gauge(
                registry,
                "generator_healthy",
                "1 while the random generator passes its self-tests, else 0.",
                1,
            ),
        }
    }
}

/// Losses and errors of the log.
#[derive(Debug)]
struct LogMetrics {
    events_dropped: IntCounter,
    audit_records_dropped: IntCounter,
    write_errors: IntCounter,
}

impl LogMetrics {
    fn register(registry: &Registry) -> Self {
        Self {
            events_dropped: int_counter(
                registry,
                "log_events_dropped_total",
                "Log events dropped because the log's reader was too slow, or stderr failed.",
            ),
            audit_records_dropped: int_counter(
                registry,
                "audit_records_dropped_total",
                "Audit records dropped because the log's reader was too slow, or stderr failed.",
            ),
            write_errors: int_counter(
                registry,
                "log_write_errors_total",
                "Failed writes of log events and audit records; writes to the journal are retried.",
            ),
        }
    }

    /// Updates the counters to those of the log.
    fn refresh(&self, dropped: &DropCounters) {
        for (counter, count) in [
            (&self.events_dropped, dropped.events()),
            (&self.audit_records_dropped, dropped.audit_records()),
            (&self.write_errors, dropped.write_errors()),
        ] {
            counter.inc_by(count.saturating_sub(counter.get()));
        }
    }
}

/// The metrics of TLS.
#[derive(Debug)]
pub struct TlsMetrics {
    handshakes: IntCounter,
    errors: [IntCounter; HandshakeError::VARIANTS.len()],
    not_after: IntGauge,
    last_reload_successful: IntGauge,
}

impl TlsMetrics {
    fn register(registry: &Registry) -> Self {
        Self {
            handshakes: int_counter(registry, "tls_handshakes_total", "Successful TLS handshakes."),
            errors: int_counters(
                registry,
                "tls_handshake_failures_total",
                "Failed TLS handshakes, by reason.",
                "reason",
                HandshakeError::VARIANTS,
            ),
            not_after: int_gauge(
                registry,
                "tls_certificate_not_after_timestamp_seconds",
                "Earliest expiry in the certificate chain in use, in seconds since 1970-01-01 UTC.",
                0,
            ),
            last_reload_successful: int_gauge(
                registry,
                "tls_last_reload_successful",
                "1 if the last load or reload of certificate and key succeeded, else 0.",
                0,
            ),
        }
    }

    /// Records that a certificate is in use, and when it expires, in seconds since 1970.
    pub fn set_certificate(&self, not_after: u64) {
        self.not_after.set(i64::try_from(not_after).unwrap_or(i64::MAX));
        self.last_reload_successful.set(1);
    }

    /// Records that the certificate in use is not the configured one.
    pub fn set_reload_failed(&self) {
        self.last_reload_successful.set(0);
    }

    /// Counts a successful handshake.
    pub fn count_handshake(&self) {
        self.handshakes.inc();
    }

    /// Counts a failed handshake.
    pub fn count_error(&self, reason: HandshakeError) {
        self.errors[reason as usize].inc();
    }
}

/// The metric of the PROXY protocol.
#[derive(Debug)]
pub struct ProxyProtocolMetrics {
    errors: [IntCounter; ProxyProtocolError::VARIANTS.len()],
}

impl ProxyProtocolMetrics {
    /// Counts a connection that is closed.
    pub fn count_error(&self, reason: ProxyProtocolError) {
        self.errors[reason as usize].inc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_exists_before_the_first_request() {
        let dropped = DropCounters::default();
        (0..3).for_each(|_| dropped.count_dropped(false));
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
            "build_info{commit=",
        ] {
            assert!(text.contains(series), "{series} is missing:\n{text}");
        }
    }
}
