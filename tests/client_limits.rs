//! Limits per client, also behind a trusted proxy: rates, connections and streamed responses.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Instant;

use common::{Client, Daemon, IS_SLOW, Response, TIMEOUT, connect_from, request, until};

/// Sends one request from the address `source` of this host.
fn exchange_from(source: &str, to: SocketAddr, request: &str) -> Response {
    Client::from_tcp(connect_from(source, to)).send(request).response()
}

/// The status of one request from the address `source`.
fn status(daemon: &Daemon, source: &str, path: &str) -> u16 {
    exchange_from(source, daemon.keys(), &request(path)).status
}

fn request_with(path: &str, header: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: a\r\n{header}\r\n\r\n")
}

#[test]
fn each_address_has_its_own_rate_and_rate_limit_headers() {
    // On a slow machine, more than twenty requests may be served before the 429.
    let daemon = Daemon::start(&[("RATE_REQUESTS", "1"), ("RATE_BURST", "20"), ("RATE_BYTES", "1000000")]);
    let first = exchange_from("127.0.0.2", daemon.keys(), &request("/key/32"));
    assert_eq!(first.status, 200);
    assert_eq!(
        first.header("ratelimit-policy"),
        Some("\"requests\";q=20;w=20, \"bytes\";q=20000000;qu=\"content-bytes\";w=20")
    );
    assert_eq!(first.header("ratelimit"), Some("\"requests\";r=19;t=20, \"bytes\";r=19999968;t=20"));
    let refused = until("a 429", || {
        let response = exchange_from("127.0.0.2", daemon.keys(), &request("/key/32"));
        (response.status != 200).then_some(response)
    });
    assert_eq!(refused.status, 429);
    refused.problem();
    assert_eq!(refused.header("retry-after"), Some("1"));
    assert!(refused.header("ratelimit").unwrap().starts_with("\"requests\";r=0;t=1, "));
    assert!(refused.header("ratelimit-policy").is_some());
    assert_eq!(status(&daemon, "127.0.0.3", "/key/32"), 200, "another address is served");
    for path in ["/health", "/livez", "/readyz"] {
        assert_eq!(status(&daemon, "127.0.0.2", path), 200, "health is not limited");
    }
    assert!(daemon.metric("http_rejections_total{reason=\"rate\"}") >= 1.0);
    assert!(daemon.metric("http_responses_total{status_code=\"429\"}") >= 1.0);
}

#[test]
fn only_issued_keys_count_against_the_byte_rate() {
    let daemon = Daemon::start(&[("RATE_BYTES", "1"), ("RATE_BURST", "1000"), ("MAX_SIZE", "100000")]);
    let mut client = Client::from_tcp(connect_from("127.0.0.2", daemon.keys()));
    for _ in 0..20 {
        assert_eq!(client.send(request("/key/0")).response().status, 400);
        assert_eq!(client.send(request("/key/900").replace("GET", "HEAD")).head_response().status, 200);
    }
    assert_eq!(client.send(request("/key/900")).response().status, 200);
    let refused = client.send(request("/key/900")).response();
    assert_eq!(refused.status, 429);
    let wait: u32 = refused.header("retry-after").unwrap().parse().unwrap();
    assert!((700..=800).contains(&wait), "{wait}");
    // A key larger than the burst needs the full burst.
    let large = exchange_from("127.0.0.3", daemon.keys(), &request("/key/100000"));
    assert_eq!((large.status, large.body.len()), (200, 100_000));
    let after = exchange_from("127.0.0.3", daemon.keys(), &request("/key/1"));
    let wait: u32 = after.header("retry-after").unwrap().parse().unwrap();
    assert!((98_000..=99_001).contains(&wait), "all of its bytes count: {wait}");
}

#[test]
fn a_reload_changes_the_rates() {
    let directory = common::TempDirectory::new();
    directory.write("config.toml", "");
    let daemon = Daemon::start_with(directory, |command| {
        command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
    });
    let statuses = || (0..30).map(|_| daemon.get("/key/1").status).collect::<Vec<_>>();
    assert_eq!(statuses(), [200; 30]);
    for (text, is_refused) in [("rate-requests = 1\nrate-burst = 3\n", true), ("", false)] {
        daemon.directory.write("config.toml", text);
        daemon.signal("HUP");
        daemon.manager.wait_for("RELOADING=1");
        daemon.manager.wait_for("READY=1");
        assert_eq!(statuses().contains(&429), is_refused, "{text}");
    }
}

#[test]
fn only_a_trusted_proxy_can_forward_an_address() {
    let settings = [("RATE_REQUESTS", "1"), ("RATE_BURST", "2"), ("TRUSTED_PROXIES", "127.0.0.8/29, ::1")];
    let daemon = Daemon::start(&settings);
    // The number of 429s in thirty requests: 0 if each counts for a different client.
    let refused = |source: &str, header: &dyn Fn(usize) -> String| {
        (0..30)
            .filter(|n| {
                let request = request_with("/key/1", &header(*n));
                exchange_from(source, daemon.keys(), &request).status == 429
            })
            .count()
    };
    assert_eq!(refused("127.0.0.9", &|n| format!("X-Forwarded-For: 192.0.2.{n}")), 0);
    assert!(
        refused("127.0.0.2", &|n| format!("X-Forwarded-For: 192.0.2.{n}")) > 0,
        "the peer is not a trusted proxy"
    );
    assert!(
        refused("127.0.0.9", &|n| format!("X-Forwarded-For: 198.51.100.{n}, 203.0.113.1")) > 0,
        "the rightmost address is the client"
    );
    assert_eq!(
        refused("127.0.0.9", &|n| format!("X-Forwarded-For: 203.0.114.{n}, 127.0.0.10")),
        0,
        "through two proxies"
    );
    assert!(
        refused("127.0.0.9", &|n| format!("X-Forwarded-For: 2001:db8::{n}")) > 0,
        "an IPv6 network is one client"
    );
    assert!(
        refused("127.0.0.11", &|n| format!("X-Forwarded-For: made-up-{n}")) > 0,
        "a malformed element counts for the proxy"
    );
    assert!(
        refused("127.0.0.12", &|n| format!("Forwarded: for=192.0.3.{n}")) > 0,
        "the other header is not read"
    );
}

#[test]
fn bytes_left_of_the_client_do_not_change_its_address() {
    let left: [&[u8]; 5] = [b"\xe9", b"\xff\xfe\"", b"x=\"", b"a\"b\\", b"for=\"\xc3"];
    for (header, element) in [("X-Forwarded-For", ""), ("Forwarded", "for=")] {
        let trusted = [("TRUSTED_PROXIES", "127.0.0.1"), ("FORWARDED_HEADER", &header.to_lowercase())];
        let daemon = Daemon::start(&[&[("RATE_REQUESTS", "1"), ("RATE_BURST", "2")], &trusted[..]].concat());
        for separator in [", ".to_owned(), format!("\r\n{header}: ")] {
            let mut client = Client::connect(daemon.keys());
            for n in 0..30 {
                let start = format!("GET /key/1 HTTP/1.1\r\nHost: a\r\n{header}: ");
                let end = format!("{separator}{element}192.0.2.{}\r\n\r\n", n + separator.len() % 7 * 32);
                let request = [start.as_bytes(), left[n % left.len()], end.as_bytes()].concat();
                assert_eq!(client.send(&request).response().status, 200, "{}", request.escape_ascii());
            }
        }
    }
}

#[test]
fn a_million_addresses_use_no_more_memory_and_reset_no_limit() {
    let clients: u32 = if IS_SLOW { 1_000 } else { 1_000_000 };
    let settings = [
        ("RATE_REQUESTS", "1"),
        ("RATE_BURST", "3600"),
        ("RATE_BYTES", "1"),
        ("TRUSTED_PROXIES", "127.0.0.1"),
        ("MAX_SIZE", "4000"),
        ("LOG_LEVEL", "error"),
    ];
    let daemon = Daemon::start(&settings);
    let spend = request_with("/key/3600", "X-Forwarded-For: 203.0.113.7");
    assert_eq!(exchange_from("127.0.0.1", daemon.keys(), &spend).status, 200);
    assert_eq!(exchange_from("127.0.0.1", daemon.keys(), &spend).status, 429);
    let before = daemon.metric("process_resident_memory_bytes");
    let started = Instant::now();
    let stream = TcpStream::connect(daemon.keys()).unwrap();
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    let mut writer = stream.try_clone().unwrap();
    let mut reader = BufReader::new(stream);
    // Pipelined HEAD requests: a million responses without a body in a few seconds.
    let sender = std::thread::spawn(move || {
        for chunk in 0..clients / 1000 {
            let mut batch = String::new();
            for n in 0..1000 {
                let [a, b, c, d] = (0x6400_0000 + chunk * 1000 + n).to_be_bytes();
                batch.push_str(&format!(
                    "HEAD /key/1 HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: {a}.{b}.{c}.{d}\r\n\r\n"
                ));
            }
            writer.write_all(batch.as_bytes()).unwrap();
        }
    });
    let mut responses = [0u32; 2];
    let mut line = String::new();
    while responses.iter().sum::<u32>() < clients {
        line.clear();
        assert!(reader.read_line(&mut line).unwrap() > 0, "the connection was closed after {responses:?}");
        match line.trim_end() {
            "HTTP/1.1 200 OK" => responses[0] += 1,
            "HTTP/1.1 429 Too Many Requests" => responses[1] += 1,
            other => assert!(!other.starts_with("HTTP/"), "{other}"),
        }
    }
    sender.join().unwrap();
    let after = daemon.metric("process_resident_memory_bytes");
    eprintln!(
        "{clients} forwarded addresses in {:.1?}: {} times 200, {} times 429; resident before {:.1} MB, after {:.1} MB",
        started.elapsed(),
        responses[0],
        responses[1],
        before / 1e6,
        after / 1e6
    );
    assert!(after - before < 16e6, "{before} {after}");
    assert_eq!(
        exchange_from("127.0.0.1", daemon.keys(), &spend).status,
        429,
        "the limited client is still limited"
    );
}

#[test]
fn one_address_cannot_take_every_connection() {
    let daemon = Daemon::start(&[("MAX_CONNECTIONS_PER_CLIENT", "3"), ("HEAD_TIMEOUT", "3600")]);
    let mut held: Vec<_> =
        (0..3).map(|_| Client::from_tcp(connect_from("127.0.0.2", daemon.keys()))).collect();
    for client in &mut held {
        assert_eq!(client.send(request("/key/32")).response().status, 200);
    }
    let mut over_limit = Client::from_tcp(connect_from("127.0.0.2", daemon.keys()));
    let refused = over_limit.send(request("/key/32")).response();
    assert_eq!((refused.status, refused.header("connection")), (503, Some("close")));
    assert!(refused.header("retry-after").is_some());
    assert_eq!(status(&daemon, "127.0.0.2", "/health"), 200, "health checks get a 200");
    assert_eq!(status(&daemon, "127.0.0.3", "/key/32"), 200, "others are served");
    // Most of these are closed without a response. None takes a slot of another client.
    let mut flood: Vec<_> = (0..100).map(|_| connect_from("127.0.0.2", daemon.keys())).collect();
    until("the rest to be closed", || {
        (daemon.metric("http_rejections_total{reason=\"client_connections\"}") >= 50.0).then_some(())
    });
    until("the over-limit connections to close", || {
        (daemon.metric("http_connections") <= 3.0 + 8.0).then_some(())
    });
    let closed = flood
        .iter_mut()
        .map(|stream| stream.read(&mut [0]))
        .filter(|read| matches!(read, Ok(0) | Err(_)))
        .count();
    assert_eq!(closed, 100, "the over-limit connections are closed after a second of silence");
    drop((held, flood));
    until("a free slot", || (status(&daemon, "127.0.0.2", "/key/32") == 200).then_some(()));
}

#[test]
fn a_trusted_proxy_has_no_connection_limit() {
    let daemon = Daemon::start(&[("MAX_CONNECTIONS_PER_CLIENT", "1"), ("TRUSTED_PROXIES", "127.0.0.9")]);
    let held: Vec<_> = (0..50)
        .map(|_| {
            let mut client = Client::from_tcp(connect_from("127.0.0.9", daemon.keys()));
            assert_eq!(client.send(request("/key/1")).response().status, 200);
            client
        })
        .collect();
    drop(held);
}

/// Opens a connection, and reads only the status line of a streamed response.
fn open_stalled_stream(address: &str, daemon: &Daemon, path: &str) -> TcpStream {
    let mut stream = connect_from(address, daemon.keys());
    stream.write_all(request(path).as_bytes()).unwrap();
    let mut status = [0; 12];
    stream.read_exact(&mut status).unwrap();
    assert_eq!(&status, b"HTTP/1.1 200", "{path}");
    stream
}

#[test]
fn a_large_response_without_a_stream_permit_gets_503_at_once() {
    let daemon =
        Daemon::start(&[("MAX_SIZE", "1073741824"), ("MAX_BULK_STREAMS", "8"), ("RATE_REQUESTS", "1000000")]);
    let mut held: Vec<_> = (0..8)
        .map(|n| open_stalled_stream(&format!("127.0.0.{}", 2 + n / 2), &daemon, "/key/1073741824"))
        .collect();
    let mut times = Vec::new();
    for _ in 0..50 {
        let started = Instant::now();
        let refused = daemon.get("/key/65537");
        times.push(started.elapsed());
        assert_eq!(refused.status, 503);
        assert_eq!(refused.problem(), "Too many large responses are being sent");
        assert!(refused.header("retry-after").is_some());
        assert_eq!(daemon.get("/key/16384").status, 200, "a response of 16 KiB needs no permit");
    }
    times.sort();
    let started = Instant::now();
    assert_eq!(daemon.get("/health").status, 200);
    eprintln!(
        "with every permit held: 503 after {:.2?} in the median, {:.2?} at most (of {}); /health after {:.2?}",
        times[times.len() / 2],
        times[times.len() - 1],
        times.len(),
        started.elapsed()
    );
    let head = request("/key/65537").replace("GET", "HEAD");
    assert_eq!(
        Client::connect(daemon.keys()).send(head).head_response().status,
        200,
        "a HEAD request needs no permit"
    );
    assert_eq!(daemon.metric("http_rejections_total{reason=\"bulk\"}"), 50.0);
    drop(held.pop());
    until("the permit of the closed connection", || (daemon.get("/key/65537").status == 200).then_some(()));
    // A permit is also released when the whole response has been read.
    for _ in 0..5 {
        until("the permit", || (daemon.get("/key/100000").status == 200).then_some(()));
    }
}

#[test]
fn every_response_above_16_kib_needs_a_client_permit() {
    let daemon = Daemon::start(&[("MAX_SIZE", "1073741824"), ("MAX_BULK_STREAMS", "8")]);
    let large = [
        "/key/16385",
        "/key/8192?format=hex",
        "/key/12500?format=base64",
        "/key/12400?format=json",
        "/key/32?count=1024&format=hex",
        "/key/32?count=1024&format=jwk",
        "/key/64?count=1024&format=json",
        "/password/24?count=1000",
    ];
    for path in large {
        assert_eq!(daemon.get(path).status, 200, "{path}");
    }
    // The client's quarter of eight permits, held as long as it reads nothing.
    let held = [0, 1].map(|_| open_stalled_stream("127.0.0.2", &daemon, "/key/1073741824"));
    for path in large {
        let refused = exchange_from("127.0.0.2", daemon.keys(), &request(path));
        assert_eq!((refused.status, refused.header("retry-after")), (503, Some("1")), "{path}");
        assert_eq!(status(&daemon, "127.0.0.3", path), 200, "{path} for another client");
    }
    for path in ["/key/16384", "/key/32?count=200&format=hex", "/key/4096?format=hex", "/health"] {
        assert_eq!(status(&daemon, "127.0.0.2", path), 200, "{path} needs no permit");
    }
    drop(held);
}

#[test]
fn permits_count_for_the_client_behind_a_trusted_proxy() {
    let daemon = Daemon::start(&[
        ("MAX_SIZE", "1073741824"),
        ("MAX_BULK_STREAMS", "4"),
        ("TRUSTED_PROXIES", "127.0.0.9"),
    ]);
    let open = |client: &str| {
        let mut stream = connect_from("127.0.0.9", daemon.keys());
        let path = "/key/1073741824";
        let text = format!("GET {path} HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: {client}\r\n\r\n");
        stream.write_all(text.as_bytes()).unwrap();
        let mut status = [0; 12];
        stream.read_exact(&mut status).unwrap();
        (String::from_utf8(status[9..].to_vec()).unwrap(), stream)
    };
    let held: Vec<_> = ["192.0.2.1", "192.0.2.1", "192.0.2.2", "192.0.2.3"].map(open).into();
    let statuses: Vec<_> = held.iter().map(|(status, _)| status.as_str()).collect();
    assert_eq!(statuses, ["200", "503", "200", "200"]);
}

#[test]
fn invalid_access_settings_are_errors() {
    for (name, value, expected) in [
        ("RATE_REQUESTS", "-1", "expected a whole number from 0"),
        ("RATE_BURST", "0", "expected a duration from 1s to 1h"),
        ("TRUSTED_PROXIES", "localhost", "expected an IP address, a network"),
        ("TRUSTED_PROXIES", "10.0.0.0/33", "expected an IP address, a network"),
        ("FORWARDED_HEADER", "x-real-ip", "expected one of x-forwarded-for, forwarded"),
        ("MAX_BULK_STREAMS", "0", "expected a whole number from 1"),
        ("UNIX_MODE", "0888", "expected a mode in octal digits"),
        ("UNIX_MODE", "7777", "expected a mode in octal digits"),
        ("AUDIT", "yes", "expected true or false"),
    ] {
        let directory = common::TempDirectory::new();
        let mut command = common::key_service(&directory);
        command.arg("--check").arg("--config").arg(directory.file("config.toml"));
        command.env(format!("KEYSERVICE_{name}"), value);
        let output = common::run_to_end(command);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(78), "{name}={value}");
        assert!(errors.contains(expected) && errors.contains(&format!("(KEYSERVICE_{name})")), "{errors}");
    }
    let directory = common::TempDirectory::new();
    let mut command = common::key_service(&directory);
    command.arg("--check").arg("--config").arg(directory.file("config.toml"));
    command.env("KEYSERVICE_UNIX_TRUST", "true").env("KEYSERVICE_TRUSTED_PROXIES", "unix");
    let errors = String::from_utf8(common::run_to_end(command).stderr).unwrap();
    assert!(errors.contains("unix-trust: expected false where trusted-proxies has unix"), "{errors}");
    let file = "trusted-proxies = [\"10.0.0.1\", \"2001:db8::/32\", \"unix\"]\nunix-mode = \"600\"\n";
    let mut command = common::key_service(&directory);
    command.arg("--check").arg("--config").arg(directory.write("config.toml", file));
    let printed = String::from_utf8(common::run_to_end(command).stdout).unwrap();
    assert!(
        printed.contains("trusted-proxies = [\"10.0.0.1/32\", \"2001:db8::/32\", \"unix\"]\n"),
        "{printed}"
    );
    assert!(printed.contains("unix-mode = \"0600\"\n"), "{printed}");
}
