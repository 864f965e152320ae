//! The fast path: plain requests for keys, answered without hyper.
//!
//! It reads with the parser that hyper has, draws the key where the answer is written, and writes once for all requests
//! that came together. Whatever else comes, an error too, goes to hyper with every byte that is not answered: this here
//! refuses nothing, so there is one place that says what is wrong with a request.

pub mod connection;
mod date;
pub mod request;
pub mod response_buffer;
pub mod rewind;
pub mod service;
