//! HTTP requests and responses in raw bytes.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::io::Write;

use common::{Client, Daemon, TempDirectory, exchange, get, request};

#[test]
fn a_key_has_exactly_the_requested_length() {
    let daemon = Daemon::start(&[("MAX_SIZE", "1048576")]);
    for length in [1, 2, 31, 32, 33, 128, 129, 1024, 65_536, 65_537, 200_000, 1_048_576] {
        let response = daemon.get(&format!("/key/{length}"));
        assert_eq!(response.status, 200);
        assert_eq!(response.body.len(), length);
        assert_eq!(response.header("content-length"), Some(&*length.to_string()));
    }
}

#[test]
fn two_keys_differ() {
    let daemon = Daemon::start(&[]);
    let keys: Vec<_> = (0..64).map(|_| daemon.get("/key/16").body).collect();
    for (n, key) in keys.iter().enumerate() {
        assert!(!keys[..n].contains(key));
    }
}

#[test]
fn the_headers_of_a_key_forbid_caching_and_ranges() {
    let daemon = Daemon::start(&[]);
    let response = daemon.get("/key/32");
    for (name, value) in [
        ("content-type", "application/octet-stream"),
        ("cache-control", "no-store"),
        ("x-content-type-options", "nosniff"),
        ("accept-ranges", "none"),
        ("vary", "Accept"),
    ] {
        assert_eq!(response.header(name), Some(value), "{name}");
    }
    for absent in ["transfer-encoding", "etag", "last-modified", "content-encoding", "server"] {
        assert_eq!(response.header(absent), None, "{absent}");
    }
}

/// close(2) with unread input resets the connection, and a reset discards what the client has not read yet.
#[test]
fn unread_requests_do_not_truncate_the_last_response() {
    let daemon = Daemon::start(&[]);
    for accept in ["", "Accept: application/octet-stream\r\n"] {
        let last = format!("GET /key/1024 HTTP/1.1\r\nHost: a\r\n{accept}Connection: close\r\n\r\n");
        let more = request("/key/32").repeat(250); // 10 kB, more than one read returns
        let mut client = Client::connect(daemon.keys());
        client.send(last + &more);
        let mut received = Vec::new();
        let result = std::io::Read::read_to_end(&mut client.stream, &mut received);
        let body = common::find(&received, b"\r\n\r\n").expect("a response") + 4;
        assert_eq!(received.len() - body, 1024, "{accept:?}, then {result:?}");
    }
}

/// An `Accept` that names the type sends a request to the slow path without changing its response.
#[test]
fn the_fast_path_and_the_slow_path_respond_alike() {
    let settings = [("MAX_SIZE", "65536"), ("RATE_REQUESTS", "1000000000"), ("RATE_BURST", "1")];
    for settings in [&settings[..1], &settings] {
        let daemon = Daemon::start(settings);
        for (length, header) in
            [("32", ""), ("1", ""), ("4096", ""), ("4097", ""), ("32", "Connection: close\r\n")]
        {
            let mut responses = ["", "Accept: application/octet-stream\r\n"].map(|accept| {
                exchange(
                    daemon.keys(),
                    format!("GET /key/{length} HTTP/1.1\r\nHost: a\r\n{accept}{header}\r\n"),
                )
            });
            for response in &mut responses {
                assert_eq!((response.status, response.body.len()), (200, length.parse().unwrap()));
                assert_eq!(response.header("ratelimit").is_some(), settings.len() > 1);
                response.headers.retain(|(name, _)| name != "date");
            }
            let [fast, slow] = responses;
            assert_eq!(fast.headers, slow.headers, "{length} {header}");
        }
    }
}

#[test]
fn a_length_that_is_not_an_integer_gets_400() {
    let daemon = Daemon::start(&[]);
    for length in [
        "abc", "-1", "+16", "016", "00", "1.5", "%31", "", "1e3", "0x10", "1_000", "32%20", "%00", "32;", "٣",
    ] {
        let response = exchange(daemon.keys(), request(&format!("/key/{length}")));
        assert_eq!(response.status, 400, "{length}");
        if length.is_ascii() {
            assert!(response.problem().starts_with("Invalid length: must be an integer"), "{length}");
        }
    }
}

#[test]
fn a_length_of_0_gets_400_with_the_minimum() {
    let response = Daemon::start(&[]).get("/key/0");
    assert_eq!(response.status, 400);
    assert_eq!(response.problem(), "Length must be at least 1");
    assert_eq!(response.json()["min"], 1);
}

#[test]
fn a_length_above_the_limit_gets_413_with_the_maximum() {
    let daemon = Daemon::start(&[("MAX_SIZE", "100")]);
    assert_eq!(daemon.get("/key/100").status, 200);
    let many = "9".repeat(5000);
    for length in ["101", "4294967297", "18446744073709551616", &many] {
        let response = daemon.get(&format!("/key/{length}"));
        assert_eq!(response.status, 413);
        assert_eq!(response.problem(), "Length exceeds maximum size of 100");
        assert_eq!(response.json()["max"], 100);
    }
}

#[test]
fn head_returns_the_headers_of_get_and_generates_no_key() {
    let daemon = Daemon::start(&[("MAX_SIZE", "1000000")]);
    for path in ["/key/32", "/key/1000000", "/health", "/livez", "/readyz", "/key/abc", "/nowhere"] {
        let mut client = Client::connect(daemon.keys());
        let head = client.send(request(path).replace("GET", "HEAD")).head_response();
        let get = client.send(request(path)).response(); // fails if a body follows the response to the HEAD
        assert_eq!(head.status, get.status, "{path}");
        let names = |response: &common::Response| {
            let mut names: Vec<_> =
                response.headers.iter().filter(|(name, _)| name != "date").cloned().collect();
            names.sort();
            names
        };
        assert_eq!(names(&head), names(&get), "{path}");
    }
    assert_eq!(daemon.metric("key_length_bytes_count"), 2.0, "two GETs generated keys, two HEADs did not");
    assert_eq!(daemon.metric("key_bytes_total{format=\"raw\"}"), 1_000_032.0);
}

#[test]
fn another_method_gets_405_with_allow() {
    let daemon = Daemon::start(&[]);
    for method in ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW", "get"] {
        for path in ["/key/32", "/health", "/livez", "/readyz"] {
            let bytes = format!("{method} {path} HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n");
            let response = exchange(daemon.keys(), bytes);
            assert_eq!(response.status, 405, "{method} {path}");
            assert_eq!(response.header("allow"), Some("GET, HEAD"));
            assert!(!response.problem().is_empty());
        }
    }
}

#[test]
fn an_unknown_path_gets_404() {
    let daemon = Daemon::start(&[]);
    let on_metrics_port =
        ": this port serves /metrics, /health, /livez and /readyz; keys are served on the key port";
    for (address, path, hint) in [
        (daemon.keys(), "//", "; try /"),
        (daemon.keys(), "/index.html", "; try /"),
        (daemon.keys(), "/key", "; try /key/32"),
        (daemon.keys(), "/key?size=64", "; try /key/32"),
        (daemon.keys(), "/key/64/", "; try /key/64"),
        (daemon.keys(), "/key/64/x", "; try /key/64"),
        (daemon.keys(), "/key/99999/", "; try /key/32"),
        (daemon.keys(), "//key/64", "; try /key/64"),
        (daemon.keys(), "/Key/64", "; try /key/64"),
        (daemon.keys(), "/keys/64", "; try /key/64"),
        (daemon.keys(), "/proxied/key/64", "; try /key/64"),
        (daemon.keys(), "/password", "; try /password/24"),
        (daemon.keys(), "/password/12/", "; try /password/12"),
        (daemon.keys(), "/metrics", ": metrics are served on the metrics port"),
        (daemon.keys(), "/health/", "; try /health"),
        (daemon.keys(), "/%6bey/32", ""),
        (daemon.keys(), "/nowhere", ""),
        (daemon.metrics(), "/", on_metrics_port),
        (daemon.metrics(), "/key/32", on_metrics_port),
        (daemon.metrics(), "/nowhere", on_metrics_port),
    ] {
        let fast = get(address, path);
        assert_eq!(fast.status, 404, "{path}");
        assert_eq!(fast.problem(), format!("Path not found{hint}"), "{path}");
        // HTTP/1.0 takes the slow path.
        let slow = exchange(address, format!("GET {path} HTTP/1.0\r\n\r\n"));
        assert_eq!((slow.status, slow.text()), (404, fast.text()), "{path}");
    }
    assert_eq!(exchange(daemon.keys(), "OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n").status, 404);
    let posted = exchange(daemon.keys(), request("/key").replace("GET", "POST"));
    assert_eq!((posted.status, &*posted.problem()), (404, "Path not found; try /key/32"));
}

#[test]
fn a_hint_names_a_path_that_works() {
    let daemon = Daemon::start(&[("MAX_SIZE", "8"), ("PAGE", "false")]);
    for path in
        ["/", "/key", "/key/", "/key/8/", "/key/9/", "/password/", "/passwords", "/openapi", "/healthz"]
    {
        let response = daemon.get(path);
        let detail = response.problem();
        let (_, hint) = detail.split_once("; try ").unwrap_or_else(|| panic!("{path}: {detail}"));
        assert_eq!(daemon.get(hint).status, 200, "{path}: {hint}");
    }
}

#[test]
fn an_unknown_query_parameter_gets_400_with_its_name() {
    let daemon = Daemon::start(&[]);
    for (query, name) in [
        ("size=1", "size"),
        ("format=hax", "hax"),
        ("Format=raw", "Format"),
        ("format=raw&x", "x"),
        ("=", "\"\""),
    ] {
        let response = daemon.get(&format!("/key/32?{query}"));
        assert_eq!(response.status, 400, "{query}");
        assert!(response.problem().contains(name), "{query}: {}", response.problem());
    }
    for query in ["", "format=raw"] {
        assert_eq!(daemon.get(&format!("/key/32?{query}")).body.len(), 32);
    }
    assert_eq!(daemon.get("/key/32?format=raw&format=raw").status, 400);
}

#[test]
fn an_unacceptable_type_gets_406_with_the_available_ones() {
    let daemon = Daemon::start(&[]);
    let accept = |value: &str| {
        exchange(daemon.keys(), format!("GET /key/32 HTTP/1.1\r\nHost: a\r\nAccept: {value}\r\n\r\n"))
    };
    for value in ["text/html", "application/octet-stream;q=0", "image/*"] {
        let response = accept(value);
        assert_eq!(response.status, 406, "{value}");
        assert!(response.problem().contains("application/octet-stream"));
    }
    for value in ["*/*", "application/octet-stream", "text/html, */*;q=0.1"] {
        assert_eq!(accept(value).status, 200, "{value}");
    }
}

#[test]
fn error_responses_forbid_caching() {
    let daemon = Daemon::start(&[]);
    for path in ["/key/0", "/key/99999", "/nowhere", "/key/1?x=1"] {
        let response = daemon.get(path);
        assert_eq!(response.header("cache-control"), Some("no-store"), "{path}");
        assert_eq!(response.header("x-content-type-options"), Some("nosniff"), "{path}");
    }
}

#[test]
fn ranges_conditions_and_compression_are_ignored() {
    let daemon = Daemon::start(&[]);
    for header in [
        "Range: bytes=0-3",
        "If-None-Match: *",
        "If-Modified-Since: Mon, 01 Jan 2035 00:00:00 GMT",
        "Accept-Encoding: gzip",
    ] {
        let response =
            exchange(daemon.keys(), format!("GET /key/32 HTTP/1.1\r\nHost: a\r\n{header}\r\n\r\n"));
        assert_eq!((response.status, response.body.len()), (200, 32), "{header}");
        assert_eq!(response.header("content-encoding"), None);
    }
}

#[test]
fn health_routes_return_ok_in_plain_text() {
    let daemon = Daemon::start(&[]);
    for path in ["/health", "/livez", "/readyz"] {
        for address in [daemon.keys(), daemon.metrics()] {
            let response = get(address, path);
            assert_eq!((response.status, &*response.text()), (200, "OK"), "{path}");
            assert_eq!(response.header("content-type"), Some("text/plain; charset=utf-8"));
            assert_eq!(response.header("cache-control"), Some("no-store"));
        }
    }
}

#[test]
fn a_request_may_arrive_byte_by_byte() {
    let daemon = Daemon::start(&[]);
    let mut client = Client::connect(daemon.keys());
    for byte in request("/key/32").bytes() {
        client.send([byte]);
    }
    assert_eq!(client.response().body.len(), 32);
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let daemon = Daemon::start(&[]);
    let mut client = Client::connect(daemon.keys());
    let requests: String = (1..=50).map(|length| request(&format!("/key/{length}"))).collect();
    client.send(requests);
    for length in 1..=50 {
        assert_eq!(client.response().body.len(), length);
    }
}

#[test]
fn a_connection_stays_open_until_the_client_closes_it() {
    let daemon = Daemon::start(&[]);
    let mut client = Client::connect(daemon.keys());
    client.send(request("/key/1")).response();
    client.send("GET /key/1 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").response();
    assert!(client.is_closed());
    let mut client = Client::connect(daemon.keys());
    assert_eq!(client.send("GET /key/1 HTTP/1.0\r\n\r\n").response().status, 200, "HTTP/1.0 needs no Host");
    assert!(client.is_closed());
}

#[test]
fn a_half_closed_client_still_gets_its_response() {
    let daemon = Daemon::start(&[("MAX_SIZE", "4000000")]);
    let mut client = Client::connect(daemon.keys());
    client.send(request("/key/4000000"));
    client.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(client.response().body.len(), 4_000_000);
}

#[test]
fn a_request_may_have_100_headers_within_16_kib() {
    let daemon = Daemon::start(&[]);
    // 99 headers and Host; their values are nearly 16 KiB.
    let headers = |length| (1..100).map(|n| format!("X-{n}: {}\r\n", "v".repeat(length))).collect::<String>();
    for path in ["/key/32", "/key/32?format=hex", "/health"] {
        for length in [1, 155] {
            let bytes = format!("GET {path} HTTP/1.1\r\nHost: a\r\n{}\r\n", headers(length));
            assert_eq!(exchange(daemon.keys(), &bytes).status, 200, "{path} with {} bytes", bytes.len());
        }
    }
}

#[test]
fn a_request_that_rfc_9112_forbids_closes_the_connection() {
    let daemon = Daemon::start(&[]);
    let long_path = "a".repeat(20_000);
    let many_headers = (0..100).map(|n| format!("X-{n}: v\r\n")).collect::<String>();
    let too_many_headers = (0..200).map(|n| format!("X-{n}: v\r\n")).collect::<String>();
    let large_header = "v".repeat(17_000);
    for (case, bytes, status) in [
        ("no Host", "GET /key/1 HTTP/1.1\r\n\r\n".into(), 400),
        ("two Hosts", "GET /key/1 HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n".into(), 400),
        ("a Host with a space", "GET /key/1 HTTP/1.1\r\nHost: a b\r\n\r\n".into(), 400),
        ("a Host with a path", "GET /key/1 HTTP/1.1\r\nHost: a/b\r\n\r\n".into(), 400),
        ("a Host with a user", "GET /key/1 HTTP/1.1\r\nHost: u@a\r\n\r\n".into(), 400),
        (
            "CL then TE",
            "GET /key/1 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".into(),
            400,
        ),
        (
            "TE then CL",
            "GET /key/1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n".into(),
            400,
        ),
        ("TE alone", "GET /key/1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".into(), 400),
        ("another TE", "GET /key/1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity\r\n\r\n".into(), 400),
        ("TE in HTTP/1.0", "GET /key/1 HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n".into(), 400),
        ("two lengths", "GET /key/1 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab".into(), 400),
        ("a signed length", "GET /key/1 HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\na".into(), 400),
        ("no version", "GET /key/1\r\nHost: a\r\n\r\n".into(), 400),
        ("another version", "GET /key/1 HTTP/3.0\r\nHost: a\r\n\r\n".into(), 400),
        ("two spaces", "GET  /key/1 HTTP/1.1\r\nHost: a\r\n\r\n".into(), 400),
        ("a space before the colon", "GET /key/1 HTTP/1.1\r\nHost : a\r\n\r\n".into(), 400),
        ("a folded header", "GET /key/1 HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n".into(), 400),
        ("a NUL in a header", "GET /key/1 HTTP/1.1\r\nHost: a\r\nX: \0\r\n\r\n".into(), 400),
        ("a bare CR in a header", "GET /key/1 HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n".into(), 400),
        ("not HTTP", "\x16\x03\x01\x02\0\x01\0\x01\r\n\r\n".into(), 400),
        ("101 headers", format!("GET /key/1 HTTP/1.1\r\nHost: a\r\n{many_headers}\r\n"), 431),
        ("200 headers", format!("GET /key/1 HTTP/1.1\r\nHost: a\r\n{too_many_headers}\r\n"), 431),
        ("a header of 17,000 bytes", format!("GET /key/1 HTTP/1.1\r\nHost: a\r\nX: {large_header}\r\n\r\n"), 431),
        ("a path of 20,000 bytes", format!("GET /{long_path} HTTP/1.1\r\nHost: a\r\n\r\n"), 431),
    ] {
        let mut client = Client::connect(daemon.keys());
        let _ = client.stream.write_all(bytes.as_bytes()); // the server may close the connection early
        // Bytes after the refused request must get no response.
        let response = client.read_response(true).unwrap_or_else(|| panic!("{case}: no response"));
        assert_eq!(response.status, status, "{case}");
        assert!(client.is_closed(), "{case}: the connection stays open");
    }
    assert_eq!(daemon.metric("key_length_bytes_count"), 0.0, "no request generated a key");
    // A request that hyper refuses is counted after its connection is closed, which the client may notice first.
    daemon.wait_for_metric("http_rejections_total{reason=\"malformed\"}", 24.0);
    for (status, count) in [(400, 20.0), (431, 4.0)] {
        daemon.wait_for_metric(&format!("http_responses_total{{status_code=\"{status}\"}}"), count);
    }
    // hyper answers a preface of HTTP/2 by closing the connection, so there is a rejection and no response.
    let mut client = Client::connect(daemon.keys());
    client.stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
    assert!(client.is_closed(), "the connection stays open");
    daemon.wait_for_metric("http_rejections_total{reason=\"malformed\"}", 25.0);
    assert_eq!(daemon.metric("http_responses_total{status_code=\"400\"}"), 20.0);
}

#[test]
fn the_body_of_a_get_is_not_parsed_as_a_request() {
    let daemon = Daemon::start(&[]);
    let mut client = Client::connect(daemon.keys());
    let inner = request("/key/7");
    let outer = format!("GET /key/5 HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n{inner}", inner.len());
    client.send(outer).send(request("/key/3"));
    assert_eq!(client.response().body.len(), 5);
    // Either the body was skipped, or the connection is closed; the key of 7 bytes is never served.
    if let Some(next) = client.read_response(true) {
        assert_eq!(next.body.len(), 3);
    }
    assert_eq!(daemon.metric("key_length_bytes_bucket{le=\"8\"}"), daemon.metric("key_length_bytes_count"));
}

#[test]
fn an_absolute_request_target_is_accepted() {
    let daemon = Daemon::start(&[]);
    let response = exchange(daemon.keys(), "GET http://localhost/key/32 HTTP/1.1\r\nHost: localhost\r\n\r\n");
    assert_eq!((response.status, response.body.len()), (200, 32));
}

#[test]
fn every_valid_host_is_accepted() {
    let daemon = Daemon::start(&[]);
    for host in ["", "localhost:1123", "[::1]:1123", "key-service.default.svc", "xn--nxasmq6b"] {
        let response = exchange(daemon.keys(), format!("GET /key/8 HTTP/1.1\r\nHost: {host}\r\n\r\n"));
        assert_eq!(response.status, 200, "{host}");
    }
}

#[test]
fn the_daemon_listens_on_ipv6() {
    if !common::has_ipv6() {
        return;
    }
    let daemon = Daemon::start_with(TempDirectory::new(), |command| {
        command.args(["--host", "::1", "--srv-port", "0", "--metrics-port", "0"]);
    });
    assert!(daemon.keys().is_ipv6() && daemon.metrics().is_ipv6());
    assert_eq!(daemon.get("/key/32").body.len(), 32);
    assert_eq!(get(daemon.metrics(), "/metrics").status, 200);
}

#[test]
fn the_daemon_listens_on_a_unix_socket() {
    use std::io::Read;
    let directory = TempDirectory::new();
    let path = directory.file("keys.sock");
    let daemon = Daemon::start_with(directory, |command| {
        command.arg("--host").arg(format!("unix:{}", path.display())).args(["--metrics-port", "0"]);
    });
    assert!(daemon.status.starts_with(&format!("Keys on unix:{}; metrics on 127.0.0.1:", path.display())));
    let mut stream = std::os::unix::net::UnixStream::connect(&path).unwrap();
    stream.write_all(b"GET /key/32 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").unwrap();
    let mut response = Vec::new();
    stream.read_to_end(&mut response).unwrap();
    let end = common::find(&response, b"\r\n\r\n").unwrap() + 4;
    assert!(response.starts_with(b"HTTP/1.1 200 OK\r\n"));
    assert_eq!(response.len() - end, 32);
    // A daemon replaces the socket file that a killed daemon left behind.
    let mut daemon = daemon;
    daemon.signal("KILL");
    common::until("the daemon to exit", || (!daemon.is_running()).then_some(()));
    let second = Daemon::start_with(TempDirectory::new(), |command| {
        command.arg("--host").arg(format!("unix:{}", path.display())).args(["--metrics-port", "0"]);
    });
    assert!(second.status.contains("Keys on unix:"));
}
