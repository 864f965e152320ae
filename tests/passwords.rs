//! Passwords of named alphabets. The unit tests of `src/keys/password.rs` check that all characters are equally likely.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::collections::HashSet;

use common::{Client, Daemon, exchange, request};

/// Whether an alphabet contains a character.
type Allowed = fn(char) -> bool;

/// Each alphabet, its characters, and the bits of entropy of 24 characters, rounded down.
const ALPHABETS: [(&str, Allowed, &str); 5] = [
    ("alnum", |c| c.is_ascii_alphanumeric(), "142.9"),
    ("ascii", |c| c.is_ascii_graphic(), "157.3"),
    ("digits", |c| c.is_ascii_digit(), "79.7"),
    ("hex", |c| "0123456789abcdef".contains(c), "96.0"),
    ("unambiguous", |c| c.is_ascii_alphanumeric() && !"01IOl".contains(c), "139.9"),
];

#[test]
fn a_password_uses_its_alphabet_and_reports_its_entropy() {
    let daemon = Daemon::start(&[]);
    let mut client = Client::connect(daemon.keys());
    for (alphabet, is_allowed, bits) in ALPHABETS {
        let path = format!("/password/24?alphabet={alphabet}");
        let response = client.send(request(&path)).response();
        assert_eq!(response.status, 200, "{path}");
        let text = response.text();
        let password = text.strip_suffix('\n').expect("one newline at the end");
        assert_eq!(password.len(), 24);
        assert!(password.chars().all(is_allowed), "{password}");
        for (name, value) in [
            ("content-type", "text/plain; charset=utf-8"),
            ("entropy-bits", bits),
            ("cache-control", "no-store"),
            ("x-content-type-options", "nosniff"),
            ("vary", "Accept"),
        ] {
            assert_eq!(response.header(name), Some(value), "{path}: {name}");
        }
        for _ in 0..50 {
            let response = client.send(request(&format!("{path}&format=json"))).response();
            assert_eq!(response.header("content-type"), Some("application/json"));
            let json = response.json();
            assert_eq!(json.as_object().unwrap().len(), 4);
            assert_eq!((&json["length"], &json["alphabet"]), (&24.into(), &alphabet.into()));
            assert_eq!(json["entropy_bits"].as_f64(), Some(bits.parse().unwrap()));
            let password = json["password"].as_str().unwrap();
            assert!(password.len() == 24 && password.chars().all(is_allowed), "{password}");
            // The length does not reveal how many characters are escaped.
            let head = client.send(request(&format!("{path}&format=json")).replace("GET", "HEAD"));
            let head = head.head_response();
            assert_eq!(head.header("content-length"), response.header("content-length"));
            assert_eq!(head.header("entropy-bits"), Some(bits));
        }
    }
    let default = client.send(request("/password/24")).response();
    assert!(default.text().trim_end().chars().all(|c| c.is_ascii_alphanumeric()), "alnum");
}

#[test]
fn a_batch_of_passwords_has_no_duplicates() {
    let daemon = Daemon::start(&[]);
    let text = daemon.get("/password/20?count=500").text();
    let passwords: HashSet<_> = text.lines().collect();
    assert_eq!((text.lines().count(), passwords.len()), (500, 500));
    assert!(passwords.iter().all(|password| password.len() == 20) && text.ends_with('\n'));
    let json = daemon.get("/password/20?count=100&format=json&alphabet=ascii").json();
    let passwords: HashSet<_> =
        json.as_array().unwrap().iter().map(|one| one["password"].as_str().unwrap()).collect();
    assert_eq!(passwords.len(), 100);
}

#[test]
fn the_error_for_an_invalid_value_names_it() {
    let daemon = Daemon::start(&[("MAX_SIZE", "100000")]);
    for (path, status, detail) in [
        ("/password/0", 400, "Length must be at least 1"),
        ("/password/", 400, "Invalid length: must be an integer"),
        ("/password/abc", 400, "Invalid length: must be an integer"),
        ("/password/1025", 413, "Length exceeds maximum size of 1024"),
        ("/password/24?alphabet=emoji", 400, "Unknown alphabet \"emoji\"; known: alnum, ascii, digits"),
        ("/password/24?format=raw", 400, "Unknown format \"raw\"; known: text, json"),
        ("/password/24?size=1", 400, "Unknown query parameter \"size\"; known: alphabet, format, count"),
        ("/password/24?alphabet=hex&alphabet=hex", 400, "Query parameter \"alphabet\" is given twice"),
        ("/password/1024?count=65", 413, "Length times count exceeds"),
        ("/key/24?alphabet=hex", 400, "Unknown query parameter \"alphabet\"; known: format, count"),
        ("/key/24?format=text", 400, "Unknown format \"text\""),
        ("/password/24/x", 404, "Path not found"),
        ("/password", 404, "Path not found"),
    ] {
        let response = daemon.get(path);
        assert_eq!(response.status, status, "{path}");
        assert!(response.problem().starts_with(detail), "{path}: {}", response.problem());
    }
    let accept = "GET /password/24 HTTP/1.1\r\nHost: a\r\nAccept: application/octet-stream\r\n\r\n";
    let refused = exchange(daemon.keys(), accept);
    assert_eq!(refused.status, 406);
    assert!(refused.problem().ends_with("text/plain, application/json"));
    let response = exchange(daemon.keys(), request("/password/24").replace("GET", "POST"));
    assert_eq!((response.status, response.header("allow")), (405, Some("GET, HEAD")));
    assert_eq!(Daemon::start(&[("MAX_SIZE", "16")]).get("/password/17").json()["max"], 16);
}

#[test]
fn a_password_is_limited_counted_and_audited_like_a_key() {
    let daemon = Daemon::start(&[("AUDIT", "true"), ("RATE_BYTES", "1"), ("RATE_BURST", "100")]);
    let response = daemon.get("/password/60?alphabet=digits");
    assert!(response.header("ratelimit").unwrap().contains("r=40"), "{response:?}");
    assert_eq!(daemon.get("/password/60").status, 429);
    assert_eq!(daemon.metric("key_bytes_total{format=\"text\"}"), 60.0);
    assert_eq!(daemon.metric("key_length_bytes_count"), 1.0);
    daemon.wait_for_metric("request_latency_seconds_count{endpoint=\"/password/{length}\"}", 2.0);
    daemon.wait_for_log("key issued");
    let log = daemon.log();
    assert!(log.contains("length=60 format=text alphabet=digits sent=61 outcome=complete"), "{log}");
    assert!(!log.contains(&response.text()[..12]));
    assert_eq!(
        common::get(daemon.metrics(), "/password/24").status,
        404,
        "the metrics port serves no passwords"
    );
}
