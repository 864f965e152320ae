//! The metrics that Prometheus scrapes: their values, labels and documentation.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;

use common::{Client, Daemon, exchange, get, request, unless_stalled, until};

#[test]
fn responses_are_counted_by_status_and_route() {
    let daemon = Daemon::start(&[("MAX_SIZE", "100000")]);
    for path in ["/key/32", "/key/32", "/key/100000", "/key/0", "/key/100001", "/health", "/nowhere"] {
        daemon.get(path);
    }
    // A request is in flight until its response is sent, which its client may notice first.
    let mut scrapes = 0.0;
    let text = until("the last response to end", || {
        scrapes += 1.0;
        let text = get(daemon.metrics(), "/metrics").text();
        (common::metric(&text, "http_requests_in_flight") == 1.0).then_some(text) // the scrape itself
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
        "a scrape is counted when it is complete"
    );
}

/// The reasons why a request for a key or a password fails.
const REASONS: [&str; 5] = ["connections", "client_connections", "generator", "draining", "bulk"];

/// The number of responses to requests for keys and passwords, and the number of failures by reason: the alerting rules
/// divide the two.
fn key_requests(metrics: &str) -> (f64, [f64; 5]) {
    let responses = ["/key/{length}", "/password/{length}"].map(|route| {
        common::metric(metrics, &format!("request_latency_seconds_count{{endpoint=\"{route}\"}}"))
    });
    let failed = REASONS
        .map(|reason| common::metric(metrics, &format!("key_request_failures_total{{reason=\"{reason}\"}}")));
    (responses.iter().sum(), failed)
}

/// The number of responses of all other routes.
fn other_requests(metrics: &str) -> f64 {
    ["/", "/openapi.json", "/health", "/livez", "/readyz", "/metrics", "other"]
        .iter()
        .map(|route| {
            common::metric(metrics, &format!("request_latency_seconds_count{{endpoint=\"{route}\"}}"))
        })
        .sum()
}

/// `count` failures for `reason` and none for the others.
fn failures(reason: &str, count: usize) -> [f64; 5] {
    REASONS.map(|other| if other == reason { count as f64 } else { 0.0 })
}

/// Sends a GET for `target`, or a HEAD if `target` is `HEAD` and a path, and returns the status of the response.
fn status_of(daemon: &Daemon, target: &str) -> u16 {
    unless_stalled(|| {
        let mut client = Client::connect(daemon.keys());
        match target.strip_prefix("HEAD ") {
            Some(path) => client.send(request(path).replace("GET", "HEAD")).head_response().status,
            None => client.send(request(target)).response().status,
        }
    })
}

/// A client that holds its slot: it has received a key and begun another request.
fn busy_client(daemon: &Daemon) -> TcpStream {
    let mut client = Client::connect(daemon.keys());
    assert_eq!(client.send(request("/key/32") + "GET /key/32 HTTP/1.1\r\n").response().status, 200);
    client.stream
}

/// A client that holds its permit: it has begun to read a streamed key.
fn streaming_client(daemon: &Daemon) -> TcpStream {
    let mut stream = TcpStream::connect(daemon.keys()).unwrap();
    stream.write_all(request("/key/1073741824").as_bytes()).unwrap();
    stream.read_exact(&mut [0; 12]).unwrap();
    stream
}

#[test]
fn a_failed_key_request_counts_once_as_request_and_failure() {
    let short = [
        "/key/32",
        "HEAD /key/32",
        "/key/16?count=3&format=hex",
        "/key/20000",
        "/password/16",
        "HEAD /password/16",
        "/password/24?count=1000",
    ];
    let large = ["/key/20000", "/key/32?count=1024&format=hex", "/password/24?count=1000"];
    for (reason, setting, hold, targets) in [
        ("connections", ("MAX_CONNECTIONS", "1"), busy_client as fn(&Daemon) -> TcpStream, &short[..]),
        ("client_connections", ("MAX_CONNECTIONS_PER_CLIENT", "1"), busy_client, &short),
        ("bulk", ("MAX_BULK_STREAMS", "1"), streaming_client, &large),
    ] {
        let daemon = Daemon::start(&[setting, ("HEAD_TIMEOUT", "3600"), ("MAX_SIZE", "1073741824")]);
        let held = hold(&daemon);
        let others = ["/", "/openapi.json", "/health", "/livez", "/readyz", "/nowhere", "/key/32/x", "/keys"];
        let statuses = others.map(|path| status_of(&daemon, path));
        assert_eq!(statuses[2..5], [200; 3], "{reason}: health");
        for path in ["/key/32", "/key/{length}", "/password/{length}", "/readyz", "/nowhere"] {
            get(daemon.metrics(), path);
        }
        for target in targets {
            assert_eq!(status_of(&daemon, target), 503, "{reason}: {target}");
        }
        let counted = if reason == "bulk" { 0 } else { 1 }; // a stream is counted when it ends
        let mut scrapes = 0;
        until("all requests to be counted", || {
            let text = get(daemon.metrics(), "/metrics").text();
            let done = ((targets.len() + counted) as f64, failures(reason, targets.len()));
            let others = (others.len() + 5 + scrapes) as f64;
            scrapes += 1;
            let (requests, failed) = key_requests(&text);
            assert!(requests <= done.0 && other_requests(&text) <= others, "{reason}: {text}");
            (requests == done.0 && other_requests(&text) == others)
                .then(|| assert_eq!(failed, done.1, "{reason}"))
        });
        drop(held);
        until("the slot or permit to be free", || (status_of(&daemon, targets[0]) == 200).then_some(()));
    }
}

#[test]
fn a_stream_refused_while_draining_counts_as_a_failure() {
    unless_stalled(stream_refused_while_draining);
}

fn stream_refused_while_draining() {
    let mut daemon =
        Daemon::start(&[("DRAIN_TIMEOUT", "3600"), ("HEAD_TIMEOUT", "3600"), ("MAX_SIZE", "20000")]);
    let begin_request = |to, path: &str| {
        let mut client = Client::connect(to);
        client.send(&request(path)[..request(path).len() - 2]);
        client
    };
    // No connection is accepted after the drain has begun.
    let paths = ["/key/20000", "/password/24?count=1000"].repeat(10);
    let mut waiting: Vec<_> = paths.iter().map(|path| begin_request(daemon.keys(), path)).collect();
    let mut scrape = begin_request(daemon.metrics(), "/metrics");
    until("all to be accepted", || (daemon.metric("http_connections") == 20.0).then_some(()));
    daemon.signal("TERM");
    daemon.manager.wait_for("STOPPING=1");
    // The listener closes after large responses are refused.
    until("the drain to begin", || TcpStream::connect(daemon.keys()).is_err().then_some(()));
    // The daemon waits for the rest of the requests for a second.
    for client in &mut waiting {
        client.send("\r\n");
    }
    for (client, path) in waiting.iter_mut().zip(&paths) {
        assert_eq!(client.response().status, 503, "{path}");
    }
    let text = scrape.send("\r\n").response().text();
    assert_eq!(key_requests(&text), (20.0, failures("draining", 20)));
    assert_eq!(daemon.wait(), 0);
}

#[test]
fn client_errors_do_not_count_as_failures() {
    // A key of 1,000 bytes uses up the rate of 1,000 seconds.
    let daemon = Daemon::start(&[("RATE_BYTES", "1"), ("RATE_BURST", "1")]);
    let paths = ["/key/0", "/key/2048", "/password/x", "/key/32?format=x", "/key/1000", "/key/1000"];
    let statuses = paths.map(|path| status_of(&daemon, path));
    assert_eq!(statuses, [400, 413, 400, 400, 200, 429]);
    until("the requests to be counted", || {
        (key_requests(&get(daemon.metrics(), "/metrics").text()) == (6.0, [0.0; 5])).then_some(())
    });
}

#[test]
fn no_path_or_client_creates_a_series() {
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
fn process_and_build_metrics_have_plausible_values() {
    let daemon = Daemon::start(&[]);
    let text = get(daemon.metrics(), "/metrics").text();
    let (version, commit) = (env!("CARGO_PKG_VERSION"), env!("KEY_SERVICE_VERSION_COMMIT"));
    let build_info = format!("build_info{{commit=\"{commit}\",version=\"{version}\"}}");
    assert_eq!(common::metric(&text, &build_info), 1.0);
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs_f64();
    let started = common::metric(&text, "process_start_time_seconds");
    assert!((now - started).abs() < 60.0, "{started} {now}");
    for name in
        ["process_cpu_seconds_total", "process_open_fds", "process_resident_memory_bytes", "process_threads"]
    {
        assert!(common::metric(&text, name) > 0.0, "{name}");
    }
    assert_eq!(common::metric(&text, "workers_healthy"), 1.0);
    // The daemon is in the control group of the test. Not every kernel shows it.
    if text.contains("cgroup_memory_") {
        assert!(common::metric(&text, "cgroup_memory_usage_bytes") > 1e6);
        assert!(common::metric(&text, "cgroup_memory_limit_bytes") > 1e6);
    }
    let open = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap().count();
    let reported = common::metric(&text, "process_open_fds");
    // The connection of the scrape is closed by now.
    assert!((reported - f64::from(u32::try_from(open).unwrap())).abs() <= 2.0, "{reported} {open}");
}

#[test]
fn metrics_have_their_own_port_and_media_type() {
    let daemon = Daemon::start(&[]);
    let response = get(daemon.metrics(), "/metrics");
    assert_eq!(response.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    assert_eq!(daemon.get("/metrics").status, 404);
    assert_eq!(get(daemon.metrics(), "/key/32").status, 404, "keys are not on the metrics port");
    assert_eq!(exchange(daemon.metrics(), request("/metrics").replace("GET", "POST")).status, 405);
}

/// The label of a metric, and its values.
type Label = (Option<String>, BTreeSet<String>);

#[test]
fn every_metric_label_and_value_is_documented() {
    let authority = common::tls::Authority::new();
    let proxies = [("PROXY_PROTOCOL", "true"), ("TRUSTED_PROXIES", "127.0.0.1")];
    let documented = documented();
    for (mode, daemon) in [
        ("plain", Daemon::start(&[])),
        ("with TLS", common::tls::daemon(&authority, &[])),
        ("with `proxy-protocol`", Daemon::start(&proxies)),
    ] {
        let exported = exported(&get(daemon.metrics(), "/metrics").text());
        for (name, label) in &exported {
            let found = documented.get(name);
            let (expected, condition) = found.unwrap_or_else(|| panic!("{name} is not documented"));
            assert_eq!(expected, label, "{name} as documented and as exported");
            assert!(["", mode].contains(&&**condition) || condition.starts_with("where "), "{name}: {mode}");
        }
        for (name, (_, condition)) in &documented {
            let is_optional = !["", mode].contains(&&**condition);
            assert!(
                is_optional || exported.contains_key(name),
                "{name} is documented but not exported: {mode}"
            );
        }
    }
}

#[test]
fn handshake_failure_reasons_are_documented() {
    let authority = common::tls::Authority::new();
    let daemon = common::tls::daemon(&authority, &[]);
    let (_, exported) =
        exported(&get(daemon.metrics(), "/metrics").text()).remove("tls_handshake_failures_total").unwrap();
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/tls.md")).unwrap();
    let rows = rows_of(&text, "| reason |");
    assert_eq!(rows.iter().flat_map(|row| code_spans(row[0])).collect::<BTreeSet<_>>(), exported);
}

/// The metrics of the table in docs/monitoring.md, each with the condition under which it is exported; an empty
/// condition means always.
fn documented() -> BTreeMap<String, (Label, String)> {
    let text = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/monitoring.md")).unwrap();
    let mut metrics = BTreeMap::new();
    for row in rows_of(&text, "| metric | values of the label |") {
        let [names, values, meaning] = row[..] else { panic!("three cells: {row:?}") };
        let condition = meaning.split_once("; only ").map_or("", |(_, condition)| condition);
        for name in code_spans(names) {
            let (name, label) = match name.split_once('{') {
                None => (name.clone(), None),
                Some((name, label)) => (name.to_owned(), Some(label.trim_end_matches('}').to_owned())),
            };
            let values = match values {
                "the table below" => {
                    let rows = rows_of(&text, &format!("| {} of `{name}` |", label.as_deref().unwrap()));
                    rows.iter().flat_map(|row| code_spans(row[0])).collect()
                }
                _ => code_spans(values).into_iter().collect(),
            };
            let before = metrics.insert(name.clone(), ((label, values), condition.to_owned()));
            assert!(before.is_none(), "{name} is in the table twice");
        }
    }
    metrics
}

/// The metrics of a scrape.
fn exported(text: &str) -> BTreeMap<String, Label> {
    let types: Vec<_> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split_once(' ')).collect();
    let mut metrics = BTreeMap::<String, Label>::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        // A quoted value contains no quotation mark here.
        let (series, _) = line.rsplit_once(' ').unwrap();
        let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
        let is_of = |metric: &str, kind: &str| match name.strip_prefix(metric) {
            Some("") => true,
            Some("_bucket" | "_sum" | "_count") => kind == "histogram",
            _ => false,
        };
        let (name, _) = types.iter().find(|(metric, kind)| is_of(metric, kind)).unwrap();
        let (label, values) = metrics.entry((*name).to_owned()).or_default();
        for pair in labels.strip_suffix('}').unwrap().split(',').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap();
            match key {
                "le" => {}
                // Of one metric; the table lists none of their values.
                "commit" | "version" => {
                    *label = Some(label.take().map_or(key.to_owned(), |before| format!("{before},{key}")));
                }
                _ => {
                    assert!(
                        label.replace(key.to_owned()).is_none_or(|before| before == key),
                        "one label: {line}"
                    );
                    values.insert(value.trim_matches('"').to_owned());
                }
            }
        }
    }
    metrics
}

/// The cells of each row of the table whose header line starts with `header`.
fn rows_of<'a>(text: &'a str, header: &str) -> Vec<Vec<&'a str>> {
    let rows: Vec<_> = text
        .lines()
        .skip_while(|line| !line.starts_with(header))
        .skip(2)
        .take_while(|line| line.starts_with('|'))
        .map(|line| line.trim_matches('|').split('|').map(str::trim).collect())
        .collect();
    assert!(!rows.is_empty(), "no table {header}");
    rows
}

/// The texts between backticks.
fn code_spans(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}
