//! Timeouts and limits: no client can hold a connection without progress, or hold what other clients need.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use common::{
    Client, Daemon, IS_SLOW, TIMEOUT, TempDirectory, connect_from, connect_with_small_buffer, get,
    read_slowly, request, until,
};

/// Reads to the end of the connection and returns the number of bytes received.
fn read_to_end(stream: &mut TcpStream) -> usize {
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes); // a reset also ends the connection
    bytes.len()
}

/// A client that keeps its slot: it has received a key and begun another request.
fn busy_client(daemon: &Daemon) -> Client {
    let mut client = Client::connect(daemon.keys());
    // In one write: between two, the connection would be idle and could be evicted.
    assert_eq!(client.send(request("/key/32") + HALF).response().status, 200);
    client
}

/// The first half of a request.
const HALF: &str = "GET /key/32 HTTP/1.1\r\n";

/// The rest of the request that begins with [`HALF`].
const OTHER_HALF: &str = "Host: localhost\r\n\r\n";

#[test]
fn a_silent_connection_is_closed_after_the_head_timeout() {
    let daemon = Daemon::start(&[("HEAD_TIMEOUT", "1")]);
    let mut client = Client::connect(daemon.keys());
    assert!(client.is_closed(), "without a response");
}

#[test]
fn half_a_request_is_closed_after_the_head_timeout() {
    let daemon = Daemon::start(&[("HEAD_TIMEOUT", "1")]);
    let mut client = Client::connect(daemon.keys());
    client.send("GET /key/32 HTTP/1.1\r\nHost: lo");
    assert!(client.is_closed());
}

#[test]
fn an_idle_connection_is_closed_after_the_idle_timeout() {
    let daemon = Daemon::start(&[("HEAD_TIMEOUT", "3600"), ("IDLE_TIMEOUT", "1")]);
    for path in ["/key/32", "/health"] {
        let mut client = Client::connect(daemon.keys());
        client.send(request(path)).response();
        assert!(client.is_closed(), "{path}");
    }
}

#[test]
fn an_idle_connection_outlives_the_head_timeout() {
    let daemon = Daemon::start(&[("HEAD_TIMEOUT", "1")]);
    let mut idle = ["/key/32", "/health"].map(|path| {
        let mut client = Client::connect(daemon.keys());
        client.send(request(path)).response();
        client
    });
    let mut silent = Client::connect(daemon.keys());
    assert!(silent.is_closed(), "a second has passed");
    for client in &mut idle {
        assert_eq!(client.send(request("/key/32")).response().status, 200);
    }
}

#[test]
fn half_a_request_after_a_response_gets_the_head_timeout() {
    let daemon = Daemon::start(&[("HEAD_TIMEOUT", "1"), ("IDLE_TIMEOUT", "3600")]);
    let mut in_one_write = busy_client(&daemon);
    let mut in_two_writes = Client::connect(daemon.keys());
    in_two_writes.send(request("/key/32")).response();
    in_two_writes.send(HALF);
    assert!(in_two_writes.is_closed() && in_one_write.is_closed());
}

#[test]
fn a_pipelined_half_request_is_closed_after_the_head_timeout() {
    let daemon = Daemon::start(&[("HEAD_TIMEOUT", "1"), ("IDLE_TIMEOUT", "3600")]);
    let body = "POST /key/32 HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc";
    let cases = [
        (request("/key/32"), "GET /hea"),
        (request("/health"), "GET /hea"),
        (request("/health"), HALF),
        (body.to_owned(), HALF),
        (body.to_owned(), ""),
    ];
    let mut clients = cases.map(|(whole, half)| {
        let mut client = Client::connect(daemon.keys());
        client.send(whole + half).response();
        client
    });
    assert_eq!(clients.each_mut().map(Client::is_closed), [true; 5]);
}

#[test]
fn the_longest_idle_connection_is_closed_at_the_limit() {
    // With one worker, a connection is known to be idle before another one is accepted.
    let daemon = Daemon::start(&[("MAX_CONNECTIONS", "3"), ("WORKERS", "1")]);
    let status_of = |client: &mut Client, path| client.send(request(path)).response().status;
    let open = |path| {
        let mut client = Client::connect(daemon.keys());
        assert_eq!(status_of(&mut client, path), 200);
        client
    };
    let (mut first, mut second, mut third) = (open("/key/32"), open("/key/500?format=hex"), open("/health"));
    assert_eq!(status_of(&mut first, "/key/32"), 200, "now the second has been idle for longest");
    let mut new = open("/key/32");
    assert!(second.is_closed());
    assert_eq!([&mut third, &mut first, &mut new].map(|client| status_of(client, "/key/32")), [200; 3]);
    let mut newer = open("/health");
    assert!(third.is_closed());
    assert_eq!([&mut first, &mut new, &mut newer].map(|client| status_of(client, "/key/32")), [200; 3]);
    assert_eq!(daemon.metric("http_idle_connections_closed_total"), 2.0);
    assert_eq!(daemon.metric("http_rejections_total{reason=\"connections\"}"), 0.0);
}

#[test]
fn request_headers_sent_byte_by_byte_time_out() {
    let daemon = Daemon::start(&[("HEAD_TIMEOUT", "1")]);
    let mut stream = TcpStream::connect(daemon.keys()).unwrap();
    let start = Instant::now();
    // At one byte every 100 ms, all headers would take 100 seconds.
    let headers = format!("GET /key/32 HTTP/1.1\r\nHost: a\r\nX: {}", "x".repeat(1000));
    let is_closed = headers.bytes().any(|byte| {
        thread::sleep(Duration::from_millis(100));
        stream.write_all(&[byte]).is_err()
    });
    assert!(is_closed && start.elapsed() < TIMEOUT);
}

#[test]
fn a_client_that_never_reads_is_closed_after_the_write_timeout() {
    let daemon =
        Daemon::start(&[("WRITE_TIMEOUT", "1"), ("IDLE_TIMEOUT", "3600"), ("MAX_SIZE", "1073741824")]);
    let mut client = Client::connect(daemon.keys());
    client.send(request("/key/1073741824"));
    until("the stream to begin", || (daemon.metric("key_bytes_total{format=\"raw\"}") > 0.0).then_some(()));
    daemon.wait_for_metric("http_connections", 0.0);
    let received = read_to_end(&mut client.stream);
    assert!(received < 64 << 20, "{received} bytes of 1 GiB were buffered for a client that does not read");
    assert!(daemon.metric("process_resident_memory_bytes") < 64e6);
}

#[test]
fn a_client_that_reads_slowly_gets_its_whole_response() {
    let timeouts =
        [("WRITE_TIMEOUT", "4"), ("HEAD_TIMEOUT", "4"), ("IDLE_TIMEOUT", "4"), ("MAX_SIZE", "1000000")];
    let daemon = Daemon::start(&timeouts);
    let directory = TempDirectory::new();
    let socket = directory.file("socket");
    let local = Daemon::start_with(directory, |command| {
        command.args(["--metrics-port", "0"]).env("KEYSERVICE_HOST", format!("unix:{}", socket.display()));
        command.envs(timeouts.map(|(name, value)| (format!("KEYSERVICE_{name}"), value)));
    });
    let remote = || connect_with_small_buffer(daemon.keys());
    let over_unix = || UnixStream::connect(&socket).unwrap();
    thread::scope(|scope| {
        for path in ["/key/220000", "/key/110000?format=hex"] {
            scope.spawn(move || assert_eq!(read_slowly(remote, path), Ok(())));
            scope.spawn(move || assert_eq!(read_slowly(over_unix, path), Ok(())));
        }
        // Many short responses in a row.
        scope.spawn(move || assert_eq!(read_slowly(remote, &"/key/1024 ".repeat(180)), Ok(())));
    });
    drop(local);
}

#[test]
fn over_limit_connections_get_health_checks_and_503() {
    let daemon = Daemon::start(&[("MAX_CONNECTIONS", "4"), ("HEAD_TIMEOUT", "3600")]);
    let mut clients: Vec<_> = (0..4).map(|_| busy_client(&daemon)).collect();
    for path in ["/health", "/livez", "/readyz"] {
        let mut client = Client::connect(daemon.keys());
        let response = client.send(request(path)).response();
        assert_eq!((response.status, response.header("connection")), (200, Some("close")), "{path}");
        assert!(client.is_closed());
    }
    let mut client = Client::connect(daemon.keys());
    let response = client.send(request("/key/32")).response();
    assert_eq!(response.status, 503);
    assert_eq!(response.problem(), "Too many connections");
    assert!(response.header("retry-after").unwrap().parse::<u32>().unwrap() > 0);
    assert!(client.is_closed());
    assert_eq!(daemon.metric("http_rejections_total{reason=\"connections\"}"), 1.0);
    assert_eq!(daemon.metric("http_connections_limit"), 4.0);
    // Another connection can take a released slot.
    drop(clients.pop());
    until("a slot", || (daemon.get("/key/32").status == 200).then_some(()));
    for client in &mut clients {
        assert_eq!(client.send(OTHER_HALF).response().status, 200, "connections keep their slot");
    }
}

#[test]
fn a_released_slot_is_free_despite_over_limit_connections() {
    let daemon = Daemon::start(&[("MAX_CONNECTIONS", "4"), ("HEAD_TIMEOUT", "60")]);
    let with_slot = || {
        let mut client = Client::connect(daemon.keys());
        // An idle connection would be closed for an over-limit one.
        (client.send(request("/key/32") + HALF).response().status == 200).then_some(client)
    };
    let mut clients: Vec<_> = (0..4).map(|_| until("a slot", with_slot)).collect();
    // Silent over-limit connections are closed after a second. A busy machine may need that long, so one success in
    // five tries is enough.
    let is_free_at_once = (0..5).any(|_| {
        let over_limit: Vec<_> = (0..20).map(|_| TcpStream::connect(daemon.keys()).unwrap()).collect();
        drop(clients.pop());
        clients.push(until("the slot", with_slot));
        over_limit.iter().any(|silent| {
            silent.set_nonblocking(true).unwrap();
            silent.peek(&mut [0]).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock)
        })
    });
    assert!(is_free_at_once, "the over-limit connections were closed first");
}

#[test]
fn over_limit_connections_are_evicted_for_waiting_clients() {
    let daemon = Daemon::start(&[("MAX_CONNECTIONS", "4")]);
    let silent: Vec<_> = (0..600).map(|_| Client::connect(daemon.keys())).collect();
    // The oldest over-limit connections are closed when others wait, so this one is accepted eventually.
    let response = get(daemon.keys(), "/health");
    assert_eq!(response.status, 200);
    assert!(daemon.metric("http_connections") <= 4.0 + 256.0 + 16.0);
    drop(silent);
    until("free slots", || (daemon.get("/key/32").status == 200).then_some(()));
}

#[test]
fn an_evicted_over_limit_connection_is_counted_as_rejected() {
    let daemon = Daemon::start(&[("MAX_CONNECTIONS", "4"), ("MAX_CONNECTIONS_PER_CLIENT", "0")]);
    let silent: Vec<_> = (0..600).map(|_| Client::connect(daemon.keys())).collect();
    assert_eq!(get(daemon.keys(), "/health").status, 200);
    // An evicted connection may be in its TLS handshake, so it counts as rejected, without a request or a route.
    assert!(daemon.metric("http_rejections_total{reason=\"connections\"}") >= 1.0);
    assert_eq!(daemon.metric("key_request_failures_total{reason=\"connections\"}"), 0.0);
    drop(silent);
}

/// A daemon with a limit of `count` open files.
fn with_descriptors(count: u32, settings: &[(&str, &str)]) -> Daemon {
    let directory = TempDirectory::new();
    let mut command = common::process::shell(&format!("ulimit -n {count} && exec \"$@\""));
    common::clear_environment(&mut command, &directory);
    command.arg(common::binary()).arg("--config").arg(directory.file("config.toml"));
    command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
    for (name, value) in settings {
        command.env(format!("KEYSERVICE_{name}"), value);
    }
    Daemon::run(directory, command)
}

#[test]
fn over_limit_connections_never_exhaust_the_descriptors() {
    for count in [64, 300, 600] {
        let daemon = with_descriptors(count, &[("WORKERS", "2"), ("MAX_CONNECTIONS_PER_CLIENT", "0")]);
        assert_eq!(daemon.metric("process_max_fds"), f64::from(count));
        daemon.wait_for_log("max-connections is lowered");
        // From addresses other than 127.0.0.1, from which the test reads the metrics.
        let from = |n: u32| format!("127.0.{}.{}", 1 + n / 200, 1 + n % 200);
        let connect = |to| (0..count).map(|n| connect_from(&from(n), to)).collect::<Vec<_>>();
        let connections = (connect(daemon.keys()), connect(daemon.metrics()));
        let limit = daemon.metric("http_connections_limit");
        assert!(limit >= f64::from(count) / 8.0, "{limit} of {count}");
        until("every slot to be taken", || (daemon.metric("http_connections") >= limit).then_some(()));
        assert_eq!(daemon.get("/health").status, 200);
        assert_eq!(daemon.metric("accept_errors_total{kind=\"resources\"}"), 0.0, "with {count} open files");
        drop(connections);
        until("recovery", || (daemon.get("/key/32").status == 200).then_some(()));
    }
}

#[test]
fn idle_connections_never_block_the_metrics() {
    let daemon = Daemon::start(&[("HEAD_TIMEOUT", "3600")]);
    let connections: Vec<_> =
        (0..330).map(|n| connect_from(&format!("127.0.0.{}", 2 + n % 4), daemon.metrics())).collect();
    let response = get(daemon.metrics(), "/metrics");
    assert_eq!(response.status, 200);
    let closed = common::metric(&response.text(), "http_rejections_total{reason=\"client_connections\"}");
    // Of each address 16 within its limit and 8 over it stay open, the latter for a second.
    assert!(closed >= 330.0 / 2.0, "each address has its own limit: {closed} closed");
    drop(connections);
}

#[test]
fn a_client_with_too_many_unread_responses_loses_its_oldest() {
    let daemon = Daemon::start(&[("MAX_CONNECTIONS_PER_CLIENT", "0"), ("WRITE_TIMEOUT", "3600")]);
    let requests = request("/key/1024").repeat(1000);
    let count: u16 = if IS_SLOW { 200 } else { 600 };
    let unread: Vec<_> = (0..count)
        .map(|_| {
            let mut stream = TcpStream::connect(daemon.keys()).unwrap();
            stream.set_nonblocking(true).unwrap();
            let _ = stream.write(requests.as_bytes()).unwrap(); // as much as the socket takes
            stream
        })
        .collect();
    // 128 connections may hold buffers; the others were reset. A reset is counted before the connection is closed.
    daemon.wait_for_metric("http_rejections_total{reason=\"buffers\"}", f64::from(count) - 128.0);
    daemon.wait_for_metric("http_connections", 128.0);
    assert_eq!(daemon.get("/key/32").status, 200);
    drop(unread);
    daemon.wait_for_metric("http_connections", 0.0);
}

#[test]
fn closing_connections_with_unread_responses_are_limited() {
    let settings = [("MAX_CONNECTIONS_PER_CLIENT", "0"), ("WRITE_TIMEOUT", "3600"), ("MAX_SIZE", "1000000")];
    let daemon = Daemon::start(&settings);
    let request = request("/key/150000").replace("Host", "Connection: close\r\nHost");
    let unread: Vec<_> = (1..=200)
        .map(|count| {
            let mut client = Client::connect(daemon.keys());
            client.send(&request);
            let bytes = 150_000.0 * f64::from(count);
            until("the response", || {
                (daemon.metric("key_bytes_total{format=\"raw\"}") >= bytes).then_some(())
            });
            client
        })
        .collect();
    daemon.wait_for_metric("http_rejections_total{reason=\"buffers\"}", 200.0 - 128.0);
    daemon.wait_for_metric("http_connections", 128.0); // their number limits the bytes that the kernel holds
    let complete = unread.into_iter().filter_map(|mut client| client.read_response(true)).count();
    assert_eq!(complete, 128);
    daemon.wait_for_metric("http_connections", 0.0);
}
