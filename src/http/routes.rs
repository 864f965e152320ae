//! Which routes a listener serves, and the router of those that need no other code: the description, the page, metrics.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Router;
use axum::extract::State;
use axum::http::header::HeaderMap;
use axum::routing::get;

use crate::http::openapi::{self, DocumentOptions};
use crate::http::page;
use crate::http::problem::Problem;
use crate::http::response::{TextReply, lines};
use crate::http::state::AppState;
use crate::telemetry::endpoint::{Endpoint, METRICS_PATH, OPENAPI_PATH, PAGE_PATH};

/// Which routes a listener serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Routes {
    /// Keys and health.
    Client,
    /// Metrics and health.
    Operator,
    /// All of them, for a port that serves both.
    Both,
}

impl Routes {
    /// Whether `endpoint` is among them.
    pub(crate) fn serve(self, endpoint: Endpoint, has_page: bool) -> bool {
        match endpoint {
            Endpoint::Key | Endpoint::Password | Endpoint::OpenApi => self != Self::Operator,
            Endpoint::Page => has_page && self != Self::Operator,
            Endpoint::Metrics => self != Self::Client,
            Endpoint::Health | Endpoint::Livez | Endpoint::Readyz => true,
            Endpoint::Other => false,
        }
    }
}

/// The router. Only requests for a route of the listener reach it.
pub(crate) fn router(state: Arc<AppState>) -> Router {
    Router::new()
        .route(OPENAPI_PATH, get(serve_openapi))
        .route(PAGE_PATH, get(serve_page))
        .route(METRICS_PATH, get(serve_metrics))
        .method_not_allowed_fallback(async || Problem::method_not_allowed())
        .with_state(state)
}

async fn serve_openapi(State(state): State<Arc<AppState>>) -> TextReply {
    let document = openapi::document(DocumentOptions {
        max_size: state.max_size.load(Ordering::Relaxed),
        needs_token: state.authorizer.needs_token(),
        has_page: state.has_page,
    });
    TextReply::ok((lines!("application/json"), String::new()), document)
}

async fn serve_page(headers: HeaderMap) -> Result<TextReply, Problem> {
    page::serve(&headers)
}

async fn serve_metrics(State(state): State<Arc<AppState>>) -> TextReply {
    let text = state.metrics.render(&state.dropped);
    TextReply::ok((lines!("text/plain; version=0.0.4; charset=utf-8"), String::new()), text)
}
