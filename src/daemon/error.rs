//! Why the daemon could not start.

use std::io;

use super::certificate::sentences;
use crate::keys::generator::GeneratorError;
use crate::server::listener::ListenError;
use crate::server::tls::identity::LoadError;

/// What limits the number of threads.
pub(super) const TASK_LIMITS: &str = "the limit of tasks (TasksMax=, a container's pids limit, ulimit -u)";

/// Why the service could not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The random generator failed its self-tests.
    #[error("no keys can be generated: {0}")]
    Generator(#[from] GeneratorError),
    /// A listener can't be bound or inherited.
    #[error("{0}")]
    Listen(#[from] ListenError),
    /// A listener can't be bound, and the service manager passed no socket for it.
    #[error(
        "{0} passed no socket: run `systemctl start {0}`, or if it is active, see `systemctl status {0}` ({1})"
    )]
    NotPassed(&'static str, ListenError),
    /// Too few files may be open.
    #[error("expected a limit of at least {expected} open files (LimitNOFILE=, ulimit -n), found {found}")]
    OpenFiles {
        /// The lowest limit that the service starts with.
        expected: u64,
        /// The limit of this process.
        found: u64,
    },
    /// The certificates or the key have changed since the configuration was read.
    #[error("failed to set up TLS: {}", sentences(.0))]
    Tls(Vec<LoadError>),
    /// A thread that the service needs can't be started.
    #[error("expected room for the {0} thread within {TASK_LIMITS}, found: {1}")]
    Thread(&'static str, io::Error),
    /// The system refused something else.
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
}
