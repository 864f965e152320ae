//! A small Unix daemon that issues cryptographically secure random keys over HTTP.

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
