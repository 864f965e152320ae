//! Supervises the running service: handles signals, reloads and the watchdog until there is a reason to stop.

use std::fmt;
use std::future::pending;
use std::pin::pin;
use std::time::Duration;

use tracing::warn;

use super::reload::{ReloadRefused, Trigger};
use super::signals::SignalAction;
use super::start::{Contexts, Service, Started};
use crate::http::state::AppState;
use crate::server::connection_limit::ConnectionLimit;
use crate::server::heartbeat::Heartbeats;
use crate::systemd::notify;
use crate::systemd::reload::ReloadOutcome;

/// Why the service stops.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StopReason {
    /// This signal.
    Signal(&'static str),
    /// `exit-idle`: no connection for that long.
    Idle,
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Signal(name) => name,
            Self::Idle => "idle",
        })
    }
}

/// Runs the service until there is a reason to stop.
pub(super) fn supervise(started: &mut Started<'_>) -> StopReason {
    let Started { control, service } = started;
    control.block_on(service.until_stop())
}

impl Service<'_> {
    async fn until_stop(&mut self) -> StopReason {
        let Self { app, contexts, heartbeats, signals, notifier, readiness, reloader, status, .. } = self;
        let exit_idle = reloader.config.exit_idle.filter(|_| self.is_activated);
        let mut idle = pin!(until_idle(exit_idle, contexts, app));
        let progress = || check_progress(app, heartbeats);
        let mut watchdog = pin!(notify::watchdog(notifier, || heartbeats.all_answered(), progress));
        let mut reloads = 0;
        loop {
            tokio::select! {
                never = &mut watchdog => match never {},
                () = &mut idle => return StopReason::Idle,
                () = reloader.files_changed() => match reloader.reload(Trigger::FileChange) {
                    Ok(()) => notifier.status(status),
                    Err(ReloadRefused(reason)) => {
                        notifier.status(&format!("{status}; the last reload was refused: {reason}"));
                    }
                },
                action = signals.next() => match action {
                    SignalAction::Stop(name) => return StopReason::Signal(name),
                    SignalAction::Reload => {
                        notifier.reloading();
                        reloads += 1;
                        let refused = reloader.reload(Trigger::Signal).err().map(|ReloadRefused(reason)| reason);
                        let outcome = ReloadOutcome { number: reloads, refused };
                        notifier.ready(*readiness, &format!("{status}{outcome}"));
                    }
                },
            }
        }
    }
}

/// Whether every worker made progress since the last call. /livez and a metric report it too.
///
/// A failed generator is reported even if no key is requested. The watchdog is pinged all the same: a restart by
/// systemd would hide the failure from the operator.
fn check_progress(app: &AppState, heartbeats: &Heartbeats) -> Result<(), &'static str> {
    let _ = app.generator.check(); // the generator keeps the failure
    app.report_failure();
    let progress = heartbeats.next_round().then_some(()).ok_or("a worker missed a heartbeat");
    app.health.set_stalled(progress.is_err());
    app.metrics.workers_healthy.set(i64::from(progress.is_ok()));
    progress
}

/// Returns when no client has been connected for keys or credentials for `period`. Never returns if `period` is `None`.
async fn until_idle(period: Option<Duration>, contexts: &Contexts, app: &AppState) {
    let Some(period) = period else { return pending().await };
    ConnectionLimit::idle_for(
        &[&contexts.keys.connection_limit, &contexts.credentials.connection_limit],
        period,
    )
    .await;
    if app.generator.failure().is_some() {
        // The next connection would start a process that does not know of the failure.
        warn!("exit-idle is ignored: the random generator has failed");
        pending().await
    }
}
