//! The interfaces to the service manager: readiness and the watchdog, reloads, the socket for credentials.
//!
//! May import: [`http`](crate::http) and the layers below it. What systemd expects of a daemon goes here.

pub mod credentials;
pub mod notify;
pub mod reload;
