//! What a request means: routes, content negotiation, problem details, OpenAPI, the web page, health.
//!
//! May import: [`server`](crate::server) and the layers below it. A new route goes into [`service`].

pub mod body;
pub mod health;
pub mod openapi;
pub mod page;
pub mod problem;
pub mod query;
pub mod service;
