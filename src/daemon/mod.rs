//! The daemon as a sequence: bind, start, supervise, shut down.
//!
//! May import: [`config`](crate::config) and the layers below it. A new phase goes into [`run`] and a file of its own,
//! the effect of a new setting on a running service into `reload`, and a limit of the process into `resources`.

mod certificate;
mod error;
mod hint;
mod listeners;
mod reload;
pub(crate) mod resources;
mod shutdown;
mod signals;
mod start;
mod supervise;
mod worker;

use std::sync::Arc;

use tracing::{debug, info, warn};

pub use self::error::RunError;
use self::listeners::Bound;
use self::start::Started;
use crate::config::watch::WatchedFiles;
use crate::config::{Config, Sources, injected_variables};
use crate::keys::generator::{Generator, Source};
use crate::server::activation::ActivatedSockets;
use crate::telemetry::log::Log;
use crate::telemetry::version::COMMIT;

/// Serves until a signal asks to stop, and returns when the last connection is closed or the drain has timed out.
///
/// `config` was loaded from `sources` and `files`, which are read again on SIGHUP and when a file changes. `log` stays
/// borrowed until every connection has logged its audit record.
///
/// # Errors
/// The service could not start, and has served nothing.
pub fn run(
    config: Config,
    sources: &Sources,
    files: WatchedFiles,
    inherited: ActivatedSockets,
    source: impl Source,
    log: &Log,
) -> Result<(), RunError> {
    info!(version = env!("CARGO_PKG_VERSION"), commit = COMMIT, "starting");
    log_injected_variables();
    if let Err(error) = resources::forbid_core_dumps() {
        warn!(%error, "failed to forbid core dumps");
    }
    let generator = Arc::new(Generator::new(source)?);
    let bound = Bound::bind(&config, inherited)?;
    let mut started = Started::start(config, sources, files, bound, &generator, log)?;
    let reason = supervise::supervise(&mut started);
    shutdown::shut_down(started, reason);
    Ok(())
}

fn log_injected_variables() {
    let injected = injected_variables();
    if !injected.is_empty() {
        let variables = injected.join(" ").escape_debug().to_string();
        debug!(
            count = injected.len(),
            variables,
            "ignored environment variables that Kubernetes or Docker set for a service of this name"
        );
    }
}
