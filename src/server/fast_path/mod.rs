//! The fast path: requests for raw keys whose headers change nothing about the response are answered without hyper.
//!
//! [`request`] parses with the parser that hyper uses, [`response_buffer`] generates the key where the response is
//! written, and `connection` sends the responses to pipelined requests in one write. Every other request, errors
//! included, goes to hyper with all of its bytes (`rewind`): the fast path refuses nothing, so one place decides what
//! is wrong with a request.

pub(crate) mod connection;
mod date;
pub mod request;
pub mod response_buffer;
pub(crate) mod rewind;
pub mod service;
