//! What a request means: routes, content negotiation, problem details, OpenAPI, the web page, health.
//!
//! May import: [`server`](crate::server) and the layers below it.
//!
//! [`service`] decides which route a request takes. Keys and passwords are issued by `key_route`, and every other route
//! is in [`routes`]. A new route needs its path in [`endpoint`](crate::telemetry::endpoint), a handler in [`routes`],
//! and a description in `openapi`; a new query parameter goes into [`query`], and a new error into [`problem`].

pub mod body;
pub mod health;
mod in_flight;
mod key_route;
mod negotiation;
mod openapi;
mod page;
pub mod problem;
pub mod query;
mod rate_limit_headers;
pub mod response;
pub mod routes;
pub mod service;
pub mod state;
