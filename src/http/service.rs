//! The service of a connection: requests in, responses out, for hyper and for the fast path.

use std::convert::Infallible;
use std::future;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use axum::Router;
use axum::http::{Request, Response};
use hyper::service::Service;
use tower_service::Service as _;

use crate::access::peer::Peer;
use crate::access::request_head::RequestHead;
use crate::access::verified_token::VerifiedToken;
use crate::http::body::Body;
use crate::http::in_flight::InFlightRequest;
use crate::http::key_route::{self, KeyOrder, KeyPath};
use crate::http::not_found;
use crate::http::problem::Problem;
use crate::http::response::{ResponseFuture, TextReply, finalize_response, lines};
use crate::http::routes::{self, Routes};
use crate::http::state::AppState;
use crate::server::connection_limit::ConnectionClass;
use crate::server::fast_path::response_buffer::ResponseBuffer;
use crate::server::fast_path::service::{FastOutcome, FastPath};
use crate::telemetry::clock;
use crate::telemetry::endpoint::Endpoint;
use crate::telemetry::labels::Rejection;

/// Bytes of a text that a response may have: room for them is made before a request is decided. A problem repeats only
/// a little of what a client sent.
const TEXT_MAX: usize = 1024;

/// The service of a listener; cheap to clone for each connection.
#[derive(Debug, Clone)]
pub struct HttpService {
    state: Arc<AppState>,
    router: Router,
    routes: Routes,
}

/// The service of one connection.
#[derive(Debug)]
pub struct ConnectionService {
    service: HttpService,
    class: ConnectionClass,
    peer: Peer,
    verified_token: VerifiedToken,
}

impl HttpService {
    /// A service with `routes`.
    pub fn new(routes: Routes, state: Arc<AppState>) -> Self {
        Self { router: routes::router(Arc::clone(&state)), state, routes }
    }

    /// The service of the connection of `peer`. An over-limit connection gets health and metrics, and a 503 for the
    /// rest.
    pub fn serve(self, class: ConnectionClass, peer: Peer) -> ConnectionService {
        ConnectionService { service: self, class, peer, verified_token: VerifiedToken::default() }
    }
}

/// What a request means.
#[derive(Debug)]
enum Decision {
    /// A response that is a text.
    Text(TextReply),
    /// Keys, not yet generated.
    Keys(KeyOrder),
    /// The router makes the response.
    Router,
}

impl From<Problem> for Decision {
    fn from(problem: Problem) -> Self {
        Self::Text(problem.into_reply())
    }
}

impl ConnectionService {
    /// The route of a path, and what is to be parsed of the path of keys.
    fn route<'a>(&self, path: &'a [u8]) -> (Endpoint, Option<KeyPath<'a>>) {
        let key_path = key_route::parse_path(path)
            .filter(|key_path| self.service.routes.serve(key_path.endpoint(), false));
        (key_path.map_or_else(|| Endpoint::from_fixed_path(path), |key_path| key_path.endpoint()), key_path)
    }

    /// Decides what the request means, whichever transport read it. Only a refusal has effects: it is counted.
    fn decide(&self, head: &RequestHead<'_>, endpoint: Endpoint, key_path: Option<KeyPath<'_>>) -> Decision {
        let state = &self.service.state;
        if let Err(malformed) = head.validate() {
            state.metrics.count_rejection(Rejection::Malformed);
            Problem::malformed(malformed.to_string()).into()
        } else if let Some(reason) = self.class.failure()
            && !matches!(endpoint, Endpoint::Health | Endpoint::Livez | Endpoint::Readyz | Endpoint::Metrics)
        {
            match key_path {
                Some(_) => state.metrics.count_key_error(reason),
                None => state.metrics.count_rejection(reason.into()),
            }
            Problem::too_many_connections().into()
        } else if let Some(key_path) = key_path {
            KeyOrder::decide(state, head, key_path, &self.peer, &self.verified_token)
                .map_or_else(Decision::from, Decision::Keys)
        } else {
            self.decide_other(endpoint, head)
        }
    }

    fn decide_other(&self, endpoint: Endpoint, head: &RequestHead<'_>) -> Decision {
        let HttpService { state, routes, .. } = &self.service;
        if !routes.serve(endpoint, state.has_page) {
            let max_size = state.max_size.load(Ordering::Relaxed);
            return Problem::not_found(not_found::detail(head.path, *routes, state.has_page, max_size))
                .into();
        }
        let check: fn(&AppState) -> Result<(), Problem> = match endpoint {
            Endpoint::Health => AppState::check_health,
            Endpoint::Livez => |state| state.health.live(),
            Endpoint::Readyz => AppState::check_readiness,
            Endpoint::Key
            | Endpoint::Password
            | Endpoint::Metrics
            | Endpoint::Page
            | Endpoint::OpenApi
            | Endpoint::Other => return Decision::Router,
        };
        if !head.reads() {
            return Problem::method_not_allowed().into();
        }
        check(state).map_or_else(Decision::from, |()| {
            Decision::Text(TextReply::ok((lines!("text/plain; charset=utf-8"), String::new()), "OK"))
        })
    }

    /// Whether the connection closes after its next response.
    fn is_closing(&self) -> bool {
        self.class != ConnectionClass::Normal || self.service.state.health.is_draining()
    }

    fn respond<B>(&self, request: Request<B>) -> ResponseFuture {
        let HttpService { state, router, .. } = &self.service;
        let head = RequestHead::from(&request);
        let (endpoint, key_path) = self.route(head.path);
        let decision = self.decide(&head, endpoint, key_path);
        let in_flight = InFlightRequest::start(Arc::clone(&state.metrics), endpoint);
        let (is_head, is_closing) = (head.is_head(), self.is_closing());
        let response = match decision {
            Decision::Text(reply) => reply.into_response(),
            Decision::Keys(order) => {
                self.issue(order, &head).unwrap_or_else(|problem| problem.into_reply().into_response())
            }
            Decision::Router => {
                // No route takes a body, so none is handed on.
                let routed = router.clone().call(request.map(|_| axum::body::Body::empty()));
                return Box::pin(async move {
                    let response = routed.await?.map(Into::into);
                    Ok(finalize_response(response, in_flight, is_head, is_closing))
                });
            }
        };
        Box::pin(future::ready(Ok(finalize_response(response, in_flight, is_head, is_closing))))
    }

    /// Issues keys by way of hyper.
    fn issue(&self, mut order: KeyOrder, head: &RequestHead<'_>) -> Result<Response<Body>, Problem> {
        let state = &self.service.state;
        let permit = order.is_streamed().then(|| order.stream_permit(state, head, &self.peer)).transpose()?;
        let reply_head = order.charge(state, &self.peer)?;
        let mut body = order.body(state, permit).map_err(|failure| state.generator_problem(failure))?;
        let content_length = order.is_head.then(|| order.spec.encoded_len());
        if let Some(record) = order.take_record(&self.peer) {
            body.attach_audit_record(record);
        }
        Ok(reply_head.into_response(body, content_length))
    }

    /// Adds keys to `responses`, if there is room for them.
    fn issue_fast(
        &self,
        order: &mut KeyOrder,
        endpoint: Endpoint,
        closes: bool,
        responses: &mut ResponseBuffer<'_>,
    ) -> Result<FastOutcome, Problem> {
        let state = &self.service.state;
        if order.is_streamed() {
            return Ok(FastOutcome::NotHandled);
        }
        let content_length = order.spec.encoded_len();
        let length = if order.is_head { 0 } else { usize::try_from(content_length).unwrap_or(usize::MAX) };
        if !responses.make_room(length) {
            return Ok(FastOutcome::BufferFull);
        }
        let mut head = order.charge(state, &self.peer)?;
        head.closes = closes;
        responses
            .add(&head, content_length, endpoint, |text| {
                order.append_keys(state, text).map(|ready_at| (order.take_record(&self.peer), ready_at))
            })
            .map_err(|failure| state.generator_problem(failure))?;
        Ok(FastOutcome::Written { closes })
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
    fn respond_fast(
        &self,
        head: &RequestHead<'_>,
        closes: bool,
        responses: &mut ResponseBuffer<'_>,
    ) -> FastOutcome {
        // Room for any text, before anything has an effect.
        if !responses.make_room(TEXT_MAX) {
            return FastOutcome::BufferFull;
        }
        let (endpoint, key_path) = self.route(head.path);
        let closes = closes || self.is_closing();
        let TextReply { head: mut response_head, body } = match self.decide(head, endpoint, key_path) {
            Decision::Router => return FastOutcome::NotHandled,
            Decision::Text(reply) => reply,
            Decision::Keys(mut order) => match self.issue_fast(&mut order, endpoint, closes, responses) {
                Ok(outcome) => return outcome,
                Err(problem) => problem.into_reply(),
            },
        };
        if !responses.make_room(body.len()) {
            return FastOutcome::BufferFull; // decided again, and counted again: no text is as long
        }
        response_head.closes |= closes;
        let Ok(()) = responses.add(&response_head, body.len() as u64, endpoint, |bytes| {
            if !head.is_head() {
                bytes.extend_from_slice(body.as_bytes());
            }
            Ok::<_, Infallible>((None, clock::now()))
        });
        FastOutcome::Written { closes: response_head.closes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::authorization::{AccessRules, Authorizer};
    use crate::http::health::Health;
    use crate::keys::generator::{Generator, OsRandom};
    use crate::telemetry::metrics::Metrics;
    use axum::http::StatusCode;
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
            authorizer: Authorizer::new(AccessRules::default(), 2, &generator).unwrap(),
            generator,
            health: Arc::clone(&health),
            metrics: Arc::new(Metrics::new()),
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
