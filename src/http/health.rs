//! The health of the service, which `/health`, `/livez` and `/readyz` report.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::http::problem::Problem;
use crate::keys::generator::Generator;

/// The state behind the health routes, shared by every listener.
#[derive(Debug)]
pub struct Health {
    generator: Arc<Generator>,
    stalled: AtomicBool,
    draining: AtomicBool,
    stopping: AtomicBool,
}

impl Health {
    /// Healthy as long as `generator` works.
    pub fn new(generator: Arc<Generator>) -> Self {
        Self {
            generator,
            stalled: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        }
    }

    /// Sets whether a worker makes no progress; `/livez` returns 503 then.
    pub fn set_stalled(&self, stalled: bool) {
        self.stalled.store(stalled, Ordering::Relaxed);
    }

    /// From now on `/readyz` returns 503, so that load balancers choose other instances.
    pub fn start_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// From now on streamed responses, which may not end in time, are refused.
    pub fn start_stopping(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// Whether streamed responses are refused.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }

    /// Whether the service is about to stop.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// `/livez`: every worker makes progress. A failed generator is no reason to restart the process.
    ///
    /// # Errors
    /// 503 with the reason.
    pub fn live(&self) -> Result<(), Problem> {
        if self.stalled.load(Ordering::Relaxed) {
            return Err(Problem::stalled());
        }
        Ok(())
    }

    /// `/health`: the generator generates a block now.
    ///
    /// # Errors
    /// 503 with the reason.
    pub fn check(&self) -> Result<(), Problem> {
        self.generator.check().map_err(Problem::generator_failed)
    }

    /// `/readyz`: a key that is requested now will be served.
    ///
    /// # Errors
    /// 503 with the reason.
    pub fn ready(&self) -> Result<(), Problem> {
        if self.is_draining() {
            return Err(Problem::draining());
        }
        self.check()
    }
}
