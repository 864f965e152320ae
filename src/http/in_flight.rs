//! Requests in flight, for the metrics.

use std::sync::Arc;

use crate::telemetry::clock::{self, Nanos};
use crate::telemetry::endpoint::Endpoint;
use crate::telemetry::metrics::Metrics;

/// A request from its head until its response ends. Dropping this records how long that took.
#[derive(Debug)]
pub(crate) struct InFlightRequest {
    metrics: Arc<Metrics>,
    endpoint: Endpoint,
    started: Nanos,
}

impl InFlightRequest {
    /// Counts the request as in flight, and starts its clock.
    pub(crate) fn start(metrics: Arc<Metrics>, endpoint: Endpoint) -> Self {
        metrics.requests_in_flight.inc();
        Self { metrics, endpoint, started: clock::now() }
    }

    /// The metrics that count the request.
    pub(crate) fn metrics(&self) -> &Metrics {
        &self.metrics
    }
}

impl Drop for InFlightRequest {
    fn drop(&mut self) {
        // Recorded first, as on the fast path: who sees no request in flight sees the latency of all of them.
        self.metrics.observe_latency(self.endpoint, self.started, clock::now());
        self.metrics.requests_in_flight.dec();
    }
}
