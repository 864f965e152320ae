//! Whether the service is well: /health, /livez, /readyz, and the state behind them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::http::problem::Problem;
use crate::keys::generator::{Generator, GeneratorError};

/// Seconds after which a client is told to come back.
const RETRY_AFTER: u32 = 5;

/// What the health routes answer from; shared by every listener.
#[derive(Debug)]
pub struct Health {
    generator: Arc<Generator>,
    stalled: AtomicBool,
    draining: AtomicBool,
    stopping: AtomicBool,
}

impl Health {
    /// Well, as long as `generator` is.
    pub fn new(generator: Arc<Generator>) -> Self {
        Self {
            generator,
            stalled: AtomicBool::new(false),
            draining: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        }
    }

    /// Whether a worker makes no progress, on which the answer of /livez depends.
    pub fn set_stalled(&self, stalled: bool) {
        self.stalled.store(stalled, Ordering::Relaxed);
    }

    /// From now on /readyz says no, so that balancers look elsewhere.
    pub fn start_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// From now on nothing is begun that may not be done in time.
    pub fn start_stopping(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// Whether the drain has begun and streamed responses are refused.
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
            return Err(Problem::unavailable("A worker makes no progress", RETRY_AFTER));
        }
        Ok(())
    }

    /// `/health`: the generator makes a block now.
    ///
    /// # Errors
    /// 503 with the reason.
    pub fn check(&self) -> Result<(), Problem> {
        self.generator.check().map_err(failed)
    }

    /// `/readyz`: a key asked for now will be served.
    ///
    /// # Errors
    /// 503 with the reason.
    pub fn ready(&self) -> Result<(), Problem> {
        if self.is_draining() {
            return Err(draining());
        }
        self.check()
    }
}

/// What a client is told while the generator is out of service; the reason itself is for the log and /health.
pub fn failed(failure: GeneratorError) -> Problem {
    Problem::unavailable(format!("No keys can be made: {failure}"), RETRY_AFTER)
}

/// What a client is told when the service stops before its answer could be complete.
pub fn draining() -> Problem {
    Problem::unavailable("The service is stopping", RETRY_AFTER)
}

/// What a client is told when every connection is taken.
pub fn full() -> Problem {
    Problem::unavailable("Too many connections", RETRY_AFTER).closing()
}
