//! The router: every route but those of keys and passwords, which `http/key_route.rs` serves.

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
use crate::telemetry::endpoint::{METRICS_PATH, OPENAPI_PATH, PAGE_PATH};

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
    /// Whether keys and passwords are among them.
    pub(crate) fn have_keys(self) -> bool {
        self != Self::Operator
    }

    /// The router of these routes.
    pub(crate) fn router(self, state: Arc<AppState>) -> Router {
        let mut router = Router::new();
        if self.have_keys() {
            router = router.route(OPENAPI_PATH, get(serve_openapi));
            if state.has_page {
                router = router.route(PAGE_PATH, get(serve_page));
            }
        }
        if self != Self::Client {
            router = router.route(METRICS_PATH, get(serve_metrics));
        }
        router
            .fallback(async || Problem::not_found())
            .method_not_allowed_fallback(async || Problem::method_not_allowed())
            .with_state(state)
    }
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
