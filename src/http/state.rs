//! The state that all routes share.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tracing::error;

use crate::access::authorization::{Authorized, Authorizer};
use crate::http::health::Health;
use crate::http::problem::Problem;
use crate::keys::generator::{Generator, GeneratorError};
use crate::keys::key_spec::KeySpec;
use crate::telemetry::clock::{self, Nanos};
use crate::telemetry::drop_counters::DropCounters;
use crate::telemetry::labels::KeyRequestError;
use crate::telemetry::metrics::Metrics;

/// What the routes need, shared by every connection.
#[derive(Debug)]
pub struct AppState {
    /// The largest key, in bytes. A reload may change it.
    pub max_size: AtomicU64,
    /// The source of all keys.
    pub generator: Arc<Generator>,
    /// The health of the service.
    pub health: Arc<Health>,
    /// The metrics of the service.
    pub metrics: Arc<Metrics>,
    /// Decides which clients get keys, and how many.
    pub authorizer: Authorizer,
    /// How many log events were dropped so far.
    pub dropped: Arc<DropCounters>,
    /// Whether the web page is served.
    pub has_page: bool,
}

impl AppState {
    /// The largest key for a client, in bytes. `None` is a client that needed no authorization.
    pub(crate) fn max_size_for(&self, authorized: Option<&Authorized>) -> u64 {
        let max_size = self.max_size.load(Ordering::Relaxed);
        authorized.map_or(max_size, |authorized| authorized.max_size(max_size))
    }

    /// Generates a response that is not streamed, and counts its keys.
    ///
    /// # Errors
    /// The generator's failure; nothing is counted then.
    pub fn generate(&self, spec: &KeySpec) -> Result<Bytes, GeneratorError> {
        let started = clock::now();
        let bytes = spec.generate(&self.generator)?;
        self.metrics.record_keys(spec, spec.key_count(), spec.key_bytes(), started);
        Ok(bytes)
    }

    /// The same at the end of `text`, which has the capacity for it. Returns when it was ready.
    ///
    /// # Errors
    /// The generator's failure; nothing is appended or counted then.
    pub(crate) fn append_keys(&self, spec: &KeySpec, text: &mut Vec<u8>) -> Result<Nanos, GeneratorError> {
        let started = clock::now();
        spec.append(&self.generator, text)?;
        Ok(self.metrics.record_keys(spec, spec.key_count(), spec.key_bytes(), started))
    }

    /// Reports and counts a request that gets a 503 because of `failure`, and returns that response's problem.
    pub(crate) fn generator_problem(&self, failure: GeneratorError) -> Problem {
        self.report_failure();
        self.metrics.count_key_error(KeyRequestError::Generator);
        Problem::generator_failed(failure)
    }

    /// `/health`.
    pub(crate) fn check_health(&self) -> Result<(), Problem> {
        let checked = self.health.check();
        self.report_failure();
        checked
    }

    /// `/readyz`.
    pub(crate) fn check_readiness(&self) -> Result<(), Problem> {
        let checked = self.health.ready();
        self.report_failure();
        checked
    }

    /// Logs a failure of the generator and sets its metric, once for the life of the process.
    pub fn report_failure(&self) {
        if let Some(failure) = self.generator.take_report() {
            self.metrics.set_generator_failed();
            error!(%failure, "the random generator is out of service; no key is issued until a restart");
        }
    }
}
