//! Random bytes: the generator, keys and their length, how they are written, passwords.
//!
//! May import: nothing of this crate. HTTP, tokio and configuration stay out. A new encoding of keys goes into [`encoding`], a new alphabet into [`password`].

pub mod encoding;
pub mod generator;
pub mod key;
pub mod password;
