//! What the connections of one role of listeners share: limits, timeouts, TLS, and where they are counted.

use std::sync::Arc;
use std::time::Duration;

use prometheus::IntGauge;

use crate::server::buffers::{BUFFERING_MAX, BufferLimit};
use crate::server::client_limit::ClientConnectionLimit;
use crate::server::connection_limit::{ConnectionClass, ConnectionLimit};
use crate::server::timeouts::Timeouts;
use crate::server::tls::handshake::Tls;
use crate::telemetry::metrics::Metrics;

/// How long such a connection may take for its one request, and how long a head may take once the drain has begun.
pub(crate) const OVER_LIMIT_TIMEOUT: Duration = Duration::from_secs(1);

/// What every connection of a server is held to.
#[derive(Debug, Clone)]
pub struct ServerContext {
    /// Deadlines of a connection with a slot.
    pub timeouts: Arc<Timeouts>,
    /// Deadlines of one without.
    pub over_limit_timeouts: Arc<Timeouts>,
    /// The slots.
    pub slots: Arc<ConnectionLimit>,
    /// Where failures are counted.
    pub metrics: Arc<Metrics>,
    /// The gauge of open connections, where they count.
    pub gauge: Option<IntGauge>,
    /// Who the service is, where connections over TCP are encrypted. Those of Unix sockets never leave the host.
    pub tls: Option<Arc<Tls>>,
    /// How many of them each client may have, where that is bounded.
    pub client_limit: Option<Arc<ClientConnectionLimit>>,
    /// How many connections may hold buffers.
    pub buffers: Arc<BufferLimit>,
    /// Whether [`Accepted::identified`](crate::server::accepted::Accepted::identified) follows, before which a connection takes no slot from an idle one: its client may
    /// have as many as it may.
    pub identifies: bool,
}

impl ServerContext {
    /// For `slots`.
    pub fn new(slots: ConnectionLimit, timeouts: Timeouts, metrics: Arc<Metrics>) -> Self {
        Self {
            over_limit_timeouts: Arc::new(timeouts.at_most(OVER_LIMIT_TIMEOUT)),
            timeouts: Arc::new(timeouts),
            slots: Arc::new(slots),
            metrics,
            gauge: None,
            tls: None,
            client_limit: None,
            buffers: Arc::new(BufferLimit::new(BUFFERING_MAX)),
            identifies: false,
        }
    }

    pub(crate) fn timeouts(&self, class: ConnectionClass) -> &Arc<Timeouts> {
        match class {
            ConnectionClass::Normal => &self.timeouts,
            ConnectionClass::OverLimit | ConnectionClass::OverClientLimit => &self.over_limit_timeouts,
        }
    }

    /// Speaks TLS on TCP.
    #[must_use]
    pub fn with_tls(mut self, tls: Option<Arc<Tls>>) -> Self {
        self.tls = tls;
        self
    }

    /// Shows the open connections on `gauge`.
    #[must_use]
    pub fn with_gauge(mut self, gauge: IntGauge) -> Self {
        self.gauge = Some(gauge);
        self
    }

    /// Bounds the connections of each client.
    #[must_use]
    pub fn with_client_limit(mut self, client_limit: Option<Arc<ClientConnectionLimit>>) -> Self {
        self.client_limit = client_limit;
        self
    }

    /// Waits for [`Accepted::identified`](crate::server::accepted::Accepted::identified) before a connection takes the slot of an idle one.
    #[must_use]
    pub fn identifying(mut self, identifies: bool) -> Self {
        self.identifies = identifies;
        self
    }
}
