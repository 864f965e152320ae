//! The routes, and the one hot path: `GET /key/{length}`.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use axum::Router;
use axum::extract::State;
use axum::http::header::{
    ACCEPT, ACCEPT_RANGES, CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap,
    HeaderValue, TRANSFER_ENCODING, VARY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{Method, Request, Response, StatusCode, Version};
use axum::response::IntoResponse;
use axum::routing::get;
use hyper::service::Service;
use tower_service::Service as _;
use tracing::error;

use crate::body::{Answer, Body};
use crate::format::{Format, Unsatisfied};
use crate::health::{self, Health};
use crate::key::{Key, KeyLength, KeyStream, LengthError};
use crate::metrics::{Endpoint, Metrics, Rejection};
use crate::problem::Problem;
use crate::random::{Failure, Generator};

/// The most header fields a request may have.
const FIELDS_MAX: usize = 32;

/// The path of a key, up to its length.
const KEY: &str = "/key/";

/// What the routes need: values, shared by every connection.
#[derive(Debug)]
pub struct Api {
    /// The largest key, in bytes; may change while the service runs.
    pub max_size: AtomicU64,
    /// Where keys come from.
    pub generator: Arc<Generator>,
    /// How the service is.
    pub health: Arc<Health>,
    /// What it counts.
    pub metrics: Arc<Metrics>,
    /// How many log events were dropped so far.
    pub log_events_dropped: Arc<AtomicU64>,
}

/// Which routes a listener has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Routes {
    /// Keys and health.
    Client,
    /// Metrics and health.
    Operator,
    /// All of them, where both share a port.
    Both,
}

/// The service of a listener; cheap to clone for each connection.
#[derive(Debug, Clone)]
pub struct Site {
    api: Arc<Api>,
    router: Router,
    has_keys: bool,
    is_crowded: bool,
}

impl Site {
    /// The service that answers `routes` out of `api`.
    pub fn new(routes: Routes, api: Arc<Api>) -> Self {
        let mut router = Router::new()
            .route("/health", get(serve_health))
            .route("/livez", get(serve_livez))
            .route("/readyz", get(serve_readyz));
        if routes != Routes::Client {
            router = router.route("/metrics", get(serve_metrics));
        }
        let router = router
            .fallback(async || page(&Problem::not_found()))
            .method_not_allowed_fallback(async || page(&Problem::method_not_allowed()))
            .with_state(Arc::clone(&api));
        Self { api, router, has_keys: routes != Routes::Operator, is_crowded: false }
    }

    /// The service of a connection that found every slot taken: health, and 503 for the rest.
    #[must_use]
    pub fn crowded(mut self) -> Self {
        self.is_crowded = true;
        self
    }

    async fn answer<B>(self, request: Request<B>) -> Response<Body> {
        let metrics = &self.api.metrics;
        let path = request.uri().path();
        let length = path.strip_prefix(KEY).filter(|length| self.has_keys && !length.contains('/'));
        let endpoint = length.map_or_else(|| Endpoint::of(path), |_| Endpoint::Key);
        let answer = Answer::start(Arc::clone(metrics), endpoint);
        let is_head = request.method() == Method::HEAD;
        let mut response = if let Err(problem) = check_message(&request) {
            metrics.rejected(Rejection::Malformed);
            problem.to_response()
        } else if self.is_crowded
            && !matches!(endpoint, Endpoint::Health | Endpoint::Livez | Endpoint::Readyz)
        {
            metrics.rejected(Rejection::Connections);
            health::full().to_response()
        } else if let Some(length) = length {
            self.api.key(&request, length).unwrap_or_else(|problem| problem.to_response())
        } else {
            // No route takes a body, so none is handed on.
            let request = request.map(|_| axum::body::Body::empty());
            let mut router = self.router;
            let Ok(response) = router.call(request).await;
            response.map(Body::from)
        };
        let headers = response.headers_mut();
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        if self.is_crowded || self.api.health.is_draining() {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        if is_head && !headers.contains_key(CONTENT_LENGTH) {
            let length = http_body::Body::size_hint(response.body()).exact().unwrap_or(0);
            response.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(length));
        }
        metrics.answered(response.status());
        response.map(|body| if is_head { body.without_content() } else { body }.ending(answer))
    }
}

impl<B: Send + 'static> Service<Request<B>> for Site {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, request: Request<B>) -> Self::Future {
        let site = self.clone();
        Box::pin(async move { Ok(site.answer(request).await) })
    }
}

impl Api {
    /// The hot path: from a checked request to a key.
    fn key<B>(&self, request: &Request<B>, length: &str) -> Result<Response<Body>, Problem> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return Err(Problem::method_not_allowed());
        }
        let limit = self.max_size.load(Ordering::Relaxed);
        let length = KeyLength::parse(length, limit).map_err(refuse_length)?;
        let accept = request.headers().get_all(ACCEPT);
        let format = Format::negotiate(request.uri().query(), accept).map_err(refuse_format)?;
        if let Some(failure) = self.generator.failure() {
            return Err(self.refuse_failed(failure));
        }
        let body = if request.method() == Method::HEAD {
            Body::empty()
        } else if length.is_bulk() {
            if self.health.is_draining() {
                self.metrics.rejected(Rejection::Draining);
                return Err(health::draining());
            }
            self.metrics.key_served(length.bytes());
            Body::stream(KeyStream::new(length, Arc::clone(&self.generator)))
        } else {
            let started = Instant::now();
            let key = Key::draw(length, &self.generator).map_err(|failure| self.refuse_failed(failure))?;
            self.metrics.generated(started);
            self.metrics.key_served(length.bytes());
            self.metrics.key_bytes_served(format, length.bytes());
            Body::whole(key.into_bytes())
        };
        let mut response = Response::new(body);
        let headers = response.headers_mut();
        headers.reserve(8);
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(format.media_type()));
        headers.insert(CONTENT_LENGTH, HeaderValue::from(length.bytes()));
        headers.insert(ACCEPT_RANGES, HeaderValue::from_static("none"));
        headers.insert(VARY, HeaderValue::from_static("Accept"));
        Ok(response)
    }

    fn refuse_failed(&self, failure: Failure) -> Problem {
        self.report_failure();
        self.metrics.rejected(Rejection::Generator);
        health::failed(failure)
    }

    /// Says once, loudly, that the generator is out of service.
    pub fn report_failure(&self) {
        if let Some(failure) = self.generator.take_report() {
            self.metrics.generator_failed();
            error!(%failure, "the random generator is out of service; no key is handed out until a restart");
        }
    }
}

fn refuse_length(error: LengthError) -> Problem {
    let detail = error.to_string();
    match error {
        LengthError::NotAnInteger => Problem::bad_request(detail),
        LengthError::Zero => Problem::bad_request(detail).with_min(1),
        LengthError::TooLarge { limit } => Problem::too_large(detail).with_max(limit),
    }
}

fn refuse_format(error: Unsatisfied) -> Problem {
    match error {
        Unsatisfied::Parameter(name) => {
            Problem::bad_request(format!("Unknown query parameter \"{name}\"; known: format"))
        }
        Unsatisfied::Twice(name) => {
            Problem::bad_request(format!("Query parameter \"{name}\" is given twice"))
        }
        Unsatisfied::Format(value) => Problem::bad_request(format!(
            "Unknown format \"{value}\"; known: {}",
            Format::ALL.map(Format::name).join(", ")
        )),
        Unsatisfied::Accept => Problem::not_acceptable(&Format::offered()),
    }
}

/// What hyper lets pass and RFC 9112 does not, and what no route here needs.
fn check_message<B>(request: &Request<B>) -> Result<(), Problem> {
    let headers = request.headers();
    if headers.len() > FIELDS_MAX {
        return Err(Problem::too_many_fields(FIELDS_MAX));
    }
    // RFC 9112 section 6.1: a request with both lengths may be smuggled; hyper hides one of them, and none is needed.
    if headers.contains_key(TRANSFER_ENCODING) {
        return Err(Problem::malformed("Transfer-Encoding is not accepted: requests have no body here"));
    }
    check_host(headers, request.version())
}

/// RFC 9112 section 3.2: HTTP/1.1 has exactly one Host field, of host characters (RFC 3986 section 3.2).
fn check_host(headers: &HeaderMap, version: Version) -> Result<(), Problem> {
    let mut hosts = headers.get_all(HOST).iter();
    match (hosts.next(), hosts.next()) {
        (Some(host), None) if host.as_bytes().iter().all(|byte| is_host_character(*byte)) => Ok(()),
        (None, _) if version < Version::HTTP_11 => Ok(()),
        (None, _) => Err(Problem::malformed("The Host field is missing")),
        (Some(_), None) => Err(Problem::malformed("The Host field is not a host")),
        (Some(_), Some(_)) => Err(Problem::malformed("The Host field is given more than once")),
    }
}

fn is_host_character(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~!$&'()*+,;=:%[]".contains(&byte)
}

async fn serve_health(State(api): State<Arc<Api>>) -> axum::response::Response {
    let checked = api.health.check();
    api.report_failure();
    ok_or_problem(checked)
}

/// That this is answered at all is the answer.
async fn serve_livez() -> axum::response::Response {
    ok_or_problem(Ok(()))
}

async fn serve_readyz(State(api): State<Arc<Api>>) -> axum::response::Response {
    let checked = api.health.ready();
    api.report_failure();
    ok_or_problem(checked)
}

async fn serve_metrics(State(api): State<Arc<Api>>) -> impl IntoResponse {
    let text = api.metrics.render(api.log_events_dropped.load(Ordering::Relaxed));
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

fn ok_or_problem(checked: Result<(), Problem>) -> axum::response::Response {
    match checked {
        Ok(()) => (StatusCode::OK, [(CONTENT_TYPE, "text/plain; charset=utf-8")], "OK").into_response(),
        Err(problem) => page(&problem),
    }
}

fn page(problem: &Problem) -> axum::response::Response {
    problem.to_response()
}
