//! The fast path: requests that need nothing but a response of at most 16 KiB are answered without hyper.
//!
//! [`request`] parses a strict subset of what hyper accepts, the service decides what the request means, and
//! [`response_buffer`] holds the responses, each key generated in it, and sends those to pipelined requests in one
//! write. Every other request, malformed ones included, goes to hyper with all of its bytes (`rewind`). No file here
//! knows what a request means.

pub(crate) mod connection;
mod date;
pub mod request;
pub mod response_buffer;
pub(crate) mod rewind;
pub mod service;
