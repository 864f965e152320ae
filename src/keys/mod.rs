//! Random bytes: the generator, keys and their length, formats and encodings, passwords.
//!
//! May import: nothing of this crate. HTTP, tokio and configuration stay out.
//! A new format goes into [`format`](mod@format), its prefix and suffix into [`key_spec`]; a new alphabet into
//! [`password`].

pub mod encoded_stream;
mod encoding;
pub mod format;
pub mod generator;
pub mod key;
pub mod key_spec;
pub mod password;
pub(crate) mod secret_buf;
