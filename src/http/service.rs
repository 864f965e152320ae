//! The service of a connection: requests in, responses out, for hyper and for the fast path.

use std::convert::Infallible;
use std::sync::Arc;

use axum::Router;
use axum::http::header::HeaderMap;
use axum::http::{Request, Response, StatusCode};
use hyper::service::Service;
use tower_service::Service as _;

use crate::access::peer::Peer;
use crate::http::body::Body;
use crate::http::in_flight::InFlightRequest;
use crate::http::key_route;
use crate::http::problem::Problem;
use crate::http::rate_limit_headers::rate_limit_header_lines;
use crate::http::request_head::RequestHead;
use crate::http::response::{
    KEY_HEAD, ResponseFuture, finalize_response, problem_response, with_common_headers,
};
use crate::http::routes::Routes;
use crate::http::state::AppState;
use crate::keys::format::{Format, Kind};
use crate::keys::key::KeyLength;
use crate::keys::key_spec::KeySpec;
use crate::server::connection_limit::ConnectionClass;
use crate::server::fast_path::request::FastRequest;
use crate::server::fast_path::response_buffer::{FAST_KEY_MAX, ResponseBuffer};
use crate::server::fast_path::service::{FastOutcome, FastPath};
use crate::telemetry::endpoint::Endpoint;
use crate::telemetry::labels::Rejection;

/// The service of a listener; cheap to clone for each connection.
#[derive(Debug, Clone)]
pub struct HttpService {
    state: Arc<AppState>,
    router: Router,
    has_keys: bool,
}

/// The service of one connection.
#[derive(Debug)]
pub struct ConnectionService {
    service: HttpService,
    class: ConnectionClass,
    peer: Peer,
}

impl HttpService {
    /// A service with `routes`.
    pub fn new(routes: Routes, state: Arc<AppState>) -> Self {
        Self { router: routes.router(Arc::clone(&state)), state, has_keys: routes.have_keys() }
    }

    /// The service of the connection of `peer`. An over-limit connection gets health and metrics, and a 503 for the
    /// rest.
    pub fn serve(self, class: ConnectionClass, peer: Peer) -> ConnectionService {
        ConnectionService { service: self, class, peer }
    }
}

impl ConnectionService {
    /// Responds to requests for keys at once. The router responds to the others.
    fn respond<B>(&self, request: Request<B>) -> ResponseFuture {
        let HttpService { state, router, has_keys } = &self.service;
        let metrics = &state.metrics;
        let head = RequestHead::from(&request);
        let key_path = if *has_keys { key_route::parse_path(head.path) } else { None };
        let endpoint =
            key_path.map_or_else(|| Endpoint::from_fixed_path(head.path), |key_path| key_path.endpoint());
        let in_flight = InFlightRequest::start(Arc::clone(metrics), endpoint);
        let is_head = head.is_head();
        let is_closing = self.class != ConnectionClass::Normal || state.health.is_draining();
        let validated = head.validate();
        let response = if let Err(problem) = &validated {
            metrics.count_rejection(Rejection::Malformed);
            problem_response(problem)
        } else if let Some(reason) = self.class.failure()
            && !matches!(endpoint, Endpoint::Health | Endpoint::Livez | Endpoint::Readyz | Endpoint::Metrics)
        {
            match key_path {
                Some(_) => metrics.count_key_error(reason),
                None => metrics.count_rejection(reason.into()),
            }
            problem_response(&Problem::too_many_connections())
        } else if let Some(key_path) = key_path {
            let needs_negotiation = validated.is_ok_and(|needs_negotiation| needs_negotiation);
            key_route::respond(state, &head, key_path, &self.peer, needs_negotiation)
                .unwrap_or_else(|problem| problem_response(&problem))
        } else {
            // No route takes a body, so none is handed on.
            let routed = router.clone().call(request.map(|_| axum::body::Body::empty()));
            return ResponseFuture::Routed(Box::pin(async move {
                let Ok(response) = routed.await;
                finalize_response(with_common_headers(response), in_flight, is_head, is_closing)
            }));
        };
        ResponseFuture::Ready(Some(finalize_response(response, in_flight, is_head, is_closing)))
    }
}

impl<B: Send + 'static> Service<Request<B>> for ConnectionService {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = ResponseFuture;

    fn call(&self, request: Request<B>) -> ResponseFuture {
        self.respond(request)
    }
}

impl FastPath for ConnectionService {
    /// Writes the response that the slow path would give, if it is a raw key and leaves no audit record.
    fn respond_fast(&self, request: &FastRequest<'_>, responses: &mut ResponseBuffer<'_>) -> FastOutcome {
        let HttpService { state, has_keys, .. } = &self.service;
        if !has_keys
            || self.class != ConnectionClass::Normal
            || state.health.is_draining()
            || state.generator.failure().is_some()
        {
            return FastOutcome::NotHandled;
        }
        let mut authorized = None;
        if !state.authorizer.is_unrestricted() {
            // No headers: the fast path takes no request with a header that matters here.
            match state.authorizer.authorize(&self.peer, &HeaderMap::new()) {
                Ok(client) if !client.audit => authorized = Some(client),
                _ => return FastOutcome::NotHandled,
            }
        }
        let max_size = state.max_size_for(authorized.as_deref()).min(FAST_KEY_MAX);
        let Ok(length) = KeyLength::parse(request.length, max_size) else {
            return FastOutcome::NotHandled;
        };
        let Ok(spec) = KeySpec::new(Kind::Key, length, Format::Raw, None) else {
            return FastOutcome::NotHandled;
        };
        if !responses.has_room(length) {
            return FastOutcome::BufferFull;
        }
        let mut headers = String::new();
        if let Some(authorized) = &mut authorized {
            // A request over the limit is not charged here, so the slow path may check it again and refuse it.
            if state.authorizer.check_rate_limit(authorized, &self.peer, length.bytes()).is_err() {
                return FastOutcome::NotHandled;
            }
            if let Some(status) = &authorized.rate_limit {
                headers = rate_limit_header_lines(status);
            }
        }
        let generate = |key: &mut [u8]| state.generate_with(&spec, || state.generator.fill(key));
        match responses.add(request, length, &KEY_HEAD, &headers, generate) {
            Ok(()) => {
                state.metrics.count_response(StatusCode::OK);
                FastOutcome::Written
            }
            Err(_) => FastOutcome::NotHandled, // the generator fails every time from now on
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::authorization::{AccessRules, Authorizer};
    use crate::http::health::Health;
    use crate::keys::generator::{Generator, OsRandom};
    use crate::telemetry::metrics::Metrics;
    use axum::http::header::{CONNECTION, HOST, HeaderValue, RETRY_AFTER};
    use std::sync::atomic::AtomicU64;

    async fn get(service: &ConnectionService, path: &str) -> Response<Body> {
        let request = Request::get(path).header(HOST, "localhost").body(()).unwrap();
        let Ok(response) = service.call(request).await;
        response
    }

    #[tokio::test]
    async fn stopping_refuses_streamed_keys_and_closes_after_short_ones() {
        let generator = Arc::new(Generator::new(OsRandom).unwrap());
        let health = Arc::new(Health::new(Arc::clone(&generator)));
        let state = AppState {
            max_size: AtomicU64::new(1 << 20),
            generator,
            health: Arc::clone(&health),
            metrics: Arc::new(Metrics::new()),
            authorizer: Authorizer::new(AccessRules::default(), 2),
            dropped: Arc::default(),
            has_page: false,
        };
        let peer = Peer::tcp(([127, 0, 0, 1], 1).into());
        let service = HttpService::new(Routes::Client, Arc::new(state)).serve(ConnectionClass::Normal, peer);
        assert_eq!(get(&service, "/key/1000000").await.status(), StatusCode::OK);
        health.start_draining();
        assert_eq!(get(&service, "/key/1000000").await.status(), StatusCode::OK, "there is still time");
        assert_eq!(get(&service, "/readyz").await.status(), StatusCode::SERVICE_UNAVAILABLE);
        health.start_stopping();
        let refused = get(&service, "/key/1000000").await;
        assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(refused.headers().contains_key(RETRY_AFTER));
        let last = get(&service, "/key/32").await;
        assert_eq!(
            (last.status(), &last.headers()[CONNECTION]),
            (StatusCode::OK, &HeaderValue::from_static("close"))
        );
    }
}
