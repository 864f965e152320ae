//! What the connections of one role of listeners share: limits, timeouts, TLS and metrics.

use std::sync::Arc;
use std::time::Duration;

use prometheus::IntGauge;

use crate::server::buffers::{BUFFER_HOLDERS_MAX, BufferLimit};
use crate::server::client_limit::ClientConnectionLimit;
use crate::server::connection_limit::{ConnectionClass, ConnectionLimit};
use crate::server::timeouts::Timeouts;
use crate::server::tls::handshake::Tls;
use crate::telemetry::metrics::Metrics;

/// How long an over-limit connection may take for its one request, and request headers while the service drains.
pub(crate) const OVER_LIMIT_TIMEOUT: Duration = Duration::from_secs(1);

/// What the connections of a server share.
#[derive(Debug, Clone)]
pub struct ServerContext {
    /// The connection slots.
    pub connection_limit: Arc<ConnectionLimit>,
    /// Timeouts of connections with a slot.
    pub(crate) timeouts: Arc<Timeouts>,
    /// Timeouts of connections without one.
    pub(crate) over_limit_timeouts: Arc<Timeouts>,
    /// How many connections each client may have, where that is limited.
    pub(crate) client_limit: Option<Arc<ClientConnectionLimit>>,
    /// How many connections may hold buffers.
    pub(crate) buffer_limit: Arc<BufferLimit>,
    /// The gauge of open connections, for the listeners that have one.
    pub(crate) gauge: Option<IntGauge>,
    pub(crate) metrics: Arc<Metrics>,
    /// TLS for connections over TCP. Those of Unix sockets never leave the host.
    pub(crate) tls: Option<Arc<Tls>>,
    /// Whether a connection takes no slot from an idle one before its client is known: see
    /// [`ServerContext::with_proxy_protocol`].
    pub(crate) uses_proxy_protocol: bool,
}

impl ServerContext {
    /// Plain HTTP without a limit for each client.
    pub fn new(connection_limit: ConnectionLimit, timeouts: Timeouts, metrics: Arc<Metrics>) -> Self {
        Self {
            connection_limit: Arc::new(connection_limit),
            over_limit_timeouts: Arc::new(timeouts.at_most(OVER_LIMIT_TIMEOUT)),
            timeouts: Arc::new(timeouts),
            client_limit: None,
            buffer_limit: Arc::new(BufferLimit::new(BUFFER_HOLDERS_MAX)),
            gauge: None,
            metrics,
            tls: None,
            uses_proxy_protocol: false,
        }
    }

    /// Requires TLS on TCP.
    #[must_use]
    pub fn with_tls(mut self, tls: Option<Arc<Tls>>) -> Self {
        self.tls = tls;
        self
    }

    /// Counts open connections in `gauge`.
    #[must_use]
    pub fn with_gauge(mut self, gauge: IntGauge) -> Self {
        self.gauge = Some(gauge);
        self
    }

    /// Limits the connections of each client.
    #[must_use]
    pub fn with_client_limit(mut self, client_limit: Option<Arc<ClientConnectionLimit>>) -> Self {
        self.client_limit = client_limit;
        self
    }

    /// Has a connection take the slot of an idle one only once the PROXY header has named its client, which may be over
    /// its limit.
    #[must_use]
    pub fn with_proxy_protocol(mut self, uses_proxy_protocol: bool) -> Self {
        self.uses_proxy_protocol = uses_proxy_protocol;
        self
    }

    pub(crate) fn timeouts(&self, class: ConnectionClass) -> &Arc<Timeouts> {
        match class {
            ConnectionClass::Normal => &self.timeouts,
            ConnectionClass::OverLimit | ConnectionClass::OverClientLimit => &self.over_limit_timeouts,
        }
    }
}
