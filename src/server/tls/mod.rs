//! TLS of the key listener: certificates and keys from files, client certificates, handshakes, reload.

mod client_name;
pub mod handshake;
pub mod identity;
pub mod pem;
pub mod pinned_client;
pub mod plain_http;
pub mod reload;
pub mod settings;
