//! What a request means: routes, content negotiation, problem details, OpenAPI, the web page, health.
//!
//! May import: [`server`](crate::server) and the layers below it.
//!
//! [`service`] decides what a request means, from its [`RequestHead`](crate::access::request_head::RequestHead) and for
//! both transports. Keys and passwords are issued by `key_route`; a route whose response is long or rare is in
//! [`routes`]. A new route needs its path in [`endpoint`](crate::telemetry::endpoint), a handler, and a description in
//! `openapi`; a new query parameter goes into [`query`], a new error into [`problem`], and a header that is to matter
//! into [`request_head`](crate::access::request_head).

pub mod body;
pub mod health;
mod in_flight;
mod key_route;
mod negotiation;
pub(crate) mod not_found;
mod openapi;
mod page;
pub mod problem;
pub mod query;
mod rate_limit_headers;
pub mod response;
pub mod routes;
pub mod service;
pub mod state;
