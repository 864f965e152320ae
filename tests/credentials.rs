//! The credential socket, with a client that binds its socket as systemd does. tests/e2e/test_system.py covers real
//! units.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::io::{self, Read};
use std::net::TcpListener;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use common::credential::{activated, connect, fetch, fetch_raw, start};
use common::{TIMEOUT, TempDirectory, key_service, run_to_end};
use key_service::access::authorization::{AccessRules, Authorizer};
use key_service::http::health::Health;
use key_service::http::state::AppState;
use key_service::keys::generator::{Generator, OsRandom, Source};
use key_service::server::accept::serve;
use key_service::server::address::{Host, SocketMode};
use key_service::server::connection_limit::ConnectionLimit;
use key_service::server::context::ServerContext;
use key_service::server::drain::Drain;
use key_service::server::heartbeat::Heartbeats;
use key_service::server::listener::Listener;
use key_service::server::timeouts::Timeouts;
use key_service::systemd::credentials::{CredentialRules, CredentialServer};
use key_service::telemetry::metrics::Metrics;

#[test]
fn every_unit_gets_its_own_32_bytes() {
    let daemon = start("", &[]);
    let socket = daemon.directory.file("credential.sock");
    let status = &daemon.status;
    assert!(status.contains(&format!("; credentials on unix:{}; metrics on ", socket.display())), "{status}");
    let keys: Vec<_> = (0..50).map(|_| fetch(&daemon.directory, "web.service", "cookie.key")).collect();
    for (n, key) in keys.iter().enumerate() {
        assert_eq!(key.len(), 32);
        assert!(!keys[..n].contains(key));
    }
    daemon.wait_for_metric("credentials_total{outcome=\"served\"}", 50.0);
    assert_eq!(daemon.metric("key_bytes_total{format=\"raw\"}"), 1600.0);
    assert_eq!(daemon.metric("key_length_bytes_count"), 50.0);
}

const CONFIG: &str = r#"
audit = true
[credentials]
"cookie.key" = { length = 48, format = "base64" }
"web.service:cookie.key" = { length = 16, format = "hex" }
big = { length = 4096, format = "hex" }
jwk = { format = "jwk" }
"db.service:password" = { length = 24, alphabet = "unambiguous" }
"#;

#[test]
fn rules_define_credentials_and_the_audit_names_the_unit() {
    let daemon = start(CONFIG, &[]);
    let text = |unit, credential| String::from_utf8(fetch(&daemon.directory, unit, credential)).unwrap();
    assert_eq!(text("other.service", "cookie.key").trim_end().len(), 64);
    let hex = text("web.service", "cookie.key");
    assert!(hex.len() == 33 && hex.trim_end().bytes().all(|digit| digit.is_ascii_hexdigit()), "{hex}");
    assert_eq!(text("web.service", "big").len(), 8193);
    let jwk: serde_json::Value = serde_json::from_str(&text("web.service", "jwk")).unwrap();
    assert_eq!(jwk["kty"], "oct");
    let password = text("db.service", "password");
    assert!(password.len() == 25 && !password.contains(['0', 'O', 'l', '1', 'I']), "{password}");
    assert_eq!(fetch(&daemon.directory, "web.service", "password").len(), 32);
    common::until("the audit records", || (daemon.log().matches("key issued").count() == 6).then_some(()));
    let log = daemon.log();
    for part in [
        "unit=\"web.service\" credential=\"cookie.key\"",
        "length=16 format=hex sent=33 outcome=complete",
        "unit=\"db.service\" credential=\"password\"",
        "length=24 format=text alphabet=unambiguous sent=25 outcome=complete",
    ] {
        assert!(log.contains(part) || log.contains(&part.replace('"', "")), "{part}: {log}");
    }
    assert!(!log.contains(hex.trim_end()) && !log.contains(password.trim_end()));
}

#[test]
fn a_reload_replaces_the_rules() {
    let daemon = start("", &[]);
    assert_eq!(fetch(&daemon.directory, "a.service", "k").len(), 32);
    daemon.directory.write("config.toml", "[credentials]\nk = { length = 100 }\n");
    daemon.signal("HUP");
    common::until("the reload", || (fetch(&daemon.directory, "a.service", "k").len() == 100).then_some(()));
}

#[test]
fn a_client_that_is_not_a_unit_gets_nothing_and_is_counted() {
    let daemon = start("", &[]);
    let malformed: [Option<&[u8]>; 9] = [
        None,
        Some(b"x"),
        Some(b"1/unit/web.service"),
        Some(b"1/unit/web.service/a/b"),
        Some(b"1/unit/web/key"),
        Some(b"1/cryptsetup/home/key"),
        Some(b"G/unit/web.service/key"),
        Some(b"1/unit/web.service/\xff"),
        Some(b"1/unit/web.service/key\0"),
    ];
    for (n, name) in malformed.iter().enumerate() {
        assert_eq!(fetch_raw(&daemon.directory, *name), b"", "{name:?}");
        let counted = n as f64 + 1.0;
        daemon.wait_for_metric("credentials_total{outcome=\"malformed\"}", counted);
    }
    assert_eq!(daemon.metric("key_length_bytes_count"), 0.0, "no key was generated");
    assert_eq!(fetch(&daemon.directory, "web.service", "key").len(), 32);
}

#[test]
fn an_invalid_table_is_refused_with_its_location_and_reason() {
    let directory = TempDirectory::new();
    for (text, expected) in [
        ("credentials = 1", "credentials: expected a table of credentials, found 1"),
        (
            "[credentials]\ncookie.key = { length = 1 }",
            "\"cookie\": expected length, format, alphabet, found \"key\"",
        ),
        (
            "[credentials]\nk = 32",
            "\"k\": expected a table such as { length = 32, format = \"hex\" }, found 32",
        ),
        (
            "[credentials]\nk = { length = 4097 }",
            "expected length to be a whole number from 1 to 4096, found 4097",
        ),
        ("[credentials]\nk = { length = 0 }", "expected length to be a whole number from 1 to 4096, found 0"),
        (
            "[credentials]\nk = { format = \"text\" }",
            "expected format to be one of raw, hex, base64, base64url, json, jwk",
        ),
        (
            "[credentials]\nk = { alphabet = \"x\" }",
            "expected alphabet to be one of alnum, ascii, digits, hex, unambiguous",
        ),
        (
            "[credentials]\nk = { alphabet = \"hex\", format = \"raw\" }",
            "expected format to be one of text, json",
        ),
        ("[credentials]\nk = { alphabet = \"hex\", length = 1025 }", "from 1 to 1024, found 1025"),
        ("[credentials]\n\"web:k\" = {}", "\"web:k\": expected the name of a credential, or UNIT:NAME"),
        ("[credentials]\n\"a/b\" = {}", "\"a/b\": expected the name of a credential"),
    ] {
        let mut command = key_service(&directory);
        command.arg("--check").arg("--config").arg(directory.write("wrong.toml", text));
        let output = run_to_end(command);
        let errors = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(78), "{text}: {errors}");
        assert!(errors.contains(expected) && errors.contains("wrong.toml"), "{text}: {errors}");
    }
    // --check prints the effective configuration in the syntax of the file.
    let check = |text: &str| {
        let mut command = key_service(&directory);
        command.arg("--check").arg("--config").arg(directory.write("right.toml", text));
        String::from_utf8(run_to_end(command).stdout).unwrap()
    };
    let effective = check(CONFIG);
    assert!(effective.contains("\"cookie.key\" = { format = \"base64\", length = 48 }"), "{effective}");
    assert_eq!(check(&effective), effective);
}

#[test]
fn a_credential_socket_over_tcp_is_refused() {
    let directory = TempDirectory::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stderr = stderr_of_failed_start(activated(&directory, "credential", listener.into(), &[]));
    assert!(
        stderr.contains("name \"credential\") is refused: expected a listening Unix stream socket"),
        "{stderr}"
    );
}

fn stderr_of_failed_start(command: Command) -> String {
    let output = run_to_end(command);
    assert_eq!(output.status.code(), Some(1));
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn units_above_the_connection_limit_all_get_their_key() {
    let daemon = start("", &[]);
    // A client that does not read does not delay the others: its socket buffer holds the whole key.
    let name = |n: usize| format!("{n:x}/unit/boot@{n}.service/key");
    let mut waiting: Vec<_> =
        (0..300).map(|n| connect(&daemon.directory, Some(name(n).as_bytes()))).collect();
    for stream in waiting.iter_mut().rev() {
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes.len(), 32);
    }
}

#[test]
fn a_drain_serves_clients_that_have_connected() {
    let mut daemon = start("", &[]);
    daemon.signal("STOP");
    let mut stream = connect(&daemon.directory, Some(b"1/unit/web.service/key"));
    daemon.signal("TERM");
    daemon.signal("CONT");
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    assert_eq!(bytes.len(), 32);
    assert_eq!(daemon.wait(), 0);
}

/// A source of kernel random bytes that fails once the flag is set.
struct Breakable(Arc<AtomicBool>);

impl Source for Breakable {
    fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.0.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(1));
        }
        OsRandom.read(buffer)
    }
}

#[test]
fn a_failed_generator_sends_more_than_systemd_accepts() {
    let directory = TempDirectory::new();
    let is_broken = Arc::new(AtomicBool::new(false));
    let generator = Arc::new(Generator::new(Breakable(Arc::clone(&is_broken))).unwrap());
    let metrics = Arc::new(Metrics::new());
    let app = AppState {
        max_size: AtomicU64::new(1024),
        authorizer: Authorizer::new(AccessRules::default(), 1, &generator).unwrap(),
        health: Arc::new(Health::new(Arc::clone(&generator))),
        generator,
        metrics: Arc::clone(&metrics),
        dropped: Arc::default(),
        has_page: false,
    };
    let path = Host::Unix(directory.file("credential.sock"));
    let listener = Listener::bind(&path, 0, SocketMode::default()).unwrap();
    let server = Arc::new(CredentialServer::new(Arc::new(app), CredentialRules::default()));
    let drain = Drain::new();
    let phase = drain.subscribe();
    let heartbeat = Heartbeats::new().register();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let context =
            ServerContext::new(ConnectionLimit::new(8, 8), Timeouts::new(TIMEOUT, TIMEOUT, TIMEOUT), metrics);
        runtime.block_on(serve(vec![(listener, heartbeat)], server.handler(), context, phase)).unwrap();
    });
    assert_eq!(fetch(&directory, "web.service", "key").len(), 32);
    is_broken.store(true, Ordering::Relaxed);
    let refused = fetch(&directory, "web.service", "key");
    assert!(refused.len() > 1 << 20 && refused.iter().all(|byte| *byte == 0), "{}", refused.len());
    drop(drain);
}
