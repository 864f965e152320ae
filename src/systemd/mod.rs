//! What systemd expects of a daemon: readiness and the watchdog, reloads, and the socket for credentials.
//!
//! May import: [`http`](crate::http) and the layers below it. A new message to the service manager goes into
//! [`notify`], a command that a unit runs beside the service into a file of its own. Inherited sockets are in
//! [`server`](crate::server).

pub mod credentials;
pub mod notify;
pub mod reload;
