//! The listening sockets of each role: inherited from the service manager, or bound here.

use tracing::warn;

use super::error::RunError;
use crate::config::Config;
use crate::server::activation::ActivatedSockets;
use crate::server::address::Host;
use crate::server::listener::Listener;
use crate::systemd::notify;

/// All listening sockets, from which nothing has been accepted yet.
pub(super) struct Bound {
    /// For keys.
    pub(super) keys: Vec<Listener>,
    /// For metrics.
    pub(super) metrics: Vec<Listener>,
    /// For credentials. They are only ever inherited: without systemd no unit loads a credential.
    pub(super) credentials: Vec<Listener>,
    /// Whether the service manager starts the service again for the next client. It does not if the service itself
    /// bound the socket for keys.
    pub(super) is_activated: bool,
    shares_port: bool,
}

impl Bound {
    /// Takes the inherited sockets and binds the missing ones. If the sandbox forbids binding, as the shipped unit
    /// does, an administrator has disabled the missing socket, and only the others are served.
    ///
    /// # Errors
    /// When a socket can't be bound, or when none was inherited and binding is forbidden.
    pub(super) fn bind(config: &Config, inherited: ActivatedSockets) -> Result<Self, RunError> {
        let ActivatedSockets { http: mut keys, mut metrics, credential: credentials } = inherited;
        let has_inherited = !(keys.is_empty() && metrics.is_empty() && credentials.is_empty());
        let shares_port = config.shares_port();
        let mut is_activated = has_inherited;
        if keys.is_empty() {
            let role = Role {
                settings: ["host", "srv-port"],
                unit: "key-service.socket",
                lost: "no keys are served over HTTP",
            };
            keys.extend(role.bind(&config.host, config.srv_port, config, has_inherited)?);
            is_activated &= keys.is_empty();
        }
        if metrics.is_empty() && !shares_port {
            let role = Role {
                settings: ["metrics-host", "metrics-port"],
                unit: "key-service-metrics.socket",
                lost: "no metrics are served",
            };
            metrics.extend(role.bind(&config.metrics_host, config.metrics_port, config, has_inherited)?);
        }
        Ok(Self { keys, metrics, credentials, is_activated, shares_port })
    }

    /// The TCP ports for keys and metrics.
    pub(super) fn ports(&self) -> Vec<u16> {
        self.keys.iter().chain(&self.metrics).filter_map(Listener::port).collect()
    }

    /// The addresses for keys that other hosts may reach.
    pub(super) fn exposed_addresses(&self) -> Vec<String> {
        let is_exposed = |listener: &&Listener| match listener {
            Listener::Tcp(listener) => {
                !listener.local_addr().is_ok_and(|address| address.ip().to_canonical().is_loopback())
            }
            Listener::Unix(_) => false,
        };
        self.keys.iter().filter(is_exposed).map(ToString::to_string).collect()
    }

    /// Where the service listens, for operators and for tests.
    pub(super) fn status(&self) -> String {
        let list =
            |listeners: &[Listener]| listeners.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let metrics = match &self.metrics[..] {
            [] if self.shares_port && !self.keys.is_empty() => "metrics on the same".to_owned(),
            [] => "no metrics".to_owned(),
            listeners => format!("metrics on {}", list(listeners)),
        };
        let credentials = match &self.credentials[..] {
            [] => String::new(),
            listeners => format!("; credentials on {}", list(listeners)),
        };
        let keys = match &self.keys[..] {
            [] => "No keys over HTTP".to_owned(),
            listeners => format!("Keys on {}", list(listeners)),
        };
        format!("{keys}{credentials}; {metrics}")
    }
}

/// The settings and the unit of a role's socket, for error messages.
struct Role {
    /// The settings of its host and its port.
    settings: [&'static str; 2],
    /// The socket unit that should pass it.
    unit: &'static str,
    /// What is not served without it, for the log.
    lost: &'static str,
}

impl Role {
    fn bind(
        &self,
        host: &Host,
        port: u16,
        config: &Config,
        has_inherited: bool,
    ) -> Result<Option<Listener>, RunError> {
        let Self { settings: [host_setting, port_setting], unit, lost } = *self;
        let bound = Listener::bind(host, port, config.unix_mode);
        match bound.map_err(|error| error.with_settings(host_setting, port_setting)) {
            Ok(listener) => Ok(Some(listener)),
            Err(error) if has_inherited && error.is_forbidden() => {
                warn!(%error, "{lost}: {unit} passed no socket, and the sandbox forbids binding one");
                Ok(None)
            }
            Err(error) if notify::is_started_by_manager() && error.is_denied() => {
                Err(RunError::NotPassed(unit, error))
            }
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_names_what_is_not_served() {
        let status = |shares_port| {
            let (keys, metrics, credentials) = (Vec::new(), Vec::new(), Vec::new());
            Bound { keys, metrics, credentials, is_activated: true, shares_port }.status()
        };
        assert_eq!([status(false), status(true)], ["No keys over HTTP; no metrics"; 2]);
    }
}
