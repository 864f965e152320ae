//! A client's bytes over a connection as the daemon assembles it: timeouts, HTTP and the real routes. Time
//! is paused, so that a waiting client times out at once.
//!
//! The first byte of an input is the setup; see [`Setup`]. The rest is what the client sends.
//!
//! Nothing may panic or hang. The server must send a sequence of complete responses, one for each request that
//! reached the service and at most one error at the end. Every status is below 500, and every response forbids
//! caching. A raw key has the length in its path. The fast path must respond as hyper does.

#![no_main]

use std::cell::RefCell;
use std::convert::Infallible;
use std::num::NonZeroU64;
use std::rc::Rc;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use http::{Method, Request, Response};
use hyper::body::Incoming;
use hyper::service::Service;
use key_service::access::authorization::{AccessRules, Authorizer};
use key_service::access::forwarded::{ForwardedHeader, TrustedProxies};
use key_service::access::peer::{Client, Peer};
use key_service::access::rate_limit::Rates;
use key_service::access::request_head::RequestHead;
use key_service::access::tokens_file::Grant;
use key_service::http::body::Body;
use key_service::http::health::Health;
use key_service::http::response::ResponseFuture;
use key_service::http::routes::Routes;
use key_service::http::service::{ConnectionService, HttpService};
use key_service::http::state::AppState;
use key_service::keys::format::{Format, Kind};
use key_service::keys::generator::{Generator, OsRandom};
use key_service::server::buffers::{BufferAccount, BufferLimit};
use key_service::server::connection::serve_connection;
use key_service::server::connection_limit::ConnectionClass;
use key_service::server::drain::Drain;
use key_service::server::fast_path::response_buffer::ResponseBuffer;
use key_service::server::fast_path::service::{FastOutcome, FastPath};
use key_service::server::idle::IdleConnections;
use key_service::server::timeout_stream::TimeoutStream;
use key_service::server::timeouts::Timeouts;
use key_service::telemetry::metrics::Metrics;
use libfuzzer_sys::fuzz_target;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex, split};
use tokio::runtime;
use tokio::time::timeout;

/// Above 65,536, so that inputs reach streamed keys too.
const MAX_SIZE: u64 = 70_000;

/// The token that the service accepts, if the setup requires tokens.
const TOKEN: &str = "ks_00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

static GENERATOR: LazyLock<Arc<Generator>> =
    LazyLock::new(|| Arc::new(Generator::new(OsRandom).expect("the kernel has random bytes")));
static METRICS: LazyLock<Arc<Metrics>> = LazyLock::new(|| Arc::new(Metrics::new()));

/// The configuration of the service and of the client.
struct Setup {
    has_tokens: bool,
    has_rates: bool,
    has_audit: bool,
    has_metrics: bool,
    /// Whether the client keeps its sending side open after its last byte.
    stays_open: bool,
    /// How many bytes the client sends at a time.
    chunk_size: usize,
}

impl From<u8> for Setup {
    fn from(byte: u8) -> Self {
        let is = |bit: u8| byte & 1 << bit != 0;
        let sizes = [16_384, 1, 7, 40, 75, 300, 1460, 4096];
        Self {
            has_tokens: is(0),
            has_rates: is(1),
            has_audit: is(2),
            has_metrics: is(3),
            stays_open: is(4),
            chunk_size: sizes[usize::from(byte >> 5)],
        }
    }
}

fuzz_target!(|input: &[u8]| {
    let [setup, sent_bytes @ ..] = input else { return };
    let setup = Setup::from(*setup);
    let runtime = runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
    let runtime = runtime.expect("a runtime without sockets");
    let (requests, responses) = runtime.block_on(exchange(&setup, sent_bytes, true));
    let response_headers = check(&setup, &requests, &responses);
    let (requests_by_hyper, responses_by_hyper) = runtime.block_on(exchange(&setup, sent_bytes, false));
    let headers_by_hyper = check(&setup, &requests_by_hyper, &responses_by_hyper);
    // These responses differ: rate limits depend on real time, audit records have unique ids, and metrics grow.
    if !(setup.has_rates || setup.has_audit || setup.has_metrics) {
        assert_eq!(response_headers, headers_by_hyper, "the fast path (left) and hyper differ");
    }
});

/// A request as it reached the service.
struct RecordedRequest {
    method: Method,
    path: String,
}

/// The service, which also records its requests.
struct Recorder {
    service: ConnectionService,
    has_fast_path: bool,
    requests: Rc<RefCell<Vec<RecordedRequest>>>,
}

impl Service<Request<Incoming>> for Recorder {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = ResponseFuture;

    fn call(&self, request: Request<Incoming>) -> ResponseFuture {
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        self.requests.borrow_mut().push(RecordedRequest { method, path });
        self.service.call(request)
    }
}

impl FastPath for Recorder {
    fn respond_fast(
        &self,
        head: &RequestHead<'_>,
        closes: bool,
        responses: &mut ResponseBuffer<'_>,
    ) -> FastOutcome {
        if !self.has_fast_path {
            return FastOutcome::NotHandled;
        }
        let outcome = self.service.respond_fast(head, closes, responses);
        if let FastOutcome::Written { .. } = outcome {
            let method = if head.is_head() { Method::HEAD } else { Method::GET };
            let path = String::from_utf8(head.path.to_vec()).expect("the path is ASCII");
            self.requests.borrow_mut().push(RecordedRequest { method, path });
        }
        outcome
    }
}

/// The requests that reached the service, and all bytes that the server sent.
async fn exchange(setup: &Setup, sent_bytes: &[u8], has_fast_path: bool) -> (Vec<RecordedRequest>, Vec<u8>) {
    let generator = Arc::clone(&GENERATOR);
    let number = |number| NonZeroU64::new(number).filter(|_| setup.has_rates);
    let grant = || Grant::new("fuzz".parse().expect("a name"), Sha256::digest(TOKEN).into());
    let rules = AccessRules {
        tokens: setup.has_tokens.then(|| [grant()].into()),
        trusts_unix: false,
        rates: Rates { requests: number(2), bytes: number(40_000), burst: 2 },
        proxies: TrustedProxies::new(&["10.0.0.0/8".parse().expect("a network")], ForwardedHeader::default()),
        audit: setup.has_audit,
    };
    let state = Arc::new(AppState {
        max_size: AtomicU64::new(MAX_SIZE),
        generator: Arc::clone(&generator),
        health: Arc::new(Health::new(generator)),
        metrics: Arc::clone(&METRICS),
        authorizer: Authorizer::new(rules, 64, &GENERATOR).expect("the generator works"),
        dropped: Arc::default(),
        has_page: true,
    });
    let routes = if setup.has_metrics { Routes::Both } else { Routes::Client };
    let service =
        HttpService::new(routes, state).serve(ConnectionClass::Normal, Peer::tcp(([10, 0, 0, 1], 1).into()));
    let requests = Rc::new(RefCell::new(Vec::new()));
    let recorder = Recorder { service, has_fast_path, requests: Rc::clone(&requests) };

    let (ours, theirs) = duplex(1 << 14);
    let seconds = Duration::from_secs;
    let timeouts = Arc::new(Timeouts::new(seconds(10), seconds(20), seconds(15)));
    let ours = TimeoutStream::new(ours, timeouts);
    let drain = Drain::new();
    let (mut incoming, mut outgoing) = split(theirs);
    let buffers = BufferAccount::new(Arc::new(BufferLimit::new(8)), Client::V4(1));
    let activity = IdleConnections::new(1).activity();
    let serving = serve_connection(ours, recorder, drain.subscribe(), &METRICS, buffers, activity);
    let sending = async {
        for chunk in sent_bytes.chunks(setup.chunk_size) {
            if outgoing.write_all(chunk).await.is_err() {
                return; // the server has closed the connection
            }
            tokio::task::yield_now().await; // so that the server reads the chunk separately
        }
        if !setup.stays_open {
            let _ = outgoing.shutdown().await;
        }
    };
    let reading = async {
        let mut responses = Vec::new();
        let _ = incoming.read_to_end(&mut responses).await;
        responses
    };
    let all = timeout(Duration::from_secs(60), async { tokio::join!(serving, sending, reading) }).await;
    let (_, (), responses) = all.expect("a silent client times out long before");
    (requests.take(), responses)
}

/// Checks that the bytes are the responses to these requests. Returns the headers of the responses without the date,
/// and the bodies of errors. They do not include an error that hyper itself may send at the end.
fn check(setup: &Setup, requests: &[RecordedRequest], mut bytes: &[u8]) -> Vec<String> {
    let mut requests = requests.iter();
    let mut response_headers = Vec::new();
    while !bytes.is_empty() {
        let request = requests.next();
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").expect("the headers have an end");
        let section = std::str::from_utf8(&bytes[..end]).expect("the headers are ASCII");
        bytes = &bytes[end + 4..];
        let mut lines = section.split("\r\n");
        let status = status(lines.next().expect("a response has a status line"));
        let headers: Vec<_> =
            lines.map(|line| line.split_once(": ").expect("a header has a name and a value")).collect();
        let header = |name: &str| {
            let mut values = headers.iter().filter(|(found, _)| found.eq_ignore_ascii_case(name));
            let value = values.next().map(|(_, value)| *value);
            assert!(values.next().is_none(), "{name} is repeated");
            value
        };
        assert_eq!(header("transfer-encoding"), None);
        let length: usize =
            header("content-length").expect("a response has a length").parse().expect("a length");
        let Some(request) = request else {
            // hyper rejected this request, so it did not reach the service.
            assert!(matches!(status, 400 | 414 | 431), "{status} without a request");
            assert_eq!(bytes.len(), length, "nothing follows an error of hyper");
            return response_headers;
        };
        response_headers.push(
            section.split("\r\n").filter(|line| !line.starts_with("date: ")).collect::<Vec<_>>().join("\n"),
        );
        let length = if request.method == Method::HEAD { 0 } else { length };
        assert!(bytes.len() >= length, "{} of {length} bytes", bytes.len());
        let body = &bytes[..length];
        bytes = &bytes[length..];
        if status != 200 {
            response_headers.push(String::from_utf8_lossy(body).into_owned());
        }
        assert_eq!(
            (header("cache-control"), header("x-content-type-options")),
            (Some("no-store"), Some("nosniff"))
        );
        check_status(setup, request, status, body, header("content-type"));
    }
    assert_eq!(requests.len(), 0, "every request that reached the service has a response");
    response_headers
}

fn check_status(setup: &Setup, request: &RecordedRequest, status: u16, body: &[u8], kind: Option<&str>) {
    let possible = [200, 400, 401, 404, 405, 406, 413, 429, 431];
    assert!(possible.contains(&status), "{status}");
    let text = String::from_utf8_lossy(body);
    if status != 200 {
        assert_eq!(kind, Some("application/problem+json"));
        assert!(body.is_empty() || text.starts_with('{') && text.ends_with('}'), "{text}");
        return;
    }
    assert!(matches!(request.method, Method::GET | Method::HEAD), "{}", request.method);
    let Some(length) = request.path.strip_prefix("/key/") else {
        let known = ["/", "/health", "/livez", "/readyz", "/openapi.json"].contains(&request.path.as_str())
            || request.path.starts_with("/password/");
        assert!(known || setup.has_metrics && request.path == "/metrics", "{}", request.path);
        return;
    };
    assert!(!length.starts_with('0') && length.bytes().all(|byte| byte.is_ascii_digit()), "{length}");
    let length: usize = length.parse().expect("the length of a served key is a number");
    assert!((1..=MAX_SIZE as usize).contains(&length));
    let kind = kind.expect("a key has a type");
    let of = |is_batch| Kind::Key.formats().iter().map(move |format| format.media_type(is_batch));
    assert!(of(false).chain(of(true)).any(|known| kind.starts_with(known)), "{kind}");
    if kind == Format::Raw.media_type(false) && request.method == Method::GET {
        assert_eq!(body.len(), length);
    }
}

fn status(line: &str) -> u16 {
    let rest = line.strip_prefix("HTTP/1.").expect("a response is HTTP/1");
    let (version, rest) = rest.split_once(' ').expect("a status follows the version");
    assert!(matches!(version, "0" | "1"), "{version}");
    rest.split(' ').next().expect("there is a first word").parse().expect("a status is a number")
}
