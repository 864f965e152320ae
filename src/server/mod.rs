//! How bytes move: listeners, the accept loop, connection limits, timeouts, TLS, graceful shutdown, and the fast path
//! and the slow path of HTTP/1.1. What a request means is decided in [`http`](crate::http).
//!
//! May import: [`access`](crate::access), [`telemetry`](crate::telemetry), [`keys`](crate::keys).
//!
//! A connection goes from [`listener`] through [`accept`] to [`connection`], and from there to [`fast_path`] or to
//! `slow_path`. A new limit gets a file next to [`connection_limit`] and a field in [`context`]; a new timeout goes to
//! [`timeouts`]; what depends on the phase of the shutdown goes to [`drain`].

pub mod accept;
pub mod accepted;
pub mod activation;
pub mod address;
pub mod buffers;
pub mod client_limit;
pub(crate) mod close_notify;
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
pub(crate) mod turn;
pub(crate) mod unacknowledged;
