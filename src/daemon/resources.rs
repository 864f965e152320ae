//! Limits of the process: core dumps, open files, workers, and the connections that fit them.

use std::io;
use std::thread;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tracing::warn;

use super::error::RunError;
use crate::config;
use crate::server::connection_limit::OVER_LIMIT_CONNECTIONS;
use crate::systemd::credentials;

/// Connections that the metrics listener serves at once: scrapers and probes are few. Up to the same number of
/// over-limit connections get one response each.
const METRICS_CONNECTIONS: usize = 64;

/// Descriptors that the process needs apart from connections: files, the sockets of the log and the service manager, and
/// the control thread's runtime.
const PROCESS_DESCRIPTORS: u64 = 32;

/// Descriptors that a worker needs: its runtime's and its listeners.
const WORKER_DESCRIPTORS: u64 = 4;

/// The lowest limit of open files that the service starts with: a start needs about 20, and tokio panics without them.
const DESCRIPTORS_MIN: u64 = 32;

/// Forbids core dumps for the life of the process, since key bytes must not reach a disk.
///
/// The limit is 1 and not 0: the kernel ignores a limit of 0 when core_pattern pipes the dump to a program (core(5)),
/// but with 1 it drops that dump too. Every dump to a file is larger than either. A hard limit of 0 can't be raised, so
/// it stays.
///
/// # Errors
/// The limit can't be set.
pub(crate) fn forbid_core_dumps() -> io::Result<()> {
    let lowest = getrlimit(Resource::Core).maximum.map_or(1, |maximum| maximum.min(1));
    Ok(setrlimit(Resource::Core, Rlimit { current: Some(lowest), maximum: Some(lowest) })?)
}

/// The number of workers: the setting, or one for each CPU if the setting is 0.
pub(super) fn worker_count(setting: usize) -> usize {
    workers_for(setting, thread::available_parallelism().map_or(1, Into::into))
}

fn workers_for(setting: usize, cpus: usize) -> usize {
    match setting {
        0 => cpus.min(config::WORKERS_MAX),
        count => count,
    }
}

/// The number of connections that each role may have. Together with the descriptors of the process itself, all of them,
/// over-limit connections included, fit the limit of open files.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ConnectionBudget {
    pub(super) keys: usize,
    /// Connections for keys above that limit.
    pub(super) over_limit: usize,
    /// For metrics. The same number of connections may be over the limit.
    pub(super) metrics: usize,
    /// For credentials. The same number of connections may be over the limit.
    pub(super) credentials: usize,
}

impl ConnectionBudget {
    /// Raises the limit of open files as far as possible, and fits `max_connections` into it.
    ///
    /// # Errors
    /// When the limit is too low for any service.
    pub(super) fn within_open_files(max_connections: usize, workers: usize) -> Result<Self, RunError> {
        let budget = Self::fit(raise_open_files()?, max_connections, workers);
        if budget.keys < max_connections {
            warn!(
                asked = max_connections,
                granted = budget.keys,
                "max-connections is lowered to fit the limit of open files (LimitNOFILE=, ulimit -n)"
            );
        }
        Ok(budget)
    }

    /// The budget that fits `descriptors`; `None` is no limit.
    fn fit(descriptors: Option<u64>, keys: usize, workers: usize) -> Self {
        let wanted = Self {
            keys,
            over_limit: OVER_LIMIT_CONNECTIONS,
            metrics: METRICS_CONNECTIONS,
            credentials: credentials::CONNECTIONS,
        };
        let Some(descriptors) = descriptors else { return wanted };
        let needed = PROCESS_DESCRIPTORS + WORKER_DESCRIPTORS * workers as u64;
        let free = usize::try_from(descriptors - needed.min(descriptors / 2)).unwrap_or(usize::MAX);
        // With few descriptors, half of them are for keys.
        let over_limit = wanted.over_limit.min(free / 8).max(1);
        let metrics = wanted.metrics.min(free / 16).max(1);
        let credentials = wanted.credentials.min(free / 16).max(1);
        let others = over_limit + 2 * metrics + 2 * credentials;
        Self { keys: wanted.keys.min(free.saturating_sub(others)).max(1), over_limit, metrics, credentials }
    }
}

/// Raises the soft limit of open files to the hard one, and returns it; `None` is no limit.
fn raise_open_files() -> Result<Option<u64>, RunError> {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    let descriptors = match setrlimit(Resource::Nofile, raised) {
        Ok(()) => limit.maximum,
        Err(_) => limit.current,
    };
    match descriptors {
        Some(found) if found < DESCRIPTORS_MIN => {
            Err(RunError::OpenFiles { expected: DESCRIPTORS_MIN, found })
        }
        descriptors => Ok(descriptors),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_connections_together_fit_the_limit_of_open_files() {
        for descriptors in [32, 40, 64, 100, 256, 600, 1024, 4096, 16_384] {
            for workers in [1, 2, 64] {
                let budget = ConnectionBudget::fit(Some(descriptors), 10_000, workers);
                let needed = (PROCESS_DESCRIPTORS + WORKER_DESCRIPTORS * workers as u64).min(descriptors / 2);
                let connections =
                    budget.keys + budget.over_limit + 2 * budget.metrics + 2 * budget.credentials;
                assert!(connections as u64 + needed <= descriptors, "{descriptors}: {budget:?}");
                assert!(budget.keys as u64 >= descriptors / 8, "{descriptors}: {budget:?}");
            }
        }
        let budget = ConnectionBudget::fit(Some(16_384), 10_000, 2);
        assert_eq!(budget, ConnectionBudget::fit(None, 10_000, 2), "nothing is lowered without need");
    }

    #[test]
    fn workers_default_to_one_for_each_cpu_up_to_the_maximum() {
        for (setting, cpus, count) in [(0, 2, 2), (0, 256, 256), (0, 1024, 256), (1, 1024, 1), (256, 2, 256)]
        {
            assert_eq!(workers_for(setting, cpus), count, "setting {setting}, {cpus} CPUs");
        }
    }
}
