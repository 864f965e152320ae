//! Who may ask for keys, and for how many: tokens, rate limits, addresses reported by proxies, the audit log.
//!
//! May import: [`telemetry`](crate::telemetry), [`keys`](crate::keys). A new condition on requests for keys goes into [`authorization`], which decides all of them.

pub mod audit;
pub mod authorization;
pub mod credential_request;
pub mod file_source;
pub mod forwarded;
pub mod peer;
pub mod rate_limit;
pub mod stream_permits;
pub mod token;
