//! Key formats, selected by query or Accept header, and batches.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::collections::HashSet;

use common::formats::{FORMATS, decode_batch, decode_key};
use common::{Client, Daemon, exchange, request};

fn media_type(format: &str) -> &'static str {
    match format {
        "raw" => "application/octet-stream",
        "json" => "application/json",
        "jwk" => "application/jwk+json",
        _ => "text/plain; charset=utf-8",
    }
}

#[test]
fn every_format_has_the_requested_length_for_get_and_head() {
    let daemon = Daemon::start(&[("MAX_SIZE", "1048576")]);
    let mut client = Client::connect(daemon.keys());
    let lengths = [1, 2, 3, 4, 31, 32, 33, 1024, 49_152, 65_536, 65_537, 98_305, 200_000, 1_048_576];
    for format in FORMATS {
        for length in lengths {
            let path = format!("/key/{length}?format={format}");
            let response = client.send(request(&path)).response();
            assert_eq!(decode_key(format, &response).len(), length, "{path}");
            for (name, value) in [
                ("content-type", media_type(format)),
                ("cache-control", "no-store"),
                ("x-content-type-options", "nosniff"),
                ("accept-ranges", "none"),
                ("vary", "Accept"),
            ] {
                assert_eq!(response.header(name), Some(value), "{path}: {name}");
            }
            let head = client.send(request(&path).replace("GET", "HEAD")).head_response();
            for name in ["content-length", "content-type"] {
                assert_eq!(head.header(name), response.header(name), "{path}: {name}");
            }
        }
        let total: usize = lengths.iter().sum();
        let served = daemon.metric(&format!("key_bytes_total{{format=\"{format}\"}}"));
        assert_eq!(served, f64::from(u32::try_from(total).unwrap()), "{format}: key bytes, not characters");
    }
}

#[test]
fn only_streamed_responses_ask_proxies_not_to_buffer() {
    let daemon = Daemon::start(&[("MAX_SIZE", "1048576")]);
    let mut client = Client::connect(daemon.keys());
    let (mut unstreamed, mut streamed) = (0, 0);
    let mut check = |path: &str| {
        let response = client.send(request(path)).response();
        assert_eq!(response.status, 200, "{path}");
        let expected = (response.body.len() > 16 * 1024).then_some("no");
        *if expected.is_some() { &mut streamed } else { &mut unstreamed } += 1;
        assert_eq!(response.header("x-accel-buffering"), expected, "{path}: {} bytes", response.body.len());
        let head = client.send(request(path).replace("GET", "HEAD")).head_response();
        assert_eq!(head.header("x-accel-buffering"), expected, "HEAD {path}");
    };
    // Responses of up to 16,384 bytes are not streamed, counting encoding and separators.
    for format in FORMATS {
        for length in
            [1, 4096, 8191, 8192, 12_000, 12_286, 12_287, 12_400, 16_383, 16_384, 16_385, 65_537, 1_048_576]
        {
            check(&format!("/key/{length}?format={format}"));
        }
        if format != "raw" {
            for (length, count) in
                [(1, 10), (32, 100), (32, 1024), (64, 1024), (8191, 2), (8192, 1), (12_400, 1)]
            {
                check(&format!("/key/{length}?format={format}&count={count}"));
            }
        }
    }
    for format in ["text", "json"] {
        for (length, count) in [(24, 1), (24, 655), (24, 656), (1024, 15), (1024, 16), (1024, 64)] {
            check(&format!("/password/{length}?format={format}&count={count}"));
        }
    }
    assert!(unstreamed > 40 && streamed > 40, "{unstreamed} not streamed, {streamed} streamed");
    for path in ["/", "/health", "/openapi.json", "/key/0", "/key/1048577", "/key/16385?format=no", "/no"] {
        assert_eq!(client.send(request(path)).response().header("x-accel-buffering"), None, "{path}");
    }
}

#[test]
fn every_bit_of_a_key_varies() {
    // A bit is the same in all 64 keys with a probability of 2⁻⁶³; for any of 256 bits in 6 formats it is below 2⁻⁵².
    let daemon = Daemon::start(&[]);
    let mut client = Client::connect(daemon.keys());
    for format in FORMATS {
        let path = format!("/key/32?format={format}");
        let keys: Vec<_> =
            (0..64).map(|_| decode_key(format, &client.send(request(&path)).response())).collect();
        for position in 0..32 {
            let (all, any) =
                keys.iter().fold((0xff, 0), |(all, any), key| (all & key[position], any | key[position]));
            assert_eq!((all, any), (0, 0xff), "{format}: byte {position}");
        }
    }
}

#[test]
fn accept_selects_the_format_and_the_query_wins() {
    let daemon = Daemon::start(&[]);
    let get = |path: &str, accept: &str| {
        exchange(daemon.keys(), format!("GET {path} HTTP/1.1\r\nHost: a\r\nAccept: {accept}\r\n\r\n"))
    };
    for (accept, format) in [
        ("*/*", "raw"),
        ("text/plain", "hex"),
        ("application/json", "json"),
        ("application/jwk+json", "jwk"),
        ("text/plain;q=0.4, application/json;q=0.5", "json"),
        ("text/html, application/xhtml+xml, */*;q=0.8", "raw"),
    ] {
        let response = get("/key/32", accept);
        assert_eq!(response.header("content-type"), Some(media_type(format)), "{accept}");
        assert_eq!(decode_key(format, &response).len(), 32);
        assert_eq!(decode_key("base64", &get("/key/32?format=base64", accept)).len(), 32);
    }
    let refused = get("/key/32", "image/png");
    assert_eq!(refused.status, 406);
    let available = "application/octet-stream, text/plain, application/json, application/jwk+json";
    assert!(refused.problem().ends_with(available), "{}", refused.problem());
    let refused = daemon.get("/key/32?format=pem");
    assert_eq!(refused.status, 400);
    assert_eq!(refused.problem(), "Unknown format \"pem\"; known: raw, hex, base64, base64url, json, jwk");
}

#[test]
fn the_kid_of_a_jwk_does_not_depend_on_its_key() {
    let daemon = Daemon::start(&[]);
    let names: HashSet<String> = (0..50)
        .map(|_| {
            // Some of the 256 possible keys of one byte repeat among 50; a kid derived from the key would repeat as
            // well.
            let jwk = daemon.get("/key/1?format=jwk").json();
            jwk["kid"].as_str().unwrap().to_owned()
        })
        .collect();
    assert_eq!(names.len(), 50);
}

#[test]
fn a_batch_has_the_requested_number_of_distinct_keys() {
    let daemon = Daemon::start(&[("MAX_SIZE", "65536")]);
    let mut client = Client::connect(daemon.keys());
    for format in &FORMATS[1..] {
        for (length, count) in [(32, 1), (16, 2), (32, 100), (64, 1024), (1000, 65), (65_536, 1)] {
            let path = format!("/key/{length}?count={count}&format={format}");
            let response = client.send(request(&path)).response();
            let keys = decode_batch(format, &response);
            assert_eq!(keys.len(), count, "{path}");
            assert!(keys.iter().all(|key| key.len() == length), "{path}");
            assert_eq!(keys.iter().collect::<HashSet<_>>().len(), count, "{path}");
            let head = client.send(request(&path).replace("GET", "HEAD")).head_response();
            assert_eq!(head.header("content-length"), response.header("content-length"), "{path}");
            let expected = if *format == "jwk" { "application/jwk-set+json" } else { media_type(format) };
            assert_eq!(response.header("content-type"), Some(expected));
        }
    }
    assert_eq!(daemon.metric("key_length_bytes_count"), 5.0 * (1.0 + 2.0 + 100.0 + 1024.0 + 65.0 + 1.0));
    assert_eq!(
        daemon.metric("key_bytes_total{format=\"jwk\"}"),
        32.0 + 32.0 + 3200.0 + 65_536.0 + 65_000.0 + 65_536.0
    );
}

#[test]
fn batch_size_is_limited_and_raw_batches_are_refused() {
    let daemon = Daemon::start(&[("MAX_SIZE", "70000")]);
    for count in ["0", "1025", "-1", "x", "", "1.5", "18446744073709551617"] {
        let refused = daemon.get(&format!("/key/1?format=hex&count={count}"));
        assert_eq!(refused.status, 400, "{count}");
        assert!(refused.problem().contains("integer from 1 to 1024"), "{}", refused.problem());
        assert_eq!((refused.json()["min"].as_u64(), refused.json()["max"].as_u64()), (Some(1), Some(1024)));
    }
    for path in ["/key/65?format=hex&count=1024", "/key/65537?format=json&count=1"] {
        let refused = daemon.get(path);
        assert_eq!((refused.status, refused.json()["max"].as_u64()), (413, Some(65_536)), "{path}");
    }
    assert_eq!(daemon.get("/key/70001?format=hex&count=1").json()["max"], 70_000);
    for path in ["/key/32?count=2", "/key/32?count=2&format=raw"] {
        let refused = daemon.get(path);
        assert_eq!(refused.status, 400);
        assert!(refused.problem().ends_with("hex, base64, base64url, json, jwk"), "{}", refused.problem());
    }
    assert_eq!(daemon.get("/key/32?count=2&count=2&format=hex").status, 400);
    assert_eq!(daemon.metric("key_length_bytes_count"), 0.0, "no request generated a key");
}

#[test]
fn rate_limits_count_all_bytes_of_a_batch() {
    let daemon = Daemon::start(&[("RATE_BYTES", "100"), ("RATE_BURST", "10"), ("AUDIT", "true")]);
    let response = daemon.get("/key/32?format=hex&count=30");
    assert_eq!(response.status, 200);
    let remaining = response.header("ratelimit").unwrap().to_owned();
    assert!(remaining.contains("r=40"), "960 of 1,000 bytes are used: {remaining}");
    assert_eq!(daemon.get("/key/32?format=hex&count=30").status, 429);
    daemon.wait_for_log("key issued");
    let log = daemon.log();
    assert!(log.contains("length=32 count=30 format=hex sent=1950 outcome=complete"), "{log}");
}
