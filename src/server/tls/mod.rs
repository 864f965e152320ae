//! TLS of the key listener. [`handshake`] serves connections with what [`identity`] loads from files ([`pem`]) and
//! [`reload`] replaces; [`pinned_client`] is the other end, for the `health` subcommand.

mod client_name;
pub mod handshake;
pub mod identity;
pub mod pem;
pub mod pinned_client;
pub mod plain_http;
pub mod reload;
pub mod settings;
