//! Shuts the service down: drains it, aborts the remaining connections, and ensures that no connection outlives the
//! log.

use std::convert::Infallible;
use std::io;
use std::time::Duration;

use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use tracing::{info, warn};

use super::reload::{Reloader, Trigger};
use super::start::{Contexts, Service, Started};
use super::supervise::StopReason;
use super::worker::Workers;
use crate::server::drain::Drain;

/// How long an abort waits for the workers to drop their connections: a blocked worker must not hold the exit.
const ABORT_TIMEOUT: Duration = Duration::from_millis(1500);

/// How the drain ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DrainOutcome {
    /// Every connection was closed, and its client has acknowledged the last byte.
    Complete,
    /// The remaining connections are reset.
    Aborted,
    /// The remaining connections are reset, except those of a blocked worker.
    WorkerBlocked,
}

/// Drains the service, and returns when the last connection is closed or the drain has timed out.
///
/// This takes the service, which borrows the log: every connection has logged its audit record before the log ends.
pub(super) fn shut_down(started: Started<'_>, reason: StopReason) {
    let Started { control, mut service } = started;
    let outcome = control.block_on(service.drain(reason));
    // Closes the remaining connections of the control thread. The workers have closed theirs with their runtimes.
    control.shutdown_background();
    let Service { contexts, drain, ports, reloader, .. } = &service;
    if outcome != DrainOutcome::Complete {
        drain.reset_ended(&contexts.all(), ports);
    }
    let open = contexts.open_connections();
    assert!(open == 0 || outcome == DrainOutcome::WorkerBlocked, "{open} connections would outlive the log");
    let lost = reloader.log.dropped().audit_records();
    if lost > 0 {
        warn!(lost, "audit records were dropped since the start: the log did not take them in time");
    }
}

impl Service<'_> {
    async fn drain(&mut self, reason: StopReason) -> DrainOutcome {
        info!(%reason, "stopping");
        self.app.health.start_draining();
        self.notifier.stopping("Draining");
        let Self { app, contexts, ports, drain, workers, accept_loops, reloader, signals, .. } = self;
        let (all, connections) = (contexts.all(), &app.metrics.connections);
        let (delay, limit, log) = (reloader.config.drain_delay, reloader.config.drain_timeout, reloader.log);
        let drained = async {
            sleep(delay).await;
            info!("draining");
            app.health.start_stopping();
            drain.begin(&all).await;
            timeout(limit, all_closed(workers, accept_loops, drain, contexts, ports)).await.is_ok()
        };
        tokio::select! {
            biased;
            signal = signals.next_stop() => {
                warn!(signal, connections = connections.get(), "a second signal ends the drain: open connections are reset");
            }
            never = keep_reloading(reloader) => match never {},
            is_complete = drained => {
                if is_complete {
                    info!("stopped");
                    return DrainOutcome::Complete;
                }
                let unacknowledged = drain.close_acknowledged(&all, ports);
                warn!(connections = connections.get(), unacknowledged, "stopped with connections still open");
            }
        }
        log.block_when_full();
        drain.abort(&all);
        if timeout(ABORT_TIMEOUT, workers.finished()).await.is_ok() {
            return DrainOutcome::Aborted;
        }
        warn!("a worker does not stop: its connections and audit records are lost");
        DrainOutcome::WorkerBlocked
    }
}

/// Returns when every connection is closed, and its client has acknowledged the last byte.
async fn all_closed(
    workers: &mut Workers,
    accept_loops: &mut [JoinHandle<io::Result<()>>],
    drain: &Drain,
    contexts: &Contexts,
    ports: &[u16],
) {
    workers.finished().await;
    for accept_loop in accept_loops {
        let _ = accept_loop.await; // it ends with its last connection; a panic there has been logged
    }
    drain.wait_until_acknowledged(&contexts.all(), ports).await;
}

/// Reloads changed files for as long as the drain takes: a token that is removed meanwhile must not stay valid until
/// the drain ends.
async fn keep_reloading(reloader: &mut Reloader<'_>) -> Infallible {
    loop {
        reloader.files_changed().await;
        let _ = reloader.reload(Trigger::FileChange); // a refusal is in the log
    }
}
