//! The responses when the random source fails, and statistical tests of the served bytes.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the low byte of a counter is meant"
)]

mod common;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::Daemon;
use key_service::access::authorization::{AccessRules, Authorizer};
use key_service::access::peer::{Client, Peer};
use key_service::http::health::Health;
use key_service::http::routes::Routes;
use key_service::http::service::HttpService;
use key_service::http::state::AppState;
use key_service::keys::generator::{Generator, GeneratorError, OsRandom, Source};
use key_service::server::buffers::{BufferAccount, BufferLimit};
use key_service::server::connection::serve_connection;
use key_service::server::connection_limit::ConnectionClass;
use key_service::server::drain::Drain;
use key_service::server::idle::IdleConnections;
use key_service::server::stream::Stream;
use key_service::server::timeout_stream::TimeoutStream;
use key_service::server::timeouts::Timeouts;
use key_service::server::transport::Transport;
use key_service::telemetry::metrics::Metrics;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// A source of kernel random bytes that fails on demand.
struct Breakable {
    is_broken: Arc<AtomicBool>,
    broken: fn(&mut [u8]) -> io::Result<usize>,
}

impl Source for Breakable {
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.is_broken.load(Ordering::Relaxed) { (self.broken)(buffer) } else { OsRandom.read(buffer) }
    }
}

/// The daemon's routes over the daemon's connection, with a source that can break.
struct Service {
    http: HttpService,
    metrics: Arc<Metrics>,
    is_broken: Arc<AtomicBool>,
}

impl Service {
    fn with(broken: fn(&mut [u8]) -> io::Result<usize>) -> Self {
        let is_broken = Arc::new(AtomicBool::new(false));
        let source = Breakable { is_broken: Arc::clone(&is_broken), broken };
        let generator = Arc::new(Generator::new(source).unwrap());
        let metrics = Arc::new(Metrics::new());
        let authorizer = Authorizer::new(AccessRules::default(), 64, &generator).unwrap();
        let state = AppState {
            max_size: AtomicU64::new(1 << 20),
            generator: Arc::clone(&generator),
            health: Arc::new(Health::new(generator)),
            metrics: Arc::clone(&metrics),
            authorizer,
            dropped: Arc::default(),
            has_page: false,
        };
        Self { http: HttpService::new(Routes::Both, Arc::new(state)), metrics, is_broken }
    }

    /// Sends one GET on a new connection, and returns all bytes of the response.
    async fn get(&self, path: &str) -> Vec<u8> {
        let (client, server) = tokio::io::duplex(1 << 16);
        self.get_over(client, server, path).await.0
    }

    /// Sends one GET over the two ends of a connection, and returns all bytes of the response and how it ended.
    async fn get_over<I>(
        &self,
        mut client: impl AsyncRead + AsyncWrite + Unpin,
        server: I,
        path: &str,
    ) -> (Vec<u8>, io::Result<usize>)
    where
        I: AsyncRead + Transport + Send + Unpin + 'static,
    {
        let drain = Drain::new();
        let peer = Peer::tcp(([127, 0, 0, 1], 1).into());
        let service = self.http.clone().serve(ConnectionClass::Normal, peer);
        let buffers = BufferAccount::new(Arc::new(BufferLimit::new(8)), Client::V4(1));
        let activity = IdleConnections::new(1).activity();
        let serving = serve_connection(server, service, drain.subscribe(), &self.metrics, buffers, activity);
        let exchange = async {
            let request = format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
            client.write_all(request.as_bytes()).await.unwrap();
            let mut response = Vec::new();
            let end = client.read_to_end(&mut response).await;
            (response, end)
        };
        tokio::join!(serving, exchange).1
    }

    /// Asserts that every 503 to a request for a key or a password, and nothing else, counts as the generator's
    /// failure.
    async fn assert_failures_are_counted(&self) {
        let metrics = String::from_utf8(self.get("/metrics").await).unwrap();
        let failed = common::metric(&metrics, "key_request_failures_total{reason=\"generator\"}");
        let probes = 2.0; // /health and /readyz
        assert_eq!(failed + probes, common::metric(&metrics, "http_responses_total{status_code=\"503\"}"));
    }

    async fn status(&self, path: &str) -> String {
        let response = self.get(path).await;
        String::from_utf8_lossy(&response[9..12]).into_owned()
    }
}

fn stuck(buffer: &mut [u8]) -> io::Result<usize> {
    (0..).zip(buffer.iter_mut()).for_each(|(n, byte)| *byte = (n % 251) as u8);
    Ok(buffer.len())
}

fn zero(buffer: &mut [u8]) -> io::Result<usize> {
    buffer.fill(0);
    Ok(buffer.len())
}

fn denied(_: &mut [u8]) -> io::Result<usize> {
    Err(io::Error::from_raw_os_error(1))
}

fn exhausted(_: &mut [u8]) -> io::Result<usize> {
    Ok(0)
}

/// A cycle of 40 different blocks.
fn repeating(buffer: &mut [u8]) -> io::Result<usize> {
    static AT: AtomicU64 = AtomicU64::new(0);
    let n = AT.fetch_add(1, Ordering::Relaxed) % 40;
    (0..).zip(buffer.iter_mut()).for_each(|(at, byte)| *byte = (at * (2 * n + 1) % 256) as u8);
    Ok(buffer.len())
}

#[tokio::test]
async fn a_broken_source_returns_503_and_is_never_trusted_again() {
    for (name, broken) in [
        ("stuck", stuck as fn(&mut [u8]) -> io::Result<usize>),
        ("zero", zero),
        ("denied", denied),
        ("exhausted", exhausted),
        ("repeating", repeating),
    ] {
        for length in [16, 32, 1000, 500_000] {
            let service = Service::with(broken);
            let path = format!("/key/{length}");
            assert_eq!(service.status(&path).await, "200");
            service.is_broken.store(true, Ordering::Relaxed);
            // A repeating source serves each of its blocks once, and is detected as it starts over.
            let mut served = 0;
            while service.status(&path).await == "200" {
                served += 1;
                assert!(served <= 400, "{name}, {length}");
            }
            service.is_broken.store(false, Ordering::Relaxed);
            let response = String::from_utf8(service.get(&path).await).unwrap();
            assert!(
                response.starts_with("HTTP/1.1 503 "),
                "a source that seems to have recovered is not trusted: {response}"
            );
            assert!(
                response.contains("\r\nretry-after: ")
                    && response.contains("No keys can be generated: the random source")
            );
            assert_eq!(service.status("/health").await, "503");
            assert_eq!(service.status("/readyz").await, "503");
            assert_eq!(service.status("/livez").await, "200", "a restart would not repair the source");
            let metrics = String::from_utf8(service.get("/metrics").await).unwrap();
            assert_eq!(common::metric(&metrics, "generator_healthy"), 0.0);
            assert!(common::metric(&metrics, "http_rejections_total{reason=\"generator\"}") > 0.0);
            assert_eq!(service.status("/password/16").await, "503");
            if length < 500_000 {
                service.assert_failures_are_counted().await; // a stream that is cut short began with 200
            }
        }
    }
}

#[tokio::test]
async fn a_failure_within_a_streamed_key_cuts_the_response_short() {
    // 500,000 bytes take 16 chunks; the source breaks after the third read.
    static READS: AtomicU64 = AtomicU64::new(0);
    fn late(buffer: &mut [u8]) -> io::Result<usize> {
        if READS.fetch_add(1, Ordering::Relaxed) < 3 { OsRandom.read(buffer) } else { denied(buffer) }
    }
    let broken = || {
        READS.store(0, Ordering::Relaxed);
        let service = Service::with(late);
        service.is_broken.store(true, Ordering::Relaxed);
        service
    };
    // The connection is reset: TLS would announce an orderly close.
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let server = Stream::Tcp(listener.accept().await.unwrap().0);
    let server = TimeoutStream::new(
        server,
        Arc::new(Timeouts::new(common::TIMEOUT, common::TIMEOUT, common::TIMEOUT)),
    );
    let (_, end) = broken().get_over(client, server, "/key/500000").await;
    assert_eq!(end.map_err(|error| error.kind()), Err(io::ErrorKind::ConnectionReset));
    let service = broken();
    let response = service.get("/key/500000").await;
    assert!(response.starts_with(b"HTTP/1.1 200 "));
    assert!(common::find(&response, b"content-length: 500000\r\n").is_some());
    let body = response.len() - common::find(&response, b"\r\n\r\n").unwrap() - 4;
    assert!(body <= 3 * 65_536, "{body} bytes of a key that could not be generated");
    let failures = "key_request_failures_total{reason=\"generator\"}";
    let metrics = String::from_utf8(service.get("/metrics").await).unwrap();
    assert_eq!(common::metric(&metrics, failures), 1.0, "a response that is cut short is a failure");
    assert_eq!(service.status("/key/1").await, "503");
    let metrics = String::from_utf8(service.get("/metrics").await).unwrap();
    assert_eq!(common::metric(&metrics, failures), 2.0);
}

#[test]
fn health_detects_a_broken_source_without_a_key_request() {
    let is_broken = Arc::new(AtomicBool::new(false));
    let generator =
        Arc::new(Generator::new(Breakable { is_broken: Arc::clone(&is_broken), broken: denied }).unwrap());
    let health = Health::new(Arc::clone(&generator));
    assert!(health.check().is_ok() && health.ready().is_ok());
    is_broken.store(true, Ordering::Relaxed);
    assert!(health.check().is_err() && health.ready().is_err());
    assert_eq!(generator.failure(), Some(GeneratorError::Unreadable(Some(1))));
}

#[test]
fn every_key_takes_fresh_bytes_from_the_source() {
    struct Counted(Arc<AtomicU64>);
    impl Source for Counted {
        fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.fetch_add(buffer.len() as u64, Ordering::Relaxed);
            OsRandom.read(buffer)
        }
    }
    let bytes_read = Arc::new(AtomicU64::new(0));
    let generator = Generator::new(Counted(Arc::clone(&bytes_read))).unwrap();
    // A short key takes a block, a key of up to 128 bytes takes its size, and a larger one takes a seed for each 64
    // KiB. No bytes are left over for the next key, or for a key in a copy of the process.
    for (length, expected) in [
        (1, 32),
        (16, 32),
        (32, 32),
        (100, 100),
        (128, 128),
        (129, 32),
        (65_536, 32),
        (65_537, 64),
        (300_000, 160),
    ] {
        for _ in 0..3 {
            let before = bytes_read.load(Ordering::Relaxed);
            generator.fill(&mut vec![0; length]).unwrap();
            assert_eq!(bytes_read.load(Ordering::Relaxed) - before, expected, "a key of {length} bytes");
        }
    }
}

/// The distance from the expected value for random bytes, in standard deviations, of three statistics: the number of
/// set bits, the number of runs of equal bits, and chi-square of the byte values (made normal by Wilson and Hilferty's
/// cube root).
fn deviations(bytes: &[u8]) -> [f64; 3] {
    let bits = bytes.len() as f64 * 8.0;
    let ones: u64 = bytes.iter().map(|byte| u64::from(byte.count_ones())).sum();
    let monobit = (ones as f64 - bits / 2.0) / (bits / 4.0).sqrt();
    // A run ends wherever a bit differs from the previous one.
    let within = |byte: u8| u64::from(((byte ^ (byte >> 1)) & 0x7f).count_ones());
    let between = |pair: &[u8]| u64::from((pair[0] & 1) ^ (pair[1] >> 7));
    let changes =
        bytes.iter().map(|byte| within(*byte)).sum::<u64>() + bytes.windows(2).map(between).sum::<u64>();
    let runs = (changes as f64 - (bits - 1.0) / 2.0) / ((bits - 1.0) / 4.0).sqrt();
    let mut counts = [0_u64; 256];
    bytes.iter().for_each(|byte| counts[usize::from(*byte)] += 1);
    let expected = bytes.len() as f64 / 256.0;
    let chi: f64 = counts.iter().map(|count| (*count as f64 - expected).powi(2) / expected).sum();
    let spread = 2.0 / (9.0 * 255.0);
    let chi = ((chi / 255.0).cbrt() - (1.0 - spread)) / f64::sqrt(spread);
    [monobit, runs, chi]
}

/// A healthy source exceeds 7 standard deviations, on either side, with a probability of 2.6e-12; with 3 statistics of
/// 4 lengths, a run fails by chance with a probability of 3.1e-11.
const LIMIT: f64 = 7.0;

#[test]
fn served_bytes_look_random() {
    let daemon = Daemon::start(&[("MAX_SIZE", "4194304")]);
    // One length for each way to generate a key: cut from a block, read from the kernel, expanded, streamed.
    for (length, count) in [(16, 8192), (100, 4096), (4096, 256), (4_194_304, 1)] {
        let mut client = common::Client::connect(daemon.keys());
        let path = common::request(&format!("/key/{length}"));
        let bytes: Vec<u8> = (0..count).flat_map(|_| client.send(&path).response().body).collect();
        for (test, deviation) in ["monobit", "runs", "chi-square"].into_iter().zip(deviations(&bytes)) {
            assert!(
                deviation.abs() < LIMIT,
                "{test} of keys of {length} bytes: {deviation} standard deviations"
            );
        }
    }
}

#[test]
fn biased_bytes_do_not_look_random() {
    let mut good = vec![0; 131_072];
    Generator::new(OsRandom).unwrap().fill(&mut good).unwrap();
    assert!(deviations(&good).iter().all(|deviation| deviation.abs() < LIMIT));
    let broken = |change: fn(usize, u8) -> u8| -> Vec<u8> {
        good.iter().enumerate().map(|(at, byte)| change(at, *byte)).collect()
    };
    let exceeds = |bytes: &[u8]| deviations(bytes).map(|deviation| deviation.abs() > LIMIT);
    // The bias is 16 standard deviations on average: one run in 10^18 measures less than the limit.
    assert!(
        exceeds(&broken(|at, byte| if at % 8 == 0 { byte | 1 } else { byte }))[0],
        "one bit in 64 is always set"
    );
    assert!(
        exceeds(&broken(|at, byte| if at % 8 == 0 { 0xaa } else { byte }))[1],
        "every eighth byte alternates"
    );
    assert!(exceeds(&broken(|_, byte| byte % 251))[2], "five values never occur");
}
