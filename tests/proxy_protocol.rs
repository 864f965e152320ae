//! The PROXY protocol: the client's address in the header, the peers that may send one, and connections without one.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use common::tls::{Authority, client_config};
use common::{
    Client, Daemon, TIMEOUT, TempDirectory, connect_from, get, key_service, request, run_to_end,
    unless_stalled, until,
};
use rustls::pki_types::ServerName;
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConnection, StreamOwned};

/// The address of the trusted proxy. Other loopback addresses are not trusted.
const PROXY: &str = "127.0.0.9";

const LOCAL: &[u8] = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";

const REASONS: [&str; 4] = ["untrusted", "missing", "malformed", "timeout"];

fn start(settings: &[(&str, &str)]) -> Daemon {
    Daemon::start(&[&[("PROXY_PROTOCOL", "true"), ("TRUSTED_PROXIES", PROXY)], settings].concat())
}

/// A version 1 header for a client at `ip`.
fn v1(ip: &str) -> Vec<u8> {
    let (family, to) = if ip.contains(':') { ("TCP6", "2001:db8::7") } else { ("TCP4", "198.51.100.7") };
    format!("PROXY {family} {ip} {to} 56324 1123\r\n").into_bytes()
}

/// A version 2 header.
fn v2(command: u8, family: u8, block: &[u8]) -> Vec<u8> {
    let length = u16::try_from(block.len()).unwrap();
    [&LOCAL[..12], &[command, family], &length.to_be_bytes(), block].concat()
}

/// A version 2 header for a client at `ip`, with a TLV of `padding` bytes.
fn v2_for(ip: &str, padding: u16) -> Vec<u8> {
    let noop = [[4].as_slice(), &padding.to_be_bytes(), &vec![0; padding.into()]].concat();
    match ip.parse().unwrap() {
        std::net::IpAddr::V4(ip) => v2(0x21, 0x11, &[&ip.octets(), [7; 8].as_slice(), &noop].concat()),
        std::net::IpAddr::V6(ip) => v2(0x21, 0x21, &[&ip.octets(), [7; 20].as_slice(), &noop].concat()),
    }
}

/// A connection from `source` that has sent `bytes`.
fn connect_with(daemon: &Daemon, source: &str, bytes: &[u8]) -> Client {
    let mut client = Client::from_tcp(connect_from(source, daemon.keys()));
    client.send(bytes);
    client
}

fn through_proxy(daemon: &Daemon, header: &[u8]) -> Client {
    connect_with(daemon, PROXY, header)
}

/// The status of one request after a header.
fn status(daemon: &Daemon, header: &[u8], path: &str) -> u16 {
    unless_stalled(|| through_proxy(daemon, &[header, request(path).as_bytes()].concat()).response().status)
}

fn errors(daemon: &Daemon) -> [f64; 4] {
    let text = get(daemon.metrics(), "/metrics").text();
    REASONS
        .map(|reason| common::metric(&text, &format!("proxy_protocol_errors_total{{reason=\"{reason}\"}}")))
}

/// Waits for the warning in the log. There must be exactly one.
fn warning(daemon: &Daemon) -> String {
    let mut lines = until("a warning", || Some(warnings(daemon)).filter(|lines| !lines.is_empty()));
    assert_eq!(lines.len(), 1, "once a minute: {lines:?}");
    lines.remove(0)
}

fn warnings(daemon: &Daemon) -> Vec<String> {
    daemon.log().lines().filter(|line| line.contains("closed by proxy-protocol")).map(str::to_owned).collect()
}

/// The last audit record, once there are `count`.
fn record(daemon: &Daemon, count: usize) -> String {
    until("the record", || {
        let log = daemon.log();
        let records: Vec<_> = log.lines().filter(|line| line.contains("key issued")).collect();
        (records.len() == count).then(|| records[count - 1].to_owned())
    })
}

#[test]
fn the_header_sets_the_address_in_the_audit_record() {
    let daemon = start(&[("AUDIT", "true")]);
    let mapped = [[0; 10].as_slice(), &[255, 255, 192, 0, 2, 5], &[0; 20]].concat();
    let cases = [
        (v1("192.0.2.1"), "192.0.2.1"),
        (v1("2001:db8::1"), "2001:db8::1"),
        (v1("::ffff:192.0.2.2"), "192.0.2.2"),
        (v2_for("192.0.2.3", 0), "192.0.2.3"),
        (v2_for("2001:db8::3", 0), "2001:db8::3"),
        (v2_for("192.0.2.4", 4000), "192.0.2.4"),
        (v2(0x21, 0x21, &mapped), "192.0.2.5"),
        (b"PROXY UNKNOWN\r\n".to_vec(), PROXY),
        (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n".to_vec(), PROXY),
        (LOCAL.to_vec(), PROXY),
        (v2(0x20, 0x11, &[1; 12]), PROXY),
        (v2(0x21, 0x00, &[1; 12]), PROXY),
        (v2(0x21, 0x31, &[1; 216]), PROXY),
    ];
    for (n, (header, address)) in cases.iter().enumerate() {
        // The header and the request in one segment.
        assert_eq!(status(&daemon, header, "/key/32"), 200, "{}", header.escape_ascii());
        let record = record(&daemon, n + 1);
        assert!(record.contains(&format!("address={address} length=32")), "{address}: {record}");
    }
    assert_eq!((errors(&daemon), warnings(&daemon)), ([0.0; 4], Vec::new()));
}

#[test]
fn a_header_may_arrive_byte_by_byte() {
    let daemon = start(&[("AUDIT", "true")]);
    for (n, header) in [v1("192.0.2.1"), v2_for("192.0.2.1", 300), LOCAL.to_vec()].iter().enumerate() {
        let mut client = through_proxy(&daemon, b"");
        for byte in header {
            client.send([*byte]);
            std::thread::yield_now();
        }
        for path in ["/key/32", "/health"] {
            assert_eq!(client.send(request(path)).response().status, 200, "and the connection stays open");
        }
        record(&daemon, n + 1);
    }
    // Headers that the client does not complete, and bytes that are not a header.
    let mut half = through_proxy(&daemon, b"PROXY TCP4 192.0.2.1");
    half.stream.shutdown(Shutdown::Write).unwrap();
    assert!(half.is_closed());
    let mut half = through_proxy(&daemon, &v2_for("192.0.2.1", 300)[..200]);
    half.stream.shutdown(Shutdown::Write).unwrap();
    assert!(half.is_closed());
    assert!(through_proxy(&daemon, b"GE").is_closed(), "at the first byte that cannot belong to a header");
    assert_eq!(errors(&daemon), [0.0, 1.0, 2.0, 0.0]);
}

#[test]
fn tls_begins_after_the_header() {
    let authority = Authority::new();
    let settings = [
        ("PROXY_PROTOCOL", "true"),
        ("TRUSTED_PROXIES", PROXY),
        ("AUDIT", "true"),
        ("TLS_MIN_VERSION", "1.2"),
    ];
    let daemon = common::tls::daemon(&authority, &settings);
    let tls_client = |stream: TcpStream, version| {
        let config = client_config(&authority, &[version], None);
        let name = ServerName::from(daemon.keys().ip());
        Client::new(StreamOwned::new(ClientConnection::new(config, name).unwrap(), stream))
    };
    let mut count = 0;
    for version in [&TLS13, &TLS12] {
        for (header, address) in [
            (v1("192.0.2.1"), "192.0.2.1"),
            (v2_for("2001:db8::1", 100), "2001:db8::1"),
            (LOCAL.to_vec(), PROXY),
        ] {
            let stream = through_proxy(&daemon, &header).stream;
            let mut client = tls_client(stream, version);
            assert_eq!(client.send(request("/key/32")).response().body.len(), 32);
            count += 1;
            assert!(record(&daemon, count).contains(&format!("address={address} ")));
        }
    }
    // The header and the ClientHello in one segment.
    let mut hello = Vec::new();
    let name = ServerName::from(daemon.keys().ip());
    let mut connection = ClientConnection::new(client_config(&authority, &[&TLS13], None), name).unwrap();
    connection.write_tls(&mut hello).unwrap();
    let stream = through_proxy(&daemon, &[v1("192.0.2.1"), hello.clone()].concat()).stream;
    let mut client = Client::new(StreamOwned::new(connection, stream));
    assert_eq!(client.send(request("/key/32")).response().status, 200);
    // Without a header, from the proxy and from a client.
    assert!(through_proxy(&daemon, &hello).is_closed());
    let mut client = tls_client(connect_from("127.0.0.2", daemon.keys()), &TLS13);
    assert_eq!(client.send(request("/key/32")).response().status, 200);
    assert_eq!(errors(&daemon), [0.0, 1.0, 0.0, 0.0]);
}

#[test]
fn a_malformed_header_closes_the_connection_without_a_response() {
    let daemon = start(&[]);
    let headers = [
        v1("192.0.2.256"),
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 70000\r\n".to_vec(),
        b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\n".to_vec(),
        format!("PROXY UNKNOWN {}\r\n", "x".repeat(200)).into_bytes(),
        v2(0x22, 0x11, &[1; 12]),
        v2(0x31, 0x11, &[1; 12]),
        v2(0x21, 0x44, &[1; 12]),
        v2(0x21, 0x21, &[1; 12]),
        [&LOCAL[..12], b"\x21\x11\xff\xff"].concat(),
    ];
    for header in &headers {
        let bytes = [header.as_slice(), request("/key/32").as_bytes()].concat();
        assert!(through_proxy(&daemon, &bytes).is_closed(), "{}", header.escape_ascii());
    }
    assert_eq!(errors(&daemon), [0.0, 0.0, headers.len() as f64, 0.0]);
    let logged = warning(&daemon);
    assert!(logged.contains("WARN") && logged.contains("address=127.0.0.9 reason=malformed"), "{logged}");
    assert_eq!(daemon.metric("key_length_bytes_count"), 0.0);
}

#[test]
fn a_trusted_proxy_without_a_header_is_closed_and_logged() {
    let daemon = start(&[]);
    for header in [request("/key/32"), request("/health"), "PROXY\r\n".into(), "\r\n\r\nGET".into()] {
        assert!(through_proxy(&daemon, header.as_bytes()).is_closed(), "{header}");
    }
    assert_eq!(errors(&daemon), [0.0, 4.0, 0.0, 0.0]);
    let logged = warning(&daemon);
    assert!(logged.contains("address=127.0.0.9 reason=missing"), "{logged}");
}

#[test]
fn a_late_header_closes_the_connection() {
    let daemon = start(&[("HEAD_TIMEOUT", "8"), ("MAX_CONNECTIONS", "4")]);
    let mut silent = through_proxy(&daemon, b"");
    let mut half = through_proxy(&daemon, b"PROXY TCP4 192.0.2.1 ");
    let mut without_tlvs = through_proxy(&daemon, &v2_for("192.0.2.1", 9)[..30]);
    let mut direct = connect_with(&daemon, "127.0.0.2", b"P");
    daemon.wait_for_metric("http_connections", 4.0);
    assert!(silent.is_closed() && half.is_closed() && without_tlvs.is_closed() && direct.is_closed());
    assert_eq!(errors(&daemon), [0.0, 0.0, 0.0, 3.0], "an untrusted peer need not send a header");
    assert!(warning(&daemon).contains("address=127.0.0.9 reason=timeout"));
    daemon.wait_for_metric("http_connections", 0.0);
}

#[test]
fn an_over_limit_connection_has_one_second_for_its_header() {
    let daemon = start(&[("HEAD_TIMEOUT", "3600"), ("MAX_CONNECTIONS", "1")]);
    let mut held = through_proxy(&daemon, &v1("192.0.2.1"));
    // The start of another request keeps the connection busy: an idle one would be evicted.
    assert_eq!(held.send(request("/key/32") + "GET /key").response().status, 200);
    assert!(through_proxy(&daemon, b"PROXY ").is_closed());
    assert_eq!(errors(&daemon), [0.0, 0.0, 0.0, 1.0]);
    assert_eq!(status(&daemon, &v1("192.0.2.2"), "/key/32"), 503);
    assert_eq!(status(&daemon, &v1("192.0.2.2"), "/health"), 200);
}

#[test]
fn a_header_from_an_untrusted_address_is_refused_and_logged() {
    let daemon = start(&[("AUDIT", "true")]);
    for header in [v1("192.0.2.1"), v2_for("192.0.2.1", 0), LOCAL.to_vec(), b"PROXY garbage".to_vec()] {
        let bytes = [header.as_slice(), request("/key/32").as_bytes()].concat();
        assert!(connect_with(&daemon, "127.0.0.2", &bytes).is_closed(), "{}", header.escape_ascii());
    }
    assert!(connect_with(&daemon, "127.0.0.3", &v1("192.0.2.1")).is_closed());
    assert_eq!(errors(&daemon), [5.0, 0.0, 0.0, 0.0]);
    let logged = warning(&daemon);
    assert!(logged.contains("address=127.0.0.2 reason=untrusted"), "{logged}");
    assert!(logged.contains("trusted-proxies"), "{logged}");
    // Without a header, the peer is the client.
    let mut direct = connect_with(&daemon, "127.0.0.2", request("/key/32").as_bytes());
    assert_eq!(direct.response().status, 200);
    assert!(record(&daemon, 1).contains("address=127.0.0.2 "));
    // Bytes that begin like a header but are not one.
    let mut post = connect_with(&daemon, "127.0.0.2", b"P");
    daemon.wait_for_metric("http_connections", 2.0);
    assert_eq!(post.send(request("/key/32").replace("GET", "OST")).response().status, 405);
    let mut half_closed = connect_with(&daemon, "127.0.0.2", b"PROX");
    half_closed.stream.shutdown(Shutdown::Write).unwrap();
    assert!(half_closed.is_closed());
    assert_eq!(errors(&daemon), [5.0, 0.0, 0.0, 0.0]);
}

#[test]
fn a_header_without_the_setting_is_malformed_http() {
    let daemon = Daemon::start(&[("TRUSTED_PROXIES", PROXY)]);
    for header in [v1("192.0.2.1"), v2_for("192.0.2.1", 0)] {
        let bytes = [header.as_slice(), request("/key/32").as_bytes()].concat();
        assert_eq!(through_proxy(&daemon, &bytes).response().status, 400);
    }
    assert!(!get(daemon.metrics(), "/metrics").text().contains("proxy_protocol"));
}

#[test]
fn a_second_header_is_malformed_http() {
    let daemon = start(&[]);
    for second in [v1("192.0.2.2"), v2_for("192.0.2.2", 0)] {
        let mut client = through_proxy(&daemon, &[v1("192.0.2.1"), second.clone()].concat());
        assert_eq!(client.send(request("/key/32")).response().status, 400, "at once");
        let mut client = through_proxy(&daemon, &v1("192.0.2.1"));
        assert_eq!(client.send(request("/key/32")).response().status, 200);
        assert_eq!(client.send(second).send(request("/key/32")).response().status, 400, "later");
    }
}

#[test]
fn health_checks_are_not_errors() {
    let daemon = start(&[("LOG_LEVEL", "info")]);
    daemon.wait_for_log("Keys on");
    let before = daemon.log();
    for header in [LOCAL, b"PROXY UNKNOWN\r\n", &v1("127.0.0.9"), b""] {
        // haproxy ends a check that needs no response by a reset or by closing the connection.
        let client = through_proxy(&daemon, header);
        socket2::SockRef::from(&client.stream).set_linger(Some(std::time::Duration::ZERO)).unwrap();
        drop(client);
        drop(through_proxy(&daemon, header));
        let mut half_closed = through_proxy(&daemon, header);
        half_closed.stream.shutdown(Shutdown::Write).unwrap();
        assert!(half_closed.is_closed());
    }
    assert_eq!(status(&daemon, LOCAL, "/health"), 200);
    assert_eq!(errors(&daemon), [0.0; 4]);
    assert_eq!(daemon.metric("http_rejections_total{reason=\"malformed\"}"), 0.0);
    assert_eq!(daemon.log(), before);
}

#[test]
fn rates_count_for_the_client_in_the_header() {
    let daemon = start(&[("RATE_BYTES", "1"), ("RATE_BURST", "1000")]);
    assert_eq!(status(&daemon, &v1("192.0.2.1"), "/key/900"), 200);
    for header in [v1("192.0.2.1"), v2_for("192.0.2.1", 0), v1("::ffff:192.0.2.1")] {
        assert_eq!(
            status(&daemon, &header, "/key/900"),
            429,
            "all versions and address forms share one limit"
        );
    }
    for header in [v1("192.0.2.2"), v2_for("2001:db8::1", 0), LOCAL.to_vec()] {
        assert_eq!(status(&daemon, &header, "/key/900"), 200);
    }
}

#[test]
fn stream_permits_count_for_the_client_in_the_header() {
    let daemon = start(&[("MAX_SIZE", "1073741824"), ("MAX_BULK_STREAMS", "4")]);
    let stream = |ip: &str| {
        let bytes = [v1(ip), request("/key/1073741824").into_bytes()].concat();
        let mut stream = through_proxy(&daemon, &bytes).stream;
        let mut status = [0; 12];
        stream.read_exact(&mut status).unwrap();
        (String::from_utf8(status[9..].to_vec()).unwrap(), stream)
    };
    let held = ["192.0.2.1", "192.0.2.1", "192.0.2.2", "192.0.2.3"].map(stream);
    assert_eq!(held.each_ref().map(|(status, _)| status.as_str()), ["200", "503", "200", "200"]);
}

#[test]
fn connections_count_for_the_client_in_the_header() {
    let daemon =
        start(&[("MAX_CONNECTIONS_PER_CLIENT", "2"), ("MAX_CONNECTIONS", "4"), ("HEAD_TIMEOUT", "3600")]);
    let open = |ip: &str| through_proxy(&daemon, &v1(ip));
    let held: Vec<_> = (0..2)
        .map(|_| {
            let mut client = open("192.0.2.1");
            // The start of another request keeps the connection busy: an idle one would be evicted.
            assert_eq!(client.send(request("/key/32") + "GET /key").response().status, 200);
            client
        })
        .collect();
    let get = |ip: &str, path: &str| unless_stalled(|| open(ip).send(request(path)).response());
    let refused = get("192.0.2.1", "/key/32");
    assert_eq!((refused.status, refused.header("connection")), (503, Some("close")));
    assert_eq!(get("192.0.2.1", "/health").status, 200, "health checks get a 200");
    // Up to eight over-limit connections may get a response, and the rest are closed. None holds a slot.
    let half = [v1("192.0.2.1").as_slice(), b"GET /key"].concat();
    let mut flood: Vec<_> = (0..40).map(|_| through_proxy(&daemon, &half)).collect();
    let closed = "http_rejections_total{reason=\"client_connections\"}";
    until("the rest to be closed", || {
        flood.push(through_proxy(&daemon, &half)); // those of a second ago have been closed on a busy machine
        (daemon.metric(closed) >= 30.0).then_some(())
    });
    let others: Vec<_> = ["192.0.2.2", "192.0.2.2"]
        .map(|ip| {
            let mut client = open(ip);
            assert_eq!(client.send(request("/key/32")).response().status, 200, "other clients have slots");
            client
        })
        .into();
    assert!(
        flood.iter_mut().all(Client::is_closed),
        "silent over-limit connections are closed after a second"
    );
    daemon.wait_for_metric("http_connections", 4.0);
    drop(held);
    until("a free slot", || (get("192.0.2.1", "/key/32").status == 200).then_some(()));
    drop(others);
    // Neither the proxy itself nor a proxy behind it has a limit.
    daemon.wait_for_metric("http_connections", 0.0);
    for header in [LOCAL.to_vec(), v1(PROXY)] {
        let held: Vec<_> = (0..4)
            .map(|_| {
                let mut client = through_proxy(&daemon, &header);
                assert_eq!(client.send(request("/key/32")).response().status, 200);
                client
            })
            .collect();
        drop(held);
        daemon.wait_for_metric("http_connections", 0.0);
    }
}

#[test]
fn a_client_over_its_limit_closes_no_idle_connection_of_others() {
    // A single worker registers an idle connection before it accepts another.
    let daemon = start(&[("MAX_CONNECTIONS_PER_CLIENT", "1"), ("MAX_CONNECTIONS", "2"), ("WORKERS", "1")]);
    let hold = |ip: &str| {
        unless_stalled(|| {
            let mut client = through_proxy(&daemon, &v1(ip));
            assert_eq!(client.send(request("/key/32")).response().status, 200);
            client
        })
    };
    let (mut oldest, mut other) = (hold("192.0.2.1"), hold("192.0.2.2"));
    for _ in 0..5 {
        assert_eq!(status(&daemon, &v1("192.0.2.2"), "/key/32"), 503);
    }
    assert_eq!(other.send(request("/key/32")).response().status, 200);
    assert_eq!(oldest.send(request("/key/32")).response().status, 200, "the connection is still open");
    // A client within its limit gets the slot of the longest idle connection; so does a peer that sends no header.
    drop(hold("192.0.2.3"));
    assert!(other.is_closed());
    daemon.wait_for_metric("http_connections", 1.0);
    let _held = hold("192.0.2.4");
    let without_header =
        unless_stalled(|| connect_with(&daemon, "127.0.0.2", request("/key/32").as_bytes()).response());
    assert_eq!(without_header.status, 200);
    assert!(oldest.is_closed());
}

#[test]
fn a_forwarded_address_counts_only_from_a_trusted_client() {
    let daemon = start(&[("AUDIT", "true")]);
    let request = "GET /key/32 HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: 203.0.113.7\r\n\r\n";
    for (n, (header, expected)) in [
        (v1("192.0.2.1"), "address=192.0.2.1 length"),
        (v1(PROXY), "address=203.0.113.7 proxy=127.0.0.9 length"),
        (LOCAL.to_vec(), "address=203.0.113.7 proxy=127.0.0.9 length"),
    ]
    .into_iter()
    .enumerate()
    {
        let mut client = through_proxy(&daemon, &header);
        assert_eq!(client.send(request).response().status, 200);
        let record = record(&daemon, n + 1);
        assert!(record.contains(expected), "{record}");
    }
}

#[test]
fn a_connection_without_a_header_does_not_delay_shutdown() {
    unless_stalled(shut_down_without_headers);
}

fn shut_down_without_headers() {
    let mut daemon = start(&[("HEAD_TIMEOUT", "3600"), ("DRAIN_TIMEOUT", "3600")]);
    let mut silent = through_proxy(&daemon, b"");
    let mut half = through_proxy(&daemon, &v2_for("192.0.2.1", 100)[..60]);
    let mut direct = connect_with(&daemon, "127.0.0.2", b"PRO");
    let mut idle = through_proxy(&daemon, &v1("192.0.2.1"));
    assert_eq!(idle.send(request("/key/32")).response().status, 200);
    // Half of its header has been sent when shutdown begins.
    let mut late = through_proxy(&daemon, b"PROXY TCP4 192.0.2.2 ");
    daemon.wait_for_metric("http_connections", 5.0);
    daemon.signal("TERM");
    daemon.manager.wait_for("STOPPING=1");
    let rest = [b"192.0.2.3 1 2\r\n".as_slice(), request("/key/32").as_bytes()].concat();
    assert_eq!(late.send(rest).response().status, 200);
    assert_eq!(daemon.wait(), 0);
    assert!([&mut silent, &mut half, &mut direct, &mut idle].into_iter().all(Client::is_closed));
    assert_eq!(warnings(&daemon), Vec::<String>::new());
    assert!(!daemon.log().contains("still open"), "{}", daemon.log());
}

#[test]
fn the_unix_socket_accepts_headers_too() {
    for trusted in ["unix", "192.0.2.9"] {
        let directory = TempDirectory::new();
        let path = directory.file("socket");
        let daemon = Daemon::start_with(directory, |command| {
            command.env("KEYSERVICE_HOST", format!("unix:{}", path.display())).args(["--metrics-port", "0"]);
            command.env("KEYSERVICE_PROXY_PROTOCOL", "true").env("KEYSERVICE_TRUSTED_PROXIES", trusted);
            command.env("KEYSERVICE_AUDIT", "true");
        });
        let send = |header: &[u8]| {
            let mut client = Client::new(UnixStream::connect(&path).unwrap());
            client.stream.set_read_timeout(Some(TIMEOUT)).unwrap();
            let sent = [header, b"GET /key/32 HTTP/1.1\r\nHost: a\r\n\r\n"].concat();
            for byte in sent {
                if client.stream.write_all(&[byte]).is_err() {
                    return None; // the connection was closed
                }
            }
            client.read_response(true).map(|response| response.status)
        };
        let statuses = [v1("192.0.2.1"), v2_for("192.0.2.1", 500), LOCAL.to_vec(), Vec::new()]
            .map(|header| send(&header));
        if trusted == "unix" {
            assert_eq!(statuses, [Some(200), Some(200), Some(200), None]);
            record(&daemon, 3); // a response is sent before its record is logged, so another worker's may come first
            let log = daemon.log();
            let records = || log.lines().filter(|line| line.contains("key issued"));
            assert_eq!(
                records().filter(|record| record.contains("address=192.0.2.1 length=32")).count(),
                2,
                "{log}"
            );
            assert_eq!(records().filter(|record| record.contains("peer_uid=")).count(), 1, "of LOCAL: {log}");
            assert_eq!(errors(&daemon), [0.0, 1.0, 0.0, 0.0]);
            assert!(warning(&daemon).contains("address=unix"));
        } else {
            assert_eq!(statuses, [None, None, None, Some(200)]);
            assert_eq!(errors(&daemon), [3.0, 0.0, 0.0, 0.0]);
        }
        // The health command sends a header if one is expected.
        unless_stalled(|| {
            let mut health = key_service(&daemon.directory);
            health.arg("--config").arg(daemon.directory.file("config.toml")).arg("health");
            health.env("KEYSERVICE_HOST", format!("unix:{}", path.display()));
            health.env("KEYSERVICE_PROXY_PROTOCOL", "true").env("KEYSERVICE_TRUSTED_PROXIES", trusted);
            let output = run_to_end(health);
            assert!(output.status.success(), "{trusted}: {}", String::from_utf8_lossy(&output.stderr));
        });
    }
}

#[test]
fn the_health_command_sends_a_header_if_it_is_trusted() {
    let authority = Authority::new();
    for trusted in ["127.0.0.1", PROXY] {
        for has_tls in [false, true] {
            let (held, port) = common::held_port();
            let directory = TempDirectory::new();
            authority.server().write(&directory);
            let (certificate, key) = (directory.file("cert.pem"), directory.file("key.pem"));
            let tls = if has_tls {
                format!("tls-cert = {certificate:?}\ntls-key = {key:?}\n")
            } else {
                String::new()
            };
            let config = format!(
                "host = \"127.0.0.1\"\nsrv-port = {port}\nmetrics-port = 0\nproxy-protocol = true\n\
                 trusted-proxies = [\"{trusted}\"]\n{tls}"
            );
            let file = directory.write("config.toml", &config);
            let daemon = Daemon::start_with(directory, |_| {});
            unless_stalled(|| {
                let mut health = key_service(&daemon.directory);
                health.arg("--config").arg(&file).arg("health");
                let output = run_to_end(health);
                assert!(output.status.success(), "{trusted}: {}", String::from_utf8_lossy(&output.stderr));
            });
            assert_eq!(errors(&daemon), [0.0; 4], "{trusted}");
            drop(held);
        }
    }
}

#[test]
fn metrics_on_the_same_port_need_the_header_too() {
    let (held, port) = common::held_port();
    let port = port.to_string();
    let daemon = Daemon::start_with(TempDirectory::new(), |command| {
        command.args(["--host", "127.0.0.1", "--srv-port", &port, "--metrics-port", &port]);
        command.env("KEYSERVICE_PROXY_PROTOCOL", "true").env("KEYSERVICE_TRUSTED_PROXIES", PROXY);
    });
    assert_eq!(status(&daemon, LOCAL, "/metrics"), 200);
    assert!(through_proxy(&daemon, request("/metrics").as_bytes()).is_closed());
    let scrape = get(daemon.keys(), "/metrics").text();
    assert_eq!(common::metric(&scrape, "proxy_protocol_errors_total{reason=\"missing\"}"), 1.0);
    drop(held);
}

#[test]
fn proxy_protocol_requires_trusted_proxies() {
    let check = |settings: &[(&str, &str)]| {
        let directory = TempDirectory::new();
        let mut command = key_service(&directory);
        command.arg("--check").arg("--config").arg(directory.write("config.toml", ""));
        for (name, value) in settings {
            command.env(format!("KEYSERVICE_{name}"), value);
        }
        let output = run_to_end(command);
        (output.status.code(), String::from_utf8([output.stderr, output.stdout].concat()).unwrap())
    };
    let (status, errors) = check(&[("PROXY_PROTOCOL", "true")]);
    assert_eq!(status, Some(78));
    let expected =
        "proxy-protocol: expected trusted-proxies beside it, found none (KEYSERVICE_PROXY_PROTOCOL)";
    assert!(errors.contains(expected), "{errors}");
    let (status, errors) = check(&[("PROXY_PROTOCOL", "v2")]);
    assert!(status == Some(78) && errors.contains("proxy-protocol: expected true or false"), "{errors}");
    let (status, printed) = check(&[("PROXY_PROTOCOL", "true"), ("TRUSTED_PROXIES", "10.0.0.0/8")]);
    assert!(status == Some(0) && printed.contains("proxy-protocol = true\n"), "{printed}");
}

#[test]
fn proxy_protocol_takes_effect_at_a_restart() {
    let directory = TempDirectory::new();
    directory.write("config.toml", "trusted-proxies = [\"127.0.0.9\"]\n");
    let daemon = Daemon::start_with(directory, |command| {
        command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
    });
    daemon.directory.write("config.toml", "trusted-proxies = [\"127.0.0.9\"]\nproxy-protocol = true\n");
    daemon.signal("HUP");
    daemon.manager.wait_for("RELOADING=1");
    daemon.manager.wait_for("READY=1");
    daemon.wait_for_log("setting=proxy-protocol");
    assert_eq!(connect_with(&daemon, PROXY, request("/key/32").as_bytes()).response().status, 200);
}

#[test]
fn an_audit_record_has_the_certificate_and_the_header_address() {
    let authority = Authority::new();
    let directory = TempDirectory::new();
    authority.server().write(&directory);
    let ca = directory.write("ca.pem", &authority.pem());
    let settings = [
        ("PROXY_PROTOCOL", "true"),
        ("TRUSTED_PROXIES", PROXY),
        ("AUDIT", "true"),
        ("TLS_CLIENT_CA", ca.to_str().unwrap()),
    ];
    let daemon = common::tls::start(directory, &settings);
    let config = client_config(&authority, &[&TLS13], Some(&authority.client("web")));
    let stream = through_proxy(&daemon, &v1("192.0.2.1")).stream;
    let name = ServerName::from(daemon.keys().ip());
    let mut client =
        Client::new(StreamOwned::new(ClientConnection::new(Arc::clone(&config), name).unwrap(), stream));
    assert_eq!(client.send(request("/key/32")).response().status, 200);
    let record = record(&daemon, 1);
    assert!(record.contains("CN:web"), "{record}");
    assert!(record.contains("address=192.0.2.1 "), "{record}");
}
