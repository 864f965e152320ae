//! The routes, and the one hot path: `GET /key/{length}`.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};
use std::time::Instant;

use axum::Router;
use axum::extract::State;
use axum::http::header::{
    ACCEPT, ACCEPT_RANGES, CACHE_CONTROL, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap,
    HeaderName, HeaderValue, TRANSFER_ENCODING, VARY, X_CONTENT_TYPE_OPTIONS,
};
use axum::http::{Method, Request, Response, StatusCode, Version};
use axum::response::IntoResponse;
use axum::routing::get;
use bytes::Bytes;
use hyper::service::Service;
use tower_service::Service as _;
use tracing::error;

use crate::access::audit::{AuditRecord, AuditSubject};
use crate::access::authorization::{Authorized, Authorizer};
use crate::access::peer::Peer;
use crate::http::body::{Body, InFlightRequest};
use crate::http::health::{self, Health};
use crate::http::openapi;
use crate::http::page;
use crate::http::problem::{self, Problem};
use crate::http::query::{self, KeyRequest, ParamError};
use crate::keys::encoding::{BATCH_MAX, BatchError, COUNT_MAX, EncodedStream, Format, KeySpec, Kind};
use crate::keys::generator::{Generator, GeneratorError};
use crate::keys::key::{KeyLength, LengthError};
use crate::keys::password::Alphabet;
use crate::server::connection_limit::ConnectionClass;
use crate::server::fast_path::request::{FastRequest, is_host};
use crate::server::fast_path::response_buffer::{KEY_MAX, ResponseBuffer};
use crate::server::fast_path::service::{FastOutcome, FastPath};
use crate::telemetry::endpoint::{
    Endpoint, HEALTH_PATH, KEY_PREFIX, LIVEZ_PATH, METRICS_PATH, OPENAPI_PATH, PAGE_PATH, PASSWORD_PREFIX,
    READYZ_PATH,
};
use crate::telemetry::log::DropCounters;
use crate::telemetry::metrics::{KeyFailure, Metrics, Rejection};

/// What the routes need: values, shared by every connection.
#[derive(Debug)]
pub struct AppState {
    /// The largest key, in bytes; may change while the service runs.
    pub max_size: AtomicU64,
    /// Where keys come from.
    pub generator: Arc<Generator>,
    /// How the service is.
    pub health: Arc<Health>,
    /// What it counts.
    pub metrics: Arc<Metrics>,
    /// Who may have one, and how much.
    pub authorizer: Authorizer,
    /// How many log events were dropped so far.
    pub dropped: Arc<DropCounters>,
    /// Whether there is a page for people.
    pub has_page: bool,
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
pub struct HttpService {
    api: Arc<AppState>,
    router: Router,
    has_keys: bool,
}

/// The service as the client of one connection has it.
#[derive(Debug)]
pub struct ConnectionService {
    site: HttpService,
    seat: ConnectionClass,
    peer: Peer,
}

impl HttpService {
    /// The service that answers `routes` out of `api`.
    pub fn new(routes: Routes, api: Arc<AppState>) -> Self {
        let mut router = Router::new()
            .route(HEALTH_PATH, get(serve_health))
            .route(LIVEZ_PATH, get(serve_livez))
            .route(READYZ_PATH, get(serve_readyz));
        if routes != Routes::Operator {
            router = router.route(OPENAPI_PATH, get(serve_openapi));
            if api.has_page {
                router = router.route(PAGE_PATH, get(serve_page));
            }
        }
        if routes != Routes::Client {
            router = router.route(METRICS_PATH, get(serve_metrics));
        }
        let router = router
            .fallback(async || told(&Problem::not_found()))
            .method_not_allowed_fallback(async || told(&Problem::method_not_allowed()))
            .with_state(Arc::clone(&api));
        Self { api, router, has_keys: routes != Routes::Operator }
    }

    /// The service for `peer`. Without a seat it gets health and metrics, and 503 for the rest.
    pub fn serve(self, seat: ConnectionClass, peer: Peer) -> ConnectionService {
        ConnectionService { site: self, seat, peer }
    }
}

impl ConnectionService {
    /// Answers a key at once, and leaves the rest to the router.
    fn answer<B>(&self, request: Request<B>) -> ResponseFuture {
        let HttpService { api, router, has_keys } = &self.site;
        let metrics = &api.metrics;
        let path = request.uri().path();
        let asked = if *has_keys { asked(path) } else { None };
        let endpoint = match asked {
            Some((Kind::Key, _)) => Endpoint::Key,
            Some((Kind::Password(_), _)) => Endpoint::Password,
            None => Endpoint::from_fixed_path(path),
        };
        let answer = InFlightRequest::start(Arc::clone(metrics), endpoint);
        let is_head = request.method() == Method::HEAD;
        let is_closing = self.seat != ConnectionClass::Normal || api.health.is_draining();
        let checked = check_message(&request);
        let response = if let Err(problem) = &checked {
            metrics.rejected(Rejection::Malformed);
            refusal(problem)
        } else if let Some(reason) = self.seat.failure()
            && !matches!(endpoint, Endpoint::Health | Endpoint::Livez | Endpoint::Readyz | Endpoint::Metrics)
        {
            match asked {
                Some(_) => metrics.key_failed(reason),
                None => metrics.rejected(reason.into()),
            }
            refusal(&health::full())
        } else if let Some((kind, length)) = asked {
            let needs_negotiation = checked.is_ok_and(|needs_negotiation| needs_negotiation);
            let response = api.key(&request, kind, length, &self.peer, needs_negotiation);
            response.unwrap_or_else(|problem| refusal(&problem))
        } else {
            // No route takes a body, so none is handed on.
            let routed = router.clone().call(request.map(|_| axum::body::Body::empty()));
            return ResponseFuture::Routed(Box::pin(async move {
                let Ok(response) = routed.await;
                finalize_response(with_common(response), answer, is_head, is_closing)
            }));
        };
        ResponseFuture::Ready(Some(finalize_response(response, answer, is_head, is_closing)))
    }
}

/// What a path asks for, and the text of its length; `None` where it asks for nothing that is drawn.
fn asked(path: &str) -> Option<(Kind, &str)> {
    let (kind, length) = match path.strip_prefix(KEY_PREFIX) {
        Some(length) => (Kind::Key, length),
        None => (Kind::Password(Alphabet::default()), path.strip_prefix(PASSWORD_PREFIX)?),
    };
    (!length.contains('/')).then_some((kind, length))
}

impl<B: Send + 'static> Service<Request<B>> for ConnectionService {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = ResponseFuture;

    fn call(&self, request: Request<B>) -> ResponseFuture {
        self.answer(request)
    }
}

impl FastPath for ConnectionService {
    /// What the general way would answer, where that is a raw key and leaves no record.
    fn respond_fast(&self, request: &FastRequest<'_>, answers: &mut ResponseBuffer<'_>) -> FastOutcome {
        let HttpService { api, has_keys, .. } = &self.site;
        if !has_keys
            || self.seat != ConnectionClass::Normal
            || api.health.is_draining()
            || api.generator.failure().is_some()
        {
            return FastOutcome::NotHandled;
        }
        let mut visit = None;
        if !api.authorizer.is_unrestricted() {
            // The request has no field that this would look at.
            match api.authorizer.authorize(&self.peer, &HeaderMap::new()) {
                Ok(entered) if !entered.audit => visit = Some(entered),
                _ => return FastOutcome::NotHandled,
            }
        }
        let limit = api.limit(visit.as_deref()).min(KEY_MAX);
        let Ok(length) = KeyLength::parse(request.length, limit) else {
            return FastOutcome::NotHandled;
        };
        let Ok(shape) = KeySpec::new(Kind::Key, length, Format::Raw, None) else {
            return FastOutcome::NotHandled;
        };
        if !answers.have_room(length) {
            return FastOutcome::BufferFull;
        }
        let mut fields = String::new();
        if let Some(visit) = &mut visit {
            // A refusal costs nothing, and is told the long way.
            if api.authorizer.check_rate_limit(visit, &self.peer, length.bytes()).is_err() {
                return FastOutcome::NotHandled;
            }
            if let Some(standing) = &visit.standing {
                fields = problem::rate_lines(standing);
            }
        }
        let generate = |key: &mut [u8]| api.counted(&shape, || api.generator.fill(key));
        match answers.add(request, length, &KEY_HEAD, &fields, generate) {
            Ok(()) => {
                api.metrics.answered(StatusCode::OK);
                FastOutcome::Written
            }
            Err(_) => FastOutcome::NotHandled, // the generator fails every time from now on
        }
    }
}

/// An answer that is there, or that the router is at work on.
pub enum ResponseFuture {
    /// It is there, and not taken yet.
    Ready(Option<Response<Body>>),
    /// It will come.
    Routed(Pin<Box<dyn Future<Output = Response<Body>> + Send>>),
}

impl Future for ResponseFuture {
    type Output = Result<Response<Body>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Ready(response) => {
                Poll::Ready(Ok(response.take().expect("a future is not polled again after it was ready")))
            }
            Self::Routed(future) => future.as_mut().poll(cx).map(Ok),
        }
    }
}

/// Seconds after which a streamed response is worth another try.
const STREAM_RETRY_AFTER: u32 = 1;

/// Names a key's audit record to its client. One that a client sends is not looked at.
const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Of each password of an answer.
const ENTROPY_BITS: HeaderName = HeaderName::from_static("entropy-bits");

/// Stops nginx from spooling a streamed response to a file on its disk, which it does at once when a client reads slowly.
const X_ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");

/// What every answer has, whoever made it.
const COMMON: [(HeaderName, HeaderValue); 2] = [
    (CACHE_CONTROL, HeaderValue::from_static("no-store")),
    (X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
];

/// The header of a raw key, but for its length. It is made once and cloned: five insertions cost more than the key.
static KEY_HEADERS: LazyLock<HeaderMap> = LazyLock::new(|| {
    let mut headers = HeaderMap::from_iter(COMMON);
    headers.insert(CONTENT_TYPE, HeaderValue::from_static(Format::Raw.media_type(false)));
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("none"));
    headers.insert(VARY, HeaderValue::from_static("Accept"));
    headers
});

/// The same, as the short way writes it.
static KEY_HEAD: LazyLock<String> = LazyLock::new(|| {
    let mut head = String::from("HTTP/1.1 200 OK\r\n");
    for (name, value) in &*KEY_HEADERS {
        let value = value.to_str().expect("these values are of ASCII");
        head.extend([name.as_str(), ": ", value, "\r\n"]);
    }
    head
});

fn with_common<B: Into<Body>>(response: Response<B>) -> Response<Body> {
    let mut response = response.map(Into::into);
    for (name, value) in COMMON {
        response.headers_mut().insert(name, value);
    }
    response
}

fn refusal(problem: &Problem) -> Response<Body> {
    with_common(problem.to_response::<String>())
}

/// Counts an answer and lets its time run until its last byte is handed over.
fn finalize_response(
    mut response: Response<Body>,
    answer: InFlightRequest,
    is_head: bool,
    is_closing: bool,
) -> Response<Body> {
    if is_closing {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    answer.metrics().answered(response.status());
    if is_head {
        // The length that GET would have; without a body, nothing else tells it.
        if let Some(size) = http_body::Body::size_hint(response.body()).exact() {
            response.headers_mut().entry(CONTENT_LENGTH).or_insert(size.into());
        }
        response.body_mut().empty_out();
    }
    response.body_mut().end(answer);
    response
}

impl AppState {
    /// The hot path: from a checked request to a key.
    fn key<B>(
        &self,
        request: &Request<B>,
        kind: Kind,
        length: &str,
        peer: &Peer,
        needs_negotiation: bool,
    ) -> Result<Response<Body>, Problem> {
        if !matches!(*request.method(), Method::GET | Method::HEAD) {
            return Err(Problem::method_not_allowed());
        }
        let mut visit = if self.authorizer.is_unrestricted() {
            None
        } else {
            let entered = self.authorizer.authorize(peer, request.headers());
            Some(entered.map_err(|reason| {
                self.metrics.rejected(Rejection::Unauthorized);
                Problem::unauthorized(reason)
            })?)
        };
        let limit = kind.length_max(self.limit(visit.as_deref()));
        let length = KeyLength::parse(length, limit).map_err(refuse_length)?;
        let wish = match request.uri().query() {
            None if !needs_negotiation => KeyRequest { kind, format: kind.formats()[0], count: None },
            query => {
                let accept = request.headers().get_all(ACCEPT);
                KeyRequest::read(kind, query, accept).map_err(|error| refuse_wish(kind, error))?
            }
        };
        let shape = KeySpec::new(wish.kind, length, wish.format, wish.count)
            .map_err(|error| refuse_batch(kind, error))?;
        if let Some(failure) = self.generator.failure() {
            return Err(self.refuse_failed(failure));
        }
        let is_head = request.method() == Method::HEAD;
        let is_streamed = shape.is_streamed() && !is_head;
        if is_streamed && self.health.is_stopping() {
            self.metrics.key_failed(KeyFailure::Draining);
            return Err(health::draining());
        }
        // Before the charge, so that nobody pays for a key that it does not get.
        let permit = if is_streamed {
            let permit = self.authorizer.stream(visit.as_deref(), peer, request.headers());
            Some(permit.ok_or_else(|| {
                self.metrics.key_failed(KeyFailure::Bulk);
                Problem::unavailable("Too many large responses are being sent", STREAM_RETRY_AFTER)
            })?)
        } else {
            None
        };
        if let Some(visit) = &mut visit {
            let bytes = if is_head { 0 } else { shape.key_bytes() };
            let charged = self.authorizer.check_rate_limit(visit, peer, bytes);
            charged.map_err(|standing| {
                self.metrics.rejected(Rejection::Rate);
                Problem::too_many_requests(&standing)
            })?;
        }
        let body = if is_head {
            Body::empty()
        } else if let Some(permit) = permit {
            let writing = EncodedStream::start(&shape, Arc::clone(&self.generator))
                .map_err(|failure| self.refuse_failed(failure))?;
            Body::stream(writing, permit)
        } else {
            Body::whole(self.generate(&shape).map_err(|failure| self.refuse_failed(failure))?)
        };
        let mut response = Response::new(body);
        *response.headers_mut() = KEY_HEADERS.clone();
        if shape.format() != Format::Raw {
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(shape.content_type()));
        }
        if shape.is_streamed() {
            response.headers_mut().insert(X_ACCEL_BUFFERING, HeaderValue::from_static("no"));
        }
        if let Kind::Password(alphabet) = shape.kind() {
            let bits = format!("{:.1}", alphabet.entropy_bits(length));
            let bits = HeaderValue::try_from(bits).expect("a number has digits and a point only");
            response.headers_mut().insert(ENTROPY_BITS, bits);
        }
        if let Some(visit) = visit {
            if let Some(standing) = &visit.standing {
                problem::tell_rates(response.headers_mut(), standing);
            }
            if visit.audit && !is_head {
                let record =
                    AuditRecord::start(AuditSubject::Client(*visit), peer.clone(), shape, &self.generator)
                        .map_err(|failure| self.refuse_failed(failure))?;
                let id = HeaderValue::try_from(record.id()).expect("an id has hexadecimal digits only");
                response.headers_mut().insert(REQUEST_ID, id);
                response.body_mut().leave(record);
            }
        }
        if is_head {
            response.headers_mut().insert(CONTENT_LENGTH, shape.size().into()); // of a body it follows from itself
        }
        Ok(response)
    }

    /// The largest key, in bytes, for who came in, where anyone had to.
    fn limit(&self, visit: Option<&Authorized>) -> u64 {
        let limit = self.max_size.load(Ordering::Relaxed);
        visit.map_or(limit, |visit| visit.max_size(limit))
    }

    /// Draws what is held in memory whole, and counts it.
    ///
    /// # Errors
    /// The generator's failure.
    pub fn generate(&self, shape: &KeySpec) -> Result<Bytes, GeneratorError> {
        self.counted(shape, || shape.generate(&self.generator))
    }

    /// Counts keys of `shape` that `draw` draws.
    fn counted<T>(
        &self,
        shape: &KeySpec,
        generate: impl FnOnce() -> Result<T, GeneratorError>,
    ) -> Result<T, GeneratorError> {
        let started = Instant::now();
        let generated = generate()?;
        self.metrics.generated(started);
        (0..shape.keys()).for_each(|_| self.metrics.key_served(shape.length().bytes()));
        self.metrics.key_bytes_served(shape.format(), shape.key_bytes());
        Ok(generated)
    }

    fn refuse_failed(&self, failure: GeneratorError) -> Problem {
        self.report_failure();
        self.metrics.key_failed(KeyFailure::Generator);
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

/// Names, for an error to list.
fn names(names: impl Iterator<Item = &'static str>) -> String {
    names.collect::<Vec<_>>().join(", ")
}

fn refuse_wish(kind: Kind, error: ParamError) -> Problem {
    match error {
        ParamError::Parameter(name) => Problem::bad_request(format!(
            "Unknown query parameter \"{name}\"; known: {}",
            query::parameters(kind).join(", ")
        )),
        ParamError::Twice(name) => Problem::bad_request(format!("Query parameter \"{name}\" is given twice")),
        ParamError::Format(value) => Problem::bad_request(format!(
            "Unknown format \"{value}\"; known: {}",
            names(kind.formats().iter().map(|format| format.name()))
        )),
        ParamError::Alphabet(value) => Problem::bad_request(format!(
            "Unknown alphabet \"{value}\"; known: {}",
            names(Alphabet::ALL.into_iter().map(Alphabet::name))
        )),
        ParamError::Count(value) => Problem::bad_request(format!(
            "Invalid count \"{value}\": must be an integer from 1 to {COUNT_MAX}, in decimal digits"
        ))
        .with_min(1)
        .with_max(COUNT_MAX),
        ParamError::Accept(is_batch) => {
            Problem::not_acceptable(&query::acceptable_media_types(kind, is_batch))
        }
    }
}

fn refuse_batch(kind: Kind, error: BatchError) -> Problem {
    match error {
        BatchError::Unseparable(format) => Problem::bad_request(format!(
            "Keys in format {} can't be told apart in a batch; formats that have a count: {}",
            format.name(),
            names(kind.formats().iter().filter(|format| format.has_batches()).map(|format| format.name()))
        )),
        BatchError::TooLarge => {
            Problem::too_large(format!("Length times count exceeds the maximum size of a batch, {BATCH_MAX}"))
                .with_max(BATCH_MAX)
        }
    }
}

/// What hyper lets pass and RFC 9112 does not, and what no route here needs. Whether it wants anything but `*/*`.
fn check_message<B>(request: &Request<B>) -> Result<bool, Problem> {
    let headers = request.headers();
    let (mut hosts, mut needs_negotiation) = (0, false);
    // One pass: each look-up by name would cost as much.
    for (name, value) in headers {
        if name == HOST {
            hosts += 1;
            if !is_host(value.as_bytes()) {
                return Err(Problem::malformed("The Host field is not a host"));
            }
        } else if name == ACCEPT {
            needs_negotiation |= value != "*/*";
        } else if name == TRANSFER_ENCODING {
            // RFC 9112 section 6.1: a request with both lengths may be smuggled; hyper hides one, and none is needed.
            return Err(Problem::malformed("Transfer-Encoding is not accepted: requests have no body here"));
        }
    }
    // RFC 9112 section 3.2: HTTP/1.1 has exactly one.
    match hosts {
        1 => Ok(needs_negotiation),
        0 if request.version() < Version::HTTP_11 => Ok(needs_negotiation),
        0 => Err(Problem::malformed("The Host field is missing")),
        _ => Err(Problem::malformed("The Host field is given more than once")),
    }
}

async fn serve_health(State(api): State<Arc<AppState>>) -> axum::response::Response {
    let checked = api.health.check();
    api.report_failure();
    ok_or_problem(checked)
}

async fn serve_livez(State(api): State<Arc<AppState>>) -> axum::response::Response {
    ok_or_problem(api.health.live())
}

async fn serve_readyz(State(api): State<Arc<AppState>>) -> axum::response::Response {
    let checked = api.health.ready();
    api.report_failure();
    ok_or_problem(checked)
}

async fn serve_openapi(State(api): State<Arc<AppState>>) -> impl IntoResponse {
    let document = openapi::document(openapi::DocumentOptions {
        max_size: api.max_size.load(Ordering::Relaxed),
        needs_token: api.authorizer.needs_token(),
        has_page: api.has_page,
    });
    ([(CONTENT_TYPE, "application/json")], document)
}

async fn serve_page(headers: HeaderMap) -> axum::response::Response {
    page::serve(&headers).unwrap_or_else(|problem| told(&problem))
}

async fn serve_metrics(State(api): State<Arc<AppState>>) -> impl IntoResponse {
    let text = api.metrics.render(&api.dropped);
    ([(CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text)
}

fn ok_or_problem(checked: Result<(), Problem>) -> axum::response::Response {
    match checked {
        Ok(()) => (StatusCode::OK, [(CONTENT_TYPE, "text/plain; charset=utf-8")], "OK").into_response(),
        Err(problem) => told(&problem),
    }
}

fn told(problem: &Problem) -> axum::response::Response {
    problem.to_response()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::access::authorization::AccessRules;
    use crate::keys::generator::OsRandom;
    use axum::http::header::RETRY_AFTER;

    async fn get(site: &ConnectionService, path: &str) -> Response<Body> {
        let request = Request::get(path).header(HOST, "localhost").body(()).unwrap();
        let Ok(response) = site.call(request).await;
        response
    }

    #[tokio::test]
    async fn once_the_drain_has_begun_a_long_key_is_refused_and_a_short_one_is_the_last_answer() {
        let generator = Arc::new(Generator::new(OsRandom).unwrap());
        let health = Arc::new(Health::new(Arc::clone(&generator)));
        let api = AppState {
            max_size: AtomicU64::new(1 << 20),
            generator,
            health: Arc::clone(&health),
            metrics: Arc::new(Metrics::new()),
            authorizer: Authorizer::new(AccessRules::default(), 2),
            dropped: Arc::default(),
            has_page: false,
        };
        let peer = Peer::tcp(([127, 0, 0, 1], 1).into());
        let site = HttpService::new(Routes::Client, Arc::new(api)).serve(ConnectionClass::Normal, peer);
        assert_eq!(get(&site, "/key/1000000").await.status(), StatusCode::OK);
        health.start_draining();
        assert_eq!(get(&site, "/key/1000000").await.status(), StatusCode::OK, "there is time for it yet");
        assert_eq!(get(&site, "/readyz").await.status(), StatusCode::SERVICE_UNAVAILABLE);
        health.start_stopping();
        let refused = get(&site, "/key/1000000").await;
        assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(refused.headers().contains_key(RETRY_AFTER));
        let last = get(&site, "/key/32").await;
        assert_eq!(
            (last.status(), &last.headers()[CONNECTION]),
            (StatusCode::OK, &HeaderValue::from_static("close"))
        );
    }
}
