//! Authorization and quotas: tokens, rate limits, forwarded and PROXY addresses, peers, audit.
//!
//! May import: [`telemetry`](crate::telemetry), [`keys`](crate::keys). A new condition for requests for keys goes into
//! [`authorization`], which decides every request; a new way in which a proxy reports its client goes next to
//! [`forwarded`].

pub mod audit;
pub mod authorization;
pub mod credential_request;
pub mod file_source;
pub mod forwarded;
mod grants;
pub mod peer;
pub mod proxy_header;
pub mod rate_limit;
pub mod request_head;
pub mod stream_permits;
pub mod token;
pub mod tokens_file;
pub mod verified_token;
