//! What Prometheus reads.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use common::{Daemon, exchange, get, request, until};

#[test]
fn answers_are_counted_by_status_and_route() {
    let daemon = Daemon::start(&[("MAX_SIZE", "100000")]);
    for path in ["/key/32", "/key/32", "/key/100000", "/key/0", "/key/100001", "/health", "/nowhere"] {
        daemon.get(path);
    }
    // A short key is counted once it is sent, when its client may have it already.
    let mut scrapes = 0.0;
    let text = until("the last answer to be counted", || {
        scrapes += 1.0;
        let text = get(daemon.metrics(), "/metrics").text();
        let answers = common::metric(&text, "request_latency_seconds_count{endpoint=\"/key/{length}\"}");
        (answers == 5.0).then_some(text)
    });
    for (series, value) in [
        ("http_responses_total{status_code=\"200\"}", 3.0 + scrapes),
        ("http_responses_total{status_code=\"400\"}", 1.0),
        ("http_responses_total{status_code=\"404\"}", 1.0),
        ("http_responses_total{status_code=\"413\"}", 1.0),
        ("request_latency_seconds_count{endpoint=\"/health\"}", 1.0),
        ("request_latency_seconds_count{endpoint=\"other\"}", 1.0),
        ("key_length_bytes_count", 3.0),
        ("key_length_bytes_sum", 100_064.0),
        ("key_length_bytes_bucket{le=\"32\"}", 2.0),
        ("key_bytes_total{format=\"raw\"}", 100_064.0),
        ("generator_healthy", 1.0),
        ("http_requests_in_flight", 1.0), // the scrape itself
    ] {
        assert_eq!(common::metric(&text, series), value, "{series}");
    }
    assert_eq!(
        daemon.metric("http_responses_total{status_code=\"200\"}"),
        4.0 + scrapes,
        "a scrape counts once it is done"
    );
}

#[test]
fn no_path_and_no_client_makes_a_series() {
    let daemon = Daemon::start(&[]);
    let series = |text: &str| text.lines().filter(|line| !line.starts_with('#')).count();
    let before = series(&get(daemon.metrics(), "/metrics").text());
    for n in 0..50 {
        daemon.get(&format!("/made-up-{n}"));
        daemon.get(&format!("/key/made-up-{n}"));
        exchange(
            daemon.keys(),
            format!("GET /key/1 HTTP/1.1\r\nHost: made-up-{n}\r\nUser-Agent: made-up-{n}\r\n\r\n"),
        );
        exchange(daemon.keys(), format!("MADEUP{n} /key/1 HTTP/1.1\r\nHost: a\r\n\r\n"));
    }
    let text = get(daemon.metrics(), "/metrics").text();
    assert_eq!(series(&text), before);
    assert!(!text.contains("made-up"), "{text}");
}

#[test]
fn no_key_byte_is_in_the_metrics_or_the_log() {
    let daemon = Daemon::start(&[("LOG_LEVEL", "trace")]);
    let keys: Vec<_> = (0..50).map(|_| daemon.get("/key/32").body).collect();
    let texts = [get(daemon.metrics(), "/metrics").text(), daemon.log()];
    for key in keys {
        let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
        let list = format!("{:?}", &key[..8]);
        for text in &texts {
            assert!(!text.contains(&hex[..12]) && !text.contains(list.trim_matches(['[', ']'])));
        }
    }
}

#[test]
fn the_process_and_the_build_are_described() {
    let daemon = Daemon::start(&[]);
    let text = get(daemon.metrics(), "/metrics").text();
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(common::metric(&text, &format!("build_info{{version=\"{version}\"}}")), 1.0);
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    let started = common::metric(&text, "process_start_time_seconds");
    assert!((now - started).abs() < 60.0, "{started} {now}");
    for name in
        ["process_cpu_seconds_total", "process_open_fds", "process_resident_memory_bytes", "process_threads"]
    {
        assert!(common::metric(&text, name) > 0.0, "{name}");
    }
    let open = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    let told = common::metric(&text, "process_open_fds");
    // The scrape's own connection is gone by now.
    assert!((told - f64::from(u32::try_from(open).unwrap())).abs() <= 2.0, "{told} {open}");
}

#[test]
fn metrics_have_the_type_that_prometheus_expects_and_are_not_on_the_key_port() {
    let daemon = Daemon::start(&[]);
    let response = get(daemon.metrics(), "/metrics");
    assert_eq!(response.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    assert_eq!(daemon.get("/metrics").status, 404);
    assert_eq!(get(daemon.metrics(), "/key/32").status, 404, "nor are keys on the metrics port");
    assert_eq!(exchange(daemon.metrics(), request("/metrics").replace("GET", "POST")).status, 405);
}
