//! /openapi.json describes the service correctly: the service accepts exactly the names and limits in it.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::collections::BTreeSet;
use std::path::PathBuf;

use serde_json::Value;

use common::formats::FORMATS;
use common::{Daemon, TempDirectory, get, key_service, run_to_end};

fn document(daemon: &Daemon) -> Value {
    let response = daemon.get("/openapi.json");
    assert_eq!((response.status, response.header("content-type")), (200, Some("application/json")));
    assert_eq!(response.header("cache-control"), Some("no-store"), "the limits may change");
    response.json()
}

/// Writes a tokens file with one token, whose text is discarded.
fn tokens(directory: &TempDirectory) -> PathBuf {
    let output = run_to_end({
        let mut command = key_service(directory);
        command.args(["token", "new", "--name", "nobody"]);
        command
    });
    let text = String::from_utf8(output.stdout).unwrap();
    directory.write_secret("tokens", text.split_once('\n').unwrap().1)
}

fn values<'a>(document: &'a Value, path: &str, parameter: &str) -> Vec<&'a str> {
    let parameters = document["paths"][path]["get"]["parameters"].as_array().unwrap();
    let found = parameters.iter().find(|known| known["name"] == parameter).unwrap();
    found["schema"]["enum"].as_array().unwrap().iter().map(|value| value.as_str().unwrap()).collect()
}

fn length_max(document: &Value, path: &str) -> u64 {
    document["paths"][path]["parameters"][0]["schema"]["maximum"].as_u64().unwrap()
}

#[test]
fn the_document_lists_exactly_the_served_names() {
    let daemon = Daemon::start(&[]);
    let document = document(&daemon);
    assert_eq!(document["openapi"], "3.1.0");
    assert_eq!(values(&document, "/key/{length}", "format"), FORMATS);
    for (path, parameter) in
        [("/key/{length}", "format"), ("/password/{length}", "format"), ("/password/{length}", "alphabet")]
    {
        let names = values(&document, path, parameter);
        for name in &names {
            let response = daemon.get(&format!("{}?{parameter}={name}", path.replace("{length}", "8")));
            assert_eq!(response.status, 200, "{path}: {name}");
            let media_type = response.header("content-type").unwrap().split(';').next().unwrap().to_owned();
            let content = &document["paths"][path]["get"]["responses"]["200"]["content"];
            assert!(content[&media_type].is_object(), "{path}: {media_type}");
        }
        // The error for an unknown value lists the known ones.
        let refused = daemon.get(&format!("{}?{parameter}=other", path.replace("{length}", "8"))).problem();
        assert!(refused.ends_with(&format!("known: {}", names.join(", "))), "{path}: {refused}");
    }
    for path in ["/key", "/password"] {
        let parameters =
            document["paths"][format!("{path}/{{length}}")]["get"]["parameters"].as_array().unwrap().clone();
        let names: Vec<_> = parameters.iter().map(|known| known["name"].as_str().unwrap()).collect();
        assert!(
            parameters.iter().all(|known| known["description"] != ""),
            "{path}: each parameter has a description"
        );
        let refused = daemon.get(&format!("{path}/8?other=1")).problem();
        assert!(refused.ends_with(&format!("known: {}", names.join(", "))), "{path}: {refused}");
    }
}

#[test]
fn the_limits_of_the_document_are_enforced() {
    let daemon = Daemon::start(&[("MAX_SIZE", "5000")]);
    let document = document(&daemon);
    for (path, expected) in [("/key/{length}", 5000), ("/password/{length}", 1024)] {
        let max = length_max(&document, path);
        assert_eq!(max, expected);
        let get_length = |length: u64| daemon.get(&path.replace("{length}", &length.to_string()));
        assert_eq!((get_length(max).status, get_length(max + 1).status), (200, 413), "{path}");
        let parameters = document["paths"][path]["get"]["parameters"].as_array().unwrap();
        let count = parameters.iter().find(|known| known["name"] == "count").unwrap();
        let max = count["schema"]["maximum"].as_u64().unwrap();
        let status_of = |count: u64| {
            daemon.get(&format!("{}?format=json&count={count}", path.replace("{length}", "1"))).status
        };
        assert_eq!(
            (status_of(0), status_of(1), status_of(max), status_of(max + 1)),
            (400, 200, 200, 400),
            "{path}"
        );
        let description = document["paths"][path]["get"]["description"].as_str().unwrap();
        assert!(description.contains("Length times count is at most 65536"), "{description}");
    }
}

#[test]
fn the_document_lists_every_status_in_the_metrics() {
    let directory = TempDirectory::new();
    let tokens = tokens(&directory);
    directory.write("config.toml", &format!("tokens-file = {:?}\n", tokens.to_str().unwrap()));
    let daemon = Daemon::start_with(directory, |command| {
        command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
    });
    let document = document(&daemon);
    let responses = document["paths"]["/key/{length}"]["get"]["responses"].as_object().unwrap();
    let described: BTreeSet<_> = responses.keys().map(String::as_str).collect();
    let metrics = get(daemon.metrics(), "/metrics").text();
    let counted: BTreeSet<_> = metrics
        .lines()
        .filter_map(|line| line.strip_prefix("http_responses_total{status_code=\"")?.split('"').next())
        .filter(|status| *status != "other" && *status != "404") // for unknown paths, which are not in the document
        .collect();
    assert_eq!(described, counted);
    // Each error is a problem document, described once under components.
    for status in described.into_iter().filter(|status| *status != "200") {
        let response = &document["components"]["responses"][status];
        assert!(response["content"]["application/problem+json"].is_object(), "{status}");
        assert_eq!(responses[status]["$ref"], format!("#/components/responses/{status}"));
    }
    let refused = daemon.get("/key/32");
    assert_eq!(refused.status, 401);
    assert_eq!(document["paths"]["/key/{length}"]["get"]["security"][0]["token"], serde_json::json!([]));
    for field in document["components"]["schemas"]["Problem"]["required"].as_array().unwrap() {
        assert!(!refused.json()[field.as_str().unwrap()].is_null(), "{field}");
    }
}

#[test]
fn the_document_follows_a_reload() {
    let directory = TempDirectory::new();
    directory.write("config.toml", "max-size = 100\n");
    let daemon = Daemon::start_with(directory, |command| {
        command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
    });
    let before = document(&daemon);
    assert_eq!((length_max(&before, "/key/{length}"), length_max(&before, "/password/{length}")), (100, 100));
    assert!(before["paths"]["/key/{length}"]["get"]["security"].is_null());
    let tokens = tokens(&daemon.directory);
    let config = format!("max-size = 2000\ntokens-file = {:?}\n", tokens.to_str().unwrap());
    daemon.directory.write("config.toml", &config);
    daemon.signal("HUP");
    daemon.manager.wait_for("READY=1");
    let after = document(&daemon);
    assert_eq!((length_max(&after, "/key/{length}"), length_max(&after, "/password/{length}")), (2000, 1024));
    assert!(after["paths"]["/key/{length}"]["get"]["security"].is_array());
}

#[test]
fn the_metrics_listener_does_not_serve_the_document() {
    let daemon = Daemon::start(&[]);
    assert_eq!(get(daemon.metrics(), "/openapi.json").status, 404);
    document(&daemon);
    // One response with 404, one with 200.
    daemon.wait_for_metric("request_latency_seconds_count{endpoint=\"/openapi.json\"}", 2.0);
}

#[test]
fn every_reference_of_the_document_resolves() {
    fn walk<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(fields) => fields.iter().for_each(|(name, value)| match value {
                Value::String(target) if name == "$ref" => found.push(target),
                _ => walk(value, found),
            }),
            Value::Array(items) => items.iter().for_each(|item| walk(item, found)),
            _ => {}
        }
    }
    let document = document(&Daemon::start(&[]));
    let mut references = Vec::new();
    walk(&document, &mut references);
    assert!(references.len() > 20, "{references:?}");
    for reference in references {
        assert!(document.pointer(reference.trim_start_matches('#')).is_some(), "{reference}");
    }
}

#[test]
fn client_generators_find_types_and_the_default_first() {
    fn untyped(value: &Value, found: &mut Vec<Value>) {
        match value {
            Value::Object(fields) => {
                if (fields.contains_key("enum") || fields.contains_key("const"))
                    && !fields.contains_key("type")
                {
                    found.push(value.clone());
                }
                fields.values().for_each(|value| untyped(value, found));
            }
            Value::Array(items) => items.iter().for_each(|item| untyped(item, found)),
            _ => {}
        }
    }
    let daemon = Daemon::start(&[]);
    let mut found = Vec::new();
    untyped(&document(&daemon), &mut found);
    assert_eq!(found, Vec::<Value>::new(), "an enum or const without a type");
    // A JSON parser may not keep the order, so search the text.
    let text = daemon.get("/openapi.json").text();
    assert!(!text.contains("\\u00"), "{text}");
    let responses: Vec<_> =
        text.match_indices("\"200\":{\"content\":{").map(|(at, name)| &text[at + name.len()..]).collect();
    let orders = [
        [
            "application/octet-stream",
            "text/plain",
            "application/json",
            "application/jwk+json",
            "application/jwk-set+json",
        ]
        .as_slice(),
        &["text/plain", "application/json"],
    ];
    for order in orders {
        let found = responses.iter().any(|content| {
            let content = &content[..content.find("\"description\":\"Generated").unwrap_or_default()];
            let positions: Option<Vec<_>> =
                order.iter().map(|name| content.find(&format!("\"{name}\":"))).collect();
            positions.is_some_and(|positions| positions[0] == 0 && positions.is_sorted())
        });
        assert!(found, "{order:?}: {text}");
    }
}
