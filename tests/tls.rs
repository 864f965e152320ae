//! TLS: versions, certificates, client authentication, handshakes, reloads and the `health` subcommand.

#![allow(clippy::unwrap_used, reason = "a panic is how a test reports")]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use common::tls::{Authority, Identity, client_config, connect, connect_over, daemon, start};
use common::{
    Client, Daemon, TempDirectory, connect_with_small_buffer, get, held_port, key_service, read_slowly,
    request, run_to_end, unless_stalled, until,
};
use rcgen::{DnType, SanType, date_time_ymd};
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, NamedGroup, ProtocolVersion};

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);

/// The configuration of a client that trusts `authority` and accepts TLS 1.3 only.
fn tls13(authority: &Authority) -> Arc<ClientConfig> {
    client_config(authority, &[&TLS13], None)
}

/// The error that a client with `config` gets instead of a connection.
fn handshake_error(daemon: &Daemon, config: &Arc<ClientConfig>) -> String {
    let mut client = connect(daemon.keys(), config);
    let mut bytes = Vec::new();
    let written = client.stream.write_all(request("/key/32").as_bytes());
    let error = written.and_then(|()| client.stream.read_to_end(&mut bytes)).unwrap_err();
    assert!(bytes.is_empty());
    error.to_string()
}

fn wait_for_failures(daemon: &Daemon, reason: &str, count: f64) {
    daemon.wait_for_metric(&format!("tls_handshake_failures_total{{reason=\"{reason}\"}}"), count);
}

#[test]
fn keys_are_served_over_tls_1_3_with_post_quantum_key_exchange() {
    let authority = Authority::new();
    let daemon = daemon(&authority, &[]);
    let mut client = connect(daemon.keys(), &tls13(&authority));
    let response = client.send(request("/key/32")).response();
    assert_eq!((response.status, response.body.len()), (200, 32));
    let connection = &client.stream.conn;
    assert_eq!(connection.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    let group = connection.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, NamedGroup::X25519MLKEM768);
    assert_eq!(connection.tls13_tickets_received(), 0, "no session tickets");
    assert_eq!(client.send(request("/health")).response().text(), "OK");
    daemon.wait_for_metric("tls_handshakes_total", 1.0);
}

#[test]
fn a_client_without_post_quantum_algorithms_is_served() {
    let authority = Authority::new();
    let daemon = daemon(&authority, &[]);
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider.kx_groups.retain(|group| group.name() != NamedGroup::X25519MLKEM768);
    let config = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(authority.roots())
        .with_no_client_auth();
    let mut client = connect(daemon.keys(), &Arc::new(config));
    assert_eq!(client.send(request("/key/32")).response().status, 200);
    let group = client.stream.conn.negotiated_key_exchange_group().unwrap().name();
    assert_eq!(group, NamedGroup::X25519);
}

#[test]
fn tls_1_2_is_accepted_only_if_configured() {
    let authority = Authority::new();
    let old = client_config(&authority, &[&TLS12], None);
    let daemon = daemon(&authority, &[]);
    assert!(handshake_error(&daemon, &old).contains("ProtocolVersion"));
    wait_for_failures(&daemon, "incompatible", 1.0);
    let with_tls12 = common::tls::daemon(&authority, &[("TLS_MIN_VERSION", "1.2")]);
    assert_eq!(connect(with_tls12.keys(), &old).send(request("/key/32")).response().body.len(), 32);
    let mut client = connect(with_tls12.keys(), &client_config(&authority, &[&TLS12, &TLS13], None));
    client.send(request("/key/32")).response();
    assert_eq!(
        client.stream.conn.protocol_version(),
        Some(ProtocolVersion::TLSv1_3),
        "TLS 1.2 is not preferred"
    );
}

#[test]
fn only_http_1_1_is_negotiated() {
    let authority = Authority::new();
    let daemon = daemon(&authority, &[]);
    let offering = |protocols: &[&[u8]]| {
        let mut config = ClientConfig::clone(&tls13(&authority));
        config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
        Arc::new(config)
    };
    let mut client = connect(daemon.keys(), &offering(&[b"h2", b"http/1.1"]));
    assert_eq!(client.send(request("/key/32")).response().status, 200);
    assert_eq!(client.stream.conn.alpn_protocol(), Some(b"http/1.1".as_slice()));
    assert!(handshake_error(&daemon, &offering(&[b"h2"])).contains("NoApplicationProtocol"));
    // HTTP/1.0 is accepted, and not preferred.
    let mut client = connect(daemon.keys(), &offering(&[b"http/1.0"]));
    client.send("GET /key/32 HTTP/1.0\r\n\r\n");
    assert_eq!(client.response().body.len(), 32);
    assert_eq!(client.stream.conn.alpn_protocol(), Some(b"http/1.0".as_slice()));
    assert!(client.is_closed());
    let mut client = connect(daemon.keys(), &offering(&[b"http/1.0", b"http/1.1", b"h2"]));
    assert_eq!(client.send(request("/key/32")).response().status, 200);
    assert_eq!(client.stream.conn.alpn_protocol(), Some(b"http/1.1".as_slice()));
}

#[test]
fn a_streamed_key_arrives_whole_or_visibly_truncated() {
    let authority = Authority::new();
    let daemon = daemon(&authority, &[("MAX_SIZE", "1073741824"), ("WRITE_TIMEOUT", "10")]);
    let mut client = connect(daemon.keys(), &tls13(&authority));
    assert_eq!(client.send(request("/key/20000000")).response().body.len(), 20_000_000);
    // A client that never reads is closed, and can't take its response for complete.
    let mut stalled = connect(daemon.keys(), &tls13(&authority));
    stalled.send(request("/key/1073741824"));
    drop(client);
    daemon.wait_for_metric("http_connections", 0.0);
    let mut received = Vec::new();
    let end = stalled.stream.read_to_end(&mut received);
    assert!(end.is_err(), "a reset, not close_notify");
    assert!(received.len() < 64 << 20);
    assert!(daemon.metric("process_resident_memory_bytes") < 96e6);
}

#[test]
fn a_closed_connection_sends_close_notify() {
    let authority = Authority::new();
    let daemon = daemon(&authority, &[]);
    let mut client = connect(daemon.keys(), &tls13(&authority));
    client.send("GET /key/32 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").response();
    assert!(client.is_closed(), "by close_notify: any other end is an error here");
}

#[test]
fn an_evicted_connection_sends_close_notify() {
    let authority = Authority::new();
    let config = tls13(&authority);
    let daemon = daemon(&authority, &[("MAX_CONNECTIONS", "1")]);
    let mut idle = connect(daemon.keys(), &config);
    assert_eq!(idle.send(request("/key/32")).response().status, 200);
    // It may take a moment until the first connection counts as idle.
    until("a free slot", || {
        let get = || connect(daemon.keys(), &config).send(request("/key/32")).response();
        (unless_stalled(get).status == 200).then_some(())
    });
    assert!(idle.is_closed(), "by close_notify");
}

#[test]
fn the_first_request_has_the_head_timeout() {
    let authority = Authority::new();
    let daemon = daemon(&authority, &[("HEAD_TIMEOUT", "8"), ("IDLE_TIMEOUT", "3600")]);
    let mut silent = connect(daemon.keys(), &tls13(&authority));
    silent.stream.conn.complete_io(&mut silent.stream.sock).unwrap();
    assert!(silent.is_closed());
}

#[test]
fn a_slow_reader_gets_its_whole_response_over_tls() {
    let authority = Authority::new();
    let timeouts =
        [("WRITE_TIMEOUT", "4"), ("HEAD_TIMEOUT", "4"), ("IDLE_TIMEOUT", "4"), ("MAX_SIZE", "1000000")];
    let daemon = daemon(&authority, &timeouts);
    let config = tls13(&authority);
    std::thread::scope(|scope| {
        for path in ["/key/220000", "/key/110000?format=hex"] {
            let connect = || connect_over(connect_with_small_buffer(daemon.keys()), &config).stream;
            scope.spawn(move || assert_eq!(read_slowly(connect, path), Ok(())));
        }
    });
}

/// [`Client::is_closed`] accepts no end without close_notify.
#[test]
fn every_orderly_end_sends_close_notify() {
    let authority = Authority::new();
    let config = tls13(&authority);
    let daemon =
        daemon(&authority, &[("HEAD_TIMEOUT", "8"), ("IDLE_TIMEOUT", "8"), ("MAX_CONNECTIONS", "7")]);
    let open = || {
        let mut client = connect(daemon.keys(), &config);
        client.stream.conn.complete_io(&mut client.stream.sock).unwrap();
        client
    };
    let mut idle_after_a_key = open();
    assert_eq!(idle_after_a_key.send(request("/key/32")).response().status, 200);
    let mut idle_after_health = open();
    assert_eq!(idle_after_health.send(request("/health")).response().status, 200);
    let silent = open();
    let mut half = open();
    half.send("GET /key/32 HT");
    half.stream.flush().unwrap();
    let mut half_after_health = open();
    assert_eq!(half_after_health.send(request("/health")).response().status, 200);
    half_after_health.send("GET /heal");
    half_after_health.stream.flush().unwrap();
    let mut malformed = open();
    assert_eq!(malformed.send("GET /key/32 HTTP/1.1\r\n\r\n").response().status, 400);
    let mut too_large = open();
    assert_eq!(too_large.send(format!("GET /{} HTTP/1.1\r\n", "x".repeat(16384))).response().status, 431);
    let mut clients = vec![
        ("idle after a key", idle_after_a_key),
        ("idle after health", idle_after_health),
        ("silent", silent),
        ("half a request", half),
        ("half a request after health", half_after_health),
        ("malformed", malformed),
        ("too large", too_large),
    ];
    for (name, client) in &mut clients {
        eprintln!("{name}");
        assert!(client.is_closed(), "{name}");
    }
}

#[test]
fn draining_sends_close_notify_and_a_second_signal_resets() {
    let authority = Authority::new();
    let config = tls13(&authority);
    let mut daemon = daemon(
        &authority,
        &[("MAX_SIZE", "1073741824"), ("DRAIN_TIMEOUT", "3600"), ("HEAD_TIMEOUT", "3600")],
    );
    let open = || {
        let mut client = connect(daemon.keys(), &config);
        client.stream.conn.complete_io(&mut client.stream.sock).unwrap();
        client
    };
    let mut key = open();
    key.send(request("/key/32")).response();
    let mut health = open();
    health.send(request("/health")).response();
    let mut silent = open();
    let mut half = open();
    half.send("GET /key/32 HT");
    half.stream.flush().unwrap();
    let mut stream = open();
    stream.send(request("/key/1073741824"));
    until("the stream to begin", || (daemon.metric("key_bytes_total{format=\"raw\"}") > 64.0).then_some(()));
    daemon.signal("TERM");
    assert!(key.is_closed() && health.is_closed() && silent.is_closed() && half.is_closed());
    daemon.signal("TERM");
    assert_eq!(daemon.wait(), 0);
    let mut received = Vec::new();
    let error = stream.stream.read_to_end(&mut received).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn an_over_limit_connection_sends_close_notify() {
    let authority = Authority::new();
    let config = tls13(&authority);
    let daemon = daemon(&authority, &[("MAX_CONNECTIONS", "1"), ("HEAD_TIMEOUT", "3600")]);
    let mut held = connect(daemon.keys(), &config);
    held.send(request("/key/32") + "GET").response();
    unless_stalled(|| {
        let mut silent = connect(daemon.keys(), &config);
        silent.stream.conn.complete_io(&mut silent.stream.sock).unwrap();
        assert!(silent.is_closed(), "closed after a second");
    });
}

#[test]
fn a_drain_timeout_truncates_no_stream_unnoticed() {
    let authority = Authority::new();
    let mut daemon = daemon(&authority, &[("MAX_SIZE", "1073741824"), ("DRAIN_TIMEOUT", "1")]);
    let mut idle = connect(daemon.keys(), &tls13(&authority));
    idle.send(request("/key/32")).response();
    let mut client = connect(daemon.keys(), &tls13(&authority));
    client.send(request("/key/1073741824"));
    client.stream.flush().unwrap();
    until("the stream to begin", || (daemon.metric("key_bytes_total{format=\"raw\"}") > 64.0).then_some(()));
    daemon.signal("TERM");
    assert_eq!(daemon.wait(), 0);
    assert!(idle.is_closed());
    let mut received = Vec::new();
    assert!(client.stream.read_to_end(&mut received).is_err(), "never a complete message");
}

#[test]
fn a_stalled_handshake_counts_as_connection_and_times_out() {
    let authority = Authority::new();
    let daemon = daemon(&authority, &[("HEAD_TIMEOUT", "8")]);
    let mut silent = Client::connect(daemon.keys());
    let mut half = Client::connect(daemon.keys());
    half.send([0x16, 3, 1, 0x02]);
    daemon.wait_for_metric("http_connections", 2.0);
    assert!(silent.is_closed() && half.is_closed());
    wait_for_failures(&daemon, "timeout", 2.0);
    drop(Client::connect(daemon.keys()));
    wait_for_failures(&daemon, "closed", 1.0);
}

#[test]
fn stalled_handshakes_do_not_block_other_clients() {
    // More stalled handshakes than half of the limit, from where on each has one second.
    let authority = Authority::new();
    let daemon = daemon(
        &authority,
        &[("HEAD_TIMEOUT", "3600"), ("MAX_CONNECTIONS", "4000"), ("MAX_CONNECTIONS_PER_CLIENT", "0")],
    );
    let begin = |_| {
        let mut client = Client::connect(daemon.keys());
        client.send([0x16]); // the first byte of a handshake record
        client
    };
    let stalled: Vec<_> = (0..1100).map(begin).collect();
    // Silent clients take no handshake slot.
    let silent: Vec<_> = (0..1100).map(|_| Client::connect(daemon.keys())).collect();
    let config = tls13(&authority);
    let response = unless_stalled(|| connect(daemon.keys(), &config).send(request("/key/32")).response());
    assert_eq!(response.status, 200);
    let timeouts = "tls_handshake_failures_total{reason=\"timeout\"}";
    until("stalled handshakes to time out", || (daemon.metric(timeouts) > 0.0).then_some(()));
    drop((stalled, silent));
}

#[test]
fn plain_http_on_the_tls_port_gets_a_400_and_never_a_key() {
    let authority = Authority::new();
    let daemon = daemon(&authority, &[]);
    for wire in
        [request("/key/32"), request("/key/32").replace("GET", "POST"), "P".into(), "GET /".repeat(5000)]
    {
        let mut client = Client::connect(daemon.keys());
        let response = client.send(&wire).response();
        assert_eq!((response.status, response.problem()), (400, "This port speaks TLS: use https://".into()));
        for (name, value) in
            [("connection", "close"), ("cache-control", "no-store"), ("x-content-type-options", "nosniff")]
        {
            assert_eq!(response.header(name), Some(value));
        }
        assert!(response.header("date").is_some());
        assert!(client.is_closed());
    }
    wait_for_failures(&daemon, "plain_http", 4.0);
    assert_eq!(daemon.metric("key_length_bytes_count"), 0.0);
    // Neither TLS nor HTTP: an alert.
    let mut client = Client::connect(daemon.keys());
    client.send([0x80, 0x2e, 1, 0, 2, 0, 0x15, 0, 0, 0, 0x10]);
    let mut bytes = Vec::new();
    let _ = client.stream.read_to_end(&mut bytes); // may be reset because of unread bytes
    assert!(bytes.is_empty() || bytes.starts_with(&[0x15, 3]), "an alert at most: {bytes:?}");
    wait_for_failures(&daemon, "malformed", 1.0);
    assert_eq!(get(daemon.metrics(), "/health").text(), "OK", "the metrics port stays plain HTTP");
}

#[test]
fn over_limit_tls_connections_get_health_and_503() {
    let authority = Authority::new();
    let daemon = daemon(&authority, &[("MAX_CONNECTIONS", "2"), ("HEAD_TIMEOUT", "3600")]);
    let config = tls13(&authority);
    let mut held: Vec<_> = (0..2).map(|_| connect(daemon.keys(), &config)).collect();
    for client in &mut held {
        // With the beginning of a second request, because an idle connection would be evicted.
        assert_eq!(client.send(request("/key/32") + "GET").response().status, 200);
        client.stream.flush().unwrap();
    }
    unless_stalled(|| {
        let mut client = connect(daemon.keys(), &config);
        assert_eq!(client.send(request("/health")).response().status, 200);
    });
    unless_stalled(|| {
        let mut client = connect(daemon.keys(), &config);
        assert_eq!(client.send(request("/key/32")).response().problem(), "Too many connections");
        assert!(client.is_closed());
    });
}

#[test]
fn a_client_ca_admits_only_its_clients() {
    let (authority, clients) = (Authority::new(), Authority::new());
    let directory = TempDirectory::new();
    authority.server().write(&directory);
    let ca = directory.write("clients.pem", &clients.pem());
    let daemon = start(directory, &[("TLS_CLIENT_CA", ca.to_str().unwrap()), ("AUDIT", "true")]);
    let with = |identity: &Identity| client_config(&authority, &[&TLS13], Some(identity));
    let mut client = connect(daemon.keys(), &with(&clients.client("web")));
    assert_eq!(client.send(request("/key/32")).response().body.len(), 32);
    daemon.wait_for_log("certificate=CN:web");

    assert!(handshake_error(&daemon, &tls13(&authority)).contains("CertificateRequired"), "no certificate");
    assert!(
        handshake_error(&daemon, &with(&authority.client("web"))).contains("UnknownCA"),
        "a certificate of another CA"
    );
    let expired = clients.issue(|params| {
        params.distinguished_name.push(DnType::CommonName, "web");
        params.not_after = date_time_ymd(2020, 1, 1);
    });
    assert!(
        handshake_error(&daemon, &with(&expired)).contains("CertificateExpired"),
        "an expired certificate"
    );
    wait_for_failures(&daemon, "client_certificate", 3.0);
    let for_servers = clients.issue(|params| {
        params.distinguished_name.push(DnType::CommonName, "web");
        params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    });
    let _ = handshake_error(&daemon, &with(&for_servers));
    wait_for_failures(&daemon, "client_certificate", 4.0);
    let nameless = clients.issue(|_| {});
    // Closed after the handshake, because TLS has no alert for this.
    assert!(connect(daemon.keys(), &with(&nameless)).send(request("/key/32")).is_closed());
    wait_for_failures(&daemon, "client_certificate", 5.0);
    assert_eq!(get(daemon.metrics(), "/readyz").status, 200, "probes use the metrics port");
}

fn wait_for_renewal(daemon: &Daemon, authority: &Authority, identity: &Identity) {
    until("the new certificate", || {
        let mut client = connect(daemon.keys(), &tls13(authority));
        assert_eq!(client.send(request("/key/32")).response().status, 200);
        (client.stream.conn.peer_certificates().unwrap()[0] == identity.der()).then_some(())
    });
}

#[test]
fn a_renewed_certificate_is_loaded_under_load_without_errors() {
    let authority = Authority::new();
    let daemon = daemon(&authority, &[]);
    let config = tls13(&authority);
    let stop = AtomicBool::new(false);
    let is_running = || !stop.load(Ordering::Relaxed);
    let request_on_new_connections = || {
        let mut served = 0;
        while is_running() {
            assert_eq!(connect(daemon.keys(), &config).send(request("/key/32")).response().body.len(), 32);
            served += 1;
        }
        served
    };
    let request_on_one_connection = || {
        let mut client = connect(daemon.keys(), &config);
        let mut served = 0;
        while is_running() {
            assert_eq!(client.send(request("/key/32")).response().body.len(), 32);
            served += 1;
        }
        served
    };
    /// Stops the clients even if the test fails: the scope would wait for them forever.
    struct Stop<'a>(&'a AtomicBool);
    impl Drop for Stop<'_> {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    std::thread::scope(|scope| {
        let stop = Stop(&stop);
        let clients = [
            scope.spawn(request_on_new_connections),
            scope.spawn(request_on_new_connections),
            scope.spawn(request_on_one_connection),
        ];
        let renew = |with_signal: bool| {
            let renewed = authority.server();
            renewed.write(&daemon.directory);
            if with_signal {
                daemon.signal("HUP");
            }
            wait_for_renewal(&daemon, &authority, &renewed);
        };
        for _ in 0..5 {
            renew(true);
        }
        renew(false); // noticed without a signal, within seconds
        drop(stop);
        for client in clients {
            assert!(client.join().unwrap() > 0);
        }
    });
    daemon.wait_for_metric("tls_last_reload_successful", 1.0);
}

#[test]
fn a_failed_renewal_keeps_the_certificate_and_is_reported() {
    let authority = Authority::new();
    let directory = TempDirectory::new();
    let first = authority.server();
    first.write(&directory);
    let daemon = start(directory, &[]);
    let second = authority.server();
    daemon.directory.write("cert.pem", &second.certificate);
    daemon.wait_for_metric("tls_last_reload_successful", 0.0);
    daemon.wait_for_log("TLS reload failed, keeping the previous certificate");
    daemon.wait_for_log("expected the key of the first certificate in");
    wait_for_renewal(&daemon, &authority, &first);
    daemon.signal("HUP");
    daemon.wait_for_log("keeping the previous configuration");
    wait_for_renewal(&daemon, &authority, &first);
    second.write(&daemon.directory);
    wait_for_renewal(&daemon, &authority, &second);
    daemon.wait_for_metric("tls_last_reload_successful", 1.0);
}

#[test]
fn a_reload_applies_other_files_and_another_client_ca() {
    let (authority, clients) = (Authority::new(), Authority::new());
    let directory = TempDirectory::new();
    authority.server().write(&directory);
    directory.write("clients.pem", &clients.pem());
    let path = |name: &str| directory.file(name).display().to_string();
    let paths = format!("tls-cert = {:?}\ntls-key = {:?}\n", path("cert.pem"), path("key.pem"));
    let with_ca = format!("{paths}tls-client-ca = {:?}\n", path("clients.pem"));
    directory.write("config.toml", &paths);
    let daemon = Daemon::start_with(directory, |command| {
        command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
    });
    let mut before = connect(daemon.keys(), &tls13(&authority));
    assert_eq!(before.send(request("/key/32")).response().status, 200);
    daemon.directory.write("config.toml", &with_ca);
    daemon.signal("HUP");
    daemon.wait_for_log("configuration reloaded");
    assert!(handshake_error(&daemon, &tls13(&authority)).contains("CertificateRequired"));
    assert_eq!(before.send(request("/key/32")).response().status, 200, "an open connection continues");
    daemon.directory.write("config.toml", "");
    daemon.signal("HUP");
    daemon.wait_for_log("setting=tls-cert");
    assert!(
        handshake_error(&daemon, &tls13(&authority)).contains("CertificateRequired"),
        "a reload never turns TLS off"
    );
    daemon.wait_for_log("TLS is no longer configured: it stays on until the next restart");
    assert!(!daemon.log().contains("protection removed"), "{}", daemon.log());
    daemon.directory.write("config.toml", &paths);
    daemon.signal("HUP");
    daemon.wait_for_log("protection removed by this reload settings=tls-client-ca");
    until("the third reload", || (daemon.log().matches("configuration reloaded").count() == 3).then_some(()));
    let served = || connect(daemon.keys(), &tls13(&authority)).send(request("/key/32")).response().status;
    assert_eq!(served(), 200);
}

/// A certificate of `authority` that expires after `validity`.
fn expiring(authority: &Authority, validity: Duration) -> Identity {
    authority.issue(|params| {
        params.subject_alt_names = vec![SanType::IpAddress([127, 0, 0, 1].into())];
        params.not_after = (SystemTime::now() + validity).into();
    })
}

const EXPIRES_SOON: &str = "the TLS certificate expires in less than 7 days";

#[test]
fn expiry_is_a_metric_and_an_expired_certificate_a_warning() {
    let authority = Authority::new();
    let directory = TempDirectory::new();
    authority.issue(|params| params.not_after = date_time_ymd(2020, 1, 1)).write(&directory);
    let daemon = start(directory, &[]);
    assert_eq!(daemon.metric("tls_certificate_not_after_timestamp_seconds"), 1_577_836_800.0);
    daemon.wait_for_log("INFO keys are served over TLS not_after=2020-01-01T00:00:00Z");
    daemon.wait_for_log(
        "WARN the TLS certificate has expired: clients will refuse it not_after=2020-01-01T00:00:00Z",
    );
    assert!(!daemon.log().contains(EXPIRES_SOON), "{}", daemon.log());
    let plain = Daemon::start(&[]);
    assert!(!get(plain.metrics(), "/metrics").text().contains("tls_"), "no TLS metrics without TLS");
}

#[test]
fn a_certificate_that_expires_within_seven_days_is_a_warning() {
    let authority = Authority::new();
    let warnings = |daemon: &Daemon| daemon.log().matches(EXPIRES_SOON).count();
    let directory = TempDirectory::new();
    expiring(&authority, 7 * DAY + HOUR).write(&directory);
    let daemon = start(directory, &[]);
    daemon.wait_for_log("Keys on"); // the last log line of a start, which another thread writes
    assert_eq!(warnings(&daemon), 0, "{}", daemon.log());
    // A reload by a signal, and one after a change of the files.
    expiring(&authority, 7 * DAY - HOUR).write(&daemon.directory);
    daemon.signal("HUP");
    daemon.wait_for_log(EXPIRES_SOON);
    let renewed = authority.issue(|params| params.not_after = date_time_ymd(2100, 2, 28));
    renewed.write(&daemon.directory);
    daemon.wait_for_log("INFO TLS certificate reloaded not_after=2100-02-28T00:00:00Z");
    assert_eq!(warnings(&daemon), 1, "{}", daemon.log());
    // The first certificate of the chain to expire counts: here the second, after one that is valid for longer.
    let chain = Identity {
        certificate: renewed.certificate + &expiring(&authority, DAY).certificate,
        key: renewed.key,
    };
    chain.write(&daemon.directory);
    until("the second warning", || (warnings(&daemon) == 2).then_some(()));
    let expired = authority.issue(|params| params.not_after = date_time_ymd(2020, 1, 1));
    expired.write(&daemon.directory);
    daemon.wait_for_log("the TLS certificate has expired");
    // At a start.
    let directory = TempDirectory::new();
    expiring(&authority, DAY).write(&directory);
    let daemon = start(directory, &[]);
    daemon.wait_for_log("Keys on");
    assert_eq!(warnings(&daemon), 1, "{}", daemon.log());
}

#[test]
fn a_certificate_loaded_without_its_client_ca_is_reported() {
    let (authority, clients) = (Authority::new(), Authority::new());
    let directory = TempDirectory::new();
    authority.server().write(&directory);
    let ca = directory.write("clients.pem", &clients.pem());
    let daemon = start(directory, &[("TLS_CLIENT_CA", ca.to_str().unwrap())]);
    daemon.wait_for_log("Keys on");
    assert!(!daemon.log().contains(EXPIRES_SOON));
    daemon.directory.write("clients.pem", "no certificate\n");
    expiring(&authority, DAY).write(&daemon.directory);
    daemon.wait_for_log("TLS reload failed, keeping the previous client CA");
    daemon.wait_for_log("changed TLS certificate loaded not_after=");
    daemon.wait_for_log(EXPIRES_SOON);
}

#[test]
fn a_credential_is_loaded_by_name() {
    let authority = Authority::new();
    let directory = TempDirectory::new();
    authority.server().write(&directory);
    let credentials = directory.file("");
    let daemon = Daemon::start_with(directory, |command| {
        command.args(["--host", "127.0.0.1", "--srv-port", "0", "--metrics-port", "0"]);
        command.env("CREDENTIALS_DIRECTORY", credentials);
        command.env("KEYSERVICE_TLS_CERT", "credential:cert.pem");
        command.env("KEYSERVICE_TLS_KEY", "credential:key.pem");
    });
    assert_eq!(connect(daemon.keys(), &tls13(&authority)).send(request("/key/32")).response().status, 200);
}

/// The exit status of `--check` with these settings, and its errors.
fn check(directory: &TempDirectory, settings: &[(&str, &str)]) -> (Option<i32>, String) {
    let mut command = key_service(directory);
    command
        .arg("--check")
        .arg("--config")
        .arg(directory.file("config.toml"))
        .env_remove("CREDENTIALS_DIRECTORY");
    for (name, value) in settings {
        command.env(format!("KEYSERVICE_{name}"), value);
    }
    let ended = run_to_end(command);
    (ended.status.code(), String::from_utf8(ended.stderr).unwrap())
}

/// Checks that `--check` refuses `settings` with all `expected` errors.
fn assert_refused(directory: &TempDirectory, settings: &[(&str, &str)], expected: &[&str]) {
    let (status, errors) = check(directory, settings);
    assert_eq!(status, Some(78), "{settings:?}: {errors}");
    for expected in expected {
        assert!(errors.contains(expected), "{settings:?}: {expected}\nis not in\n{errors}");
    }
}

#[test]
fn incomplete_or_unknown_tls_settings_are_errors() {
    let directory = TempDirectory::new();
    let required = [
        ("TLS_CERT", "tls-cert: expected tls-key beside it, found none (KEYSERVICE_TLS_CERT)"),
        ("TLS_KEY", "tls-key: expected tls-cert beside it, found none (KEYSERVICE_TLS_KEY)"),
        (
            "TLS_CLIENT_CA",
            "tls-client-ca: expected tls-cert and tls-key beside it, found none (KEYSERVICE_TLS_CLIENT_CA)",
        ),
    ];
    Authority::new().server().write(&directory);
    let path = directory.file("cert.pem").display().to_string();
    for (setting, expected) in required {
        assert_refused(&directory, &[(setting, &path)], &[expected]);
    }
    assert_refused(
        &directory,
        &[("TLS_CERT", "credential:a/b"), ("TLS_MIN_VERSION", "1.1")],
        &[
            "tls-cert: expected a path or credential:NAME, found \"credential:a/b\"",
            "tls-min-version: expected \"1.2\" or \"1.3\", found 1.1 (KEYSERVICE_TLS_MIN_VERSION)",
        ],
    );
}

#[test]
fn every_certificate_and_key_error_is_reported_with_source() {
    let authority = Authority::new();
    let directory = TempDirectory::new();
    authority.server().write(&directory);
    let file = |name: &str| directory.file(name).display().to_string();
    let write = |name: &str, text: &str, mode: u32| {
        let path = directory.write(name, text);
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        path.display().to_string()
    };
    let (cert, key, absent) = (file("cert.pem"), file("key.pem"), file("absent.pem"));
    let other = write("other.pem", &authority.server().key, 0o600);
    let open = write("open.pem", &authority.server().key, 0o644);
    let broken = write("broken.pem", "-----BEGIN CERTIFICATE-----\nAAAA\n", 0o600);
    let empty = write("empty.pem", "", 0o600);
    assert_eq!(check(&directory, &[("TLS_CERT", &cert), ("TLS_KEY", &key)]), (Some(0), String::new()));
    for (settings, expected) in [
        (
            vec![("TLS_CERT", &*absent), ("TLS_KEY", &open), ("TLS_CLIENT_CA", &empty), ("WORKERS", "-1")],
            vec![
                "absent.pem: expected a file that can be read, found: No such file",
                "tls-key: expected a key that others have no access to, found mode 0644: chmod o= /",
                "tls-client-ca: expected PEM certificates, found an empty file in /",
                "workers: expected",
            ],
        ),
        (
            vec![("TLS_CERT", &*cert), ("TLS_KEY", &other)],
            vec!["tls-key: expected the key of the first certificate in /", "found another in /"],
        ),
        (
            vec![("TLS_CERT", &*broken), ("TLS_KEY", &broken)],
            vec![
                "tls-cert: expected PEM certificates, found in /",
                "tls-key: expected a PEM private key, found malformed",
            ],
        ),
        (
            vec![("TLS_CERT", &*key), ("TLS_KEY", &cert)],
            vec![
                "tls-cert: expected PEM certificates, found none",
                "tls-key: expected a PEM private key without",
            ],
        ),
        (
            vec![("TLS_CERT", "/dev"), ("TLS_KEY", "credential:key")],
            vec!["/dev: expected a regular file, found something else (KEYSERVICE_TLS_CERT)"],
        ),
    ] {
        assert_refused(&directory, &settings, &expected);
    }
}

/// An element of DER (X.690 section 8.1).
fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let [high, low] = u16::try_from(content.len()).unwrap().to_be_bytes();
    let header = match (high, low) {
        (0, 0..0x80) => vec![tag, low],
        (0, _) => vec![tag, 0x81, low],
        _ => vec![tag, 0x82, high, low],
    };
    [&header, content].concat()
}

/// A PKCS #1 private key with a modulus of `bits`. The key is invalid, but its size is checked first.
fn rsa_key(bits: usize) -> Vec<u8> {
    let modulus = [&[0][..], &vec![0xff; bits / 8]].concat();
    der(0x30, &[der(2, &[0]), der(2, &modulus), der(2, &[1, 0, 1])].concat())
}

/// A PKCS #8 private key with the `identifiers` of its algorithm in DER.
fn pkcs8_key(identifiers: &[u8], key: &[u8]) -> Vec<u8> {
    der(0x30, &[der(2, &[0]), der(0x30, identifiers), der(4, key)].concat())
}

fn pem(label: &str, der: &[u8]) -> String {
    use base64ct::Encoding;
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", base64ct::Base64::encode_string(der))
}

/// Checks that `--check` reports exactly one error with these files, which contains `expected`.
fn assert_pem_error(certificate: &str, key: &str, expected: &str) {
    let directory = TempDirectory::new();
    for (name, text) in [("cert.pem", certificate), ("key.pem", key)] {
        // Encoded in Latin-1, so that the cases can have any byte; a byte order mark in UTF-8.
        let bytes = text
            .chars()
            .flat_map(|c| u8::try_from(c).map_or_else(|_| c.to_string().into(), |byte| vec![byte]));
        fs::write(directory.file(name), bytes.collect::<Vec<_>>()).unwrap();
        fs::set_permissions(directory.file(name), fs::Permissions::from_mode(0o600)).unwrap();
    }
    let file = |name: &str| directory.file(name).display().to_string();
    let settings = [("TLS_CERT", &*file("cert.pem")), ("TLS_KEY", &file("key.pem"))];
    let (status, errors) = check(&directory, &settings);
    assert_eq!(status, Some(78), "{expected}: {errors}");
    assert!(errors.contains(expected) && errors.lines().count() == 1, "{expected}\nis not in\n{errors}");
}

#[test]
fn invalid_certificates_are_described() {
    let (authority, other) = (Authority::new(), Authority::new().server());
    let Identity { certificate, key } = authority.server();
    let ca = authority.pem();
    let trusted = certificate.replace("CERTIFICATE", "TRUSTED CERTIFICATE");
    let utf16: String = certificate.chars().flat_map(|c| [c, '\0']).collect();
    for (certificate, key, expected) in [
        (format!("{ca}{certificate}"), &key, "tls-cert: expected the certificate of the key in "),
        (format!("{ca}{certificate}"), &key, "found it as number 2 in "),
        (format!("{certificate}{ca}"), &other.key, "tls-key: expected the key of the first certificate in "),
        (
            format!("\u{feff}{certificate}{ca}"),
            &key,
            "beginning of line 1, found a byte order mark (U+FEFF) before it in ",
        ),
        (format!("note\n  {certificate}{ca}"), &key, "beginning of line 2, found spaces before it in "),
        (format!("{trusted}{ca}"), &key, "line 1, found -----BEGIN TRUSTED CERTIFICATE----- in "),
        (format!("\u{ff}\u{fe}{utf16}"), &key, "tls-cert: expected PEM certificates, found UTF-16 in "),
        ("0\u{82}\u{1}".into(), &key, "tls-cert: expected PEM certificates, found DER in "),
    ] {
        assert_pem_error(&certificate, key, expected);
    }
}

#[test]
fn invalid_keys_are_described() {
    let Identity { certificate, key } = Authority::new().server();
    let rsa = [6, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0xd, 1, 1, 1, 5, 0];
    let secp256k1 = [6, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 6, 5, 0x2b, 0x81, 4, 0, 0xa];
    let accepted =
        "expected a private key of RSA (2048 to 8192 bits), ECDSA (P-256, P-384 or P-521) or Ed25519, found";
    for (key, expected) in [
        (format!("\u{feff}{key}"), "tls-key: expected -----BEGIN".to_owned()),
        (pem("RSA PRIVATE KEY", &rsa_key(1024)), format!("tls-key: {accepted} an RSA key of 1024 bits in ")),
        (
            pem("PRIVATE KEY", &pkcs8_key(&rsa, &rsa_key(512))),
            format!("tls-key: {accepted} an RSA key of 512 bits in "),
        ),
        (
            pem("PRIVATE KEY", &pkcs8_key(&secp256k1, b"")),
            format!("tls-key: {accepted} a key of algorithm 1.2.840.10045.2.1 on curve 1.3.132.0.10 in "),
        ),
        (
            key.replace("PRIVATE", "ENCRYPTED PRIVATE"),
            "tls-key: expected a PEM private key without a passphrase, found one with a passphrase in "
                .into(),
        ),
    ] {
        assert_pem_error(&certificate, &key, &expected);
    }
}

#[test]
fn credentials_missing_in_a_shell_are_not_checked() {
    let authority = Authority::new();
    let directory = TempDirectory::new();
    authority.server().write(&directory);
    let (cert, absent) = (directory.file("cert.pem"), directory.file("absent.pem"));
    for (cert, status) in [(cert, 0), (absent, 78)] {
        let settings = [("TLS_CERT", cert.to_str().unwrap()), ("TLS_KEY", "credential:tls.key")];
        let (found, errors) = check(&directory, &settings);
        assert_eq!(found, Some(status), "{errors}");
        assert_eq!(errors.contains("tls-key: credential:tls.key is not checked"), status == 0, "{errors}");
        assert_eq!(errors.lines().count(), 1, "{errors}");
    }
}

#[test]
fn files_writable_by_others_are_refused() {
    let authority = Authority::new();
    let directory = TempDirectory::new();
    authority.server().write(&directory);
    directory.write("ca.pem", &authority.pem());
    let file = |name: &str| directory.file(name).to_str().unwrap().to_owned();
    let settings = [
        ("TLS_CERT", &*file("cert.pem")),
        ("TLS_KEY", &*file("key.pem")),
        ("TLS_CLIENT_CA", &*file("ca.pem")),
    ];
    // A Kubernetes Secret with an fsGroup has mode 0440 or 0640, a ConfigMap 0644, a systemd credential 0400 or 0440.
    for (name, setting, good) in
        [("cert.pem", "tls-cert", 0o644), ("key.pem", "tls-key", 0o640), ("ca.pem", "tls-client-ca", 0o444)]
    {
        for (mode, status) in [(0o400, 0), (0o440, 0), (good, 0), (0o660, 78), (good | 0o002, 78)] {
            fs::set_permissions(directory.file(name), fs::Permissions::from_mode(mode)).unwrap();
            let (found, errors) = check(&directory, &settings);
            assert_eq!(found, Some(status), "{name} {mode:o}: {errors}");
            let expected =
                format!("{setting}: {}: expected a file that only its owner may write to", file(name));
            assert_eq!(errors.contains(&expected), status != 0, "{name} {mode:o}: {errors}");
        }
        fs::set_permissions(directory.file(name), fs::Permissions::from_mode(good)).unwrap();
    }
}

#[test]
fn a_missing_or_writable_client_ca_stays_in_force() {
    let (authority, clients) = (Authority::new(), Authority::new());
    let directory = TempDirectory::new();
    authority.server().write(&directory);
    let ca = directory.write("clients.pem", &clients.pem());
    let daemon = start(directory, &[("TLS_CLIENT_CA", ca.to_str().unwrap())]);
    let reload = || {
        daemon.signal("HUP");
        daemon.manager.wait_for("RELOADING=1");
        daemon.manager.wait_for("READY=1")
    };
    let is_refused = |ready: &[String]| ready.iter().any(|line| line.contains(" was refused: tls-client-ca"));
    fs::set_permissions(&ca, fs::Permissions::from_mode(0o664)).unwrap();
    assert!(is_refused(&reload()), "{}", daemon.log());
    fs::remove_file(&ca).unwrap();
    assert!(is_refused(&reload()), "{}", daemon.log());
    assert!(handshake_error(&daemon, &tls13(&authority)).contains("CertificateRequired"));
    let client = clients.issue(|params| params.distinguished_name.push(DnType::CommonName, "web"));
    let config = client_config(&authority, &[&TLS13], Some(&client));
    assert_eq!(connect(daemon.keys(), &config).send(request("/key/32")).response().status, 200);
}

#[test]
fn a_renewal_is_loaded_while_the_configuration_is_refused() {
    let authority = Authority::new();
    let daemon = daemon(&authority, &[]);
    daemon.directory.write("config.toml", "max-sise = 1\n");
    daemon.signal("HUP");
    daemon.wait_for_log("keeping the previous configuration");
    let renewed = authority.server();
    renewed.write(&daemon.directory);
    wait_for_renewal(&daemon, &authority, &renewed);
    daemon.wait_for_metric("config_last_reload_successful", 0.0);
    daemon.wait_for_metric("tls_last_reload_successful", 1.0);
}

#[test]
fn health_accepts_only_the_configured_certificate() {
    let authority = Authority::new();
    let daemon = daemon(&authority, &[]);
    let health = |directory: &TempDirectory, url: String, ca: Option<&str>| {
        let mut command = key_service(directory);
        command.args(["health", "--url", &url]);
        command.env("KEYSERVICE_TLS_CERT", directory.file("cert.pem"));
        command.env("KEYSERVICE_TLS_KEY", "/absent: not read by health");
        if let Some(ca) = ca {
            command.env("KEYSERVICE_TLS_CLIENT_CA", ca);
        }
        let ended = run_to_end(command);
        (ended.status.code(), String::from_utf8([ended.stdout, ended.stderr].concat()).unwrap())
    };
    unless_stalled(|| {
        assert_eq!(
            health(&daemon.directory, format!("https://{}", daemon.keys()), None),
            (Some(0), "OK\n".into())
        );
    });
    let stranger = TempDirectory::new();
    authority.server().write(&stranger);
    let (status, output) = health(&stranger, format!("https://{}", daemon.keys()), None);
    assert_eq!(status, Some(1));
    assert!(output.contains("expected the certificate that is configured, found another"), "{output}");
}

#[test]
fn health_finds_a_tls_service_by_its_configuration() {
    // health has to know the ports, so port 0 can't be used.
    for case in ["", "mutual", "certificate only", "unreadable files", "credentials", "errors", "URL only"] {
        let mutual = case == "mutual";
        let authority = Authority::new();
        let directory = TempDirectory::new();
        authority.server().write(&directory);
        let ((_keys, keys), (_metrics, metrics)) = (held_port(), held_port());
        let file = |name: &str| directory.file(name).display().to_string();
        let mut config = format!(
            "host = \"127.0.0.1\"\nsrv-port = {keys}\nmetrics-port = {metrics}\ntls-cert = {:?}\ntls-key = {:?}\n",
            file("cert.pem"),
            file("key.pem")
        );
        if mutual {
            directory.write("clients.pem", &Authority::new().pem());
            config += &format!("tls-client-ca = {:?}\n", file("clients.pem"));
        }
        directory.write("config.toml", &config);
        let daemon = Daemon::start_with(directory, |_| {});
        // The caller of health may have another configuration than the service.
        let addresses = format!("host = \"127.0.0.1\"\nsrv-port = {keys}\nmetrics-port = {metrics}\n");
        let certificate = format!("tls-cert = {:?}\n", daemon.directory.file("cert.pem"));
        let credentials =
            "tls-cert = \"credential:a\"\ntls-key = \"credential:b\"\ntokens-file = \"credential:c\"\n";
        let caller_config = match case {
            "certificate only" => addresses + &certificate,
            "unreadable files" => {
                addresses + "tls-cert = \"/absent\"\ntls-key = \"/absent\"\ntokens-file = \"/absent\"\n"
            }
            "credentials" => addresses + credentials,
            "errors" => addresses + &certificate + "max-size = 0\nmax-sise = 1\ntls-min-version = 3\n",
            "URL only" => "not TOML".into(),
            _ => config,
        };
        let path = daemon.directory.write("caller.toml", &caller_config);
        unless_stalled(|| {
            let mut command = key_service(&daemon.directory);
            command.arg("health").arg("--config").arg(&path).env_remove("CREDENTIALS_DIRECTORY");
            if case == "URL only" {
                command.args(["--url", &format!("http://127.0.0.1:{metrics}")]);
            }
            let ended = run_to_end(command);
            let output = String::from_utf8([ended.stdout, ended.stderr].concat()).unwrap();
            assert_eq!((ended.status.code(), output.as_str()), (Some(0), "OK\n"), "{case}");
        });
    }
}

#[test]
fn health_names_an_unreadable_certificate() {
    let directory = TempDirectory::new();
    let (_metrics, metrics) = held_port(); // nothing listens there
    for (port, expected) in [
        (metrics, format!("127.0.0.1:{metrics}/health: Connection refused (os error 111) (metrics: /absent: expected a file")),
        (1123, "expected a metrics-port of its own to check health, found that of srv-port: /absent: expected a file".into()),
    ] {
        let mut command = key_service(&directory);
        command.args(["health", "--host", "127.0.0.1", "--metrics-port", &port.to_string()]);
        command.env("KEYSERVICE_TLS_CERT", "/absent");
        let ended = run_to_end(command);
        let output = String::from_utf8(ended.stderr).unwrap();
        assert_eq!(ended.status.code(), Some(1), "{output}");
        assert!(output.contains(&expected), "{output}");
    }
}

#[test]
fn health_reports_the_wrong_protocol() {
    let authority = Authority::new();
    let daemon = daemon(&authority, &[]);
    let server_that_sends = |bytes: &'static [u8]| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = std::thread::spawn(move || {
            let mut client = listener.accept().unwrap().0;
            let mut request = Vec::new();
            while !request.ends_with(b"\r\n\r\n") {
                let mut bytes = [0; 1024];
                let read = client.read(&mut bytes).unwrap();
                assert!(read > 0, "the whole request arrives");
                request.extend_from_slice(&bytes[..read]);
            }
            client.write_all(bytes).unwrap();
        });
        (address, server)
    };
    let found_tls = "expected plain HTTP, found a port that speaks TLS: set the service's certificate (tls-cert, or \
                      KEYSERVICE_TLS_CERT=FILE) and use --url https://";
    let health = |url: Option<String>, address: SocketAddr, settings: &[(&str, &str)]| {
        let mut command = key_service(&daemon.directory);
        command.args(["health", "--host", "127.0.0.1", "--srv-port", &address.port().to_string()]);
        for (name, value) in settings {
            command.env(format!("KEYSERVICE_{name}"), value);
        }
        command.args(url.map(|url| format!("--url={url}")));
        let ended = run_to_end(command);
        let output = String::from_utf8([ended.stdout, ended.stderr].concat()).expect("text");
        let is_plain = |byte: u8| matches!(byte, b' '..=b'~' | b'\n');
        assert!(output.bytes().all(is_plain), "{output:?}");
        assert_eq!(ended.status.code(), Some(1), "{output}");
        output
    };
    // By a configuration without TLS, and by a URL. With a PROXY header, the response is a TLS alert.
    let keys = daemon.keys();
    let proxy = [("PROXY_PROTOCOL", "true"), ("TRUSTED_PROXIES", "127.0.0.1")];
    for output in [
        health(None, keys, &[]),
        health(Some(format!("http://{keys}")), keys, &[]),
        health(None, keys, &proxy),
    ] {
        assert!(output.contains(found_tls), "{output}");
    }
    let certificate = daemon.directory.file("cert.pem").display().to_string();
    let pinned = [("TLS_CERT", certificate.as_str())];
    let output = health(Some(format!("https://{}", daemon.metrics())), keys, &pinned);
    assert!(output.contains("expected TLS, found something else: use --url http://"), "{output}");

    for (bytes, expected) in [
        (&b"\x15\x03\x01\0\x02\x02\x46"[..], found_tls), // an alert before any handshake
        (b"\0\x1b[2J\xff", "expected an HTTP response, found \"\\u{0}\\u{1b}[2J\\u{fffd}\""),
        (b"SSH-2.0-x\r\n", "expected an HTTP response, found \"SSH-2.0-x\""),
        (b"", "expected an HTTP response, found the end of the connection"),
        (b"HTTP/1.1 503 \x1b[2J\r\n\r\n\x07\x1b]0;a", "found \"HTTP/1.1 503 \\u{1b}[2J\" \\u{7}\\u{1b}]0;a"),
    ] {
        let (address, server) = server_that_sends(bytes);
        let output = health(Some(format!("http://{address}")), address, &[]);
        server.join().unwrap();
        assert!(output.contains(expected), "{output}");
    }
}

#[test]
fn unix_sockets_do_not_use_tls() {
    let authority = Authority::new();
    let directory = TempDirectory::new();
    authority.server().write(&directory);
    let (certificate, key) = (directory.file("cert.pem"), directory.file("key.pem"));
    let host = format!("unix:{}", directory.file("keys").display());
    let socket = directory.file("keys");
    let _daemon = Daemon::start_with(directory, |command| {
        command.args(["--host", &host, "--metrics-port", "0"]);
        command.env("KEYSERVICE_TLS_CERT", certificate).env("KEYSERVICE_TLS_KEY", key);
    });
    let mut client = Client::new(std::os::unix::net::UnixStream::connect(socket).unwrap());
    assert_eq!(client.send(request("/key/32")).response().body.len(), 32);
}
