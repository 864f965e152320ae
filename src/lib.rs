//! A small Unix daemon that issues cryptographically secure random keys over HTTP.
//!
//! The modules are layers. Each imports only modules further down in this table, and says in its first lines what belongs
//! into it; the binary, `main.rs`, is on top.
//!
//! | module | role |
//! |---|---|
//! | [`cli`] | the command line, and keys without the service |
//! | [`probe`] | the `health` subcommand: an HTTP client of a running service |
//! | [`daemon`] | the sequence: bind, start, supervise, shut down |
//! | [`config`] | the settings: loading, checking, printing |
//! | [`systemd`] | readiness and the watchdog, reloads, the socket for credentials |
//! | [`http`] | what a request means: routes, negotiation, problem details, health |
//! | [`server`] | how bytes move: listeners, the accept loop, connection limits, timeouts, TLS, drain |
//! | [`access`] | which clients get keys, and how many: tokens, rate limits, addresses, audit |
//! | [`telemetry`] | metrics and the log |
//! | [`keys`] | random bytes: the generator, keys, encodings, passwords |
//!
//! [`cli`], [`probe`] and [`daemon`] share the top layer, and only they see the [`Config`](config::Config): the others get
//! the values that they need.

pub mod access;
pub mod cli;
pub mod config;
pub mod daemon;
pub mod http;
pub mod keys;
pub mod probe;
pub mod server;
pub mod systemd;
pub mod telemetry;
