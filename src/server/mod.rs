//! How bytes move: listeners, the accept loop, limits, timeouts, TLS, shutdown, and the two transports of HTTP/1.1.
//!
//! May import: [`access`](crate::access), [`telemetry`](crate::telemetry), [`keys`](crate::keys). What a request means is decided in [`http`](crate::http). A new limit on connections goes here.

pub mod accept;
pub mod accepted;
pub mod activation;
pub mod address;
pub mod buffers;
pub mod client_limit;
pub mod close_notify;
pub mod connection;
pub mod connection_limit;
pub mod context;
pub mod drain;
pub mod fast_path;
pub mod heartbeat;
pub mod idle;
pub mod listener;
pub mod memory;
pub mod proxy_protocol;
pub(crate) mod slow_path;
pub mod stream;
pub mod timeout_stream;
pub mod timeouts;
pub mod tls;
pub mod transport;
pub mod unacknowledged;
