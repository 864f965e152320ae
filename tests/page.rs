//! The route `/`: a web page for browsers, which loads nothing else, and an index for curl. tests/e2e/test_page.py uses
//! the page in a browser.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use common::formats::{FORMATS, decode_base64};
use common::{Daemon, Response, exchange, get};
use sha2::{Digest, Sha256};

const BROWSER: &str = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,*/*;q=0.8";

fn get_page(daemon: &Daemon, accept: &str) -> Response {
    exchange(daemon.keys(), format!("GET / HTTP/1.1\r\nHost: a\r\nAccept: {accept}\r\n\r\n"))
}

fn media_type(response: &Response) -> &str {
    response.header("content-type").unwrap()
}

#[test]
fn browsers_get_a_page_and_curl_gets_an_index() {
    let daemon = Daemon::start(&[]);
    for (accept, expected) in [
        (BROWSER, "text/html; charset=utf-8"),
        ("text/html", "text/html; charset=utf-8"),
        ("*/*", "text/plain; charset=utf-8"),
        ("text/plain, text/html", "text/plain; charset=utf-8"),
        ("text/html;q=0.5, text/plain;q=0.4", "text/html; charset=utf-8"),
    ] {
        let response = get_page(&daemon, accept);
        assert_eq!((response.status, media_type(&response)), (200, expected), "{accept}");
        for (name, value) in
            [("vary", "Accept"), ("cache-control", "no-store"), ("x-content-type-options", "nosniff")]
        {
            assert_eq!(response.header(name), Some(value), "{accept}");
        }
    }
    assert_eq!(media_type(&daemon.get("/")), "text/plain; charset=utf-8", "without an Accept header");
    let refused = get_page(&daemon, "image/png");
    assert_eq!(refused.status, 406);
    assert!(refused.problem().ends_with("text/plain, text/html"), "{}", refused.problem());
}

#[test]
fn every_path_of_the_index_is_served() {
    let daemon = Daemon::start(&[]);
    let index = daemon.get("/").text();
    let paths: Vec<_> = index.lines().filter(|line| line.starts_with('/')).collect();
    assert_eq!(paths.len(), 7, "{index}");
    for line in paths {
        let path = line.split(' ').next().unwrap();
        assert_eq!(daemon.get(path).status, 200, "{path}");
    }
    for format in FORMATS {
        assert!(index.contains(format), "{format}");
    }
}

#[test]
fn the_page_runs_only_its_own_script_and_styles() {
    let daemon = Daemon::start(&[]);
    let response = get_page(&daemon, BROWSER);
    let page = response.text();
    let policy = response.header("content-security-policy").unwrap();
    let directives: Vec<_> = policy.split("; ").collect();
    for expected in [
        "default-src 'none'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    ] {
        assert!(directives.contains(&expected), "{expected} in {policy}");
    }
    let sources = directives.iter().flat_map(|directive| directive.split(' '));
    for source in sources.filter(|source| !source.starts_with("'sha256-")) {
        assert!(!source.contains("unsafe") && !source.contains("http"), "{source} in {policy}");
    }
    for element in ["script", "style"] {
        assert_eq!(
            page.matches(&format!("<{element}")).count(),
            1,
            "one {element}, because the policy has one hash for it"
        );
        let start = page.find(&format!("<{element}>")).unwrap() + element.len() + 2;
        let text = &page[start..page.find(&format!("</{element}>")).unwrap()];
        let source = policy.split_once(&format!("{element}-src 'sha256-")).unwrap().1.split('\'').next();
        assert_eq!(decode_base64(source.unwrap(), "+/", true), Sha256::digest(text).as_slice(), "{element}");
    }
    for foreign in ["http:", "https:", "src=", "style=", "onclick", "innerHTML", "localStorage"] {
        assert!(!page.contains(foreign), "{foreign}");
    }
    assert_eq!(response.header("referrer-policy"), Some("no-referrer"));
    for name in ["cross-origin-opener-policy", "cross-origin-resource-policy"] {
        assert_eq!(response.header(name), Some("same-origin"));
    }
    assert!(response.header("access-control-allow-origin").is_none(), "no other site can read keys");
}

#[test]
fn head_and_other_methods_work_as_on_other_routes() {
    let daemon = Daemon::start(&[]);
    let send = |method: &str| format!("{method} / HTTP/1.1\r\nHost: a\r\nAccept: text/html\r\n\r\n");
    let mut client = common::Client::connect(daemon.keys());
    let length = client.send(send("GET")).response().body.len();
    let head = client.send(send("HEAD")).head_response();
    assert_eq!((head.status, head.header("content-length")), (200, Some(&*length.to_string())));
    let refused = client.send(send("POST")).response();
    assert_eq!((refused.status, refused.header("allow")), (405, Some("GET, HEAD")));
    daemon.wait_for_metric("request_latency_seconds_count{endpoint=\"/\"}", 3.0);
    assert_eq!(daemon.metric("key_length_bytes_count"), 0.0, "no key is generated for the page");
}

#[test]
fn the_page_can_be_disabled_and_is_not_on_the_metrics_port() {
    let daemon = Daemon::start(&[]);
    assert_eq!(get(daemon.metrics(), "/").status, 404);
    assert!(daemon.get("/openapi.json").json()["paths"]["/"].is_object());
    let daemon = Daemon::start(&[("PAGE", "false")]);
    assert_eq!((get_page(&daemon, BROWSER).status, daemon.get("/").status), (404, 404));
    let document = daemon.get("/openapi.json");
    assert!(document.json()["paths"]["/"].is_null());
    assert_eq!(daemon.get("/key/32").status, 200);
}
